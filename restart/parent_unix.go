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
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"
)

// readyTimeout is how long a new process may take until it calls Ready.
var readyTimeout = time.Minute

const (
	// endTimeout is how long a new process that is not ready may outlive the serving process.
	endTimeout = time.Second

	// flushTimeout is how long a process that exits waits for its last report.
	flushTimeout = time.Second
)

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

func newRole() role {
	if asChild != nil {
		return asChild
	}
	return newParent()
}

// A parent starts, replaces and stops children, and serves itself until the first restart.
type parent struct {
	sockets                 // its method listen is the role's
	ctx     context.Context // that serve has
	cancel  context.CancelCauseFunc
	passing chan os.Signal // for the serving process
	events  chan func()    // called by run, one after the other; only they use the fields below
	done    chan struct{}  // closed when run calls no more events

	state      state
	again      bool                   // SIGUSR2 has arrived while no restart was possible
	serving    instance               // this process, or the child that has become ready last
	returned   bool                   // serve has returned in this process
	children   map[*childProcess]bool // those that have not exited
	newProcess *childProcess          // the one that was started last
	signaled   bool                   // the service is being stopped by a signal
	result     error                  // of Run
	reports    reporter
}

type state int

const (
	starting   state = iota // this process is not ready
	steady                  // a restart is possible
	restarting              // newProcess is not ready
	stopping                // no more restarts
)

// An instance is what serves: the parent or a child.
type instance interface {
	stop(syscall.Signal) // shut down gracefully; calls after the first do nothing
	pass(os.Signal)      // what the parent has received
}

func newParent() *parent {
	p := &parent{
		passing:  make(chan os.Signal, 100), // several may come while a process is started
		events:   make(chan func()),
		done:     make(chan struct{}),
		children: make(map[*childProcess]bool),
	}
	p.ctx, p.cancel = context.WithCancelCause(context.Background())
	p.serving = self(p.cancel)
	return p
}

func (p *parent) run(serve func(context.Context) error) error {
	if err := p.inherit(takeActivation()); err != nil {
		return err
	}
	ignoreSIGPIPE()
	restarts := make(chan os.Signal, 1)
	signal.Notify(restarts, syscall.SIGUSR2) // before serve, which may call Ready at once
	go p.relay(restarts, func(os.Signal) { p.restart() })
	go p.relay(p.passing, func(sig os.Signal) { p.serving.pass(sig) })
	defer onStopSignals(
		func(sig os.Signal) { p.do(func() { p.stopBySignal(sig.(syscall.Signal)) }) },
		func() { p.do(p.kill) },
	)()
	go func() {
		err := serve(p.ctx)
		p.do(func() { p.serveReturned(err) })
	}()
	for !p.returned || len(p.children) > 0 {
		event := <-p.events
		event()
	}
	close(p.done)
	p.reports.flush()
	p.exitLikeChild()
	return p.result
}

// ignoreSIGPIPE is not signal.Ignore, whose effect processes that are started inherit.
func ignoreSIGPIPE() { signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE) }

// relay makes run call event for each signal.
func (p *parent) relay(signals <-chan os.Signal, event func(os.Signal)) {
	for sig := range signals {
		p.do(func() { event(sig) })
	}
}

// do makes run call event, unless it has returned.
func (p *parent) do(event func()) {
	select {
	case p.events <- event:
	case <-p.done:
	}
}

func (p *parent) ready() {
	if p.ctx.Err() != nil {
		return
	}
	p.seal()
	p.do(func() {
		if p.state == starting {
			p.settle()
		}
	})
}

func (p *parent) endsService() bool {
	return p.ctx.Err() != nil && context.Cause(p.ctx) != ErrReplaced
}

func (p *parent) pid() int { return os.Getpid() }

// settle is called when this process is ready, and when a restart has succeeded or failed.
func (p *parent) settle() {
	p.state = steady
	if c, ok := p.serving.(*childProcess); ok && c.signal != 0 {
		p.stopBySignal(c.signal)
	} else if p.again {
		p.again = false
		p.start()
	}
}

