// The tests of this file are the promises of the doc comments. Load is in load_test.go.
package httpdrain_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener"
	"github.com/c2db162c/stoppablelistener/httpdrain"
	"github.com/c2db162c/stoppablelistener/internal/testutil/httpclient"
	"github.com/c2db162c/stoppablelistener/internal/testutil/proctest"
	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

func TestMain(m *testing.M) {
	proctest.Main(m, func(string) {
		if len(os.Args) > 1 {
			idleClients(os.Args[1])
		} else {
			Example()
		}
	})
}

// shortGrace is for tests in which the end of the grace period matters.
const shortGrace = 300 * time.Millisecond

// A service is an http.Server with a Drainer that serves a listener.
type service struct {
	server  *http.Server
	drainer *httpdrain.Drainer
	sl      *stoppablelistener.StoppableListener
	config  *tls.Config // nil without TLS
	served  chan error

	mu     sync.Mutex // guards states
	states map[net.Conn]http.ConnState
}

// startService serves handler on l, with TLS if config is not nil, and leaves l open. The
// grace period is longer than the test, unless the test sets another.
func startService(t testing.TB, l net.Listener, config *tls.Config, handler http.Handler) *service {
	s := &service{
		server: &http.Server{
			Handler:   routes{"/probe": nothing, "": handler},
			TLSConfig: config.Clone(), // the server changes it
		},
		sl:     tcptest.Wrap(t, l),
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
	go func() {
		if config == nil {
			s.served <- s.server.Serve(keepOpen{s.sl})
		} else {
			s.served <- s.server.ServeTLS(keepOpen{s.sl}, "", "")
		}
	}()
	t.Cleanup(func() { s.server.Close() })
	return s
}

// keepOpen keeps the socket open when http.Server closes its listener.
type keepOpen struct {
	*stoppablelistener.StoppableListener
}

func (l keepOpen) Close() error {
	l.Stop()
	return nil
}

// stop stops the listener and waits for Serve.
func (s *service) stop(t testing.TB) {
	s.sl.Stop()
	tcptest.RequireStoppedError(t, tcptest.Receive(t, s.served, "return of Serve"))
}

// startDrain stops the listener and calls Drain. It returns when responses carry
// Connection: close.
func (s *service) startDrain(t *testing.T, ctx context.Context) <-chan error {
	probe := s.get(t, "/probe")
	probe.Response(t) // so it is not in the accept queue any more
	s.stop(t)
	drained := s.drain(ctx)
	tcptest.Await(t, "response with Connection: close", func() bool {
		probe.Get(t, "/probe")
		resp, _ := probe.Response(t)
		return resp.Close
	})
	s.awaitConns(t, 1, http.StateClosed) // the probe is no longer in flight
	return drained
}

// drain calls Drain in a goroutine.
func (s *service) drain(ctx context.Context) <-chan error {
	drained := make(chan error, 1)
	go func() { drained <- s.drainer.Drain(ctx) }()
	return drained
}

func requireDrained(t testing.TB, drained <-chan error) {
	t.Helper()
	require.NoError(t, tcptest.Receive(t, drained, "return of Drain"))
}

// dial connects a client, with TLS if the service has it.
func (s *service) dial(t testing.TB) *httpclient.Conn {
	return httpclient.Dial(t, s.sl.Addr().String(), httpclient.ClientTLS(s.config))
}

// get connects a client that requests path.
func (s *service) get(t testing.TB, path string) *httpclient.Conn {
	c := s.dial(t)
	c.Get(t, path)
	return c
}

func (s *service) url() string {
	if s.config != nil {
		return "https://" + s.sl.Addr().String()
	}
	return "http://" + s.sl.Addr().String()
}

// awaitConns waits until n connections are in that state.
func (s *service) awaitConns(t *testing.T, n int, state http.ConnState) {
	t.Helper()
	tcptest.Await(t, fmt.Sprintf("%d connections in state %v", n, state), func() bool {
		return s.countConns(state) == n
	})
}

func (s *service) countConns(state http.ConnState) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, current := range s.states {
		if current == state {
			n++
		}
	}
	return n
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

func init() { http.Handle("/registered", hello) } // with http.DefaultServeMux

func TestNewWrapsHandlerAndConnState(t *testing.T) {
	l := tcptest.Listen(t)
	states := make(chan http.ConnState, 10)
	server := &http.Server{ConnState: func(_ net.Conn, state http.ConnState) { states <- state }}
	httpdrain.New(server)
	go server.Serve(l)
	defer server.Close()
	c := httpclient.Dial(t, l.Addr().String(), nil)
	c.Get(t, "/registered")
	_, body := c.Response(t)
	assert.Equal(t, "Hello", body)
	for _, state := range []http.ConnState{http.StateNew, http.StateActive, http.StateIdle} {
		assert.Equal(t, state, tcptest.Receive(t, states, "call of ConnState"))
	}
}

type contextKey struct{}

func TestNewWrapsConnContext(t *testing.T) {
	values := make(chan any, 1)
	server := &http.Server{
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			return context.WithValue(ctx, contextKey{}, conn.RemoteAddr().String())
		},
		Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			values <- r.Context().Value(contextKey{})
		}),
	}
	httpdrain.New(server)
	l := tcptest.Listen(t)
	go server.Serve(l)
	defer server.Close()
	c := httpclient.Dial(t, l.Addr().String(), nil)
	c.Get(t, "/")
	c.Response(t)
	assert.Equal(t, c.LocalAddr().String(), <-values, "value of the caller's ConnContext")
}

