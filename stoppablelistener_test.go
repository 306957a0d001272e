// The tests of this file are the promises of the doc comments, in their order. Load, faults
// and random histories are in folders of internal, and so are the benchmarks.
package stoppablelistener_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener"
	"github.com/c2db162c/stoppablelistener/internal/tcptest"
)

var none = time.Time{} // no deadline

// StoppedError

func TestStoppedErrorIsAClosedListenerButNotTheReverse(t *testing.T) {
	assert.ErrorIs(t, stoppablelistener.StoppedError, net.ErrClosed)
	assert.True(t, strings.HasSuffix(stoppablelistener.StoppedError.Error(), net.ErrClosed.Error()))
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

// StoppableListener

// Random histories do this at length; here it is for the race detector.
func TestMethodsMayBeCalledFromAnyNumberOfGoroutines(t *testing.T) {
	sl := tcptest.Wrap(t, tcptest.Listen(t))
	waiting := tcptest.AcceptMany(sl, 10)
	var calling sync.WaitGroup
	for range 10 {
		for _, call := range []func(){
			func() { _, _ = sl.AcceptTCP() },
			func() { _ = sl.SetDeadline(time.Now().Add(time.Hour)) },
			sl.Stop,
		} {
			calling.Add(1)
			go func() {
				defer calling.Done()
				call()
			}()
		}
	}
	tcptest.RequireStopped(t, waiting, 10)
	calling.Wait()
}

// New

func TestNewTakesWhateverPackageNetListensWith(t *testing.T) {
	loopback := net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}
	for name, listen := range map[string]func(*testing.T) (net.Listener, error){
		"Listen":    func(*testing.T) (net.Listener, error) { return net.Listen("tcp", loopback.String()) },
		"ListenTCP": func(*testing.T) (net.Listener, error) { return net.ListenTCP("tcp", &loopback) },
		"ListenConfig": func(*testing.T) (net.Listener, error) {
			return new(net.ListenConfig).Listen(context.Background(), "tcp", loopback.String())
		},
		"FileListener": func(t *testing.T) (net.Listener, error) {
			file, err := tcptest.Listen(t).File()
			if err != nil {
				t.Skip("a socket is no file here: ", err)
			}
			defer file.Close()
			return net.FileListener(file)
		},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := listen(t)
			require.NoError(t, err)
			defer l.Close()
			sl := tcptest.Wrap(t, l)
			tcptest.RequireClient(t, tcptest.Dial(t, l), tcptest.Accept(sl))
			waiting := tcptest.Accept(sl)
			sl.Stop()
			tcptest.RequireStopped(t, waiting, 1)
		})
	}
}

func TestNewRejects(t *testing.T) {
	closed := tcptest.Listen(t)
	require.NoError(t, closed.Close())

	for _, tt := range []struct {
		name    string
		l       net.Listener
		message string // a part of it
	}{
		{"nil", nil, "nil"},
		{"nil TCPListener", (*net.TCPListener)(nil), "nil"},
		{"UnixListener", &net.UnixListener{}, "*net.UnixListener"},
		{"TLS", tls.NewListener(tcptest.Listen(t), &tls.Config{}), "*tls.listener"},
		{"StoppableListener", tcptest.Wrap(t, tcptest.Listen(t)), "*stoppablelistener.StoppableListener"},
		{"foreign wrapper", keepOpen{tcptest.Wrap(t, tcptest.Listen(t))}, "stoppablelistener_test.keepOpen"},
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
	l := tcptest.Listen(t)
	require.NoError(t, l.SetDeadline(tcptest.Past))
	accepted := tcptest.Accept(tcptest.Wrap(t, l))
	tcptest.RequireClient(t, tcptest.Dial(t, l), accepted)
}

// Starting a child process puts the socket into blocking mode, even where it fails.
func TestNewTakesOverTheBlockingMode(t *testing.T) {
	const child = "child"
	if tcptest.ChildRole() == child {
		return
	}
	tcptest.RequireInheritance(t)
	for name, start := range map[string]func(*testing.T, *os.File){
		"cannot be started": func(t *testing.T, file *os.File) {
			cmd := exec.Cmd{Path: t.TempDir(), ExtraFiles: []*os.File{file}} // a folder
			require.Error(t, cmd.Start())
		},
		"ends at once": func(t *testing.T, file *os.File) {
			cmd, output := tcptest.ChildProcess(t, child)
			cmd.ExtraFiles = []*os.File{file}
			require.NoError(t, cmd.Run(), output)
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := tcptest.Listen(t)
			t.Cleanup(func() { tcptest.Dial(t, l) }) // Close would wait for a deaf Accept
			tcptest.Wrap(t, l).Stop()
			file, err := l.File()
			require.NoError(t, err)
			start(t, file)
			require.NoError(t, file.Close())

			sl := tcptest.Wrap(t, l)
			waiting := tcptest.AcceptMany(sl, 2)
			tcptest.RequireClient(t, tcptest.Dial(t, l), waiting)
			sl.Stop()
			tcptest.RequireStopped(t, waiting, 1)
		})
	}
}

