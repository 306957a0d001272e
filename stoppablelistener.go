// Package stoppablelistener stops the accept loop of a TCP server without closing its socket,
// for graceful shutdown and zero-downtime restart:
//
//	sl, err := stoppablelistener.New(l) // l is what net.Listen returned
//	go acceptLoop(sl)                   // calls Accept until that returns an error
//	sl.Drain()                          // or sl.Stop(), if the socket is used again
//
// Accept then returns [StoppedError]. After Stop, it does so at once, and the socket can be used by
// the next server or another process. After Drain, Linux refuses new connections, and Accept first
// returns the pending ones: those in the accept queue and in the handshake.
//
// Package net has two ways to interrupt a blocked Accept. [net.TCPListener.Close] also closes
// the socket, and resets the connections in its accept queue (backlog): those that the kernel
// has established and that Accept has not returned yet. After a deadline, Accept returns a
// timeout, a temporary error, after which [net/http.Server.Serve] retries. This package sets a
// deadline too, but returns a permanent error.
//
// If you only have to stop one HTTP server, and a few failed requests do not matter,
// [net/http.Server.Shutdown] is enough.
//
// # HTTP servers
//
// Package httpdrain shuts down an http.Server with one call, and with far fewer failed requests
// than Shutdown. If you call Drain or Stop yourself, Serve returns StoppedError, and the server
// still serves its open connections, until you call Shutdown.
//
// Serve closes its listener when it returns. After Drain, that resets no connection, within the
// limits of [StoppableListener.Drain]. If the socket is used again after Stop, keep it open:
// pass Serve a wrapper whose Close method calls Stop, as the example of [StoppableListener.Stop]
// does. A Close method that does nothing is not enough, because Shutdown waits for Serve to
// return.
//
// # Child processes
//
// Pass the file that [StoppableListener.File] returns to a child process in
// [os/exec.Cmd.ExtraFiles], and both processes can accept connections from the same socket.
// Stop in one process does not affect the other; Drain does. The child calls [net.FileListener]
// and New. Package restart does all of this to restart a server without downtime.
//
// With the file of the plain *net.TCPListener's File method, starting the child or calling Fd
// sets the socket to blocking mode in both processes. An Accept that is called in that mode
// returns with the next connection only; neither Stop nor Close interrupts it.
//
// # Limitations
//
//   - TCP only: New rejects Unix sockets, TLS listeners and other wrappers. ServeTLS(sl, …)
//     and tls.NewListener(sl, …) work.
//   - Neither Stop nor Drain interrupts a wrapper around a StoppableListener that is blocked
//     before it calls Accept, such as a full netutil.LimitListener.
//   - Package net has no deadlines for Accept on Plan 9. There, an Accept that is blocked when
//     Stop is called returns the next connection, and Drain does not end.
package stoppablelistener

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/c2db162c/stoppablelistener/internal/socket"
)

// pollInterval is the maximum time from now to the deadline of the embedded listener; it is
// long, so that an idle listener costs next to nothing.
//
// Stop does not need a poll, since it moves the deadline itself. The poll limits the damage
// when other code moves that deadline. If New is called before the accept loop of a stopped
// wrapper has returned, that loop stays blocked for a minute and not forever. A deadline set on
// the plain *net.TCPListener ends a poll and not an Accept.
const pollInterval = time.Minute

const (
	// firstLook is the time from Drain to the first look for connections that are still to be
	// accepted. A SYN that the kernel has already assigned to the socket becomes visible by then.
	firstLook = 5 * time.Millisecond

	// maxHandshake is the time from Drain during which handshakes are waited for. It is longer
	// than a round-trip time by satellite, and half-open connections delay the end of Drain by it.
	maxHandshake = 2 * time.Second

	// blindWait is the same, if the system does not show its handshakes. Nearly every round-trip
	// time is shorter.
	blindWait = 250 * time.Millisecond
)

// longPast is a deadline that interrupts Accept; net/http interrupts reads with the same.
var longPast = time.Unix(1, 0)

