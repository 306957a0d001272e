//go:build unix

package restart

import (
	"context"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/c2db162c/stoppablelistener/internal/socket"
)

// sockets are the listening sockets of this process.
type sockets struct {
	activated []string // addresses of those that come from socket activation
	noDrain   bool     // each may come from there

	mu        sync.Mutex  // guards the fields below
	inherited []inherited // not returned by Listen yet
	sealed    bool        // Listen holds no more
	held      []held      // returned by Listen, here or in the serving process
}

// An inherited listener has the name that it has in the parent; none if it comes from socket
// activation.
type inherited struct {
	name string
	*net.TCPListener
}

// A held socket is a duplicate of one that Listen has returned here or in a child. It is a plain
// descriptor, because files are added to the network poller, which would wake this process for
// each connection that another one accepts.
type held struct {
	name string // network and address, as passed to Listen
	fd   int
}

// inherit takes the sockets that this process was started with.
func (s *sockets) inherit() {
	if passed.parent == nil {
		s.inheritActivated()
		return
	}
	s.activated, s.noDrain = passed.activated, passed.noDrain
	for i, name := range passed.names {
		if l := tcpListener(linkFD + 1 + i); l != nil {
			s.inherited = append(s.inherited, inherited{name, l})
		}
	}
}

// inheritActivated takes the sockets of socket activation, unless main has taken them.
func (s *sockets) inheritActivated() {
	if activated() > 0 {
		for _, fd := range passed.activation {
			if l := tcpListener(fd); l != nil {
				s.inherited = append(s.inherited, inherited{"", l})
				s.activated = append(s.activated, l.Addr().String())
			}
		}
	}
	passed.activation = nil
	for _, key := range activationEnv {
		_ = os.Unsetenv(key)
	}
}

// activationEnv are the environment variables of socket activation; see sd_listen_fds(3).
var activationEnv = []string{"LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES"}

// activated returns how many descriptors socket activation has passed to this process.
func activated() int {
	if os.Getenv("LISTEN_PID") != strconv.Itoa(os.Getpid()) {
		return 0
	}
	n, _ := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	return max(n, 0)
}

// activatedSockets returns the sockets that socket activation has passed to this process, and
// sets close-on-exec for all that it has passed.
func activatedSockets() (sockets []int) {
	for fd := linkFD; fd < linkFD+activated() && isOpen(fd); fd++ {
		syscall.CloseOnExec(fd)
		if isSocket(fd) {
			sockets = append(sockets, fd)
		}
	}
	return sockets
}

func isOpen(fd int) bool {
	_, err := syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_TYPE)
	return err != syscall.EBADF
}

func isSocket(fd int) bool {
	_, err := syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_TYPE)
	return err == nil
}

// tcpListener returns a listener that replaces fd, a socket. If that does not listen, or not for
// TCP, it closes fd and returns nil.
func tcpListener(fd int) *net.TCPListener {
	file := os.NewFile(uintptr(fd), "socket")
	defer file.Close()
	listens, err := syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_ACCEPTCONN)
	if err != nil || listens == 0 { // net.FileListener does not check that
		return nil
	}
	l, err := net.FileListener(file)
	if err != nil {
		return nil
	}
	tcp, ok := l.(*net.TCPListener)
	if !ok {
		_ = l.Close()
	}
	return tcp
}

func (s *sockets) listen(
	config *net.ListenConfig, network, address string,
) (*net.TCPListener, error) {
	name := network + " " + address
	l := s.takeInherited(func(l inherited) bool { return l.name == name })
	if l == nil {
		// Without the lock: a name server, or the caller's Control, may take its time.
		if addr, err := net.ResolveTCPAddr(network, address); err == nil {
			l = s.takeInherited(func(l inherited) bool { return l.boundTo(network, addr) })
		}
	}
	if l == nil {
		created, err := config.Listen(context.Background(), network, address)
		if err != nil {
			return nil, err
		}
		l = created.(*net.TCPListener)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sealed {
		return l, nil
	}
	fd, err := socket.DupConn(l)
	if err != nil {
		_ = l.Close()
		return nil, err
	}
	s.held = append(s.held, held{name, fd})
	return l, nil
}

// takeInherited returns the first inherited listener that matches, and nil if there is none.
func (s *sockets) takeInherited(matches func(inherited) bool) *net.TCPListener {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.inherited, matches)
	if i < 0 {
		return nil
	}
	l := s.inherited[i].TCPListener
	s.inherited = slices.Delete(s.inherited, i, i+1)
	return l
}

// boundTo reports whether l is what net.Listen would return for a network and an address.
func (l inherited) boundTo(network string, addr *net.TCPAddr) bool {
	bound := l.Addr().(*net.TCPAddr)
	isIPv4 := bound.IP.To4() != nil
	switch {
	case bound.Port != addr.Port:
		return false
	case !bound.IP.IsUnspecified():
		return bound.IP.Equal(addr.IP) && bound.Zone == addr.Zone
	case l.name != "" && !strings.HasPrefix(l.name, network+" "),
		network == "tcp4" && !isIPv4,
		network == "tcp6" && isIPv4:
		return false
	}
	return addr.IP == nil || addr.IP.IsUnspecified()
}

// mayBeActivated reports whether the socket with this address may come from socket activation.
func (s *sockets) mayBeActivated(addr net.Addr) bool {
	return s.noDrain || slices.Contains(s.activated, addr.String())
}

// seal closes the inherited sockets that Listen has not returned. Listen holds no more.
func (s *sockets) seal() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.inherited {
		_ = l.Close()
	}
	s.inherited, s.sealed = nil, true
}

// files returns duplicates of the held sockets, with their names.
func (s *sockets) files() (files []*os.File, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, h := range s.held {
		fd, err := socket.Dup(h.fd)
		if err != nil {
			return files, err
		}
		files = append(files, os.NewFile(uintptr(fd), h.name))
	}
	return files, nil
}

// take returns the held sockets, which are not held any more.
func (s *sockets) take() []held {
	s.mu.Lock()
	defer s.mu.Unlock()
	taken := s.held
	s.held = nil
	return taken
}

// replace closes the held sockets, and holds others instead, and none that Listen returns later.
func (s *sockets) replace(sockets []held) {
	s.mu.Lock()
	defer s.mu.Unlock()
	closeAll(s.held)
	s.held, s.sealed = sockets, true
}

func closeAll(sockets []held) {
	for _, h := range sockets {
		_ = syscall.Close(h.fd)
	}
}