func TestNewServesAStoppedSocketAgainAndAgain(t *testing.T) {
	l := tcptest.Listen(t)
	for range 3 {
		client := tcptest.Dial(t, l) // the kernel queues it while nobody serves
		sl := tcptest.Wrap(t, l)
		tcptest.RequireClient(t, client, tcptest.Accept(sl))
		waiting := tcptest.Accept(sl)
		sl.Stop()
		tcptest.RequireStopped(t, waiting, 1)
	}
}

func TestNewStartsNoGoroutine(t *testing.T) {
	l := tcptest.Listen(t)
	before := runtime.NumGoroutine()
	for range 100 {
		tcptest.Wrap(t, l)
	}
	assert.LessOrEqual(t, runtime.NumGoroutine(), before)
}

// Accept and AcceptTCP

func TestAcceptErrorComesWithANilInterface(t *testing.T) {
	sl := tcptest.Wrap(t, tcptest.Listen(t))
	sl.Stop()
	conn, err := sl.Accept()
	assert.Error(t, err)
	assert.True(t, conn == nil, "a nil pointer in a non-nil interface")
}

func TestAcceptReturnsThePlainTCPConn(t *testing.T) {
	l := tcptest.Listen(t)
	sl := tcptest.Wrap(t, l)
	client := tcptest.Dial(t, l)
	conn, err := sl.Accept()
	require.NoError(t, err)
	defer conn.Close()
	assert.IsType(t, (*net.TCPConn)(nil), conn)
	assert.Equal(t, client.LocalAddr().String(), conn.RemoteAddr().String())

	client = tcptest.Dial(t, l)
	tcp, err := sl.AcceptTCP()
	require.NoError(t, err)
	defer tcp.Close()
	assert.Equal(t, client.LocalAddr().String(), tcp.RemoteAddr().String())
}

func TestAcceptWaitsOnWhenAPollEnds(t *testing.T) {
	l := tcptest.Listen(t)
	sl := tcptest.Wrap(t, l)
	accepted := tcptest.Accept(sl)
	for range 3 {
		tcptest.AwaitAcceptors(t, 1)
		require.NoError(t, l.SetDeadline(tcptest.Past)) // the poll ends
	}
	tcptest.RequireClient(t, tcptest.Dial(t, l), accepted)

	// A poll that ended while nobody was in Accept, and with a client queued.
	require.NoError(t, l.SetDeadline(tcptest.Past))
	tcptest.RequireClient(t, tcptest.Dial(t, l), tcptest.Accept(sl))
}

func TestAcceptDoesNotMoveTheDeadlineForAConnection(t *testing.T) {
	l := tcptest.Listen(t)
	sl := tcptest.Wrap(t, l)
	tcptest.Dial(t, l)
	require.NoError(t, l.SetDeadline(time.Now().Add(tcptest.Patience/10))) // the end of this poll
	conn, err := sl.Accept()
	require.NoError(t, err)
	conn.Close()
	got := tcptest.Receive(t, tcptest.Accept(l)) // the bare listener shows when its deadline is
	assert.ErrorIs(t, got.Err, os.ErrDeadlineExceeded)
}

func TestAcceptAfterStopNeverReturnsAConnection(t *testing.T) {
	l := tcptest.Listen(t)
	sl := tcptest.Wrap(t, l)
	clients := make([]net.Conn, 50)
	for i := range clients {
		clients[i] = tcptest.Dial(t, l)
	}
	sl.Stop()
	for range clients {
		_, err := sl.Accept()
		tcptest.RequireStoppedError(t, err)
		_, err = sl.AcceptTCP()
		tcptest.RequireStoppedError(t, err)
	}
	next := tcptest.Wrap(t, l)
	for _, client := range clients {
		tcptest.RequireClient(t, client, tcptest.Accept(next))
	}
}

