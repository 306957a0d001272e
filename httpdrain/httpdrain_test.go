// The tests of this file are the promises of the doc comments. Load is in load_test.go, HTTP/2 in
// http2_test.go.
package httpdrain_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener"
	"github.com/c2db162c/stoppablelistener/httpdrain"
	"github.com/c2db162c/stoppablelistener/internal/replaced"
	"github.com/c2db162c/stoppablelistener/internal/testutil/httpclient"
	"github.com/c2db162c/stoppablelistener/internal/testutil/proctest"
	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

func TestMain(m *testing.M) {
	proctest.Main(m, func(string) { programs[os.Args[1]]() })
}

// programs are what other processes run that a test or benchmark starts, by their first argument.
var programs = map[string]func(){}

// shortGrace is for tests in which the end of the grace period matters.
const shortGrace = 300 * time.Millisecond

// A service is a Drainer that serves a socket, which stays open.
type service struct {
	server  *http.Server
	drainer *httpdrain.Drainer
	l       *serviceListener
	config  *tls.Config // nil without TLS
	stop    func()      // makes the context done
	served  chan error  // what Serve returns

	mu     sync.Mutex // guards states
	states map[net.Conn]http.ConnState
}

// A serviceListener keeps the socket open. Its Drain calls Stop, unless drain is another function.
type serviceListener struct {
	*stoppablelistener.StoppableListener
	drain     func()
	closed    chan struct{} // no values sent; closed by Close
	onceClose func()
}

func listen(t testing.TB, l net.Listener) *serviceListener {
	sl := &serviceListener{StoppableListener: tcptest.Wrap(t, l), closed: make(chan struct{})}
	sl.drain = sl.Stop
	sl.onceClose = sync.OnceFunc(func() { close(sl.closed) })
	return sl
}

func (l *serviceListener) Drain() { l.drain() }

func (l *serviceListener) Close() error { l.Stop(); l.onceClose(); return nil }

// newService returns a service of l, with TLS if config is not nil, that is not started yet. Its
// grace period and timeout are longer than the test, unless the test sets others.
func newService(t testing.TB, l net.Listener, config *tls.Config, handler http.Handler) *service {
	s := &service{
		server: &http.Server{Handler: handler, TLSConfig: config.Clone()},
		l:      listen(t, l),
		config: config,
		states: make(map[net.Conn]http.ConnState),
	}
	s.server.ConnState = func(conn net.Conn, state http.ConnState) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.states[conn] = state
	}
	s.drainer = httpdrain.New(s.server)
	s.drainer.Grace = 2 * tcptest.Patience
	s.drainer.Timeout = 4 * tcptest.Patience
	return s
}

// start starts to serve, with that listener instead of its own, if there is one.
func (s *service) start(t testing.TB, listener ...httpdrain.Listener) *service {
	var l httpdrain.Listener = s.l
	if len(listener) > 0 {
		l = listener[0]
	}
	ctx, cancel := context.WithCancel(context.Background())
	s.stop = cancel
	s.serve(ctx, l)
	t.Cleanup(func() { cancel(); s.server.Close() })
	return s
}

func (s *service) serve(ctx context.Context, l httpdrain.Listener) {
	s.served = make(chan error, 1)
	go func() {
		if s.config == nil {
			s.served <- s.drainer.Serve(ctx, l)
		} else {
			s.served <- s.drainer.ServeTLS(ctx, l, "", "")
		}
	}()
}

func startService(t testing.TB, l net.Listener, config *tls.Config, handler http.Handler) *service {
	return newService(t, l, config, handler).start(t)
}

// drain stops the service, and returns when its accept loop has returned.
func (s *service) drain(t testing.TB) {
	s.stop()
	tcptest.Receive(t, s.l.closed, "return of the accept loop")
}

func (s *service) requireDrained(t testing.TB) {
	t.Helper()
	require.NoError(t, tcptest.Receive(t, s.served, "return of Serve"))
}

// dial connects a client, with TLS if the service has it.
func (s *service) dial(t testing.TB) *httpclient.Conn {
	return httpclient.Dial(t, s.l.Addr().String(), httpclient.ClientTLS(s.config))
}

// get connects a client that requests path.
func (s *service) get(t testing.TB, path string) *httpclient.Conn {
	c := s.dial(t)
	c.Get(t, path)
	return c
}

