package httpdrain_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener/httpdrain"
	"github.com/c2db162c/stoppablelistener/internal/testutil/proctest"
	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

// BenchmarkDrain counts the requests that fail because a server is shut down and the next one
// serves the same socket, and measures the longest of the others.
func BenchmarkDrain(b *testing.B) {
	const servers = 100
	for name, c := range map[string]client{"new connections": {}, "keep-alive": {keepAlive: true}} {
		b.Run(name, func(b *testing.B) {
			failed := make(map[string]int64)
			longest := make(map[string]time.Duration)
			for range b.N {
				for variant, shutdown := range map[string]func(*service, context.Context) error{
					"drain":    func(s *service, ctx context.Context) error { return s.drainer.Drain(ctx) },
					"Shutdown": func(s *service, ctx context.Context) error { return s.server.Shutdown(ctx) },
				} {
					load := drainUnderLoad(b, c, servers, shutdown)
					failed[variant] += load.Failed()
					longest[variant] = max(longest[variant], load.Longest())
				}
			}
			for variant, n := range failed {
				b.ReportMetric(float64(n)/float64(b.N*servers), variant+"-failed/server")
				b.ReportMetric(float64(longest[variant].Milliseconds()), variant+"-longest-ms")
			}
			b.ReportMetric(0, "ns/op")
		})
	}
}

// BenchmarkRollingUpdate counts the requests that fail because an instance behind a load balancer
// is replaced.
func BenchmarkRollingUpdate(b *testing.B) {
	shutdown := func(t testing.TB, s *service) {
		assert.NoError(t, s.server.Shutdown(context.Background()))
		assert.NoError(t, s.sl.Close())
	}
	variants := map[string]func(testing.TB, *service){
		"Shutdown":       shutdown,
		"sleep+Shutdown": func(t testing.TB, s *service) { time.Sleep(rollingDelay); shutdown(t, s) },
		"drain":          inDocumentedOrder,
	}
	failed := make(map[string]int64)
	for range b.N {
		for variant, shutDown := range variants {
			for _, http2 := range []bool{false, true} {
				for _, load := range rollingUpdate(b, http2, shutDown) {
					failed[variant] += load.Failed()
				}
			}
		}
	}
	for variant, n := range failed {
		b.ReportMetric(float64(n)/float64(b.N*6), variant+"-failed/instance")
	}
	b.ReportMetric(0, "ns/op")
}

// BenchmarkRequest measures what a Drainer adds to each request that is served before Drain:
// the calls of its handler and of its ConnState.
func BenchmarkRequest(b *testing.B) {
	const requests = 1000
	plain := &http.Server{Handler: nothing, ConnState: func(net.Conn, http.ConnState) {}}
	drained := &http.Server{Handler: nothing, ConnState: func(net.Conn, http.ConnState) {}}
	httpdrain.New(drained)
	conn, _ := net.Pipe()
	drained.ConnState(conn, http.StateNew)
	w, r := httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil)
	times := make(map[*http.Server][]float64)
	for range b.N {
		for _, server := range []*http.Server{plain, drained} {
			start := time.Now()
			for range requests {
				server.ConnState(conn, http.StateActive)
				server.Handler.ServeHTTP(w, r)
				server.ConnState(conn, http.StateIdle)
			}
			times[server] = append(times[server], float64(time.Since(start).Nanoseconds())/requests)
		}
	}
	for name, server := range map[string]*http.Server{"plain": plain, "drainer": drained} {
		slices.Sort(times[server])
		b.ReportMetric(times[server][b.N/2], name+"-ns/request")
	}
	b.ReportMetric(0, "ns/op")
}

// BenchmarkDrainOfIdleConnections measures the time that Drain takes beyond the grace period
// to close 10,000 idle connections. Their clients are in another process, because of the
// limit of open files.
func BenchmarkDrainOfIdleConnections(b *testing.B) {
	var took time.Duration
	for range b.N {
		s := startService(b, tcptest.Listen(b), nil, hello)
		s.drainer.Grace = shortGrace
		p := proctest.Start(b, exec.Command(proctest.Self(b), s.sl.Addr().String()))
		idle := func() bool { return s.countConns(http.StateIdle) == idleConns }
		for deadline := time.Now().Add(6 * tcptest.Patience); !idle(); time.Sleep(10 * time.Millisecond) {
			require.True(b, time.Now().Before(deadline), "not all connections are idle: %s", p.Errors(b))
		}
		s.stop(b)
		start := time.Now()
		require.NoError(b, s.drainer.Drain(context.Background()))
		took += time.Since(start) - shortGrace
		p.RequireStatus(b, 0) // each connection is closed
	}
	b.ReportMetric(float64(took.Milliseconds())/float64(b.N), "ms/drain")
	b.ReportMetric(0, "ns/op")
}

// idleConns is how many connections the clients of that benchmark have.
const idleConns = 10_000

// idleClients makes the connections to addr, sends a request on each, and waits until the server
// has closed all of them. TestMain runs it in the process that the benchmark starts.
func idleClients(addr string) {
	b := proctest.TB{}
	conns := make([]net.Conn, idleConns)
	for i := range conns {
		conn, err := net.Dial("tcp", addr)
		require.NoError(b, err)
		_, err = fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: test\r\n\r\n")
		require.NoError(b, err)
		conns[i] = conn
	}
	for _, conn := range conns {
		_, err := io.Copy(io.Discard, conn)
		require.NoError(b, err)
	}
}
