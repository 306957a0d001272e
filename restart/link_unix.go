//go:build unix

package restart

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// The protocol between the parent and a child. Each may run another version of this package, so
// a change needs another protocolVersion.
//
// A child is started with the listening sockets as the descriptors from firstFD on, and after them
// with one end of a socket pair, the link. The first line of the environment variable protocolEnv
// has protocolVersion, a space and the parent's process ID. Each other line has the name of a
// socket: network, space and address, as passed to Listen, and then " activated" if the socket
// comes from socket activation.
//
// When the child is ready, it sends its own sockets, each as name, newline and descriptor, and
// then another newline. If it is then signaled itself, it sends the number of the signal as one
// byte. To stop the child, the parent sends the number of a signal as one byte, its message, and
// closes its end. The message is SIGUSR2 if another process serves, and otherwise the service is
// being stopped.
const (
	protocolEnv     = "STOPPABLELISTENER_RESTART"
	protocolVersion = "1"
)

// A handover is what a parent passes to a child when it starts it.
type handover struct {
	parentPid   int
	link        *link
	descriptors []descriptor // of sockets
	err         error        // why there is no link
}

// takeHandover reports whether this process is a child. It is called before main, so that a process
// which main starts inherits neither the sockets nor the variable.
func takeHandover() (h handover, ok bool) {
	value, ok := os.LookupEnv(protocolEnv)
	if !ok {
		return h, false
	}
	_ = os.Unsetenv(protocolEnv)
	header, names, _ := strings.Cut(value, "\n")
	version, pid, _ := strings.Cut(header, " ")
	if version != protocolVersion {
		h.err = fmt.Errorf("restart: the parent uses version %q of the protocol, not %q",
			version, protocolVersion)
		return h, true
	}
	h.parentPid, _ = strconv.Atoi(pid)
	fd := firstFD
	for _, name := range lines(names) {
		h.descriptors = append(h.descriptors, newDescriptor(fd, name))
		fd++
	}
	h.link, h.err = openLink(fd)
	return h, true
}

// A link is one end of the connection between the parent and a child.
type link struct{ conn *net.UnixConn }

// startLinked starts cmd as a child that inherits sockets, and returns the parent's end of the
// link. It closes the sockets.
func startLinked(cmd *exec.Cmd, sockets []held) (*link, error) {
	value := fmt.Sprintln(protocolVersion, os.Getpid())
	for _, s := range sockets {
		value += s.name + "\n"
		file := os.NewFile(uintptr(s.fd), s.name)
		defer file.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, file) // from firstFD on
	}
	cmd.Env = append(cmd.Env, protocolEnv+"="+value)
	l, childEnd, err := linkPair()
	if err != nil {
		return nil, err
	}
	defer childEnd.Close()
	cmd.ExtraFiles = append(cmd.ExtraFiles, childEnd)
	if err := cmd.Start(); err != nil {
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

// openLink returns a link that replaces fd.
func openLink(fd int) (*link, error) {
	errNoLink := fmt.Errorf("restart: descriptor %d is not a link to the parent", fd)
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
// obeyParent notices that.
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
// to fds. It receives one byte at a time, because others may follow.
func (l *link) receiveText(fds *[]int) (string, error) {
	text := []byte("\n") // so that there is an empty line even if there is no socket
	char, oob := make([]byte, 1), make([]byte, syscall.CmsgSpace(4))
	for !bytes.HasSuffix(text, []byte("\n\n")) {
		n, oobn, _, _, err := l.conn.ReadMsgUnix(char, oob)
		if errno := syscall.Errno(0); err != nil && !errors.As(err, &errno) {
			return "", errLinkClosed
		}
		if err != nil {
			return "", err
		}
		text = append(text, char[:n]...)
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

// sendSignal sends the number of a signal.
func (l *link) sendSignal(sig syscall.Signal) {
	_ = l.conn.SetWriteDeadline(time.Now().Add(time.Second)) // the process may be suspended
	_, _ = l.conn.Write([]byte{byte(sig)})
}

// receiveSignal waits for the number of a signal. It is 0 if the link is closed.
func (l *link) receiveSignal() syscall.Signal {
	number := make([]byte, 1)
	_, _ = l.conn.Read(number)
	return syscall.Signal(number[0])
}

func (l *link) close() { _ = l.conn.Close() }

// lines returns the lines of text that are not empty.
func lines(text string) []string {
	return strings.FieldsFunc(text, func(r rune) bool { return r == '\n' })
}
