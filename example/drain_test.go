package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener"
	"github.com/c2db162c/stoppablelistener/internal/tcptest"
)

// A service is an http.Server with a drainer, serving.
type service struct {
	*http.Server
	*drainer
	sl     *stoppablelistener.StoppableListener
	config *tls.Config // nil for plain HTTP
	served chan error
}

// startService serves handler on l, with TLS if the configuration is not nil, and keeps l.
func startService(t testing.TB, l net.Listener, config *tls.Config, handler http.Handler) *service {
	s := &service{
		Server: &http.Server{Handler: handler, TLSConfig: config},
		sl:     tcptest.Wrap(t, l),
		config: config,
		served: make(chan error, 1),
	}
	s.drainer = newDrainer(s.Server)
	go func() {
		if config == nil {
			s.served <- s.Serve(keepOpen{s.sl})
		} else {
			s.served <- s.ServeTLS(keepOpen{s.sl}, "", "")
		}
	}()
	t.Cleanup(func() { s.Close() })
	return s
}

// stop stops the listener and waits for Serve.
func (s *service) stop(t testing.TB) {
	s.sl.Stop()
	tcptest.RequireStoppedError(t, tcptest.Receive(t, s.served, "return of Serve"))
}

// startDrain drains s, and returns when that has begun.
func (s *service) startDrain(t *testing.T, ctx context.Context) <-chan error {
	s.stop(t)
	drained := make(chan error, 1)
	go func() { drained <- s.drain(ctx) }()
	await(t, func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.draining
	})
	return drained
}

// dial connects a client, which speaks TLS if the service does.
func (s *service) dial(t testing.TB) *client {
	return dial(t, s.sl.Addr().String(), clientTLS(s.config))
}

// get connects a client that asks for path.
func (s *service) get(t testing.TB, path string) *client {
	c := s.dial(t)
	c.get(t, path)
	return c
}

// awaitConns returns when s has n connections in that state.
func (s *service) awaitConns(t *testing.T, n int, state http.ConnState) {
	await(t, func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		found := 0
		for _, st := range s.conns {
			if st == state {
				found++
			}
		}
		return found == n
	})
}

// A client is a connection on which a test says HTTP/1 itself.
type client struct {
	net.Conn
	answers *bufio.Reader
}

func dial(t testing.TB, addr string, config *tls.Config) *client {
	conn, err := net.Dial("tcp", addr)
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	require.NoError(t, conn.SetDeadline(time.Now().Add(2*tcptest.Patience)))
	if config != nil {
		secure := tls.Client(conn, config)
		require.NoError(t, secure.Handshake())
		conn = secure
	}
	return &client{conn, bufio.NewReader(conn)}
}

func (c *client) send(t testing.TB, request string) {
	_, err := io.WriteString(c, request)
	require.NoError(t, err)
}

func (c *client) get(t testing.TB, path string) {
	c.send(t, "GET "+path+" HTTP/1.1\r\nHost: test\r\n\r\n")
}

// answer returns the next answer, and its body.
func (c *client) answer(t testing.TB) (*http.Response, string) {
	resp, err := http.ReadResponse(c.answers, nil)
	require.NoError(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return resp, string(body)
}

// requireLastAnswer wants Hello, as the last thing that comes.
func (c *client) requireLastAnswer(t testing.TB) {
	resp, body := c.answer(t)
	assert.Equal(t, "Hello", body)
	assert.True(t, resp.Close, "Connection: close")
	c.requireEnd(t)
}

func (c *client) requireEnd(t testing.TB) {
	_, err := c.answers.ReadByte()
	assert.ErrorIs(t, err, io.EOF)
}

var (
	nothing = http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})
	flush   = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.(http.Flusher).Flush() })
	hello   = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "Hello") })
)

// routes is a handler for each path.
func routes(handlers map[string]http.Handler) http.Handler {
	mux := http.NewServeMux()
	for path, handler := range handlers {
		mux.Handle(path, handler)
	}
	return mux
}

// A gate is a handler that calls first, says so, waits, and calls then.
type gate struct {
	first, then http.HandlerFunc
	in, out     chan struct{}
}

func newGate(first, then http.HandlerFunc) *gate {
	return &gate{first, then, make(chan struct{}, 1), make(chan struct{})}
}

func (g *gate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.first(w, r)
	g.in <- struct{}{}
	<-g.out
	g.then(w, r)
}

// The end loses nothing