func TestNewSetsAGraceForClientsThatComeOnceASecond(t *testing.T) {
	assert.Equal(t, 1250*time.Millisecond, httpdrain.New(new(http.Server)).Grace)
}

func TestRequestsAllocateNothing(t *testing.T) {
	server := &http.Server{Handler: nothing}
	httpdrain.New(server)
	conn, _ := net.Pipe()
	server.ConnState(conn, http.StateNew)
	w, r := httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil)
	assert.Zero(t, testing.AllocsPerRun(1000, func() {
		server.ConnState(conn, http.StateActive)
		server.Handler.ServeHTTP(w, r)
		server.ConnState(conn, http.StateIdle)
	}), "allocations per request")
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

// The client does not send the rest of the body. With another ResponseWriter, MaxBytesReader
// cannot tell the server that it need not wait for that.
func TestMaxBytesReaderRespondsAtOnce(t *testing.T) {
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, err := io.Copy(io.Discard, http.MaxBytesReader(w, r.Body, 1))
		assert.Error(t, err)
		w.WriteHeader(http.StatusRequestEntityTooLarge)
	})
	s := startService(t, tcptest.Listen(t), nil, handler)
	c := s.dial(t)
	c.Send(t, "POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 1000\r\n\r\nxx")
	resp, _ := c.Response(t)
	assert.Equal(t, http.StatusRequestEntityTooLarge, resp.StatusCode)
}

func TestResponsesCarryConnectionClose(t *testing.T) {
	for name, handler := range map[string]http.HandlerFunc{
		"nothing": nothing,
		"Write":   hello,
		"WriteHeader": func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusNoContent)
		},
		"Flush": flush,
		"ReadFrom": func(w http.ResponseWriter, _ *http.Request) {
			_, _ = w.(io.ReaderFrom).ReadFrom(strings.NewReader("Hello"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := startService(t, tcptest.Listen(t), nil, routes{"/": handler})
			c := s.dial(t)
			s.awaitConns(t, 1, http.StateNew)
			drained := s.startDrain(t, context.Background())
			c.Get(t, "/")
			resp, _ := c.Response(t)
			assert.True(t, resp.Close, "the response has no Connection: close")
			c.RequireClosed(t)
			requireDrained(t, drained)
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
	drained := s.startDrain(t, context.Background())
	c.StartPost(t, "/")
	c.Send(t, "x")
	c.RequireLastResponse(t, "Hello")
	requireDrained(t, drained)
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
			drained := s.startDrain(t, context.Background())
			c.Send(t, tt.request+" HTTP/1.1\r\nHost: test:80\r\n"+tt.header+"\r\n")
			resp, err := http.ReadResponse(c.Buffered(), &http.Request{Method: "HEAD"})
			require.NoError(t, err)
			assert.Equal(t, tt.close, resp.Close, "Connection: close")
			requireDrained(t, drained)
		})
	}
}

