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
// complete, because their request sockets refer to the listening socket, which needs no lookup;
// with SYN cookies, there are no request sockets, and they fail. Linux allows this without
// privileges since version 5.7, unless the socket is bound already.
func Refuse(conn syscall.Conn) bool {
	bound := 0
	err := control(conn, func(fd int) (err error) {
		err = syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, soBindToIfindex, noInterface)
		if err != nil {
			return err
		}
		bound, err = syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, soBindToIfindex)
		return err
	})
	return err == nil && bound == noInterface // gVisor accepts options that it does not know
}
