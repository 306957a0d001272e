// Package httpclient is the HTTP clients of the tests: connections on which a test writes HTTP/1
// itself, and http.Clients with connections of their own. It also has the certificates.
package httpclient

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

// A Conn is a connection of a client that writes HTTP/1 itself.
type Conn struct {
	net.Conn
	reader *bufio.Reader
}

// Dial connects to addr, with TLS if config is not nil, until the test ends.
func Dial(t testing.TB, addr string, config *tls.Config) *Conn {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	require.NoError(t, err)
	return On(t, conn, config)
}

// On returns a client on conn, with TLS if config is not nil, until the test ends.
func On(t testing.TB, conn net.Conn, config *tls.Config) *Conn {
	t.Helper()
	t.Cleanup(func() { conn.Close() })
	require.NoError(t, conn.SetDeadline(time.Now().Add(2*tcptest.Patience)))
	if config != nil {
		secure := tls.Client(conn, config)
		require.NoError(t, secure.Handshake())
		conn = secure
	}
	return &Conn{conn, bufio.NewReader(conn)}
}

// Send writes text.
func (c *Conn) Send(t testing.TB, text string) {
	t.Helper()
	_, err := io.WriteString(c, text)
	require.NoError(t, err)
}

// Get sends a GET request.
func (c *Conn) Get(t testing.TB, path string) {
	t.Helper()
	c.Send(t, "GET "+path+" HTTP/1.1\r\nHost: test\r\n\r\n")
}

// StartPost sends a POST request but for its body, which is one byte, and returns when the
// handler has started to read that.
func (c *Conn) StartPost(t testing.TB, path string) {
	t.Helper()
	c.Send(t, "POST "+path+" HTTP/1.1\r\nHost: test\r\n"+
		"Content-Length: 1\r\nExpect: 100-continue\r\n\r\n")
	resp, _ := c.Response(t)
	require.Equal(t, http.StatusContinue, resp.StatusCode)
}

// Finish sends the body of a request, which is one byte, requires the body of the response to be
// want, and closes the connection.
func (c *Conn) Finish(t testing.TB, want string) {
	t.Helper()
	c.Send(t, "x")
	_, body := c.Response(t)
	require.Equal(t, want, body, "body of the response")
	c.Close()
}

// Response returns the next response and its body.
func (c *Conn) Response(t testing.TB) (*http.Response, string) {
	t.Helper()
	resp, err := http.ReadResponse(c.reader, nil)
	require.NoError(t, err, "reading the response")
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err, "reading the body of the response")
	return resp, string(body)
}

// Status returns the status of the response to a GET request on a connection of its own.
func Status(t testing.TB, addr, path string) int {
	t.Helper()
	c := Dial(t, addr, nil)
	defer c.Close()
	c.Get(t, path)
	resp, _ := c.Response(t)
	return resp.StatusCode
}

// RequireLastResponse wants a response with that body and Connection: close, after which the
// connection is closed.
func (c *Conn) RequireLastResponse(t testing.TB, body string) {
	t.Helper()
	resp, got := c.Response(t)
	assert.Equal(t, body, got)
	assert.True(t, resp.Close, "the response has no Connection: close")
	c.RequireClosed(t)
}

// RequireClosed waits until the server has closed the connection.
func (c *Conn) RequireClosed(t testing.TB) {
	t.Helper()
	_, err := c.reader.ReadByte()
	assert.ErrorIs(t, err, io.EOF, "the connection is not closed")
}

// AwaitClosed waits until the server has closed or reset the connection, and ignores what it
// sends before.
func (c *Conn) AwaitClosed(t testing.TB) {
	t.Helper()
	_, err := io.Copy(io.Discard, c.reader)
	assert.NotErrorIs(t, err, os.ErrDeadlineExceeded, "the connection is not closed")
}

// Buffered returns the connection as a reader that includes what has been read ahead.
func (c *Conn) Buffered() *bufio.Reader { return c.reader }

// NewClient returns a client with connections of its own. It resets them when it closes
// them: thousands that are closed otherwise would use up the ports of the machine.
func NewClient(server *tls.Config, http2, keepAlive bool) *http.Client {
	dial := func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return conn, conn.(*net.TCPConn).SetLinger(0)
	}
	return &http.Client{Timeout: 2 * tcptest.Patience, Transport: &http.Transport{
		DialContext:       dial,
		TLSClientConfig:   ClientTLS(server),
		ForceAttemptHTTP2: http2,
		DisableKeepAlives: !keepAlive,
	}}
}

// Post posts body and returns the body of the response. The client may send the request on another
// connection only if it has not sent its header yet. (Before it does, a Transport may learn that
// it cannot use an HTTP/2 connection, and closes the body all the same.)
func Post(client *http.Client, url, body string) (string, error) {
	var sent atomic.Bool
	trace := &httptrace.ClientTrace{WroteHeaders: func() { sent.Store(true) }}
	ctx := httptrace.WithClientTrace(context.Background(), trace)
	newBody := func() io.ReadCloser { return io.NopCloser(struct{ io.Reader }{strings.NewReader(body)}) }
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, newBody())
	if err != nil {
		return "", err
	}
	req.Header.Set("Content-Type", "text/plain")
	req.GetBody = func() (io.ReadCloser, error) {
		if sent.Load() {
			return nil, errors.New("the request was sent, and failed")
		}
		return newBody(), nil
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	return string(bytes.TrimSpace(got)), err
}

// ServerTLS returns httptest's certificate, which is its own authority.
func ServerTLS() *tls.Config {
	s := httptest.NewTLSServer(nil)
	s.Close()
	return &tls.Config{Certificates: s.TLS.Certificates}
}

// ClientTLS returns what a client needs for the server; nil for nil.
func ClientTLS(server *tls.Config) *tls.Config {
	if server == nil {
		return nil
	}
	roots := x509.NewCertPool()
	cert, _ := x509.ParseCertificate(server.Certificates[0].Certificate[0])
	roots.AddCert(cert)
	return &tls.Config{RootCAs: roots, ServerName: "example.com"}
}