func TestDrainAnswersWhatIsOnItsWay(t *testing.T) {
	for name, config := range map[string]*tls.Config{"plain": nil, "TLS": serverTLS()} {
		t.Run(name, func(t *testing.T) {
			g := newGate(nothing, hello)
			s := startService(t, tcptest.Listen(t), config, routes(map[string]http.Handler{"/": hello, "/gate": g}))
			handled := s.get(t, "/gate")
			tcptest.Receive(t, g.in, "call of the handler")
			idle := s.get(t, "/")
			resp, _ := idle.answer(t)
			assert.False(t, resp.Close)
			half := s.dial(t)
			half.send(t, "GET / HTTP/1.1\r\nHost:")
			unread := s.dial(t)
			s.awaitConns(t, 1, http.StateActive)
			s.awaitConns(t, 1, http.StateIdle)
			s.awaitConns(t, 2, http.StateNew)

			drained := s.startDrain(t, context.Background())
			unread.get(t, "/")
			unread.requireLastAnswer(t)
			half.send(t, " test\r\n\r\n")
			half.requireLastAnswer(t)
			idle.get(t, "/")
			idle.requireLastAnswer(t)
			last := time.Now()
			close(g.out)
			handled.requireLastAnswer(t)
			require.NoError(t, tcptest.Receive(t, drained, "return of drain"))
			assert.Less(t, time.Since(last), grace, "there was nobody left to wait for")
		})
	}
}

func TestDrainOfNoConnectionReturnsAtOnce(t *testing.T) {
	s := startService(t, tcptest.Listen(t), nil, hello)
	begin := time.Now()
	require.NoError(t, tcptest.Receive(t, s.startDrain(t, context.Background()), "return of drain"))
	assert.Less(t, time.Since(begin), grace)
}

// The headers of two answers are out before the end begins, without Connection: close, and
// their bodies go on for longer than two graces. Then one client goes on, and one is silent.
func TestDrainLetsClientsGoOnThatWereToldSo(t *testing.T) {
	t.Parallel()
	g := newGate(flush, hello)
	s := startService(t, tcptest.Listen(t), nil, routes(map[string]http.Handler{"/": hello, "/gate": g}))
	clients := []*client{s.get(t, "/gate"), s.get(t, "/gate")}
	tcptest.Receive(t, g.in, "call of the handler")
	tcptest.Receive(t, g.in, "call of the handler")
	drained := s.startDrain(t, context.Background())
	time.Sleep(2*grace + grace/10)
	close(g.out)
	for _, c := range clients {
		resp, body := c.answer(t)
		assert.Equal(t, "Hello", body)
		assert.False(t, resp.Close)
	}
	clients[0].get(t, "/")
	clients[0].requireLastAnswer(t)
	clients[1].requireEnd(t)
	require.NoError(t, tcptest.Receive(t, drained, "return of drain"))
}

// askAndDrain has a client ask for what handler answers once the service is being drained.
func askAndDrain(t *testing.T, handler http.HandlerFunc) (c *client, drained <-chan error) {
	g := newGate(nothing, handler)
	s := startService(t, tcptest.Listen(t), nil, g)
	c = s.get(t, "/")
	tcptest.Receive(t, g.in, "call of the handler")
	drained = s.startDrain(t, context.Background())
	close(g.out)
	return c, drained
}

func TestAnswersSayThatTheConnectionEnds(t *testing.T) {
	for name, handler := range map[string]http.HandlerFunc{
		"nothing":     nothing,
		"Write":       hello,
		"WriteHeader": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) },
		"Flush":       flush,
		"ReadFrom": func(w http.ResponseWriter, _ *http.Request) {
			_, _ = w.(io.ReaderFrom).ReadFrom(strings.NewReader("Hello"))
		},
		"ResponseController": func(w http.ResponseWriter, _ *http.Request) {
			assert.NoError(t, http.NewResponseController(w).Flush())
		},
		"a header of its own": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Connection", "keep-alive")
			w.WriteHeader(http.StatusTeapot)
		},
	} {
		t.Run(name, func(t *testing.T) {
			c, drained := askAndDrain(t, handler)
			resp, _ := c.answer(t)
			assert.True(t, resp.Close)
			c.requireEnd(t)
			require.NoError(t, tcptest.Receive(t, drained, "return of drain"))
		})
	}
}