func (s *service) url() string {
	if s.config != nil {
		return "https://" + s.l.Addr().String()
	}
	return "http://" + s.l.Addr().String()
}

// awaitConns waits until n connections are in that state.
func (s *service) awaitConns(t testing.TB, n int, state http.ConnState) {
	t.Helper()
	tcptest.Await(t, fmt.Sprintf("%d connections in state %v", n, state), func() bool {
		return len(s.conns(state)) == n
	})
}

func (s *service) conns(state http.ConnState) (conns []net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for conn, current := range s.states {
		if current == state {
			conns = append(conns, conn)
		}
	}
	return conns
}

var (
	nothing = http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})
	flush   = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.(http.Flusher).Flush()
	})
	hello = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "Hello") })
)

// routes is a handler for each path; that for "" handles the other paths.
type routes map[string]http.Handler

func (r routes) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	handler, ok := r[req.URL.Path]
	if !ok {
		handler = r[""]
	}
	handler.ServeHTTP(w, req)
}

// A blocking handler calls before, sends on entered, waits for release, and calls after.
type blocking struct {
	before, after    http.HandlerFunc
	entered, release chan struct{}
}

func newBlocking(before, after http.HandlerFunc) *blocking {
	return &blocking{before, after, make(chan struct{}, 1), make(chan struct{})}
}

func (b *blocking) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b.before(w, r)
	b.entered <- struct{}{}
	<-b.release
	b.after(w, r)
}

func (b *blocking) awaitEntered(t testing.TB) {
	t.Helper()
	tcptest.Receive(t, b.entered, "call of the handler")
}

// eachProtocol runs test with and without TLS.
func eachProtocol(t *testing.T, test func(t *testing.T, config *tls.Config)) {
	t.Run("plain", func(t *testing.T) { t.Parallel(); test(t, nil) })
	t.Run("TLS", func(t *testing.T) { t.Parallel(); test(t, httpclient.ServerTLS()) })
}

// New

func TestNewSetsTheFields(t *testing.T) {
	d := httpdrain.New(new(http.Server))
	assert.Zero(t, d.Delay)
	assert.Equal(t, 1250*time.Millisecond, d.Grace)
	assert.Equal(t, 10*time.Second, d.Timeout)
}

func init() { http.Handle("/registered", hello) } // with http.DefaultServeMux

type contextKey struct{}

// The hooks are set after New. There is no Handler.
func TestHooksOfTheServerAreCalled(t *testing.T) {
	s := newService(t, tcptest.Listen(t), nil, nil)
	calls := make(chan any, 10)
	s.server.ConnState = func(_ net.Conn, state http.ConnState) { calls <- state }
	s.server.BaseContext = func(l net.Listener) context.Context {
		calls <- l
		return context.WithValue(context.Background(), contextKey{}, "base")
	}
	s.server.ConnContext = func(ctx context.Context, conn net.Conn) context.Context {
		calls <- ctx.Value(contextKey{})
		return ctx
	}
	s.start(t)
	c := s.get(t, "/registered")
	_, body := c.Response(t)
	assert.Equal(t, "Hello", body)
	for _, want := range []any{s.l, "base", http.StateNew, http.StateActive, http.StateIdle} {
		assert.Equal(t, want, tcptest.Receive(t, calls, "call of a hook"))
	}
}

// Handlers

func TestResponsesThatSwitchProtocolsCarryNoConnectionClose(t *testing.T) {
	s := startService(t, tcptest.Listen(t), nil, http.HandlerFunc(
		func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Upgrade") == "websocket" {
				w.Header().Set("Connection", "Upgrade")
				w.WriteHeader(http.StatusSwitchingProtocols)
			}
		}))
	requests := []struct {
		text  string
		close bool
	}{
		{"CONNECT test:80 HTTP/1.1\r\nHost: test:80\r\n", false},
		{"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n", false},
		{"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: TLS/1.2\r\n", true},
		{"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\n" +
			"Upgrade: h2c\r\nHTTP2-Settings: \r\n", true},
	}
	var conns []*httpclient.Conn
	for range requests {
		conns = append(conns, s.dial(t))
	}
	s.awaitConns(t, len(conns), http.StateNew)
	s.drain(t)
	for i, c := range conns {
		c.Send(t, requests[i].text+"\r\n")
		resp, err := http.ReadResponse(c.Buffered(), &http.Request{Method: "HEAD"})
		require.NoError(t, err)
		assert.Equal(t, requests[i].close, resp.Close, "Connection: close on %q", requests[i].text)
		c.Close()
	}
	s.requireDrained(t)
}

