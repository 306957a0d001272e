// Package httpdrain shuts down an http.Server gracefully, with far fewer failed requests than
// Shutdown:
//
//	drainer := httpdrain.New(server) // before Serve
//	go server.Serve(sl)              // sl is a StoppableListener
//	drainer.DisableKeepAlives()      // responses carry Connection: close
//	sl.Drain()                       // then wait for Serve to return
//	err := drainer.Drain(ctx)        // serves the open connections until they are closed
//
// [net/http.Server.Shutdown] closes idle connections at once, even if a client has just sent a
// request on one, and since Go 1.25 also connections that were accepted but not yet read from
// (golang/go#75591). A [Drainer] keeps serving the open connections for a grace period first.
// Its responses carry Connection: close, or come with GOAWAY (HTTP/2), so that clients open new
// connections for their next requests. An HTTP/1 client that sends a request on each of its
// connections during the grace period sees no error, within the limitations below. An HTTP/2
// client that sends several at a time gains little.
//
// # Load balancers
//
// A load balancer, such as a Kubernetes Service, haproxy or nginx, notices only after some time
// that an instance of a server is being stopped. Until then it sends new connections, and if
// these are refused, requests fail. So in a rolling update, an instance must keep accepting:
//
//	<-ctx.Done()                // SIGTERM
//	stopping.Store(true)        // the readiness probe fails from now on
//	drainer.DisableKeepAlives() // HTTP/1 clients reconnect, to other instances
//	time.Sleep(delay)           // longer than the load balancer needs to notice
//	sl.Drain()                  // then wait for Serve to return
//	err := drainer.Drain(drainCtx)
//
// The package example is a program that does this. The first snippet is for a server without a
// load balancer. If its socket stays open for the next server, it calls Stop instead of Drain.
//
// The delay must exceed the time until the last load balancer has noticed: with health checks,
// their interval times the number that must fail; in Kubernetes, where the deletion of a Pod
// has to reach each node, usually some seconds. An HTTP/1 client that pauses on its connections
// for less than delay + Grace sees no error, within the limitations below.
//
// In Kubernetes, terminationGracePeriodSeconds must exceed delay + 2 Grace + the longest request
// + 3 s. A preStop hook that sleeps is no substitute for the delay, because the process does
// not know yet that it is being stopped, and its clients keep their connections. A rolling
// update replaces processes, so it does not need package restart.
//
// Behind a load balancer that checks health, and reuses its own connections, such as haproxy, a
// sleep and then Shutdown failed no request either when we measured it.
//
// # Handlers
//
// Handlers get the ResponseWriter of package http itself, with its optional interfaces. For
// HTTP/1 handlers that are called after DisableKeepAlives, the header Connection: close is
// already set; for some HTTP/2 handlers that are called after Drain too, where package http sends
// GOAWAY instead. It is not set for CONNECT and Upgrade requests, except for upgrades to h2c and
// TLS, which package http ignores. A handler must neither delete it nor set Connection: keep-alive:
// its clients would send their next requests on a connection that is about to be closed.
//
// An informational response that a handler sends, such as 103 Early Hints, would carry
// Connection: close too. Clients reject that: Node.js always, others over HTTP/2. Such a handler
// should delete the header first, and may set it again afterwards. An httputil.ReverseProxy
// forwards its backend's informational responses, such as 100 Continue: call it from a handler
// that deletes the header, and once the server is being stopped, set it in ModifyResponse,
// unless the status is 101.
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
//     had no Connection: close and ended later than Grace after the call of Drain; also a
//     request whose header takes longer than the grace period.
//   - HTTP/1 pipelining: a request that was sent before the response with Connection: close was
//     received.
//   - OPTIONS *, to which package http itself responds, without Connection: close, unless the
//     server's DisableGeneralOptionsHandler is set.
//   - HTTP/2: a request that was sent before GOAWAY was received. In the grace period, GOAWAY
//     comes with the header of the response to a request that was alone in flight on its
//     connection when its handler was called; clients that send one request at a time are not
//     affected. On other connections, GOAWAY is sent at the end of the grace period. Package
//     http sends one GOAWAY, with the last stream that it has seen, not the two of RFC 9113,
//     section 6.8. Many clients send such a request again if they can send its body again.
//   - HTTP/2: the end of a response that its client has not read a second after the handler has
//     written it. Package http closes the connection then, also after Shutdown.
package httpdrain

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// A Drainer shuts down an [http.Server] gracefully. Create one with [New]. Multiple goroutines
// may invoke its methods simultaneously.
type Drainer struct {
	// Grace is how long idle connections stay open after Drain is called. New sets 1.25 s,
	// for clients that send a request every second. It may be changed before Drain is called.
	Grace time.Duration

	server             *http.Server
	keepAlivesDisabled atomic.Bool
	draining           atomic.Bool // Drain has been called
	shutdownOnce       sync.Once
	shutdown           atomic.Bool // the server's Shutdown has been called

	accepted atomic.Int64 // number of calls of ConnContext
	reported atomic.Int64 // number of connections that were reported to ConnState
	unknown  atomic.Bool  // a connection was reported that cannot be a key of conns
	conns    sync.Map     // open connections that are not hijacked: net.Conn to *connInfo
	open     atomic.Int64 // number of conns

	fresh    atomic.Int64 // number of idle conns that have become so since Drain was called
	mu       sync.Mutex   // guards lastIdle; the lock of changed
	lastIdle time.Time    // when the last of the fresh conns has become idle
	changed  sync.Cond    // open or fresh has become zero, or a context is done
}