func TestInformationalAnswersDoNotSayThatTheConnectionEnds(t *testing.T) {
	c, drained := askAndDrain(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusEarlyHints)
		hello(w, r)
	})
	resp, _ := c.answer(t)
	assert.Equal(t, http.StatusEarlyHints, resp.StatusCode)
	assert.False(t, resp.Close)
	c.requireLastAnswer(t)
	require.NoError(t, tcptest.Receive(t, drained, "return of drain"))
}

// The end comes

func TestDrainClosesSilentConnectionsAfterTheGrace(t *testing.T) {
	for name, config := range map[string]*tls.Config{"plain": nil, "TLS": serverTLS()} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := startService(t, tcptest.Listen(t), config, hello)
			idle := s.get(t, "/")
			idle.answer(t)
			unread := s.dial(t)
			dial(t, s.sl.Addr().String(), nil) // not even a TLS handshake
			s.awaitConns(t, 1, http.StateIdle)
			s.awaitConns(t, 2, http.StateNew)

			begin := time.Now()
			require.NoError(t, tcptest.Receive(t, s.startDrain(t, context.Background()), "return of drain"))
			took := time.Since(begin)
			assert.GreaterOrEqual(t, took, grace)
			assert.Less(t, took, 5*time.Second, "Shutdown would wait so long")
			idle.requireEnd(t)
			unread.requireEnd(t)
		})
	}
}

func TestDrainCutsRequestsOff(t *testing.T) {
	g := newGate(nothing, hello)
	s := startService(t, tcptest.Listen(t), nil, g)
	c := s.get(t, "/")
	tcptest.Receive(t, g.in, "call of the handler")
	defer close(g.out)
	ctx, cancel := context.WithCancel(context.Background())
	drained := s.startDrain(t, ctx)
	cancel()
	assert.ErrorIs(t, tcptest.Receive(t, drained, "return of drain"), context.Canceled)
	c.requireEnd(t)
}

func TestDrainCutsSilentConnectionsOffWithoutAnError(t *testing.T) {
	s := startService(t, tcptest.Listen(t), nil, hello)
	idle, unread := s.get(t, "/"), s.dial(t)
	idle.answer(t)
	s.awaitConns(t, 1, http.StateIdle)
	s.awaitConns(t, 1, http.StateNew)
	ctx, cancel := context.WithCancel(context.Background())
	drained := s.startDrain(t, ctx)
	cancel()
	assert.NoError(t, tcptest.Receive(t, drained, "return of drain"))
	idle.requireEnd(t)
	unread.requireEnd(t)
}

func TestDrainWaitsForNoHijackedConnection(t *testing.T) {
	hijacked := make(chan net.Conn, 1)
	s := startService(t, tcptest.Listen(t), nil, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := w.(http.Hijacker).Hijack()
		if assert.NoError(t, err) {
			hijacked <- conn
		}
	}))
	c := s.get(t, "/")
	conn := tcptest.Receive(t, hijacked, "call of the handler")
	defer conn.Close()
	begin := time.Now()
	require.NoError(t, tcptest.Receive(t, s.startDrain(t, context.Background()), "return of drain"))
	assert.Less(t, time.Since(begin), grace)
	_, err := io.WriteString(conn, "still here\n")
	require.NoError(t, err)
	line, err := c.answers.ReadString('\n')
	require.NoError(t, err)
	assert.Equal(t, "still here\n", line)
}

func TestDrainWaitsForNoHandlerThatPanics(t *testing.T) {
	abort := http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
	begun := newGate(flush, abort)
	s := startService(t, tcptest.Listen(t), nil, routes(map[string]http.Handler{"/": abort, "/gate": begun}))
	s.get(t, "/").requireEnd(t)
	s.get(t, "/gate")
	tcptest.Receive(t, begun.in, "call of the handler")
	drained := s.startDrain(t, context.Background())
	begin := time.Now()
	close(begun.out)
	require.NoError(t, tcptest.Receive(t, drained, "return of drain"))
	assert.Less(t, time.Since(begin), grace)
	assert.Zero(t, s.promised)
}

// HTTP/2