// The next wrapper's deadline is not a past one, and says nothing to the stopped wrapper.
func TestAcceptAfterStopLeavesTheClientsToTheNextWrapper(t *testing.T) {
	l := tcptest.Listen(t)
	stopped := tcptest.Wrap(t, l)
	stopped.Stop()
	next := tcptest.Wrap(t, l)
	client := tcptest.Dial(t, l)
	tcptest.RequireStopped(t, tcptest.Accept(stopped), 1)
	tcptest.RequireClient(t, client, tcptest.Accept(next))
}

func TestAcceptAllocatesNoMoreThanPackageNet(t *testing.T) {
	bare, l := tcptest.Listen(t), tcptest.Listen(t)
	sl := tcptest.Wrap(t, l)
	allocs := func(l net.Listener) float64 {
		return testing.AllocsPerRun(100, func() {
			client := tcptest.DialOnce(t, l)
			conn, err := l.Accept()
			require.NoError(t, err)
			conn.Close()
			client.Close()
		})
	}
	// Whatever else allocates in the process meanwhile can add to either count.
	assert.Eventually(t, func() bool { return allocs(sl) <= allocs(bare) }, tcptest.Patience, time.Millisecond)
}

func TestCloseWithoutStopIsPackageNetsError(t *testing.T) {
	for name, acceptor := range map[string]func(*stoppablelistener.StoppableListener) error{
		"Accept":    func(sl *stoppablelistener.StoppableListener) error { _, err := sl.Accept(); return err },
		"AcceptTCP": func(sl *stoppablelistener.StoppableListener) error { _, err := sl.AcceptTCP(); return err },
	} {
		t.Run(name, func(t *testing.T) {
			sl := tcptest.Wrap(t, tcptest.Listen(t))
			waiting := make(chan error, 1)
			go func() { waiting <- acceptor(sl) }()
			tcptest.AwaitAcceptors(t, 1)
			require.NoError(t, sl.Close())
			for _, err := range []error{tcptest.Receive(t, waiting), acceptor(sl)} {
				requireNetClosed(t, err)
			}
		})
	}
}

// The listener is closed between the end of a poll and the begin of the next: here, since
// no test can meet that moment, by another listener in its place.
func TestCloseAtTheEndOfAPollIsPackageNetsError(t *testing.T) {
	l, closed := tcptest.Listen(t), tcptest.Listen(t)
	require.NoError(t, closed.Close())
	sl := tcptest.Wrap(t, l)
	accepted := tcptest.Accept(sl)
	tcptest.AwaitAcceptors(t, 1)
	require.NoError(t, l.SetDeadline(none)) // for the race detector: the Accept has read the field
	sl.TCPListener = closed
	require.NoError(t, l.SetDeadline(tcptest.Past))
	requireNetClosed(t, tcptest.Receive(t, accepted).Err)
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
			l := tcptest.Listen(t)
			sl := tcptest.Wrap(t, l)
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
			accepted := tcptest.Accept(sl)
			for _, d := range tt.while {
				tcptest.AwaitAcceptors(t, 1)
				set(d)
			}
			require.NoError(t, l.SetDeadline(tcptest.Past)) // a poll ends

			if tt.timeout {
				for range 2 {
					requireTimeout(t, tcptest.Receive(t, accepted).Err)
					assert.False(t, time.Now().Before(deadline), "too early")
					accepted = tcptest.Accept(sl)
				}
				requireTimeout(t, tcptest.Receive(t, accepted).Err)
				set(clear)
				accepted = tcptest.Accept(sl)
			} else {
				letPass(t, near)
			}
			tcptest.RequireClient(t, tcptest.Dial(t, l), accepted)
		})
	}
}

func TestSetDeadlineEndsEveryAccept(t *testing.T) {
	sl := tcptest.Wrap(t, tcptest.Listen(t))
	waiting := tcptest.AcceptMany(sl, 100)
	tcptest.AwaitAcceptors(t, 100)
	require.NoError(t, sl.SetDeadline(time.Now()))
	for range 100 {
		requireTimeout(t, tcptest.Receive(t, waiting).Err)
	}
}

