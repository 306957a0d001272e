//go:build unix

package restart_test

import (
	"fmt"
	"net"
	"os/exec"
	"syscall"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener/internal/testutil/proctest"
	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

// From the parent

func TestAllListenersAreInherited(t *testing.T) {
	t.Parallel()
	s := startOn(t, "1", "tcp,127.0.0.1:0", "tcp4,localhost:0", "tcp,127.0.0.1:0", "tcp,:0")
	for n := 1; n < 4; n++ {
		s.restart(t, fmt.Sprint(n), fmt.Sprint(n+1)) // compares the addresses
		for _, addr := range s.addrs {
			_, port, err := net.SplitHostPort(addr)
			require.NoError(t, err)
			require.Equal(t, fmt.Sprint(n+1), getFrom(t, "127.0.0.1:"+port, "/"))
		}
	}
	s.stop(t, "4")
}

func TestANewVersionListensOnLessAndOnMore(t *testing.T) {
	t.Parallel()
	s := startOn(t, "1", "tcp,127.0.0.1:0", "tcp,localhost:0")
	all := s.addrs
	s.addrs = all[:1]
	s.restart(t, "1", "2,"+listensLess)
	requireRefused(t, all[1])
	require.Equal(t, "2", getFrom(t, all[0], "/"))

	s.install(t, "3,"+listensMore)
	more := s.requireReady(t, "3")
	s.RequireLines(t, "2 stopped: user defined signal 2")
	require.Len(t, more, 3)
	s.addrs = more
	s.restart(t, "3", "4,"+listensMore)
	for _, addr := range more {
		require.Equal(t, "4", getFrom(t, addr, "/"))
	}
	s.stop(t, "4")
	for _, addr := range more {
		requireRefused(t, addr)
	}
}

func TestListenAfterReadyKeepsNoDuplicate(t *testing.T) {
	t.Parallel()
	s := start(t, "1")
	requireRefused(t, s.get(t, "/listen-and-close"))
	s.restart(t, "1", "2")
	requireRefused(t, s.get(t, "/listen-and-close"))
	s.stop(t, "2")
}

// From socket activation

// activate starts the program with sockets, as systemd does, and with these addresses as its
// arguments. LISTEN_PID is pid, a shell expression.
func activate(t testing.TB, pid, version string, sockets []*net.TCPListener, addrs ...string) (*proctest.Program, proctest.Installation) {
	t.Helper()
	installed := proctest.Install(t, version)
	script := fmt.Sprintf(`LISTEN_FDS=%d LISTEN_PID=%s exec "$0" "$@"`, len(sockets), pid)
	cmd := exec.Command("sh", append([]string{"-c", script, installed.Path}, addrs...)...)
	for _, l := range sockets {
		file, err := l.File()
		require.NoError(t, err)
		defer file.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, file)
	}
	return proctest.Start(t, cmd), installed
}

// The test keeps the sockets open, so without activation the addresses would be in use.
func TestListenReturnsTheSocketsOfSocketActivation(t *testing.T) {
	t.Parallel()
	first, second := tcptest.Listen(t), tcptest.Listen(t)
	p, installed := activate(t, "$$", "1", []*net.TCPListener{first, second},
		"tcp4,"+second.Addr().String(), "tcp,"+first.Addr().String())
	s := &service{Program: p, Installation: installed, parent: p.Next(t)}
	s.addrs = s.requireReady(t, "1")
	require.Equal(t, "1", getFrom(t, first.Addr().String(), "/"))
	require.Equal(t, "1", getFrom(t, second.Addr().String(), "/"))
	s.restart(t, "1", "2")
	require.Equal(t, "2", getFrom(t, first.Addr().String(), "/"))
	require.Equal(t, "2", getFrom(t, second.Addr().String(), "/"))
	s.stop(t, "2")
}

func TestSocketActivationOfAnotherProcessIsIgnored(t *testing.T) {
	t.Parallel()
	l := tcptest.Listen(t)
	p, _ := activate(t, "1", "1", []*net.TCPListener{l}, "tcp,"+l.Addr().String())
	p.RequireStatus(t, 1)
	assert.Contains(t, p.Errors(t), "address already in use")
}

func TestSocketActivationMatchesTheAddress(t *testing.T) {
	t.Parallel()
	l := tcptest.Listen(t)
	_, port, err := net.SplitHostPort(l.Addr().String())
	require.NoError(t, err)
	p, _ := activate(t, "$$", "1", []*net.TCPListener{l}, "tcp,:"+port)
	assert.NotContains(t, p.Line(t), "127.0.0.1") // most systems report that the port is in use
}

func TestSocketActivationMatchesTheNetwork(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp4", ":0")
	require.NoError(t, err)
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	require.NoError(t, err)
	p, _ := activate(t, "$$", "1", []*net.TCPListener{l.(*net.TCPListener)}, "tcp6,[::]:"+port)
	line := p.Line(t)
	if line == "EOF" {
		t.Skip("no IPv6: ", p.Errors(t))
	}
	assert.Equal(t, "1 ready [::]:"+port, line)
}

func TestInheritedSocketsThatListenDoesNotReturnAreClosed(t *testing.T) {
	t.Parallel()
	used, unused := tcptest.Listen(t), tcptest.Listen(t)
	p, _ := activate(t, "$$", "1", []*net.TCPListener{unused, used}, "tcp,"+used.Addr().String())
	require.Regexp(t, "^1 ready", p.Line(t))
	require.NoError(t, unused.Close())
	requireRefused(t, unused.Addr().String())
	require.Equal(t, "1", getFrom(t, used.Addr().String(), "/"))
}

func TestHelperProcessesDoNotInheritActivatedSockets(t *testing.T) {
	t.Parallel()
	l := tcptest.Listen(t)
	p, _ := activate(t, "$$", "1,"+helper, []*net.TCPListener{l}, "tcp,"+l.Addr().String())
	var pid int
	_, err := fmt.Sscanf(p.Line(t), "helper %d", &pid)
	require.NoError(t, err)
	killHelper(t, pid)
	require.Regexp(t, "^1 ready", p.Line(t))
	require.NoError(t, l.Close())
	require.NoError(t, p.Process.Signal(syscall.SIGTERM))
	p.RequireStatus(t, 0)
	requireRefused(t, l.Addr().String())
	require.NoError(t, syscall.Kill(pid, 0), "the helper is not running")
}

// The variables are for this process only.
func TestVariablesAreTakenOutOfTheEnvironment(t *testing.T) {
	t.Parallel()
	l := tcptest.Listen(t)
	p, installed := activate(t, "$$", "1", []*net.TCPListener{l}, "tcp,"+l.Addr().String())
	s := &service{Program: p, Installation: installed, parent: p.Next(t)}
	s.addrs = s.requireReady(t, "1")
	assert.Empty(t, s.get(t, "/variables"))
	s.restart(t, "1", "2")
	assert.Empty(t, s.get(t, "/variables"))
}
