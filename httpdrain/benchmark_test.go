package httpdrain_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener/internal/testutil/httpclient"
	"github.com/c2db162c/stoppablelistener/internal/testutil/httpload"
	"github.com/c2db162c/stoppablelistener/internal/testutil/proctest"
	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

// BenchmarkNextServer counts the requests that fail because a server is shut down and the next one
// serves the same socket, and measures the longest of the others.
func BenchmarkNextServer(b *testing.B) {
	const servers = 100
	for name, k := range map[string]kind{"new connections": {}, "keep-alive": {keepAlive: true}} {
		b.Run(name, func(b *testing.B) {
			failed := make(map[string]int64)
			longest := make(map[string]time.Duration)
			for range b.N {
				for variant, start := range map[string]startFunc{"drain": drains, "Shutdown": shutsDown} {
					load := drainUnderLoad(b, k, servers, start)
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
	variants := map[string]startFunc{
		"Shutdown": func(t testing.TB, server *http.Server, l *serviceListener, _ time.Duration) running {
			return shutsDown(t, server, l, 0)
		},
		"sleep+Shutdown": shutsDown,
		"drain":          drainsAfterDelay,
	}
	for name, k := range rollingKinds {
		b.Run(name, func(b *testing.B) {
			failed := make(map[string]int64)
			for range b.N {
				for variant, start := range variants {
					for _, load := range rollingUpdate(b, k, start) {
						failed[variant] += load.Failed()
					}
				}
			}
			for variant, n := range failed {
				b.ReportMetric(float64(n)/float64(b.N*3), variant+"-failed/instance")
			}
			b.ReportMetric(0, "ns/op")
		})
	}
}

// BenchmarkLastStop counts the clients that lose a request because a server is shut down, and no
// other serves the socket: their last request fails, but not because its connection is refused.
// Half of the clients keep their connections. It also measures the time until the shutdown is over.
func BenchmarkLastStop(b *testing.B) {
	lost := make(map[string]int64)
	took := make(map[string][]time.Duration)
	for range b.N {
		for variant, startServer := range map[string]startFunc{
			"Shutdown": func(t testing.TB, server *http.Server, l *serviceListener, _ time.Duration) running {
				go server.Serve(l.TCPListener)
				return running{func() {}, func() error { return server.Shutdown(context.Background()) }}
			},
			"Stop": drainsAndCloses,
			"Drain": func(t testing.TB, server *http.Server, l *serviceListener, d time.Duration) running {
				l.drain = l.StoppableListener.Drain
				return drainsAndCloses(t, server, l, d)
			},
		} {
			k := kind{keepAlive: true}
			l := listen(b, tcptest.Listen(b))
			server := startServer(b, k.newServer(nil, func() {}), l, 0)
			wait := httpload.PostUntilError("http://"+l.Addr().String(), 480, func(i int) *http.Client {
				return httpclient.NewClient(nil, false, i%2 == 0)
			})
			start := time.Now()
			server.stop()
			require.NoError(b, server.wait())
			took[variant] = append(took[variant], time.Since(start))
			for _, err := range wait() {
				if !tcptest.IsRefused(err) {
					lost[variant]++
				}
			}
		}
	}
	for variant, n := range lost {
		b.ReportMetric(float64(n)/float64(b.N), variant+"-lost/stop")
	}
	for variant, durations := range took {
		slices.Sort(durations)
		b.ReportMetric(float64(durations[b.N/2].Microseconds())/1000, variant+"-ms")
	}
	b.ReportMetric(0, "ns/op")
}

// drainsAndCloses starts a server that a Drainer shuts down, after which it closes the socket.
func drainsAndCloses(t testing.TB, server *http.Server, l *serviceListener, d time.Duration) running {
	r := drains(t, server, l, d)
	stop := r.stop
	r.stop = func() { stop(); _ = l.StoppableListener.Close() }
	return r
}

// BenchmarkRequest measures what a Drainer adds to each HTTP/1 request that is served before the
// context is done: the calls of its handler and of its ConnState.
func BenchmarkRequest(b *testing.B) {
	const requests = 1000
	plain := &http.Server{Handler: nothing, ConnState: func(net.Conn, http.ConnState) {}}
	s := newService(b, tcptest.Listen(b), nil, nothing)
	s.server.ConnState = plain.ConnState
	conn, _ := s.start(b).accept(b)
	w, r := httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil)
	times := make(map[*http.Server][]float64)
	request := func(server *http.Server) {
		server.ConnState(conn, http.StateActive)
		server.Handler.ServeHTTP(w, r)
		server.ConnState(conn, http.StateIdle)
	}
	for range b.N {
		for _, server := range []*http.Server{plain, s.server} {
			start := time.Now()
			for range requests {
				request(server)
			}
			times[server] = append(times[server], float64(time.Since(start).Nanoseconds())/requests)
		}
	}
	for name, server := range map[string]*http.Server{"plain": plain, "drainer": s.server} {
		slices.Sort(times[server])
		b.ReportMetric(times[server][b.N/2], name+"-ns/request")
	}
	b.ReportMetric(testing.AllocsPerRun(1000, func() { request(s.server) }), "drainer-allocs/request")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkDrainOfIdleConnections measures the time that Drain takes beyond the grace period
// to close 10,000 idle connections. Their clients are in another process, because of the
// limit of open files.
func BenchmarkDrainOfIdleConnections(b *testing.B) {
	var took time.Duration
	for range b.N {
		s := newService(b, tcptest.Listen(b), nil, hello)
		s.drainer.Grace = shortGrace
		s.start(b)
		p := proctest.Start(b, exec.Command(proctest.Self(b), "idle clients", s.l.Addr().String()))
		idle := func() bool { return s.countConns(http.StateIdle) == idleConns }
		for deadline := time.Now().Add(6 * tcptest.Patience); !idle(); time.Sleep(10 * time.Millisecond) {
			require.True(b, time.Now().Before(deadline), "not all connections are idle: %s", p.Errors(b))
		}
		s.drain(b)
		start := time.Now()
		require.NoError(b, <-s.served)
		took += time.Since(start) - shortGrace
		p.RequireStatus(b, 0) // each connection is closed
	}
	b.ReportMetric(float64(took.Milliseconds())/float64(b.N), "ms/drain")
	b.ReportMetric(0, "ns/op")
}

// idleConns is how many connections the clients of that benchmark have.
const idleConns = 10_000

func init() { programs["idle clients"] = idleClients }

// idleClients makes the connections to the address that is the second argument, sends a request on each, and waits until the server
// has closed all of them.
func idleClients() {
	b, addr := proctest.TB{}, os.Args[2]
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
