package restart_test

import (
	"context"
	"errors"
	"net"
	"os"
	"runtime"
	"sync"
	"syscall"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
	"github.com/c2db162c/stoppablelistener/restart"
)

// The tests of this file need no other process, and run on all systems.

func TestRunReturnsTheErrorOfServe(t *testing.T) {
	want := errors.New("some error")
	err := restart.Run(func(context.Context, *restart.Process) error { return want })
	assert.Equal(t, want, err)
}

func TestListenAndReadyWithoutAParent(t *testing.T) {
	require.NoError(t, restart.Run(func(ctx context.Context, p *restart.Process) error {
		l, err := p.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		defer l.Close()
		p.Ready()
		p.Ready()
		tcptest.RequireClient(t, tcptest.Dial(t, l), tcptest.Accept(l))
		assert.NoError(t, ctx.Err())
		assert.Equal(t, os.Getpid(), p.Pid())
		return nil
	}))
}

// The context is not done, so on Unix the sockets are not drained.
func TestDrainStopsEachListener(t *testing.T) {
	require.NoError(t, restart.Run(func(_ context.Context, p *restart.Process) error {
		var calls sync.WaitGroup
		for range 2 {
			sl, err := p.Listen("tcp", "127.0.0.1:0")
			require.NoError(t, err)
			defer sl.Close()
			accepted := tcptest.Accept(sl)
			tcptest.AwaitAcceptors(t, 1)
			for range 3 {
				calls.Add(1)
				go func() {
					defer calls.Done()
					sl.Drain()
				}()
			}
			tcptest.RequireStopped(t, accepted, 1)
			sl.Drain()
		}
		calls.Wait()
		return nil
	}))
}

func TestListenUsesListenConfig(t *testing.T) {
	want := errors.New("some error")
	require.NoError(t, restart.Run(func(_ context.Context, p *restart.Process) error {
		p.ListenConfig.Control = func(string, string, syscall.RawConn) error { return want }
		_, err := p.Listen("tcp", "127.0.0.1:0")
		if runtime.GOOS != "plan9" && runtime.GOOS != "js" && runtime.GOOS != "wasip1" {
			assert.ErrorIs(t, err, want)
		}
		return nil
	}))
}

func TestListenReturnsTheErrorsOfPackageNet(t *testing.T) {
	busy := tcptest.Listen(t)
	require.NoError(t, restart.Run(func(_ context.Context, p *restart.Process) error {
		for _, tt := range []struct{ network, address string }{
			{"udp", "127.0.0.1:0"},
			{"tcp", "127.0.0.1"},
			{"tcp", busy.Addr().String()},
		} {
			l, err := p.Listen(tt.network, tt.address)
			require.Error(t, err)
			assert.Nil(t, l)
			_, want := net.Listen(tt.network, tt.address)
			if tt.network == "udp" {
				want = net.UnknownNetworkError("udp")
			}
			assert.Equal(t, want.Error(), err.Error())
		}
		return nil
	}))
}
