// The tests of this file are the promises of the doc comments. Load is in load_test.go, HTTP/2 in
// http2_test.go.
package httpdrain_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"sync"
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
	proctest.Main(m, func(string) {
		if len(os.Args) == 1 {
			Example()
		} else {
			programs[os.Args[1]]()
		}
	})
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
	drain           func()
	drained, closed chan struct{} // no values sent; closed by Drain, and by Close
	onceDrain       func()
	onceClose       func()
}

func listen(t testing.TB, l net.Listener) *serviceListener {
	sl := &serviceListener{
		StoppableListener: tcptest.Wrap(t, l),
		drained:           make(chan struct{}), closed: make(chan struct{}),
	}
	sl.drain = sl.Stop
	sl.onceDrain = sync.OnceFunc(func() { close(sl.drained) })
	sl.onceClose = sync.OnceFunc(func() { close(sl.closed) })
	return sl
}

func (l *serviceListener) Drain() { l.drain(); l.onceDrain() }

func (l *serviceListener) Close() error { l.Stop(); l.onceClose(); return nil }

// newService returns a service of l, with TLS if config is not nil, that is not started yet. Its
// grace period and timeout are longer than the test, unless the test sets others.
func newService(t testing.TB, l net.Listener, config *tls.Config, handler http.Handler) *service {
	s := &service{
		server: &http.Server{Handler: handler, TLSConfig: config.Clone()},
		l:      listen(t, l),
		config: config,
		served: make(chan error, 1),
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
		return s.countConns(state) == n
	})
}

func (s *service) countConns(state http.ConnState) int { return len(s.conns(state)) }

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

func TestHandlersGetTheResponseWriterOfPackageHTTP(t *testing.T) {
	for _, proto := range []string{"HTTP/1.1", "HTTP/2.0"} {
		t.Run(proto, func(t *testing.T) {
			typeOf := make(chan reflect.Type, 2)
			handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				assert.Equal(t, proto, r.Proto)
				typeOf <- reflect.TypeOf(w)
			})
			config := httpclient.ServerTLS()
			plain := httptest.NewUnstartedServer(handler)
			plain.EnableHTTP2, plain.TLS = true, config
			plain.StartTLS()
			defer plain.Close()
			s := startService(t, tcptest.Listen(t), config, handler)
			for _, url := range []string{plain.URL, s.url()} {
				_, err := httpclient.Post(httpclient.NewClient(config, proto == "HTTP/2.0", true), url, "")
				require.NoError(t, err)
			}
			assert.Equal(t, <-typeOf, <-typeOf)
		})
	}
}

func TestInformationalResponsesCarryNoConnectionClose(t *testing.T) {
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		hello(w, r)
	})
	s := startService(t, tcptest.Listen(t), nil, handler)
	c := s.dial(t)
	s.awaitConns(t, 1, http.StateNew)
	s.drain(t)
	c.StartPost(t, "/")
	c.Send(t, "x")
	c.RequireLastResponse(t, "Hello")
	s.requireDrained(t)
}

func TestResponsesThatSwitchProtocolsCarryNoConnectionClose(t *testing.T) {
	for name, tt := range map[string]struct {
		request, header string
		close           bool
	}{
		"WebSocket":       {"GET /", "Connection: Upgrade\r\nUpgrade: websocket\r\n", false},
		"CONNECT":         {"CONNECT test:80", "", false},
		"TLS, is ignored": {"GET /", "Connection: Upgrade\r\nUpgrade: TLS/1.2\r\n", true},
		"h2c, is ignored": {"GET /", "Connection: Upgrade, HTTP2-Settings\r\n" +
			"Upgrade: h2c\r\nHTTP2-Settings: \r\n", true},
	} {
		t.Run(name, func(t *testing.T) {
			handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if tt.close {
					return
				}
				if r.Method == http.MethodConnect {
					w.WriteHeader(http.StatusOK)
				} else {
					w.Header().Set("Connection", "Upgrade")
					w.WriteHeader(http.StatusSwitchingProtocols)
				}
				conn, _, err := http.NewResponseController(w).Hijack()
				if assert.NoError(t, err) {
					conn.Close()
				}
			})
			s := startService(t, tcptest.Listen(t), nil, handler)
			c := s.dial(t)
			s.awaitConns(t, 1, http.StateNew)
			s.drain(t)
			c.Send(t, tt.request+" HTTP/1.1\r\nHost: test:80\r\n"+tt.header+"\r\n")
			resp, err := http.ReadResponse(c.Buffered(), &http.Request{Method: "HEAD"})
			require.NoError(t, err)
			assert.Equal(t, tt.close, resp.Close, "Connection: close")
			s.requireDrained(t)
		})
	}
}

