//go:build go1.24

package httpdrain_test

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener/internal/testutil/httpclient"
	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

// h2c makes a server serve HTTP/2 without TLS, and a client use it.
func h2c(server *http.Server, client *http.Transport) {
	server.Protocols, client.Protocols = new(http.Protocols), new(http.Protocols)
	server.Protocols.SetHTTP1(true)
	server.Protocols.SetUnencryptedHTTP2(true)
	client.Protocols.SetUnencryptedHTTP2(true)
}

func init() {
	shared := kind{servers: 5, h2c: h2c, http2: true, keepAlive: true, shared: true}
	const name = "HTTP/2, many at a time"
	kinds[name], rollingKinds[name] = shared, shared
}

// An http2Conn is a connection of a client that reads and writes HTTP/2 frames.
type http2Conn struct {
	net.Conn
	nextStream uint32
}

// A frame is one that the server sends; the payload only of GOAWAY and SETTINGS.
type frame struct {
	typ, flags byte
	stream     uint32
	payload    string
}

const (
	typeData     = 0
	typeHeaders  = 1
	typeSettings = 4
	typePing     = 6
	typeGoAway   = 7

	flagAck       = 1
	flagEndStream = 1
	flagEndHeader = 4
)

// firstGoAway and lastGoAway are the two GOAWAYs, without an error; the last with that stream.
var firstGoAway = frame{typ: typeGoAway, payload: "\x7f\xff\xff\xff\x00\x00\x00\x00"}

func lastGoAway(stream uint32) frame {
	payload := binary.BigEndian.AppendUint32(nil, stream)
	return frame{typ: typeGoAway, payload: string(payload) + "\x00\x00\x00\x00"}
}

// dialHTTP2 connects a client, which has exchanged SETTINGS.
func (s *service) dialHTTP2(t testing.TB) *http2Conn {
	conn, err := net.Dial("tcp", s.l.Addr().String())
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	require.NoError(t, conn.SetDeadline(time.Now().Add(2*tcptest.Patience)))
	if s.config != nil {
		config := httpclient.ClientTLS(s.config)
		config.NextProtos = []string{"h2"}
		conn = tls.Client(conn, config)
	}
	c := &http2Conn{conn, 1}
	_, err = io.WriteString(conn, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
	require.NoError(t, err)
	c.send(t, typeSettings, 0, 0, "")
	require.EqualValues(t, typeSettings, c.next(t).typ)
	c.send(t, typeSettings, flagAck, 0, "")
	c.sync(t)
	return c
}

func (c *http2Conn) send(t testing.TB, typ, flags byte, stream uint32, payload string) {
	t.Helper()
	frame := binary.BigEndian.AppendUint32(nil, uint32(len(payload))<<8|uint32(typ))
	frame = append(frame, flags)
	frame = binary.BigEndian.AppendUint32(frame, stream)
	_, err := c.Write(append(frame, payload...))
	require.NoError(t, err)
}

// next returns the next frame, except WINDOW_UPDATE, and whether the connection is closed.
func (c *http2Conn) read(t testing.TB) (frame, bool) {
	t.Helper()
	for {
		header := make([]byte, 9)
		_, err := io.ReadFull(c, header)
		if err == io.EOF {
			return frame{}, false
		}
		require.NoError(t, err, "reading a frame")
		payload := make([]byte, binary.BigEndian.Uint32(header)>>8)
		_, err = io.ReadFull(c, payload)
		require.NoError(t, err, "reading a payload")
		f := frame{typ: header[3], flags: header[4], stream: binary.BigEndian.Uint32(header[5:])}
		if f.typ >= typePing && f.typ <= typeGoAway {
			f.payload = string(payload)
		}
		if f.typ != 8 && (f.typ != typeSettings || f.flags != flagAck) {
			return f, true
		}
	}
}

func (c *http2Conn) next(t testing.TB) frame {
	t.Helper()
	f, open := c.read(t)
	require.True(t, open, "the connection is closed")
	return f
}

func (c *http2Conn) requireNext(t testing.TB, want frame) {
	t.Helper()
	require.Equal(t, want, c.next(t))
}

// sync waits until the server has handled what was sent, and requires no other frame until then.
func (c *http2Conn) sync(t testing.TB) {
	t.Helper()
	c.send(t, typePing, 0, 0, "12345678")
	c.requireNext(t, frame{typ: typePing, flags: flagAck, payload: "12345678"})
}

// get sends a request, and returns its stream.
func (c *http2Conn) get(t testing.TB, path string) (stream uint32) {
	t.Helper()
	stream = c.nextStream
	c.nextStream += 2
	block := "\x82\x86\x04" + string(rune(len(path))) + path + "\x01\x04test"
	c.send(t, typeHeaders, flagEndStream|flagEndHeader, stream, block)
	return stream
}

// requireResponse reads a response with the body "Hello".
func (c *http2Conn) requireResponse(t testing.TB, stream uint32) {
	t.Helper()
	c.requireNext(t, frame{typ: typeHeaders, flags: flagEndHeader, stream: stream})
	c.requireNext(t, frame{typ: typeData, flags: flagEndStream, stream: stream})
}

// eachHTTP2 runs test with each kind of HTTP/2 connection that can send two GOAWAYs.
func eachHTTP2(t *testing.T, handler http.Handler, test func(*testing.T, *service)) {
	t.Run("h2c", func(t *testing.T) {
		t.Parallel()
		s := newService(t, tcptest.Listen(t), nil, handler)
		h2c(s.server, new(http.Transport))
		test(t, s)
	})
	if tlsSendsTwoGoAways {
		t.Run("TLS", func(t *testing.T) {
			t.Parallel()
			test(t, newService(t, tcptest.Listen(t), httpclient.ServerTLS(), handler))
		})
	}
}

// The first GOAWAY comes when Delay is over. After that, requests are served. A client that has
// just connected must not have to connect again, so it gets GOAWAY after its first response.
func TestHTTP2ConnectionsGetAnEarlyGoAway(t *testing.T) {
	t.Parallel()
	eachHTTP2(t, hello, func(t *testing.T, s *service) {
		s.drainer.Delay = 500 * time.Millisecond
		s.start(t)
		idle, unused := s.dialHTTP2(t), s.dialHTTP2(t)
		idle.requireResponse(t, idle.get(t, "/"))
		start := time.Now()
		s.stop()
		idle.requireNext(t, firstGoAway)
		assert.GreaterOrEqual(t, time.Since(start), s.drainer.Delay)
		idle.requireResponse(t, idle.get(t, "/"))
		unused.sync(t)
		stream := unused.get(t, "/")
		unused.requireNext(t, frame{typ: typeHeaders, flags: flagEndHeader, stream: stream})
		unused.requireNext(t, firstGoAway)
		unused.requireNext(t, frame{typ: typeData, flags: flagEndStream, stream: stream})
		unused.requireResponse(t, unused.get(t, "/"))
	})
}

// A client does not read, so that a Write blocks. It is not waited for: the other client gets its
// GOAWAYs, the last one with its last stream. The Write goes on when the client reads.
func TestServeDoesNotWaitForAnHTTP2ClientThatDoesNotRead(t *testing.T) {
	tcptest.SkipIfShort(t, "takes two seconds")
	t.Parallel()
	var writes atomic.Int64
	large := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		for range 300 {
			_, _ = w.Write(make([]byte, 1<<16))
			writes.Add(1)
		}
	})
	eachHTTP2(t, routes{"/": hello, "/large": large}, func(t *testing.T, s *service) {
		s.drainer.Grace = 2 * shortGrace
		s.start(t)
		c, other := s.dialHTTP2(t), s.dialHTTP2(t)
		last := other.get(t, "/")
		other.requireResponse(t, last)
		const window = "\x7f\x00\x00\x00"
		c.send(t, 8, 0, 0, window)
		stream := c.get(t, "/large")
		c.send(t, 8, 0, stream, window)
		c.requireNext(t, frame{typ: typeHeaders, flags: flagEndHeader, stream: stream})
		for n := int64(-1); n != writes.Load(); time.Sleep(100 * time.Millisecond) {
			n = writes.Load() // until the buffers are full
		}
		s.stop()
		other.requireNext(t, firstGoAway)
		other.requireNext(t, lastGoAway(last))
		data := 0
		var goAways []frame
		for end := false; !end; {
			f := c.next(t)
			if f.typ == typeGoAway {
				goAways = append(goAways, f)
				continue
			}
			data++
			end = f.flags&flagEndStream != 0
		}
		assert.Greater(t, data, 100)
		assert.Equal(t, []frame{firstGoAway, lastGoAway(stream)}, goAways)
		s.requireDrained(t)
	})
}

