//go:build unix

package restart

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// readyTimeout is how long a new process may take until it calls Ready.
var readyTimeout = time.Minute

// lookTimeout is how much longer this process then waits, in case the new one is ready; see
// endTimeout.
const lookTimeout = 250 * time.Millisecond

// original is what the parent was started with.
var original = command()

// command returns a command that starts this process once more. It is called before main, which
// may change everything that it is made of.
func command() exec.Cmd {
	cmd := exec.Cmd{Args: slices.Clone(os.Args)}
	if len(os.Args) > 0 {
		// Not os.Executable: on Linux, that is what a symbolic link led to when this process was
		// started, while the link may lead to another version later.
		cmd.Path = os.Args[0]
	}
	if filepath.Base(cmd.Path) == cmd.Path {
		cmd.Path, cmd.Err = exec.LookPath(cmd.Path)
		if errors.Is(cmd.Err, exec.ErrDot) {
			cmd.Err = nil // a shell has found it there too
		}
	}
	cmd.Dir, _ = os.Getwd() // if that is unknown, a child has this process's directory
	cmd.Env = slices.Clip(slices.DeleteFunc(os.Environ(), func(variable string) bool {
		key, _, _ := strings.Cut(variable, "=")
		return slices.Contains(activationEnv, key)
	}))
	return cmd
}

// A server is what serves, or has served: this process or a child.
type server interface {
	stop(syscall.Signal) // shut down gracefully; calls after the first do nothing
	pass(os.Signal)      // what this process has received
}

// A supervisor starts, replaces and stops children. Only supervise uses its fields, in one
// goroutine.
type supervisor struct {
	sockets    *sockets
	state      state
	serving    server
	serves     bool             // serve has not returned in this process
	children   map[*child]bool  // those that have not exited
	newProcess *child           // the one that was started last
	late       <-chan time.Time // when newProcess is; nil if it has become ready, or has failed
	looks      bool             // late is the end of lookTimeout
	signaled   bool             // by SIGINT or SIGTERM
	result     error            // of Run
	passing    chan os.Signal   // to be passed to the serving process
	events     chan func()      // about children, to be called in the goroutine of supervise
}

type state int

const (
	starting   state = iota // this process is not ready
	steady                  // a restart is possible
	restarting              // there is a new process
	stopping                // no more restarts
)

// supervise returns when serve has returned, with what served receives, and all children have
// exited.
func supervise(
	sockets *sockets, cancel context.CancelCauseFunc, isReady <-chan struct{},
	served <-chan error, signals, restarts <-chan os.Signal,
) error {
	s := &supervisor{
		sockets:  sockets,
		serving:  self(cancel),
		serves:   true,
		children: make(map[*child]bool),
		passing:  make(chan os.Signal, 100), // several may come while a process is started
		events:   make(chan func()),
	}
	for s.serves || len(s.children) > 0 {
		var becomesReady <-chan struct{}
		var restart <-chan os.Signal
		var late <-chan time.Time
		switch s.state {
		case starting:
			becomesReady = isReady
		case steady:
			restart = restarts
		case restarting, stopping:
			late = s.late
		}
		select {
		case <-becomesReady:
			s.state = steady
		case <-restart:
			s.start()
		case <-late:
			s.endTimeout()
		case event := <-s.events:
			event()
		case sig := <-s.passing:
			s.serving.pass(sig)
		case sig := <-signals:
			if s.signaled {
				s.kill()
			}
			s.signaled = true
			s.stopService(sig.(syscall.Signal))
		case err := <-served:
			s.served(err)
		}
	}
	s.exitLikeChild()
	return s.result
}

// start starts a new process.
func (s *supervisor) start() {
	cmd := original
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	link, err := startLinked(&cmd, s.sockets)
	if err != nil {
		s.report("%v", err)
		return
	}
	c := &child{&cmd, link}
	s.children[c] = true
	s.newProcess, s.late, s.looks = c, time.After(readyTimeout), false
	s.state = restarting
	received := make(chan struct{})
	go func() {
		defer close(received)
		if sockets, err := link.receiveSockets(); err != errLinkClosed {
			s.events <- func() { s.childReady(c, sockets, err) }
		}
	}()
	go func() {
		err := cmd.Wait()
		link.interrupt() // if another process has the child's end too
		<-received
		s.events <- func() { s.childExited(c, err) }
	}()
}

