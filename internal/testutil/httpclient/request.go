package httpclient

import (
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

// Finish sends the body of a request, which is one byte, requires the body of the response to be
// want, and closes the connection.
func (c *Conn) Finish(t testing.TB, want string) {
	t.Helper()
	c.Send(t, "x")
	_, body := c.Response(t)
	require.Equal(t, want, body, "body of the response")
	c.Close()
}

// AwaitRefused waits until connections to addr are refused.
func AwaitRefused(t testing.TB, addr string) {
	t.Helper()
	tcptest.Await(t, "refusal of connections to "+addr, func() bool {
		conn, err := net.DialTimeout("tcp", addr, time.Second)
		if err == nil {
			conn.Close()
		}
		return tcptest.IsRefused(err)
	})
}
