package restart_test

import (
	"context"
	"errors"
	"net"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
	"github.com/c2db162c/stoppablelistener/restart"
)

// The tests of this file need no other process, and run on all systems.

func TestRunReturnsTheErrorOfServe(t *testing.T) {
	want := errors.New("some error")
	assert.Equal(t, want, restart.Run(func(context.Context, *restart.Process) error { return want }))
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