func TestSetDeadlineAfterStopTouchesNothing(t *testing.T) {
	l := tcptest.Listen(t)
	sl := tcptest.Wrap(t, l)
	sl.Stop()
	require.NoError(t, l.SetDeadline(none))
	waiting := tcptest.Accept(l) // the next owner's
	tcptest.AwaitAcceptors(t, 1)
	for _, deadline := range []time.Time{tcptest.Past, time.Now().Add(time.Hour), none} {
		tcptest.RequireStoppedError(t, sl.SetDeadline(deadline))
		tcptest.RequireStopped(t, tcptest.Accept(sl), 1)
	}
	tcptest.RequireClient(t, tcptest.Dial(t, l), waiting)
}

// The goroutines that Stop has woken may not have run before SetDeadline is called.
func TestSetDeadlineAfterStopHoldsNobodyBack(t *testing.T) {
	for range 300 {
		sl := tcptest.Wrap(t, tcptest.Listen(t))
		waiting := tcptest.AcceptMany(sl, 3)
		tcptest.AwaitAcceptors(t, 3)
		sl.Stop()
		tcptest.RequireStoppedError(t, sl.SetDeadline(none))
		tcptest.RequireStopped(t, waiting, 3)
	}
}

func TestSetDeadlineOnAClosedListenerIsPackageNetsError(t *testing.T) {
	sl := tcptest.Wrap(t, tcptest.Listen(t))
	require.NoError(t, sl.Close())
	want := sl.TCPListener.SetDeadline(none)
	require.ErrorIs(t, want, net.ErrClosed)
	assert.Equal(t, want, sl.SetDeadline(none))
	sl.Stop()
	tcptest.RequireStoppedError(t, sl.SetDeadline(none))
}

// Stop

func TestStopEndsEveryAcceptAtOnce(t *testing.T) {
	for _, n := range []int{1, 100} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			sl := tcptest.Wrap(t, tcptest.Listen(t))
			waiting := tcptest.AcceptMany(sl, n)
			tcptest.AwaitAcceptors(t, n)
			sl.Stop()
			tcptest.RequireStopped(t, waiting, n)
		})
	}
}

// It takes some microseconds. The median tells a slow Stop from a busy machine.
func TestStopIsFast(t *testing.T) {
	took := make([]time.Duration, 21)
	for i := range took {
		sl := tcptest.Wrap(t, tcptest.Listen(t))
		waiting := tcptest.Accept(sl)
		tcptest.AwaitAcceptors(t, 1)
		begin := time.Now()
		sl.Stop()
		tcptest.RequireStopped(t, waiting, 1)
		took[i] = time.Since(begin)
	}
	slices.Sort(took)
	assert.Less(t, took[len(took)/2], 100*time.Millisecond, "%v", took)
}

// One acceptor is about to begin its next poll when Stop is called; the others must not
// have to wait for that poll to end. Polls end without pause until then, so that there
// is such an acceptor in some of the rounds.
func TestStopIsNotUndoneByAPoll(t *testing.T) {
	stopAfter(t, func(l *net.TCPListener, _ *stoppablelistener.StoppableListener) {
		for begin := time.Now(); time.Since(begin) < 100*time.Microsecond; {
			assert.NoError(t, l.SetDeadline(tcptest.Past))
		}
	})
}

func TestStopIsNotUndoneBySetDeadline(t *testing.T) {
	stopAfter(t, func(_ *net.TCPListener, sl *stoppablelistener.StoppableListener) {
		go sl.SetDeadline(time.Now().Add(time.Hour))
	})
}

// stopAfter has acceptors wait, calls disturb and stops them, in many rounds.
func stopAfter(t *testing.T, disturb func(*net.TCPListener, *stoppablelistener.StoppableListener)) {
	const acceptors = 4
	for range tcptest.Rounds(2000) {
		l := tcptest.Listen(t)
		sl := tcptest.Wrap(t, l)
		waiting := tcptest.AcceptMany(sl, acceptors)
		tcptest.AwaitAcceptors(t, acceptors)
		disturb(l, sl)
		sl.Stop()
		tcptest.RequireStopped(t, waiting, acceptors)
		l.Close()
	}
}

func TestStopAnyNumberOfTimesFromAnyGoroutines(t *testing.T) {
	sl := tcptest.Wrap(t, tcptest.Listen(t))
	waiting := tcptest.Accept(sl)
	var stops sync.WaitGroup
	for range 100 {
		stops.Add(1)
		go func() {
			defer stops.Done()
			sl.Stop()
		}()
	}
	stops.Wait()
	tcptest.RequireStopped(t, waiting, 1)
	sl.Stop()
}

