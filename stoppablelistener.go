// Package stoppablelistener stops a TCP accept loop and keeps its socket:
//
//	sl, err := stoppablelistener.New(l) // l is what net.Listen returned
//	go http.Serve(sl, handler)          // or any other accept loop
//	sl.Stop()                           // Serve returns StoppedError
//
// Package net has two other ways to end an Accept that waits. [net.TCPListener.Close]
// takes the socket with it, and the clients that the kernel has queued there.
// [net.TCPListener.SetDeadline], on which this package is built, gives a timeout; that
// counts as temporary, so [net/http.Server.Serve] tries again for ever.
//
// Where one HTTP server is all that there is to stop, and some failed requests do not
// matter, [net/http.Server.Shutdown] is enough. A [StoppableListener] is for every other
// TCP accept loop, for stopping in order (new connections, then the loop, then the open
// connections), and for a socket that goes on, to the next server or to a new process.
package stoppablelistener

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/c2db162c/stoppablelistener/internal/nonblock"
)

// pollInterval is the furthest that a listener's deadline lies ahead; it is long, so that
// an idle listener costs next to nothing.
//
// Stop has no need of a poll, since it moves the deadline itself. The poll is the safety
// net for a socket that others can reach too: a wrapper made before the accept loop of a
// stopped one has returned moves the deadline that was to end that loop, which then
// sleeps for a minute and not for ever; and a deadline set on the bare listener ends a
// poll and not an Accept.
const pollInterval = time.Minute

// longPast is a deadline that ends every Accept, as net/http uses it to end reads.
var longPast = time.Unix(1, 0)

// StoppedError is what Accept and AcceptTCP return once Stop has been called: this
// very value, so that both err == StoppedError and [errors.Is] hold.
//
// It wraps [net.ErrClosed], and its text ends with that error's, so an accept loop that
// recognizes a closed listener by either ends quietly on a stopped one. It is neither
// temporary nor a timeout, the two kinds of error after which accept loops try again.
//
//lint:ignore ST1012 this is the published name
var StoppedError = fmt.Errorf("stoppablelistener: listener stopped: %w", net.ErrClosed)

// A StoppableListener is a [net.TCPListener] whose accept loops can be stopped while
// its socket stays open. [New] makes one; the zero value is of no use. Its methods may
// be called from any number of goroutines at once.
//
// Addr, Close, File and SyscallConn are those of the embedded listener. To give the
// socket to a child process, call Stop, wait for the accept loop to return, and start the
// child then, with the result of File in [os/exec.Cmd.ExtraFiles]: the clients that come
// in between wait in the kernel's queue. Not while a goroutine is in Accept: starting a
// child, like calling Fd on that result, puts the socket into blocking mode, for parent
// and child alike, and there neither Stop nor Close can end an Accept. New undoes that.
type StoppableListener struct {
	*net.TCPListener

	stop chan struct{} // no values sent; closed by Stop, with mu held

	mu       sync.Mutex // guards deadline, and each change of the TCPListener's own
	deadline time.Time  // as the caller set it; zero means none
}

// New wraps l, which must be an open, non-nil [*net.TCPListener], whichever function
// made it: [net.Listen], [net.ListenConfig.Listen], [net.FileListener]. For anything else
// it returns an error that says what l was, and for a closed listener one that wraps
// [net.ErrClosed].
//
// New takes over l: a deadline set before is gone, and the socket is in nonblocking mode
// again, wherever Go uses that. A socket that was stopped, or whose child process could
// not be started, can thus be wrapped and served again, as often as you like. Wait for the
// accept loop on the earlier wrapper to return first: New moves the deadline that tells
// it to. New starts no goroutine.
func New(l net.Listener) (*StoppableListener, error) {
	tcp, ok := l.(*net.TCPListener)
	if !ok {
		return nil, fmt.Errorf("stoppablelistener: cannot wrap %T, only *net.TCPListener", l)
	}
	if tcp == nil {
		return nil, errors.New("stoppablelistener: cannot wrap a nil *net.TCPListener")
	}
	sl := &StoppableListener{TCPListener: tcp, stop: make(chan struct{})}
	err := sl.SetDeadline(time.Time{})
	if err == nil {
		err = nonblock.Set(tcp)
	}
	if err != nil {
		return nil, fmt.Errorf("stoppablelistener: cannot wrap listener: %w", err)
	}
	return sl, nil
}