// StoppedError is returned by Accept and AcceptTCP after a call to Stop, and when a call to
// Drain has stopped the accept loop. SetDeadline returns it after either call. It is returned
// unwrapped, so both err == StoppedError and [errors.Is] work.
//
// It wraps [net.ErrClosed], and its text ends with the text of that error. So an accept loop
// that recognizes a closed listener also recognizes a stopped one. It is neither temporary nor
// a timeout, the two kinds of error after which accept loops retry.
//
//lint:ignore ST1012 this is the published name
var StoppedError = fmt.Errorf("stoppablelistener: listener stopped: %w", net.ErrClosed)

// A StoppableListener is a [net.TCPListener] whose Accept can be interrupted while its
// socket stays open. Create one with [New]; the zero value is not usable. Multiple
// goroutines may invoke its methods simultaneously.
//
// Addr, Close and SyscallConn are those of the embedded listener. Do not pass that one to what
// accepts connections: neither Stop nor Drain makes its Accept return StoppedError.
type StoppableListener struct {
	*net.TCPListener

	stop chan struct{} // no values sent; closed with mu held, by Stop or at the end of Drain

	mu         sync.Mutex        // guards the fields below, and each change of the TCPListener's deadline
	deadline   time.Time         // as the caller set it; zero means none
	drained    time.Time         // when Drain was called; zero means not yet
	refusing   bool              // after Drain: the system refuses new connections
	handshakes socket.Handshakes // after Drain
	nextLook   time.Time         // after Drain: the deadline of the TCPListener
}

// New wraps l, which must be an open, non-nil [*net.TCPListener], no matter which function
// returned it: [net.Listen], [net.ListenConfig.Listen] or [net.FileListener]. For any other
// l, it returns an error that names the type; for a closed one, an error that wraps
// [net.ErrClosed].
//
// New clears the deadline of l and sets nonblocking mode for its socket. So a socket can be
// wrapped again after Stop, any number of times, once the accept loop on the previous
// wrapper has returned. It does not undo Drain. New starts no goroutine.
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
		err = socket.SetNonblock(tcp)
	}
	if err != nil {
		return nil, fmt.Errorf("stoppablelistener: cannot wrap listener: %w", err)
	}
	return sl, nil
}

// Accept implements the Accept method in the [net.Listener] interface; it calls
// [StoppableListener.AcceptTCP]. The connection is a [*net.TCPConn].
func (sl *StoppableListener) Accept() (net.Conn, error) {
	conn, err := sl.AcceptTCP()
	if err != nil {
		return nil, err // conn would be a nil pointer in a non-nil interface
	}
	return conn, nil
}

// AcceptTCP waits for the next connection and returns it as package net does.
//
// If called after Stop has returned, it returns [StoppedError], even if connections are in the
// accept queue. If Stop is called while it is blocked, it returns StoppedError, or the connection
// that it has just taken from the accept queue: it never drops a connection. After Drain, it
// returns connections first, and then StoppedError. After the deadline set with SetDeadline, it
// returns an error that wraps [os.ErrDeadlineExceeded]. After Close, it returns package net's
// error, unless Stop or Drain was called too. Other errors are those of package net.
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

// File returns a duplicate of the socket's descriptor, as [net.TCPListener.File] does, but
// leaves the socket in nonblocking mode. So a child process can be started with the file while
// goroutines are in Accept, and Stop still interrupts these at once. It is the caller's
// responsibility to close the file, which does not affect the listener.
//
// On systems other than Unix, it is the embedded listener's File.
func (sl *StoppableListener) File() (*os.File, error) {
	return socket.File(sl.TCPListener)
}

// SetDeadline sets the deadline of Accept and AcceptTCP, including calls that are blocked,
// as [net.TCPListener.SetDeadline] does. The zero time means no deadline. After Stop or Drain,
// it changes nothing and returns [StoppedError]. On a closed listener, it returns package net's
// error, unless Stop or Drain was called too.
func (sl *StoppableListener) SetDeadline(t time.Time) error {
	sl.mu.Lock()
	defer sl.mu.Unlock()
	if sl.stopped() || !sl.drained.IsZero() {
		return StoppedError
	}
	sl.deadline = t
	return sl.startPoll()
}

