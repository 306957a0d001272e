//go:build unix

package restart_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

// From the parent

func TestAllListenersAreInherited(t *testing.T) {
	tcptest.SkipIfShort(t, "starts many processes")
	t.Parallel()
	s := start(t, "1",
		on("tcp,127.0.0.1:0", "tcp4,localhost:0", "tcp,127.0.0.1:0", "tcp,:0"))
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

// The old process, which still handles a request, keeps no duplicate either.
func TestANewVersionListensOnLessAndOnMore(t *testing.T) {
	tcptest.SkipIfShort(t, "starts many processes")
	t.Parallel()
	s := start(t, "1", on("tcp,127.0.0.1:0", "tcp,localhost:0"))
	all := s.addrs
	s.restart(t, "1", "2")
	inFlight := s.startRequest(t)
	s.addrs = all[:1]
	s.restart(t, "2", "3,"+listensLess)
	tcptest.AwaitRefused(t, all[1])
	inFlight.Finish(t, "2")
	require.Equal(t, "3", getFrom(t, all[0], "/"))

	s.install(t, "4,"+listensMore)
	s.Next(t)
	more := s.requireReady(t, "4")
	s.RequireLines(t, "3 replaced: user defined signal 2")
	require.Len(t, more, 3)
	s.addrs = more
	s.restart(t, "4", "5,"+listensMore)
	for _, addr := range more {
		require.Equal(t, "5", getFrom(t, addr, "/"))
	}
	s.stop(t, "5")
	for _, addr := range more {
		tcptest.AwaitRefused(t, addr)
	}
}

func TestListenAfterReadyKeepsNoDuplicate(t *testing.T) {
	t.Parallel()
	s := start(t, "1")
	tcptest.AwaitRefused(t, s.get(t, "/listen-and-close"))
	s.restart(t, "1", "2")
	tcptest.AwaitRefused(t, s.get(t, "/listen-and-close"))
	s.stop(t, "2")
}

// A new version listens on tcp4 where the old one had tcp. It cannot open a second socket.
func TestNetworkOfASpecificAddressDoesNotMatter(t *testing.T) {
	tcptest.SkipIfShort(t, "starts many processes")
	t.Parallel()
	l := tcptest.Listen(t)
	s := start(t, "1", on("tcp,"+l.Addr().String()), activated(t, "$$", l))
	s.restart(t, "1", "2,"+listensTCP4)
	s.restart(t, "2", "3")
	s.stop(t, "3")
}

func TestListenConfigCreatesTheSocketsThatAreNotInherited(t *testing.T) {
	tcptest.SkipIfShort(t, "starts many processes")
	t.Parallel()
	s := launch(t, "1,"+controls)
	s.RequireLines(t, "1 controls tcp4")
	s.addrs = s.requireReady(t, "1")
	s.restart(t, "1", "2,"+controls)
	s.install(t, "3,"+controls+","+listensMore)
	require.Regexp(t, "^3 controls tcp[46]$", s.Line(t))
	s.requireReady(t, "3")
	s.RequireLines(t, "2 replaced: user defined signal 2")
	s.stop(t, "3")
}

// If the socket were left open, the second Listen would fail in another way: no descriptor would
// be free for its socket.
func TestListenFailsIfTheSocketCannotBeKept(t *testing.T) {
	t.Parallel()
	s := launch(t, "1,"+atLimit)
	s.RequireLines(t,
		"1 listens: dup: too many open files", "1 listens: dup: too many open files")
	s.requireReady(t, "1")
}

// From socket activation

// The test keeps the sockets open, so without activation the addresses would be in use.
func TestListenReturnsTheSocketsOfSocketActivation(t *testing.T) {
	t.Parallel()
	first, second := tcptest.Listen(t), tcptest.Listen(t)
	s := start(t, "1", on("tcp4,"+second.Addr().String(), "tcp,"+first.Addr().String()),
		activated(t, "$$", first, second))
	requireServedBy := func(version string) {
		t.Helper()
		require.Equal(t, version, getFrom(t, first.Addr().String(), "/"))
		require.Equal(t, version, getFrom(t, second.Addr().String(), "/"))
	}
	requireServedBy("1")
	s.restart(t, "1", "2")
	requireServedBy("2")
	s.stop(t, "2")
}

func TestSocketActivationOfAnotherProcessIsIgnored(t *testing.T) {
	t.Parallel()
	l := tcptest.Listen(t)
	s := launch(t, "1", on("tcp,"+l.Addr().String()), activated(t, "1", l))
	s.RequireStatus(t, 1)
	assert.Contains(t, s.Errors(t), "address already in use")
}

// With Accept=yes, systemd passes a connected socket, with the address of its listener.
func TestSocketsThatAreNotTCPListenersAreClosed(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", tcptest.FreeAddr(t))
	require.NoError(t, err)
	client := tcptest.Dial(t, l)
	connected, err := l.Accept()
	require.NoError(t, err)
	require.NoError(t, l.Close())
	unix, err := net.Listen("unix", filepath.Join(t.TempDir(), "socket"))
	require.NoError(t, err)
	unix.(*net.UnixListener).SetUnlinkOnClose(false)
	s := start(t, "1", on("tcp,"+l.Addr().String()),
		activated(t, "$$", connected.(*net.TCPConn), unix.(*net.UnixListener)))
	require.Equal(t, "1", s.get(t, "/"))

	require.NoError(t, connected.Close())
	require.NoError(t, client.SetReadDeadline(time.Now().Add(tcptest.Patience)))
	_, err = client.Read(make([]byte, 1))
	assert.ErrorIs(t, err, io.EOF, "the connected socket is still open")
	require.NoError(t, unix.Close())
	// A process that another test is starting has it until it executes its program.
	tcptest.Await(t, "the end of the Unix socket", func() bool {
		_, err := net.Dial("unix", unix.Addr().String())
		return errors.Is(err, syscall.ECONNREFUSED)
	})
}

// LISTEN_FDS counts files too, or is larger than what was passed: the descriptors after that
// belong to the Go runtime.
func TestDescriptorsThatAreNotSocketsAreLeftAlone(t *testing.T) {
	t.Parallel()
	r, w, err := os.Pipe()
	require.NoError(t, err)
	defer r.Close()
	l := tcptest.Listen(t)
	s := start(t, "1", on("tcp,"+l.Addr().String()), func(cmd *exec.Cmd) {
		throughShell(`LISTEN_FDS=1000000000 LISTEN_PID=$$ exec "$@"`)(cmd)
		cmd.ExtraFiles = []*os.File{w}
		passFiles(t, cmd, l)
	})
	assert.Equal(t, "<nil>", s.get(t, "/write?descriptor=3"), "error of writing to the pipe")
	s.restart(t, "1", "2")
	s.stop(t, "2")
	text, err := io.ReadAll(r)
	require.NoError(t, err)
	assert.Equal(t, "text", string(text), "what the pipe has received")
}

// The variables are for this process only.
func TestVariablesOfSocketActivationAreTakenOutOfTheEnvironment(t *testing.T) {
	tcptest.SkipIfShort(t, "starts many processes")
	t.Parallel()
	l := tcptest.Listen(t)
	s := start(t, "1", on("tcp,"+l.Addr().String()), activated(t, "$$", l),
		with("LISTEN_PIDFDID=2", "LISTEN_FDNAMES=a", "LISTEN_ADDR=of the program"))
	assert.Equal(t, "LISTEN_ADDR=of the program\n", s.get(t, "/variables"))
	s.restart(t, "1", "2")
	assert.Equal(t, "LISTEN_ADDR=of the program\n", s.get(t, "/variables"))
}
