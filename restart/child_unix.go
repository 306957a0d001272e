//go:build unix

package restart

import (
	"context"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
)

// errParentExited is the cause of a child's context if the parent exits without a message.
var errParentExited = errors.New("parent process exited")

// A child is started by a parent and obeys it.
type child struct {
	handover
	sockets // its method listen is the role's

	ctx      context.Context // that serve has
	cancel   context.CancelCauseFunc
	once     sync.Once // of Ready, or of what comes first and makes that do nothing
	isReady  atomic.Bool
	received chan struct{}  // closed when the parent has sent its message, or has exited
	message  syscall.Signal // valid when received is closed; 0 if the parent has exited without one
}

// asChild is nil in a parent. A child exits with its parent even before it calls Run.
var asChild = newChild()

func newChild() *child {
	handover, ok := takeHandover()
	if !ok {
		return nil
	}
	c := &child{handover: handover, received: make(chan struct{})}
	c.ctx, c.cancel = context.WithCancelCause(context.Background())
	if c.err == nil {
		go c.obeyParent()
	}
	return c
}

// obeyParent waits for the parent's message.
func (c *child) obeyParent() {
	c.message = c.link.receiveSignal()
	cause := causeOf(c.message)
	if c.message == 0 {
		cause = errParentExited
		if !c.isReady.Load() {
			var reports reporter
			reports.print("%v before process %d was ready", cause, os.Getpid())
			reports.flush()
			os.Exit(1)
		}
	}
	close(c.received)
	c.cancel(cause)
}

func (c *child) run(serve func(context.Context) error) error {
	if c.err != nil {
		return c.err
	}
	if err := c.inherit(c.descriptors); err != nil {
		return err
	}
	ignoreSIGPIPE()
	defer onStopSignals(c.obeySignal, func() {})()
	return serve(c.ctx)
}

// obeySignal is called when this process is signaled itself. The parent may have been signaled
// too, and otherwise learns of it, so a child that is ready gets its message in any case.
func (c *child) obeySignal(sig os.Signal) {
	c.cancel(signalError{sig})
	if c.wasReady() {
		c.link.sendSignal(sig.(syscall.Signal))
	}
}

func (c *child) ready() {
	c.once.Do(func() {
		if c.ctx.Err() == nil {
			c.isReady.Store(true)
			c.seal()
			c.link.sendSockets(c.take())
		}
	})
}

// wasReady reports whether this process is ready. If it is not, Ready does nothing any more.
func (c *child) wasReady() bool {
	c.once.Do(func() {})
	return c.isReady.Load()
}

func (c *child) endsService() bool {
	if c.ctx.Err() == nil {
		return false
	}
	if c.wasReady() {
		<-c.received
	}
	return closed(c.received) && c.message != 0 && c.message != syscall.SIGUSR2
}

func (c *child) pid() int { return c.parentPid }
