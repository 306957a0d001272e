//go:build !unix

package socket

import (
	"net"
	"os"
)

// File is package net's: no child process inherits a descriptor here.
func File(l *net.TCPListener) (*os.File, error) { return l.File() }