// A connInfo is what a Drainer knows about a connection.
type connInfo struct {
	state   atomic.Int32 // the last http.ConnState
	changes atomic.Int64 // of state since Drain was called; counted after each
	fresh   bool         // it has become idle since Drain was called; only setState uses it
}

func (c *connInfo) is(state http.ConnState) bool { return c.state.Load() == int32(state) }

// New returns a Drainer for server, and wraps its Handler, ConnState and ConnContext; a nil
// Handler is [http.DefaultServeMux], as usual. So set these fields, if you use them, before you
// call New, and call New before Serve. If Handler is replaced later, responses do not carry
// Connection: close; if ConnContext is, they do not come with GOAWAY; if ConnState is, Drain
// returns an error; if both are, Drain waits for nothing.
//
// Some frameworks replace them, such as echo with its Start and StartServer. Then use the
// framework as the Handler of your own server: http.Server{Handler: e}.
func New(server *http.Server) *Drainer {
	d := &Drainer{Grace: 1250 * time.Millisecond, server: server}
	d.changed.L = &d.mu
	handler, connState, connContext := server.Handler, server.ConnState, server.ConnContext
	if handler == nil {
		handler = http.DefaultServeMux
	}
	server.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.ProtoMajor {
		case 1:
			if d.keepAlivesDisabled.Load() && !switchesProtocols(r) {
				w.Header().Set("Connection", "close")
			}
		case 2:
			if inFlight, ok := r.Context().Value(d).(*atomic.Int64); ok {
				defer inFlight.Add(-1)
				if inFlight.Add(1) == 1 && d.draining.Load() {
					w.Header().Set("Connection", "close") // package http sends GOAWAY instead
				}
			}
		}
		handler.ServeHTTP(w, r)
	})
	server.ConnState = func(conn net.Conn, state http.ConnState) {
		d.setState(conn, state)
		if connState != nil {
			connState(conn, state)
		}
	}
	server.ConnContext = func(ctx context.Context, conn net.Conn) context.Context {
		d.accepted.Add(1)
		if connContext != nil {
			ctx = connContext(ctx, conn)
		}
		return context.WithValue(ctx, d, new(atomic.Int64)) // number of HTTP/2 requests in flight
	}
	return d
}

// DisableKeepAlives makes HTTP/1 responses carry Connection: close from now on, so that clients
// open a new connection for their next request. It changes nothing else: the server keeps
// accepting connections, and idle ones stay open. Calls after the first do nothing.
//
// It differs from [http.Server.SetKeepAlivesEnabled], which closes idle connections at once,
// even while a client is sending on one.
func (d *Drainer) DisableKeepAlives() { d.keepAlivesDisabled.Store(true) }

// Drain shuts down the server gracefully, and returns nil when all connections but hijacked
// ones are closed. Call it after each Serve of the server has returned. The server cannot be
// used again.
//
// Drain calls DisableKeepAlives. While there are connections, the server keeps serving them for
// the grace period. It lasts d.Grace, or up to twice that: a connection that becomes idle within
// d.Grace, after a response without Connection: close, stays open for d.Grace from then on.
//
// Then Drain calls Shutdown, which calls the functions registered with RegisterOnShutdown,
// closes idle HTTP/1 connections, and sends GOAWAY on HTTP/2 connections. Drain closes the
// connections that have not sent a request yet, and waits for the others. An HTTP/2 connection
// is closed one second after GOAWAY or after its last response, whichever is later.
//
// When ctx is done, Drain closes all of these connections. If requests were in flight on them,
// it returns an error that wraps ctx.Err(); otherwise, nil. To abort no request, let ctx last for
// 2 Grace plus the longest request. If two calls run at the same time, both return when no
// connection is left, or the context of one is done; only that call returns the error.
//
// If a Serve is still running, Drain returns as soon as no connection happens to be open, and
// requests on the connections accepted last can fail. To keep accepting connections, call
// DisableKeepAlives, and Drain later.
//
// Drain does not know connections whose [net.Conn] cannot be a map key, such as a struct that
// contains a slice: they have no grace period, and Drain waits for all connections as Shutdown
// does then; a second call waits for the first.
func (d *Drainer) Drain(ctx context.Context) error {
	d.DisableKeepAlives()
	d.draining.Store(true)
	graceCtx, cancel := context.WithTimeout(ctx, d.Grace)
	defer cancel()
	d.wait(graceCtx, &d.open)
	d.mu.Lock()
	settled := d.lastIdle.Add(d.Grace)
	d.mu.Unlock()
	settleCtx, cancel := context.WithDeadline(ctx, settled)
	d.wait(settleCtx, &d.fresh)

	cancel()
	var err error
	d.shutdownOnce.Do(func() { // a second call would call the registered functions again
		if d.unknown.Load() || d.replaced() {
			err = d.server.Shutdown(ctx)
		} else {
			_ = d.server.Shutdown(settleCtx) // does not wait, because settleCtx is done
		}
	})
	d.shutdown.Store(true)
	d.eachInState(http.StateNew, func(conn net.Conn, _ *connInfo) { _ = conn.Close() })
	d.eachInState(http.StateIdle, closeIfIdleLater)
	if !d.wait(ctx, &d.open) {
		d.eachInState(http.StateActive, func(net.Conn, *connInfo) { err = ctx.Err() })
	}
	if ctx.Err() != nil {
		_ = d.server.Close()
	}
	if err != nil {
		err = fmt.Errorf("httpdrain: requests in flight aborted: %w", err)
	}
	if d.replaced() {
		err = errors.Join(errReplaced, err)
	}
	return err
}

