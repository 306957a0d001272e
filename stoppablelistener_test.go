// The tests of this file check the promises of the doc comments, in their order. Load, faults,
// random histories and benchmarks are in internal/listenertest.
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
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener"
	"github.com/c2db162c/stoppablelistener/internal/testutil/proctest"
	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

var none = time.Time{} // no deadline

const near = 50 * time.Millisecond // from now, the deadlines that tests wait for; see inTime

// The processes that the tests start exit at once.
func TestMain(m *testing.M) { proctest.Main(m, func(string) {}) }

// StoppedError

func TestStoppedErrorIsErrClosedButNotTheReverse(t *testing.T) {
	stopped := stoppablelistener.StoppedError
	assert.ErrorIs(t, stopped, net.ErrClosed)
	assert.Regexp(t, net.ErrClosed.Error()+"$", stopped.Error())
	assert.NotErrorIs(t, net.ErrClosed, stopped)
	assert.NotErrorIs(t, &net.OpError{Op: "accept", Err: net.ErrClosed}, stopped)
	assert.ErrorIs(t, fmt.Errorf("serve: %w", stopped), stopped)
}

func TestStoppedErrorIsNeitherTemporaryNorATimeout(t *testing.T) {
	assert.NotErrorIs(t, stoppablelistener.StoppedError, os.ErrDeadlineExceeded)
	assert.False(t, os.IsTimeout(stoppablelistener.StoppedError), "StoppedError is a timeout")
	var temporary interface{ Temporary() bool }
	if errors.As(stoppablelistener.StoppedError, &temporary) {
		assert.False(t, temporary.Temporary(), "StoppedError is temporary")
	}
	var timeout interface{ Timeout() bool }
	if errors.As(stoppablelistener.StoppedError, &timeout) {
		assert.False(t, timeout.Timeout(), "StoppedError is a timeout")
	}
}

// StoppableListener

