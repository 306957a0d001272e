package httpdrain_test

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener/internal/testutil/httpclient"
	"github.com/c2db162c/stoppablelistener/internal/testutil/httpload"
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
		"drain":          drains,
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
				b.ReportMetric(float64(n)/float64(b.N*replacedInstances), variant+"-failed/instance")
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
			"Drain": func(t testing.TB, server *http.Server, l *serviceListener, _ time.Duration) running {
				l.drain = l.StoppableListener.Drain
				r := drains(t, server, l, 0)
				return running{func() { r.stop(); _ = l.StoppableListener.Close() }, r.wait}
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

// BenchmarkRequest measures what a Drainer adds to each HTTP/1 request that is served before the
// context is done: the calls of its handler and of its ConnState.
func BenchmarkRequest(b *testing.B) {
	plain := &http.Server{Handler: nothing, ConnState: func(net.Conn, http.ConnState) {}}
	s := newService(b, tcptest.Listen(b), nil, nothing)
	s.server.ConnState = plain.ConnState
	conn, _ := s.start(b).accept(b)
	w, r := httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil)
	for variant, server := range map[string]*http.Server{"plain": plain, "drainer": s.server} {
		b.Run(variant, func(b *testing.B) {
			b.ReportAllocs()
			for range b.N {
				server.ConnState(conn, http.StateActive)
				server.Handler.ServeHTTP(w, r)
				server.ConnState(conn, http.StateIdle)
			}
		})
	}
}
