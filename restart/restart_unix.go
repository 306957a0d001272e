//go:build unix

package restart

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"

	"github.com/c2db162c/stoppablelistener/internal/socket"
)

// readyTimeout is how long a new process may take until it calls Ready.
var readyTimeout = time.Minute

// errParentExited is the cause of a child's context if its parent does not stop it.
var errParentExited = errors.New("parent process exited")

func (p *process) run(serve func(context.Context) error) error {
	if err := p.inherit(); err != nil {
		return err
	}
	// The first use of a process handle makes package os clone this process for a check. If
	// signals went to the whole process group at that moment, the clone would pass its signal on
	// to this process, which would take it for a second one.
	if self, err := os.FindProcess(os.Getpid()); err == nil {
		_ = self.Release()
	}
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(signals)
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE) // unlike Ignore, not inherited by children
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)

	if p.link != nil {
		go func() { cancel(signalError{<-signals}) }()
		go func() { cancel(receiveStop(p.link)) }()
		return serve(ctx)
	}
	restarts := make(chan os.Signal, 1)
	signal.Notify(restarts, syscall.SIGUSR2) // before serve, which may call Ready at once
	served := make(chan error, 1)
	go func() { served <- serve(ctx) }()
	parent := &parent{
		process:  p,
		cancel:   cancel,
		children: make(map[*child]bool),
		events:   make(chan event),
	}
	return parent.run(served, signals, restarts)
}

// receiveStop waits until the parent stops this process, and returns the cause.
func receiveStop(link *net.UnixConn) error {
	sig := make([]byte, 1)
	if n, _ := link.Read(sig); n == 0 {
		return errParentExited
	}
	return signalError{syscall.Signal(sig[0])}
}

// A parent is the first process. Only run uses its fields, in one goroutine.
type parent struct {
	*process
	cancel   context.CancelCauseFunc // of the context of this process
	children map[*child]bool         // those that have not exited
	starting *child                  // the one that is not ready yet
	serving  *child                  // the last one that has become ready
	stopping bool                    // no more restarts
	result   error                   // of Run
	events   chan event
}

// A child is another process that runs the program.
type child struct {
	*exec.Cmd
	link *net.UnixConn
}

// An event is that a child is ready, with these sockets, or that its Wait has returned err.
type event struct {
	*child
	exited  bool
	sockets []held
	err     error
}

// run returns when serve has returned and all children have exited.
func (p *parent) run(served <-chan error, signals, restarts <-chan os.Signal) error {
	var ready <-chan struct{} = p.isReady
	var late <-chan time.Time
	signaled := false
	for served != nil || len(p.children) > 0 {
		var restart <-chan os.Signal
		if ready == nil && p.starting == nil && !p.stopping {
			restart = restarts
		}
		select {
		case <-ready:
			ready = nil
		case <-restart:
			if err := p.start(); err != nil {
				report("not restarted: %v", err)
			}
			late = time.After(readyTimeout)
		case <-late:
			if p.starting != nil {
				report("not restarted: process %d was not ready within %v", p.starting.Process.Pid, readyTimeout)
				_ = p.starting.Process.Kill()
				p.starting = nil
			}
		case err := <-served:
			served = nil
			if p.serving == nil {
				p.result = err
				p.stop(syscall.SIGTERM)
			} else if err != nil {
				report("%v", err)
			}
		case sig := <-signals:
			if signaled {
				for c := range p.children {
					_ = c.Process.Kill()
				}
				os.Exit(1)
			}
			signaled = true
			p.stop(sig.(syscall.Signal))
		case e := <-p.events:
			if e.exited {
				p.childExited(e.child, e.err)
			} else {
				p.childReady(e.child, e.sockets)
			}
		}
	}
	var exit *exec.ExitError
	if signaled && p.serving != nil && errors.As(p.result, &exit) && exit.Exited() {
		os.Exit(exit.ExitCode()) // the child has reported the error
	}
	return p.result
}

// start starts a child.
func (p *parent) start() error {
	// Not os.Executable: on Linux, that is what a symbolic link led to when this process was
	// started, while the link may lead to another version by now.
	cmd := exec.Command(os.Args[0], os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	link, childEnd, err := socketPair()
	if err != nil {
		return err
	}
	cmd.ExtraFiles = []*os.File{childEnd} // as descriptor linkFD, and so on
	defer func() {
		for _, file := range cmd.ExtraFiles {
			_ = file.Close()
		}
	}()
	names := ""
	p.mu.Lock()
	for _, s := range p.held {
		var fd int
		if fd, err = socket.Dup(s.fd); err != nil {
			break
		}
		cmd.ExtraFiles = append(cmd.ExtraFiles, os.NewFile(uintptr(fd), s.name))
		names += s.name + "\n"
	}
	p.mu.Unlock()
	if err == nil {
		cmd.Env = append(os.Environ(), socketsEnv+"="+names)
		err = cmd.Start()
	}
	if err != nil {
		_ = link.Close()
		return err
	}

	c := &child{cmd, link}
	p.children[c] = true
	p.starting = c
	received := make(chan struct{})
	go func() {
		defer close(received)
		if sockets, err := receive(link); err == nil {
			p.events <- event{child: c, sockets: sockets}
		}
	}()
	go func() {
		err := cmd.Wait()
		_ = link.SetReadDeadline(time.Unix(1, 0)) // if another process has the child's end too
		<-received
		p.events <- event{child: c, exited: true, err: err}
	}()
	return nil
}

// childReady makes c replace the process that serves.
func (p *parent) childReady(c *child, sockets []held) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c != p.starting || p.stopping {
		closeAll(sockets)
		return
	}
	closeAll(p.held)
	p.held = sockets
	previous := p.serving
	p.starting, p.serving = nil, c
	if previous == nil {
		p.cancel(signalError{syscall.SIGUSR2})
	} else {
		previous.stop(syscall.SIGUSR2)
	}
}

// childExited makes this process exit too, if c serves.
func (p *parent) childExited(c *child, err error) {
	delete(p.children, c)
	_ = c.link.Close()
	switch c {
	case p.starting:
		p.starting = nil
		if !p.stopping {
			report("not restarted: process %d exited before it was ready: %v", c.Process.Pid, c.ProcessState)
		}
	case p.serving:
		if err != nil {
			p.result = fmt.Errorf("restart: process %d: %w", c.Process.Pid, err)
		}
		p.stop(syscall.SIGTERM)
	}
}

// stop stops all processes because of sig.
func (p *parent) stop(sig syscall.Signal) {
	p.stopping = true
	p.mu.Lock()
	closeAll(p.held) // so that no connection waits in the accept queue of a stopped service
	p.held = nil
	p.mu.Unlock()
	p.cancel(signalError{sig})
	if p.serving != nil {
		p.serving.stop(sig)
	}
	if p.starting != nil {
		_ = p.starting.Process.Signal(syscall.SIGTERM) // it may not have called Run yet
	}
}

// stop tells the child to shut down gracefully. Calls after the first do nothing.
func (c *child) stop(sig syscall.Signal) {
	_, _ = c.link.Write([]byte{byte(sig)})
	_ = c.link.Close()
}

// report prints a line on standard error.
func report(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "restart: "+format+"\n", args...)
}