// As x/net's h2c, the handler reports states of a connection that it has hijacked.
func TestServeIgnoresHijackedConnections(t *testing.T) {
	var s *service
	hijacked := make(chan net.Conn, 1)
	s = newService(t, tcptest.Listen(t), nil, http.HandlerFunc(
		func(w http.ResponseWriter, _ *http.Request) {
			conn, _, err := w.(http.Hijacker).Hijack()
			assert.NoError(t, err)
			for _, reported := range []net.Conn{conn, struct{ net.Conn }{conn}} {
				s.server.ConnState(reported, http.StateActive)
				s.server.ConnState(reported, http.StateIdle)
			}
			hijacked <- conn
		}))
	c := s.start(t).get(t, "/")
	conn := tcptest.Receive(t, hijacked, "call of the handler")
	defer conn.Close()
	s.stop()
	s.requireDrained(t)
	_, err := io.WriteString(conn, "still open\n")
	require.NoError(t, err)
	line, err := c.Buffered().ReadString('\n')
	assert.Equal(t, "still open\n", line, "%v", err)
}

func TestExampleSaysGoodbyeOnEachWebSocket(t *testing.T) {
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	chat := &chat{ctx: ctx}
	sl := tcptest.Wrap(t, tcptest.Listen(t))
	served := make(chan error, 1)
	go func() { served <- httpdrain.New(&http.Server{Handler: chat}).Serve(ctx, sl) }()
	clients := make([]*httpclient.Conn, 40)
	for i := range clients {
		clients[i] = httpclient.Dial(t, sl.Addr().String(), nil)
		clients[i].Send(t, "GET / HTTP/1.1\r\nHost: x\r\nUpgrade: chat\r\nConnection: Upgrade\r\n\r\n")
	}
	stop() // some are not upgraded yet
	require.NoError(t, tcptest.Receive(t, served, "return of Serve"))
	for _, c := range clients {
		_, err := http.ReadResponse(c.Buffered(), nil)
		require.NoError(t, err, "the WebSocket is not opened")
		line, err := c.Buffered().ReadString('\n')
		assert.Equal(t, "goodbye\n", line, "%v", err)
		c.Close()
	}
	chat.open.Wait()
}

// Serve

// The handler's context is not done, and the clients in the TLS handshake are served too.
func TestServeServesOpenConnections(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, config *tls.Config) {
		b := newBlocking(nothing, hello)
		b.after = func(w http.ResponseWriter, r *http.Request) {
			assert.NoError(t, r.Context().Err())
			hello(w, r)
		}
		s := startService(t, tcptest.Listen(t), config, routes{"/": hello, "/blocking": b})
		inFlight := s.get(t, "/blocking")
		b.awaitEntered(t)
		idle := s.get(t, "/")
		resp, _ := idle.Response(t)
		assert.False(t, resp.Close, "the response before the context is done has Connection: close")
		half := s.dial(t)
		half.Send(t, "GET / HTTP/1.1\r\nHost:")
		unread := s.dial(t)
		connected, err := net.Dial("tcp", s.l.Addr().String())
		require.NoError(t, err)
		s.awaitConns(t, 1, http.StateActive)
		s.awaitConns(t, 1, http.StateIdle)
		s.awaitConns(t, 3, http.StateNew)

		s.drain(t)
		requireLastResponse := func(c *httpclient.Conn, request string) {
			c.Send(t, request)
			c.RequireLastResponse(t, "Hello")
		}
		const request = "GET / HTTP/1.1\r\nHost: test\r\n\r\n"
		requireLastResponse(httpclient.On(t, connected, httpclient.ClientTLS(config)), request)
		requireLastResponse(unread, request)
		requireLastResponse(half, " test\r\n\r\n")
		requireLastResponse(idle, request)
		close(b.release)
		_, body := inFlight.Response(t)
		assert.Equal(t, "Hello", body)
		requireLastResponse(inFlight, request) // the response had no Connection: close
		s.requireDrained(t)
	})
}

