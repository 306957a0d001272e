package httpdrain

import (
	"net"
	"net/http"
	"reflect"
	"sync"
	"sync/atomic"
	"time"
)

// conns are the open connections of a server that are not hijacked.
type conns struct {
	all  sync.Map     // net.Conn to *connection
	open atomic.Int64 // number of connections in all

	draining atomic.Bool  // they are to send their first GOAWAY; also read by each goAwayWriter
	changes  atomic.Int64 // number of state changes since draining

	// wake receives a value when the drain is to check what it waits for. Its buffer is one value,
	// so that no goroutine waits for the receiver.
	wake chan struct{}
}

// A connection is what is known about an open connection.
type connection struct {
	goAway   *goAwayWriter             // nil if the connection cannot send two GOAWAYs
	state    atomic.Int32              // the last http.ConnState
	since    atomic.Pointer[time.Time] // when it was accepted or, while draining, became idle
	inFlight atomic.Int64              // HTTP/2 requests whose handler has not returned
}

func (c *connection) is(state http.ConnState) bool { return c.state.Load() == int32(state) }

func now() *time.Time { t := time.Now(); return &t }

// add adds a connection that has just been accepted.
func (cs *conns) add(conn net.Conn) *connection {
	c := new(connection)
	c.since.Store(now())
	if wrapped, ok := conn.(interface{ goAwayWriter() *goAwayWriter }); ok {
		c.goAway = wrapped.goAwayWriter()
	}
	cs.all.Store(conn, c)
	cs.open.Add(1)
	return c
}

// setState is called by the server with each new state of each connection.
func (cs *conns) setState(conn net.Conn, state http.ConnState) {
	value, ok := cs.all.Load(conn)
	if !ok {
		return // x/net's h2c reports states of connections that it has hijacked
	}
	c := value.(*connection)
	if state == http.StateHijacked || state == http.StateClosed {
		cs.all.Delete(conn)
		if cs.open.Add(-1) == 0 {
			cs.wakeDrain()
		}
		return
	}
	if cs.draining.Load() {
		cs.changes.Add(1)
		if state == http.StateIdle {
			c.since.Store(now())
		}
	}
	c.state.Store(int32(state))
}

// wakeDrain makes the drain check what it waits for.
func (cs *conns) wakeDrain() {
	select {
	case cs.wake <- struct{}{}:
	default:
	}
}

// each calls f with each connection.
func (cs *conns) each(f func(net.Conn, *connection)) {
	cs.all.Range(func(key, value any) bool {
		f(key.(net.Conn), value.(*connection))
		return true
	})
}

// sendGoAway makes the connections send their first GOAWAY, those that are idle at once. It does
// not write itself, because a client may not read.
func (cs *conns) sendGoAway() {
	cs.draining.Store(true)
	cs.each(func(_ net.Conn, c *connection) {
		if c.goAway != nil {
			go c.goAway.sendIfIdle()
		}
	})
}

// lastIdle returns when the last of the idle connections became idle, or a time before draining.
func (cs *conns) lastIdle() (last time.Time) {
	cs.each(func(_ net.Conn, c *connection) {
		if c.is(http.StateIdle) && c.since.Load().After(last) {
			last = *c.since.Load()
		}
	})
	return last
}

// closeIn closes the connections that have been in that state, new or idle, since before t.
func (cs *conns) closeIn(state http.ConnState, t time.Time) {
	cs.each(func(conn net.Conn, c *connection) {
		if c.is(state) && c.since.Load().Before(t) { // in this order, since it may become idle now
			closeConn(conn)
		}
	})
}

// abort closes all connections, and returns how many requests were in flight on them.
func (cs *conns) abort() (requests int64) {
	cs.each(func(conn net.Conn, c *connection) {
		if c.is(http.StateActive) {
			requests += max(1, c.inFlight.Load())
		}
		closeConn(conn)
	})
	return requests
}

// closeConn closes conn, beneath TLS. Close of a *tls.Conn sends close_notify, for which it waits
// up to five seconds if the client does not read. That alert tells clients that what they have
// received is complete: one whose connection is idle knows, and an aborted response is not.
func closeConn(conn net.Conn) {
	for {
		wrapper, ok := conn.(interface{ NetConn() net.Conn })
		if !ok {
			break
		}
		conn = wrapper.NetConn()
	}
	_ = conn.Close()
}

// asKey returns conn, or a pointer to it if it cannot be a map key, such as a struct with a slice.
// The pointer has the methods of what it points to.
func asKey(conn net.Conn) net.Conn {
	v := reflect.ValueOf(conn)
	if v.Comparable() {
		return conn
	}
	p := reflect.New(v.Type())
	p.Elem().Set(v)
	return p.Interface().(net.Conn)
}