func TestStreamsEndOnRegisterOnShutdown(t *testing.T) {
	t.Parallel()
	shutdown := make(chan struct{})
	stream := newBlocking(flush, hello)
	stream.release = shutdown
	s := newService(t, tcptest.Listen(t), nil, stream)
	s.server.RegisterOnShutdown(func() { close(shutdown) }) // twice would panic
	s.drainer.Grace = shortGrace
	s.start(t)
	c := s.get(t, "/")
	stream.awaitEntered(t)
	s.stop()
	s.requireDrained(t)
	_, body := c.Response(t)
	assert.Equal(t, "Hello", body)
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

func TestServeReturnsAtOnceIfNoConnectionIsOpen(t *testing.T) {
	s := newService(t, tcptest.Listen(t), nil, hello)
	called := make(chan struct{}, 10)
	s.server.RegisterOnShutdown(func() { called <- struct{}{} })
	s.start(t)
	_, err := httpclient.Post(httpclient.NewClient(nil, false, false), s.url(), "")
	require.NoError(t, err)
	s.stop()
	s.requireDrained(t)
	tcptest.Receive(t, called, "call of the function registered with RegisterOnShutdown")
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

		s.drain(t)
		start := time.Now()
		s.requireDrained(t)
		took := time.Since(start)
		assert.GreaterOrEqual(t, took, shortGrace*9/10)
		assert.Less(t, took, 10*shortGrace, "Shutdown would wait five seconds for unused connections")
		idle.RequireClosed(t)
		unused.RequireClosed(t)
	})
}

// The shortest of several: one that is twice as long is not due to a busy machine.
func TestServeTakesTheGracePeriodAndNotMore(t *testing.T) {
	t.Parallel()
	shortest := time.Hour
	for range 10 {
		s := newService(t, tcptest.Listen(t), nil, hello)
		s.drainer.Grace = shortGrace
		s.start(t)
		s.dial(t)
		s.awaitConns(t, 1, http.StateNew)
		s.drain(t)
		start := time.Now()
		s.requireDrained(t)
		if shortest = min(shortest, time.Since(start)); shortest < 2*shortGrace {
			return
		}
	}
	assert.Less(t, shortest, 2*shortGrace)
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
	s.drainer.Grace = 0
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

// The last requests end before and after the end of the grace period.
func TestServeReturnsSoonIfHTTP2ConnectionsEndWithTheGracePeriod(t *testing.T) {
	tcptest.SkipIfShort(t, "takes two seconds")
	t.Parallel()
	const clients = 24
	release := make(chan struct{})
	entered, all := tcptest.Countdown(clients)
	s := newService(t, tcptest.Listen(t), httpclient.ServerTLS(), http.HandlerFunc(
		func(http.ResponseWriter, *http.Request) { entered(); <-release }))
	s.drainer.Grace = shortGrace
	s.start(t)
	for range clients {
		go httpclient.Post(httpclient.NewClient(s.config, true, true), s.url(), "")
	}
	tcptest.Receive(t, all, "calls of the handler")
	s.drain(t)
	start := time.Now()
	for i := range clients {
		time.Sleep(time.Until(start.Add(shortGrace * time.Duration(clients+2*i) / (2 * clients))))
		release <- struct{}{}
	}
	s.requireDrained(t)
	assert.Less(t, time.Since(start), 5*time.Second)
}

// Delay

func TestEverythingGoesOnForDelay(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, config *tls.Config) {
		s := newService(t, tcptest.Listen(t), config, hello)
		s.drainer.Delay = time.Second
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
		for name, c := range map[string]*httpclient.Conn{"idle": idle, "unused": unused} {
			c.Get(t, "/")
			resp, body := c.Response(t)
			assert.Equal(t, "Hello", body, "response on the %s connection", name)
			assert.True(t, resp.Close, "no Connection: close on the %s connection", name)
			c.RequireClosed(t)
		}
		s.requireDrained(t)
		assert.GreaterOrEqual(t, time.Since(start), s.drainer.Delay)
	})
}