func TestServeClosesIdleConnectionsAfterTheGracePeriod(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, config *tls.Config) {
		s := newService(t, tcptest.Listen(t), config, hello)
		s.drainer.Grace = shortGrace
		s.start(t)
		idle := s.get(t, "/")
		idle.Response(t)
		unused := s.dial(t)
		httpclient.Dial(t, s.l.Addr().String(), nil) // not even a TLS handshake
		s.awaitConns(t, 1, http.StateIdle)
		s.awaitConns(t, 2, http.StateNew)

		start := time.Now()
		s.stop()
		s.requireDrained(t)
		took := time.Since(start)
		assert.GreaterOrEqual(t, took, shortGrace)
		assert.Less(t, took, 10*shortGrace, "Shutdown would wait five seconds for unused connections")
		idle.RequireClosed(t)
		unused.RequireClosed(t)
	})
}

// It was in flight when the context was done, so its response carries no Connection: close.
func TestConnectionStaysIdleForGraceAfterAResponse(t *testing.T) {
	tcptest.SkipIfShort(t, "takes two seconds")
	t.Parallel()
	b := newBlocking(nothing, hello)
	s := newService(t, tcptest.Listen(t), nil, b)
	s.drainer.Grace = 2 * time.Second // the response comes long before the end
	s.start(t)
	c := s.get(t, "/")
	b.awaitEntered(t)
	s.drain(t)
	start := time.Now()
	<-time.After(shortGrace)
	released := time.Now()
	close(b.release)
	resp, _ := c.Response(t)
	assert.False(t, resp.Close, "the response has Connection: close")
	s.requireDrained(t)
	assert.GreaterOrEqual(t, time.Since(released), s.drainer.Grace, "idle since the response")
	assert.Less(t, time.Since(start), tcptest.Patience, "duration of the shutdown")
	c.RequireClosed(t)
}

// The test reports the states of the connection itself: it is idle for a moment, as that of an
// HTTP/2 client with several requests at a time, and then has a request in flight again. The
// shortest of several: one that is twice as long is not due to a busy machine.
func TestBusyConnectionsDoNotPostponeShutdown(t *testing.T) {
	t.Parallel()
	shortest := time.Hour
	for range 10 {
		s := newService(t, tcptest.Listen(t), nil, hello)
		s.drainer.Grace = 2 * shortGrace
		shutdown := make(chan struct{})
		s.server.RegisterOnShutdown(func() { close(shutdown) })
		conn, _ := s.start(t).accept(t)
		s.server.ConnState(conn, http.StateActive)
		start := time.Now()
		s.drain(t)
		<-time.After(shortGrace)
		s.server.ConnState(conn, http.StateIdle)
		s.server.ConnState(conn, http.StateActive)
		tcptest.Receive(t, shutdown, "call of the function registered with RegisterOnShutdown")
		shortest = min(shortest, time.Since(start))
		s.server.ConnState(conn, http.StateClosed)
		s.requireDrained(t)
		if shortest < 3*shortGrace {
			return
		}
	}
	assert.Less(t, shortest, 3*shortGrace, "until Shutdown is called")
}

// accept returns both ends of a connection whose states the test reports.
func (s *service) accept(t testing.TB) (conn, client net.Conn) {
	_, err := httpclient.Post(httpclient.NewClient(nil, false, false), s.url(), "")
	require.NoError(t, err) // so the hooks are in the server
	conn, client = net.Pipe()
	require.NoError(t, client.SetReadDeadline(time.Now().Add(tcptest.Patience)))
	s.server.ConnContext(context.Background(), conn)
	s.server.ConnState(conn, http.StateNew)
	return conn, client
}

