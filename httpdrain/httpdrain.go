// Package httpdrain runs an http.Server until a context is done, and then shuts it down
// gracefully, with far fewer failed requests than Shutdown:
//
//	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
//	context.AfterFunc(ctx, stop) // a second signal kills the process
//	server := &http.Server{Addr: ":8080", Handler: mux}
//	err := httpdrain.New(server).ListenAndServe(ctx) // nil after a graceful shutdown
//
// [net/http.Server.Shutdown] resets the connections in the accept queue. It closes idle
// connections at once, even if a client has just sent a request on one, and since Go 1.25 also
// connections that were accepted but not yet read from (golang/go#75591).
//
// A [Drainer] serves the accept queue, while new connections are refused (on Linux), and keeps
// serving the open connections for a grace period ([Drainer.Grace]). It makes clients open new
// connections for their next requests, elsewhere: HTTP/1 responses carry Connection: close, and
// HTTP/2 connections get GOAWAY twice, as RFC 9113, section 6.8 says. Requests in flight are
// served.
//
// Behind a load balancer, which notices only after some time that an instance is being stopped,
// set [Drainer.Delay]. The package example does that.
//
// # Handlers
//
// Handlers get the ResponseWriter of package http itself, with its optional interfaces. Their
// contexts are not done when that of Serve is. For handlers that are called after that, the header
// Connection: close is already set, over HTTP/2 only where package http sends GOAWAY because of it.
// It is set neither for CONNECT nor for upgrades, except those to h2c or TLS, which package http
// ignores. A handler must keep that header, except while it sends an informational response, such
// as 103 Early Hints, which some clients reject otherwise. The example ReverseProxy shows how.
//
// A handler that streams until the client disconnects, such as one for server-sent events, should
// return when ctx is done. With Delay, its client may reach this server again: let it return when
// a function registered with [net/http.Server.RegisterOnShutdown] is called, which is at the end
// of the grace period. Like Shutdown, a Drainer neither waits for hijacked connections, such as
// WebSockets and those of x/net's h2c, nor closes them.
//
// # Limitations
//
// A request that a client sends while the server closes its connection fails, unless the client
// sends it again. That can happen here:
//
//   - HTTP/1: on a connection that was idle for the whole grace period, or on which a response
//     without Connection: close ended after it.
//   - HTTP/1: a request whose header takes longer than the grace period, one that was pipelined,
//     and one after OPTIONS *, unless the server's DisableGeneralOptionsHandler is set.
//   - TLS: on a connection whose handshake and first request take longer than the grace period.
//   - HTTP/2 over TLS before Go 1.27, and later with x/net/http2.ConfigureServer or TLSNextProto: a
//     request that was sent before GOAWAY was received, of a client that sends several at a time.
//   - HTTP/2: on a connection on which the client does not read GOAWAY within the grace period, or
//     had no response before its end. What a client has not read of a response a second after its
//     handler has returned is lost too.
package httpdrain

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/c2db162c/stoppablelistener"
)

// A Drainer runs an [http.Server] and shuts it down gracefully. Create one with [New]. Its fields
// are read when it first starts to serve. Multiple goroutines may invoke its methods
// simultaneously.
type Drainer struct {
	// Delay is how long the server still accepts connections after the context is done. Meanwhile,
	// its HTTP/1 responses carry Connection: close. New sets zero. Delay is skipped if package
	// restart has replaced the process.
	//
	// Behind a load balancer, it must exceed the time until the last balancer has noticed that
	// the instance is not ready. With health checks, that is their interval times the number that
	// must fail. In Kubernetes, where the deletion of a Pod has to reach each node, it is usually
	// some seconds, and terminationGracePeriodSeconds must exceed the sum of Delay, Timeout and the
	// time that main needs afterwards. A preStop hook that sleeps is no substitute, because clients
	// keep their connections meanwhile.
	Delay time.Duration

	// Grace is how long idle connections stay open after the accept loops have returned. New
	// sets 1.25 s, for clients that send a request every second. A connection that becomes idle
	// in that time, after a response without Connection: close, stays open for Grace from then
	// on.
	Grace time.Duration

	// Timeout is how long the shutdown may take after the listeners' Drain has returned, Grace
	// included, Delay not. Then the connections are closed. New sets 10 s. To abort no request,
	// let it exceed 2 s, for handshakes, plus twice Grace, for a connection that becomes idle late,
	// plus the longest request. If it is zero or negative, there is no timeout.
	Timeout time.Duration

	server    *http.Server
	setUpOnce sync.Once
	protocols protocols
	drain     drain
}

