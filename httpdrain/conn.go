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

	draining  atomic.Bool  // the fields below count from now on; also read by each goAwayWriter
	newlyIdle atomic.Int64 // connections that have become idle, and are so
	changes   atomic.Int64 // number of state changes
	shutdown  atomic.Bool  // idle connections are to be closed

	mu       sync.Mutex // guards lastIdle
	lastIdle time.Time  // when the last of the newlyIdle has become idle

	// changed receives a value when open or newlyIdle becomes zero. Its buffer is one value, so
	// that nobody waits for the receiver.
	changed chan struct{}
}

// A connection is what is known about an open connection.
type connection struct {
	accepted time.Time
	goAway   *goAwayWriter // nil if the connection cannot send two GOAWAYs
	state    atomic.Int32  // the last http.ConnState
	changes  atomic.Int64  // of state since draining; counted after each
	isNew    bool          // it is one of newlyIdle; only setState uses it

	http2    atomic.Bool  // a handler has been called for an HTTP/2 request
	inFlight atomic.Int64 // HTTP/2 requests whose handler has not returned
}

func (c *connection) is(state http.ConnState) bool { return c.state.Load() == int32(state) }

// requestsInFlight returns the number of requests whose handler has not returned.
func (c *connection) requestsInFlight() int64 {
	switch {
	case c.http2.Load():
		return c.inFlight.Load()
	case c.is(http.StateActive):
		return 1
	default:
		return 0
	}
}

// add adds a connection that has just been accepted.
func (cs *conns) add(conn net.Conn) *connection {
	c := &connection{accepted: time.Now()}
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
		cs.setNewlyIdle(c, false)
		if cs.open.Add(-1) == 0 {
			cs.signal()
		}
		return
	}
	c.state.Store(int32(state))
	if cs.draining.Load() {
		cs.setNewlyIdle(c, state == http.StateIdle)
		c.changes.Add(1)
		cs.changes.Add(1)
		if cs.shutdown.Load() {
			closeIfStaysIdle(conn, c)
		}
	}
}

func (cs *conns) setNewlyIdle(c *connection, is bool) {
	switch {
	case c.isNew == is:
		return
	case is:
		cs.mu.Lock()
		cs.lastIdle = time.Now()
		cs.mu.Unlock()
		cs.newlyIdle.Add(1)
	case cs.newlyIdle.Add(-1) == 0:
		cs.signal()
	}
	c.isNew = is
}

// lastNewlyIdle returns when the last of the newly idle connections has become so.
func (cs *conns) lastNewlyIdle() time.Time {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	return cs.lastIdle
}

// signal wakes the drain if it waits.
func (cs *conns) signal() {
	select {
	case cs.changed <- struct{}{}:
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

// drain makes the connections send their first GOAWAY, those that are idle at once. It does not
// write itself, because a client may not read.
func (cs *conns) drain() {
	cs.draining.Store(true)
	cs.each(func(_ net.Conn, c *connection) {
		if c.goAway != nil {
			go c.goAway.sendIfIdle()
		}
	})
}

// closeUnused closes the connections that have not sent a request and were accepted before t.
func (cs *conns) closeUnused(t time.Time) {
	cs.each(func(conn net.Conn, c *connection) {
		if c.is(http.StateNew) && c.accepted.Before(t) {
			closeConn(conn)
		}
	})
}

// closeIdle closes the idle connections.
func (cs *conns) closeIdle() {
	cs.each(func(conn net.Conn, c *connection) {
		if c.is(http.StateIdle) {
			closeConn(conn)
		}
	})
}

// closeAfterGoAway closes the connections that are idle, or will be, and stay so. It is called
// after Shutdown.
func (cs *conns) closeAfterGoAway() {
	cs.shutdown.Store(true)
	cs.each(closeIfStaysIdle)
}

// closeIfStaysIdle closes conn if it is idle and stays so for two seconds. Shutdown has closed the
// idle HTTP/1 connections and sent GOAWAY on the HTTP/2 connections, which are closed a second
// later. But it may miss an HTTP/2 connection that has just been set up.
func closeIfStaysIdle(conn net.Conn, c *connection) {
	changes := c.changes.Load() // before the state, which may have changed by now
	if !c.is(http.StateIdle) {
		return
	}
	time.AfterFunc(2*time.Second, func() {
		if c.changes.Load() == changes {
			closeConn(conn)
		}
	})
}

// abort closes all connections, and returns how many requests were in flight on them.
func (cs *conns) abort() (requests int64) {
	cs.each(func(conn net.Conn, c *connection) {
		requests += c.requestsInFlight()
		closeConn(conn)
	})
	return requests
}

// closeConn closes conn, beneath TLS. Close of a *tls.Conn sends close_notify, for which it waits up
// to five seconds if the client does not read. That alert tells clients that what they have received
// is complete: one whose connection is idle knows, and an aborted response is not.
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