// Shutdown can miss an HTTP/2 connection that has just been set up, so that its client never
// gets GOAWAY. The test reports the states of such connections itself. One is idle before Shutdown
// is called, another one later, and the first is so again.
func TestServeClosesIdleConnectionsThatShutdownHasMissed(t *testing.T) {
	tcptest.SkipIfShort(t, "takes two seconds")
	t.Parallel()
	s := newService(t, tcptest.Listen(t), nil, hello)
	s.drainer.Grace = shortGrace
	shutdown := make(chan struct{})
	s.server.RegisterOnShutdown(func() { close(shutdown) })
	s.start(t)
	var conns, clients [3]net.Conn
	var idleSince [3]time.Time
	becomesIdle := func(i int) {
		idleSince[i] = time.Now()
		s.server.ConnState(conns[i], http.StateIdle)
	}
	for i := range conns {
		conns[i], clients[i] = s.accept(t)
		s.server.ConnState(conns[i], http.StateActive)
	}
	becomesIdle(0)
	becomesIdle(1)
	s.stop()
	tcptest.Receive(t, shutdown, "call of the function registered with RegisterOnShutdown")
	time.Sleep(shortGrace) // now Serve waits
	s.server.ConnState(conns[0], http.StateActive)
	becomesIdle(0)
	becomesIdle(2)
	for i, client := range clients {
		_, err := client.Read(make([]byte, 1))
		require.Equal(t, io.EOF, err, "idle connection %d is not closed", i)
		require.GreaterOrEqual(t, time.Since(idleSince[i]), 2*time.Second,
			"connection %d is closed too soon after its last request", i)
		s.server.ConnState(conns[i], http.StateClosed)
	}
	s.requireDrained(t)
}

// The buffers of their connections are full, so that Close of each *tls.Conn would wait five
// seconds to send an alert.
func TestServeDoesNotWaitForIdleClientsThatDoNotRead(t *testing.T) {
	tcptest.SkipIfShort(t, "takes some seconds")
	t.Parallel()
	const clients = 3
	for name, listener := range map[string]func(*service) httpdrain.Listener{
		"in Shutdown":        func(s *service) httpdrain.Listener { return s.l },
		"in a full listener": func(s *service) httpdrain.Listener { return newLimited(s.l, clients) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newService(t, tcptest.Listen(t), httpclient.ServerTLS(), hello)
			s.drainer.Grace = shortGrace
			s.start(t, listener(s))
			for range clients {
				s.get(t, "/").Response(t)
			}
			s.awaitConns(t, clients, http.StateIdle)
			for _, conn := range s.conns(http.StateIdle) {
				tcp := conn.(interface{ NetConn() net.Conn }).NetConn()
				go tcp.Write(make([]byte, 1<<24)) // blocks
			}
			s.stop()
			s.requireDrained(t)
		})
	}
}

// Delay

func TestEverythingGoesOnForDelay(t *testing.T) {
	t.Parallel()
	s := newService(t, tcptest.Listen(t), nil, hello)
	s.drainer.Delay = 500 * time.Millisecond
	s.start(t)
	idle := s.get(t, "/")
	idle.Response(t)
	unused := s.dial(t)
	s.awaitConns(t, 1, http.StateIdle)
	s.awaitConns(t, 1, http.StateNew)
	start := time.Now()
	s.stop()
	tcptest.Await(t, "response with Connection: close", func() bool {
		c := s.get(t, "/")
		defer c.Close()
		resp, _ := c.Response(t)
		return resp.Close
	})
	for _, c := range []*httpclient.Conn{idle, unused} {
		c.Get(t, "/")
		c.RequireLastResponse(t, "Hello")
	}
	s.requireDrained(t)
	assert.GreaterOrEqual(t, time.Since(start), s.drainer.Delay)
}

func TestDelayIsSkippedInAProcessThatWasReplaced(t *testing.T) {
	s := newService(t, tcptest.Listen(t), nil, hello)
	s.drainer.Delay = time.Hour
	ctx, cancel := context.WithCancelCause(context.Background())
	s.serve(ctx, s.l)
	c := s.get(t, "/")
	c.Response(t)
	cancel(replaced.Err)
	tcptest.Receive(t, s.l.closed, "return of the accept loop")
	c.Close()
	s.requireDrained(t)
}

// What is in the accept queue is served.
func TestDelayIsSkippedIfTheContextIsDoneBefore(t *testing.T) {
	s := newService(t, tcptest.Listen(t), nil, hello)
	s.drainer.Delay = time.Hour
	s.l.drain = s.l.StoppableListener.Drain
	c := s.get(t, "/")
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	s.serve(ctx, s.l)
	c.Response(t)
	c.Close()
	s.requireDrained(t)
}

// Timeout