// Accept does what AcceptTCP does, as [net.Listener] wants it: the connection is a
// [*net.TCPConn], or a nil interface if there is an error.
func (sl *StoppableListener) Accept() (net.Conn, error) {
	conn, err := sl.AcceptTCP()
	if err != nil {
		return nil, err // conn would be a nil pointer in a non-nil interface
	}
	return conn, nil
}

// AcceptTCP waits for the next connection and returns it as package net made it.
//
// Begun after Stop has returned, it returns [StoppedError], however many clients are
// waiting. Interrupted by Stop, it returns StoppedError or the connection that it had
// already taken from the kernel: such a connection is never dropped. A deadline from
// SetDeadline ends it with [os.ErrDeadlineExceeded]. Every other error is package net's,
// as it came: [net.ErrClosed] after Close, unless Stop was called too.
func (sl *StoppableListener) AcceptTCP() (*net.TCPConn, error) {
	for !sl.stopped() {
		conn, err := sl.TCPListener.AcceptTCP()
		if err == nil {
			return conn, nil
		}
		if err = sl.endPoll(err); err != nil {
			return nil, err
		}
	}
	return nil, StoppedError
}

// SetDeadline is [net.TCPListener.SetDeadline]: from t on, Accept and AcceptTCP fail with
// an error that is a timeout; the zero time means no deadline. It holds for calls that
// are already waiting. Once Stop has been called it changes nothing and returns
// [StoppedError], for the socket may by then be somebody else's. On a closed listener it
// returns package net's error, unless Stop was called too.
func (sl *StoppableListener) SetDeadline(t time.Time) error {
	sl.mu.Lock()
	defer sl.mu.Unlock()
	if sl.stopped() {
		return StoppedError
	}
	sl.deadline = t
	return sl.beginPoll()
}

// Stop makes every Accept and AcceptTCP return [StoppedError]: at once those that
// are waiting, and all that come later. It can be called any number of times, before
// the first Accept and after Close; calls after the first do nothing.
//
// Stop waits for nobody, leaves accepted connections alone and does not close the
// socket, on which the kernel keeps queueing clients. So wait for the accept loop to
// return, with a [sync.WaitGroup] say; then end the connections; then Close the socket,
// which resets the clients still queued, or pass it to New to serve it again. To use the
// bare listener l again instead, remove the deadline that Stop leaves there, with
// l.SetDeadline(time.Time{}).
//
// With net/http, two things are to know. Serve closes its listener as it returns; to keep
// the socket, pass it a wrapper whose Close calls Stop. (With one that does nothing,
// Shutdown would wait for Serve for ever.) And Shutdown fails requests: it closes idle
// connections even if a client is just sending, and since Go 1.25 those that were accepted
// and not read yet (golang/go#75591). The file [example/drain.go] ends a server without.
//
// Stop ends what waits in this Accept, and not a listener around it that waits for
// something else first, as a full netutil.LimitListener does. And on Plan 9, where
// package net's accept knows no deadline, one that waits already takes one more client.
//
// [example/drain.go]: https://github.com/c2db162c/stoppablelistener/blob/main/example/drain.go
func (sl *StoppableListener) Stop() {
	sl.mu.Lock()
	defer sl.mu.Unlock()
	if sl.stopped() {
		return // the socket may by now be another wrapper's
	}
	close(sl.stop)
	_ = sl.TCPListener.SetDeadline(longPast) // fails only on a closed listener, where nobody waits
}

// stopped reports whether Stop has been called.
func (sl *StoppableListener) stopped() bool {
	select {
	case <-sl.stop:
		return true
	default:
		return false
	}
}

// endPoll decides what becomes of an accept that failed with err: it begins the next
// poll and returns nil, or returns what the caller is to see.
func (sl *StoppableListener) endPoll(err error) error {
	sl.mu.Lock()
	defer sl.mu.Unlock()
	if sl.stopped() {
		return StoppedError
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	if !sl.deadline.IsZero() && !time.Now().Before(sl.deadline) {
		return err
	}
	_ = sl.beginPoll() // fails only on a closed listener, which the next accept reports
	return nil
}

// beginPoll moves the wrapped listener's deadline to the end of the next poll.
//
// It is called with mu held, and not once the stop channel is closed, which Stop does
// with mu held. So an acceptor that was just about to begin a poll either does so before
// Stop, whose deadline then replaces its own, or finds the channel closed: no poll can
// put off the deadline by which Stop wakes the others.
func (sl *StoppableListener) beginPoll() error {
	end := time.Now().Add(pollInterval)
	if !sl.deadline.IsZero() && sl.deadline.Before(end) {
		end = sl.deadline
	}
	return sl.TCPListener.SetDeadline(end)
}