func TestDelayIsSkipped(t *testing.T) {
	t.Run("in a process that was replaced", func(t *testing.T) {
		s := newService(t, tcptest.Listen(t), nil, hello)
		s.drainer.Delay = time.Hour
		ctx, cancel := context.WithCancelCause(context.Background())
		s.serve(ctx, s.l)
		s.get(t, "/").Response(t)
		cancel(replaced.Err)
		tcptest.Receive(t, s.l.drained, "call of Drain")
		s.server.Close()
	})
	t.Run("if the context is done before, and what is in the accept queue is served", func(t *testing.T) {
		l := tcptest.Listen(t)
		s := newService(t, l, nil, hello)
		s.drainer.Delay = time.Hour
		c := s.get(t, "/")
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		s.serve(ctx, tcptest.Wrap(t, l))
		_, body := c.Response(t)
		assert.Equal(t, "Hello", body)
		c.Close()
		s.requireDrained(t)
	})
}

// Timeout

func TestTimeoutAbortsRequests(t *testing.T) {
	t.Parallel()
	for name, http2 := range map[string]bool{"HTTP/1": false, "HTTP/2": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			config := httpclient.ServerTLS()
			b := newBlocking(flush, hello)
			b.entered = make(chan struct{}, 3)
			panics := http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
				panic(http.ErrAbortHandler)
			})
			s := newService(t, tcptest.Listen(t), config, routes{"/": hello, "/blocking": b, "/panics": panics})
			s.drainer.Timeout = shortGrace
			shutdown := make(chan struct{})
			s.server.RegisterOnShutdown(func() { close(shutdown) })
			s.start(t)
			idle := s.get(t, "/")
			idle.Response(t)
			unused := s.dial(t)
			client := httpclient.NewClient(config, http2, true)
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
			tcptest.Receive(t, shutdown, "call of the function registered with RegisterOnShutdown")
		})
	}
}

func TestTimeoutClosesIdleConnectionsWithoutAnError(t *testing.T) {
	t.Parallel()
	s := newService(t, tcptest.Listen(t), nil, hello)
	s.drainer.Timeout = shortGrace
	s.start(t)
	idle, unused := s.get(t, "/"), s.dial(t)
	idle.Response(t)
	s.awaitConns(t, 1, http.StateIdle)
	s.awaitConns(t, 1, http.StateNew)
	s.stop()
	s.requireDrained(t)
	idle.RequireClosed(t)
	unused.RequireClosed(t)
}

// Hijacked connections, with a response before (CONNECT) and without (WebSocket). x/net's h2c
// reports states of connections after it has hijacked them.
func TestServeIgnoresHijackedConnections(t *testing.T) {
	t.Parallel()
	for name, before := range map[string]http.HandlerFunc{"at once": nothing, "after a response": flush} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			hijacked := make(chan net.Conn, 1)
			var s *service
			hijack := func(w http.ResponseWriter, r *http.Request) {
				before(w, r)
				conn, _, err := http.NewResponseController(w).Hijack()
				if !assert.NoError(t, err) {
					return
				}
				for _, wrapper := range []net.Conn{conn, struct{ net.Conn }{conn}} {
					s.server.ConnState(wrapper, http.StateActive)
					s.server.ConnState(wrapper, http.StateIdle)
				}
				hijacked <- conn
				<-r.Context().Done()
			}
			s = newService(t, tcptest.Listen(t), nil, routes{"/hijack": http.HandlerFunc(hijack)})
			s.drainer.Timeout = 10 * time.Millisecond
			s.start(t)
			c := s.get(t, "/hijack")
			conn := tcptest.Receive(t, hijacked, "call of the handler")
			defer conn.Close()
			s.stop()
			s.requireDrained(t)
			_, err := io.WriteString(conn, "still open\n")
			require.NoError(t, err)
			tcptest.Await(t, "what was sent on the hijacked connection", func() bool {
				line, err := c.Buffered().ReadString('\n')
				require.NoError(t, err)
				return line == "still open\n"
			})
		})
	}
}