// Idle and unused connections, and the request whose handler panicked, do not count. One accept
// loop does not return.
func TestTimeoutAbortsRequests(t *testing.T) {
	t.Parallel()
	for name, http2 := range map[string]bool{"HTTP/1": false, "HTTP/2": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBlocking(flush, hello)
			s := newService(t, tcptest.Listen(t), httpclient.ServerTLS(), routes{
				"/": hello, "/blocking": b, "/panics": http.HandlerFunc(
					func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }),
			})
			s.drainer.Timeout = shortGrace
			s.start(t)
			stuck := newFailing(t)
			defer func() { stuck.err <- net.ErrClosed }()
			go s.drainer.Serve(context.Background(), stuck)
			idle := s.get(t, "/")
			idle.Response(t)
			unused := s.dial(t)
			client := httpclient.NewClient(s.config, http2, true)
			aborted := make(chan error, 3)
			for range 3 {
				go func() {
					_, err := httpclient.Post(client, s.url()+"/blocking", "")
					aborted <- err
				}()
				b.awaitEntered(t)
			}
			defer close(b.release)
			_, err := httpclient.Post(client, s.url()+"/panics", "")
			require.Error(t, err)
			_, err = httpclient.Post(client, s.url()+"/", "")
			require.NoError(t, err)
			s.awaitConns(t, 1, http.StateNew)
			s.stop()
			err = tcptest.Receive(t, s.served, "return of Serve")
			assert.ErrorIs(t, err, context.DeadlineExceeded)
			assert.EqualError(t, err, "httpdrain: requests aborted: 3: context deadline exceeded")
			for range 3 {
				assert.Error(t, tcptest.Receive(t, aborted, "error of an aborted request"))
			}
			idle.AwaitClosed(t)
			unused.AwaitClosed(t)
		})
	}
}

// Several listeners

// One is called when the shutdown has started. The one that was called first does not keep the
// other from serving HTTP/2.
func TestServersOfOneDrainerStopTogether(t *testing.T) {
	s := newService(t, tcptest.Listen(t), httpclient.ServerTLS(), hello)
	plain := listen(t, tcptest.Listen(t))
	served := make(chan error, 2)
	go func() { served <- s.drainer.Serve(context.Background(), plain) }()
	c := httpclient.Dial(t, plain.Addr().String(), nil)
	c.Get(t, "/")
	c.Response(t)
	client := httpclient.NewClient(s.config, true, true)
	resp, err := client.Get(s.start(t).url())
	require.NoError(t, err)
	resp.Body.Close()
	assert.Equal(t, 2, resp.ProtoMajor)
	client.CloseIdleConnections()

	s.drain(t)
	tcptest.Receive(t, plain.closed, "return of the other accept loop")
	late := listen(t, tcptest.Listen(t))
	late.drain = late.StoppableListener.Drain
	queued := httpclient.Dial(t, late.Addr().String(), nil)
	go func() { served <- s.drainer.Serve(context.Background(), late) }()
	queued.Get(t, "/")
	queued.RequireLastResponse(t, "Hello")
	select {
	case <-s.served:
		assert.Fail(t, "Serve has returned while a connection of the other is open")
	case <-time.After(100 * time.Millisecond):
	}
	c.Get(t, "/")
	c.RequireLastResponse(t, "Hello")
	s.requireDrained(t)
	require.NoError(t, tcptest.Receive(t, served, "return of the other Serve"))
	require.NoError(t, tcptest.Receive(t, served, "return of the Serve that was called later"))
	err = s.drainer.Serve(context.Background(), listen(t, tcptest.Listen(t)))
	assert.Equal(t, http.ErrServerClosed, err)
}

// A failing listener's Accept returns an error that the test sends.
type failing struct {
	*serviceListener
	err chan error
}

func newFailing(t testing.TB) failing {
	return failing{listen(t, tcptest.Listen(t)), make(chan error, 1)}
}

func (l failing) Accept() (net.Conn, error) { return nil, <-l.err }

func TestServeReturnsTheErrorOfItsListener(t *testing.T) {
	t.Parallel()
	s := newService(t, tcptest.Listen(t), nil, hello)
	s.drainer.Delay = time.Hour
	s.start(t)
	fails := func() {
		l := newFailing(t)
		l.err <- errors.New("failed")
		assert.EqualError(t, s.drainer.Serve(context.Background(), l), "failed")
		s.get(t, "/").Response(t) // the other keeps serving
	}
	fails()
	s.stop()
	tcptest.Await(t, "response with Connection: close", func() bool {
		resp, _ := s.get(t, "/").Response(t)
		return resp.Close
	})
	fails()
}