// Stop interrupts the accept loop. Each blocked Accept and AcceptTCP returns at once, with
// [StoppedError] or the connection that it has just taken from the accept queue; each later
// call returns StoppedError. Stop may be called any number of times, before the first Accept,
// after Close, and after Drain, which it interrupts; calls after the first do nothing.
//
// Stop does not wait for the accept loop to return. It closes neither accepted connections nor
// the socket: the kernel keeps adding new connections to the accept queue. So wait for the
// accept loop, for example with a [sync.WaitGroup], and then pass sl.TCPListener to New to
// serve the socket again. If it is not used again, call Drain instead of Stop: closing
// the socket after Stop resets the connections in its accept queue. To use the plain
// *net.TCPListener again, clear the deadline that Stop has set: l.SetDeadline(time.Time{}).
func (sl *StoppableListener) Stop() {
	sl.mu.Lock()
	defer sl.mu.Unlock()
	if !sl.stopped() { // otherwise, the socket may be in use by another wrapper
		sl.interrupt()
	}
}

// Drain stops the accept loop for the last time: the system refuses new connections, and Accept
// returns the pending ones, and then [StoppedError]. Drain returns at once, and closes neither the
// socket nor accepted connections.
//
// Call it only if nothing else accepts from the socket, now or later: no other wrapper, no
// other process, no service manager. It cannot be undone, and affects every duplicate of the
// socket. Package restart's Listener has a Drain method that calls this one, or Stop.
//
// The accept loop must keep calling Accept until it returns StoppedError. That happens, in each
// goroutine, some milliseconds after the last connection was accepted or the last handshake has
// completed. Closing the socket then resets no connection. The address is free then: another
// socket can listen there while this one is open. If no descriptor is free, Accept returns package
// net's error (EMFILE), as before Drain.
//
// A handshake is waited for until two seconds after Drain. With TCP_DEFER_ACCEPT, it lasts until
// the client sends data. Half-open connections, whose clients never complete the handshake, delay
// StoppedError by up to two seconds; those older than about three seconds do not. Handshakes with
// SYN cookies fail; the kernel uses these if the backlog is exceeded.
//
// Drain may be called before the first Accept and after Close. Calls after the first, and calls
// after Stop, do nothing. A deadline set with SetDeadline no longer counts.
//
// If another process has drained the socket, Accept blocks until Stop, Drain or Close is called in
// this one too. The Accept of a plain *net.TCPListener returns EINVAL.
//
// Linux refuses new connections since version 5.7, for TCP and Multipath TCP. This needs no
// privileges. After Drain, connect returns "connection refused" at once. If another socket
// listens at the same address (SO_REUSEPORT), some clients connect to that one a second later,
// because the kernel drops their first SYN.
//
// The kernel shows the handshakes in flight by netlink. If a sandbox or the configuration of the
// kernel forbids that, or the socket was created in another network namespace, Accept waits for
// handshakes until 250 ms after Drain.
//
// Before Linux 5.7, on other systems, in some sandboxes, and, for unprivileged processes, on a
// socket that is bound to a device, or to a link-local address, connections cannot be refused.
// Accept returns connections for 250 ms after Drain, and then StoppedError. Closing the socket then
// resets the connections in its accept queue and in the handshake.
func (sl *StoppableListener) Drain() {
	sl.mu.Lock()
	defer sl.mu.Unlock()
	if sl.stopped() || !sl.drained.IsZero() {
		return // after Stop, the socket may be in use by another wrapper
	}
	sl.drained = time.Now()
	sl.refusing = socket.Refuse(sl.TCPListener)
	if sl.refusing {
		sl.lookIn(firstLook)
	} else {
		sl.lookIn(blindWait)
	}
}

// stopped reports whether Stop has been called, or Drain has stopped the accept loop.
func (sl *StoppableListener) stopped() bool {
	select {
	case <-sl.stop:
		return true
	default:
		return false
	}
}

