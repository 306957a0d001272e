// The tests of this file are Drain in production: clients that connect without pause, and slow
// accept loops. What depends on Linux is in drain_linux_test.go.
package listenertest_test

import (
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

// Each client connects again and again, until a connection is refused; the others must get a
// response. The socket is closed as soon as the accept loops have returned.
func TestEachConnectionIsServedOrRefused(t *testing.T) {
	t.Parallel()
	tcptest.RequireRefusal(t)
	for _, tt := range []struct {
		name                       string
		rounds, acceptors, clients int
		enough                     int64         // connections before Drain
		takes                      time.Duration // if the accept loop handles each itself
	}{
		{"one accept loop", tcptest.Rounds(5), 1, 16, 50, 0},
		{"many accept loops", tcptest.Rounds(5), 8, 16, 50, 0},
		{"slow accept loop", 1, 1, 16, 16, tcptest.BlindWait / 8},
		{"very slow accept loop", 1, 1, 4, 1, tcptest.BlindWait * 6 / 5},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.takes > 0 && testing.Short() {
				t.Skip("takes more than a second")
			}
			t.Parallel()
			for range tt.rounds {
				l := tcptest.Listen(t)
				sl := tcptest.Wrap(t, l)
				results := make(chan error, tt.clients)
				for range tt.clients {
					go func() { results <- connectUntilRefused(l.Addr().String()) }()
				}

				accepted, enough := tcptest.Countdown(tt.enough)
				returned := make(chan error, tt.acceptors)
				for range tt.acceptors {
					go func() {
						for {
							conn, err := sl.Accept()
							if err != nil {
								returned <- err
								return
							}
							accepted()
							if tt.takes == 0 {
								go echo(t, conn)
								continue
							}
							time.Sleep(tt.takes)
							echo(t, conn)
						}
					}()
				}
				tcptest.Receive(t, enough, "connections")
				sl.Drain()
				for range tt.acceptors {
					err := tcptest.Receive(t, returned, "return of the accept loop after Drain")
					tcptest.RequireStoppedError(t, err)
				}
				require.NoError(t, l.Close())
				for range tt.clients {
					err := tcptest.Receive(t, results, "response or refusal")
					assert.True(t, tcptest.IsRefused(err), "neither served nor refused: %v", err)
				}
			}
		})
	}
}

// connectUntilRefused returns the first error: that of connect, or that of a connection that
// got no response.
func connectUntilRefused(addr string) error {
	for n := 0; ; n++ {
		conn, err := net.DialTimeout("tcp", addr, tcptest.Patience)
		if err != nil {
			return err
		}
		err = exchange(conn, fmt.Sprintf("request %d", n))
		conn.Close()
		if err != nil {
			return fmt.Errorf("connection %d has no response: %w", n, err)
		}
	}
}

// exchange sends a request and requires the same as its response.
func exchange(conn net.Conn, request string) error {
	_ = conn.(*net.TCPConn).SetLinger(0) // as tcptest.DialOnce
	_ = conn.SetDeadline(time.Now().Add(2 * tcptest.Patience))
	if _, err := io.WriteString(conn, request); err != nil {
		return err
	}
	response := make([]byte, len(request))
	if _, err := io.ReadFull(conn, response); err != nil {
		return err
	}
	if string(response) != request {
		return fmt.Errorf("the response is %q, not %q", response, request)
	}
	return nil
}

// echo returns when the client has closed conn.
func echo(t testing.TB, conn net.Conn) {
	defer conn.Close()
	buf := make([]byte, 100)
	n, err := conn.Read(buf)
	if assert.NoError(t, err, "reading the request") {
		_, err = conn.Write(buf[:n])
		assert.NoError(t, err, "writing the response")
	}
	_, _ = conn.Read(buf)
}