// New returns a Drainer for server, which must have only one. The server's fields may be set until
// the Drainer starts to serve. It then replaces Handler, ConnState, ConnContext and BaseContext by
// functions that call those of the server, and TLSConfig by a copy.
func New(server *http.Server) *Drainer {
	return &Drainer{
		Grace:   1250 * time.Millisecond,
		Timeout: 10 * time.Second,
		server:  server,
		drain: drain{
			server:      server,
			conns:       conns{wake: make(chan struct{}, 1)},
			done:        make(chan struct{}),
			acceptLoops: make(map[*acceptLoop]struct{}),
		},
	}
}

// A Listener is what a [Drainer] serves: a [*stoppablelistener.StoppableListener], or a listener
// that wraps one, with a Drain method that calls the Drain method of what it wraps.
//
// After Drain, Accept must return an error, and before that the pending connections, unless the
// next server is to accept them.
//
// To keep a socket open for the next server of the same process, let Drain and Close call Stop of
// the StoppableListener, and do nothing else. The next server may wrap the socket when Serve has
// returned.
type Listener interface {
	net.Listener
	Drain()
}

// Serve serves l, as [net/http.Server.Serve] does, until ctx is done, and then shuts the server
// down gracefully:
//
//   - Responses to HTTP/1 requests that arrive from now on carry Connection: close.
//   - For Delay, everything else goes on.
//   - Serve calls l.Drain. HTTP/2 connections get their first GOAWAY: idle ones at once, others
//     with the next frame, but not before the header of their first response.
//   - The accept loop returns, when the connections in the accept queue have been accepted.
//   - Open connections are served for Grace, or until they are closed.
//   - Serve calls Shutdown, which calls the functions registered with RegisterOnShutdown, closes
//     idle HTTP/1 connections, and sends GOAWAY on HTTP/2 connections. Connections on which no
//     request was sent are closed.
//   - Requests in flight are served. An HTTP/2 connection is closed one second after GOAWAY or
//     after its last response, whichever is later.
//
// Serve then returns nil. If requests are in flight after Timeout, it closes the connections, and
// returns an error that says how many requests were aborted, and wraps [context.DeadlineExceeded].
//
// If ctx is done before the call, Serve shuts the server down without Delay.
//
// A Drainer may serve several listeners at the same time, with and without TLS. If one of them
// fails, its Serve returns that error at once, and the others keep serving. The first context that
// is done shuts the server down, and each Serve returns when the shutdown is over. If called later,
// or if other code has shut the server down, Serve returns [http.ErrServerClosed].
//
// If an accept loop has not returned Grace after Drain, Accept may be blocked in a wrapper such as
// a full netutil.LimitListener. Then Serve makes room: it closes the connections that have been
// idle or unused for Grace, and again each Grace. Timeout bounds this too.
//
// ConnState, ConnContext and Hijack may get a wrapper of a connection: if Accept of l returns a
// type of its own, if the server serves unencrypted HTTP/2, and with TLS since Go 1.27. It has a
// method NetConn, as [*tls.Conn] has. If TLSConfig rules HTTP/2 out by its CipherSuites, Serve
// returns the error of [net/http.Server.ServeTLS].
func (d *Drainer) Serve(ctx context.Context, l Listener) error {
	d.setUpOnce.Do(d.setUp)
	return d.serve(ctx, l, l)
}

// ServeTLS does what Serve does, over TLS. It uses the server's TLSConfig, certFile and keyFile as
// [net/http.Server.ServeTLS] does. If the certificate cannot be loaded, it returns that error and
// leaves l open.
//
// With package restart, load the certificate into TLSConfig before Ready: a new process that fails
// later has already replaced the old one.
func (d *Drainer) ServeTLS(ctx context.Context, l Listener, certFile, keyFile string) error {
	d.setUpOnce.Do(d.setUp)
	config, err := d.protocols.tlsConfig(d.server.TLSConfig, certFile, keyFile)
	if err != nil {
		return err
	}
	return d.serve(ctx, l, tls.NewListener(l, config))
}

