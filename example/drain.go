package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"
)

// grace is how long a client may be silent once its server is being drained.
const grace = time.Second

// A drainer ends the connections of an http.Server whose accept loop has been stopped.
// Where Shutdown drops a request that is on its way, on an idle connection or on one just
// accepted, a drainer answers it:
//
//	d := newDrainer(server) // before Serve
//	sl.Stop()
//	<-served                // Serve has returned
//	err := d.drain(ctx)
//
// It is made to be copied into a service, and works with any handler, with TLS and with
// HTTP/2.
type drainer struct {
	server *http.Server
	ended  chan struct{} // has a value if a connection has ended since the last look

	mu       sync.Mutex                  // guards the fields below
	draining bool                        // drain has been called
	conns    map[net.Conn]http.ConnState // the open ones; a hijacked one is its handler's
	promised int                         // answers in progress after which their clients may go on
}

// newDrainer makes a drainer for server, which must not serve yet. It puts itself before
// the server's Handler and ConnState, so these must be set already.
func newDrainer(server *http.Server) *drainer {
	d := &drainer{
		server: server,
		ended:  make(chan struct{}, 1),
		conns:  make(map[net.Conn]http.ConnState),
	}
	handler, connState := server.Handler, server.ConnState
	if handler == nil {
		handler = http.DefaultServeMux
	}
	server.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a := &answer{ResponseWriter: w, drainer: d, http1: r.ProtoMajor == 1}
		defer a.end()
		handler.ServeHTTP(a, r)
	})
	server.ConnState = func(conn net.Conn, state http.ConnState) {
		d.setState(conn, state)
		if connState != nil {
			connState(conn, state)
		}
	}
	return d
}

// drain ends the connections of the server, whose Serve must have returned, and returns
// when none is left. The server cannot serve again.
//
// From now on each answer tells its client that the connection ends with it, by
// Connection: close, which package http turns into a GOAWAY for HTTP/2. So a client that
// talks is answered, and goes elsewhere. A client that stays silent loses its connection
// after the grace; so does one whose request has not arrived up to the end of its header
// by then, since package http does not tell the two apart. Hijacked connections, such as
// WebSockets, are left alone.
//
// Once ctx is done, drain closes what is left, and returns an error if it has cut off
// requests in progress.
func (d *drainer) drain(ctx context.Context) error {
	silence := time.NewTimer(grace)
	defer silence.Stop()
	promised := d.begin()
	for d.open() {
		select {
		case <-d.ended:
		case <-silence.C:
			if promised == 0 {
				d.endSilent()
				break
			}
			// An answer that began before drain did, a download's say, has told its client
			// that it may go on, and Shutdown would end the connection under it.
			promised = d.begin()
			silence.Reset(grace)
		case <-ctx.Done():
			return d.cutOff(ctx)
		}
	}
	return nil
}

// begin makes all answers that are to begin say that the connection ends, and returns how
// many that have begun before and are still in progress do not.
func (d *drainer) begin() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.draining = true
	return d.promised
}

// open reports whether a connection is left.
func (d *drainer) open() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.conns) > 0
}

// endSilent closes the connections that have not sent a request yet, and with Shutdown
// those that are idle, now or later; HTTP/2 sessions get a GOAWAY.
func (d *drainer) endSilent() {
	d.mu.Lock()
	for conn, state := range d.conns {
		if state == http.StateNew { // Shutdown waits five seconds for these
			_ = conn.Close()
		}
	}
	d.mu.Unlock()
	ctx, cancel := context.WithCancel(context.Background())
	cancel() // drain does the waiting
	_ = d.server.Shutdown(ctx)
}

// cutOff closes all connections.
func (d *drainer) cutOff(ctx context.Context) (err error) {
	d.mu.Lock()
	for _, state := range d.conns {
		if state == http.StateActive {
			err = fmt.Errorf("requests cut off: %w", ctx.Err())
		}
	}
	d.mu.Unlock()
	_ = d.server.Close()
	return err
}

// setState notes the state of a connection.
func (d *drainer) setState(conn net.Conn, state http.ConnState) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if state != http.StateClosed && state != http.StateHijacked {
		d.conns[conn] = state
		return
	}
	delete(d.conns, conn)
	select {
	case d.ended <- struct{}{}:
	default:
	}
}

// An answer is a ResponseWriter whose header says, while the server is being drained, that
// the connection ends. It has the optional methods of those of package http; where the
// ResponseWriter behind it does not, they fail with http.ErrNotSupported.
type answer struct {
	http.ResponseWriter
	drainer  *drainer
	http1    bool
	begun    bool // the header is not to be changed any more
	promised bool // it did not say that the connection ends
}

// begin completes the header.
func (a *answer) begin() {
	if a.begun {
		return
	}
	a.begun = true
	a.drainer.mu.Lock()
	defer a.drainer.mu.Unlock()
	switch {
	case a.drainer.draining:
		a.Header().Set("Connection", "close")
	case a.http1:
		a.promised = true
		a.drainer.promised++
	}
}

// end is called when the handler has returned, or has panicked.
func (a *answer) end() {
	a.begin() // if the handler wrote nothing, package http is going to
	if a.promised {
		a.drainer.mu.Lock()
		defer a.drainer.mu.Unlock()
		a.drainer.promised--
	}
}

func (a *answer) WriteHeader(status int) {
	if status >= http.StatusOK { // others come before the answer, or switch protocols
		a.begin()
	}
	a.ResponseWriter.WriteHeader(status)
}

func (a *answer) Write(p []byte) (int, error) {
	a.begin()
	return a.ResponseWriter.Write(p)
}

func (a *answer) ReadFrom(r io.Reader) (int64, error) {
	a.begin()
	return io.Copy(a.ResponseWriter, r) // the kernel copies a file
}

func (a *answer) Flush() { _ = a.FlushError() }

func (a *answer) FlushError() error {
	a.begin()
	return http.NewResponseController(a.ResponseWriter).Flush()
}

func (a *answer) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return http.NewResponseController(a.ResponseWriter).Hijack()
}

// Unwrap is for http.ResponseController.
func (a *answer) Unwrap() http.ResponseWriter { return a.ResponseWriter }
