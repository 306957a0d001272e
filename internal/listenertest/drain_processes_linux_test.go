package listenertest_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener"
	"github.com/c2db162c/stoppablelistener/internal/testutil/proctest"
	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

func init() { programs["share"], programs["suspended"] = share, suspended }

// share accepts connections from the inherited socket, and stops when it reads a line.
func share() {
	t := proctest.TB{}
	l, err := net.FileListener(os.NewFile(3, "socket"))
	require.NoError(t, err)
	sl := tcptest.Wrap(t, l)
	accepted := tcptest.Accept(sl)
	tcptest.AwaitAcceptors(t, 1)
	fmt.Println("blocked")
	go func() {
		_, _ = fmt.Scanln()
		fmt.Println("stop")
		sl.Stop()
	}()
	fmt.Println((<-accepted).Err)
}

// A server in the process that has not been told to stop yet would exit if Accept returned an error.
func TestAcceptInAnotherProcessWaitsForStopAfterDrain(t *testing.T) {
	t.Parallel()
	tcptest.RequireRefusal(t)
	sl := tcptest.Wrap(t, tcptest.Listen(t))
	file, err := sl.File()
	require.NoError(t, err)
	defer file.Close()
	p, stdin := start(t, "share", file)
	p.RequireLines(t, "blocked")
	sl.Drain()
	tcptest.RequireDrained(t, tcptest.Accept(sl), 1)
	time.Sleep(tcptest.BlindWait / 2)
	_, err = fmt.Fprintln(stdin)
	require.NoError(t, err)
	p.RequireLines(t, "stop", stoppablelistener.StoppedError.Error())
	p.RequireStatus(t, 0)
}

// suspended drains a listener and suspends the process while Accept waits.
func suspended() {
	t := proctest.TB{}
	runtime.GOMAXPROCS(1)
	config := withOption(syscall.IPPROTO_TCP, syscall.TCP_DEFER_ACCEPT, 10)
	config.SetMultipathTCP(false)
	l, err := config.Listen(context.Background(), "tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	sl := tcptest.Wrap(t, l)
	fmt.Println(l.Addr())
	_, _ = fmt.Scanln() // the client has connected
	accepted := tcptest.Accept(sl)
	sl.Drain()
	time.Sleep(tcptest.BlindWait / 5) // Accept has started to wait
	fmt.Println("suspended")
	require.NoError(t, syscall.Kill(os.Getpid(), syscall.SIGSTOP))

	got := <-accepted
	require.NoError(t, got.Err, "a connection is pending")
	echo(t, got.Conn)
}

// When the process runs again, the deadline has expired and a connection is pending. With
// GOMAXPROCS=1, Go looks at the deadline first.
func TestConnectionThatComesWhileTheProcessIsSuspended(t *testing.T) {
	t.Parallel()
	tcptest.RequireRefusal(t)
	p, stdin := start(t, "suspended")
	client, err := net.Dial("tcp", p.Line(t))
	require.NoError(t, err)
	defer client.Close()
	_, err = fmt.Fprintln(stdin)
	require.NoError(t, err)
	p.RequireLines(t, "suspended")
	_, err = client.Write([]byte("x")) // completes the handshake
	require.NoError(t, err)
	time.Sleep(tcptest.BlindWait * 6 / 5)
	proctest.Signal(t, p.Process, syscall.SIGCONT)
	_, err = client.Read(make([]byte, 1))
	require.NoError(t, err, "the client has no response; standard error: %s", p.Errors(t))
	client.Close()
	p.RequireStatus(t, 0)
}
