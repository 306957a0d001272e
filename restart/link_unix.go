//go:build unix

package restart

import (
	"bytes"
	"errors"
	"log"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// The protocol between the parent and a child, which must not change: the parent runs an older
// version of this package than its children.
//
// A child is started with one end of a socket pair, the link, as descriptor 3, and with the
// listening sockets as the descriptors after it. Their names, one per line, are in the environment
// variable socketsEnv. Addresses of sockets that come from socket activation are in activatedEnv,
// in the same form; older versions of this package do not set it.
//
// When the child is ready, it sends its own sockets, each as name, newline and descriptor, and
// then another newline. To stop the child, the parent sends the number of a signal as one byte,
// its word, and closes its end. The word is SIGUSR2 if another process serves, and otherwise
// the service is being stopped.
const (
	socketsEnv   = "STOPPABLELISTENER_RESTART"
	activatedEnv = "STOPPABLELISTENER_RESTART_ACTIVATED"
	linkFD       = 3
)

// passed is what this process was started with.
var passed struct {
	parent     *parent
	names      []string // of the sockets from linkFD+1 on, if there is a parent
	activated  []string // addresses of sockets from socket activation, if there is a parent
	noDrain    bool     // the parent does not know those
	err        error    // there is no link, although there seems to be a parent
	activation []int    // in the parent: the sockets that socket activation has passed to it
}

// Before main, so that a process which main starts inherits neither the sockets nor the
// variables, and so that a child exits with its parent even before it calls Run.
func init() {
	names, ok := os.LookupEnv(socketsEnv)
	if !ok {
		passed.activation = activatedSockets()
		return
	}
	activated, ok := os.LookupEnv(activatedEnv)
	_ = os.Unsetenv(socketsEnv)
	_ = os.Unsetenv(activatedEnv)
	passed.names, passed.activated, passed.noDrain = lines(names), lines(activated), !ok
	for i := range passed.names {
		syscall.CloseOnExec(linkFD + 1 + i)
	}
	l, err := openLink(linkFD)
	if err != nil {
		passed.err = err
		return
	}
	passed.parent = &parent{
		pid: os.Getppid(), link: l, childReady: make(chan struct{}), told: make(chan struct{}),
	}
	go passed.parent.receive()
}

// A parent is the parent as a child sees it.
type parent struct {
	pid        int
	link       *link
	childReady chan struct{}  // closed by Ready
	told       chan struct{}  // closed when the parent has sent its word, or has exited
	word       syscall.Signal // valid when told is closed; 0 if the parent has exited without one
}

// receive waits for the parent's word. A child that is not ready exits with its parent.
func (p *parent) receive() {
	p.word = p.link.receiveWord()
	if p.word == 0 && !closed(p.childReady) {
		log.Fatalf("restart: %v before process %d was ready", errParentExited, os.Getpid())
	}
	close(p.told)
}

// A link is one end of the connection between the parent and a child.
type link struct{ conn *net.UnixConn }

// startLinked starts cmd as a child that inherits sockets, and returns the parent's end of the
// link.
func startLinked(cmd *exec.Cmd, sockets *sockets) (*link, error) {
	l, childEnd, err := linkPair()
	if err != nil {
		return nil, err
	}
	files, err := sockets.files()
	cmd.ExtraFiles = append([]*os.File{childEnd}, files...) // from linkFD on
	defer func() {
		for _, file := range cmd.ExtraFiles {
			_ = file.Close()
		}
	}()
	if err == nil {
		names := ""
		for _, file := range files {
			names += file.Name() + "\n"
		}
		cmd.Env = append(cmd.Env, socketsEnv+"="+names,
			activatedEnv+"="+strings.Join(sockets.activated, "\n"))
		err = cmd.Start()
	}
	if err != nil {
		l.close()
		return nil, err
	}
	return l, nil
}

// linkPair returns both ends of a link: that of the parent and that of the child.
func linkPair() (*link, *os.File, error) {
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
	l, err := openLink(fds[0])
	if err != nil {
		_ = file.Close()
		return nil, nil, err
	}
	return l, file, nil
}

var errNoLink = errors.New("restart: descriptor 3 is not a link")

// openLink returns a link that replaces fd.
func openLink(fd int) (*link, error) {
	if !isSocket(fd) { // do not close what is no link, such as a descriptor of the Go runtime
		return nil, errNoLink
	}
	file := os.NewFile(uintptr(fd), "link")
	defer file.Close()
	conn, err := net.FileConn(file)
	if err != nil {
		return nil, err
	}
	unix, ok := conn.(*net.UnixConn)
	if !ok {
		_ = conn.Close()
		return nil, errNoLink
	}
	return &link{unix}, nil
}

// sendSockets sends sockets to the parent, and closes them. If the parent has exited,
// receiveWord reports that.
func (l *link) sendSockets(sockets []held) {
	defer closeAll(sockets)
	for _, s := range sockets {
		_, _, err := l.conn.WriteMsgUnix([]byte(s.name+"\n"), syscall.UnixRights(s.fd), nil)
		if err != nil { // a name without a descriptor makes the parent report that one is missing
			_, _ = l.conn.Write([]byte(s.name + "\n"))
		}
	}
	_, _ = l.conn.Write([]byte("\n"))
}

// errLinkClosed means that the child has exited, or one end of the link is closed.
var errLinkClosed = errors.New("link closed")

// receiveSockets returns the sockets that a child sends when it is ready. The error is
// errLinkClosed if that does not happen.
func (l *link) receiveSockets() ([]held, error) {
	var fds []int
	text, err := l.receiveText(&fds)
	names := lines(text)
	if err == nil && len(names) != len(fds) { // the child has sent all
		err = os.NewSyscallError("recvmsg", syscall.EMFILE)
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

// receiveText receives text up to an empty line, and appends the descriptors that come with it
// to fds.
func (l *link) receiveText(fds *[]int) (string, error) {
	text := []byte("\n") // so that text ends with an empty line even if there is no socket
	data, oob := make([]byte, 4096), make([]byte, 4096)
	for !bytes.HasSuffix(text, []byte("\n\n")) {
		n, oobn, _, _, err := l.conn.ReadMsgUnix(data, oob)
		if errno := syscall.Errno(0); err != nil && !errors.As(err, &errno) {
			return "", errLinkClosed
		}
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

// interrupt makes receiveSockets return.
func (l *link) interrupt() { _ = l.conn.SetReadDeadline(time.Unix(1, 0)) }

// sendWord tells the child to shut down gracefully. Calls after the first do nothing.
func (l *link) sendWord(sig syscall.Signal) {
	_, _ = l.conn.Write([]byte{byte(sig)})
	l.close()
}

// receiveWord waits for the parent's word. It is 0 if the parent exits without one.
func (l *link) receiveWord() syscall.Signal {
	word := make([]byte, 1)
	_, _ = l.conn.Read(word)
	return syscall.Signal(word[0])
}

func (l *link) close() { _ = l.conn.Close() }

// lines returns the lines of text that are not empty.
func lines(text string) []string {
	return strings.FieldsFunc(text, func(r rune) bool { return r == '\n' })
}
