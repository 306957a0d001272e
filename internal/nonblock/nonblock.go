//go:build unix || wasip1

// Package nonblock puts a socket into nonblocking mode, wherever Go has such a mode.
package nonblock

import "syscall"

// Set sets the mode on the descriptor itself, which stays where it is: it does not pass
// through blocking mode on its way, for whoever shares the socket.
func Set(socket syscall.Conn) error {
	raw, err := socket.SyscallConn()
	if err != nil {
		return err
	}
	var errno error
	if err := raw.Control(func(fd uintptr) { errno = syscall.SetNonblock(int(fd), true) }); err != nil {
		return err
	}
	return errno
}