func TestStopBeforeTheFirstAccept(t *testing.T) {
	sl := tcptest.Wrap(t, tcptest.Listen(t))
	sl.Stop()
	tcptest.RequireStopped(t, tcptest.Accept(sl), 1)
}

func TestStopBeforeAndAfterClose(t *testing.T) {
	t.Run("before", func(t *testing.T) {
		for range 300 { // the acceptor that Stop woke may run before Close or after
			sl := tcptest.Wrap(t, tcptest.Listen(t))
			waiting := tcptest.AcceptMany(sl, 2)
			tcptest.AwaitAcceptors(t, 2)
			sl.Stop()
			require.NoError(t, sl.Close())
			tcptest.RequireStopped(t, waiting, 2)
			tcptest.RequireStopped(t, tcptest.Accept(sl), 1)
		}
	})
	t.Run("after", func(t *testing.T) {
		sl := tcptest.Wrap(t, tcptest.Listen(t))
		require.NoError(t, sl.Close())
		sl.Stop()
		sl.Stop()
		tcptest.RequireStopped(t, tcptest.Accept(sl), 1)
	})
}

func TestStopFromTheAcceptLoopItself(t *testing.T) {
	l := tcptest.Listen(t)
	sl := tcptest.Wrap(t, l)
	tcptest.Dial(t, l)
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
	tcptest.RequireStoppedError(t, tcptest.Receive(t, loop))
}

func TestStopFromAHandler(t *testing.T) {
	l := tcptest.Listen(t)
	sl := tcptest.Wrap(t, l)
	server := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		sl.Stop()
		fmt.Fprint(w, "stopped")
	})}
	served := make(chan error, 1)
	go func() { served <- server.Serve(sl) }()
	assert.Equal(t, "stopped", tcptest.Get(t, http.DefaultClient, l))
	tcptest.RequireStoppedError(t, tcptest.Receive(t, served))
	require.NoError(t, server.Shutdown(context.Background()))
}

func TestStopLeavesAcceptedConnectionsAlone(t *testing.T) {
	l := tcptest.Listen(t)
	sl := tcptest.Wrap(t, l)
	client := tcptest.Dial(t, l)
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
	l := tcptest.Listen(t)
	sl := tcptest.Wrap(t, l)
	sl.Stop()
	client := tcptest.Dial(t, l) // the kernel still queues clients

	require.NoError(t, l.SetDeadline(none))
	sl.Stop() // neither moves the deadline again, nor closes the socket
	tcptest.RequireClient(t, client, tcptest.Accept(l))
	assert.NoError(t, l.Close())
}

// Shutdown and Close of the server close its listener, and wait for Serve to return.
func TestHTTPServerEndsWhileItServesAWrapperWhoseCloseStops(t *testing.T) {
	for name, end := range map[string]func(*http.Server) error{
		"Shutdown": func(s *http.Server) error { return s.Shutdown(context.Background()) },
		"Close":    (*http.Server).Close,
	} {
		t.Run(name, func(t *testing.T) {
			l := tcptest.Listen(t)
			server := http.Server{Handler: http.NotFoundHandler()}
			served, ended := make(chan error, 1), make(chan error, 1)
			go func() { served <- server.Serve(keepOpen{tcptest.Wrap(t, l)}) }()
			tcptest.Get(t, http.DefaultClient, l)
			go func() { ended <- end(&server) }()
			assert.NoError(t, tcptest.Receive(t, ended))
			assert.Equal(t, http.ErrServerClosed, tcptest.Receive(t, served))
			tcptest.RequireClient(t, tcptest.Dial(t, l), tcptest.Accept(tcptest.Wrap(t, l)))
		})
	}
}

// Helpers

// requireNetClosed wants what package net's Accept says of a closed listener.
func requireNetClosed(t testing.TB, err error) {
	t.Helper()
	var opErr *net.OpError
	require.ErrorAs(t, err, &opErr)
	require.Equal(t, "accept", opErr.Op)
	require.ErrorIs(t, err, net.ErrClosed)
	require.NotErrorIs(t, err, stoppablelistener.StoppedError)
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
	l := tcptest.Listen(t)
	require.NoError(t, l.SetDeadline(time.Now().Add(d)))
	_, err := l.Accept()
	requireTimeout(t, err)
}