// restart is called on SIGUSR2.
func (p *parent) restart() {
	pid := os.Getpid()
	switch p.state {
	case steady:
		p.start()
		return
	case stopping:
		return
	case restarting:
		pid = p.newProcess.pid()
	}
	p.again = true
	p.reports.print("process %d is not ready yet; the next restart waits for it", pid)
}

// start starts a new process.
func (p *parent) start() {
	cmd := original
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	link, err := p.startLinked(&cmd)
	if err != nil {
		p.fail("%v", err)
		return
	}
	c := &childProcess{cmd: &cmd, link: link, settled: make(chan struct{})}
	p.children[c] = true
	p.newProcess = c
	p.state = restarting
	received := make(chan struct{})
	go func() {
		defer close(received)
		sockets, err := link.receiveSockets()
		if err == errLinkClosed {
			return
		}
		p.do(func() { p.childReady(c, sockets, err) })
		if sig := link.receiveSignal(); sig != 0 {
			p.do(func() { p.childSignaled(c, sig) })
		}
	}()
	go func() {
		err := cmd.Wait()
		link.interrupt() // if another process has the child's end too
		<-received
		p.do(func() { p.childExited(c, err) })
	}()
	go func() {
		if !await(c.settled, readyTimeout) {
			p.do(func() { p.giveUp(c) })
		}
	}()
}

// startLinked starts cmd as a child that inherits the held sockets.
func (p *parent) startLinked(cmd *exec.Cmd) (*link, error) {
	sockets, err := p.duplicates()
	if err != nil {
		return nil, err
	}
	l, err := startLinked(cmd, sockets)
	if err != nil {
		// Package os reports that as an error of the program.
		if _, dirErr := os.Stat(cmd.Dir + "/."); dirErr != nil {
			err = &os.PathError{Op: "chdir", Path: cmd.Dir, Err: errors.Unwrap(dirErr)}
		}
	}
	return l, err
}

// fail ends a restart that has failed, and reports why.
func (p *parent) fail(format string, args ...any) {
	p.reports.print("not restarted: "+format, args...)
	p.settle()
}

// giveUp kills a new process that is not ready in time.
func (p *parent) giveUp(c *childProcess) {
	if closed(c.settled) {
		return
	}
	_ = c.cmd.Process.Kill()
	if p.state == restarting && c == p.newProcess {
		p.fail("process %d was not ready within %v", c.pid(), readyTimeout)
	}
}

// childReady makes c the serving process. If its sockets cannot be received, it shuts down.
func (p *parent) childReady(c *childProcess, sockets []held, err error) {
	close(c.settled)
	switch {
	case p.state != restarting || c != p.newProcess:
		closeAll(sockets)
	case err != nil:
		c.stop(syscall.SIGUSR2)
		p.fail("process %d: %v", c.pid(), err)
	default:
		p.replace(sockets)
		p.serving.stop(syscall.SIGUSR2)
		p.serving = c
		// Until now, these signals have had their effect on this process.
		notify(p.passing, syscall.SIGHUP, syscall.SIGUSR1)
		p.settle()
	}
}

// childSignaled stops the service if the serving process has been signaled itself. A restart that
// succeeds makes up for that, so it is waited for. The child accepts connections meanwhile.
func (p *parent) childSignaled(c *childProcess, sig syscall.Signal) {
	c.signal = sig
	if c == p.serving && p.state == steady {
		p.stopBySignal(sig)
	}
}

// childExited stops the service if c is the serving process.
func (p *parent) childExited(c *childProcess, err error) {
	delete(p.children, c)
	c.link.close()
	if errors.Is(err, syscall.ECHILD) {
		err = nil // something else has waited for it
	}
	if !closed(c.settled) {
		close(c.settled)
	}
	switch {
	case c == p.serving:
		if err != nil {
			p.result = fmt.Errorf("restart: process %d: %w", c.pid(), err)
		}
		p.end()
	case p.state == restarting && c == p.newProcess:
		p.fail("process %d exited before it was ready: %v", c.pid(), c.status())
	}
}

