//go:build unix

package restart

import (
	"context"
	"errors"
	"net"
	"os"
	"sync"
	"syscall"
)

// errParentExited is the cause of a child's context if the parent exits without a word.
var errParentExited = errors.New("parent process exited")

// A child is started by a parent and obeys it.
type child struct {
	handover
	sockets sockets

	ctx       context.Context // that serve has
	cancel    context.CancelCauseFunc
	mu        sync.Mutex     // held while Ready or a signal, whichever is first, has its effect
	isReady   chan struct{}  // closed by Ready with mu held
	announced chan struct{}  // closed when Ready has sent the sockets
	told      chan struct{}  // closed when the parent has sent its word, or has exited
	word      syscall.Signal // valid when told is closed; 0 if the parent has exited without one
}

// asChild is nil in a parent. A child exits with its parent even before it calls Run.
var asChild = newChild()

func newChild() *child {
	handover, ok := takeHandover()
	if !ok {
		return nil
	}
	c := &child{
		handover:  handover,
		isReady:   make(chan struct{}),
		announced: make(chan struct{}),
		told:      make(chan struct{}),
	}
	c.ctx, c.cancel = context.WithCancelCause(context.Background())
	if c.err == nil {
		go c.obeyParent()
	}
	return c
}

// obeyParent waits for the parent's word.
func (c *child) obeyParent() {
	c.word = c.link.receiveSignal()
	cause := causeOf(c.word)
	if c.word == 0 {
		cause = errParentExited
		if !closed(c.isReady) {
			var reports reporter
			reports.print("%v before process %d was ready", cause, os.Getpid())
			reports.flush()
			os.Exit(1)
		}
	}
	close(c.told)
	c.cancel(cause)
}

func (c *child) run(serve func(context.Context) error) error {
	if c.err != nil {
		return c.err
	}
	if err := c.sockets.inherit(c.descriptors); err != nil {
		return err
	}
	ignoreSIGPIPE()
	defer onStopSignals(c.obeySignal, func() {})()
	return serve(c.ctx)
}

// obeySignal is called when this process is signaled itself. The parent may have been signaled
// too, and otherwise learns of it, so a child that is ready gets its word in any case.
func (c *child) obeySignal(sig os.Signal) {
	c.mu.Lock()
	c.cancel(signalError{sig})
	c.mu.Unlock()
	if closed(c.isReady) {
		<-c.announced
		c.link.sendSignal(sig.(syscall.Signal))
	}
}

func (c *child) listen(
	config *net.ListenConfig, network, address string,
) (*net.TCPListener, bool, error) {
	return c.sockets.listen(config, network, address)
}

func (c *child) ready() {
	c.mu.Lock()
	does := c.ctx.Err() == nil && !closed(c.isReady)
	if does {
		close(c.isReady)
	}
	c.mu.Unlock()
	if does {
		c.sockets.seal()
		c.link.sendSockets(c.sockets.take())
		close(c.announced)
	}
}

func (c *child) endsService() bool {
	if c.ctx.Err() == nil {
		return false
	}
	if closed(c.isReady) {
		<-c.told
	}
	return closed(c.told) && c.word != 0 && c.word != syscall.SIGUSR2
}

func (c *child) pid() int { return c.parentPid }
