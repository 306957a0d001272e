//go:build !unix

package main

import (
	"context"
	"errors"
	"net"
	"os"
	"runtime"
)

const usage = "usage: example [-addr host:port] (default " + defaultAddr + "; no restart in place on " + runtime.GOOS + ")"

func notifyRestart(chan<- os.Signal) {}

// restart fails: here no process can inherit a socket from package net.
func restart(context.Context, *net.TCPListener) error { return errors.ErrUnsupported }

func ready() {}
