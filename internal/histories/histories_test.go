// The tests of this folder play random histories: several goroutines call the methods of one
// wrapper after another, and a model says afterwards what must not have happened.
package histories_test

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
	"github.com/c2db162c/stoppablelistener/internal/tcptest"
)

// A history is what several goroutines do to one wrapper after another: each byte
// is an operation and the goroutine that does it. The seed brings the history back, but
// not how its goroutines took turns.
func TestRandomHistories(t *testing.T) {
	for range tcptest.Rounds(500) {
		seed := rand.Uint64()
		random := rand.New(rand.NewPCG(seed, seed))
		history := make([]byte, 1+random.IntN(60))
		for i := range history {
			history[i] = byte(random.Uint32())
		}
		if err := runHistory(history); err != nil {
			t.Fatalf("seed %d, history %v: %v", seed, history, err)
		}
	}
}

// Fuzz it with -fuzzminimizetime 1x: what a history covers depends on how its goroutines take
// turns, so the fuzzer would try in vain to find a shorter one that covers the same.
func FuzzHistory(f *testing.F) {
	every := make([]byte, 16*actors) // operation, by every goroutine
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
		if err := runHistory(history); err != nil {
			t.Fatalf("history %v: %v", history, err)
		}
	})
}

// actors is how many goroutines play a history.
const actors = 4

// A span is when an operation began and ended, by a clock that ticks with each of
// them; end is zero while it goes on.
type span struct{ begin, end int64 }

// before reports whether s had ended when other began.
func (s span) before(other span) bool { return s.end != 0 && s.end < other.begin }

// began reports whether s had begun when other ended.
func (s span) began(other span) bool { return s.begin != 0 && s.begin < other.end }

// A world is what a history plays in: one listener at a time, and its wrapper.
type world struct {
	clock atomic.Int64

	mu   sync.Mutex // guards the fields below
	life *life
	past []*life
}

// A socket is one listener and its clients. Each has a number of its own, which is the first
// thing that it sends, for a port is used again.
type socket struct {
	*net.TCPListener

	mu       sync.Mutex // guards the fields below
	close    span       // from the first that began to the first that ended; the world's mu too
	dialed   map[int64]net.Conn
	accepted []int64
}

// A life is that of one wrapper: what was done to it and what came back.
type life struct {
	*socket
	sl        *stoppablelistener.StoppableListener
	accepting sync.WaitGroup

	mu        sync.Mutex // guards the fields below
	stop      span       // as close
	deadlines []*deadlineOp
	accepts   []acceptOp
}

type deadlineOp struct {
	span
	at  time.Time
	err error
}

type acceptOp struct {
	span
	returned time.Time
	err      error
}

// runHistory plays history and reports what must not have happened.
func runHistory(history []byte) error {
	result := make(chan error, 1)
	go func() { result <- playHistory(history) }()
	select {
	case err := <-result:
		return err
	case <-time.After(2 * tcptest.Patience):
		return errors.New("an Accept was left waiting")
	}
}

func playHistory(history []byte) error {
	w := &world{}
	if err := w.renew(); err != nil {
		return err
	}
	errs := make(chan error, actors)
	for actor := range actors {
		go func() {
			var err error
			for _, b := range history {
				if int(b)/16%actors == actor && err == nil {
					err = w.do(b % 16)
				}
			}
			errs <- err
		}()
	}
	// Whoever waits in Accept for what the history does not bring is let go.
	var err error
	for left := actors; left > 0; {
		select {
		case e := <-errs:
			err = errors.Join(err, e)
			left--
		case <-time.After(time.Millisecond):
			err = errors.Join(err, w.renew())
		}
	}
	err = errors.Join(err, w.drain())
	for _, lf := range append(w.past, w.life) {
		err = errors.Join(err, lf.judge())
		for _, client := range lf.dialed {
			client.Close()
		}
	}
	return err
}