// This is for the race detector; random histories do it at length.
func TestMethodsInvokedSimultaneously(t *testing.T) {
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

func TestNewWrapsEachTCPListenerOfPackageNet(t *testing.T) {
	loopback := net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}
	for name, listen := range map[string]func(*testing.T) (net.Listener, error){
		"Listen": func(*testing.T) (net.Listener, error) {
			return net.Listen("tcp", loopback.String())
		},
		"ListenTCP": func(*testing.T) (net.Listener, error) {
			return net.ListenTCP("tcp", &loopback)
		},
		"ListenConfig": func(*testing.T) (net.Listener, error) {
			return new(net.ListenConfig).Listen(context.Background(), "tcp", loopback.String())
		},
		"FileListener": func(t *testing.T) (net.Listener, error) {
			file, err := tcptest.Listen(t).File()
			if err != nil {
				t.Skip("sockets are not files here: ", err)
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
	wrapper := tcptest.Wrap(t, tcptest.Listen(t))

	for _, tt := range []struct {
		name    string
		l       net.Listener
		message string // a part of it
	}{
		{"nil", nil, "nil"},
		{"nil TCPListener", (*net.TCPListener)(nil), "nil"},
		{"UnixListener", &net.UnixListener{}, "*net.UnixListener"},
		{"TLS", tls.NewListener(tcptest.Listen(t), &tls.Config{}), "*tls.listener"},
		{"StoppableListener", wrapper, "*stoppablelistener.StoppableListener"},
		{"foreign wrapper", keepOpen{wrapper}, "stoppablelistener_test.keepOpen"},
		{"zero TCPListener", &net.TCPListener{}, "invalid argument"},
		{"closed", closed, net.ErrClosed.Error()},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sl, err := stoppablelistener.New(tt.l)
			require.Error(t, err)
			assert.Nil(t, sl)
			assert.Regexp(t, "^stoppablelistener: ", err.Error())
			assert.Contains(t, err.Error(), tt.message)
			isClosed := errors.Is(err, net.ErrClosed)
			assert.Equal(t, tt.name == "closed", isClosed, "the error is net.ErrClosed")
		})
	}
}

// Starting a child process with the plain listener's File sets blocking mode, even if it fails.
func TestNewSetsNonblockingMode(t *testing.T) {
	proctest.RequireInheritance(t)
	for name, start := range map[string]func(*testing.T, *os.File){
		"cannot be started": func(t *testing.T, file *os.File) {
			cmd := exec.Cmd{Path: t.TempDir(), ExtraFiles: []*os.File{file}} // a directory
			require.Error(t, cmd.Start())
		},
		"exits at once": runChild,
	} {
		t.Run(name, func(t *testing.T) {
			l := tcptest.Listen(t)
			// Close would wait for an Accept in blocking mode.
			t.Cleanup(func() { tcptest.Dial(t, l) })
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

func TestNewWrapsAStoppedSocketAnyNumberOfTimes(t *testing.T) {
	l := tcptest.Listen(t)
	for range 3 {
		client := tcptest.Dial(t, l) // pending
		sl := tcptest.Wrap(t, l)
		tcptest.RequireClient(t, client, tcptest.Accept(sl))
		waiting := tcptest.Accept(sl)
		sl.Stop()
		tcptest.RequireStopped(t, waiting, 1)
	}
}

func TestNewAndDrainStartNoGoroutine(t *testing.T) {
	before := runtime.NumGoroutine()
	for range 100 {
		tcptest.Wrap(t, tcptest.Listen(t)).Drain()
	}
	assert.LessOrEqual(t, runtime.NumGoroutine(), before, "goroutines after New and Drain")
}

// Accept and AcceptTCP

func TestAcceptErrorComesWithANilInterface(t *testing.T) {
	sl := tcptest.Wrap(t, tcptest.Listen(t))
	sl.Stop()
	conn, err := sl.Accept()
	assert.Error(t, err)
	assert.True(t, conn == nil, "the connection is a nil pointer in a non-nil interface: %T", conn)
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

func TestAcceptKeepsWaitingWhenAPollEnds(t *testing.T) {
	l := tcptest.Listen(t)
	sl := tcptest.Wrap(t, l)
	accepted := tcptest.Accept(sl)
	for range 3 {
		tcptest.AwaitAcceptors(t, 1)
		require.NoError(t, l.SetDeadline(tcptest.Past)) // the poll ends
	}
	tcptest.RequireClient(t, tcptest.Dial(t, l), accepted)

	// The poll ends while no goroutine is in Accept and a client is pending.
	require.NoError(t, l.SetDeadline(tcptest.Past))
	tcptest.RequireClient(t, tcptest.Dial(t, l), tcptest.Accept(sl))
}

func TestAcceptDoesNotMoveTheDeadlineForAConnection(t *testing.T) {
	l := tcptest.Listen(t)
	sl := tcptest.Wrap(t, l)
	inTime(func(end time.Time) {
		tcptest.Dial(t, l)
		require.NoError(t, l.SetDeadline(end)) // the poll ends
		conn, err := sl.Accept()
		require.NoError(t, err)
		conn.Close()
	})
	// The plain listener's Accept returns at its deadline.
	got := tcptest.Receive(t, tcptest.Accept(l), "end of the poll, which Accept has postponed")
	assert.ErrorIs(t, got.Err, os.ErrDeadlineExceeded)
}

// The next wrapper has moved the deadline, so only the stop channel can interrupt Accept.
func TestAcceptAfterStopLeavesPendingConnectionsToTheNextWrapper(t *testing.T) {
	l := tcptest.Listen(t)
	stopped := tcptest.Wrap(t, l)
	stopped.Stop()
	next := tcptest.Wrap(t, l)
	client := tcptest.Dial(t, l)
	_, err := stopped.Accept()
	tcptest.RequireStoppedError(t, err)
	_, err = stopped.AcceptTCP()
	tcptest.RequireStoppedError(t, err)
	tcptest.RequireClient(t, client, tcptest.Accept(next))
}

func TestAcceptAllocatesNoMoreThanPackageNet(t *testing.T) {
	plain, l := tcptest.Listen(t), tcptest.Listen(t)
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
	// Other goroutines of the process can add to either count.
	tcptest.Await(t, "as few allocations per Accept as those of package net", func() bool {
		return allocs(sl) <= allocs(plain)
	})
}

func TestAcceptAfterCloseReturnsTheErrorOfPackageNet(t *testing.T) {
	var sl *stoppablelistener.StoppableListener
	for name, accept := range map[string]func() error{
		"Accept":    func() error { _, err := sl.Accept(); return err },
		"AcceptTCP": func() error { _, err := sl.AcceptTCP(); return err },
	} {
		t.Run(name, func(t *testing.T) {
			sl = tcptest.Wrap(t, tcptest.Listen(t))
			waiting := make(chan error, 1)
			go func() { waiting <- accept() }()
			tcptest.AwaitAcceptors(t, 1)
			require.NoError(t, sl.Close())
			requireNetClosed(t, tcptest.Receive(t, waiting, "return of Accept after Close"))
			requireNetClosed(t, accept())
		})
	}
}

// The listener is closed between two polls. No test can close it at that very moment, so here
// another listener takes its place, which is closed.
func TestAcceptOfAListenerClosedBetweenPollsReturnsTheErrorOfPackageNet(t *testing.T) {
	l, closed := tcptest.Listen(t), tcptest.Listen(t)
	require.NoError(t, closed.Close())
	sl := tcptest.Wrap(t, l)
	accepted := tcptest.Accept(sl)
	tcptest.AwaitAcceptors(t, 1)
	require.NoError(t, l.SetDeadline(none)) // for the race detector: the Accept has read the field
	sl.TCPListener = closed
	require.NoError(t, l.SetDeadline(tcptest.Past))
	requireNetClosed(t, tcptest.Receive(t, accepted, "return of Accept").Err)
}

// File

// Starting a child process, and Fd, set blocking mode for the files of package net.
func TestFileLeavesNonblockingMode(t *testing.T) {
	proctest.RequireInheritance(t)
	for name, use := range map[string]func(*testing.T, *os.File){
		"child process": runChild,
		"Fd":            func(_ *testing.T, file *os.File) { file.Fd() },
	} {
		t.Run(name, func(t *testing.T) {
			l := tcptest.Listen(t)
			t.Cleanup(func() {
				for range 4 {
					tcptest.Dial(t, l) // Close would wait for an Accept in blocking mode
				}
			})
			sl := tcptest.Wrap(t, l)
			waiting := tcptest.AcceptMany(sl, 3)
			tcptest.AwaitAcceptors(t, 3)
			file, err := sl.File()
			require.NoError(t, err)
			defer file.Close()
			use(t, file)
			tcptest.RequireClient(t, tcptest.Dial(t, l), waiting)
			later := tcptest.Accept(sl)
			tcptest.AwaitAcceptors(t, 3) // in blocking mode, later would block in a system call
			sl.Stop()
			tcptest.RequireStopped(t, waiting, 2)
			tcptest.RequireStopped(t, later, 1)
		})
	}
}

func TestFileIsADuplicate(t *testing.T) {
	l := tcptest.Listen(t)
	sl := tcptest.Wrap(t, l)
	file, err := sl.File()
	if err != nil {
		t.Skip("sockets are not files here: ", err)
	}
	second, err := net.FileListener(file)
	require.NoError(t, err)
	defer second.Close()
	require.NoError(t, file.Close())
	tcptest.RequireClient(t, tcptest.Dial(t, l), tcptest.Accept(sl))
	require.NoError(t, sl.Close())
	tcptest.RequireClient(t, tcptest.Dial(t, second), tcptest.Accept(tcptest.Wrap(t, second)))
	_, err = sl.File()
	assert.ErrorIs(t, err, net.ErrClosed)
}

// SetDeadline

func TestSetDeadlineDoesWhatThatOfPackageNetDoes(t *testing.T) {
	t.Parallel()
	const (
		past  = -time.Hour
		clear = 0
		far   = time.Hour // polls end before it
	)
	for _, tt := range []struct {
		name          string
		before, while []time.Duration // before Accept is called, and while it is blocked
		timeout       bool
	}{
		{"past", []time.Duration{past}, nil, true},
		{"near", []time.Duration{near}, nil, true},
		{"far", []time.Duration{far}, nil, false},
		{"cleared", []time.Duration{past, clear}, nil, false},
		{"past while blocked", nil, []time.Duration{past}, true},
		{"near while blocked", nil, []time.Duration{near}, true},
		{"far while blocked", nil, []time.Duration{far}, false},
		{"moved earlier", []time.Duration{far}, []time.Duration{near}, true},
		{"moved later", []time.Duration{near}, []time.Duration{far}, false},
		{"cleared while blocked", []time.Duration{near}, []time.Duration{clear}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			l := tcptest.Listen(t)
			sl := tcptest.Wrap(t, l)
			var deadline, end time.Time
			set := func(d time.Duration) {
				switch d {
				case clear:
					deadline = none
				case near:
					deadline = end
				default:
					deadline = time.Now().Add(d)
				}
				require.NoError(t, sl.SetDeadline(deadline))
			}

			var accepted <-chan tcptest.Accepted
			inTime(func(deadline time.Time) {
				end = deadline
				if accepted != nil { // by the last attempt
					sl.Stop()
					tcptest.Receive(t, accepted, "return of Accept")
					sl = tcptest.Wrap(t, l)
				}
				for _, d := range tt.before {
					set(d)
				}
				accepted = tcptest.Accept(sl)
				for _, d := range tt.while {
					tcptest.AwaitAcceptor(t, accepted)
					set(d)
				}
			})
			require.NoError(t, l.SetDeadline(tcptest.Past)) // a poll ends

			if tt.timeout {
				for range 2 {
					got := tcptest.Receive(t, accepted, "return of Accept at the deadline")
					requireTimeout(t, got.Err)
					assert.False(t, time.Now().Before(deadline), "the deadline has not expired")
					accepted = tcptest.Accept(sl)
				}
				got := tcptest.Receive(t, accepted, "return of Accept after the deadline")
				requireTimeout(t, got.Err)
				set(clear)
				accepted = tcptest.Accept(sl)
			} else {
				awaitDeadline(t, time.Until(end)+near)
			}
			tcptest.RequireClient(t, tcptest.Dial(t, l), accepted)
		})
	}
}

func TestSetDeadlineInterruptsEachBlockedAccept(t *testing.T) {
	sl := tcptest.Wrap(t, tcptest.Listen(t))
	waiting := tcptest.AcceptMany(sl, 100)
	tcptest.AwaitAcceptors(t, 100)
	require.NoError(t, sl.SetDeadline(time.Now()))
	for range 100 {
		requireTimeout(t, tcptest.Receive(t, waiting, "return of Accept at the deadline").Err)
	}
}

func TestSetDeadlineAfterStopChangesNothing(t *testing.T) {
	l := tcptest.Listen(t)
	sl := tcptest.Wrap(t, l)
	sl.Stop()
	require.NoError(t, l.SetDeadline(none))
	waiting := tcptest.Accept(l) // by the next user of the socket
	tcptest.AwaitAcceptors(t, 1)
	for _, deadline := range []time.Time{tcptest.Past, time.Now().Add(time.Hour), none} {
		tcptest.RequireStoppedError(t, sl.SetDeadline(deadline))
		tcptest.RequireStopped(t, tcptest.Accept(sl), 1)
	}
	tcptest.RequireClient(t, tcptest.Dial(t, l), waiting)
}

func TestSetDeadlineOnAClosedListenerReturnsTheErrorOfPackageNet(t *testing.T) {
	sl := tcptest.Wrap(t, tcptest.Listen(t))
	require.NoError(t, sl.Close())
	want := sl.TCPListener.SetDeadline(none)
	require.ErrorIs(t, want, net.ErrClosed)
	assert.Equal(t, want, sl.SetDeadline(none))
	sl.Stop()
	tcptest.RequireStoppedError(t, sl.SetDeadline(none))
}

// Stop

func TestStopInterruptsEachBlockedAccept(t *testing.T) {
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

// Stop takes some microseconds, and so does a deadline of package net. On a busy machine both
// take longer, and the median of the differences stays the same.
func TestStopIsFast(t *testing.T) {
	interrupt := func(l net.Listener, f func()) (took time.Duration, err error) {
		waiting := tcptest.Accept(l)
		tcptest.AwaitAcceptors(t, 1)
		start := time.Now()
		f()
		err = tcptest.Receive(t, waiting, "return of Accept").Err
		return time.Since(start), err
	}
	tcptest.RequireMedian(t, 100*time.Millisecond, "differences", func() time.Duration {
		plain, sl := tcptest.Listen(t), tcptest.Wrap(t, tcptest.Listen(t))
		ours, err := interrupt(sl, sl.Stop)
		tcptest.RequireStoppedError(t, err)
		theirs, err := interrupt(plain, func() { _ = plain.SetDeadline(tcptest.Past) })
		requireTimeout(t, err)
		return ours - theirs
	})
}

// One goroutine is about to start its next poll when Stop is called, and the others must not
// stay blocked until that poll ends. Polls end without pause until then, so that there is
// such a goroutine in some of the rounds.
func TestStopIsNotUndoneByAPoll(t *testing.T) {
	stopAfter(t, func(l *net.TCPListener, _ *stoppablelistener.StoppableListener) {
		for start := time.Now(); time.Since(start) < 100*time.Microsecond; {
			assert.NoError(t, l.SetDeadline(tcptest.Past))
		}
	})
}

func TestStopIsNotUndoneBySetDeadline(t *testing.T) {
	stopAfter(t, func(_ *net.TCPListener, sl *stoppablelistener.StoppableListener) {
		go sl.SetDeadline(time.Now().Add(time.Hour))
	})
}

// stopAfter blocks goroutines in Accept, calls disturb, and stops them, in many rounds.
func stopAfter(t *testing.T, disturb func(*net.TCPListener, *stoppablelistener.StoppableListener)) {
	const acceptors = 4
	for range tcptest.Rounds(100) {
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

func TestStopBeforeAndAfterClose(t *testing.T) {
	requireStopBeforeAndAfterClose(t, tcptest.Rounds(50),
		(*stoppablelistener.StoppableListener).Stop, tcptest.RequireStopped)
}

func TestStopAndDrainFromAHandler(t *testing.T) {
	for name, stop := range map[string]func(*stoppablelistener.StoppableListener){
		"Stop":  (*stoppablelistener.StoppableListener).Stop,
		"Drain": (*stoppablelistener.StoppableListener).Drain,
	} {
		t.Run(name, func(t *testing.T) {
			l := tcptest.Listen(t)
			sl := tcptest.Wrap(t, l)
			server := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				stop(sl)
				fmt.Fprint(w, "stopped")
			})}
			served := make(chan error, 1)
			go func() { served <- server.Serve(sl) }()
			assert.Equal(t, "stopped", tcptest.Get(t, http.DefaultClient, l))
			tcptest.RequireStoppedError(t, tcptest.Receive(t, served, "return of Serve"))
			require.NoError(t, server.Shutdown(context.Background()))
		})
	}
}

func TestStopDoesNotCloseConnections(t *testing.T) {
	l := tcptest.Listen(t)
	sl := tcptest.Wrap(t, l)
	client := tcptest.Dial(t, l)
	conn, err := sl.Accept()
	require.NoError(t, err)
	defer conn.Close()
	sl.Stop()
	_, err = conn.Write([]byte("still open"))
	require.NoError(t, err)
	got := make([]byte, len("still open"))
	_, err = io.ReadFull(client, got)
	require.NoError(t, err)
	assert.Equal(t, "still open", string(got))
}

func TestStopDoesNotCloseTheSocket(t *testing.T) {
	l := tcptest.Listen(t)
	sl := tcptest.Wrap(t, l)
	sl.Stop()
	client := tcptest.Dial(t, l) // the kernel still adds connections to the accept queue

	require.NoError(t, l.SetDeadline(none))
	sl.Stop() // neither moves the deadline again, nor closes the socket
	tcptest.RequireClient(t, client, tcptest.Accept(l))
	assert.NoError(t, l.Close())
}

// Shutdown and Close of the server close its listener, and wait for Serve to return.
func TestHTTPServerShutsDownWithAWrapperWhoseCloseCallsStop(t *testing.T) {
	for name, shutdown := range map[string]func(*http.Server) error{
		"Shutdown": func(s *http.Server) error { return s.Shutdown(context.Background()) },
		"Close":    (*http.Server).Close,
	} {
		t.Run(name, func(t *testing.T) {
			l := tcptest.Listen(t)
			server := http.Server{Handler: http.NotFoundHandler()}
			served, closed := make(chan error, 1), make(chan error, 1)
			go func() { served <- server.Serve(keepOpen{tcptest.Wrap(t, l)}) }()
			tcptest.Get(t, http.DefaultClient, l)
			go func() { closed <- shutdown(&server) }()
			assert.NoError(t, tcptest.Receive(t, closed, "return of "+name))
			assert.Equal(t, http.ErrServerClosed, tcptest.Receive(t, served, "return of Serve"))
			tcptest.RequireClient(t, tcptest.Dial(t, l), tcptest.Accept(tcptest.Wrap(t, l)))
		})
	}
}

// Drain

func TestDrainReturnsAtOnce(t *testing.T) {
	tcptest.RequireMedian(t, 100*time.Millisecond, "times of Drain", func() time.Duration {
		l := tcptest.Listen(t)
		sl := tcptest.Wrap(t, l)
		tcptest.Dial(t, l) // pending, and no goroutine is in Accept
		start := time.Now()
		sl.Drain()
		return time.Since(start)
	})
}

func TestDrainRefusesNewConnectionsUntilTheSocketIsClosedAndAfter(t *testing.T) {
	t.Parallel()
	tcptest.RequireRefusal(t)
	l := tcptest.Listen(t)
	sl := tcptest.Wrap(t, l)
	sl.Drain()
	tcptest.RequireRefused(t, l)
	tcptest.RequireDrained(t, tcptest.Accept(sl), 1)
	tcptest.RequireRefused(t, l)
	require.NoError(t, sl.Close())
	tcptest.RequireRefused(t, l)
}

func TestDrainAffectsEveryDuplicateOfTheSocket(t *testing.T) {
	t.Parallel()
	tcptest.RequireRefusal(t)
	sl, second := wrapWithDuplicate(t)
	waiting := tcptest.Accept(second)
	sl.Drain()
	tcptest.RequireRefused(t, second)
	tcptest.RequireDrained(t, tcptest.Accept(sl), 1)
	require.Error(t, tcptest.Receive(t, waiting, "return of the plain Accept of a duplicate").Err)
}

// Another process may drain the socket before this one is told to stop.
func TestAcceptOfADuplicateWaitsForStopDrainOrClose(t *testing.T) {
	t.Parallel()
	tcptest.RequireRefusal(t)
	for name, stop := range map[string]func(*stoppablelistener.StoppableListener){
		"Stop":  (*stoppablelistener.StoppableListener).Stop,
		"Drain": (*stoppablelistener.StoppableListener).Drain,
		"Close": func(sl *stoppablelistener.StoppableListener) { sl.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			drained, duplicate := wrapWithDuplicate(t)
			sl := tcptest.Wrap(t, duplicate)
			waiting := tcptest.AcceptMany(sl, 2)
			tcptest.AwaitAcceptors(t, 2)
			drained.Drain()
			tcptest.RequireDrained(t, tcptest.Accept(drained), 1)
			later := tcptest.Accept(sl)
			awaitDeadline(t, near)
			select {
			case got := <-waiting:
				require.FailNow(t, "Accept has returned before "+name, "%v", got.Err)
			case got := <-later:
				require.FailNow(t, "Accept has returned before "+name, "%v", got.Err)
			default:
			}
			stop(sl)
			tcptest.RequireStopped(t, waiting, 2)
			got := tcptest.Receive(t, later, "return of a later Accept")
			if name == "Close" { // it may not have been called yet, and then returns package net's error
				require.ErrorIs(t, got.Err, net.ErrClosed)
			} else {
				tcptest.RequireStoppedError(t, got.Err)
			}
			tcptest.RequireStopped(t, tcptest.Accept(sl), 1)
		})
	}
}

func TestDrainFreesTheAddress(t *testing.T) {
	t.Parallel()
	tcptest.RequireRefusal(t)
	l := tcptest.Listen(t)
	sl := tcptest.Wrap(t, l)
	sl.Drain()
	tcptest.RequireDrained(t, tcptest.Accept(sl), 1)
	next, err := net.Listen("tcp", l.Addr().String())
	require.NoError(t, err, "the drained socket, which is not closed yet, has the address")
	defer next.Close()
	tcptest.RequireClient(t, tcptest.Dial(t, next), tcptest.Accept(next))
}

func TestAcceptAfterDrainReturnsPendingConnectionsAndThenStoppedError(t *testing.T) {
	t.Parallel()
	l := tcptest.Listen(t)
	sl := tcptest.Wrap(t, l)
	clients := make([]net.Conn, 3)
	for i := range clients {
		clients[i] = tcptest.Dial(t, l)
	}
	sl.Drain()
	for _, client := range clients {
		tcptest.RequireClient(t, client, tcptest.Accept(sl))
	}
	tcptest.RequireDrained(t, tcptest.Accept(sl), 1)
	tcptest.RequireDrained(t, tcptest.Accept(sl), 1)
}

// Serve closes the listener when it returns.
func TestHTTPServerRespondsToPendingRequestsAfterDrain(t *testing.T) {
	t.Parallel()
	l := tcptest.Listen(t)
	sl := tcptest.Wrap(t, l)
	clients := make([]net.Conn, 3)
	for i := range clients {
		clients[i] = tcptest.Dial(t, l)
		_, err := fmt.Fprint(clients[i], "GET / HTTP/1.0\r\n\r\n")
		require.NoError(t, err)
	}
	sl.Drain()
	served := make(chan error, 1)
	go func() { served <- http.Serve(sl, http.NotFoundHandler()) }()
	tcptest.RequireStoppedError(t, tcptest.Receive(t, served, "return of Serve after Drain"))
	for _, client := range clients {
		response, err := io.ReadAll(client)
		require.NoError(t, err, "a client that was pending has no response")
		assert.Contains(t, string(response), "404 page not found")
	}
}

func TestDrainStopsEachBlockedAccept(t *testing.T) {
	t.Parallel()
	const acceptors = 100
	sl := tcptest.Wrap(t, tcptest.Listen(t))
	waiting := tcptest.AcceptMany(sl, acceptors)
	tcptest.AwaitAcceptors(t, acceptors)
	start := time.Now()
	sl.Drain()
	tcptest.RequireDrained(t, waiting, acceptors)
	took := time.Since(start)
	assert.Less(t, took, acceptors/2*tcptest.BlindWait, "the goroutines wait one after another")
}

// The accept loop handles each connection itself.
func TestAcceptOfASlowLoopReturnsPendingConnectionsAfterDrain(t *testing.T) {
	t.Parallel()
	tcptest.RequireRefusal(t) // otherwise, the time is counted from Drain
	l := tcptest.Listen(t)
	sl := tcptest.Wrap(t, l)
	first, second := tcptest.Dial(t, l), tcptest.Dial(t, l)
	sl.Drain()
	tcptest.RequireClient(t, first, tcptest.Accept(sl))
	awaitDeadline(t, tcptest.BlindWait*6/5)
	tcptest.RequireClient(t, second, tcptest.Accept(sl))
	tcptest.RequireDrained(t, tcptest.Accept(sl), 1)
}

// This is what Accept does where no connection is refused. The tests of internal/listenertest
// do the same on Linux.
func TestAcceptReturnsStoppedErrorAfterDrainWhileConnectionsKeepComing(t *testing.T) {
	if tcptest.RefusesAfterDrain() {
		t.Skip("connections are refused here")
	}
	l := tcptest.Listen(t)
	sl := tcptest.Wrap(t, l)
	tcptest.RequireAcceptsUntilStopped(t, sl, sl.Drain)
}

// Stop takes some microseconds, and Accept would wait for much longer.
func TestStopEndsDrainAtOnce(t *testing.T) {
	if tcptest.RefusesAfterDrain() {
		t.Skip("Drain ends at once by itself here; the tests of internal/listenertest delay it")
	}
	tcptest.RequireMedian(t, 100*time.Millisecond, "times of Stop", func() time.Duration {
		sl := tcptest.Wrap(t, tcptest.Listen(t))
		waiting := tcptest.AcceptMany(sl, 2)
		tcptest.AwaitAcceptors(t, 2)
		sl.Drain()
		start := time.Now()
		sl.Stop()
		tcptest.RequireStopped(t, waiting, 2)
		return time.Since(start)
	})
}

func TestStopAfterDrainLeavesPendingConnectionsInTheAcceptQueue(t *testing.T) {
	l := tcptest.Listen(t)
	sl := tcptest.Wrap(t, l)
	client := tcptest.Dial(t, l)
	sl.Drain()
	sl.Stop()
	tcptest.RequireStopped(t, tcptest.Accept(sl), 1)
	tcptest.RequireClient(t, client, tcptest.Accept(tcptest.Wrap(t, l)))
}

func TestDrainAfterStopDoesNothing(t *testing.T) {
	l := tcptest.Listen(t)
	stopped := tcptest.Wrap(t, l)
	stopped.Stop()
	require.NoError(t, l.SetDeadline(none))
	waiting := tcptest.Accept(l) // by the next user of the socket
	tcptest.AwaitAcceptors(t, 1)
	stopped.Drain()
	client, err := net.Dial("tcp", l.Addr().String())
	require.NoError(t, err, "a client of the next user of the socket is refused")
	defer client.Close()
	tcptest.RequireClient(t, client, waiting)
	tcptest.RequireStopped(t, tcptest.Accept(stopped), 1)
}

func TestDrainAnyNumberOfTimesPostponesNothing(t *testing.T) {
	t.Parallel()
	sl := tcptest.Wrap(t, tcptest.Listen(t))
	sl.Drain()
	again := time.NewTicker(time.Millisecond)
	defer again.Stop()
	defer tcptest.Loop(t, 3, func() bool {
		<-again.C
		sl.Drain()
		return true
	})()
	got := tcptest.Receive(t, tcptest.Accept(sl), "return of Accept, while Drain is called again")
	tcptest.RequireStoppedError(t, got.Err)
}

func TestDrainBeforeAndAfterClose(t *testing.T) {
	requireStopBeforeAndAfterClose(t, tcptest.Rounds(50),
		(*stoppablelistener.StoppableListener).Drain, tcptest.RequireDrained)
}

func TestDeadlineDoesNotCountAfterDrain(t *testing.T) {
	t.Parallel()
	l := tcptest.Listen(t)
	sl := tcptest.Wrap(t, l)
	client := tcptest.Dial(t, l)
	require.NoError(t, sl.SetDeadline(tcptest.Past))
	sl.Drain()
	tcptest.RequireStoppedError(t, sl.SetDeadline(tcptest.Past))
	tcptest.RequireClient(t, client, tcptest.Accept(sl))
	tcptest.RequireDrained(t, tcptest.Accept(sl), 1)
	tcptest.RequireStoppedError(t, sl.SetDeadline(none))
}

// Helpers

// requireStopBeforeAndAfterClose requires stop, which is Stop or Drain, to stop the accept loop if
// it is called just before Close, and after it. The function stopped checks results of Accept.
func requireStopBeforeAndAfterClose(
	t *testing.T, rounds int, stop func(*stoppablelistener.StoppableListener),
	stopped func(testing.TB, <-chan tcptest.Accepted, int),
) {
	t.Run("before", func(t *testing.T) {
		// The goroutines that stop wakes may return before Close or after.
		for range rounds {
			sl := tcptest.Wrap(t, tcptest.Listen(t))
			waiting := tcptest.AcceptMany(sl, 2)
			tcptest.AwaitAcceptors(t, 2)
			stop(sl)
			require.NoError(t, sl.Close())
			stopped(t, waiting, 2)
			stopped(t, tcptest.Accept(sl), 1)
		}
	})
	t.Run("after", func(t *testing.T) {
		sl := tcptest.Wrap(t, tcptest.Listen(t))
		require.NoError(t, sl.Close())
		stop(sl)
		stop(sl)
		tcptest.RequireStoppedError(t, sl.SetDeadline(none))
		stopped(t, tcptest.Accept(sl), 1)
	})
}

// wrapWithDuplicate returns a wrapper of a socket, and a duplicate of the socket.
func wrapWithDuplicate(t *testing.T) (*stoppablelistener.StoppableListener, *net.TCPListener) {
	sl := tcptest.Wrap(t, tcptest.Listen(t))
	file, err := sl.File()
	require.NoError(t, err)
	defer file.Close()
	duplicate, err := net.FileListener(file)
	require.NoError(t, err)
	t.Cleanup(func() { duplicate.Close() })
	return sl, duplicate.(*net.TCPListener)
}

// runChild runs a child process that inherits file and exits at once.
func runChild(t *testing.T, file *os.File) {
	cmd := exec.Command(proctest.Self(t))
	cmd.ExtraFiles = []*os.File{file}
	proctest.Start(t, cmd).RequireStatus(t, 0)
}

// requireNetClosed requires the error that package net's Accept returns for a closed listener.
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
	require.True(t, netErr.Timeout(), "the error is not a timeout: %v", err)
}

// inTime calls f with a deadline that is near. If the deadline has expired before f returns, the
// machine is busy: inTime calls f again, with one that is twice as far away.
func inTime(f func(deadline time.Time)) {
	for d := near; ; d *= 2 {
		deadline := time.Now().Add(d)
		f(deadline)
		if time.Now().Before(deadline) {
			return
		}
	}
}

// awaitDeadline returns when a deadline d from now has interrupted the Accept of another listener.
func awaitDeadline(t testing.TB, d time.Duration) {
	l := tcptest.Listen(t)
	require.NoError(t, l.SetDeadline(time.Now().Add(d)))
	_, err := l.Accept()
	requireTimeout(t, err)
}