// One session is idle. On the other, one request has not been answered yet, and the answer to
// another has begun: HTTP/2 needs no Connection: close to tell that client.
func TestDrainEndsHTTP2Sessions(t *testing.T) {
	t.Parallel()
	config := serverTLS()
	handled := newGate(nothing, hello)
	begun := newGate(flush, hello)
	s := startService(t, tcptest.Listen(t), config,
		routes(map[string]http.Handler{"/": hello, "/handled": handled, "/begun": begun}))
	shutdown := make(chan struct{})
	s.RegisterOnShutdown(func() { close(shutdown) })

	idle, busy := newClient(config, true, true), newClient(config, true, true)
	url := "https://" + s.sl.Addr().String()
	require.Equal(t, "Hello", post(t, idle, url))
	s.awaitConns(t, 1, http.StateIdle)
	answers := make(chan string, 2)
	for path, g := range map[string]*gate{"/handled": handled, "/begun": begun} {
		go func() { answers <- post(t, busy, url+path) }()
		tcptest.Receive(t, g.in, "call of the handler")
	}

	drained := s.startDrain(t, context.Background())
	tcptest.Receive(t, shutdown, "call of Shutdown")
	s.awaitConns(t, 0, http.StateIdle)
	close(handled.out)
	close(begun.out)
	assert.Equal(t, "Hello", tcptest.Receive(t, answers, "response"))
	assert.Equal(t, "Hello", tcptest.Receive(t, answers, "response"))
	require.NoError(t, tcptest.Receive(t, drained, "return of drain"))
}

// What a service sees of it

func TestHandlersKeepTheirOptionalMethods(t *testing.T) {
	for name, http2 := range map[string]bool{"HTTP/1.1": false, "HTTP/2.0": true} {
		t.Run(name, func(t *testing.T) {
			config := serverTLS()
			s := startService(t, tcptest.Listen(t), config, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				assert.Equal(t, name, r.Proto)
				assert.Implements(t, (*http.Flusher)(nil), w)
				assert.Implements(t, (*http.Hijacker)(nil), w)
				assert.Implements(t, (*io.ReaderFrom)(nil), w)
				assert.NoError(t, http.NewResponseController(w).SetWriteDeadline(time.Now().Add(tcptest.Patience)))
				if http2 {
					_, _, err := w.(http.Hijacker).Hijack()
					assert.ErrorIs(t, err, http.ErrNotSupported)
				}
				_, _ = io.Copy(w, strings.NewReader("Hello"))
			}))
			assert.Equal(t, "Hello", post(t, newClient(config, http2, true), "https://"+s.sl.Addr().String()))
		})
	}
}

func TestNewDrainerKeepsWhatTheServerHas(t *testing.T) {
	l := tcptest.Listen(t)
	states := make(chan http.ConnState, 10)
	server := &http.Server{ConnState: func(_ net.Conn, state http.ConnState) { states <- state }}
	newDrainer(server)
	go server.Serve(l)
	defer server.Close()
	c := dial(t, l.Addr().String(), nil)
	c.get(t, "/")
	resp, _ := c.answer(t)
	assert.Equal(t, http.StatusNotFound, resp.StatusCode, "http.DefaultServeMux")
	for _, state := range []http.ConnState{http.StateNew, http.StateActive, http.StateIdle} {
		assert.Equal(t, state, tcptest.Receive(t, states, "call of ConnState"))
	}
}

// Load

// kinds are those of a load.
var kinds = []struct {
	name                  string
	tls, http2, keepAlive bool
}{
	{name: "new connections"},
	{name: "keep-alive", keepAlive: true},
	{name: "TLS", tls: true, keepAlive: true},
	{name: "HTTP/2", tls: true, http2: true, keepAlive: true},
}

func TestDrainFailsNoRequestUnderLoad(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			ends := 300
			var config *tls.Config
			if kind.tls {
				ends = 50 // the handshakes take most of the time
				config = serverTLS()
			}
			answered, failed := endUnderLoad(t, config, kind.http2, kind.keepAlive, ends, (*service).drain)
			t.Logf("%d ends, %d requests", ends, answered+failed)
			assert.Zero(t, failed)
		})
	}
}

// BenchmarkEnd counts the requests that fail because a server ends, and another one serves
// the same socket.
func BenchmarkEnd(b *testing.B) {
	const ends = 100
	for _, kind := range kinds[:2] {
		b.Run(kind.name, func(b *testing.B) {
			lost := make(map[string]int64)
			for range b.N {
				for name, end := range map[string]func(*service, context.Context) error{
					"drain":    (*service).drain,
					"Shutdown": (*service).Shutdown,
				} {
					_, failed := endUnderLoad(b, nil, kind.http2, kind.keepAlive, ends, end)
					lost[name] += failed
				}
			}
			for name, n := range lost {
				b.ReportMetric(float64(n)/float64(b.N*ends), name+"-lost/end")
			}
			b.ReportMetric(0, "ns/op")
		})
	}
}