// ListenAndServe listens on the server's Addr, ":http" if it is empty, and calls Serve. It has
// closed its listener when it returns.
func (d *Drainer) ListenAndServe(ctx context.Context) error {
	l, err := d.listen(":http")
	if err != nil {
		return err
	}
	defer l.Close()
	return d.Serve(ctx, l)
}

// ListenAndServeTLS listens on the server's Addr, ":https" if it is empty, and calls ServeTLS. It
// has closed its listener when it returns.
func (d *Drainer) ListenAndServeTLS(ctx context.Context, certFile, keyFile string) error {
	l, err := d.listen(":https")
	if err != nil {
		return err
	}
	defer l.Close()
	return d.ServeTLS(ctx, l, certFile, keyFile)
}

func (d *Drainer) listen(defaultAddr string) (Listener, error) {
	addr := d.server.Addr
	if addr == "" {
		addr = defaultAddr
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, err
	}
	return stoppablelistener.New(l)
}

// setUp reads the fields, and puts the hooks into the server.
func (d *Drainer) setUp() {
	d.drain.delay, d.drain.grace, d.drain.timeout = d.Delay, d.Grace, d.Timeout
	d.protocols = setUpHTTP2(d.server)
	handler, connState := d.server.Handler, d.server.ConnState
	connContext, baseContext := d.server.ConnContext, d.server.BaseContext
	if handler == nil {
		handler = http.DefaultServeMux
	}
	d.server.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.ProtoMajor {
		case 1:
			if d.drain.started.Load() && !switchesProtocols(r) {
				w.Header().Set("Connection", "close")
			}
		case 2:
			if c, ok := r.Context().Value(d).(*connection); ok {
				defer c.inFlight.Add(-1)
				if c.inFlight.Add(1) == 1 && c.goAway == nil && d.drain.conns.draining.Load() {
					w.Header().Set("Connection", "close") // package http sends GOAWAY instead
				}
			}
		}
		handler.ServeHTTP(w, r)
	})
	d.server.ConnState = func(conn net.Conn, state http.ConnState) {
		d.drain.conns.setState(conn, state)
		if connState != nil {
			connState(conn, state)
		}
	}
	d.server.ConnContext = func(ctx context.Context, conn net.Conn) context.Context {
		if connContext != nil {
			ctx = connContext(ctx, conn)
		}
		return context.WithValue(ctx, d, d.drain.conns.add(conn))
	}
	if baseContext != nil {
		d.server.BaseContext = func(l net.Listener) context.Context {
			if loop, ok := l.(*acceptLoop); ok {
				l = loop.listener
			}
			return baseContext(l)
		}
	}
}

// switchesProtocols reports whether the connection may be used for another protocol after
// the response to r. Some clients offer h2c or TLS in each request, and expect to be ignored.
func switchesProtocols(r *http.Request) bool {
	upgrade := strings.ToLower(r.Header.Get("Upgrade"))
	return r.Method == http.MethodConnect ||
		upgrade != "" && upgrade != "h2c" && !strings.HasPrefix(upgrade, "tls/")
}

// An acceptLoop is a call of the server's Serve, and the listener that it accepts from.
type acceptLoop struct {
	net.Listener // listener, or one that adds TLS to it
	listener     Listener
	drainer      *Drainer
}

func (a *acceptLoop) Accept() (net.Conn, error) {
	conn, err := a.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return a.drainer.protocols.wrap(asKey(conn), &a.drainer.drain.conns.draining), nil
}

// serve serves l. Its connections come from accepted.
func (d *Drainer) serve(ctx context.Context, l Listener, accepted net.Listener) error {
	if ctx.Err() == nil {
		d.drain.known.Store(true)
	}
	a := &acceptLoop{accepted, l, d}
	if !d.drain.add(a) {
		_ = l.Close() // as the server's Serve does
		return http.ErrServerClosed
	}
	failed := make(chan error, 1)
	go func() {
		err := d.server.Serve(a)
		if !d.drain.remove(a, err) {
			failed <- err
		}
	}()
	defer context.AfterFunc(ctx, func() { d.drain.run(context.Cause(ctx)) })()
	select {
	case err := <-failed:
		return err
	case <-d.drain.done:
		return d.drain.err
	}
}
