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

	"github.com/c2db162c/stoppablelistener/httpdrain"
	"github.com/c2db162c/stoppablelistener/internal/testutil/httpclient"
	"github.com/c2db162c/stoppablelistener/internal/testutil/httpload"
	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

// A kind of clients of a load, and of their server.
type kind struct {
	servers               int // one after another
	tls, http2, keepAlive bool
	shared                bool // the clients share one HTTP/2 connection, far from the server
	h2c                   func(*http.Server, *http.Transport)
}

func (k kind) config() *tls.Config {
	if k.tls {
		return httpclient.ServerTLS()
	}
	return nil
}

// newServer returns a server that responds with the body of the request.
func (k kind) newServer(config *tls.Config, handled func()) *http.Server {
	server := &http.Server{TLSConfig: config.Clone()}
	server.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		handled()
		_, _ = io.Copy(w, r.Body)
	})
	if k.h2c != nil {
		k.h2c(server, new(http.Transport))
	}
	return server
}

func (k kind) url(addr string) string {
	if k.tls {
		return "https://" + addr
	}
	return "http://" + addr
}

type dialFunc func(ctx context.Context, network, addr string) (net.Conn, error)

// clients returns a function that returns the clients, which pause before each request.
func (k kind) clients(config *tls.Config, pause time.Duration, dial dialFunc) func() *http.Client {
	newClient := func() *http.Client {
		client := httpclient.NewClient(config, k.http2, k.keepAlive)
		transport := client.Transport.(*http.Transport)
		if k.h2c != nil {
			k.h2c(new(http.Server), transport)
		}
		if dial != nil {
			transport.DialContext = dial
		}
		client.Transport = paced{transport, pause}
		return client
	}
	if k.shared {
		client := newClient()
		return func() *http.Client { return client }
	}
	return newClient
}

// dialFar connects to a server on a long path.
func dialFar(ctx context.Context, network, addr string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	return delayConn(conn), nil
}

// A running server stops when stop is called, which returns when its accept loop has returned.
// Then wait returns when the shutdown is over.
type running struct {
	stop func()
	wait func() error
}

// A startFunc starts a server of l; delay is how long a load balancer needs.
type startFunc func(t testing.TB, server *http.Server, l *serviceListener, delay time.Duration) running

// drains starts a server that a Drainer shuts down.
func drains(t testing.TB, server *http.Server, l *serviceListener, delay time.Duration) running {
	s := &service{server: server, drainer: httpdrain.New(server), l: l, config: server.TLSConfig}
	s.drainer.Delay, s.drainer.Grace = delay, 2*tcptest.Patience
	if delay > 0 {
		s.drainer.Grace = rollingGrace
	}
	s.drainer.Timeout = 3 * tcptest.Patience
	s.start(t)
	return running{func() { s.drain(t) }, func() error { return <-s.served }}
}

// shutsDown starts a server that Shutdown shuts down.
func shutsDown(_ testing.TB, server *http.Server, l *serviceListener, delay time.Duration) running {
	go func() {
		if server.TLSConfig == nil {
			_ = server.Serve(l)
		} else {
			_ = server.ServeTLS(l, "", "")
		}
	}()
	return running{
		stop: func() { time.Sleep(delay); l.Stop(); <-l.closed },
		wait: func() error { return server.Shutdown(context.Background()) },
	}
}

func TestServeFailsNoRequestUnderLoad(t *testing.T) {
	t.Parallel()
	for name, k := range kinds {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			drainUnderLoad(t, k, tcptest.Rounds(k.servers), drains).RequireNoneFailed(t)
		})
	}
}

var kinds = map[string]kind{
	"new connections": {servers: 6},
	"keep-alive":      {servers: 6, keepAlive: true},
	"TLS":             {servers: 3, tls: true, keepAlive: true}, // most of it for handshakes
	"HTTP/2":          {servers: 3, tls: true, http2: true, keepAlive: true},
}

