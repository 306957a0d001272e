// The tests of this file execute random histories: several goroutines call the methods
// of one wrapper after another, and their results are checked against a model afterwards.
package listenertest_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener"
	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

// The seed reproduces the operations of each goroutine, but not their schedule.
func TestRandomHistories(t *testing.T) {
	for i := range tcptest.Rounds(400) {
		seed := rand.Uint64()
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			t.Parallel()
			result := make(chan error, 1)
			go func() { result <- execute(seed, i%2 == 0) }()
			require.NoError(t, tcptest.Receive(t, result, "return of each Accept after Stop or Drain"))
		})
	}
}

// A span is when an operation was called and when it returned, by a clock that ticks with
// each call and each return; ret is zero until it has returned.
type span struct{ call, ret int64 }

// before reports whether s had returned when other was called.
func (s span) before(other span) bool { return s.ret != 0 && s.ret < other.call }

// calledBeforeReturn reports whether s had been called when other returned.
func (s span) calledBeforeReturn(other span) bool { return s.call != 0 && s.call < other.ret }

// An execution of a history has one listener at a time, and its wrapper.
type execution struct {
	clock      atomic.Int64
	awaitDrain bool // nothing but an operation replaces a drained wrapper

	mu       sync.Mutex // guards the fields below
	current  *wrapper
	previous []*wrapper
}

// A socket is one listener and its clients, by their address. Each keeps its port until the check.
type socket struct {
	*net.TCPListener

	mu       sync.Mutex // guards the fields below, and close the execution's mu too
	close    span       // from the first call to the first return
	dialed   map[string]net.Conn
	accepted []string
}

// A wrapper is a StoppableListener and the operations that were done on it.
type wrapper struct {
	*socket
	sl        *stoppablelistener.StoppableListener
	accepting sync.WaitGroup

	mu        sync.Mutex // guards the fields below
	stop      span       // as close
	drain     span       // as close
	deadlines []*deadlineOp
	accepts   []acceptOp
}

type deadlineOp struct {
	span
	deadline time.Time
	err      error
}

type acceptOp struct {
	span
	returned time.Time
	err      error
}

// drained reports whether Drain may have had an effect. After Stop, it has none.
func (w *wrapper) drained() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.drain.call != 0 && (w.stop.ret == 0 || w.drain.call < w.stop.ret)
}

// execute executes a history and returns an error if a result violates the model. It may replace
// each wrapper at any time, unless awaitDrain is true and the wrapper is drained.
func execute(seed uint64, awaitDrain bool) error {
	x := &execution{awaitDrain: awaitDrain}
	if err := x.renew(); err != nil {
		return err
	}
	const goroutines = 4
	errs := make(chan error, goroutines)
	for g := range goroutines {
		go func() {
			random := rand.New(rand.NewPCG(seed, uint64(g)))
			var err error
			for n := random.IntN(16); n > 0 && err == nil; n-- {
				err = x.do(random.IntN(16))
			}
			errs <- err
		}()
	}
	// Renew interrupts each Accept for which the history has neither a client nor Stop.
	var err error
	for left := goroutines; left > 0; {
		select {
		case e := <-errs:
			err = errors.Join(err, e)
			left--
		case <-time.After(time.Millisecond):
			if !x.draining() {
				err = errors.Join(err, x.renew())
			}
		}
	}
	err = errors.Join(err, x.finish())
	for _, w := range append(x.previous, x.current) {
		err = errors.Join(err, w.check())
		for _, client := range w.dialed {
			client.Close()
		}
	}
	return err
}

// do does one operation.
func (x *execution) do(op int) error {
	x.mu.Lock()
	w := x.current
	switch op {
	case 0, 1, 2:
		w.accepting.Add(1)
		x.mu.Unlock()
		defer w.accepting.Done()
		x.accept(w, op == 2)
		return nil
	case 3:
		defer x.mu.Unlock()
		x.record(&w.socket.mu, &w.close, func() { w.sl.Close() })
		return nil
	case 4, 5:
		x.mu.Unlock()
		x.record(&w.mu, &w.stop, w.sl.Stop)
		return nil
	case 6:
		x.mu.Unlock()
		return x.renew()
	case 7, 8, 9, 10:
		x.mu.Unlock()
		now := time.Now()
		x.setDeadline(w,
			[]time.Time{tcptest.Past, now.Add(time.Millisecond), now.Add(time.Hour), {}}[op-7])
		return nil
	case 11:
		x.mu.Unlock()
		x.record(&w.mu, &w.drain, w.sl.Drain)
		return nil
	default:
		defer x.mu.Unlock()
		return x.dial(w)
	}
}

