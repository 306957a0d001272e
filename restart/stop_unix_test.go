//go:build unix

package restart_test

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener/internal/testutil/httpclient"
	"github.com/c2db162c/stoppablelistener/internal/testutil/httpload"
	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

// Listener.Drain, which is that of the StoppableListener or its Stop

// The last stop of the service is Drain

func TestServiceThatIsStoppedResetsNoClient(t *testing.T) {
	tcptest.SkipIfShort(t, "starts many processes")
	t.Parallel()
	if runtime.GOOS != "linux" {
		t.Skip("Drain does not refuse connections here")
	}
	const parent, group, child = "parent", "group", "child"
	for name, tt := range map[string]struct {
		restarts int
		signaled string
	}{
		"parent serves":                   {0, parent},
		"child serves":                    {2, parent},
		"child serves, group is signaled": {1, group},
		"child serves and is signaled":    {2, child},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := start(t, "1", inGroup)
			target := map[string]int{parent: s.parent.Pid, group: -s.parent.Pid}
			for n := range tt.restarts {
				target[child] = s.restart(t, fmt.Sprint(n+1), fmt.Sprint(n+2)).Pid
			}
			requireRefused := startClients(t, s.addrs[0])
			require.NoError(t, syscall.Kill(target[tt.signaled], syscall.SIGTERM))
			requireRefused()
			s.RequireLines(t, fmt.Sprint(tt.restarts+1, " stopped: terminated"))
			s.requireExit(t)
		})
	}
}

// startClients starts clients, half of them on connections that are kept. The function that it
// returns requires each client to be refused in the end.
func startClients(t *testing.T, addr string) (requireRefused func()) {
	wait := httpload.PostUntilError("http://"+addr, 16, func(i int) *http.Client {
		return httpclient.NewClient(nil, false, i%2 == 0)
	})
	return func() {
		t.Helper()
		httpload.RequireRefused(t, wait())
	}
}

// In a child, whose parent is this test

// A parentEnd is the parent's end of the link to a child; see the protocol in link_unix.go.
type parentEnd struct{ *net.UnixConn }

// startChild starts a version of the program as a child of this test. The child inherits l, whose
// name ends in mark.
func startChild(
	t *testing.T, version string, l *net.TCPListener, mark string,
) (*service, parentEnd) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	require.NoError(t, err)
	syscall.CloseOnExec(fds[0])
	syscall.CloseOnExec(fds[1])
	file := os.NewFile(uintptr(fds[0]), "link")
	defer file.Close()
	conn, err := net.FileConn(file)
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	name := "tcp " + l.Addr().String() + mark
	s := launch(t, version, on("tcp,"+l.Addr().String()), func(cmd *exec.Cmd) {
		with("STOPPABLELISTENER_RESTART=1 4711\n" + name + "\n")(cmd)
		passFiles(t, cmd, l)
		cmd.ExtraFiles = append(cmd.ExtraFiles, os.NewFile(uintptr(fds[1]), "link"))
	})
	s.addrs = []string{l.Addr().String()}
	return s, parentEnd{conn.(*net.UnixConn)}
}

// awaitReady waits until the child has sent its sockets.
func (p parentEnd) awaitReady(t *testing.T) {
	t.Helper()
	received := make(chan error, 1)
	go func() {
		text, data := []byte(nil), make([]byte, 1024)
		for !bytes.HasSuffix(text, []byte("\n\n")) {
			n, err := p.Read(data)
			if err != nil {
				received <- err
				return
			}
			text = append(text, data[:n]...)
		}
		received <- nil
	}()
	require.NoError(t, tcptest.Receive(t, received, "sockets of the child"))
}

// receive receives the number of a signal from the child.
func (p parentEnd) receive(t *testing.T) syscall.Signal {
	t.Helper()
	number := make([]byte, 1)
	require.NoError(t, p.SetReadDeadline(time.Now().Add(tcptest.Patience)))
	_, err := p.Read(number)
	require.NoError(t, err, "signal of the child")
	return syscall.Signal(number[0])
}

// send sends the child the number of a signal.
func (p parentEnd) send(t *testing.T, sig syscall.Signal) {
	t.Helper()
	_, err := p.Write([]byte{byte(sig)})
	require.NoError(t, err)
}

