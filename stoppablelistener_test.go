package stoppablelistener_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
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
		{"foreign wrapper", keepOpen{wrap(t, listen(t))}, "stoppablelistener_test.keepOpen"},
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

// Starting a child process puts the socket into blocking mode, even where it fails.
func TestNewTakesOverTheBlockingMode(t *testing.T) {
	skipWithoutFile(t)
	const child = "child"
	if os.Getenv(childEnv) == child {
		return
	}
	for name, start := range map[string]func(*testing.T, *os.File){
		"cannot be started": func(t *testing.T, file *os.File) {
			cmd := exec.Cmd{Path: t.TempDir(), ExtraFiles: []*os.File{file}} // a folder
			require.Error(t, cmd.Start())
		},
		"ends at once": func(t *testing.T, file *os.File) {
			cmd, output := childProcess(t, child)
			cmd.ExtraFiles = []*os.File{file}
			require.NoError(t, cmd.Run(), output)
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := listen(t)
			t.Cleanup(func() { dial(t, l) }) // Close would wait for a deaf Accept
			wrap(t, l).Stop()
			file, err := l.File()
			require.NoError(t, err)
			start(t, file)
			require.NoError(t, file.Close())

			sl := wrap(t, l)
			waiting := acceptMany(sl, 2)
			requireClient(t, dial(t, l), waiting)
			sl.Stop()
			requireStopped(t, waiting, 1)
		})
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
	requireClient(t, dial(t, l), accepted)

	// A poll that ended while nobody was in Accept, and with a client queued.
	require.NoError(t, l.SetDeadline(past))
	requireClient(t, dial(t, l), accept(sl))
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
	clients := make([]net.Conn, 50)
	for i := range clients {
		clients[i] = dial(t, l)
	}
	sl.Stop()
	for range clients {
		_, err := sl.Accept()
		requireStoppedError(t, err)
		_, err = sl.AcceptTCP()
		requireStoppedError(t, err)
	}
	next := wrap(t, l)
	for _, client := range clients {
		requireClient(t, client, accept(next))
	}
}

// The next wrapper's deadline is not a past one, and says nothing to the stopped wrapper.
func TestAcceptAfterStopLeavesTheClientsToTheNextWrapper(t *testing.T) {
	l := listen(t)
	stopped := wrap(t, l)
	stopped.Stop()
	next := wrap(t, l)
	client := dial(t, l)
	requireStopped(t, accept(stopped), 1)
	requireClient(t, client, accept(next))
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
				requireNetClosed(t, err)
			}
		})
	}
}