// Hooks get *net.TCPConn, unless the connection may become HTTP/2.
func TestConnectionsAreWrappedOnlyForHTTP2(t *testing.T) {
	config := httpclient.ServerTLS()
	for name, tt := range map[string]struct {
		config  *tls.Config
		protos  func(*http.Server)
		wrapped bool
	}{
		"HTTP/1": {nil, func(*http.Server) {}, false},
		"h2c":    {nil, func(s *http.Server) { h2c(s, new(http.Transport)) }, true},
		"TLS":    {config, func(*http.Server) {}, tlsSendsTwoGoAways},
		"TLS, with TLSNextProto": {config, func(s *http.Server) {
			s.TLSNextProto = map[string]func(*http.Server, *tls.Conn, http.Handler){}
		}, false},
		"TLS, without HTTP/2": {config, func(s *http.Server) {
			s.Protocols = new(http.Protocols)
			s.Protocols.SetHTTP1(true)
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			conns := make(chan net.Conn, 1)
			s := newService(t, tcptest.Listen(t), tt.config, hello)
			tt.protos(s.server)
			s.server.ConnContext = func(ctx context.Context, conn net.Conn) context.Context {
				conns <- conn
				return ctx
			}
			s.start(t)
			s.get(t, "/").Response(t)
			conn := <-conns
			switch typ := fmt.Sprintf("%T", conn); {
			case tt.wrapped:
				assert.Contains(t, typ, "httpdrain.")
				assert.IsType(t, new(net.TCPConn), conn.(interface{ NetConn() net.Conn }).NetConn())
			case tt.config == nil:
				assert.IsType(t, new(net.TCPConn), conn)
			default:
				assert.IsType(t, new(tls.Conn), conn)
			}
		})
	}
}