// Several listeners

// Clients keep connecting, and each whose connection is hijacked gets the goodbye of the example.
func TestExampleSaysGoodbyeOnEachWebSocket(t *testing.T) {
	t.Parallel()
	tcptest.RequireRefusal(t)
	for range 1 + tcptest.Rounds(3) {
		ctx, stop := context.WithCancel(context.Background())
		defer stop()
		chat := &chat{ctx: ctx}
		d := httpdrain.New(&http.Server{Handler: chat})
		sl := tcptest.Wrap(t, tcptest.Listen(t))
		served := make(chan error, 1)
		go func() { served <- d.Serve(ctx, sl) }()

		var goodbye sync.WaitGroup
		connected, enough := tcptest.Countdown(40)
		addr := sl.Addr().String()
		stopLoad := tcptest.Loop(t, 4, func() bool {
			conn, err := net.DialTimeout("tcp", addr, tcptest.Patience)
			if err != nil {
				return assert.True(t, tcptest.IsRefused(err), "%v", err) && false
			}
			t.Cleanup(func() { conn.Close() })
			_, err = fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: x\r\nUpgrade: chat\r\nConnection: Upgrade\r\n\r\n")
			assert.NoError(t, err)
			r := bufio.NewReader(conn)
			for line := ""; line != "\r\n"; {
				if line, err = r.ReadString('\n'); !assert.NoError(t, err, "a WebSocket is not opened") {
					return false
				}
			}
			connected()
			goodbye.Add(1)
			go func() {
				defer goodbye.Done()
				line, err := r.ReadString('\n')
				assert.Equal(t, "goodbye\n", line, "%v", err)
				conn.Close()
			}()
			return true
		})
		tcptest.Receive(t, enough, "WebSockets")
		stop()
		require.NoError(t, tcptest.Receive(t, served, "return of Serve"))
		chat.open.Wait()
		stopLoad()
		goodbye.Wait()
	}
}

func TestServersOfOneDrainerStopTogether(t *testing.T) {
	s := startService(t, tcptest.Listen(t), httpclient.ServerTLS(), hello)
	plain := listen(t, tcptest.Listen(t))
	served := make(chan error, 2)
	go func() { served <- s.drainer.Serve(context.Background(), plain) }()
	secure := s.get(t, "/")
	secure.Response(t)
	c := httpclient.Dial(t, plain.Addr().String(), nil)
	c.Get(t, "/")
	c.Response(t)
	s.drain(t)
	tcptest.Receive(t, plain.closed, "return of the other accept loop")
	secure.Get(t, "/")
	secure.RequireLastResponse(t, "Hello")
	late := listen(t, tcptest.Listen(t))
	queued := httpclient.Dial(t, late.Addr().String(), nil)
	late.drain = late.StoppableListener.Drain
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
	assert.Equal(t, http.ErrServerClosed, s.drainer.Serve(context.Background(), listen(t, tcptest.Listen(t))))
}

// A failing listener's Accept returns an error.
type failing struct {
	*serviceListener
	err chan error
}

func (l failing) Accept() (net.Conn, error) { return nil, <-l.err }

