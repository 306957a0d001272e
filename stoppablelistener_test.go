package stoppablelistener_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener"
)

var (
	past = time.Unix(1, 0)
	none = time.Time{}
)

// patience is how long something that happens at once may take on a loaded machine.
// It is well below a poll interval: what only the end of a poll brings comes too late.
const patience = 10 * time.Second

// New

func TestNewRejects(t *testing.T) {
	dir, err := os.MkdirTemp("", "sl") // t.TempDir is too long for a socket's name
	require.NoError(t, err)
	defer os.RemoveAll(dir)
	unix, err := net.Listen("unix", filepath.Join(dir, "socket"))
	require.NoError(t, err)
	defer unix.Close()
	closed := listen(t)
	require.NoError(t, closed.Close())

	for _, tt := range []struct {
		name    string
		l       net.Listener
		message string // a part of it
	}{
		{"nil", nil, "nil"},
		{"nil TCPListener", (*net.TCPListener)(nil), "nil"},
		{"UnixListener", unix, "*net.UnixListener"},
		{"TLS", tls.NewListener(listen(t), &tls.Config{}), "*tls.listener"},
		{"StoppableListener", wrap(t, listen(t)), "*stoppablelistener.StoppableListener"},
		{"foreign wrapper", keepOpen{listen(t)}, "stoppablelistener_test.keepOpen"},
		{"zero TCPListener", &net.TCPListener{}, "invalid argument"},
		{"closed", closed, net.ErrClosed.Error()},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sl, err := stoppablelistener.New(tt.l)
			require.Error(t, err)
			assert.Nil(t, sl)
			assert.True(t, strings.HasPrefix(err.Error(), "stoppablelistener: "), err)
			assert.Contains(t, err.Error(), tt.message)
			assert.Equal(t, tt.name == "closed", errors.Is(err, net.ErrClosed))
		})
	}
}

func TestNewTakesOverTheDeadline(t *testing.T) {
	l := listen(t)
	for range 3 {
		require.NoError(t, l.SetDeadline(past))
		sl := wrap(t, l)
		dial(t, l)
		conn, err := sl.Accept()
		require.NoError(t, err)
		conn.Close()
		require.NoError(t, sl.SetDeadline(past))
		sl.Stop()
	}
}

func TestNewStartsNoGoroutine(t *testing.T) {
	l := listen(t)
	before := runtime.NumGoroutine()
	for range 100 {
		wrap(t, l)
	}
	assert.LessOrEqual(t, runtime.NumGoroutine(), before)
}

// Accept and AcceptTCP

func TestAcceptReturnsThePlainTCPConn(t *testing.T) {
	l := listen(t)
	sl := wrap(t, l)
	client := dial(t, l)
	conn, err := sl.Accept()
	require.NoError(t, err)
	defer conn.Close()
	assert.IsType(t, (*net.TCPConn)(nil), conn)
	assert.Equal(t, client.LocalAddr().String(), conn.RemoteAddr().String())

	client = dial(t, l)
	tcp, err := sl.AcceptTCP()
	require.NoError(t, err)
	defer tcp.Close()
	assert.Equal(t, client.LocalAddr().String(), tcp.RemoteAddr().String())
}

func TestAcceptErrorComesWithANilInterface(t *testing.T) {
	sl := wrap(t, listen(t))
	sl.Stop()
	conn, err := sl.Accept()
	assert.Error(t, err)
	assert.True(t, conn == nil, "a nil pointer in a non-nil interface")
}

func TestAcceptWaitsOnWhenAPollEnds(t *testing.T) {
	l := listen(t)
	sl := wrap(t, l)
	accepted := accept(sl)
	for range 3 {
		awaitAcceptors(t, 1)
		require.NoError(t, l.SetDeadline(past)) // the poll ends
	}
	client := dial(t, l)
	got := receive(t, accepted)
	require.NoError(t, got.err)
	defer got.conn.Close()
	assert.Equal(t, client.LocalAddr().String(), got.conn.RemoteAddr().String())

	// A poll that ended while nobody was in Accept, and with a client queued.
	require.NoError(t, l.SetDeadline(past))
	dial(t, l)
	got = receive(t, accept(sl))
	require.NoError(t, got.err)
	got.conn.Close()
}

func TestAcceptDoesNotMoveTheDeadlineForAConnection(t *testing.T) {
	l := listen(t)
	sl := wrap(t, l)
	dial(t, l)
	require.NoError(t, l.SetDeadline(time.Now().Add(patience/10))) // the end of this poll
	conn, err := sl.Accept()
	require.NoError(t, err)
	conn.Close()
	got := receive(t, accept(l)) // the bare listener shows when its deadline is
	assert.ErrorIs(t, got.err, os.ErrDeadlineExceeded)
}