// serveReturned is called when serve has returned in this process.
func (p *parent) serveReturned(err error) {
	p.returned = true
	if _, ok := p.serving.(self); ok {
		p.result = err
		p.end()
		return
	}
	if err != nil {
		p.reports.print("%v", err)
	}
	go debug.FreeOSMemory() // nothing that serve has used is needed any more
}

// end stops the service when the serving process has ended.
func (p *parent) end() {
	p.stopService(syscall.SIGTERM)
	for c := range p.children {
		go func() {
			if !await(c.settled, endTimeout) {
				_ = c.cmd.Process.Kill()
			}
		}()
	}
}

// stopBySignal stops the service because this process or the serving process was signaled.
func (p *parent) stopBySignal(sig syscall.Signal) {
	p.signaled = true
	p.stopService(sig)
}

// stopService stops all processes because of sig.
func (p *parent) stopService(sig syscall.Signal) {
	if p.state == restarting {
		p.newProcess.stop(sig)
		_ = p.newProcess.cmd.Process.Signal(syscall.SIGTERM) // it may not have called Run yet
	}
	p.state = stopping
	p.replace(nil) // no connection is to wait in the accept queue of a stopped service
	p.serving.stop(sig)
}

// kill kills all processes.
func (p *parent) kill() {
	for c := range p.children {
		_ = c.cmd.Process.Kill()
	}
	p.reports.flush()
	os.Exit(1)
}

// exitLikeChild exits with the status of the serving process, if that is a child that has
// reported an error after a signal.
func (p *parent) exitLikeChild() {
	if _, ok := p.serving.(*childProcess); !ok || !p.signaled {
		return
	}
	var exit *exec.ExitError
	if errors.As(p.result, &exit) && exit.Exited() {
		os.Exit(exit.ExitCode())
	}
}

// self is this process as an instance.
type self context.CancelCauseFunc

func (cancel self) stop(sig syscall.Signal) { cancel(causeOf(sig)) }

func (self) pass(os.Signal) {}

// causeOf returns the cause of a context that is done because of sig. SIGUSR2 means that
// another process serves.
func causeOf(sig syscall.Signal) error {
	if sig == syscall.SIGUSR2 {
		return ErrReplaced
	}
	return signalError{sig}
}

// A childProcess is a process that the parent has started. The parent's events use it.
type childProcess struct {
	cmd     *exec.Cmd
	link    *link
	settled chan struct{}  // closed when it is ready or has exited
	signal  syscall.Signal // SIGINT or SIGTERM that it has received itself; 0 if none
}

func (c *childProcess) stop(sig syscall.Signal) {
	c.link.sendSignal(sig)
	c.link.close()
}

func (c *childProcess) pass(sig os.Signal) { _ = c.cmd.Process.Signal(sig) }

func (c *childProcess) pid() int { return c.cmd.Process.Pid }

// status returns how the process has exited.
func (c *childProcess) status() string {
	if c.cmd.ProcessState == nil {
		return "unknown status"
	}
	return c.cmd.ProcessState.String()
}

// A reporter prints reports with package log, one after the other. No caller waits for that:
// standard error may be a pipe that nothing reads.
type reporter struct{ printed chan struct{} } // closed when the last report has been printed

func (r *reporter) print(format string, args ...any) {
	before, printed := r.printed, make(chan struct{})
	r.printed = printed
	go func() {
		if before != nil {
			<-before
		}
		log.Printf("restart: "+format, args...)
		close(printed)
	}()
}

// flush waits until the last report has been printed, for a limited time.
func (r *reporter) flush() {
	if r.printed != nil {
		await(r.printed, flushTimeout)
	}
}
