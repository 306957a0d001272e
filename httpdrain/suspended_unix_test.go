//go:build unix && !aix

package httpdrain_test

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener"
	"github.com/c2db162c/stoppablelistener/httpdrain"
	"github.com/c2db162c/stoppablelistener/internal/testutil/httpclient"
	"github.com/c2db162c/stoppablelistener/internal/testutil/proctest"
	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

func init() { programs["suspended"] = serveAndSuspend }

// suspendedGrace is ten times as long as the process needs on a machine that is not busy.
const suspendedGrace = time.Second

// serveAndSuspend shuts a server down on SIGTERM, and suspends its own process in the duration
// after Drain that is the second argument; if that is negative, before the end of Drain.
func serveAndSuspend() {
	after, _ := strconv.Atoi(os.Args[2])
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(proctest.TB{}, err)
	sl := tcptest.Wrap(proctest.TB{}, l)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	fmt.Println(l.Addr())
	d := httpdrain.New(&http.Server{Handler: hello})
	d.Grace = suspendedGrace
	require.NoError(proctest.TB{}, d.Serve(ctx, suspending{sl, time.Duration(after) * time.Millisecond}))
}

type suspending struct {
	*stoppablelistener.StoppableListener
	after time.Duration
}

func (s suspending) Drain() {
	s.StoppableListener.Drain()
	suspend := func() { _ = syscall.Kill(os.Getpid(), syscall.SIGSTOP) }
	if s.after < 0 {
		suspend()
	} else {
		time.AfterFunc(s.after, suspend)
	}
}

// Requests that come while the process is suspended, on idle connections, and on new ones that it
// has not accepted yet, are served when it runs again, although each time is over. The process has
// one processor, so that it takes a while.
func TestSuspendedProcessServesWhatCameMeanwhile(t *testing.T) {
	tcptest.SkipIfShort(t, "takes more than a second")
	t.Parallel()
	for name, after := range map[string]int{
		"before the accept loop returns": -1,
		"in the grace period":            100,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cmd := exec.Command(proctest.Self(t), "suspended", strconv.Itoa(after))
			cmd.Env = append(os.Environ(), "GOMAXPROCS=1")
			p := proctest.Start(t, cmd)
			addr := p.Line(t)
			conns := make([]*httpclient.Conn, 100)
			for i := range conns {
				conns[i] = httpclient.Dial(t, addr, nil)
				conns[i].Get(t, "/")
			}
			for _, c := range conns { // not one after another, which takes long on a busy machine
				c.Response(t)
			}
			unread := httpclient.Dial(t, addr, nil)
			proctest.Signal(t, p.Process, syscall.SIGTERM)
			awaitStopped(t, p)
			time.Sleep(suspendedGrace * 5 / 4)
			for _, c := range append(conns, unread) {
				c.Get(t, "/")
			}
			proctest.Signal(t, p.Process, syscall.SIGCONT)
			for _, c := range append(conns, unread) {
				c.RequireLastResponse(t, "Hello")
			}
			p.RequireStatus(t, 0)
		})
	}
}

// awaitStopped waits until the process is suspended.
func awaitStopped(t testing.TB, p *proctest.Program) {
	t.Helper()
	stopped := make(chan error, 1)
	go func() {
		_, err := syscall.Wait4(p.Process.Pid, nil, syscall.WUNTRACED, nil)
		stopped <- err
	}()
	require.NoError(t, tcptest.Receive(t, stopped, "suspension of the process"))
}
