package listenertest_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener"
	"github.com/c2db162c/stoppablelistener/internal/testutil/proctest"
	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

func init() { programs["share"] = share }

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
	cmd := exec.Command(proctest.Self(t), "share")
	cmd.ExtraFiles = []*os.File{file}
	stdin, err := cmd.StdinPipe()
	require.NoError(t, err)
	p := proctest.Start(t, cmd)
	p.RequireLines(t, "blocked")
	sl.Drain()
	tcptest.RequireDrained(t, tcptest.Accept(sl), 1)
	time.Sleep(tcptest.BlindWait / 2)
	_, err = fmt.Fprintln(stdin)
	require.NoError(t, err)
	p.RequireLines(t, "stop", stoppablelistener.StoppedError.Error())
	p.RequireStatus(t, 0)
}

// Without a descriptor, the kernel cannot be asked for handshakes. That lasts longer here than
// Accept waits if it can never be asked. The limit is that of this process.
func TestNoDescriptorIsFreeDuringAHandshake(t *testing.T) {
	tcptest.SkipIfShort(t, "takes half a second")
	tcptest.RequireRefusal(t)
	retryIfLate(t, func() (inTime bool) {
		l, addr := kinds["TCP"].listenDeferred(t)
		sl := tcptest.Wrap(t, l)
		client := kinds["TCP"].startHandshake(t, addr)
		var inTimeAll bool
		t.Run("", func(t *testing.T) { // which restores the limit
			files := useUpDescriptors(t)
			start := time.Now()
			sl.Drain()
			waiting := make(chan tcptest.Accepted, 1)
			go func() {
				for {
					conn, err := sl.Accept()
					if errors.Is(err, syscall.EMFILE) {
						time.Sleep(time.Millisecond)
						continue
					}
					waiting <- tcptest.Accepted{Conn: conn, Err: err}
					return
				}
			}()
			time.Sleep(tcptest.BlindWait * 3 / 2)
			for _, file := range files[:3] {
				require.NoError(t, file.Close())
			}
			if inTimeAll = time.Since(start) < maxHandshake*9/10; inTimeAll {
				requireServed(t, client, waiting)
				tcptest.RequireDrained(t, tcptest.Accept(sl), 1)
			}
		})
		return inTimeAll
	})
}