func TestStreamsEndOnRegisterOnShutdown(t *testing.T) {
	t.Parallel()
	shutdown := make(chan struct{})
	stream := newBlocking(flush, hello)
	stream.release = shutdown
	s := startService(t, tcptest.Listen(t), nil, stream)
	s.server.RegisterOnShutdown(func() { close(shutdown) }) // twice would panic
	s.drainer.Grace = shortGrace
	c := s.get(t, "/")
	stream.awaitEntered(t)
	s.stop(t)
	requireDrained(t, s.drain(context.Background()))
	_, body := c.Response(t)
	assert.Equal(t, "Hello", body)
}

// DisableKeepAlives

func TestDisableKeepAlivesChangesOnlyTheResponses(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, config *tls.Config) {
		s := startService(t, tcptest.Listen(t), config, hello)
		idle := s.get(t, "/")
		resp, _ := idle.Response(t)
		assert.False(t, resp.Close, "the response before DisableKeepAlives has Connection: close")
		unused := s.dial(t)
		s.awaitConns(t, 1, http.StateIdle)
		s.awaitConns(t, 1, http.StateNew)
		var calls sync.WaitGroup
		for range 10 {
			calls.Add(1)
			go func() {
				defer calls.Done()
				s.drainer.DisableKeepAlives()
			}()
		}
		calls.Wait()
		for name, c := range map[string]*httpclient.Conn{
			"new": s.dial(t), "idle": idle, "unused": unused,
		} {
			c.Get(t, "/")
			resp, body := c.Response(t)
			assert.Equal(t, "Hello", body, "response on the %s connection", name)
			assert.True(t, resp.Close, "no Connection: close on the %s connection", name)
			c.RequireClosed(t)
		}
	})
}

// An instance that is still in rotation must not send GOAWAY: load balancers fail requests then.
func TestDisableKeepAlivesLeavesHTTP2Alone(t *testing.T) {
	config := httpclient.ServerTLS()
	addrs, headers := make(chan string, 2), make(chan http.Header, 2)
	s := startService(t, tcptest.Listen(t), config, http.HandlerFunc(
		func(w http.ResponseWriter, r *http.Request) {
			addrs <- r.RemoteAddr
			headers <- w.Header().Clone()
		}))
	client := httpclient.NewClient(config, true, true)
	s.drainer.DisableKeepAlives()
	for range 2 {
		_, err := httpclient.Post(client, s.url(), "")
		require.NoError(t, err)
		assert.Empty(t, <-headers)
	}
	assert.Equal(t, <-addrs, <-addrs, "addresses of the client: the connection was closed")
}

// Drain

func TestDrainServesOpenConnections(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, config *tls.Config) {
		b := newBlocking(nothing, hello)
		s := startService(t, tcptest.Listen(t), config, routes{"/": hello, "/blocking": b})
		inFlight := s.get(t, "/blocking")
		b.awaitEntered(t)
		idle := s.get(t, "/")
		resp, _ := idle.Response(t)
		assert.False(t, resp.Close, "the response before Drain has Connection: close")
		half := s.dial(t)
		half.Send(t, "GET / HTTP/1.1\r\nHost:")
		unread := s.dial(t)
		s.awaitConns(t, 1, http.StateActive)
		s.awaitConns(t, 1, http.StateIdle)
		s.awaitConns(t, 2, http.StateNew)

		drained := s.startDrain(t, context.Background())
		unread.Get(t, "/")
		unread.RequireLastResponse(t, "Hello")
		half.Send(t, " test\r\n\r\n")
		half.RequireLastResponse(t, "Hello")
		idle.Get(t, "/")
		idle.RequireLastResponse(t, "Hello")
		close(b.release)
		_, body := inFlight.Response(t)
		assert.Equal(t, "Hello", body)
		inFlight.Get(t, "/") // its response did not say that the connection will be closed
		inFlight.RequireLastResponse(t, "Hello")
		requireDrained(t, drained)
	})
}

