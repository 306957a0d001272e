package socket

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"syscall"
	"unsafe"
)

// HasPending reports whether connections are in the accept queue of a listening socket.
func HasPending(conn syscall.Conn) bool {
	pending := false
	_ = control(conn, func(fd int) error {
		const pollIn = 0x1 // POLLIN, which package syscall lacks
		poll := struct {
			fd              int32
			events, revents int16
		}{int32(fd), pollIn, 0}
		var noTimeout syscall.Timespec
		_, _, errno := syscall.Syscall6(syscall.SYS_PPOLL, uintptr(unsafe.Pointer(&poll)), 1,
			uintptr(unsafe.Pointer(&noTimeout)), 0, 0, 0)
		pending = errno == 0 && poll.revents&pollIn != 0
		return nil
	})
	return pending
}

// Handshakes are those that were in flight to a listening socket at the first call of InFlight.
// Later ones are for another socket at the same address (SO_REUSEPORT), because this one refuses
// them. The zero value is ready to use.
type Handshakes struct {
	first map[cookie]bool // nil until the kernel has listed them
	err   error           // the kernel does not list them
}

// A cookie identifies a socket. The connection has the one of its handshake.
type cookie [8]byte

// InFlight reports whether some of the handshakes are still in flight, or may be because no
// resources are free to list them. It does not count those that are older than about three
// seconds: most of these clients never complete a handshake.
//
// It returns an error if the kernel cannot be asked: it has no tcp_diag, a sandbox forbids it, or
// the socket is of another network namespace. The socket must refuse new connections.
func (h *Handshakes) InFlight(conn syscall.Conn) (bool, error) {
	if h.err != nil {
		return false, h.err
	}
	cookies, err := handshakes(conn)
	switch {
	case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE),
		errors.Is(err, syscall.ENOBUFS), errors.Is(err, syscall.ENOMEM):
		return true, nil
	case err != nil:
		h.err = err
		return false, err
	case h.first == nil:
		h.first = make(map[cookie]bool, len(cookies))
		for _, c := range cookies {
			h.first[c] = true
		}
	}
	for _, c := range cookies {
		if h.first[c] {
			return true, nil
		}
	}
	return false, nil
}

var errOtherNamespace = errors.New("the socket is of another network namespace")

// handshakes returns the handshakes that are in flight to a listening socket.
func handshakes(conn syscall.Conn) (cookies []cookie, err error) {
	var local endpoint
	err = control(conn, func(fd int) (err error) {
		local, err = localEndpoint(fd)
		return err
	})
	if err != nil {
		return nil, err
	}
	listens := false
	err = dump(local, func(d diag) {
		switch {
		case !local.has(d.src()):
		case d.state() == stateListen:
			listens = listens || d.bound() == noInterface
		case d.isYoung():
			cookies = append(cookies, d.cookie())
		}
	})
	if err == nil && !listens {
		err = errOtherNamespace
	}
	return cookies, err
}

// An endpoint is the local address of a listening socket, as the kernel lists it.
type endpoint struct {
	family byte
	port   [2]byte // in network byte order
	addr   []byte  // 4 or 16 bytes
}

// localEndpoint does not use Addr, which hides whether an IPv4 address is that of an IPv6 socket.
func localEndpoint(fd int) (endpoint, error) {
	addr, err := syscall.Getsockname(fd)
	if err != nil {
		return endpoint{}, os.NewSyscallError("getsockname", err)
	}
	var e endpoint
	var port int
	switch addr := addr.(type) {
	case *syscall.SockaddrInet4:
		e.family, e.addr, port = syscall.AF_INET, addr.Addr[:], addr.Port
	case *syscall.SockaddrInet6:
		e.family, e.addr, port = syscall.AF_INET6, addr.Addr[:], addr.Port
	default:
		return endpoint{}, syscall.EAFNOSUPPORT
	}
	binary.BigEndian.PutUint16(e.port[:], uint16(port))
	return e, nil
}

// has reports whether a connection to addr, of at least 16 bytes, is one to the endpoint.
func (e endpoint) has(addr []byte) bool {
	return bytes.Equal(e.addr, addr[:len(e.addr)]) || bytes.Count(e.addr, []byte{0}) == len(e.addr)
}

