//go:build !unix && !wasip1

package nonblock

import "syscall"

// Set does nothing: Go waits for sockets in another way here.
func Set(syscall.Conn) error { return nil }