// The listener is closed between the end of a poll and the begin of the next: here, since
// no test can meet that moment, by another listener in its place.
func TestCloseAtTheEndOfAPollIsPackageNetsError(t *testing.T) {
	l, closed := listen(t), listen(t)
	require.NoError(t, closed.Close())
	sl := wrap(t, l)
	accepted := accept(sl)
	awaitAcceptors(t, 1)
	require.NoError(t, l.SetDeadline(none)) // for the race detector: the Accept has read the field
	sl.TCPListener = closed
	require.NoError(t, l.SetDeadline(past))
	requireNetClosed(t, receive(t, accepted).err)
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
			requireClient(t, dial(t, l), accepted)
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

func TestSetDeadlineAfterStopTouchesNothing(t *testing.T) {
	l := listen(t)
	sl := wrap(t, l)
	sl.Stop()
	require.NoError(t, l.SetDeadline(none))
	waiting := accept(l) // the next owner's
	awaitAcceptors(t, 1)
	for _, deadline := range []time.Time{past, time.Now().Add(time.Hour), none} {
		requireStoppedError(t, sl.SetDeadline(deadline))
		requireStopped(t, accept(sl), 1)
	}
	requireClient(t, dial(t, l), waiting)
}

// The goroutines that Stop has woken may not have run before SetDeadline is called.
func TestSetDeadlineAfterStopHoldsNobodyBack(t *testing.T) {
	for range 300 {
		sl := wrap(t, listen(t))
		waiting := acceptMany(sl, 3)
		awaitAcceptors(t, 3)
		sl.Stop()
		requireStoppedError(t, sl.SetDeadline(none))
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
	requireStoppedError(t, sl.SetDeadline(none))
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

// A Stop takes some microseconds. The median tells a slow one from a busy machine.
func TestStopIsFast(t *testing.T) {
	took := make([]time.Duration, 21)
	for i := range took {
		took[i] = timeStop(t, ours, 1, func() { awaitAcceptors(t, 1) })
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
			assert.NoError(t, l.SetDeadline(past))
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
	for range rounds(2000) {
		l := listen(t)
		sl := wrap(t, l)
		waiting := acceptMany(sl, acceptors)
		awaitAcceptors(t, acceptors)
		disturb(l, sl)
		sl.Stop()
		requireStopped(t, waiting, acceptors)
		l.Close()
	}
}

func TestStopAnyNumberOfTimesFromAnyGoroutines(t *testing.T) {
	sl := wrap(t, listen(t))
	waiting := accept(sl)
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
	requireStopped(t, accept(sl), 1)
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
			requireStopped(t, accept(sl), 1)
		}
	})
	t.Run("after", func(t *testing.T) {
		sl := wrap(t, listen(t))
		require.NoError(t, sl.Close())
		sl.Stop()
		sl.Stop()
		requireStopped(t, accept(sl), 1)
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
	requireStoppedError(t, receive(t, loop))
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
	assert.Equal(t, "stopped", get(t, http.DefaultClient, l))
	requireStoppedError(t, receive(t, served))
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
	requireClient(t, client, accept(l))
	assert.NoError(t, l.Close())
}

func TestStopByContext(t *testing.T) {
	sl := wrap(t, listen(t))
	waiting := accept(sl)
	ctx, cancel := context.WithCancel(context.Background())
	context.AfterFunc(ctx, sl.Stop)
	cancel()
	requireStopped(t, waiting, 1)
}

// StoppedError

func TestStoppedErrorIsAClosedListenerButNotTheReverse(t *testing.T) {
	assert.ErrorIs(t, stoppablelistener.StoppedError, net.ErrClosed)
	assert.ErrorContains(t, stoppablelistener.StoppedError, net.ErrClosed.Error())
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
	var answered, handled atomic.Int64
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: patience}
	stopClients := repeatedly(t, clients, func() bool {
		resp, err := client.Get("http://" + l.Addr().String())
		if !assert.NoError(t, err) {
			return false
		}
		defer resp.Body.Close()
		_, err = io.Copy(io.Discard, resp.Body)
		answered.Add(1)
		return assert.NoError(t, err)
	})

	serve := func(afterOne func(*stoppablelistener.StoppableListener)) {
		sl := wrap(t, l)
		var once sync.Once
		handler := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			handled.Add(1)
			fmt.Fprint(w, "Hello HTTP!")
			once.Do(func() { afterOne(sl) })
		})
		served := make(chan error, 1)
		go func() { served <- http.Serve(keepOpen{sl}, handler) }()
		requireStoppedError(t, receive(t, served))
	}
	for range cycles {
		serve((*stoppablelistener.StoppableListener).Stop)
	}
	serve(func(sl *stoppablelistener.StoppableListener) {
		go func() {
			stopClients()
			sl.Stop()
		}()
	})
	assert.Equal(t, handled.Load(), answered.Load())
	assert.GreaterOrEqual(t, answered.Load(), int64(cycles))
}

// Shutdown and Close of the server close its listener, and wait for Serve to return.
func TestHTTPServerEndsWhileItServesAWrapperWhoseCloseStops(t *testing.T) {
	for name, end := range map[string]func(*http.Server) error{
		"Shutdown": func(s *http.Server) error { return s.Shutdown(context.Background()) },
		"Close":    (*http.Server).Close,
	} {
		t.Run(name, func(t *testing.T) {
			l := listen(t)
			server := http.Server{Handler: http.NotFoundHandler()}
			served, ended := make(chan error, 1), make(chan error, 1)
			go func() { served <- server.Serve(keepOpen{wrap(t, l)}) }()
			get(t, http.DefaultClient, l)
			go func() { ended <- end(&server) }()
			assert.NoError(t, receive(t, ended))
			assert.Equal(t, http.ErrServerClosed, receive(t, served))
			requireClient(t, dial(t, l), accept(wrap(t, l)))
		})
	}
}

// Faults

