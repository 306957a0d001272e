//go:build unix

package restart

import (
	"context"
	"errors"
	"net"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"
)

// wordTimeout is how long Stop waits for the parent's word in a child that is signaled itself.
var wordTimeout = time.Second

// errParentExited is the cause of a child's context if the parent exits without a word.
var errParentExited = errors.New("parent process exited")

// A system is what a Process consists of on Unix.
type system struct {
	sockets sockets
	parent  *parent       // nil in the parent itself
	waited  chan struct{} // in a child: closed when Stop need not wait for word any longer

	ctx     context.Context // that serve has
	cancel  context.CancelCauseFunc
	mu      sync.Mutex    // held by Ready, and while a signal to a child cancels ctx
	isReady chan struct{} // closed by Ready with mu held
}

func (s *system) run(serve func(context.Context) error) error {
	if passed.err != nil {
		return passed.err
	}
	// The first use of a process handle makes os.checkPidfd clone this process. If signals went
	// to the whole process group at that moment, the clone would pass its signal on to this
	// process, which would take it for a second one.
	if self, err := os.FindProcess(os.Getpid()); err == nil {
		_ = self.Release()
	}
	s.sockets.inherit()
	s.parent = passed.parent
	s.waited, s.isReady = make(chan struct{}), make(chan struct{})
	if s.parent != nil {
		s.isReady = s.parent.childReady
	}
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(signals)
	// Unlike signal.Ignore, this is not inherited by processes that are started.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)

	if s.parent != nil {
		go s.obeySignal(signals)
		go s.obeyParent()
		return serve(s.ctx)
	}
	restarts := make(chan os.Signal, 1)
	signal.Notify(restarts, syscall.SIGUSR2) // before serve, which may call Ready at once
	served := make(chan error, 1)
	go func() { served <- serve(s.ctx) }()
	return supervise(&s.sockets, s.cancel, s.isReady, served, signals, restarts)
}

// obeySignal cancels the context of a child that is signaled itself.
func (s *system) obeySignal(signals <-chan os.Signal) {
	sig := <-signals
	s.mu.Lock()
	s.cancel(signalError{sig})
	ready := closed(s.isReady)
	s.mu.Unlock()
	if ready {
		select {
		case <-s.parent.told:
		case <-time.After(wordTimeout):
		}
	}
	close(s.waited)
}

// obeyParent cancels the context of a child on the parent's word, or if there will be none.
func (s *system) obeyParent() {
	<-s.parent.told
	if s.parent.word == 0 {
		s.cancel(errParentExited)
	} else {
		s.cancel(causeOf(s.parent.word))
	}
}

func (s *system) listen(
	config *net.ListenConfig, network, address string,
) (*net.TCPListener, error) {
	return s.sockets.listen(config, network, address)
}

func (s *system) ready() {
	s.mu.Lock()
	does := s.ctx.Err() == nil && !closed(s.isReady)
	if does {
		close(s.isReady)
	}
	s.mu.Unlock()
	if !does {
		return
	}
	s.sockets.seal()
	if s.parent != nil {
		s.parent.link.sendSockets(s.sockets.take())
	}
}

// drains reports whether the service is being stopped, and no other process needs the socket
// with this address.
func (s *system) drains(addr net.Addr) bool {
	if s.ctx.Err() == nil || s.sockets.mayBeActivated(addr) {
		return false
	}
	if s.parent == nil {
		return context.Cause(s.ctx) != ErrReplaced
	}
	select {
	case <-s.parent.told:
	case <-s.waited:
	}
	return closed(s.parent.told) && s.parent.word != 0 && s.parent.word != syscall.SIGUSR2
}

func (s *system) pid() int {
	if s.parent == nil {
		return os.Getpid()
	}
	return s.parent.pid
}

// causeOf returns the cause of a context that is done because of sig. SIGUSR2 means that
// another process serves.
func causeOf(sig syscall.Signal) error {
	if sig == syscall.SIGUSR2 {
		return ErrReplaced
	}
	return signalError{sig}
}

func closed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}