// Constants of netlink(7) and sock_diag(7) that package syscall lacks.
const (
	netlinkSockDiag  = 4  // NETLINK_SOCK_DIAG
	sockDiagByFamily = 20 // SOCK_DIAG_BY_FAMILY

	stateSynRecv = 3  // TCP_SYN_RECV
	stateListen  = 10 // TCP_LISTEN
)

// A diag is a struct inet_diag_msg.
type diag []byte

const sizeofDiag = 72

func (d diag) state() byte       { return d[1] }
func (d diag) retransmits() byte { return d[3] } // of the SYN-ACK
func (d diag) src() []byte       { return d[8:24] }
func (d diag) bound() uint32     { return binary.NativeEndian.Uint32(d[40:]) } // to an interface
func (d diag) cookie() cookie    { return cookie(d[44:52]) }
func (d diag) expires() uint32   { return binary.NativeEndian.Uint32(d[52:]) } // ms until a timeout

// isYoung reports whether a handshake may be younger than three seconds. The kernel sends its
// SYN-ACK again after 1 s, 3 s and 7 s, and whenever the client sends its SYN again. A client
// with a longer round-trip time does that after 1 s and 3 s. So two retransmissions are due to
// the kernel alone, and the timeout that has started lasts 4 s; or to both, and it lasts 2 s.
func (d diag) isYoung() bool {
	return d.retransmits() <= 1 || d.retransmits() == 2 && d.expires() <= 2100
}

// dump calls f with each socket of the endpoint's family and port that listens or is in the
// handshake.
func dump(local endpoint, f func(diag)) error {
	fd, err := syscall.Socket(syscall.AF_NETLINK, syscall.SOCK_RAW|syscall.SOCK_CLOEXEC,
		netlinkSockDiag)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer syscall.Close(fd)
	// The kernel responds at once. But an emulation of it may not respond at all.
	timeout := syscall.NsecToTimeval(100e6)
	err = syscall.SetsockoptTimeval(fd, syscall.SOL_SOCKET, syscall.SO_RCVTIMEO, &timeout)
	if err != nil {
		return os.NewSyscallError("setsockopt", err)
	}

	// A struct nlmsghdr, and a struct inet_diag_req_v2.
	request := make([]byte, syscall.SizeofNlMsghdr+56)
	binary.NativeEndian.PutUint32(request[0:], uint32(len(request)))
	binary.NativeEndian.PutUint16(request[4:], sockDiagByFamily)
	binary.NativeEndian.PutUint16(request[6:], syscall.NLM_F_REQUEST|syscall.NLM_F_DUMP)
	req := request[syscall.SizeofNlMsghdr:]
	req[0], req[1] = local.family, syscall.IPPROTO_TCP
	binary.NativeEndian.PutUint32(req[4:], 1<<stateSynRecv|1<<stateListen)
	copy(req[8:], local.port[:])
	kernel := syscall.SockaddrNetlink{Family: syscall.AF_NETLINK}
	if err := syscall.Sendto(fd, request, 0, &kernel); err != nil {
		return os.NewSyscallError("sendto", err)
	}

	buf := make([]byte, 32<<10) // the largest that the kernel fills
	for {
		n, _, err := syscall.Recvfrom(fd, buf, 0)
		if err == syscall.EINTR {
			continue
		}
		if err != nil {
			return os.NewSyscallError("recvfrom", err)
		}
		messages, err := syscall.ParseNetlinkMessage(buf[:n])
		if err != nil {
			return err
		}
		for _, m := range messages {
			switch {
			case m.Header.Type == syscall.NLMSG_DONE:
				return nil
			case m.Header.Type == syscall.NLMSG_ERROR && len(m.Data) >= 4:
				return syscall.Errno(-int32(binary.NativeEndian.Uint32(m.Data)))
			case m.Header.Type != sockDiagByFamily || len(m.Data) < sizeofDiag:
				return syscall.EPROTO
			}
			f(diag(m.Data))
		}
	}
}
