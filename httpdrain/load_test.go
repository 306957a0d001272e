package httpdrain_test

import (
	"context"
	"crypto/tls"
	"io"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/c2db162c/stoppablelistener/internal/testutil/httpclient"
	"github.com/c2db162c/stoppablelistener/internal/testutil/httpload"
	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

// A client is a kind of client of a load.
type client struct {
	tls, http2, keepAlive bool
}

func TestDrainFailsNoRequestUnderLoad(t *testing.T) {
	for name, tt := range map[string]struct {
		client
		servers int
	}{
		"new connections": {client{}, 300},
		"keep-alive":      {client{keepAlive: true}, 300},
		"TLS":             {client{tls: true, keepAlive: true}, 50},              // handshakes take most of the time
		"HTTP/2":          {client{tls: true, http2: true, keepAlive: true}, 10}, // each takes a grace period
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			load := drainUnderLoad(t, tt.client, tcptest.Rounds(tt.servers), func(s *service, ctx context.Context) error {
				return s.drainer.Drain(ctx)
			})
			load.RequireNoneFailed(t)
		})
	}
}

// drainUnderLoad serves one socket with one server after another, each of which is shut down
// while clients post without pause.
func drainUnderLoad(t testing.TB, c client, servers int, shutdown func(*service, context.Context) error) *httpload.Load {
	const clients, perServer = 8, 60
	l := tcptest.Listen(t)
	var config *tls.Config
	url := "http://" + l.Addr().String()
	if c.tls {
		config = httpclient.ServerTLS()
		url = "https://" + l.Addr().String()
	}
	load := httpload.Start(t, url, clients, httpload.Echo, func() *http.Client {
		return httpclient.NewClient(config, c.http2, c.keepAlive)
	})
	var shutdowns sync.WaitGroup
	for n := range servers + 1 {
		handled, enough := tcptest.Countdown(perServer)
		s := startService(t, l, config, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			handled()
			_, _ = io.Copy(w, r.Body)
		}))
		s.drainer.Grace = time.Second
		if c.http2 {
			s.drainer.Grace = 400 * time.Millisecond // until then, the clients stay with this server
		}
		tcptest.Receive(t, enough, "requests")
		if n == servers {
			load.Stop() // no other server comes
		}
		s.stop(t)
		shutdowns.Add(1)
		go func() {
			defer shutdowns.Done()
			ctx, cancel := context.WithTimeout(context.Background(), 3*tcptest.Patience)
			defer cancel()
			assert.NoError(t, shutdown(s, ctx))
		}()
	}
	shutdowns.Wait()
	return load
}
