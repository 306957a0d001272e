package main

import (
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/c2db162c/stoppablelistener/internal/testutil/httpclient"
	"github.com/c2db162c/stoppablelistener/internal/testutil/proctest"
	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

// In the processes that the tests start, the test binary is the program.
func TestMain(m *testing.M) { proctest.Main(m, func(string) { main() }) }

// startServing starts the program at path on a free port.
func startServing(
	t testing.TB, path string, args ...string,
) (p *proctest.Program, addr string) {
	t.Helper()
	addr = tcptest.FreeAddr(t)
	return start(t, exec.Command(path, append([]string{"-addr", addr}, args...)...)), addr
}

func start(t testing.TB, cmd *exec.Cmd) *proctest.Program {
	t.Helper()
	p := proctest.Start(t, cmd)
	p.RequireLines(t, "Serving HTTP")
	return p
}

// startRequest sends a request without its body of one byte, which the server waits for. It
// returns when the connection is not in the accept queue any more.
func startRequest(t testing.TB, addr string) *httpclient.Conn {
	t.Helper()
	c := httpclient.Dial(t, addr, nil)
	c.Send(t, "POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 1\r\n\r\n")
	later := httpclient.Dial(t, addr, nil)
	later.Get(t, "/")
	later.Response(t)
	later.Close()
	return c
}

// requireStopping requires the lines of the program after a signal.
func requireStopping(t testing.TB, p *proctest.Program, sig os.Signal) {
	t.Helper()
	p.RequireLines(t, "Got signal:"+sig.String(), "Stopping listener", "Waiting on server")
}

func TestSignalShutsDownGracefully(t *testing.T) {
	t.Parallel()
	for _, sig := range []os.Signal{os.Interrupt, syscall.SIGTERM} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			p, addr := startServing(t, proctest.Self(t))
			half := httpclient.Dial(t, addr, nil)
			half.Send(t, "GET / HTTP/1.1\r\nHost:")
			inFlight := startRequest(t, addr)
			proctest.Signal(t, p.Process, sig)
			requireStopping(t, p, sig)
			tcptest.AwaitRefused(t, addr)
			half.Send(t, " test\r\n\r\n")
			_, body := half.Response(t)
			assert.Equal(t, "Hello HTTP!\n", body)
			half.Close()
			inFlight.Finish(t, "Hello HTTP!\n")
			p.RequireStatus(t, 0)
			p.RequireNoProcess(t)
			assert.Empty(t, p.Errors(t))
		})
	}
}

func TestSecondSignalExitsAtOnce(t *testing.T) {
	t.Parallel()
	p, addr := startServing(t, proctest.Self(t))
	inFlight := startRequest(t, addr)
	proctest.Signal(t, p.Process, os.Interrupt)
	requireStopping(t, p, os.Interrupt)
	start := time.Now()
	server := p.Next(t)
	tcptest.Await(t, "exit after the second signal", func() bool {
		_ = p.Process.Signal(os.Interrupt) // one that comes too soon counts for nothing
		select {
		case <-server.Exited:
			return true
		default:
			return false
		}
	})
	p.RequireStatus(t, 1)
	assert.Less(t, time.Since(start), tcptest.Patience/2, "time until exit")
	assert.Empty(t, p.Errors(t))
	inFlight.AwaitClosed(t)
}

func TestRequestsInFlightAreAbortedAfterTheTimeout(t *testing.T) {
	t.Parallel()
	p, addr := startServing(t, proctest.Self(t), "-timeout", "100ms")
	inFlight := startRequest(t, addr)
	proctest.Signal(t, p.Process, os.Interrupt)
	requireStopping(t, p, os.Interrupt)
	inFlight.AwaitClosed(t)
	p.RequireStatus(t, 1)
	want := "httpdrain: requests aborted: 1: context deadline exceeded\n"
	assert.Equal(t, want, p.Errors(t))
}

func TestErrors(t *testing.T) {
	t.Parallel()
	busy := tcptest.Listen(t).Addr().String()
	for name, tt := range map[string]struct {
		args   []string
		status int
		stderr string // a part of it
	}{
		"busy port":   {[]string{"-addr", busy}, 1, busy},
		"bad address": {[]string{"-addr", "nowhere"}, 1, "address nowhere: missing port"},
		"bad flag":    {[]string{"-port", "80"}, 2, "-port"},
		"no value":    {[]string{"-addr"}, 2, "-addr"},
		"help":        {[]string{"-h"}, 0, "serve HTTP on host:port"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := proctest.Start(t, exec.Command(proctest.Self(t), tt.args...))
			assert.Equal(t, "EOF", p.Line(t))
			p.RequireStatus(t, tt.status)
			assert.Contains(t, p.Errors(t), tt.stderr)
		})
	}
}