// endUnderLoad ends servers on one socket, one after the other, while clients post without
// pause, and returns how many requests were answered and how many were not.
func endUnderLoad(t testing.TB, config *tls.Config, http2, keepAlive bool, ends int,
	end func(*service, context.Context) error) (answered, failed int64) {
	const clients, perServer = 8, 60
	l := tcptest.Listen(t)
	scheme := "http://"
	if config != nil {
		scheme = "https://"
	}
	load := startLoad(t, scheme+l.Addr().String(), clients, "", func() *http.Client {
		return newClient(config, http2, keepAlive)
	})
	var ending sync.WaitGroup
	for n := range ends + 1 {
		handled, enough := tcptest.Countdown(perServer)
		s := startService(t, l, config, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			handled()
			_, _ = io.Copy(w, r.Body)
		}))
		tcptest.Receive(t, enough, "requests")
		if n == ends { // the last one ends without clients
			load.stop()
		}
		s.stop(t)
		ending.Add(1)
		go func() {
			defer ending.Done()
			ctx, cancel := context.WithTimeout(context.Background(), 3*tcptest.Patience)
			defer cancel()
			assert.NoError(t, end(s, ctx))
		}()
	}
	ending.Wait()
	return load.answered.Load(), load.failed.Load()
}

// A load is clients that post without pause.
type load struct {
	answered, failed atomic.Int64
	done             atomic.Bool
	posting          sync.WaitGroup
}

// startLoad has clients post to url, each one request after the other, on connections of
// its own, until stop is called or the test ends. Every answer is to be want or, if that is
// empty, what was posted.
func startLoad(t testing.TB, url string, clients int, want string, newClient func() *http.Client) *load {
	ld := new(load)
	t.Cleanup(ld.stop)
	for i := range clients {
		ld.posting.Add(1)
		go func() {
			defer ld.posting.Done()
			client := newClient()
			defer client.CloseIdleConnections()
			for n := 0; !ld.done.Load(); n++ {
				text := fmt.Sprintf("client %d, request %d", i, n)
				body, err := tryPost(client, url, text)
				if err == nil && (body == want || want == "" && body == text) {
					ld.answered.Add(1)
				} else {
					ld.failed.Add(1)
				}
			}
		}()
	}
	return ld
}

// stop waits until the clients have ended.
func (ld *load) stop() {
	ld.done.Store(true)
	ld.posting.Wait()
}

// await returns when n more requests have been answered.
func (ld *load) await(t testing.TB, n int64) {
	enough := ld.answered.Load() + n
	await(t, func() bool { return ld.answered.Load() >= enough })
}

// Helpers

// serverTLS is httptest's certificate, which is its own authority.
func serverTLS() *tls.Config {
	s := httptest.NewTLSServer(nil)
	s.Close()
	return &tls.Config{Certificates: s.TLS.Certificates}
}

func clientTLS(server *tls.Config) *tls.Config {
	if server == nil {
		return nil
	}
	roots := x509.NewCertPool()
	cert, _ := x509.ParseCertificate(server.Certificates[0].Certificate[0])
	roots.AddCert(cert)
	return &tls.Config{RootCAs: roots, ServerName: "example.com"}
}

// newClient returns a client with connections of its own. It resets them when it has no more
// use for them, for thousands that end in order would use the machine's ports up.
func newClient(server *tls.Config, http2, keepAlive bool) *http.Client {
	dial := func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return conn, conn.(*net.TCPConn).SetLinger(0)
	}
	return &http.Client{Timeout: tcptest.Patience, Transport: &http.Transport{
		DialContext:       dial,
		TLSClientConfig:   clientTLS(server),
		ForceAttemptHTTP2: http2,
		DisableKeepAlives: !keepAlive,
	}}
}

func tryPost(client *http.Client, url, body string) (string, error) {
	resp, err := client.Post(url, "text/plain", strings.NewReader(body))
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	return string(bytes.TrimSpace(answer)), err
}

func post(t testing.TB, client *http.Client, url string) string {
	body, err := tryPost(client, url, "")
	assert.NoError(t, err)
	return body
}

// await returns when condition holds.
func await(t testing.TB, condition func() bool) {
	t.Helper()
	require.Eventually(t, condition, tcptest.Patience, time.Millisecond)
}
