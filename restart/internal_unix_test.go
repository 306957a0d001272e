//go:build unix

package restart

import (
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener/internal/socket"
	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

// What other processes cannot make happen for certain

// A child that is killed while it sends its sockets must not leave them open in the parent.
func TestSocketsOfAnIncompleteMessageAreClosed(t *testing.T) {
	link, file, err := linkPair()
	require.NoError(t, err)
	child, err := net.FileConn(file)
	require.NoError(t, err)
	require.NoError(t, file.Close())
	l := tcptest.Listen(t)
	fd, err := socket.DupConn(l)
	require.NoError(t, err)
	_, _, err = child.(*net.UnixConn).WriteMsgUnix(
		[]byte("tcp 127.0.0.1:0\n"), syscall.UnixRights(fd), nil)
	require.NoError(t, err)
	require.NoError(t, child.Close())
	require.NoError(t, syscall.Close(fd))
	require.NoError(t, l.Close())

	_, err = link.receiveSockets()
	require.Equal(t, errLinkClosed, err)
	tcptest.AwaitRefused(t, l.Addr().String())
}

// The parent was suspended meanwhile, so it receives both at once.
func TestSignalOfAChildFollowsItsSockets(t *testing.T) {
	parent, file, err := linkPair()
	require.NoError(t, err)
	fd, err := syscall.Dup(int(file.Fd()))
	require.NoError(t, err)
	require.NoError(t, file.Close())
	child, err := openLink(fd)
	require.NoError(t, err)
	child.sendSockets(nil)
	child.sendSignal(syscall.SIGTERM)
	time.AfterFunc(tcptest.Patience, parent.interrupt)
	sockets, err := parent.receiveSockets()
	require.NoError(t, err, "end of the sockets")
	assert.Empty(t, sockets)
	assert.Equal(t, syscall.SIGTERM, parent.receiveSignal())
	child.close()
}

// The service was stopped, the timeout is over, or there is another new process by now.
func TestChildThatIsReadyTooLateDoesNotServe(t *testing.T) {
	c := new(childProcess)
	for name, p := range map[string]*parent{
		"stopping":        {state: stopping, newProcess: c},
		"expired":         {state: steady, newProcess: c},
		"another process": {state: restarting, newProcess: new(childProcess)},
	} {
		l := tcptest.Listen(t)
		fd, err := socket.DupConn(l)
		require.NoError(t, err)
		require.NoError(t, l.Close())
		before := p.state
		p.serving = self(func(error) { t.Errorf("%s: replaced", name) })
		c.settled = make(chan struct{})
		p.childReady(c, []held{{"tcp 127.0.0.1:0", fd}}, nil)
		assert.Equal(t, before, p.state, name)
		_, ok := p.serving.(*childProcess)
		assert.False(t, ok, "%s: the child serves", name)
		tcptest.AwaitRefused(t, l.Addr().String())
	}
}

// It is what net.Listen would return. A test with processes for each case would be long.
func TestInheritedSocketIsFoundByItsAddress(t *testing.T) {
	const activation = ""
	for _, tt := range []struct {
		network, address string // that the socket was created for
		name             string // network under which it is inherited
		same, different  string // networks and addresses
	}{
		{"tcp4", "127.0.0.1", activation, "tcp,127.0.0.1 tcp4,127.0.0.1",
			"tcp, tcp4, tcp,0.0.0.0 tcp,127.0.0.2"},
		{"tcp4", "127.0.0.1", "tcp", "tcp4,127.0.0.1", "tcp,"},
		{"tcp4", "127.0.0.1", "tcp4", "tcp,127.0.0.1", "tcp4,"},
		{"tcp6", "[::1]", activation, "tcp,[::1] tcp6,[::1]", "tcp,[::] tcp6, tcp,[::1%lo]"},
		{"tcp4", "0.0.0.0", activation, "tcp, tcp4, tcp,0.0.0.0 tcp4,0.0.0.0",
			"tcp6, tcp6,[::] tcp,127.0.0.1"},
		{"tcp4", "0.0.0.0", "tcp4", "tcp4, tcp4,0.0.0.0", "tcp, tcp6,"},
		{"tcp6", "[::]", activation, "tcp, tcp6, tcp,[::] tcp6,[::] tcp,0.0.0.0",
			"tcp4, tcp4,0.0.0.0 tcp,[::1]"},
		{"tcp6", "[::]", "tcp", "tcp, tcp,[::] tcp,0.0.0.0", "tcp4, tcp6, tcp6,[::]"},
		{"tcp6", "[::]", "tcp6", "tcp6, tcp6,[::]", "tcp, tcp4, tcp,[::]"},
	} {
		created, err := net.Listen(tt.network, tt.address+":0")
		if err != nil && tt.network == "tcp6" {
			continue // no IPv6
		}
		require.NoError(t, err)
		defer created.Close()
		l := inherited{TCPListener: created.(*net.TCPListener)}
		_, port, err := net.SplitHostPort(l.Addr().String())
		require.NoError(t, err)
		if tt.name != activation {
			l.name = tt.name + " somehost:" + port
		}
		isBoundTo := func(target, port string) bool {
			network, host, _ := strings.Cut(target, ",")
			addr, err := net.ResolveTCPAddr(network, host+":"+port)
			require.NoError(t, err)
			return l.boundTo(network, addr)
		}
		for _, target := range strings.Fields(tt.same) {
			assert.True(t, isBoundTo(target, port), "%v is not %s", tt, target)
			assert.False(t, isBoundTo(target, "1"), "%v is %s with another port", tt, target)
		}
		for _, target := range strings.Fields(tt.different) {
			assert.False(t, isBoundTo(target, port), "%v is %s", tt, target)
		}
	}
}