func TestServeReturnsTheErrorOfItsListener(t *testing.T) {
	for name, delay := range map[string]time.Duration{"before": 0, "within Delay": time.Second} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newService(t, tcptest.Listen(t), nil, hello)
			s.drainer.Delay = delay
			s.start(t)
			fails := failing{listen(t, tcptest.Listen(t)), make(chan error, 1)}
			served := make(chan error, 1)
			go func() { served <- s.drainer.Serve(context.Background(), fails) }()
			s.get(t, "/").Response(t)
			if delay > 0 {
				s.stop()
				tcptest.Await(t, "response with Connection: close", func() bool {
					resp, _ := s.get(t, "/").Response(t)
					return resp.Close
				})
			}
			errFailed := errors.New("failed")
			fails.err <- errFailed
			assert.Equal(t, errFailed, tcptest.Receive(t, served, "return of Serve"))
			c := s.get(t, "/") // the other keeps serving
			c.Response(t)
		})
	}
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
	config := httpclient.ServerTLS()
	for name, secure := range map[string]bool{"plain": false, "TLS": true} {
		t.Run(name, func(t *testing.T) {
			l := tcptest.Listen(t)
			require.NoError(t, l.Close())
			started := make(chan struct{})
			server := &http.Server{Addr: l.Addr().String(), Handler: hello,
				BaseContext: func(net.Listener) context.Context { close(started); return context.Background() }}
			d := httpdrain.New(server)
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			served := make(chan error, 1)
			go func() {
				if secure {
					server.TLSConfig = config
					served <- d.ListenAndServeTLS(ctx, "", "")
				} else {
					served <- d.ListenAndServe(ctx)
				}
			}()
			tcptest.Receive(t, started, "start of the server")
			url, clientConfig := "http://"+server.Addr, (*tls.Config)(nil)
			if secure {
				url, clientConfig = "https://"+server.Addr, config
			}
			body, err := httpclient.Post(httpclient.NewClient(clientConfig, true, false), url, "")
			require.NoError(t, err)
			assert.Equal(t, "Hello", body)
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
	b := newBlocking(nothing, hello)
	s := newService(t, tcptest.Listen(t), nil, routes{"/": hello, "/blocking": b})
	s.server.ConnContext = func(ctx context.Context, conn net.Conn) context.Context {
		assert.IsType(t, new(taggedConn), conn)
		return ctx
	}
	s.start(t, tagging{s.l})
	idle := s.get(t, "/")
	idle.Response(t)
	inFlight := s.get(t, "/blocking")
	b.awaitEntered(t)
	s.drain(t)
	idle.Get(t, "/")
	idle.RequireLastResponse(t, "Hello")
	close(b.release)
	inFlight.Response(t)
	inFlight.Close()
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
	tcptest.SkipIfShort(t, "takes a second")
	t.Parallel()
	const grace = time.Second
	post := func(t *testing.T, s *service, http2, keepAlive bool) {
		_, err := httpclient.Post(httpclient.NewClient(s.config, http2, keepAlive), s.url(), "")
		assert.NoError(t, err)
	}
	for name, occupy := range map[string]func(*testing.T, *service){
		"of idle connections":        func(t *testing.T, s *service) { post(t, s, false, true) },
		"of idle HTTP/2 connections": func(t *testing.T, s *service) { post(t, s, true, true) },
		"of unused connections": func(t *testing.T, s *service) {
			httpclient.Dial(t, s.l.Addr().String(), nil)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newService(t, tcptest.Listen(t), httpclient.ServerTLS(), hello)
			s.drainer.Grace = grace
			l := newLimited(s.l, 2)
			s.start(t, l)
			occupy(t, s)
			occupy(t, s)
			tcptest.Await(t, "full listener", func() bool { return len(l.free) == 0 })
			var waiting sync.WaitGroup
			for range 3 {
				waiting.Add(1)
				go func() {
					defer waiting.Done()
					post(t, s, false, false)
				}()
			}
			<-time.After(100 * time.Millisecond) // now they wait
			start := time.Now()
			s.stop()
			s.requireDrained(t)
			took := time.Since(start)
			if name != "of idle HTTP/2 connections" { // which clients may close when they get GOAWAY
				assert.GreaterOrEqual(t, took, grace, "closed before the end of Grace")
			}
			assert.Less(t, took, 4*grace)
			waiting.Wait()
		})
	}
}

// The buffers of their idle connections are full, so that Close of each *tls.Conn would wait five
// seconds to send an alert.
func TestServeDoesNotWaitForIdleClientsThatDoNotRead(t *testing.T) {
	tcptest.SkipIfShort(t, "takes a second")
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
				conn = conn.(interface{ NetConn() net.Conn }).NetConn()
				go conn.Write(make([]byte, 1<<24)) // blocks
			}
			start := time.Now()
			s.stop()
			s.requireDrained(t)
			assert.Less(t, time.Since(start), 5*time.Second)
		})
	}
}

