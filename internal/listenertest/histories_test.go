// The tests of this file execute random histories: several goroutines call the methods
// of one wrapper after another, and their results are checked against a model afterwards.
package listenertest_test

import (
	"encoding/binary"
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

	"github.com/c2db162c/stoppablelistener"
	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

// Each byte of a history is an operation and the goroutine that does it. The seed reproduces
// the history, but not its schedule.
func TestRandomHistories(t *testing.T) {
	t.Parallel()
	for range tcptest.Rounds(500) {
		seed := rand.Uint64()
		history := randomHistory(seed)
		if err := execute(history, false); err != nil {
			t.Fatalf("seed %d, history %v: %v", seed, history, err)
		}
	}
}

// In most of the histories above, Stop ends Drain.
func TestRandomHistoriesThatWaitAfterDrain(t *testing.T) {
	t.Parallel()
	const histories = 50
	results := make(chan error, histories)
	for range histories {
		go func() {
			seed := rand.Uint64()
			history := randomHistory(seed)
			err := execute(history, true)
			if err != nil {
				err = fmt.Errorf("seed %d, history %v: %w", seed, history, err)
			}
			results <- err
		}()
	}
	for range histories {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
}

func randomHistory(seed uint64) []byte {
	random := rand.New(rand.NewPCG(seed, seed))
	history := make([]byte, 1+random.IntN(60))
	for i := range history {
		history[i] = byte(random.Uint32())
	}
	return history
}

// Fuzz it with -fuzzminimizetime 1x: what a history covers depends on its schedule, so the
// fuzzer would try in vain to find a shorter one that covers the same.
func FuzzHistory(f *testing.F) {
	every := make([]byte, 16*goroutines) // operation by every goroutine
	for i := range every {
		every[i] = byte(i)
	}
	f.Add(slices.Clone(every))
	slices.Reverse(every) // with the clients first
	f.Add(every)
	f.Fuzz(func(t *testing.T, history []byte) {
		if len(history) > 100 {
			history = history[:100]
		}
		if err := execute(history, false); err != nil {
			t.Fatalf("history %v: %v", history, err)
		}
	})
}

// goroutines is how many execute a history.
const goroutines = 4

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
	awaitDrain bool // a drained wrapper is replaced by the history only

	mu       sync.Mutex // guards the fields below
	current  *wrapper
	previous []*wrapper
}

// A socket is one listener and its clients. Each client sends its number first, because
// ports are reused.
type socket struct {
	*net.TCPListener

	mu       sync.Mutex // guards the fields below, and close the execution's mu too
	close    span       // from the first call to the first return
	dialed   map[int64]net.Conn
	accepted []int64
}

// A wrapper is a StoppableListener and the operations that were done on it.
type wrapper struct {
	*socket
	sl        *stoppablelistener.StoppableListener
	accepting sync.WaitGroup

	mu        sync.Mutex // guards the fields below
	stop      span       // as close
	drain     span       // as close
	drainTime time.Time  // before the first call of Drain
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

// refuses reports whether new connections must be refused.
func (w *wrapper) refuses() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.drain.ret != 0 && (w.stop.call == 0 || w.drain.ret < w.stop.call) &&
		tcptest.RefusesAfterDrain()
}

// execute executes history and returns an error if a result violates the model. It may replace
// each wrapper at any time, unless awaitDrain is true and the wrapper is drained.
func execute(history []byte, awaitDrain bool) error {
	result := make(chan error, 1)
	go func() { result <- executeAndCheck(history, awaitDrain) }()
	select {
	case err := <-result:
		return err
	case <-time.After(2 * tcptest.Patience):
		return errors.New("an Accept is still blocked after Stop or Drain")
	}
}

func executeAndCheck(history []byte, awaitDrain bool) error {
	x := &execution{awaitDrain: awaitDrain}
	if err := x.renew(); err != nil {
		return err
	}
	errs := make(chan error, goroutines)
	for g := range goroutines {
		go func() {
			var err error
			for _, b := range history {
				if int(b)/16%goroutines == g && err == nil {
					err = x.do(b % 16)
				}
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
func (x *execution) do(op byte) error {
	x.mu.Lock()
	w := x.current
	switch op {
	case 0, 1, 2:
		w.accepting.Add(1)
		x.mu.Unlock()
		defer w.accepting.Done()
		return x.accept(w, op == 2)
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
		w.mu.Lock()
		if w.drainTime.IsZero() {
			w.drainTime = time.Now()
		}
		w.mu.Unlock()
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
			if _, err := stoppablelistener.New(s.TCPListener); !errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("New on a closed listener: %v", err)
			}
			s = nil
		} else if w.drained() {
			if err := s.finish(); err != nil {
				return err
			}
			s = nil
		}
	}
	if s == nil {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		s = &socket{TCPListener: l.(*net.TCPListener), dialed: make(map[int64]net.Conn)}
	}
	sl, err := stoppablelistener.New(s.TCPListener)
	x.current = &wrapper{socket: s, sl: sl}
	return err
}

func (x *execution) accept(w *wrapper, tcp bool) error {
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
	if op.err != nil {
		return nil // check looks at it
	}
	return w.socket.recordClient(conn)
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

// dial connects a client, with mu held. It stays until the check: on some systems, Accept does
// not return a connection that the client has reset.
func (x *execution) dial(w *wrapper) error {
	s := w.socket
	if s.close.call != 0 {
		return nil
	}
	refuses := w.refuses()
	conn, err := net.Dial("tcp", s.Addr().String())
	if w.drained() && tcptest.IsRefused(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if refuses {
		return fmt.Errorf("a connection is not refused: Drain %+v, Stop %+v", w.drain, w.stop)
	}
	number := x.clock.Add(1)
	s.mu.Lock()
	s.dialed[number] = conn
	s.mu.Unlock()
	return errors.Join(conn.(*net.TCPConn).SetLinger(0), // as tcptest.DialOnce
		binary.Write(conn, binary.BigEndian, number))
}

// recordClient reads the number of the client.
func (s *socket) recordClient(conn net.Conn) error {
	defer conn.Close()
	var number int64
	err := errors.Join(conn.SetReadDeadline(time.Now().Add(tcptest.Patience)),
		binary.Read(conn, binary.BigEndian, &number))
	s.mu.Lock()
	defer s.mu.Unlock()
	s.accepted = append(s.accepted, number)
	return err
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
		if err := s.recordClient(conn); err != nil {
			return err
		}
	}
	return nil
}

// check returns an error if a result violates the model.
func (w *wrapper) check() error {
	for i, number := range w.accepted {
		if w.dialed[number] == nil || slices.Contains(w.accepted[:i], number) {
			return fmt.Errorf("client %d did not dial, or was accepted twice", number)
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
		switch {
		case w.stop.calledBeforeReturn(op.span):
			return ""
		case !w.drain.calledBeforeReturn(op.span):
			return "neither stopped nor drained yet"
		case w.close.calledBeforeReturn(op.span):
			return ""
		case op.returned.Sub(w.drainTime) < tcptest.BlindWait && !tcptest.RefusesAfterDrain():
			return "has not waited after Drain"
		}
		return ""
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