func TestServeReturnsErrServerClosedIfOtherCodeShutsTheServerDown(t *testing.T) {
	s := startService(t, tcptest.Listen(t), nil, hello)
	s.get(t, "/").Response(t)
	s.server.Close()
	assert.Equal(t, http.ErrServerClosed, tcptest.Receive(t, s.served, "return of Serve"))
	assert.Equal(t, http.ErrServerClosed, s.drainer.Serve(context.Background(), s.l))
}

// ListenAndServe

func TestListenAndServe(t *testing.T) {
	for name, config := range map[string]*tls.Config{"plain": nil, "TLS": httpclient.ServerTLS()} {
		t.Run(name, func(t *testing.T) {
			server := &http.Server{Addr: tcptest.FreeAddr(t), Handler: hello, TLSConfig: config.Clone()}
			d := httpdrain.New(server)
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			served := make(chan error, 1)
			url := "http://" + server.Addr
			if config == nil {
				go func() { served <- d.ListenAndServe(ctx) }()
			} else {
				url = "https://" + server.Addr
				go func() { served <- d.ListenAndServeTLS(ctx, "", "") }()
			}
			client := httpclient.NewClient(config, true, false)
			tcptest.Await(t, "response", func() bool {
				body, err := httpclient.Post(client, url, "")
				return err == nil && body == "Hello"
			})
			cancel()
			require.NoError(t, tcptest.Receive(t, served, "return of ListenAndServe"))
			assert.Equal(t, http.ErrServerClosed, d.ListenAndServe(ctx))
			l2, err := net.Listen("tcp", server.Addr)
			require.NoError(t, err, "the address is in use after the return")
			l2.Close()
		})
	}
}

func TestListenAndServeReturnsErrorsAtOnce(t *testing.T) {
	busy := tcptest.Listen(t)
	server := &http.Server{Addr: busy.Addr().String()}
	d := httpdrain.New(server)
	var opError *net.OpError
	assert.ErrorAs(t, d.ListenAndServe(context.Background()), &opError)
	assert.ErrorAs(t, d.ListenAndServeTLS(context.Background(), "", ""), &opError)
	require.NoError(t, busy.Close())
	missing := filepath.Join(t.TempDir(), "missing")
	assert.ErrorIs(t, d.ListenAndServeTLS(context.Background(), missing, missing), os.ErrNotExist)
	l, err := net.Listen("tcp", server.Addr)
	require.NoError(t, err, "the address is in use after the error")
	l.Close()
}

// Connections of other types

// A taggedConn cannot be a key of a map.
type taggedConn struct {
	net.Conn
	_ []string
}

type tagging struct{ *serviceListener }

func (l tagging) Accept() (net.Conn, error) {
	conn, err := l.serviceListener.Accept()
	if err != nil {
		return nil, err
	}
	return taggedConn{Conn: conn}, nil
}

func TestConnectionsThatCannotBeMapKeysAreServed(t *testing.T) {
	s := newService(t, tcptest.Listen(t), nil, hello)
	s.server.ConnContext = func(ctx context.Context, conn net.Conn) context.Context {
		assert.IsType(t, new(taggedConn), conn)
		return ctx
	}
	s.start(t, tagging{s.l})
	c := s.get(t, "/")
	c.Response(t)
	s.drain(t)
	c.Get(t, "/")
	c.RequireLastResponse(t, "Hello")
	s.requireDrained(t)
}

// A limited listener accepts a connection when another is closed, as netutil.LimitListener does.
type limited struct {
	*serviceListener
	free chan struct{} // a value for each connection that may be accepted
}

func newLimited(l *serviceListener, n int) limited {
	l.drain = l.StoppableListener.Drain
	limited := limited{l, make(chan struct{}, n)}
	for range n {
		limited.free <- struct{}{}
	}
	return limited
}

func (l limited) Accept() (net.Conn, error) {
	select {
	case <-l.free:
	case <-l.closed:
		return nil, net.ErrClosed
	}
	conn, err := l.serviceListener.Accept()
	if err != nil {
		l.free <- struct{}{}
		return nil, err
	}
	return &limitedConn{conn, sync.OnceFunc(func() { l.free <- struct{}{} })}, nil
}

type limitedConn struct {
	net.Conn
	close func()
}

func (c *limitedConn) Close() error {
	defer c.close()
	return c.Conn.Close()
}