// replaced reports whether the server calls another ConnState. It can be wrong while Serve is
// running, which Shutdown waits for.
func (d *Drainer) replaced() bool { return d.accepted.Load() > d.reported.Load() }

var errReplaced = errors.New("httpdrain: no grace period, because ConnState was replaced after New")

// wait waits until n, which is open or fresh, is zero, and returns false if ctx is done before.
func (d *Drainer) wait(ctx context.Context, n *atomic.Int64) bool {
	stop := context.AfterFunc(ctx, d.wake)
	defer stop()
	d.mu.Lock()
	defer d.mu.Unlock()
	for n.Load() > 0 && ctx.Err() == nil {
		d.changed.Wait()
	}
	return n.Load() == 0
}

// wake makes each call of wait look again.
func (d *Drainer) wake() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.changed.Broadcast()
}

// eachInState calls f with each connection in that state.
func (d *Drainer) eachInState(state http.ConnState, f func(net.Conn, *connInfo)) {
	d.conns.Range(func(key, value any) bool {
		if info := value.(*connInfo); info.is(state) {
			f(key.(net.Conn), info)
		}
		return true
	})
}

// closeIfIdleLater closes conn, which is idle, if it stays so for two seconds. Shutdown has closed
// the idle HTTP/1 connections and sent GOAWAY on the HTTP/2 connections, which are closed a second
// later. But it may miss an HTTP/2 connection that has just been set up.
func closeIfIdleLater(conn net.Conn, info *connInfo) {
	changes := info.changes.Load() // before the state, which may have changed by now
	if !info.is(http.StateIdle) {
		return
	}
	time.AfterFunc(2*time.Second, func() {
		if info.changes.Load() == changes {
			_ = conn.Close()
		}
	})
}

// setState is called by the server with each new state of each connection.
func (d *Drainer) setState(conn net.Conn, state http.ConnState) {
	if state == http.StateNew {
		d.reported.Add(1)
	}
	if !isKey(conn) {
		d.unknown.Store(true)
		return
	}
	switch state {
	case http.StateNew:
		d.conns.Store(conn, new(connInfo))
		d.open.Add(1)
	case http.StateActive, http.StateIdle:
		// x/net's h2c reports these for connections that it has hijacked.
		if value, ok := d.conns.Load(conn); ok {
			info := value.(*connInfo)
			info.state.Store(int32(state))
			if d.draining.Load() {
				info.changes.Add(1)
				d.setFresh(info, state == http.StateIdle)
				if state == http.StateIdle && d.shutdown.Load() {
					closeIfIdleLater(conn, info)
				}
			}
		}
	case http.StateHijacked, http.StateClosed:
		if value, ok := d.conns.LoadAndDelete(conn); ok {
			d.setFresh(value.(*connInfo), false)
			if d.open.Add(-1) == 0 {
				d.wake()
			}
		}
	}
}

// isKey reports whether conn can be a key of a map. ValueOf may allocate, so pointers come first.
func isKey(conn net.Conn) bool {
	return reflect.TypeOf(conn).Kind() == reflect.Pointer || reflect.ValueOf(conn).Comparable()
}

// setFresh is called after Drain when a connection has become idle, or is not idle any more.
func (d *Drainer) setFresh(info *connInfo, fresh bool) {
	if info.fresh == fresh {
		return
	}
	info.fresh = fresh
	if fresh {
		d.mu.Lock()
		d.lastIdle = time.Now()
		d.mu.Unlock()
		d.fresh.Add(1)
	} else if d.fresh.Add(-1) == 0 {
		d.wake()
	}
}

// switchesProtocols reports whether the connection may be used for another protocol after
// the response to r. Some clients offer h2c or TLS in each request, and expect to be ignored.
func switchesProtocols(r *http.Request) bool {
	upgrade := strings.ToLower(r.Header.Get("Upgrade"))
	return r.Method == http.MethodConnect ||
		upgrade != "" && upgrade != "h2c" && !strings.HasPrefix(upgrade, "tls/")
}
