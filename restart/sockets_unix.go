//go:build unix

package restart

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/c2db162c/stoppablelistener/internal/socket"
)

// The protocol between a parent and its child, which must not change: the parent runs an
// older version of this package than its children.
//
// A child is started with one end of a socket pair, the link, as descriptor 3, and with the
// listening sockets as the descriptors after it. Their names, each followed by a newline,
// are in the environment variable socketsEnv. When the child is ready, it sends its own
// sockets, each as name, newline and descriptor, and then another newline. To stop the
// child, the parent sends the number of a signal as one byte, and closes its end.
const (
	socketsEnv = "STOPPABLELISTENER_RESTART"
	linkFD     = 3
)

// passedNames are the names of the sockets that the parent has passed to this process; nil
// if there is no parent.
var passedNames []string

// Before main, so that a process which main starts inherits neither the sockets nor the
// variable.
func init() {
	value, ok := os.LookupEnv(socketsEnv)
	if !ok {
		closeOnExec(activated())
		return
	}
	_ = os.Unsetenv(socketsEnv)
	passedNames = lines(value)
	closeOnExec(1 + len(passedNames))
}

// closeOnExec sets close-on-exec for n descriptors from linkFD on.
func closeOnExec(n int) {
	for i := range n {
		syscall.CloseOnExec(linkFD + i)
	}
}

// process is a process with a parent, or the first one.
type process struct {
	link      *net.UnixConn // to the parent; nil in the first process
	readyOnce sync.Once
	isReady   chan struct{} // no values sent; closed by Ready

	mu        sync.Mutex  // guards the fields below
	inherited []inherited // not returned by Listen yet
	held      []held      // for the child, or to be sent to the parent
}

// An inherited listener has the name that the parent has for it; none if it comes from
// socket activation.
type inherited struct {
	name string
	*net.TCPListener
}

// A held socket is a duplicate of one that Listen has returned here or in a child. It is a
// plain descriptor, because files are added to the network poller, which would wake this
// process for each connection that another one accepts.
type held struct {
	name string // network and address, as passed to Listen
	fd   int
}

// inherit takes over what this process has been started with.
func (p *process) inherit() error {
	p.isReady = make(chan struct{})
	fd, names := linkFD, passedNames
	if names == nil {
		names = make([]string, activated())
		for _, key := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
			_ = os.Unsetenv(key)
		}
	} else {
		link, err := unixConn(fd)
		if err != nil {
			return err
		}
		p.link = link
		fd++
	}
	for i, name := range names {
		l, err := fileListener(fd + i)
		if tcp, ok := l.(*net.TCPListener); ok {
			p.inherited = append(p.inherited, inherited{name, tcp})
		} else if err == nil {
			_ = l.Close() // socket activation passes other sockets too
		}
	}
	return nil
}

// activated returns how many descriptors socket activation has passed to this process; see
// sd_listen_fds(3).
func activated() int {
	if os.Getenv("LISTEN_PID") != strconv.Itoa(os.Getpid()) {
		return 0
	}
	n, _ := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	return max(n, 0)
}

func (p *process) listen(network, address string) (*net.TCPListener, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := p.takeInherited(network, address)
	if l == nil {
		created, err := net.Listen(network, address)
		if err != nil {
			return nil, err
		}
		l = created.(*net.TCPListener)
	}
	if closed(p.isReady) {
		return l, nil
	}
	fd, err := socket.DupConn(l)
	if err != nil {
		_ = l.Close()
		return nil, err
	}
	p.held = append(p.held, held{network + " " + address, fd})
	return l, nil
}

// takeInherited returns the inherited listener for an address, and nil if there is none.
func (p *process) takeInherited(network, address string) *net.TCPListener {
	i := slices.IndexFunc(p.inherited, func(l inherited) bool { return l.name == network+" "+address })
	if addr, err := net.ResolveTCPAddr(network, address); i < 0 && err == nil {
		i = slices.IndexFunc(p.inherited, func(l inherited) bool { return l.boundTo(network, addr) })
	}
	if i < 0 {
		return nil // net.Listen reports the error, if any
	}
	l := p.inherited[i].TCPListener
	p.inherited = slices.Delete(p.inherited, i, i+1)
	return l
}

