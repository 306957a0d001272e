// Package tcptest is what the tests of this module share: listeners, clients, goroutines
// in Accept, and child processes.
package tcptest

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener"
)

// Patience is how long something that happens at once may take on a loaded machine.
// It is well below a poll interval: what only the end of a poll brings comes too late.
const Patience = 10 * time.Second

// Past is a deadline that has passed.
var Past = time.Unix(1, 0)

// Listen returns a listener on a free port, closed when the test ends.
func Listen(t testing.TB) *net.TCPListener {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { l.Close() })
	return l.(*net.TCPListener)
}

// Wrap returns what New makes of l.
func Wrap(t testing.TB, l net.Listener) *stoppablelistener.StoppableListener {
	sl, err := stoppablelistener.New(l)
	require.NoError(t, err)
	return sl
}

// Clients
//
// None resets its connection while the kernel may still queue it: on some systems it would
// never come out of Accept then.

// Dial connects a client that stays until the test ends.
func Dial(t testing.TB, l net.Listener) net.Conn {
	conn := DialOnce(t, l)
	t.Cleanup(func() { conn.Close() })
	return conn
}

// DialOnce connects a client that the caller closes, once it has been accepted. Close
// resets the connection, for thousands of connections that end in order would use the
// machine's ports up.
func DialOnce(t testing.TB, l net.Listener) net.Conn {
	conn, err := net.DialTimeout("tcp", l.Addr().String(), Patience)
	require.NoError(t, err)
	require.NoError(t, conn.(*net.TCPConn).SetLinger(0))
	return conn
}

// Get returns what client gets from the HTTP server on l.
func Get(t testing.TB, client *http.Client, l net.Listener) string {
	resp, err := client.Get("http://" + l.Addr().String())
	require.NoError(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return string(body)
}

// Repeatedly has n goroutines call f again and again, each until f returns false or stop
// is called, which waits for them.
func Repeatedly(t testing.TB, n int, f func() bool) (stop func()) {
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

// AwaitAcceptors returns when n goroutines are blocked in an Accept of package net.
func AwaitAcceptors(t testing.TB, n int) {
	t.Helper()
	buf := make([]byte, 1<<18)
	deadline := time.Now().Add(Patience)
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

// Receive returns the next value from ch, and fails the test if it is long in coming.
func Receive[T any](t testing.TB, ch <-chan T) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(Patience):
		require.FailNow(t, "still waiting", "after %v", Patience)
		panic("unreachable")
	}
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

// RequireClient takes an Accept's result, which must be client's connection.
func RequireClient(t testing.TB, client net.Conn, results <-chan Accepted) {
	t.Helper()
	got := Receive(t, results)
	require.NoError(t, got.Err)
	defer got.Conn.Close()
	require.Equal(t, client.LocalAddr().String(), got.Conn.RemoteAddr().String())
}

// RequireStopped takes n results, which must be StoppedError.
func RequireStopped(t testing.TB, results <-chan Accepted, n int) {
	t.Helper()
	for range n {
		RequireStoppedError(t, Receive(t, results).Err)
	}
}

// RequireStoppedError wants that very value.
func RequireStoppedError(t testing.TB, err error) {
	t.Helper()
	require.True(t, err == stoppablelistener.StoppedError, err)
}

// What a system has

// RequireInheritance skips the test where no child process can inherit a socket.
func RequireInheritance(t testing.TB) {
	t.Helper()
	folder, attr := t.TempDir(), &os.ProcAttr{Files: make([]*os.File, 4)}
	if _, err := os.StartProcess(folder, nil, attr); errors.Is(err, errors.ErrUnsupported) {
		t.Skip("no process can inherit a fourth file: ", err) // else, a folder is no program
	}
}

// childEnv tells a test that it runs in a child process.
const childEnv = "STOPPABLELISTENER_TEST_CHILD"

// ChildProcess is the test binary with this test or benchmark alone, which finds role in
// ChildRole; what it prints is in output. A short run has none.
func ChildProcess(t testing.TB, role string) (cmd *exec.Cmd, output *bytes.Buffer) {
	t.Helper()
	if testing.Short() {
		t.Skip("starts a process")
	}
	exe, err := os.Executable()
	require.NoError(t, err)
	cmd = exec.Command(exe, "-test.run", "^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), childEnv+"="+role)
	output = new(bytes.Buffer)
	cmd.Stdout, cmd.Stderr = output, output
	t.Cleanup(func() {
		if cmd.Process != nil {
			_ = cmd.Process.Kill()
		}
	})
	return cmd, output
}

// ChildRole is what this process was started for by ChildProcess; it is empty if it was not.
func ChildRole() string { return os.Getenv(childEnv) }

// Rounds is n, or a tenth of it in a short run.
func Rounds(n int) int {
	if testing.Short() {
		return n / 10
	}
	return n
}
