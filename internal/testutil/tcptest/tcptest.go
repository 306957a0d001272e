// Package tcptest is what the tests of this module share: listeners, clients, goroutines
// in Accept, and waiting.
package tcptest

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener"
)

// Patience is how long something that happens at once may take on a loaded machine. It is
// well below the poll interval, so that what happens only at the end of a poll is too late.
const Patience = 10 * time.Second

// Past is a deadline that has expired.
var Past = time.Unix(1, 0)

// Listen returns a listener on a free port, closed when the test ends.
func Listen(t testing.TB) *net.TCPListener {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { l.Close() })
	return l.(*net.TCPListener)
}

// FreeAddr returns an address at which nothing listens. No other test gets its port meanwhile, to
// listen or to connect, since systems assign ports from 32768 on. FreeAddr does not listen there to
// try it: a process that another test is starting would have the socket too.
func FreeAddr(t testing.TB) string {
	t.Helper()
	for range 100 {
		addr := fmt.Sprint("127.0.0.1:", 20000+rand.IntN(10000))
		conn, err := net.Dial("tcp", addr)
		if IsRefused(err) {
			return addr
		}
		if err == nil {
			conn.Close()
		}
	}
	require.FailNow(t, "no free port")
	return ""
}

// Wrap wraps l.
func Wrap(t testing.TB, l net.Listener) *stoppablelistener.StoppableListener {
	sl, err := stoppablelistener.New(l)
	require.NoError(t, err)
	return sl
}

// Clients
//
// None resets its connection while that may still be in the accept queue: on some systems,
// Accept would never return it then.

// Dial connects a client until the test ends.
func Dial(t testing.TB, l net.Listener) net.Conn {
	conn := DialOnce(t, l)
	t.Cleanup(func() { conn.Close() })
	return conn
}

// DialOnce connects a client that the caller closes once it has been accepted. Close resets
// the connection, because thousands of connections that are closed otherwise would use up
// the ports of the machine.
func DialOnce(t testing.TB, l net.Listener) net.Conn {
	conn, err := net.DialTimeout("tcp", l.Addr().String(), Patience)
	require.NoError(t, err)
	require.NoError(t, conn.(*net.TCPConn).SetLinger(0))
	return conn
}

