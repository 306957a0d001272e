//go:build !unix && !wasip1

package socket

import "syscall"

// SetNonblock does nothing: Go waits for sockets in another way here.
func SetNonblock(syscall.Conn) error { return nil }
