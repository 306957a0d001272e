//go:build unix || wasip1

package socket

import "syscall"

// SetNonblock sets nonblocking mode directly on the descriptor, so that the socket, which
// other processes may share, is at no time in blocking mode.
func SetNonblock(conn syscall.Conn) error {
	return control(conn, func(fd int) error { return syscall.SetNonblock(fd, true) })
}

// control calls f with the descriptor of conn.
func control(conn syscall.Conn, f func(fd int) error) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var fErr error
	if err := raw.Control(func(fd uintptr) { fErr = f(int(fd)) }); err != nil {
		return err
	}
	return fErr
}