// record does an operation. It records the first call and the first return in s, which mu
// guards.
func (x *execution) record(mu *sync.Mutex, s *span, do func()) {
	mu.Lock()
	if s.call == 0 {
		s.call = x.clock.Add(1)
	}
	mu.Unlock()
	do()
	mu.Lock()
	if s.ret == 0 {
		s.ret = x.clock.Add(1)
	}
	mu.Unlock()
}

// draining reports whether to wait for the end of Drain.
func (x *execution) draining() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.awaitDrain && x.current.drained()
}

// renew stops the wrapper, and wraps its socket again or, if that is closed or refuses
// connections, another.
func (x *execution) renew() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	var s *socket
	if w := x.current; w != nil {
		x.record(&w.mu, &w.stop, w.sl.Stop)
		w.accepting.Wait()
		x.previous = append(x.previous, w)
		s = w.socket
		if s.close.call != 0 {
			s = nil
		} else if w.drained() {
			if err := s.finish(); err != nil {
				return err
			}
			s = nil
		}
	}
	if s == nil {
		// Not at 127.0.0.1, if possible: the thousands of sockets would get clients of other tests,
		// which connect until they are refused.
		l, err := net.Listen("tcp", "127.0.0.2:0")
		if err != nil {
			l, err = net.Listen("tcp", "127.0.0.1:0")
		}
		if err != nil {
			return err
		}
		s = &socket{TCPListener: l.(*net.TCPListener), dialed: make(map[string]net.Conn)}
	}
	sl, err := stoppablelistener.New(s.TCPListener)
	x.current = &wrapper{socket: s, sl: sl}
	return err
}

func (x *execution) accept(w *wrapper, tcp bool) {
	op := acceptOp{span: span{call: x.clock.Add(1)}}
	var conn net.Conn
	if tcp {
		conn, op.err = w.sl.AcceptTCP()
	} else {
		conn, op.err = w.sl.Accept()
	}
	op.returned = time.Now()
	op.ret = x.clock.Add(1)
	w.mu.Lock()
	w.accepts = append(w.accepts, op)
	w.mu.Unlock()
	if op.err == nil { // otherwise, check looks at it
		w.socket.recordClient(conn)
	}
}

func (x *execution) setDeadline(w *wrapper, deadline time.Time) {
	op := &deadlineOp{span: span{call: x.clock.Add(1)}, deadline: deadline}
	w.mu.Lock()
	w.deadlines = append(w.deadlines, op)
	w.mu.Unlock()
	err := w.sl.SetDeadline(deadline)
	w.mu.Lock()
	op.ret, op.err = x.clock.Add(1), err
	w.mu.Unlock()
}

// dial connects a client, with mu held, unless another history may listen at the address, as after
// Close and Drain. The client stays until the check: on some systems, Accept does not return a
// connection that the client has reset.
func (x *execution) dial(w *wrapper) error {
	s := w.socket
	if s.close.call != 0 || w.drained() {
		return nil
	}
	conn, err := net.Dial("tcp", s.Addr().String())
	if w.drained() && tcptest.IsRefused(err) {
		return nil
	}
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.dialed[conn.LocalAddr().String()] = conn
	s.mu.Unlock()
	return conn.(*net.TCPConn).SetLinger(0) // as tcptest.DialOnce
}

func (s *socket) recordClient(conn net.Conn) {
	defer conn.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.accepted = append(s.accepted, conn.RemoteAddr().String())
}

// finish finishes the last socket.
func (x *execution) finish() error {
	if err := x.renew(); err != nil {
		return err
	}
	return x.current.socket.finish()
}

