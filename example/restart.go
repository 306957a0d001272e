//go:build unix

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"syscall"
	"time"
)

const usage = "usage: example [-addr host:port | -fd n] (default -addr " + defaultAddr + "; SIGHUP restarts it in place)"

// readyEnv holds the number of the descriptor on which a program that was started in place
// of another one tells it that it serves.
const readyEnv = "EXAMPLE_READY_FD"

// notifyRestart relays to c the signal that asks for a restart in place.
func notifyRestart(c chan<- os.Signal) { signal.Notify(c, syscall.SIGHUP) }

// restart starts the program that now lies where this one was started from, with the flags
// -fd 3 and l as that descriptor, and returns when it serves; this one can then end. If
// the new one cannot be started, ends at once, or does not serve before ctx is done, it is
// killed, and restart returns an error. Make a new StoppableListener then, and serve on.
//
// Call it after the return of Serve and before the connections are ended: meanwhile the
// clients wait in the kernel's queue, and nobody is lost either way. It is made to be
// copied into a service, unless a supervisor knows that by its process ID, which changes.
func restart(ctx context.Context, l *net.TCPListener) error {
	socket, err := l.File()
	if err != nil {
		return err
	}
	defer socket.Close()
	ready, writer, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()

	// Not os.Executable: on Linux that is what a symbolic link led to when this program
	// was started, while the link may by now lead to the next version.
	cmd := exec.Command(os.Args[0], "-fd", "3")
	cmd.Env = append(os.Environ(), readyEnv+"=4")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{socket, writer} // descriptors 3 and 4
	err = cmd.Start()
	_ = writer.Close() // so that Read sees the end of the program
	if err != nil {
		return err
	}

	defer context.AfterFunc(ctx, func() { _ = ready.SetReadDeadline(time.Unix(1, 0)) })()
	_, err = ready.Read(make([]byte, 1))
	if err == nil {
		return cmd.Process.Release()
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("%s does not serve: %w", cmd.Path, ctx.Err())
	}
	return fmt.Errorf("%s has ended: %v", cmd.Path, cmd.ProcessState)
}

// ready tells the program that has started this one in its place, if one has, that this one
// serves.
func ready() {
	fd, err := strconv.Atoi(os.Getenv(readyEnv))
	if err != nil {
		return
	}
	_ = os.Unsetenv(readyEnv)
	file := os.NewFile(uintptr(fd), readyEnv)
	_, _ = file.WriteString("\n") // fails if that one has given up, and is going to kill this one
	_ = file.Close()
}
