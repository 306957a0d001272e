package httpdrain_test

import (
	"context"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener"
	"github.com/c2db162c/stoppablelistener/httpdrain"
	"github.com/c2db162c/stoppablelistener/internal/testutil/httpclient"
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
	const clients, perClient = 480, 5
	l := tcptest.Listen(b)
	handled, enough := tcptest.Countdown(clients * perClient)
	handler := func(w http.ResponseWriter, r *http.Request) {
		handled()
		_, _ = io.Copy(w, r.Body)
	}
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

	var posting sync.WaitGroup
	var losers atomic.Int64
	for i := range clients {
		posting.Add(1)
		go func() {
			defer posting.Done()
			client := httpclient.NewClient(nil, false, i%2 == 0)
			defer client.CloseIdleConnections()
			if err := postUntilError(client, "http://"+l.Addr().String()); !tcptest.IsRefused(err) {
				losers.Add(1)
			}
		}()
	}
	tcptest.Receive(b, enough, "requests")

	ctx, cancel := context.WithTimeout(context.Background(), 3*tcptest.Patience)
	defer cancel()
	start := time.Now()
	require.NoError(b, shutdown(s, ctx))
	<-s.served
	posting.Wait()
	return losers.Load(), returned.Sub(start)
}

// postUntilError posts until a request fails.
func postUntilError(client *http.Client, url string) error {
	for {
		if _, err := httpclient.Post(client, url, "request"); err != nil {
			return err
		}
	}
}