// A stuck listener's Accept returns when the test ends.
type stuck struct {
	*serviceListener
	testEnd chan struct{}
}

func (l stuck) Accept() (net.Conn, error) { <-l.testEnd; return nil, net.ErrClosed }

func TestTimeoutBoundsAnAcceptThatDoesNotReturn(t *testing.T) {
	t.Parallel()
	s := newService(t, tcptest.Listen(t), nil, hello)
	s.drainer.Timeout = shortGrace
	s.start(t)
	l := stuck{listen(t, tcptest.Listen(t)), make(chan struct{})}
	defer close(l.testEnd)
	served := make(chan error, 1)
	go func() { served <- s.drainer.Serve(context.Background(), l) }()
	s.get(t, "/").Response(t)
	s.stop()
	s.requireDrained(t)
	require.NoError(t, tcptest.Receive(t, served, "return of the other Serve"))
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
			for _, want := range []string{"false", "true"} {
				client := &http.Client{Transport: &http.Transport{
					TLSClientConfig: clientConfig, ForceAttemptHTTP2: true,
				}}
				body, err := httpclient.Post(client, s.url(), "")
				require.NoError(t, err)
				client.CloseIdleConnections()
				peers := 0
				if serverConfig.ClientAuth != 0 {
					peers = 1
				}
				assert.Equal(t, fmt.Sprint("HTTP/2.0 ", want, " ", peers), body)
			}
			assert.Empty(t, serverConfig.NextProtos, "the configuration was changed")
		})
	}
}

// A server that serves both gets HTTP/2, no matter which is first.
func TestServeTLSServesHTTP2AfterServe(t *testing.T) {
	s := newService(t, tcptest.Listen(t), httpclient.ServerTLS(), hello)
	plain := listen(t, tcptest.Listen(t))
	go s.drainer.Serve(context.Background(), plain)
	c := httpclient.Dial(t, plain.Addr().String(), nil)
	c.Get(t, "/")
	c.Response(t)
	s.start(t)
	resp, err := httpclient.NewClient(s.config, true, true).Get(s.url())
	require.NoError(t, err)
	defer resp.Body.Close()
	assert.Equal(t, 2, resp.ProtoMajor)
}

func TestHTTP2CanBeDisabled(t *testing.T) {
	for name, disable := range map[string]func(*testing.T, *http.Server){
		"GODEBUG": func(t *testing.T, _ *http.Server) { t.Setenv("GODEBUG", "http2server=0") },
		"TLSNextProto": func(_ *testing.T, server *http.Server) {
			server.TLSNextProto = map[string]func(*http.Server, *tls.Conn, http.Handler){}
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newService(t, tcptest.Listen(t), httpclient.ServerTLS(), hello)
			disable(t, s.server)
			s.start(t)
			resp, err := httpclient.NewClient(s.config, true, true).Get(s.url())
			require.NoError(t, err)
			defer resp.Body.Close()
			assert.Equal(t, 1, resp.ProtoMajor)
		})
	}
}

// Example

func TestExampleAcceptsUntilTheDelayIsOver(t *testing.T) {
	tcptest.SkipIfShort(t, "takes five seconds")
	t.Parallel()
	l := tcptest.Listen(t)
	require.NoError(t, l.Close())
	addr := l.Addr().String()
	_, port, _ := net.SplitHostPort(addr)
	cmd := exec.Command(proctest.Self(t))
	cmd.Env = append(os.Environ(), "PORT="+port)
	p := proctest.Start(t, cmd)
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
	proctest.Signal(t, p.Process, os.Interrupt)
	awaitStatus(http.StatusServiceUnavailable)
	c := httpclient.Dial(t, addr, nil)
	c.Get(t, "/")
	c.RequireLastResponse(t, "Hello\n")
	p.RequireStatus(t, 0)
	tcptest.RequireRefused(t, l)
}
