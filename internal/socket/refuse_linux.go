package socket

import "syscall"

const (
	soBindToIfindex = 62 // SO_BINDTOIFINDEX, which package syscall lacks

	// noInterface is the index of an interface that does not exist. Program ss shows a socket
	// that is bound to it as 127.0.0.1%if2147483647:8080, for example.
	noInterface = 1<<31 - 1
)

// Refuse makes the system refuse new connections to a listening socket, and reports whether it
// does. It affects all duplicates of the socket; only CAP_NET_RAW can undo it.
//
// A SYN is for the listening socket that is bound to its interface, or to none. If there is no
// such socket, the kernel sends RST. The accept queue stays. Handshakes that have started
// complete, because their request sockets refer to the listening socket, which needs no lookup.
// With SYN cookies, there are no request sockets, and they fail. Linux allows this without
// privileges since version 5.7, unless the socket is bound to a device already.
func Refuse(conn syscall.Conn) bool {
	refuses := false
	_ = control(conn, func(fd int) error {
		// It fails if another process has done the same before. In gVisor, it succeeds and
		// has no effect. So only the value counts.
		_ = syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, soBindToIfindex, noInterface)
		refuses = isRefusing(fd)
		return nil
	})
	return refuses
}

func isRefusing(fd int) bool {
	bound, err := syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, soBindToIfindex)
	return err == nil && bound == noInterface
}

// ShutDown makes a socket that refuses new connections stop listening. It affects all duplicates
// of the socket: Accept returns EINVAL. Connections in the accept queue are reset. Another socket
// can listen at the same address then, and gets each SYN.
func ShutDown(conn syscall.Conn) {
	_ = control(conn, func(fd int) error { return syscall.Shutdown(fd, syscall.SHUT_RDWR) })
}

// IsShutDown reports whether ShutDown has been called for the socket, in any process.
func IsShutDown(conn syscall.Conn) bool {
	shutDown := false
	_ = control(conn, func(fd int) error {
		listens, err := syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_ACCEPTCONN)
		shutDown = err == nil && listens == 0 && isRefusing(fd)
		return nil
	})
	return shutDown
}