func TestAcceptAfterStopNeverReturnsAConnection(t *testing.T) {
	l := listen(t)
	sl := wrap(t, l)
	const clients = 50
	for range clients {
		dial(t, l)
	}
	sl.Stop()
	for range clients {
		_, err := sl.Accept()
		require.True(t, err == stoppablelistener.StoppedError, err)
		_, err = sl.AcceptTCP()
		require.True(t, err == stoppablelistener.StoppedError, err)
	}
	next := wrap(t, l)
	for range clients {
		got := receive(t, accept(next))
		require.NoError(t, got.err)
		got.conn.Close()
	}
}

func TestAcceptAllocatesNoMoreThanPackageNet(t *testing.T) {
	bare, l := listen(t), listen(t)
	sl := wrap(t, l)
	allocs := func(l net.Listener) float64 {
		return testing.AllocsPerRun(100, func() {
			client := dialOnce(t, l)
			conn, err := l.Accept()
			require.NoError(t, err)
			conn.Close()
			client.Close()
		})
	}
	// Whatever else allocates in the process meanwhile can add to either count.
	assert.Eventually(t, func() bool { return allocs(sl) <= allocs(bare) }, patience, time.Millisecond)
}

func TestCloseWithoutStopIsPackageNetsError(t *testing.T) {
	for name, acceptor := range map[string]func(*stoppablelistener.StoppableListener) error{
		"Accept":    func(sl *stoppablelistener.StoppableListener) error { _, err := sl.Accept(); return err },
		"AcceptTCP": func(sl *stoppablelistener.StoppableListener) error { _, err := sl.AcceptTCP(); return err },
	} {
		t.Run(name, func(t *testing.T) {
			sl := wrap(t, listen(t))
			waiting := make(chan error, 1)
			go func() { waiting <- acceptor(sl) }()
			awaitAcceptors(t, 1)
			require.NoError(t, sl.Close())
			for _, err := range []error{receive(t, waiting), acceptor(sl)} {
				var opErr *net.OpError
				require.ErrorAs(t, err, &opErr)
				assert.Equal(t, "accept", opErr.Op)
				assert.ErrorIs(t, err, net.ErrClosed)
				assert.NotErrorIs(t, err, stoppablelistener.StoppedError)
			}
		})
	}
}

// A poll may end between Close and the next accept.
func TestCloseAtTheEndOfAPollIsPackageNetsError(t *testing.T) {
	for range 300 {
		l := listen(t)
		sl := wrap(t, l)
		accepted := accept(sl)
		awaitAcceptors(t, 1)
		require.NoError(t, l.SetDeadline(past))
		require.NoError(t, l.Close())
		var opErr *net.OpError
		require.ErrorAs(t, receive(t, accepted).err, &opErr)
		require.Equal(t, "accept", opErr.Op)
		require.ErrorIs(t, opErr, net.ErrClosed)
	}
}

// SetDeadline

func TestSetDeadlineIsPackageNets(t *testing.T) {
	const (
		gone  = -time.Hour
		clear = 0
		near  = 50 * time.Millisecond
		far   = time.Hour // polls end before it
	)
	for _, tt := range []struct {
		name          string
		before, while []time.Duration // before and while Accept waits
		timeout       bool
	}{
		{"past", []time.Duration{gone}, nil, true},
		{"near", []time.Duration{near}, nil, true},
		{"far", []time.Duration{far}, nil, false},
		{"cleared", []time.Duration{gone, clear}, nil, false},
		{"past while waiting", nil, []time.Duration{gone}, true},
		{"near while waiting", nil, []time.Duration{near}, true},
		{"far while waiting", nil, []time.Duration{far}, false},
		{"moved earlier", []time.Duration{far}, []time.Duration{near}, true},
		{"moved later", []time.Duration{near}, []time.Duration{far}, false},
		{"cleared while waiting", []time.Duration{near}, []time.Duration{clear}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := listen(t)
			sl := wrap(t, l)
			var deadline time.Time
			set := func(d time.Duration) {
				deadline = none
				if d != clear {
					deadline = time.Now().Add(d)
				}
				require.NoError(t, sl.SetDeadline(deadline))
			}

			for _, d := range tt.before {
				set(d)
			}
			accepted := accept(sl)
			for _, d := range tt.while {
				awaitAcceptors(t, 1)
				set(d)
			}
			require.NoError(t, l.SetDeadline(past)) // a poll ends

			if tt.timeout {
				for range 2 {
					requireTimeout(t, receive(t, accepted).err)
					assert.False(t, time.Now().Before(deadline), "too early")
					accepted = accept(sl)
				}
				requireTimeout(t, receive(t, accepted).err)
				set(clear)
				accepted = accept(sl)
			} else {
				letPass(t, near)
			}
			dial(t, l)
			got := receive(t, accepted)
			require.NoError(t, got.err)
			got.conn.Close()
		})
	}
}