// finish accepts the pending connections and closes the socket, on which no Accept is blocked.
func (s *socket) finish() error {
	defer s.Close()
	sl, err := stoppablelistener.New(s.TCPListener)
	if err != nil {
		return err
	}
	if err := sl.SetDeadline(time.Now().Add(tcptest.Patience)); err != nil {
		return err
	}
	for len(s.accepted) < len(s.dialed) {
		conn, err := sl.Accept()
		if err != nil {
			return fmt.Errorf("%d clients dialed, %d accepted: %w",
				len(s.dialed), len(s.accepted), err)
		}
		s.recordClient(conn)
	}
	return nil
}

// check returns an error if a result violates the model.
func (w *wrapper) check() error {
	for i, addr := range w.accepted {
		if w.dialed[addr] == nil || slices.Contains(w.accepted[:i], addr) {
			return fmt.Errorf("client %s did not dial, or was accepted twice", addr)
		}
	}
	for _, op := range w.deadlines {
		stopped := op.err == stoppablelistener.StoppedError
		may := w.stop.calledBeforeReturn(op.span) || w.drain.calledBeforeReturn(op.span)
		must := w.stop.before(op.span) || w.drain.before(op.span)
		if stopped && !may || !stopped && must {
			return fmt.Errorf("SetDeadline %+v returned %v, Stop %+v, Drain %+v",
				op.span, op.err, w.stop, w.drain)
		}
	}
	w.deadlines = slices.DeleteFunc(w.deadlines, func(op *deadlineOp) bool {
		return op.err == stoppablelistener.StoppedError // it has changed nothing
	})
	for _, op := range w.deadlines {
		closed := errors.Is(op.err, net.ErrClosed)
		if op.err != nil && !closed || closed && !w.close.calledBeforeReturn(op.span) ||
			!closed && w.close.before(op.span) {
			return fmt.Errorf("SetDeadline: %v", op.err)
		}
	}
	for _, op := range w.accepts {
		if why := w.violation(op); why != "" {
			return fmt.Errorf("%s: Accept %+v returned %v, Stop %+v, Drain %+v, Close %+v",
				why, op.span, op.err, w.stop, w.drain, w.close)
		}
	}
	return nil
}

// violation says why Accept must not have returned as it did; empty if it may.
func (w *wrapper) violation(op acceptOp) string {
	if op.err == stoppablelistener.StoppedError {
		if w.stop.calledBeforeReturn(op.span) || w.drain.calledBeforeReturn(op.span) {
			return ""
		}
		return "neither stopped nor drained yet"
	}
	for _, other := range w.accepts {
		if other.err == stoppablelistener.StoppedError && other.before(op.span) {
			return "another Accept has returned StoppedError before"
		}
	}
	switch {
	case w.stop.before(op.span):
		return "stopped before"
	case op.err != nil && w.drain.before(op.span):
		return "drained before"
	case op.err == nil && w.close.before(op.span):
		return "closed before"
	case op.err == nil && w.timedOut(op) && !w.drain.calledBeforeReturn(op.span):
		return "the deadline had expired"
	case op.err == nil:
		return ""
	case errors.Is(op.err, os.ErrDeadlineExceeded):
		for _, d := range w.deadlines {
			if d.calledBeforeReturn(op.span) && !d.deadline.IsZero() &&
				!d.deadline.After(op.returned) && !w.superseded(d, op) {
				return ""
			}
		}
		return "no deadline had expired"
	case !errors.Is(op.err, net.ErrClosed):
		return "an unknown error"
	case !w.close.calledBeforeReturn(op.span):
		return "not closed yet"
	case w.stop.before(w.close):
		return "stopped before it was closed"
	case w.drain.before(w.close):
		return "drained before it was closed"
	}
	return ""
}

// superseded reports whether another deadline had replaced d when op was called.
func (w *wrapper) superseded(d *deadlineOp, op acceptOp) bool {
	for _, other := range w.deadlines {
		if d.before(other.span) && other.before(op.span) {
			return true
		}
	}
	return false
}

// timedOut reports whether the deadline had expired during all of op.
func (w *wrapper) timedOut(op acceptOp) bool {
	for _, d := range w.deadlines {
		if d.deadline != tcptest.Past || !d.before(op.span) {
			continue
		}
		last := true
		for _, other := range w.deadlines {
			last = last && (other == d || other.deadline == tcptest.Past ||
				other.before(d.span) || op.before(other.span))
		}
		if last {
			return true
		}
	}
	return false
}
