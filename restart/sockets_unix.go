//go:build unix

package restart

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/c2db162c/stoppablelistener/internal/socket"
)

// sockets are the listening sockets of this process.
type sockets struct {
	mu        sync.Mutex  // guards the fields below
	inherited []inherited // not returned by Listen yet
	sealed    bool        // Listen holds no more
	held      []held      // returned by Listen, here or in the serving process
}

// An inherited listener has the name that it has in the parent; none in the parent itself.
type inherited struct {
	name      string // network and address, as passed to Listen
	activated bool   // by socket activation, whose service manager has the socket too
	*net.TCPListener
}

// A held socket is a duplicate of one that Listen has returned here or in a child. It is a plain
// descriptor, because files are added to the network poller, which would wake this process for
// each connection that another one accepts.
type held struct {
	name string // with activatedMark
	fd   int
}

// activatedMark ends the names of sockets that come from socket activation.
const activatedMark = " activated"

// inherit takes the sockets that this process was started with.
func (s *sockets) inherit(descriptors []descriptor) error {
	for _, d := range descriptors {
		if !d.isUnchanged() {
			continue // main has closed it, and opened something else
		}
		l, err := tcpListener(d.fd)
		if err != nil {
			return fmt.Errorf("restart: cannot inherit a socket: %w", err)
		}
		if l != nil {
			name, activated := strings.CutSuffix(d.name, activatedMark)
			s.inherited = append(s.inherited, inherited{name, activated, l})
		}
	}
	return nil
}

// tcpListener returns a listener that replaces fd, a socket. If that does not listen, or not for
// TCP, it closes fd and returns nil.
func tcpListener(fd int) (*net.TCPListener, error) {
	file := os.NewFile(uintptr(fd), "socket")
	defer file.Close()
	listens, err := syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_ACCEPTCONN)
	if err != nil || listens == 0 { // net.FileListener does not check that
		return nil, nil
	}
	l, err := net.FileListener(file)
	if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) {
		return nil, err
	}
	if err != nil {
		return nil, nil
	}
	tcp, ok := l.(*net.TCPListener)
	if !ok {
		_ = l.Close()
	}
	return tcp, nil
}

// listen returns the inherited socket for the address, or a new one, and whether it comes from
// socket activation.
func (s *sockets) listen(
	config *net.ListenConfig, network, address string,
) (l *net.TCPListener, activated bool, err error) {
	name := network + " " + address
	l, activated = s.takeInherited(func(l inherited) bool { return l.name == name })
	if l == nil {
		// Without the lock: a name server, or the caller's Control, may take its time.
		if addr, err := net.ResolveTCPAddr(network, address); err == nil {
			l, activated = s.takeInherited(func(l inherited) bool { return l.boundTo(network, addr) })
		}
	}
	if l == nil {
		created, err := config.Listen(context.Background(), network, address)
		if err != nil {
			return nil, false, err
		}
		l = created.(*net.TCPListener)
	}
	if activated {
		name += activatedMark
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sealed {
		return l, activated, nil
	}
	fd, err := socket.DupConn(l)
	if err != nil {
		_ = l.Close()
		return nil, false, err
	}
	s.held = append(s.held, held{name, fd})
	return l, activated, nil
}

// takeInherited returns the first inherited listener that matches, and nil if there is none.
func (s *sockets) takeInherited(
	matches func(inherited) bool,
) (l *net.TCPListener, activated bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.inherited, matches)
	if i < 0 {
		return nil, false
	}
	found := s.inherited[i]
	s.inherited = slices.Delete(s.inherited, i, i+1)
	return found.TCPListener, found.activated
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

// seal closes the inherited sockets that Listen has not returned. Listen holds no more.
func (s *sockets) seal() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.inherited {
		_ = l.Close()
	}
	s.inherited, s.sealed = nil, true
}

// duplicates returns duplicates of the held sockets.
func (s *sockets) duplicates() ([]held, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var duplicates []held
	for _, h := range s.held {
		fd, err := socket.Dup(h.fd)
		if err != nil {
			closeAll(duplicates)
			return nil, err
		}
		duplicates = append(duplicates, held{h.name, fd})
	}
	return duplicates, nil
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
