package httpdrain_test

import (
	"context"
	"crypto/tls"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
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
	t.Parallel()
	for name, tt := range map[string]struct {
		client
		servers int
	}{
		"new connections": {client{}, 80},
		"keep-alive":      {client{keepAlive: true}, 80},
		"TLS":             {client{tls: true, keepAlive: true}, 20}, // most of it for handshakes
		"HTTP/2":          {client{tls: true, http2: true, keepAlive: true}, 20},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			load := drainUnderLoad(t, tt.client, tcptest.Rounds(tt.servers),
				func(s *service, ctx context.Context) error { return s.drainer.Drain(ctx) })
			load.RequireNoneFailed(t)
		})
	}
}

// drainUnderLoad serves one socket with one server after another, each of which is shut down
// while clients post without pause.
func drainUnderLoad(
	t testing.TB, c client, servers int, shutdown func(*service, context.Context) error,
) *httpload.Load {
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

// Rolling update: each of three instances is shut down after the other, and replaced. The load
// balancer picks an instance for each connection, as a Kubernetes Service does.

const (
	rollingGrace = 400 * time.Millisecond
	rollingDelay = 3 * rollingGrace       // the load balancer notices after half of it
	slowInterval = 600 * time.Millisecond // between the grace and delay + grace
	oneWayDelay  = 10 * time.Millisecond
)

func TestRollingUpdateFailsNoRequest(t *testing.T) {
	tcptest.SkipIfShort(t, "takes some seconds")
	t.Parallel()
	for name, http2 := range map[string]bool{"HTTP/1": false, "HTTP/2": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, load := range rollingUpdate(t, http2, inDocumentedOrder) {
				load.RequireNoneFailed(t)
			}
		})
	}
}

// inDocumentedOrder is the order of section "Load balancers". The caller has stopped the probe.
func inDocumentedOrder(t testing.TB, s *service) {
	s.drainer.DisableKeepAlives()
	time.Sleep(rollingDelay)
	s.sl.Drain()
	tcptest.RequireStoppedError(t, tcptest.Receive(t, s.served, "return of Serve"))
	assert.NoError(t, s.sl.Close())
	ctx, cancel := context.WithTimeout(context.Background(), tcptest.Patience)
	defer cancel()
	assert.NoError(t, s.drainer.Drain(ctx))
}

// rollingUpdate replaces three instances under load, one after the other.
func rollingUpdate(
	t testing.TB, http2 bool, shutDown func(testing.TB, *service),
) (loads []*httpload.Load) {
	var config *tls.Config
	url := "http://balancer"
	if http2 {
		config = httpclient.ServerTLS()
		url = "https://balancer"
	}
	noticing, retrying := new(balancer), &balancer{retries: true}
	start := func() *service {
		s := startService(t, tcptest.Listen(t), config, http.HandlerFunc(
			func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(w, r.Body) }))
		s.drainer.Grace = rollingGrace
		noticing.add(s.sl.Addr().String())
		retrying.add(s.sl.Addr().String())
		return s
	}
	running := []*service{start(), start(), start()}

	load := func(b *balancer, clients int, keepAlive bool, pause time.Duration) {
		loads = append(loads, httpload.Start(t, url, clients, httpload.Echo, func() *http.Client {
			client := httpclient.NewClient(config, http2, keepAlive)
			transport := client.Transport.(*http.Transport)
			transport.DialContext = b.dial
			client.Transport = paced{transport, pause}
			return client
		}))
	}
	load(noticing, 8, true, 0)
	if !http2 {
		load(noticing, 4, false, 0)
		load(noticing, 200, true, slowInterval) // so many that some send when it matters
		if tcptest.RefusesAfterDrain() {        // otherwise, they lose what is in the accept queue
			load(retrying, 16, false, 0)
		}
	}
	for _, s := range running {
		loads[0].AwaitRequests(t, 100)
		start()
		addr := s.sl.Addr().String()
		notice := time.AfterFunc(rollingDelay/2, func() { noticing.remove(addr) })
		shutDown(t, s)
		notice.Stop()
		noticing.remove(addr)
	}
	for _, load := range loads {
		load.Stop()
	}
	return loads
}

// paced is a transport of clients that wait before each request.
type paced struct {
	*http.Transport
	pause time.Duration
}

func (p paced) RoundTrip(r *http.Request) (*http.Response, error) {
	time.Sleep(p.pause)
	return p.Transport.RoundTrip(r)
}

// A balancer picks an instance for each connection. One that retries never notices, and tries
// another instance if the connection is refused, as nginx does; it is near the instances.
type balancer struct {
	retries bool

	mu    sync.Mutex // guards addrs
	addrs []string
}

func (b *balancer) add(addr string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.addrs = append(b.addrs, addr)
}

func (b *balancer) remove(addr string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.addrs = slices.DeleteFunc(b.addrs, func(a string) bool { return a == addr })
}

func (b *balancer) dial(ctx context.Context, network, _ string) (net.Conn, error) {
	for {
		b.mu.Lock()
		addr := b.addrs[rand.IntN(len(b.addrs))]
		b.mu.Unlock()
		conn, err := new(net.Dialer).DialContext(ctx, network, addr)
		switch {
		case err == nil && b.retries:
			return conn, nil
		case err == nil:
			return delayConn(conn), nil
		case !b.retries || !tcptest.IsRefused(err):
			return nil, err
		}
	}
}

// delayConn returns a connection on which everything arrives later, as on a long path.
func delayConn(conn net.Conn) net.Conn {
	client, far := net.Pipe()
	go copyDelayed(conn, far)
	go copyDelayed(far, conn)
	return client
}

// copyDelayed copies from src to dst until that fails, and closes dst.
func copyDelayed(dst, src net.Conn) {
	type packet struct {
		due  time.Time
		data []byte
	}
	packets := make(chan packet, 1000)
	go func() {
		defer close(packets)
		for {
			data := make([]byte, 4096)
			n, err := src.Read(data)
			if err != nil {
				return
			}
			packets <- packet{time.Now().Add(oneWayDelay), data[:n]}
		}
	}()
	for p := range packets {
		time.Sleep(time.Until(p.due))
		if _, err := dst.Write(p.data); err != nil {
			src.Close()
		}
	}
	dst.Close()
}
