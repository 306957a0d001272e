//go:build unix

package main

import (
	"fmt"
	"net/http"
	"os/exec"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener/internal/testutil/httpclient"
	"github.com/c2db162c/stoppablelistener/internal/testutil/httpload"
	"github.com/c2db162c/stoppablelistener/internal/testutil/proctest"
	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

func TestRestartFailsNoRequest(t *testing.T) {
	t.Parallel()
	installed := proctest.Install(t, "0")
	p, addr := startServing(t, installed.Path)
	p.Next(t)
	load := httpload.Start(t, "http://"+addr, 8, "Hello HTTP!", func() *http.Client {
		return httpclient.NewClient(nil, false, true)
	})
	for n := range tcptest.Rounds(5) {
		load.AwaitRequests(t, 20)
		installed.Replace(t, fmt.Sprint(n+1))
		proctest.Signal(t, p.Process, syscall.SIGUSR2)
		p.RequireLines(t, "Serving HTTP")
		requireStopping(t, p, syscall.SIGUSR2)
		require.Equal(t, fmt.Sprint(n+1), p.Next(t).Version)
	}
	load.AwaitRequests(t, 20)
	load.RequireNoneFailed(t)
	proctest.Signal(t, p.Process, syscall.SIGTERM)
	requireStopping(t, p, syscall.SIGTERM)
	p.RequireStatus(t, 0)
	p.RequireNoProcess(t)
	require.Empty(t, p.Errors(t))
}

func TestSignalUnderLoadFailsNoRequest(t *testing.T) {
	t.Parallel()
	tcptest.RequireRefusal(t)
	p, addr := startServing(t, proctest.Self(t))
	httpload.RequireSignalFailsNoRequest(t, p, addr)
}

// Ctrl+C also stops cat, after which the program writes to a closed pipe.
func TestInterruptOfAPipeline(t *testing.T) {
	t.Parallel()
	for range tcptest.Rounds(5) {
		p, addr := startPipeline(t)
		server := p.Next(t)
		inFlight := startRequest(t, addr)
		require.NoError(t, syscall.Kill(-p.Process.Pid, syscall.SIGINT))
		inFlight.Finish(t, "Hello HTTP!\n")
		server.AwaitExit(t)
	}
}

// startPipeline starts the program on a free port, with its standard output in a pipe to cat.
func startPipeline(t testing.TB) (p *proctest.Program, addr string) {
	t.Helper()
	addr = tcptest.FreeAddr(t)
	cmd := exec.Command("sh", "-c", `"$0" -addr "$1" | cat`, proctest.Self(t), addr)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return start(t, cmd), addr
}
