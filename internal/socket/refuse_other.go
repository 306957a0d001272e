//go:build !linux

package socket

import "syscall"

// Refuse does nothing: no way is known here. The other functions of this file are only of use
// for a socket that refuses new connections.
func Refuse(syscall.Conn) bool { return false }

// ShutDown does nothing.
func ShutDown(syscall.Conn) {}

// IsShutDown reports false.
func IsShutDown(syscall.Conn) bool { return false }

// HasPending reports false.
func HasPending(syscall.Conn) bool { return false }

// Handshakes are unknown.
type Handshakes struct{}

// InFlight reports false.
func (*Handshakes) InFlight(syscall.Conn) (bool, error) { return false, nil }
