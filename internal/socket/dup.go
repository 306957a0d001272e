//go:build unix

package socket

import (
	"net"
	"os"
	"syscall"
)

// File returns a duplicate of l's descriptor as a file. Unlike that of l.File, its Fd
// method leaves the socket in nonblocking mode. Package os sets blocking mode only where
// package net has made the file, or package os itself has set nonblocking mode.
func File(l *net.TCPListener) (*os.File, error) {
	fd, err := DupConn(l)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), l.Addr().String()), nil
}

// DupConn returns a duplicate of conn's descriptor, close-on-exec.
func DupConn(conn syscall.Conn) (dup int, err error) {
	err = control(conn, func(fd int) (err error) {
		dup, err = Dup(fd)
		return err
	})
	return dup, err
}

// Dup returns a duplicate of fd, close-on-exec.
func Dup(fd int) (int, error) {
	syscall.ForkLock.RLock() // no child process may start before the duplicate is close-on-exec
	defer syscall.ForkLock.RUnlock()
	dup, err := syscall.Dup(fd)
	if err != nil {
		return 0, os.NewSyscallError("dup", err)
	}
	syscall.CloseOnExec(dup)
	return dup, nil
}