func TestDrainInAChild(t *testing.T) {
	tcptest.SkipIfShort(t, "starts many processes")
	t.Parallel()
	const isDrained, isStopped = true, false
	message := func(sig syscall.Signal) func(*testing.T, *service, parentEnd) {
		return func(t *testing.T, _ *service, p parentEnd) { p.send(t, sig) }
	}
	signaledAndThen := func(then func(*testing.T, parentEnd)) func(*testing.T, *service, parentEnd) {
		return func(t *testing.T, s *service, p parentEnd) {
			s.signal(t, syscall.SIGTERM)
			require.Equal(t, syscall.SIGTERM, p.receive(t))
			require.Equal(t, "1", s.get(t, "/")) // as long as the parent sends nothing
			then(t, p)
		}
	}
	for name, tt := range map[string]struct {
		stop func(*testing.T, *service, parentEnd)
		want bool
		line string
		mark string // of the socket
	}{
		"the parent stops the service": {
			stop: message(syscall.SIGINT), want: isDrained, line: "stopped: interrupt",
		},
		"replaced": {
			stop: message(syscall.SIGUSR2), want: isStopped, line: "replaced: user defined signal 2",
		},
		"the parent exits": {
			stop: func(t *testing.T, _ *service, p parentEnd) { require.NoError(t, p.Close()) },
			want: isStopped, line: "stopped: parent process exited",
		},
		"signaled itself, and the parent stops the service": {
			stop: signaledAndThen(func(t *testing.T, p parentEnd) { p.send(t, syscall.SIGTERM) }),
			want: isDrained, line: "stopped: terminated",
		},
		"signaled itself, and replaced": {
			stop: signaledAndThen(func(t *testing.T, p parentEnd) { p.send(t, syscall.SIGUSR2) }),
			want: isStopped, line: "stopped: terminated",
		},
		"signaled itself, and the parent exits": {
			stop: signaledAndThen(func(t *testing.T, p parentEnd) { require.NoError(t, p.Close()) }),
			want: isStopped, line: "stopped: terminated",
		},
		"the socket comes from socket activation": {
			stop: message(syscall.SIGTERM), want: isStopped, line: "stopped: terminated",
			mark: " activated",
		},
		"nothing has happened": {
			stop: func(t *testing.T, s *service, p parentEnd) {
				s.get(t, "/drain")
				p.send(t, syscall.SIGTERM)
			},
			want: isStopped, line: "stopped: terminated",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := tcptest.Listen(t)
			s, parent := startChild(t, "1", l, tt.mark)
			s.requireReady(t, "1")
			parent.awaitReady(t)
			tt.stop(t, s, parent)
			s.RequireLines(t, "1 "+tt.line)
			s.requireExit(t)
			requireState(t, l, tt.want)
		})
	}
}

// requireState requires l, which this test has too, to be shut down after Drain, and to have new
// connections after Stop. After Drain, its address may be that of another socket.
func requireState(t *testing.T, l *net.TCPListener, isDrained bool) {
	t.Helper()
	if !isDrained {
		conn, err := net.Dial("tcp", l.Addr().String())
		require.NoError(t, err, "the socket has been drained, not stopped")
		defer conn.Close()
		tcptest.RequireClient(t, conn, tcptest.Accept(l))
	} else if runtime.GOOS == "linux" {
		require.NoError(t, l.SetDeadline(time.Now().Add(time.Second)))
		_, err := l.Accept()
		require.ErrorIs(t, err, syscall.EINVAL, "the socket has not been drained")
	}
}

// A child that is not ready waits for no message, which need not come. Its Ready does nothing.
func TestNewProcessThatIsSignaledDoesNotDrain(t *testing.T) {
	t.Parallel()
	l := tcptest.Listen(t)
	s, parent := startChild(t, "1,"+isLate, l, "")
	s.RequireLines(t, "1 waits")
	s.signal(t, syscall.SIGTERM)
	s.requireReady(t, "1")
	s.RequireLines(t, "1 stopped: terminated")
	s.requireExit(t)
	requireState(t, l, false)
	n, err := parent.Read(make([]byte, 1))
	assert.Equal(t, io.EOF, err)
	assert.Zero(t, n, "bytes sent to the parent")
}

func TestNewProcessExitsWithStatus1IfItsParentExits(t *testing.T) {
	tcptest.SkipIfShort(t, "starts many processes")
	t.Parallel()
	for _, feature := range []string{hangs, isLate} {
		t.Run(feature, func(t *testing.T) {
			t.Parallel()
			l := tcptest.Listen(t)
			s, parent := startChild(t, "1,"+feature, l, "")
			require.NotEqual(t, "EOF", s.Line(t), "standard error: %s", s.Errors(t))
			require.NoError(t, parent.Close())
			s.RequireStatus(t, 1)
			assert.Equal(t, fmt.Sprintf("restart: parent process exited before process %d was ready\n",
				s.parent.Pid), s.Errors(t))
			requireState(t, l, false)
		})
	}
}

// A service stays reachable, whatever has stopped one of its processes

func TestServiceOfSocketActivationStaysReachable(t *testing.T) {
	tcptest.SkipIfShort(t, "starts many processes")
	t.Parallel()
	l := tcptest.Listen(t)
	first := start(t, "1", on("tcp,"+l.Addr().String()), activated(t, "$$", l))
	first.restart(t, "1", "2")
	first.restart(t, "2", "3")
	first.stop(t, "3")
	waiting := httpclient.Dial(t, l.Addr().String(), nil)
	waiting.Get(t, "/")
	second := start(t, "second", on("tcp,"+l.Addr().String()), activated(t, "$$", l))
	_, body := waiting.Response(t)
	require.Equal(t, "second", body)
	waiting.Close() // otherwise, package httpdrain waits for it
	second.stop(t, "second")
}

// The process was replaced, still handles a request, and then fails.
func TestServiceStaysReachableIfAnOldProcessIsSignaled(t *testing.T) {
	tcptest.SkipIfShort(t, "starts many processes")
	t.Parallel()
	s := start(t, "1")
	old := s.restart(t, "1", "2,"+fails)
	inFlight := s.startRequest(t)
	s.restart(t, "2", "3")
	require.NoError(t, old.Signal(syscall.SIGTERM))
	inFlight.Finish(t, "2")
	old.AwaitExit(t)
	require.Equal(t, "3", s.get(t, "/"))
	require.Equal(t, "serve fails\n", s.Errors(t))
	s.stop(t, "3")
}