func TestServeMakesRoomInAFullListener(t *testing.T) {
	t.Parallel()
	tcptest.RequireRefusal(t) // otherwise, the accept loop does not wait until there is room
	for name, occupy := range map[string]func(*testing.T, *service){
		"of idle connections":   func(t *testing.T, s *service) { s.get(t, "/").Response(t) },
		"of unused connections": func(t *testing.T, s *service) { s.dial(t) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newService(t, tcptest.Listen(t), nil, hello)
			s.drainer.Grace = shortGrace
			l := newLimited(s.l, 2)
			s.start(t, l)
			occupy(t, s)
			occupy(t, s)
			tcptest.Await(t, "full listener", func() bool { return len(l.free) == 0 })
			var waiting []*httpclient.Conn
			for range 3 {
				waiting = append(waiting, s.get(t, "/"))
			}
			start := time.Now()
			s.stop()
			s.requireDrained(t)
			assert.GreaterOrEqual(t, time.Since(start), shortGrace, "closed before the end of Grace")
			for _, c := range waiting {
				c.RequireLastResponse(t, "Hello")
			}
		})
	}
}

// TLS

func TestServeTLSUsesTLSConfig(t *testing.T) {
	config := httpclient.ServerTLS()
	cert := config.Certificates[0]
	for name, serverConfig := range map[string]*tls.Config{
		"Certificates": {Certificates: []tls.Certificate{cert}},
		"GetCertificate": {GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return &cert, nil
		}},
		"GetConfigForClient": {GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			return &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"h2"}}, nil
		}},
		"client certificates": {
			Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequireAnyClientCert,
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newService(t, tcptest.Listen(t), serverConfig, http.HandlerFunc(
				func(w http.ResponseWriter, r *http.Request) {
					fmt.Fprint(w, r.Proto, " ", r.TLS.DidResume, " ", len(r.TLS.PeerCertificates))
				}))
			s.server.TLSConfig = serverConfig
			s.start(t)
			clientConfig := httpclient.ClientTLS(config)
			clientConfig.ClientSessionCache = tls.NewLRUClientSessionCache(1)
			clientConfig.Certificates = []tls.Certificate{cert}
			client := &http.Client{Transport: &http.Transport{
				TLSClientConfig: clientConfig, ForceAttemptHTTP2: true,
			}}
			peers := 0
			if serverConfig.ClientAuth != 0 {
				peers = 1
			}
			for _, resumes := range []bool{false, true} {
				body, err := httpclient.Post(client, s.url(), "")
				require.NoError(t, err)
				client.CloseIdleConnections()
				assert.Equal(t, fmt.Sprint("HTTP/2.0 ", resumes, " ", peers), body)
			}
			assert.Empty(t, serverConfig.NextProtos, "the configuration was changed")
		})
	}
}

func TestHTTP2CanBeDisabled(t *testing.T) {
	t.Setenv("GODEBUG", "http2server=0")
	s := startService(t, tcptest.Listen(t), httpclient.ServerTLS(), hello)
	resp, err := httpclient.NewClient(s.config, true, true).Get(s.url())
	require.NoError(t, err)
	defer resp.Body.Close()
	assert.Equal(t, 1, resp.ProtoMajor)
}

// Example

func TestExampleKeepsAcceptingUntilASecondSignal(t *testing.T) {
	t.Parallel()
	p, addr := startExample(t, "delay")
	client := httpclient.NewClient(nil, false, false)
	awaitStatus := func(want int) {
		tcptest.Await(t, fmt.Sprint("status ", want, " of the readiness probe"), func() bool {
			resp, err := client.Get("http://" + addr + "/ready")
			if err != nil {
				return false // not listening yet
			}
			defer resp.Body.Close()
			return resp.StatusCode == want
		})
	}
	awaitStatus(http.StatusOK)
	proctest.Signal(t, p.Process, syscall.SIGTERM)
	awaitStatus(http.StatusServiceUnavailable)
	c := httpclient.Dial(t, addr, nil)
	c.Get(t, "/")
	c.RequireLastResponse(t, "Hello\n")
	tcptest.Loop(t, 1, func() bool { // until it has stopped catching them
		time.Sleep(10 * time.Millisecond)
		return p.Process.Signal(syscall.SIGTERM) == nil
	})
	p.RequireStatus(t, -1) // of a process that is killed by a signal
}