func TestSetDeadlineEndsEveryAccept(t *testing.T) {
	sl := wrap(t, listen(t))
	waiting := acceptMany(sl, 100)
	awaitAcceptors(t, 100)
	require.NoError(t, sl.SetDeadline(time.Now()))
	for range 100 {
		requireTimeout(t, receive(t, waiting).err)
	}
}

func TestSetDeadlineRevivesNothingAfterStop(t *testing.T) {
	sl := wrap(t, listen(t))
	sl.Stop()
	for _, deadline := range []time.Time{none, past, time.Now().Add(time.Hour)} {
		require.NoError(t, sl.SetDeadline(deadline))
		assert.True(t, receive(t, accept(sl)).err == stoppablelistener.StoppedError)
	}
}

// The goroutines that Stop has woken may not have run before SetDeadline is called.
func TestSetDeadlineAfterStopHoldsNobodyBack(t *testing.T) {
	for range 300 {
		sl := wrap(t, listen(t))
		waiting := acceptMany(sl, 3)
		awaitAcceptors(t, 3)
		sl.Stop()
		require.NoError(t, sl.SetDeadline(none))
		requireStopped(t, waiting, 3)
	}
}

func TestSetDeadlineOnAClosedListenerIsPackageNetsError(t *testing.T) {
	sl := wrap(t, listen(t))
	require.NoError(t, sl.Close())
	want := sl.TCPListener.SetDeadline(none)
	require.ErrorIs(t, want, net.ErrClosed)
	assert.Equal(t, want, sl.SetDeadline(none))
	sl.Stop()
	assert.Equal(t, want, sl.SetDeadline(none))
}

// Stop

func TestStopEndsEveryAcceptAtOnce(t *testing.T) {
	for _, n := range []int{1, 100} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			sl := wrap(t, listen(t))
			waiting := acceptMany(sl, n)
			awaitAcceptors(t, n)
			sl.Stop()
			requireStopped(t, waiting, n)
		})
	}
}

// One acceptor takes the lock to begin its next poll while Stop does; the others
// must not have to wait for that poll to end.
func TestStopIsNotUndoneByAPoll(t *testing.T) {
	const acceptors = 4
	for range rounds(2000) {
		l := listen(t)
		sl := wrap(t, l)
		waiting := acceptMany(sl, acceptors)
		require.NoError(t, l.SetDeadline(past)) // the poll ends
		sl.Stop()
		requireStopped(t, waiting, acceptors)
		l.Close()
	}
}

func TestStopIsNotUndoneBySetDeadline(t *testing.T) {
	const acceptors = 4
	for range rounds(2000) {
		l := listen(t)
		sl := wrap(t, l)
		waiting := acceptMany(sl, acceptors)
		go sl.SetDeadline(time.Now().Add(time.Hour))
		sl.Stop()
		requireStopped(t, waiting, acceptors)
		l.Close()
	}
}

func TestStopAnyNumberOfTimesFromAnyGoroutines(t *testing.T) {
	sl := wrap(t, listen(t))
	waiting := acceptMany(sl, 1)
	var stops sync.WaitGroup
	for range 100 {
		stops.Add(1)
		go func() {
			defer stops.Done()
			sl.Stop()
		}()
	}
	stops.Wait()
	requireStopped(t, waiting, 1)
	sl.Stop()
}

func TestStopBeforeTheFirstAccept(t *testing.T) {
	sl := wrap(t, listen(t))
	sl.Stop()
	requireStopped(t, acceptMany(sl, 1), 1)
}

func TestStopBeforeAndAfterClose(t *testing.T) {
	t.Run("before", func(t *testing.T) {
		for range 300 { // the acceptor that Stop woke may run before Close or after
			sl := wrap(t, listen(t))
			waiting := acceptMany(sl, 2)
			awaitAcceptors(t, 2)
			sl.Stop()
			require.NoError(t, sl.Close())
			requireStopped(t, waiting, 2)
			requireStopped(t, acceptMany(sl, 1), 1)
		}
	})
	t.Run("after", func(t *testing.T) {
		sl := wrap(t, listen(t))
		require.NoError(t, sl.Close())
		sl.Stop()
		sl.Stop()
		requireStopped(t, acceptMany(sl, 1), 1)
	})
}

