// Package httpdrain is a graceful shutdown of an http.Server with which far fewer requests
// fail than with Shutdown:
//
//	drainer := httpdrain.New(server) // before Serve
//	go server.Serve(sl)              // sl is a StoppableListener
//	sl.Stop()                        // then wait for Serve to return
//	err := drainer.Drain(ctx)
//
// [net/http.Server.Shutdown] closes idle connections at once, even if a client has just sent a
// request on one, and since Go 1.25 also connections that were accepted but not yet read from
// (golang/go#75591). A [Drainer] keeps serving the open connections for a grace period first,
// and sets Connection: close in HTTP/1 responses, so that clients open new connections for
// their next requests. HTTP/1 clients that send a request in the grace period on each of their
// connections see no error.
//
// # Handlers
//
// Handlers get the ResponseWriter of package http itself, with its optional interfaces. For
// handlers that are called after Drain, the header Connection: close is already set. It is not
// set for CONNECT and Upgrade requests, unless the upgrade is to h2c or TLS, which package http
// ignores.
//
// A handler that streams until the client disconnects, such as one for server-sent events,
// should return when a function registered with [net/http.Server.RegisterOnShutdown] is called,
// at the end of the grace period. Drain does not wait for that function, only for the handler.
//
// Like Shutdown, Drain neither waits for hijacked connections, such as WebSockets, nor closes
// them. HTTP/2 connections of golang.org/x/net/http2/h2c are hijacked too; those that
// [net/http.Server] itself accepts (field Protocols, Go 1.24) are not.
//
// # Limitations
//
// A request that a client sends while the server closes its connection fails, unless the
// client sends it again. That can happen here:
//
//   - HTTP/1: on a connection that was idle for the whole grace period, or whose last response
//     had no Connection: close and ended after the grace period; also a request whose header
//     takes longer than the grace period.
//   - HTTP/1 pipelining: a request that was sent before the response with Connection: close was
//     received.
//   - HTTP/2: a request that was sent before GOAWAY was received, which is sent at the end of
//     the grace period. Package http sends one GOAWAY, with the last stream that it has seen,
//     not the two of RFC 9113, section 6.8. Many clients send such a request again if they
//     can send its body again.
//
// An informational response that a handler sends, such as 103 Early Hints, carries Connection:
// close too, which Node.js rejects.
//
// When Serve returns, it closes its listener. If no other process or file has the socket open,
// that resets the connections in its accept queue. With package restart, another process has.
package httpdrain

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// A Drainer shuts down an [http.Server] gracefully. Create one with [New].
type Drainer struct {
	// Grace is how long idle connections stay open after Drain is called. New sets 1.25 s,
	// for clients that send a request every second. It may be changed before Drain is called.
	Grace time.Duration

	server   *http.Server
	draining atomic.Bool // Drain has been called
	shutdown atomic.Bool // the server's Shutdown has been called

	conns sync.Map      // state of each open connection that is not hijacked: net.Conn to *atomic.Int64
	open  atomic.Int64  // number of conns
	empty chan struct{} // holds a value after open has become zero
}

// New returns a Drainer for server, and wraps its Handler and its ConnState. So set these
// fields, if you use them, before you call New, and call New before Serve.
func New(server *http.Server) *Drainer {
	d := &Drainer{
		Grace:  1250 * time.Millisecond,
		server: server,
		empty:  make(chan struct{}, 1),
	}
	handler, connState := server.Handler, server.ConnState
	if handler == nil {
		handler = http.DefaultServeMux
	}
	server.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if d.draining.Load() && r.ProtoMajor == 1 && !switchesProtocols(r) {
			w.Header().Set("Connection", "close")
		}
		handler.ServeHTTP(w, r)
	})
	server.ConnState = func(conn net.Conn, state http.ConnState) {
		d.setState(conn, state)
		if connState != nil {
			connState(conn, state)
		}
	}
	return d
}

// Drain shuts down the server gracefully, and returns nil when all connections but hijacked
// ones are closed. Call it once, after each Serve of the server has returned. The server cannot
// be used again.
//
// While there are connections, and until d.Grace has passed, the server keeps serving them.
// Then Drain calls Shutdown once, which calls the functions registered with
// RegisterOnShutdown, closes idle HTTP/1 connections, and sends GOAWAY on HTTP/2 connections.
// Drain closes the connections that have not sent a request yet, and waits for the others. An
// HTTP/2 connection is closed one second after GOAWAY or after its last response, whichever is
// later.
//
// When ctx is done, Drain closes all of these connections. If requests were in flight on them,
// it returns an error that wraps ctx.Err(); otherwise, nil.
//
// A Serve that is still running accepts and serves new connections until Drain calls Shutdown;
// requests on those accepted last can fail.
//
// Drain does not call [http.Server.SetKeepAlivesEnabled], because that closes idle connections
// at once.
func (d *Drainer) Drain(ctx context.Context) error {
	d.draining.Store(true)
	graceCtx, cancel := context.WithTimeout(ctx, d.Grace)
	d.wait(graceCtx)
	cancel()
	_ = d.server.Shutdown(graceCtx) // does not wait, because graceCtx is done
	d.shutdown.Store(true)
	d.eachInState(http.StateNew, func(conn net.Conn, _ *atomic.Int64) { _ = conn.Close() })
	d.eachInState(http.StateIdle, closeIdle)
	if d.wait(ctx) {
		return nil
	}

	var err error
	d.eachInState(http.StateActive, func(net.Conn, *atomic.Int64) {
		err = fmt.Errorf("httpdrain: requests in flight aborted: %w", ctx.Err())
	})
	_ = d.server.Close()
	return err
}

// wait waits until no connection is left, and returns false if ctx is done before.
func (d *Drainer) wait(ctx context.Context) bool {
	for d.open.Load() > 0 {
		select {
		case <-d.empty:
		case <-ctx.Done():
			return false
		}
	}
	return true
}

// eachInState calls f with each connection in that state.
func (d *Drainer) eachInState(state http.ConnState, f func(net.Conn, *atomic.Int64)) {
	d.conns.Range(func(key, value any) bool {
		if current := value.(*atomic.Int64); current.Load() == int64(state) {
			f(key.(net.Conn), current)
		}
		return true
	})
}

// closeIdle closes conn if it is idle in two seconds. Shutdown has closed the idle HTTP/1
// connections and sent GOAWAY on the HTTP/2 connections, which are closed a second later. But
// it may miss an HTTP/2 connection that has just been set up.
func closeIdle(conn net.Conn, state *atomic.Int64) {
	time.AfterFunc(2*time.Second, func() {
		if state.Load() == int64(http.StateIdle) {
			_ = conn.Close()
		}
	})
}

// setState is called by the server with each new state of each connection.
func (d *Drainer) setState(conn net.Conn, state http.ConnState) {
	switch state {
	case http.StateNew:
		d.conns.Store(conn, new(atomic.Int64))
		d.open.Add(1)
	case http.StateActive, http.StateIdle:
		// x/net's h2c reports these for connections that it has hijacked.
		if value, ok := d.conns.Load(conn); ok {
			current := value.(*atomic.Int64)
			current.Store(int64(state))
			if state == http.StateIdle && d.shutdown.Load() {
				closeIdle(conn, current)
			}
		}
	case http.StateHijacked, http.StateClosed:
		if _, ok := d.conns.LoadAndDelete(conn); ok && d.open.Add(-1) == 0 {
			select {
			case d.empty <- struct{}{}:
			default:
			}
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