// boundTo reports whether l is what net.Listen would return for a network and an address.
func (l inherited) boundTo(network string, addr *net.TCPAddr) bool {
	bound := l.Addr().(*net.TCPAddr)
	isIPv4 := bound.IP.To4() != nil
	switch {
	case l.name != "" && !strings.HasPrefix(l.name, network+" "),
		network == "tcp4" && !isIPv4,
		network == "tcp6" && isIPv4:
		return false
	}
	sameIP := bound.IP.Equal(addr.IP) && bound.Zone == addr.Zone ||
		bound.IP.IsUnspecified() && (addr.IP == nil || addr.IP.IsUnspecified())
	return sameIP && bound.Port == addr.Port
}

func (p *process) ready() {
	p.readyOnce.Do(func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		for _, l := range p.inherited {
			_ = l.Close()
		}
		p.inherited = nil
		close(p.isReady)
		if p.link != nil {
			_ = send(p.link, p.held) // fails if the parent has exited, of which run learns too
			closeAll(p.held)
			p.held = nil
		}
	})
}

func closeAll(sockets []held) {
	for _, s := range sockets {
		_ = syscall.Close(s.fd)
	}
}

func send(link *net.UnixConn, sockets []held) error {
	for _, s := range sockets {
		if _, _, err := link.WriteMsgUnix([]byte(s.name+"\n"), syscall.UnixRights(s.fd), nil); err != nil {
			return err
		}
	}
	_, err := link.Write([]byte("\n"))
	return err
}

// receive returns the sockets that a child sends when it is ready.
func receive(link *net.UnixConn) ([]held, error) {
	var fds []int
	text, err := receiveAll(link, &fds)
	names := lines(text)
	if err == nil && len(names) != len(fds) {
		err = fmt.Errorf("%d descriptors for %d sockets", len(fds), len(names))
	}
	if err != nil {
		for _, fd := range fds {
			_ = syscall.Close(fd)
		}
		return nil, err
	}
	sockets := make([]held, len(fds))
	for i, fd := range fds {
		sockets[i] = held{names[i], fd}
	}
	return sockets, nil
}

// receiveAll receives text up to an empty line, and appends the descriptors that come with it
// to fds.
func receiveAll(link *net.UnixConn, fds *[]int) (string, error) {
	text := []byte("\n") // so that text ends with an empty line even if there is no socket
	data, oob := make([]byte, 4096), make([]byte, 4096)
	for !bytes.HasSuffix(text, []byte("\n\n")) {
		n, oobn, _, _, err := link.ReadMsgUnix(data, oob)
		if err != nil {
			return "", err
		}
		text = append(text, data[:n]...)
		messages, err := syscall.ParseSocketControlMessage(oob[:oobn])
		if err != nil {
			return "", err
		}
		for _, m := range messages {
			rights, err := syscall.ParseUnixRights(&m)
			if err != nil {
				return "", err
			}
			*fds = append(*fds, rights...)
		}
	}
	return string(text), nil
}

// lines returns the lines of text that are not empty. It is never nil.
func lines(text string) []string {
	return strings.FieldsFunc(text, func(r rune) bool { return r == '\n' })
}

// socketPair returns both ends of a link: that of the parent and that of the child.
func socketPair() (*net.UnixConn, *os.File, error) {
	syscall.ForkLock.RLock()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err == nil {
		syscall.CloseOnExec(fds[0])
		syscall.CloseOnExec(fds[1])
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	file := os.NewFile(uintptr(fds[1]), "link")
	link, err := unixConn(fds[0])
	if err != nil {
		_ = file.Close()
		return nil, nil, err
	}
	return link, file, nil
}

// unixConn returns a connection that replaces fd.
func unixConn(fd int) (*net.UnixConn, error) {
	file := os.NewFile(uintptr(fd), "link")
	defer file.Close()
	conn, err := net.FileConn(file)
	if err != nil {
		return nil, err
	}
	link, ok := conn.(*net.UnixConn)
	if !ok {
		_ = conn.Close()
		return nil, errors.New("restart: descriptor 3 is not a link")
	}
	return link, nil
}

// fileListener returns a listener that replaces fd.
func fileListener(fd int) (net.Listener, error) {
	file := os.NewFile(uintptr(fd), "socket")
	defer file.Close()
	return net.FileListener(file)
}

func closed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}