func TestStopFromTheAcceptLoopItself(t *testing.T) {
	l := listen(t)
	sl := wrap(t, l)
	dial(t, l)
	loop := make(chan error, 1)
	go func() {
		for {
			conn, err := sl.Accept()
			if err != nil {
				loop <- err
				return
			}
			conn.Close()
			sl.Stop()
		}
	}()
	assert.True(t, receive(t, loop) == stoppablelistener.StoppedError)
}

func TestStopFromAHandler(t *testing.T) {
	l := listen(t)
	sl := wrap(t, l)
	server := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		sl.Stop()
		fmt.Fprint(w, "stopped")
	})}
	served := make(chan error, 1)
	go func() { served <- server.Serve(sl) }()
	assert.Equal(t, "stopped", get(t, l))
	assert.True(t, receive(t, served) == stoppablelistener.StoppedError)
	require.NoError(t, server.Shutdown(context.Background()))
}

func TestStopLeavesAcceptedConnectionsAlone(t *testing.T) {
	l := listen(t)
	sl := wrap(t, l)
	client := dial(t, l)
	conn, err := sl.Accept()
	require.NoError(t, err)
	defer conn.Close()
	sl.Stop()
	_, err = conn.Write([]byte("still here"))
	require.NoError(t, err)
	got := make([]byte, len("still here"))
	_, err = io.ReadFull(client, got)
	require.NoError(t, err)
	assert.Equal(t, "still here", string(got))
}

func TestStopLeavesTheSocketToItsOwner(t *testing.T) {
	l := listen(t)
	sl := wrap(t, l)
	sl.Stop()
	client := dial(t, l) // the kernel still queues clients

	require.NoError(t, l.SetDeadline(none))
	sl.Stop() // neither moves the deadline again, nor closes the socket
	got := receive(t, accept(l))
	require.NoError(t, got.err)
	assert.Equal(t, client.LocalAddr().String(), got.conn.RemoteAddr().String())
	got.conn.Close()
	assert.NoError(t, l.Close())
}

func TestStopByContext(t *testing.T) {
	sl := wrap(t, listen(t))
	waiting := acceptMany(sl, 1)
	ctx, cancel := context.WithCancel(context.Background())
	context.AfterFunc(ctx, sl.Stop)
	cancel()
	requireStopped(t, waiting, 1)
}

// StoppedError

func TestStoppedErrorIsAClosedListenerButNotTheReverse(t *testing.T) {
	assert.ErrorIs(t, stoppablelistener.StoppedError, net.ErrClosed)
	assert.NotErrorIs(t, net.ErrClosed, stoppablelistener.StoppedError)
	assert.NotErrorIs(t, &net.OpError{Op: "accept", Err: net.ErrClosed}, stoppablelistener.StoppedError)
	assert.ErrorIs(t, fmt.Errorf("serve: %w", stoppablelistener.StoppedError), stoppablelistener.StoppedError)
}

func TestStoppedErrorIsNeitherTemporaryNorATimeout(t *testing.T) {
	assert.NotErrorIs(t, stoppablelistener.StoppedError, os.ErrDeadlineExceeded)
	assert.False(t, os.IsTimeout(stoppablelistener.StoppedError))
	var temporary interface{ Temporary() bool }
	if errors.As(stoppablelistener.StoppedError, &temporary) {
		assert.False(t, temporary.Temporary())
	}
	var timeout interface{ Timeout() bool }
	if errors.As(stoppablelistener.StoppedError, &timeout) {
		assert.False(t, timeout.Timeout())
	}
}

// One socket, many servers