// do does one operation.
func (w *world) do(op byte) error {
	w.mu.Lock()
	lf := w.life
	switch op {
	case 0, 1, 2:
		lf.accepting.Add(1)
		w.mu.Unlock()
		defer lf.accepting.Done()
		return w.accept(lf, op == 2)
	case 3:
		defer w.mu.Unlock()
		w.record(&lf.socket.mu, &lf.close, func() { lf.sl.Close() })
		return nil
	case 4, 5:
		w.mu.Unlock()
		w.record(&lf.mu, &lf.stop, lf.sl.Stop)
		return nil
	case 6:
		w.mu.Unlock()
		return w.renew()
	case 7, 8, 9, 10:
		w.mu.Unlock()
		now := time.Now()
		w.setDeadline(lf, []time.Time{tcptest.Past, now.Add(time.Millisecond), now.Add(time.Hour), {}}[op-7])
		return nil
	default:
		defer w.mu.Unlock()
		return w.dial(lf.socket)
	}
}

// record does an operation and notes in s, which mu guards, when the first one was.
func (w *world) record(mu *sync.Mutex, s *span, do func()) {
	mu.Lock()
	if s.begin == 0 {
		s.begin = w.clock.Add(1)
	}
	mu.Unlock()
	do()
	mu.Lock()
	if s.end == 0 {
		s.end = w.clock.Add(1)
	}
	mu.Unlock()
}