// Clients dial without pause, so the next Accept need never wait and a poll never end.
func TestSaturatedAcceptLoopsStop(t *testing.T) {
	const acceptors, clients, cycles = 3, 4, 30
	l := listen(t)
	stopLoad := load(t, l, clients, func(net.Conn) error { return nil })
	for range rounds(cycles) {
		sl := wrap(t, l)
		var stopped atomic.Bool
		var before atomic.Int64
		busy := make(chan struct{})
		late := make(chan int, acceptors)
		for range acceptors {
			go func() {
				n := 0
				for {
					conn, err := sl.Accept()
					if err != nil {
						assert.True(t, err == stoppablelistener.StoppedError, err)
						late <- n
						return
					}
					conn.Close()
					if stopped.Load() {
						n++
					} else if before.Add(1) == 100 {
						close(busy)
					}
				}
			}()
		}
		receive(t, busy)
		sl.Stop()
		stopped.Store(true)
		for range acceptors {
			assert.LessOrEqual(t, receive(t, late), 1, "connections after Stop, of one acceptor")
		}
	}
	stopLoad()
}

// The test binary itself is the child process.
func TestSocketIsHandedToAChildProcess(t *testing.T) {
	const child = "child"
	if os.Getenv(childEnv) == child {
		inherited, err := net.FileListener(os.NewFile(3, "listener"))
		require.NoError(t, err)
		sl := wrap(t, inherited)
		served := make(chan error, 1)
		go func() { served <- serveName(sl, child) }()
		_, err = io.Copy(io.Discard, os.Stdin) // the parent closes it
		require.NoError(t, err)
		sl.Stop()
		require.NoError(t, receive(t, served))
		return
	}
	skipWithoutFile(t)

	for range 3 {
		cmd, output := childProcess(t, child)
		l := listen(t)
		servedBy := map[string]chan struct{}{"parent": make(chan struct{}, 1<<16), child: make(chan struct{}, 1<<16)}
		stopLoad := load(t, l, 8, func(conn net.Conn) error {
			name, err := io.ReadAll(conn)
			if err == nil && servedBy[string(name)] == nil {
				err = fmt.Errorf("answered by %q", name)
			}
			if err == nil {
				servedBy[string(name)] <- struct{}{}
			}
			return err
		})
		sl := wrap(t, l)
		served := make(chan error, 1)
		go func() { served <- serveName(sl, "parent") }()
		for range 100 {
			receive(t, servedBy["parent"])
		}

		sl.Stop()
		require.NoError(t, receive(t, served))
		file, err := sl.File()
		require.NoError(t, err)
		cmd.ExtraFiles = []*os.File{file}
		stdin, err := cmd.StdinPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		require.NoError(t, file.Close())
		require.NoError(t, l.Close())

		for range 100 {
			receive(t, servedBy[child])
		}
		stopLoad()
		require.NoError(t, stdin.Close())
		require.NoError(t, cmd.Wait(), output)
	}
}

// The test binary itself runs as a child process with few descriptors.
func TestNoDescriptorIsFree(t *testing.T) {
	const child = "no descriptors"
	if os.Getenv(childEnv) != child {
		if runtime.GOOS == "windows" {
			t.Skip("no limit to lower")
		}
		sh, err := exec.LookPath("sh")
		if err != nil {
			t.Skip("no shell to lower the limit")
		}
		cmd, output := childProcess(t, child)
		cmd.Args = append([]string{"sh", "-c", `ulimit -n 64 && exec "$0" "$@"`, cmd.Path}, cmd.Args[1:]...)
		cmd.Path = sh
		require.NoError(t, cmd.Run(), output)
		return
	}

	l := listen(t)
	sl := wrap(t, l)
	dial(t, l)
	dial(t, l)
	var files []*os.File
	var err error
	for {
		var file *os.File
		if file, err = os.Open(os.DevNull); err != nil {
			break
		}
		files = append(files, file)
	}
	require.ErrorIs(t, err, syscall.EMFILE)

	for range 3 {
		_, err = sl.Accept()
		require.ErrorIs(t, err, syscall.EMFILE)
		var temporary interface{ Temporary() bool }
		require.ErrorAs(t, err, &temporary)
		require.True(t, temporary.Temporary())
	}
	require.NoError(t, files[0].Close())
	conn, err := sl.Accept() // takes the descriptor that has become free
	require.NoError(t, err)
	defer conn.Close()

	failing, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		var once sync.Once
		for {
			_, err := sl.Accept()
			if !errors.Is(err, syscall.EMFILE) {
				ended <- err
				return
			}
			once.Do(func() { close(failing) })
		}
	}()
	receive(t, failing)
	sl.Stop()
	requireStoppedError(t, receive(t, ended))
}