func TestHTTPClientsLoseNoRequestWhileTheSocketIsServedAgain(t *testing.T) {
	const clients, cycles = 4, 300
	l := listen(t)
	done := make(chan struct{})
	answers := make(chan int, clients)
	for range clients {
		go func() {
			client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: patience}
			n := 0
			defer func() { answers <- n }()
			for ; ; n++ {
				select {
				case <-done:
					return
				default:
				}
				resp, err := client.Get("http://" + l.Addr().String())
				if !assert.NoError(t, err) {
					return
				}
				_, err = io.Copy(io.Discard, resp.Body)
				assert.NoError(t, err)
				resp.Body.Close()
			}
		}()
	}

	// Not drained with Shutdown: from Go 1.25 on it drops a connection that was accepted
	// and whose request was not read yet.
	var handled atomic.Int64
	serve := func(afterOne func(*stoppablelistener.StoppableListener)) {
		sl := wrap(t, l)
		var once sync.Once
		err := http.Serve(keepOpen{sl}, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			handled.Add(1)
			fmt.Fprint(w, "Hello HTTP!")
			once.Do(func() { afterOne(sl) })
		}))
		assert.True(t, err == stoppablelistener.StoppedError, err)
	}
	for range cycles {
		serve((*stoppablelistener.StoppableListener).Stop)
	}
	answered := 0
	serve(func(sl *stoppablelistener.StoppableListener) {
		close(done)
		go func() {
			for range clients {
				answered += <-answers
			}
			sl.Stop()
		}()
	})
	assert.EqualValues(t, handled.Load(), answered)
	assert.GreaterOrEqual(t, answered, cycles)
}

// Helpers

// listen returns a listener on a free port, closed when the test ends.
func listen(t testing.TB) *net.TCPListener {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { l.Close() })
	return l.(*net.TCPListener)
}

func wrap(t testing.TB, l net.Listener) *stoppablelistener.StoppableListener {
	sl, err := stoppablelistener.New(l)
	require.NoError(t, err)
	return sl
}

// dial connects a client that stays until the test ends.
func dial(t testing.TB, l net.Listener) net.Conn {
	conn := dialOnce(t, l)
	t.Cleanup(func() { conn.Close() })
	return conn
}

// dialOnce connects a client that the caller closes. Close resets the connection, for
// thousands of connections that end in order would use the machine's ports up.
func dialOnce(t testing.TB, l net.Listener) *net.TCPConn {
	conn, err := net.Dial("tcp", l.Addr().String())
	require.NoError(t, err)
	tcp := conn.(*net.TCPConn)
	require.NoError(t, tcp.SetLinger(0))
	return tcp
}

func get(t testing.TB, l net.Listener) string {
	resp, err := http.Get("http://" + l.Addr().String())
	require.NoError(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return string(body)
}

// accepted is what an Accept has returned.
type accepted struct {
	conn net.Conn
	err  error
}

// accept calls l.Accept in a goroutine.
func accept(l net.Listener) <-chan accepted { return acceptMany(l, 1) }

// acceptMany calls l.Accept in n goroutines.
func acceptMany(l net.Listener, n int) <-chan accepted {
	results := make(chan accepted, n)
	for range n {
		go func() {
			conn, err := l.Accept()
			results <- accepted{conn, err}
		}()
	}
	return results
}

// receive returns the next value from ch, and fails the test if it is long in coming.
func receive[T any](t testing.TB, ch <-chan T) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(patience):
		require.FailNow(t, "still waiting", "after %v", patience)
		panic("unreachable")
	}
}

func requireStopped(t testing.TB, results <-chan accepted, n int) {
	t.Helper()
	for range n {
		err := receive(t, results).err
		require.True(t, err == stoppablelistener.StoppedError, err)
	}
}

func requireTimeout(t testing.TB, err error) {
	t.Helper()
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	var netErr net.Error
	require.ErrorAs(t, err, &netErr)
	require.True(t, netErr.Timeout())
}

// letPass returns when a deadline that lies d ahead has ended an Accept elsewhere.
func letPass(t testing.TB, d time.Duration) {
	l := listen(t)
	require.NoError(t, l.SetDeadline(time.Now().Add(d)))
	_, err := l.Accept()
	requireTimeout(t, err)
}

// awaitAcceptors returns when n goroutines are blocked in an Accept of package net.
func awaitAcceptors(t testing.TB, n int) {
	t.Helper()
	buf := make([]byte, 1<<20)
	deadline := time.Now().Add(patience)
	for {
		blocked := 0
		for _, g := range bytes.Split(buf[:runtime.Stack(buf, true)], []byte("\n\n")) {
			state, stack, _ := bytes.Cut(g, []byte("\n"))
			if bytes.Contains(stack, []byte("internal/poll.(*FD).Accept")) &&
				(bytes.Contains(state, []byte("[IO wait")) || bytes.Contains(state, []byte("[semacquire"))) {
				blocked++
			}
		}
		if blocked >= n {
			return
		}
		require.True(t, time.Now().Before(deadline), "%d of %d are waiting", blocked, n)
		runtime.Gosched()
	}
}

// rounds is n, or a tenth of it in a short run.
func rounds(n int) int {
	if testing.Short() {
		return n / 10
	}
	return n
}