// Get returns the body of the response of the HTTP server on l.
func Get(t testing.TB, client *http.Client, l net.Listener) string {
	resp, err := client.Get("http://" + l.Addr().String())
	require.NoError(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return string(body)
}

// Loop calls f in a loop in n goroutines, each until f returns false or stop is called,
// which waits for them.
func Loop(t testing.TB, n int, f func() bool) (stop func()) {
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

// Goroutines in Accept

// Accepted is what an Accept has returned.
type Accepted struct {
	Conn net.Conn
	Err  error
}

// Accept calls l.Accept in a goroutine.
func Accept(l net.Listener) <-chan Accepted { return AcceptMany(l, 1) }

// AcceptMany calls l.Accept in n goroutines.
func AcceptMany(l net.Listener, n int) <-chan Accepted {
	results := make(chan Accepted, n)
	for range n {
		go func() {
			conn, err := l.Accept()
			results <- Accepted{conn, err}
		}()
	}
	return results
}

// AwaitAcceptors waits until n goroutines that the calling goroutine has started are blocked in an
// Accept of package net. Those of parallel tests do not count.
func AwaitAcceptors(t testing.TB, n int) {
	t.Helper()
	awaitAcceptors(t, n, nil)
}

// AwaitAcceptor waits until such a goroutine is blocked, or results has what it has returned.
func AwaitAcceptor(t testing.TB, results <-chan Accepted) {
	t.Helper()
	awaitAcceptors(t, 1, results)
}

func awaitAcceptors(t testing.TB, n int, results <-chan Accepted) {
	t.Helper()
	buf := make([]byte, 1<<18)
	patience := Patience + time.Duration(n)*50*time.Millisecond
	deadline := time.Now().Add(patience)
	for {
		stacks := buf[:runtime.Stack(buf, true)]
		if len(stacks) == len(buf) { // truncated
			buf = make([]byte, 2*len(buf))
			continue
		}
		blocked := 0
		self, _, _ := bytes.Cut(stacks, []byte(" [")) // "goroutine 20": the calling one is the first
		for _, g := range bytes.Split(stacks, []byte("\n\n")) {
			state, stack, _ := bytes.Cut(g, []byte("\n"))
			waiting := bytes.Contains(state, []byte("[IO wait")) ||
				bytes.Contains(state, []byte("[semacquire"))
			ours := bytes.Contains(stack, fmt.Appendf(nil, " in %s\n", self))
			if waiting && ours && bytes.Contains(stack, []byte("internal/poll.(*FD).Accept")) {
				blocked++
			}
		}
		if blocked >= n || len(results) > 0 {
			return
		}
		if time.Now().After(deadline) {
			require.FailNow(t, fmt.Sprintf("%d of %d goroutines are blocked in Accept after %v",
				blocked, n, patience))
		}
		time.Sleep(time.Duration(n) * time.Microsecond) // runtime.Stack stops all goroutines
	}
}

// Receive returns the next value from ch. If it takes too long, the test fails, and the
// message says what is missing.
func Receive[T any](t testing.TB, ch <-chan T, what string) T {
	t.Helper()
	return ReceiveWithin(t, Patience, ch, what)
}

// ReceiveWithin is Receive with another time than Patience.
func ReceiveWithin[T any](t testing.TB, patience time.Duration, ch <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(patience):
		require.FailNow(t, "missing after "+patience.String()+": "+what)
		panic("unreachable")
	}
}

// Await waits until the condition is true. If it takes too long, the test fails, and the
// message says what is missing.
func Await(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(Patience); !condition(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			require.FailNow(t, "missing after "+Patience.String()+": "+what)
		}
	}
}

// RequireMedian requires the median of several durations to be less than limit. On a busy machine,
// some of them are longer.
func RequireMedian(t testing.TB, limit time.Duration, what string, measure func() time.Duration) {
	t.Helper()
	took := make([]time.Duration, 21)
	for i := range took {
		took[i] = measure()
	}
	slices.Sort(took)
	require.Less(t, took[len(took)/2], limit, "median of the %s: %v", what, took)
}

// Countdown returns a channel that is closed when count is called for the n-th time.
func Countdown(n int64) (count func(), done <-chan struct{}) {
	var counted atomic.Int64
	ch := make(chan struct{})
	return func() {
		if counted.Add(1) == n {
			close(ch)
		}
	}, ch
}

// RequireClient receives the result of an Accept, which must be the client's connection.
func RequireClient(t testing.TB, client net.Conn, results <-chan Accepted) {
	t.Helper()
	got := Receive(t, results, "return of Accept with the client's connection")
	require.NoError(t, got.Err)
	defer got.Conn.Close()
	want := client.LocalAddr().String()
	require.Equal(t, want, got.Conn.RemoteAddr().String(), "address of the client")
}

// RequireStopped receives n results, which must be StoppedError.
func RequireStopped(t testing.TB, results <-chan Accepted, n int) {
	t.Helper()
	requireStopped(t, results, n, "Stop")
}

func requireStopped(t testing.TB, results <-chan Accepted, n int, stop string) {
	t.Helper()
	for range n {
		RequireStoppedError(t, Receive(t, results, "return of Accept after "+stop).Err)
	}
}

// RequireStoppedError requires err to be that very value, unwrapped.
func RequireStoppedError(t testing.TB, err error) {
	t.Helper()
	if err != stoppablelistener.StoppedError {
		require.FailNow(t, fmt.Sprintf("the error is not StoppedError: %v", err))
	}
}

// SkipIfShort skips the test in a short run.
func SkipIfShort(t testing.TB, why string) {
	t.Helper()
	if testing.Short() {
		t.Skip(why)
	}
}

// Rounds is n, or a tenth of it in a short run, but at least one.
func Rounds(n int) int {
	if testing.Short() {
		return max(1, n/10)
	}
	return n
}