// endPoll is called with the error of an accept. It starts the next poll and returns nil if
// only the poll has ended; otherwise it returns the error for the caller.
func (sl *StoppableListener) endPoll(err error) error {
	timeout := errors.Is(err, os.ErrDeadlineExceeded)
	if !timeout && socket.IsShutDown(sl.TCPListener) {
		sl.awaitStop()
		return StoppedError
	}
	sl.mu.Lock()
	defer sl.mu.Unlock()
	draining := !sl.drained.IsZero()
	switch {
	case sl.stopped():
		return StoppedError
	case draining && errors.Is(err, net.ErrClosed):
		sl.interrupt()
		return StoppedError
	case draining && timeout:
		sl.look()
		return nil
	case !timeout, !sl.deadline.IsZero() && !time.Now().Before(sl.deadline):
		return err
	}
	_ = sl.startPoll() // fails only on a closed listener, which the next accept reports
	return nil
}

// look stops the accept loop if no connection is left to be accepted. Otherwise, it sets the
// deadline at which it is called again. It is called with mu held, after Drain.
//
// When a handshake completes, the connection moves to the accept queue. So the queue comes last.
func (sl *StoppableListener) look() {
	since := time.Since(sl.drained)
	switch {
	case time.Now().Before(sl.nextLook): // another goroutine has looked
		_ = sl.TCPListener.SetDeadline(sl.nextLook)
	case !sl.refusing: // connections may keep coming
		sl.interrupt()
	case sl.handshakeInFlight(since) || socket.HasPending(sl.TCPListener):
		// Once a deadline has expired, package net returns the timeout without a look at the
		// accept queue. So even a busy machine must call accept before that.
		sl.lookIn(min(max(since/4, 25*time.Millisecond), 100*time.Millisecond))
	default:
		sl.interrupt()
		socket.ShutDown(sl.TCPListener)
	}
}

// handshakeInFlight reports whether a handshake is in flight that is to be waited for.
func (sl *StoppableListener) handshakeInFlight(since time.Duration) bool {
	if since >= maxHandshake {
		return false
	}
	inFlight, err := sl.handshakes.InFlight(sl.TCPListener)
	if err != nil {
		return since < blindWait
	}
	return inFlight
}

// lookIn sets the deadline to that of the next look. It is called with mu held.
func (sl *StoppableListener) lookIn(d time.Duration) {
	sl.nextLook = time.Now().Add(d)
	_ = sl.TCPListener.SetDeadline(sl.nextLook)
}

// awaitStop is called when another process has drained the socket. It waits until Stop, Drain or
// Close is called in this one: if Accept returned an error before, a server would exit and abandon
// its connections.
func (sl *StoppableListener) awaitStop() {
	for !sl.isDraining() && socket.IsShutDown(sl.TCPListener) { // false after Close
		select {
		case <-sl.stop:
			return
		case <-time.After(100 * time.Millisecond):
		}
	}
	sl.Stop()
}

func (sl *StoppableListener) isDraining() bool {
	sl.mu.Lock()
	defer sl.mu.Unlock()
	return !sl.drained.IsZero()
}

// startPoll sets the deadline of the embedded listener to the end of the next poll.
//
// It is called with mu held, and not after the stop channel is closed, which Stop does with
// mu held. So a goroutine that is about to start a poll either does so before Stop, whose
// deadline then replaces its own, or finds the channel closed. No poll can postpone the
// deadline with which Stop interrupts the other goroutines.
func (sl *StoppableListener) startPoll() error {
	end := time.Now().Add(pollInterval)
	if !sl.deadline.IsZero() && sl.deadline.Before(end) {
		end = sl.deadline
	}
	return sl.TCPListener.SetDeadline(end)
}

// interrupt makes each Accept return StoppedError. It is called with mu held.
func (sl *StoppableListener) interrupt() {
	close(sl.stop)
	// It fails only on a closed listener, where no goroutine is blocked.
	_ = sl.TCPListener.SetDeadline(longPast)
}