// drainUnderLoad serves one socket with one server after another, each of which is shut down
// while clients post without pause.
func drainUnderLoad(t testing.TB, k kind, servers int, start startFunc) *httpload.Load {
	clients, perServer, dial := 8, int64(60), dialFunc(nil)
	if k.shared {
		clients, perServer, dial = 32, 320, dialFar
	}
	l := tcptest.Listen(t)
	config, url := k.config(), k.url(l.Addr().String())
	load := httpload.Start(t, url, clients, httpload.Echo, k.clients(config, 0, dial))
	var shutdowns sync.WaitGroup
	for n := range servers + 1 {
		handled, enough := tcptest.Countdown(perServer)
		server := start(t, k.newServer(config, handled), listen(t, l), 0)
		tcptest.Receive(t, enough, "requests")
		if n == servers {
			load.Stop() // no other server comes
		}
		server.stop()
		shutdowns.Add(1)
		go func() {
			defer shutdowns.Done()
			assert.NoError(t, server.wait())
		}()
	}
	shutdowns.Wait()
	return load
}

// Rolling update: instances are shut down one after the other, and replaced. The load balancer
// picks an instance for each connection, as a Kubernetes Service does.

const (
	replacedInstances = 2

	rollingGrace = 600 * time.Millisecond
	rollingDelay = 2 * time.Second // the load balancer notices after a third of it
	slowInterval = time.Second     // between the grace and delay + grace
	oneWayDelay  = 10 * time.Millisecond
)

func TestRollingUpdateFailsNoRequest(t *testing.T) {
	tcptest.SkipIfShort(t, "takes some seconds")
	t.Parallel()
	for name, k := range rollingKinds {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, load := range rollingUpdate(t, k, drains) {
				load.RequireNoneFailed(t)
			}
		})
	}
}

var rollingKinds = map[string]kind{
	"HTTP/1": {keepAlive: true},
	"HTTP/2": {keepAlive: true, http2: true, tls: true},
}

// rollingUpdate replaces two of three instances under load, one after the other.
func rollingUpdate(t testing.TB, k kind, startServer startFunc) (loads []*httpload.Load) {
	config := k.config()
	type instance struct {
		running
		l *serviceListener
	}
	noticing, retrying := new(balancer), &balancer{retries: true}
	start := func() instance {
		l := listen(t, tcptest.Listen(t))
		l.drain = l.StoppableListener.Drain
		s := startServer(t, k.newServer(config, func() {}), l, rollingDelay)
		noticing.add(l.Addr().String())
		retrying.add(l.Addr().String())
		return instance{s, l}
	}
	instances := []instance{start(), start(), start()}

	load := func(b *balancer, clients int, k kind, pause time.Duration) {
		newClient := k.clients(config, pause, b.dial)
		loads = append(loads, httpload.Start(t, k.url("balancer"), clients, httpload.Echo, newClient))
	}
	switch {
	case k.shared:
		for range 3 {
			load(noticing, 16, k, 0)
		}
	case k.http2:
		load(noticing, 8, k, 0)
	default:
		load(noticing, 8, k, 0)
		load(noticing, 4, kind{}, 0)
		load(noticing, 100, k, slowInterval) // so many that some send when it matters
	}
	// Where nothing is refused, those that retry lose what is in the accept queue.
	retries := !k.http2 && tcptest.RefusesAfterDrain()
	var shutdowns sync.WaitGroup
	for _, s := range instances[:replacedInstances] {
		loads[0].AwaitRequests(t, 100)
		start()
		addr := s.l.Addr().String()
		notice := time.AfterFunc(rollingDelay/3, func() { noticing.remove(addr) })
		stopped := make(chan struct{})
		go func() {
			defer close(stopped)
			s.stop()
		}()
		if retries {
			time.Sleep(rollingDelay * 9 / 10) // they keep the processors busy, and only the end matters
			load(retrying, 16, kind{}, 0)
		}
		<-stopped
		assert.NoError(t, s.l.StoppableListener.Close())
		if retries {
			loads[len(loads)-1].Stop()
		}
		shutdowns.Add(1)
		go func() {
			defer shutdowns.Done()
			assert.NoError(t, s.wait())
			notice.Stop()
			noticing.remove(addr)
		}()
	}
	shutdowns.Wait()
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
