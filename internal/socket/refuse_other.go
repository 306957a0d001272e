//go:build !linux

package socket

import "syscall"

// Refuse does nothing: no way is known here.
func Refuse(syscall.Conn) bool { return false }
