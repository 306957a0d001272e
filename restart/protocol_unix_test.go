//go:build unix

package restart

import (
	"io"
	"net"
	"syscall"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener/internal/socket"
	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

// A child that is killed while it sends its sockets must not leave them open in the parent.
// Other processes cannot make that happen for certain.
func TestSocketsOfAnIncompleteMessageAreClosed(t *testing.T) {
	link, file, err := socketPair()
	require.NoError(t, err)
	child, err := net.FileConn(file)
	require.NoError(t, err)
	require.NoError(t, file.Close())
	l := tcptest.Listen(t)
	fd, err := socket.DupConn(l)
	require.NoError(t, err)
	_, _, err = child.(*net.UnixConn).WriteMsgUnix([]byte("tcp 127.0.0.1:0\n"), syscall.UnixRights(fd), nil)
	require.NoError(t, err)
	require.NoError(t, child.Close())
	require.NoError(t, syscall.Close(fd))
	require.NoError(t, l.Close())

	_, err = receive(link)
	require.ErrorIs(t, err, io.EOF)
	conn, err := net.Dial("tcp", l.Addr().String())
	if err == nil {
		conn.Close()
	}
	assert.ErrorIs(t, err, syscall.ECONNREFUSED, "the socket is still open")
}