// endTimeout kills the new process. But if this process did not run for a while, because it was
// suspended, the new one may be ready. So it looks once more.
func (s *supervisor) endTimeout() {
	if !s.looks {
		s.late, s.looks = time.After(lookTimeout), true
		return
	}
	s.late = nil
	if s.state == restarting {
		s.report("process %d was not ready within %v", s.newProcess.pid(), readyTimeout)
	}
	_ = s.newProcess.cmd.Process.Kill()
}

// childReady makes c the serving process. If its sockets cannot be received, it shuts down.
func (s *supervisor) childReady(c *child, sockets []held, err error) {
	if c == s.newProcess {
		s.late = nil
	}
	switch {
	case s.state != restarting || c != s.newProcess:
		closeAll(sockets)
	case err != nil:
		s.report("process %d: %v", c.pid(), err)
		c.stop(syscall.SIGUSR2)
	default:
		s.sockets.replace(sockets)
		s.serving.stop(syscall.SIGUSR2)
		s.serving = c
		s.state = steady
		s.passSignals()
	}
}

// passSignals makes this process pass signals on that are for the serving process.
func (s *supervisor) passSignals() {
	for _, sig := range []os.Signal{syscall.SIGHUP, syscall.SIGUSR1} {
		if !signal.Ignored(sig) { // new processes are to ignore it too
			signal.Notify(s.passing, sig)
		}
	}
}

// childExited makes this process exit too, if c is the serving process.
func (s *supervisor) childExited(c *child, err error) {
	delete(s.children, c)
	c.link.close()
	if errors.Is(err, syscall.ECHILD) {
		err = nil // something else has waited for it
	}
	switch {
	case c == s.serving:
		if err != nil {
			s.result = fmt.Errorf("restart: process %d: %w", c.pid(), err)
		}
		s.stopService(syscall.SIGTERM)
	case c == s.newProcess && s.state == restarting:
		s.late = nil
		s.report("process %d exited before it was ready: %v", c.pid(), c.status())
	}
}

// served is called when serve has returned.
func (s *supervisor) served(err error) {
	s.serves = false
	if _, ok := s.serving.(self); ok {
		s.result = err
		s.stopService(syscall.SIGTERM)
	} else if err != nil {
		log.Printf("restart: %v", err)
	}
}

// stopService stops all processes because of sig.
func (s *supervisor) stopService(sig syscall.Signal) {
	if s.state == restarting {
		s.newProcess.stop(sig)
		_ = s.newProcess.cmd.Process.Signal(syscall.SIGTERM) // it may not have called Run yet
	}
	s.state = stopping
	s.sockets.replace(nil) // no connection is to wait in the accept queue of a stopped service
	s.serving.stop(sig)
}

// kill kills all processes.
func (s *supervisor) kill() {
	for c := range s.children {
		_ = c.cmd.Process.Kill()
	}
	os.Exit(1)
}

// exitLikeChild exits with the status of the serving process, if that is a child that has
// reported an error after a signal.
func (s *supervisor) exitLikeChild() {
	if _, ok := s.serving.(*child); !ok || !s.signaled {
		return
	}
	var exit *exec.ExitError
	if errors.As(s.result, &exit) && exit.Exited() {
		os.Exit(exit.ExitCode())
	}
}

// report reports why a restart has failed, after which the next one is possible.
func (s *supervisor) report(format string, args ...any) {
	log.Printf("restart: not restarted: "+format, args...)
	s.state = steady
}

// self is this process as a server.
type self context.CancelCauseFunc

func (cancel self) stop(sig syscall.Signal) { cancel(causeOf(sig)) }

func (self) pass(os.Signal) {}

// A child is a process that this one has started.
type child struct {
	cmd  *exec.Cmd
	link *link
}

func (c *child) stop(sig syscall.Signal) { c.link.sendWord(sig) }

func (c *child) pass(sig os.Signal) { _ = c.cmd.Process.Signal(sig) }

func (c *child) pid() int { return c.cmd.Process.Pid }

// status returns how the child has exited.
func (c *child) status() string {
	if c.cmd.ProcessState == nil {
		return "unknown status"
	}
	return c.cmd.ProcessState.String()
}