func TestManyRoundsLeaveNothingBehind(t *testing.T) {
	l := listen(t)
	descriptors := func() int {
		files, err := os.ReadDir("/dev/fd") // where there is none, only goroutines count
		if err != nil {
			return 0
		}
		return len(files)
	}
	goroutines, files := runtime.NumGoroutine(), descriptors()
	for range rounds(10_000) {
		sl := wrap(t, l)
		client := dialOnce(t, l)
		conn, err := sl.Accept()
		require.NoError(t, err)
		conn.Close()
		client.Close()
		waiting := accept(sl)
		sl.Stop()
		requireStopped(t, waiting, 1)
	}
	assert.Eventually(t, func() bool {
		return runtime.NumGoroutine() <= goroutines+1 // the one that runs this
	}, patience, time.Millisecond)
	assert.LessOrEqual(t, descriptors(), files)
}

// Random histories

// A history is what several goroutines do to one wrapper after another: each byte
// is an operation and the goroutine that does it. The seed brings the history back, but
// not how its goroutines took turns.
func TestRandomHistories(t *testing.T) {
	for range rounds(500) {
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

func FuzzHistory(f *testing.F) {
	f.Add([]byte{0, 16, 32, 48, 5})
	f.Add([]byte{1, 2, 0, 7, 20, 33, 6, 50, 8, 0})
	f.Fuzz(func(t *testing.T, history []byte) {
		if len(history) > 100 {
			history = history[:100]
		}
		if err := runHistory(history); err != nil {
			t.Fatalf("history %v: %v", history, err)
		}
	})
}

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

// A socket is one listener and the addresses of its clients.
type socket struct {
	*net.TCPListener

	mu               sync.Mutex // guards the fields below
	close            span       // from the first that began to the first that ended; the world's mu too
	dialed, accepted []string
	clients          []net.Conn // stay: on some systems a client that has left is not accepted
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

// runHistory plays history in four goroutines and reports the first thing that must
// not have happened.
func runHistory(history []byte) error {
	result := make(chan error, 1)
	go func() { result <- playHistory(history) }()
	select {
	case err := <-result:
		return err
	case <-time.After(2 * patience):
		return errors.New("an Accept was left waiting")
	}
}

func playHistory(history []byte) error {
	w := &world{}
	if err := w.renew(); err != nil {
		return err
	}
	const actors = 4
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
		for _, client := range lf.clients {
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
		w.accept(lf, op == 2)
		return nil
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
		w.setDeadline(lf, []time.Time{past, now.Add(time.Millisecond), now.Add(time.Hour), none}[op-7])
		return nil
	default:
		defer w.mu.Unlock()
		return lf.socket.dial()
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
		s = &socket{TCPListener: l.(*net.TCPListener)}
	}
	sl, err := stoppablelistener.New(s.TCPListener)
	w.life = &life{socket: s, sl: sl}
	return err
}

func (w *world) accept(lf *life, tcp bool) {
	op := acceptOp{span: span{begin: w.clock.Add(1)}}
	var conn net.Conn
	if tcp {
		conn, op.err = lf.sl.AcceptTCP()
	} else {
		conn, op.err = lf.sl.Accept()
	}
	op.returned = time.Now()
	op.end = w.clock.Add(1)
	if op.err == nil {
		lf.socket.took(conn)
	}
	lf.mu.Lock()
	defer lf.mu.Unlock()
	lf.accepts = append(lf.accepts, op)
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

// dial connects a client, with the world's mu held.
func (s *socket) dial() error {
	if s.close.begin != 0 {
		return nil
	}
	conn, err := net.Dial("tcp", s.Addr().String())
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dialed = append(s.dialed, conn.LocalAddr().String())
	s.clients = append(s.clients, conn)
	return conn.(*net.TCPConn).SetLinger(0) // as dialOnce
}

func (s *socket) took(conn net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.accepted = append(s.accepted, conn.RemoteAddr().String())
	conn.Close()
}

// drain accepts the clients that are still queued and closes the last socket.
func (w *world) drain() error {
	if err := w.renew(); err != nil {
		return err
	}
	lf := w.life
	defer lf.sl.Close()
	lf.sl.SetDeadline(time.Now().Add(patience))
	for len(lf.accepted) < len(lf.dialed) {
		conn, err := lf.sl.Accept()
		if err != nil {
			return fmt.Errorf("%d clients dialed, %d accepted: %w", len(lf.dialed), len(lf.accepted), err)
		}
		lf.socket.took(conn)
	}
	return nil
}

// judge reports what must not have happened in lf.
func (lf *life) judge() error {
	clients := map[string]bool{}
	for _, addr := range lf.dialed {
		clients[addr] = true
	}
	for _, addr := range lf.accepted {
		if !clients[addr] {
			return fmt.Errorf("%s did not dial, or was accepted twice", addr)
		}
		delete(clients, addr)
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
			if d.began(op.span) && d.at != none && !d.at.After(op.returned) && !lf.superseded(d, op) {
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
		if d.at != past || !d.before(op.span) {
			continue
		}
		last := true
		for _, other := range lf.deadlines {
			last = last && (other == d || other.at == past || other.before(d.span) || op.before(other.span))
		}
		if last {
			return true
		}
	}
	return false
}

// Benchmarks
//
// The arms of a benchmark take turns within each iteration, so that whatever else the
// machine does meets all of them, and each has metrics of its own. Medians, because
// the machine does a lot else.

// An arm is one way to stop an accept loop. It turns a bare listener into what the
// loop accepts from, and the function that stops the loop.
type arm struct {
	name string
	wrap func(testing.TB, *net.TCPListener) (l net.Listener, stop func())
}

var (
	bare = arm{"bare", func(_ testing.TB, l *net.TCPListener) (net.Listener, func()) {
		return l, func() { l.Close() }
	}}
	classic = arm{"classic", func(_ testing.TB, l *net.TCPListener) (net.Listener, func()) {
		p := &poller{l, make(chan struct{})}
		return p, func() { close(p.stop) }
	}}
	ours = arm{"ours", func(t testing.TB, l *net.TCPListener) (net.Listener, func()) {
		sl := wrap(t, l)
		return sl, sl.Stop
	}}
	arms = []arm{bare, classic, ours}
)

// A poller is the classic design: a deadline of one second before each accept, and a
// look at the stop channel after it.
type poller struct {
	*net.TCPListener
	stop chan struct{}
}

var errPollerStopped = errors.New("stopped")

func (p *poller) Accept() (net.Conn, error) {
	for {
		if err := p.SetDeadline(time.Now().Add(time.Second)); err != nil {
			return nil, err
		}
		conn, err := p.TCPListener.Accept()
		select {
		case <-p.stop:
			if err == nil {
				conn.Close() // else the garbage collector would, some day
			}
			return nil, errPollerStopped
		default:
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return conn, err
		}
	}
}

func BenchmarkAccept(b *testing.B) { benchmarkAccept(b, 1) }

func BenchmarkAcceptParallel(b *testing.B) { benchmarkAccept(b, 4) }

// benchmarkAccept takes connections from a filled queue with a number of acceptors.
func benchmarkAccept(b *testing.B, acceptors int) {
	const queued = 100 // less than any system's backlog
	blockInRead(b)
	b.StopTimer() // it runs only while connections are accepted
	times, allocs := samples{}, samples{}
	for i := range b.N {
		for _, arm := range inTurn(i, arms...) {
			raw := listen(b)
			l, _ := arm.wrap(b, raw)
			clients := make([]net.Conn, queued)
			for c := range clients {
				clients[c] = dialOnce(b, l)
			}
			conns := make([]net.Conn, queued)
			begin := make(chan struct{})
			var end sync.WaitGroup
			for a := 1; a < acceptors; a++ {
				end.Add(1)
				go func() {
					defer end.Done()
					<-begin
					acceptInto(b, l, conns, a, acceptors)
				}()
			}

			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			b.StartTimer()
			start := time.Now()
			close(begin)
			acceptInto(b, l, conns, 0, acceptors)
			end.Wait()
			elapsed := time.Since(start)
			b.StopTimer()
			runtime.ReadMemStats(&after)

			times.add(arm, float64(elapsed.Nanoseconds())/queued)
			allocs.add(arm, float64(after.Mallocs-before.Mallocs)/queued)
			for c := range conns {
				clients[c].Close()
				conns[c].Close()
			}
			raw.Close()
		}
	}
	times.report(b, "ns/accept", 0.5)
	allocs.report(b, "allocs/accept", 0.5)
	times.reportRatio(b, "ours/bare", 0.5)
}

// acceptInto accepts every step-th connection.
func acceptInto(b *testing.B, l net.Listener, conns []net.Conn, from, step int) {
	for i := from; i < len(conns); i += step {
		conn, err := l.Accept()
		if err != nil {
			b.Error(err)
			return
		}
		conns[i] = conn
	}
}

// BenchmarkStop is the time from the call of stop, for the bare listener Close, to the
// return of the last Accept that was waiting.
func BenchmarkStop(b *testing.B) {
	for _, waiting := range []int{1, 10, 100} {
		b.Run(fmt.Sprintf("waiting=%d", waiting), func(b *testing.B) {
			blockInRead(b)
			times := samples{}
			for i := range b.N {
				for _, arm := range inTurn(i, bare, ours) {
					took := timeStop(b, arm, waiting, func() { awaitAcceptors(b, waiting) })
					times.add(arm, float64(took))
				}
			}
			b.StopTimer()
			if b.N > 1 { // the first run is only to find how many make a second
				for _, took := range timeClassicStops(b, waiting) {
					times.add(classic, float64(took))
				}
			}
			times.report(b, "p50-ns", 0.5)
			times.report(b, "p99-ns", 0.99)
			times.reportRatio(b, "p50-ours/bare", 0.5)
		})
	}
}

// timeStop stops goroutines that wait in Accept, once settle has returned.
func timeStop(t testing.TB, arm arm, waiting int, settle func()) time.Duration {
	raw := listen(t)
	defer raw.Close()
	l, stop := arm.wrap(t, raw)
	returned := make(chan time.Time, waiting)
	for range waiting {
		go func() {
			_, _ = l.Accept()
			returned <- time.Now()
		}()
	}
	settle()
	start := time.Now()
	stop()
	var last time.Duration
	for range waiting {
		last = max(last, (<-returned).Sub(start))
	}
	return last
}

// timeClassicStops stops many listeners of the classic design side by side, each at
// some point of its poll.
func timeClassicStops(b *testing.B, waiting int) []time.Duration {
	took := make([]time.Duration, 50)
	var stops sync.WaitGroup
	for i := range took {
		stops.Add(1)
		go func() {
			defer stops.Done()
			phase := rand.N(time.Second)
			took[i] = timeStop(b, classic, waiting, func() { time.Sleep(phase) })
		}()
	}
	stops.Wait()
	return took
}

// BenchmarkStopUnderLoad counts the connections that were established and got no answer
// because the accept loop was stopped, and the socket served again right away.
func BenchmarkStopUnderLoad(b *testing.B) {
	const stops = 10
	blockInRead(b)
	lost := map[string]int64{}
	for i := range b.N {
		for _, arm := range inTurn(i, arms...) {
			lost[arm.name] += countLost(b, arm, stops)
		}
	}
	for _, arm := range arms {
		b.ReportMetric(float64(lost[arm.name])/float64(b.N*stops), arm.name+"-lost/stop")
	}
	b.ReportMetric(0, "ns/op")
}

// countLost stops and serves a socket again under load, and returns how many
// connections were lost.
func countLost(b *testing.B, arm arm, stops int) int64 {
	raw := listen(b)
	addr := raw.Addr().String()
	var lost atomic.Int64
	stopLoad := repeatedly(b, 8, func() bool {
		var conns []*net.TCPConn
		for range 16 {
			conn, err := net.DialTimeout("tcp", addr, patience)
			if err == nil { // else nobody listens: not established, not lost
				conns = append(conns, conn.(*net.TCPConn))
			}
		}
		for _, conn := range conns {
			_ = conn.SetReadDeadline(time.Now().Add(time.Second))
			if _, err := conn.Read(make([]byte, 1)); err != nil {
				lost.Add(1)
			}
			_ = conn.SetLinger(0) // as dialOnce
			conn.Close()
		}
		return true
	})

	for n := range stops + 1 {
		if errors.Is(raw.SetDeadline(none), net.ErrClosed) { // by the bare arm's stop
			l, err := net.Listen("tcp", addr)
			require.NoError(b, err)
			raw = l.(*net.TCPListener)
			b.Cleanup(func() { l.Close() })
		}
		l, stop := arm.wrap(b, raw)
		last := n == stops
		if last { // no client is left to be lost by it
			go func() {
				stopLoad()
				stop()
			}()
		}
		for served := 1; ; served++ {
			conn, err := l.Accept()
			if err != nil {
				break
			}
			_, _ = conn.Write([]byte("x"))
			conn.Close()
			if served == 100 && !last {
				stop()
			}
		}
	}
	raw.Close()
	return lost.Load()
}

// BenchmarkServe is whole HTTP requests through http.Server, a connection for each.
func BenchmarkServe(b *testing.B) {
	const requests = 20
	blockInRead(b)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	times := samples{}
	for i := range b.N {
		for _, arm := range inTurn(i, arms...) {
			l, _ := arm.wrap(b, listen(b))
			server := http.Server{Handler: http.NotFoundHandler()}
			ended := make(chan error, 1)
			go func() { ended <- server.Serve(l) }()
			get(b, client, l) // now Serve serves
			start := time.Now()
			for range requests {
				get(b, client, l)
			}
			times.add(arm, float64(time.Since(start).Nanoseconds())/requests)
			server.Close()
			<-ended
		}
	}
	times.report(b, "ns/request", 0.5)
	times.reportRatio(b, "ours/bare", 0.5)
}

// BenchmarkIdle counts, for a minute, how often a goroutine that waits in Accept is
// woken. Each arm is a process, since the runtime counts for a whole process.
func BenchmarkIdle(b *testing.B) {
	const listeners = 2000
	if name, child := os.LookupEnv(childEnv); child {
		arm := arms[slices.IndexFunc(arms, func(a arm) bool { return a.name == name })]
		for i := range listeners {
			l, _ := arm.wrap(b, listen(b))
			if sl, ok := l.(*stoppablelistener.StoppableListener); ok && i%2 == 0 {
				require.NoError(b, sl.SetDeadline(time.Now().Add(time.Hour))) // makes no poll longer
			}
			accept(l)
		}
		awaitAcceptors(b, listeners)
		debug.FreeOSMemory() // else the runtime does so by and by, which counts as well
		before := timesScheduled()
		time.Sleep(time.Minute)
		fmt.Printf("\nwoken: %g\n", float64(timesScheduled()-before)/listeners)
		os.Exit(0)
	}
	woken := samples{}
	for range b.N {
		var idling sync.WaitGroup
		outputs := make([]*bytes.Buffer, len(arms))
		for i, arm := range arms {
			var cmd *exec.Cmd
			cmd, outputs[i] = childProcess(b, arm.name)
			cmd.Args = append(cmd.Args, "-test.bench", "^"+b.Name()+"$", "-test.benchtime", "1x")
			idling.Add(1)
			go func() {
				defer idling.Done()
				assert.NoError(b, cmd.Run(), outputs[i])
			}()
		}
		idling.Wait()
		for i, arm := range arms {
			_, after, _ := strings.Cut(outputs[i].String(), "woken:")
			var n float64
			_, err := fmt.Sscan(after, &n)
			require.NoError(b, err, outputs[i])
			woken.add(arm, n)
		}
	}
	woken.report(b, "wakeups/min", 0.5)
	assert.InDelta(b, 1, woken.quantile(ours, 0.5), 0.3, "a poll lasts a minute") // .ci/run looks
}

// inTurn returns arms, of which another one comes first in each iteration.
func inTurn(i int, arms ...arm) []arm {
	i %= len(arms)
	return append(slices.Clone(arms[i:]), arms[:i]...)
}

// samples are what was measured, by the name of the arm.
type samples map[string][]float64

func (s samples) add(a arm, v float64) { s[a.name] = append(s[a.name], v) }

// quantile returns the q-quantile of an arm's samples.
func (s samples) quantile(a arm, q float64) float64 {
	sorted := slices.Clone(s[a.name])
	slices.Sort(sorted)
	return sorted[int(q*float64(len(sorted)-1))]
}

// report reports the q-quantile of each arm in unit, in place of the time of an
// iteration, which means nothing here.
func (s samples) report(b *testing.B, unit string, q float64) {
	for _, arm := range arms {
		if len(s[arm.name]) > 0 {
			b.ReportMetric(s.quantile(arm, q), arm.name+"-"+unit)
		}
	}
	b.ReportMetric(0, "ns/op")
}

func (s samples) reportRatio(b *testing.B, unit string, q float64) {
	b.ReportMetric(s.quantile(ours, q)/s.quantile(bare, q), unit)
}

// blockInRead keeps a goroutine blocked in a network read. A process in which nothing
// waits in the network poller accepts faster, and a pending deadline would look as if
// it cost that difference.
func blockInRead(b *testing.B) {
	l := listen(b)
	dial(b, l)
	conn, err := l.Accept()
	require.NoError(b, err)
	go conn.Read(make([]byte, 1))
	b.Cleanup(func() { conn.Close() })
}

// timesScheduled returns how often a goroutine of this process has begun to run.
func timesScheduled() uint64 {
	sample := []metrics.Sample{{Name: "/sched/latencies:seconds"}}
	metrics.Read(sample)
	var n uint64
	for _, count := range sample[0].Value.Float64Histogram().Counts {
		n += count
	}
	return n * 8 // the runtime notes one time out of eight
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

func get(t testing.TB, client *http.Client, l net.Listener) string {
	resp, err := client.Get("http://" + l.Addr().String())
	require.NoError(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return string(body)
}

// load dials l from a number of clients that use each connection and dial again, until
// stop is called. Nothing may fail.
func load(t testing.TB, l net.Listener, clients int, use func(net.Conn) error) (stop func()) {
	return repeatedly(t, clients, func() bool {
		conn, err := net.DialTimeout("tcp", l.Addr().String(), patience)
		if !assert.NoError(t, err) {
			return false
		}
		defer conn.Close()
		return assert.NoError(t, conn.(*net.TCPConn).SetLinger(0)) && // as dialOnce
			assert.NoError(t, conn.SetDeadline(time.Now().Add(patience))) &&
			assert.NoError(t, use(conn))
	})
}

// repeatedly has n goroutines call f again and again, each until f returns false or stop
// is called, which waits for them.
func repeatedly(t testing.TB, n int, f func() bool) (stop func()) {
	done := make(chan struct{})
	var calling sync.WaitGroup
	for range n {
		calling.Add(1)
		go func() {
			defer calling.Done()
			for f() {
				select {
				case <-done:
					return
				default:
				}
			}
		}()
	}
	stop = sync.OnceFunc(func() {
		close(done)
		calling.Wait()
	})
	t.Cleanup(stop)
	return stop
}

// serveName answers each client of l with name, until l is stopped.
func serveName(l net.Listener, name string) error {
	for {
		conn, err := l.Accept()
		if err == stoppablelistener.StoppedError {
			return nil
		}
		if err != nil {
			return err
		}
		if _, err := io.WriteString(conn, name); err != nil {
			return err
		}
		if err := conn.Close(); err != nil {
			return err
		}
	}
}

func skipWithoutFile(t *testing.T) {
	if runtime.GOOS == "windows" || runtime.GOOS == "plan9" {
		t.Skip("a listener has no File here that a child process could inherit")
	}
}

// childEnv tells a test that it runs in a child process, and as what.
const childEnv = "STOPPABLELISTENER_TEST_CHILD"

// childProcess is the test binary with this test alone, which finds child in childEnv;
// what it prints is in output. A short run has none.
func childProcess(t testing.TB, child string) (cmd *exec.Cmd, output *bytes.Buffer) {
	if testing.Short() {
		t.Skip("starts a process")
	}
	exe, err := os.Executable()
	require.NoError(t, err)
	cmd = exec.Command(exe, "-test.run", "^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), childEnv+"="+child)
	output = new(bytes.Buffer)
	cmd.Stdout, cmd.Stderr = output, output
	t.Cleanup(func() {
		if cmd.Process != nil {
			_ = cmd.Process.Kill()
		}
	})
	return cmd, output
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

// requireClient takes an Accept's result, which must be client's connection.
func requireClient(t testing.TB, client net.Conn, results <-chan accepted) {
	t.Helper()
	got := receive(t, results)
	require.NoError(t, got.err)
	defer got.conn.Close()
	require.Equal(t, client.LocalAddr().String(), got.conn.RemoteAddr().String())
}

func requireStopped(t testing.TB, results <-chan accepted, n int) {
	t.Helper()
	for range n {
		requireStoppedError(t, receive(t, results).err)
	}
}

func requireStoppedError(t testing.TB, err error) {
	t.Helper()
	require.True(t, err == stoppablelistener.StoppedError, err)
}

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
	l := listen(t)
	require.NoError(t, l.SetDeadline(time.Now().Add(d)))
	_, err := l.Accept()
	requireTimeout(t, err)
}

// awaitAcceptors returns when n goroutines are blocked in an Accept of package net.
func awaitAcceptors(t testing.TB, n int) {
	t.Helper()
	buf := make([]byte, 1<<18)
	deadline := time.Now().Add(patience)
	for {
		stacks := buf[:runtime.Stack(buf, true)]
		if len(stacks) == len(buf) { // cut off
			buf = make([]byte, 2*len(buf))
			continue
		}
		blocked := 0
		for _, g := range bytes.Split(stacks, []byte("\n\n")) {
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
		time.Sleep(time.Duration(n) * time.Microsecond) // each look holds them all up
	}
}

// rounds is n, or a tenth of it in a short run.
func rounds(n int) int {
	if testing.Short() {
		return n / 10
	}
	return n
}
