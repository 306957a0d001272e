package httpdrain_test

import (
	"context"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener"
	"github.com/c2db162c/stoppablelistener/httpdrain"
	"github.com/c2db162c/stoppablelistener/internal/testutil/httpclient"
	"github.com/c2db162c/stoppablelistener/internal/testutil/httpload"
	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

// BenchmarkLastStop counts the clients that lose a request because a server is shut down, and no
// other serves the socket: their last request fails, but not because its connection is refused. It
// also measures the time until Serve returns.
func BenchmarkLastStop(b *testing.B) {
	lost := make(map[string]int64)
	returned := make(map[string]time.Duration)
	for range b.N {
		for variant, shutdown := range map[string]func(*lastServer, context.Context) error{
			"Shutdown": func(s *lastServer, ctx context.Context) error {
				return s.server.Shutdown(ctx)
			},
			"Stop": func(s *lastServer, ctx context.Context) error {
				s.sl.Stop()
				<-s.served
				return s.drainer.Drain(ctx)
			},
			"Drain": func(s *lastServer, ctx context.Context) error {
				s.sl.Drain()
				<-s.served
				return s.drainer.Drain(ctx)
			},
		} {
			n, took := shutDownLastServer(b, shutdown)
			lost[variant] += n
			returned[variant] += took
		}
	}
	for variant, n := range lost {
		b.ReportMetric(float64(n)/float64(b.N), variant+"-lost/stop")
		b.ReportMetric(float64(returned[variant].Milliseconds())/float64(b.N), variant+"-serve-ms")
	}
	b.ReportMetric(0, "ns/op")
}

// A lastServer serves a listener and closes it.
type lastServer struct {
	server  *http.Server
	drainer *httpdrain.Drainer
	sl      *stoppablelistener.StoppableListener
	served  chan struct{} // no values sent; closed when Serve has returned
}

// shutDownLastServer shuts down a server while clients post, half of them on a new connection for
// each request. It returns how many of them lose a request, and the time until Serve returns.
func shutDownLastServer(
	b *testing.B, shutdown func(*lastServer, context.Context) error,
) (lost int64, took time.Duration) {
	l := tcptest.Listen(b)
	handler := func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(w, r.Body) }
	s := &lastServer{
		server: &http.Server{Handler: http.HandlerFunc(handler)},
		sl:     tcptest.Wrap(b, l),
		served: make(chan struct{}),
	}
	s.drainer = httpdrain.New(s.server)
	var returned time.Time
	go func() {
		_ = s.server.Serve(s.sl)
		returned = time.Now()
		close(s.served)
	}()

	wait := httpload.PostUntilError("http://"+l.Addr().String(), 480, func(i int) *http.Client {
		return httpclient.NewClient(nil, false, i%2 == 0)
	})
	ctx, cancel := context.WithTimeout(context.Background(), 3*tcptest.Patience)
	defer cancel()
	start := time.Now()
	require.NoError(b, shutdown(s, ctx))
	<-s.served
	for _, err := range wait() {
		if !tcptest.IsRefused(err) {
			lost++
		}
	}
	return lost, returned.Sub(start)
}