func TestDrainReturnsAtOnceIfNoConnectionIsLeft(t *testing.T) {
	var shutdowns atomic.Int64
	s := startService(t, tcptest.Listen(t), nil, hello)
	called := make(chan struct{})
	s.server.RegisterOnShutdown(func() { shutdowns.Add(1); close(called) })
	_, err := httpclient.Post(httpclient.NewClient(nil, false, false), s.url(), "")
	require.NoError(t, err)
	s.stop(t)
	requireDrained(t, s.drain(context.Background()))
	tcptest.Receive(t, called, "call of the function registered with RegisterOnShutdown")
	assert.EqualValues(t, 1, shutdowns.Load())
}

func TestDrainClosesIdleConnectionsAfterTheGracePeriod(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, config *tls.Config) {
		s := startService(t, tcptest.Listen(t), config, hello)
		s.drainer.Grace = shortGrace
		idle := s.get(t, "/")
		idle.Response(t)
		unused := s.dial(t)
		httpclient.Dial(t, s.sl.Addr().String(), nil) // not even a TLS handshake
		s.awaitConns(t, 1, http.StateIdle)
		s.awaitConns(t, 2, http.StateNew)

		s.stop(t)
		start := time.Now()
		requireDrained(t, s.drain(context.Background()))
		took := time.Since(start)
		assert.GreaterOrEqual(t, took, shortGrace)
		assert.Less(t, took, 10*shortGrace, "Shutdown would wait five seconds for unused connections")
		idle.RequireClosed(t)
		unused.RequireClosed(t)
	})
}

// The shortest of several: one that is twice as long is not due to a busy machine.
func TestDrainTakesTheGracePeriodAndNotMore(t *testing.T) {
	t.Parallel()
	shortest := time.Hour
	for range 10 {
		s := startService(t, tcptest.Listen(t), nil, hello)
		s.drainer.Grace = shortGrace
		s.dial(t)
		s.awaitConns(t, 1, http.StateNew)
		s.stop(t)
		start := time.Now()
		requireDrained(t, s.drain(context.Background()))
		if shortest = min(shortest, time.Since(start)); shortest < 2*shortGrace {
			return
		}
	}
	assert.Less(t, shortest, 2*shortGrace)
}

func TestDrainAbortsRequestsWhenTheContextIsDone(t *testing.T) {
	b := newBlocking(nothing, hello)
	s := startService(t, tcptest.Listen(t), nil, b)
	called := make(chan struct{})
	s.server.RegisterOnShutdown(func() { close(called) })
	c := s.get(t, "/")
	b.awaitEntered(t)
	defer close(b.release)
	ctx, cancel := context.WithCancel(context.Background())
	drained := s.startDrain(t, ctx)
	cancel()
	err := tcptest.Receive(t, drained, "return of Drain")
	assert.ErrorIs(t, err, context.Canceled)
	assert.ErrorContains(t, err, "httpdrain: requests in flight aborted")
	c.RequireClosed(t)
	tcptest.Receive(t, called, "call of the function registered with RegisterOnShutdown")
}

func TestDrainClosesIdleConnectionsWithoutAnErrorWhenTheContextIsDone(t *testing.T) {
	s := startService(t, tcptest.Listen(t), nil, hello)
	idle, unused := s.get(t, "/"), s.dial(t)
	idle.Response(t)
	s.awaitConns(t, 1, http.StateIdle)
	s.awaitConns(t, 1, http.StateNew)
	ctx, cancel := context.WithCancel(context.Background())
	drained := s.startDrain(t, ctx)
	cancel()
	requireDrained(t, drained)
	idle.RequireClosed(t)
	unused.RequireClosed(t)
}