// renew stops the wrapper, and wraps its socket again or, if that is closed, another.
func (w *world) renew() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	var s *socket
	if lf := w.life; lf != nil {
		w.record(&lf.mu, &lf.stop, lf.sl.Stop)
		lf.accepting.Wait()
		w.past = append(w.past, lf)
		s = lf.socket
		if s.close.begin != 0 {
			if _, err := stoppablelistener.New(s.TCPListener); !errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("New on a closed listener: %v", err)
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
	w.life = &life{socket: s, sl: sl}
	return err
}

func (w *world) accept(lf *life, tcp bool) error {
	op := acceptOp{span: span{begin: w.clock.Add(1)}}
	var conn net.Conn
	if tcp {
		conn, op.err = lf.sl.AcceptTCP()
	} else {
		conn, op.err = lf.sl.Accept()
	}
	op.returned = time.Now()
	op.end = w.clock.Add(1)
	lf.mu.Lock()
	lf.accepts = append(lf.accepts, op)
	lf.mu.Unlock()
	if op.err != nil {
		return nil // the judge has a look at it
	}
	return lf.socket.took(conn)
}

func (w *world) setDeadline(lf *life, at time.Time) {
	op := &deadlineOp{span: span{begin: w.clock.Add(1)}, at: at}
	lf.mu.Lock()
	lf.deadlines = append(lf.deadlines, op)
	lf.mu.Unlock()
	err := lf.sl.SetDeadline(at)
	lf.mu.Lock()
	op.end, op.err = w.clock.Add(1), err
	lf.mu.Unlock()
}

// dial connects a client, with w's mu held. It stays until its life is judged: on some
// systems a client that has left is not accepted.
func (w *world) dial(s *socket) error {
	if s.close.begin != 0 {
		return nil
	}
	conn, err := net.Dial("tcp", s.Addr().String())
	if err != nil {
		return err
	}
	number := w.clock.Add(1)
	s.mu.Lock()
	s.dialed[number] = conn
	s.mu.Unlock()
	return errors.Join(conn.(*net.TCPConn).SetLinger(0), // as tcptest.DialOnce
		binary.Write(conn, binary.BigEndian, number))
}

// took notes whose connection conn is.
func (s *socket) took(conn net.Conn) error {
	defer conn.Close()
	var number int64
	err := errors.Join(conn.SetReadDeadline(time.Now().Add(tcptest.Patience)),
		binary.Read(conn, binary.BigEndian, &number))
	s.mu.Lock()
	defer s.mu.Unlock()
	s.accepted = append(s.accepted, number)
	return err
}

// drain accepts the clients that are still queued and closes the last socket.
func (w *world) drain() error {
	if err := w.renew(); err != nil {
		return err
	}
	lf := w.life
	defer lf.sl.Close()
	lf.sl.SetDeadline(time.Now().Add(tcptest.Patience))
	for len(lf.accepted) < len(lf.dialed) {
		conn, err := lf.sl.Accept()
		if err != nil {
			return fmt.Errorf("%d clients dialed, %d accepted: %w", len(lf.dialed), len(lf.accepted), err)
		}
		if err := lf.socket.took(conn); err != nil {
			return err
		}
	}
	return nil
}

// judge reports what must not have happened in lf.
func (lf *life) judge() error {
	for i, number := range lf.accepted {
		if lf.dialed[number] == nil || slices.Contains(lf.accepted[:i], number) {
			return fmt.Errorf("client %d did not dial, or was accepted twice", number)
		}
	}
	for _, op := range lf.deadlines {
		stopped := op.err == stoppablelistener.StoppedError
		if stopped && !lf.stop.began(op.span) || !stopped && lf.stop.before(op.span) {
			return fmt.Errorf("SetDeadline %+v, Stop %+v: %v", op.span, lf.stop, op.err)
		}
	}
	lf.deadlines = slices.DeleteFunc(lf.deadlines, func(op *deadlineOp) bool {
		return op.err == stoppablelistener.StoppedError // it has changed nothing
	})
	for _, op := range lf.deadlines {
		closed := errors.Is(op.err, net.ErrClosed)
		if op.err != nil && !closed || closed && !lf.close.began(op.span) ||
			!closed && lf.close.before(op.span) {
			return fmt.Errorf("SetDeadline: %v", op.err)
		}
	}
	for _, op := range lf.accepts {
		if why := lf.wrong(op); why != "" {
			return fmt.Errorf("%s: Accept %+v returned %v, Stop %+v, Close %+v", why, op.span, op.err, lf.stop, lf.close)
		}
	}
	return nil
}

// wrong says why Accept may not have returned as it did; it is empty if it may.
func (lf *life) wrong(op acceptOp) string {
	if op.err == stoppablelistener.StoppedError {
		if !lf.stop.began(op.span) {
			return "not stopped yet"
		}
		return ""
	}
	switch {
	case lf.stop.before(op.span):
		return "stopped before"
	case op.err == nil && lf.close.before(op.span):
		return "closed before"
	case op.err == nil && lf.timedOut(op):
		return "the deadline was past"
	case op.err == nil:
		return ""
	case errors.Is(op.err, os.ErrDeadlineExceeded):
		for _, d := range lf.deadlines {
			if d.began(op.span) && !d.at.IsZero() && !d.at.After(op.returned) && !lf.superseded(d, op) {
				return ""
			}
		}
		return "no deadline was due"
	case !errors.Is(op.err, net.ErrClosed):
		return "an error of its own"
	case !lf.close.began(op.span):
		return "not closed yet"
	case lf.stop.before(lf.close):
		return "stopped before it was closed"
	}
	return ""
}

// superseded reports whether another deadline had replaced d when op began.
func (lf *life) superseded(d *deadlineOp, op acceptOp) bool {
	for _, other := range lf.deadlines {
		if d.before(other.span) && other.before(op.span) {
			return true
		}
	}
	return false
}

// timedOut reports whether the deadline was in the past all through op.
func (lf *life) timedOut(op acceptOp) bool {
	for _, d := range lf.deadlines {
		if d.at != tcptest.Past || !d.before(op.span) {
			continue
		}
		last := true
		for _, other := range lf.deadlines {
			last = last && (other == d || other.at == tcptest.Past || other.before(d.span) || op.before(other.span))
		}
		if last {
			return true
		}
	}
	return false
}
