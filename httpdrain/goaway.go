package httpdrain

import (
	"crypto/tls"
	"encoding/binary"
	"io"
	"net"
	"sync"
	"sync/atomic"
)

// A server that shuts an HTTP/2 connection down gracefully sends two GOAWAYs (RFC 9113, section
// 6.8): the first has the last possible stream and says that no new request should be sent; the
// second, a round-trip time later, has the last stream that the server has seen. Package http sends
// only the second, so the requests fail that are under way then. This file inserts the first one
// into what package http writes.

// goAwayFrame is the first GOAWAY.
var goAwayFrame = []byte{
	0, 0, 8, // length
	frameGoAway, 0, // type, flags
	0, 0, 0, 0, // stream
	0x7f, 0xff, 0xff, 0xff, // last stream
	0, 0, 0, 0, // NO_ERROR
}

// A goAwayWriter writes to a connection of package http, and inserts the first GOAWAY between two
// frames once it is wanted. If the connection is not HTTP/2, it only writes.
type goAwayWriter struct {
	conn   io.Writer
	wanted *atomic.Bool // GOAWAY is

	mu     sync.Mutex // held while writing; guards the fields below
	frames frames     // what has been written
	goAway []byte     // what has not been written of goAwayFrame
}

func newGoAwayWriter(conn io.Writer, wanted *atomic.Bool) *goAwayWriter {
	return &goAwayWriter{conn: conn, wanted: wanted, goAway: goAwayFrame}
}

// Write implements io.Writer. A Write that is cut short, by a deadline, may be continued.
func (w *goAwayWriter) Write(p []byte) (n int, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.goAway) > 0 && w.wanted.Load() {
		if n, err = w.writeUntilGoAway(p); err != nil || n == len(p) {
			return n, err
		}
	}
	m, err := w.write(p[n:])
	return n + m, err
}

// writeUntilGoAway writes p until GOAWAY may be sent, and sends it. If that is never, it writes p.
func (w *goAwayWriter) writeUntilGoAway(p []byte) (n int, err error) {
	if len(w.goAway) == len(goAwayFrame) {
		ahead := w.frames
		for n < len(p) && !ahead.allowGoAway() {
			n += ahead.next(p[n:])
		}
		if n > 0 {
			n, err = w.write(p[:n])
		}
		if err != nil || !w.frames.allowGoAway() {
			return n, err
		}
	}
	err = w.sendGoAway()
	if n == len(p) {
		err = nil // of p, all is written; the next Write continues GOAWAY
	}
	return n, err
}

// sendIfIdle sends GOAWAY if that is allowed after what has been written.
func (w *goAwayWriter) sendIfIdle() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.goAway) > 0 && w.frames.allowGoAway() {
		_ = w.sendGoAway() // the next Write continues, or returns the error
	}
}

func (w *goAwayWriter) sendGoAway() error {
	n, err := w.conn.Write(w.goAway)
	w.goAway = w.goAway[n:]
	return err
}

func (w *goAwayWriter) write(p []byte) (n int, err error) {
	n, err = w.conn.Write(p)
	for rest := p[:n]; len(rest) > 0; {
		rest = rest[w.frames.next(rest):]
	}
	return n, err
}

// Types and flags of frames (RFC 9113, section 6).
const (
	frameHeaders      = 1
	frameSettings     = 4
	framePushPromise  = 5
	frameGoAway       = 7
	frameContinuation = 9

	flagEndHeaders = 4

	frameHeaderLen = 9
)

// frames follows the frames that a server writes.
type frames struct {
	header  [frameHeaderLen]byte // of the current frame
	written int                  // how many bytes of header have been written
	payload int                  // how many bytes of the payload have not been written

	settings    bool // the server's SETTINGS, which come first, have been written
	headerBlock bool // a header block has not been completed
	response    bool // the header of a response has been written
	closed      bool // package http has sent GOAWAY
	notHTTP2    bool
}

// allowGoAway reports whether the first GOAWAY may be written here. A client that has no response
// yet is left alone, because it has just connected, and should not have to connect again.
func (f *frames) allowGoAway() bool {
	return f.written == 0 && f.response && !f.headerBlock && !f.closed
}

// next is called with what is written next, at least one byte. It returns how much of p belongs to
// the current frame.
func (f *frames) next(p []byte) (n int) {
	if f.notHTTP2 {
		return len(p)
	}
	if f.written < frameHeaderLen {
		n = copy(f.header[f.written:], p)
		if f.written += n; f.written < frameHeaderLen {
			return n
		}
		f.payload = int(binary.BigEndian.Uint32(f.header[:]) >> 8)
		if !f.settings && !f.isSettings() {
			f.notHTTP2 = true
			return len(p)
		}
	}
	payload := min(f.payload, len(p)-n)
	f.payload -= payload
	if f.payload == 0 {
		f.endFrame()
	}
	return n + payload
}

func (f *frames) isSettings() bool {
	flags, stream := f.header[4], binary.BigEndian.Uint32(f.header[5:])
	return f.header[3] == frameSettings && flags == 0 && stream == 0
}

func (f *frames) endFrame() {
	f.written = 0
	switch f.header[3] {
	case frameSettings:
		f.settings = true
	case frameHeaders, framePushPromise, frameContinuation:
		f.headerBlock = f.header[4]&flagEndHeaders == 0
		f.response = f.response || f.header[3] == frameHeaders
	case frameGoAway:
		f.closed = true
	}
}

// A tcpConn is a connection that may become HTTP/2, without TLS.
type tcpConn struct {
	*net.TCPConn
	w *goAwayWriter
}

func (c *tcpConn) Write(p []byte) (int, error) { return c.w.Write(p) }
func (c *tcpConn) NetConn() net.Conn           { return c.TCPConn }
func (c *tcpConn) goAwayWriter() *goAwayWriter { return c.w }

// A wrappedConn is one that another listener has wrapped.
type wrappedConn struct {
	net.Conn
	w *goAwayWriter
}

func (c *wrappedConn) Write(p []byte) (int, error) { return c.w.Write(p) }
func (c *wrappedConn) NetConn() net.Conn           { return c.Conn }
func (c *wrappedConn) goAwayWriter() *goAwayWriter { return c.w }

// A tlsConn is one with TLS.
type tlsConn struct {
	*tls.Conn
	w *goAwayWriter
}

func (c *tlsConn) Write(p []byte) (int, error) { return c.w.Write(p) }
func (c *tlsConn) goAwayWriter() *goAwayWriter { return c.w }