// Hijacked connections, with a response before (CONNECT) and without (WebSocket). x/net's h2c
// reports states of connections after it has hijacked them.
func TestDrainIgnoresHijackedConnections(t *testing.T) {
	t.Parallel()
	for name, before := range map[string]func(http.ResponseWriter, *service){
		"at once":           func(http.ResponseWriter, *service) {},
		"after WriteHeader": func(w http.ResponseWriter, _ *service) { w.WriteHeader(http.StatusOK) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			hijacked := make(chan net.Conn, 1)
			var s *service
			hijack := func(w http.ResponseWriter, _ *http.Request) {
				before(w, s)
				conn, _, err := http.NewResponseController(w).Hijack()
				if !assert.NoError(t, err) {
					return
				}
				for _, wrapper := range []net.Conn{conn, struct{ net.Conn }{conn}} {
					s.server.ConnState(wrapper, http.StateActive)
					s.server.ConnState(wrapper, http.StateIdle)
				}
				hijacked <- conn
			}
			handler := routes{"/": hello, "/hijack": http.HandlerFunc(hijack)}
			s = startService(t, tcptest.Listen(t), nil, handler)
			s.drainer.Grace = shortGrace
			idle := s.get(t, "/")
			idle.Response(t)
			c := s.get(t, "/hijack")
			conn := tcptest.Receive(t, hijacked, "call of the handler")
			defer conn.Close()
			s.stop(t)
			requireDrained(t, s.drain(context.Background()))
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

func TestDrainDoesNotWaitForHandlersThatPanicked(t *testing.T) {
	abort := http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
	b := newBlocking(flush, abort)
	s := startService(t, tcptest.Listen(t), nil, routes{"/": abort, "/blocking": b})
	s.get(t, "/").RequireClosed(t)
	s.get(t, "/blocking")
	b.awaitEntered(t)
	s.stop(t)
	drained := s.drain(context.Background())
	close(b.release)
	requireDrained(t, drained)
}

// A server that is still accepting stops when the grace period is over.
func TestDrainStopsServe(t *testing.T) {
	t.Parallel()
	s := startService(t, tcptest.Listen(t), nil, hello)
	s.drainer.Grace = shortGrace
	s.dial(t)
	s.awaitConns(t, 1, http.StateNew)
	requireDrained(t, s.drain(context.Background()))
	assert.Equal(t, http.ErrServerClosed, tcptest.Receive(t, s.served, "return of Serve"))
}

// One HTTP/2 connection is idle. The other has two requests in flight: one response has not
// started when Drain is called, the other has.
func TestDrainShutsDownHTTP2(t *testing.T) {
	tcptest.SkipIfShort(t, "takes more than a second")
	t.Parallel()
	config := httpclient.ServerTLS()
	before, started := newBlocking(nothing, hello), newBlocking(flush, hello)
	handler := routes{"/": hello, "/before": before, "/started": started}
	s := startService(t, tcptest.Listen(t), config, handler)
	s.drainer.Grace = shortGrace
	shutdown := make(chan struct{})
	s.server.RegisterOnShutdown(func() { close(shutdown) })

	idle, busy := httpclient.NewClient(config, true, true), httpclient.NewClient(config, true, true)
	body, err := httpclient.Post(idle, s.url(), "")
	require.NoError(t, err)
	require.Equal(t, "Hello", body)
	bodies := make(chan string, 2)
	for path, b := range map[string]*blocking{"/before": before, "/started": started} {
		go func() {
			body, err := httpclient.Post(busy, s.url()+path, "")
			assert.NoError(t, err)
			bodies <- body
		}()
		b.awaitEntered(t)
	}

	s.stop(t)
	drained := s.drain(context.Background())
	tcptest.Receive(t, shutdown, "call of the function registered with RegisterOnShutdown")
	s.awaitConns(t, 1, http.StateClosed) // the idle one: its client has received GOAWAY
	close(before.release)
	close(started.release)
	assert.Equal(t, "Hello", tcptest.Receive(t, bodies, "response"))
	assert.Equal(t, "Hello", tcptest.Receive(t, bodies, "response"))
	requireDrained(t, drained)
}

// Shutdown can miss an HTTP/2 connection that has just been set up, so that its client never
// gets GOAWAY. The test reports the states of such connections itself. One is idle before Shutdown
// is called, another one later, and the first is so again.
func TestDrainClosesIdleConnectionsThatShutdownHasMissed(t *testing.T) {
	tcptest.SkipIfShort(t, "takes two seconds")
	t.Parallel()
	server := &http.Server{Handler: nothing}
	drainer := httpdrain.New(server)
	drainer.Grace = 0
	shutdown := make(chan struct{})
	server.RegisterOnShutdown(func() { close(shutdown) })
	var conns, clients [3]net.Conn
	var idleSince [3]time.Time
	becomesIdle := func(i int) {
		idleSince[i] = time.Now()
		server.ConnState(conns[i], http.StateIdle)
	}
	for i := range conns {
		conns[i], clients[i] = net.Pipe()
		require.NoError(t, clients[i].SetReadDeadline(time.Now().Add(tcptest.Patience)))
		server.ConnState(conns[i], http.StateNew)
		server.ConnState(conns[i], http.StateActive)
	}
	becomesIdle(0)
	becomesIdle(1)
	drained := make(chan error, 1)
	go func() { drained <- drainer.Drain(context.Background()) }()
	tcptest.Receive(t, shutdown, "call of the function registered with RegisterOnShutdown")
	time.Sleep(shortGrace) // now Drain waits
	server.ConnState(conns[0], http.StateActive)
	becomesIdle(0)
	becomesIdle(2)
	for i, client := range clients {
		_, err := client.Read(make([]byte, 1))
		require.Equal(t, io.EOF, err, "idle connection %d is not closed", i)
		require.GreaterOrEqual(t, time.Since(idleSince[i]), 2*time.Second,
			"connection %d is closed too soon after its last request", i)
		server.ConnState(conns[i], http.StateClosed)
	}
	requireDrained(t, drained)
}

// Grace is so long that only GOAWAY can close the connection.
func TestDrainSendsGOAWAYWithTheResponseToTheOnlyRequestInFlight(t *testing.T) {
	config := httpclient.ServerTLS()
	headers := make(chan http.Header, 1)
	b := newBlocking(nothing, hello)
	s := startService(t, tcptest.Listen(t), config, routes{"/blocking": b, "/": http.HandlerFunc(
		func(w http.ResponseWriter, _ *http.Request) { headers <- w.Header().Clone() })})
	post := func(client *http.Client, path string) {
		_, err := httpclient.Post(client, s.url()+path, "")
		assert.NoError(t, err)
	}
	one, many := httpclient.NewClient(config, true, true), httpclient.NewClient(config, true, true)
	for _, client := range []*http.Client{one, many} {
		post(client, "/")
		assert.Empty(t, <-headers, "before Drain")
	}
	responded := make(chan struct{})
	go func() {
		defer close(responded)
		post(many, "/blocking")
	}()
	b.awaitEntered(t)
	drained := s.startDrain(t, context.Background()) // one connection is closed after it
	post(many, "/")
	assert.Empty(t, <-headers, "another request is in flight")
	post(one, "/")
	assert.Equal(t, http.Header{"Connection": {"close"}}, <-headers, "no other request is in flight")
	s.awaitConns(t, 2, http.StateClosed)
	close(b.release)
	tcptest.Receive(t, responded, "response")
	post(many, "/")
	assert.Equal(t, http.Header{"Connection": {"close"}}, <-headers, "no other request is in flight")
	requireDrained(t, drained)
}

// Connections that become idle in the grace period

// It was in flight when Drain was called, so its response carries no Connection: close.
func TestConnectionStaysIdleForGraceAfterAResponse(t *testing.T) {
	tcptest.SkipIfShort(t, "takes two seconds")
	t.Parallel()
	b := newBlocking(nothing, hello)
	s := startService(t, tcptest.Listen(t), nil, b)
	s.drainer.Grace = 2 * time.Second // the response comes long before the end
	c := s.get(t, "/")
	b.awaitEntered(t)
	s.stop(t)
	start := time.Now()
	drained := s.drain(context.Background())
	<-time.After(shortGrace)
	released := time.Now()
	close(b.release)
	resp, _ := c.Response(t)
	assert.False(t, resp.Close, "the response has Connection: close")
	requireDrained(t, drained)
	assert.GreaterOrEqual(t, time.Since(released), s.drainer.Grace, "idle since the response")
	assert.Less(t, time.Since(start), tcptest.Patience, "duration of Drain")
	c.RequireClosed(t)
}

// The test reports the states of the connection itself: it is idle for a moment, as that of an
// HTTP/2 client with several requests at a time, and then has a request in flight again. The
// shortest of several: one that is twice as long is not due to a busy machine.
func TestBusyConnectionsDoNotPostponeShutdown(t *testing.T) {
	t.Parallel()
	shortest := time.Hour
	for range 10 {
		server := &http.Server{Handler: nothing}
		drainer := httpdrain.New(server)
		drainer.Grace = 2 * shortGrace
		shutdown := make(chan struct{})
		server.RegisterOnShutdown(func() { close(shutdown) })
		conn, _ := net.Pipe()
		server.ConnState(conn, http.StateNew)
		server.ConnState(conn, http.StateActive)
		start := time.Now()
		drained := make(chan error, 1)
		go func() { drained <- drainer.Drain(context.Background()) }()
		<-time.After(shortGrace)
		server.ConnState(conn, http.StateIdle)
		server.ConnState(conn, http.StateActive)
		tcptest.Receive(t, shutdown, "call of the function registered with RegisterOnShutdown")
		shortest = min(shortest, time.Since(start))
		server.ConnState(conn, http.StateClosed)
		requireDrained(t, drained)
		if shortest < 3*shortGrace {
			return
		}
	}
	assert.Less(t, shortest, 3*shortGrace, "until Shutdown is called")
}

func TestTwoCallsOfDrainReturn(t *testing.T) {
	t.Parallel()
	b := newBlocking(nothing, hello)
	s := startService(t, tcptest.Listen(t), nil, b)
	requireOnce := countShutdowns(t, s.server)
	c := s.get(t, "/")
	b.awaitEntered(t)
	first := s.startDrain(t, context.Background())
	second := s.drain(context.Background())
	close(b.release)
	c.Response(t)
	c.Close()
	requireDrained(t, first)
	requireDrained(t, second)
	requireOnce()
}

// countShutdowns registers a function with RegisterOnShutdown, which must be called once.
func countShutdowns(t *testing.T, server *http.Server) (requireOnce func()) {
	called := make(chan struct{}, 10)
	server.RegisterOnShutdown(func() { called <- struct{}{} })
	return func() {
		t.Helper()
		tcptest.Receive(t, called, "call of the function registered with RegisterOnShutdown")
		select {
		case <-called:
			assert.Fail(t, "the function registered with RegisterOnShutdown is called again")
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// What Drain does not know

// A taggedConn cannot be a key of a map.
type taggedConn struct {
	net.Conn
	_ []string
}

// A tagging listener returns such connections after some others.
type tagging struct {
	net.Listener
	others *atomic.Int64
}

func newTagging(l net.Listener, others int64) net.Listener {
	t := tagging{l, new(atomic.Int64)}
	t.others.Store(others)
	return t
}

func (l tagging) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil || l.others.Add(-1) >= 0 {
		return conn, err
	}
	return taggedConn{Conn: conn}, nil
}

func TestDrainWaitsForConnectionsThatItDoesNotKnow(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		listener func(net.Listener) net.Listener
		replace  func(*http.Server)
		message  string // a part of the error of Drain
	}{
		"cannot be a map key": {
			func(l net.Listener) net.Listener { return newTagging(l, 0) }, func(*http.Server) {}, "",
		},
		"ConnState replaced": {
			func(l net.Listener) net.Listener { return l },
			func(server *http.Server) { server.ConnState = func(net.Conn, http.ConnState) {} },
			"ConnState was replaced",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBlocking(nothing, hello)
			server := &http.Server{Handler: routes{"/": hello, "/blocking": b}}
			requireOnce := countShutdowns(t, server)
			drainer := httpdrain.New(server)
			tt.replace(server)
			l := tcptest.Listen(t)
			served := make(chan error, 1)
			go func() { served <- server.Serve(tt.listener(l)) }()
			idle := httpclient.Dial(t, l.Addr().String(), nil)
			inFlight := httpclient.Dial(t, l.Addr().String(), nil)
			idle.Get(t, "/")
			idle.Response(t)
			inFlight.Get(t, "/blocking")
			b.awaitEntered(t)
			drained := make(chan error, 1)
			go func() { drained <- drainer.Drain(context.Background()) }()
			idle.RequireClosed(t)
			select {
			case <-drained:
				assert.Fail(t, "Drain has returned while a request is in flight")
			default:
			}
			close(b.release)
			_, body := inFlight.Response(t)
			assert.Equal(t, "Hello", body)
			err := tcptest.Receive(t, drained, "return of Drain")
			if tt.message == "" {
				assert.NoError(t, err)
			} else {
				assert.ErrorContains(t, err, tt.message)
			}
			assert.Equal(t, http.ErrServerClosed, tcptest.Receive(t, served, "return of Serve"))
			requireOnce()
		})
	}
}

func TestDrainAbortsRequestsThatItDoesNotKnowWhenTheContextIsDone(t *testing.T) {
	for name, idle := range map[string]int{"alone": 0, "beside one that it knows": 1} {
		t.Run(name, func(t *testing.T) {
			b := newBlocking(nothing, hello)
			server := &http.Server{Handler: routes{"/": hello, "/blocking": b}}
			drainer := httpdrain.New(server)
			l := tcptest.Listen(t)
			go server.Serve(newTagging(l, int64(idle)))
			for range idle {
				c := httpclient.Dial(t, l.Addr().String(), nil)
				c.Get(t, "/")
				c.Response(t)
			}
			c := httpclient.Dial(t, l.Addr().String(), nil)
			c.Get(t, "/blocking")
			b.awaitEntered(t)
			defer close(b.release)
			ctx, cancel := context.WithCancel(context.Background())
			cancel()
			err := drainer.Drain(ctx)
			assert.ErrorIs(t, err, context.Canceled)
			assert.ErrorContains(t, err, "httpdrain: requests in flight aborted")
			c.RequireClosed(t)
		})
	}
}

// Example

func TestExampleAcceptsUntilTheDelayIsOver(t *testing.T) {
	tcptest.SkipIfShort(t, "takes five seconds")
	t.Parallel()
	cmd := exec.Command(proctest.Self(t))
	cmd.Env = append(os.Environ(), "PORT=0")
	p := proctest.Start(t, cmd)
	var url string
	tcptest.Await(t, "address in the log", func() bool {
		_, port, found := strings.Cut(p.Errors(t), "serving on [::]:")
		url = "http://127.0.0.1:" + strings.TrimSpace(port)
		return found && strings.HasSuffix(port, "\n")
	})
	client := httpclient.NewClient(nil, false, false)
	status := func() int {
		resp, err := client.Get(url + "/ready")
		require.NoError(t, err)
		defer resp.Body.Close()
		return resp.StatusCode
	}
	require.Equal(t, http.StatusOK, status())
	proctest.Signal(t, p.Process, os.Interrupt)
	tcptest.Await(t, "failure of the readiness probe", func() bool {
		return status() == http.StatusServiceUnavailable
	})
	c := httpclient.Dial(t, strings.TrimPrefix(url, "http://"), nil)
	c.Get(t, "/")
	c.RequireLastResponse(t, "Hello\n")
	p.RequireStatus(t, 0)
	_, err := client.Get(url)
	assert.True(t, tcptest.IsRefused(err), "the server is still there: %v", err)
}
