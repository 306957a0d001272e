//go:build unix

package listenertest_test

import (
	"errors"
	"os"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

// Linux keeps a connection in the accept queue if no descriptor is free, and macOS drops it.
func TestNoDescriptorIsFree(t *testing.T) {
	const fails = 3
	l := tcptest.Listen(t)
	sl := tcptest.Wrap(t, l)
	for range fails + 1 {
		tcptest.Dial(t, l)
	}
	files := useUpDescriptors(t)
	accept := func() error {
		for {
			conn, err := sl.Accept()
			if err != nil {
				return err
			}
			t.Cleanup(func() { conn.Close() }) // a test before this one has closed its descriptor late
		}
	}

	for range fails {
		err := accept()
		require.ErrorIs(t, err, syscall.EMFILE)
		var temporary interface{ Temporary() bool }
		require.ErrorAs(t, err, &temporary)
		require.True(t, temporary.Temporary(), "the error is not temporary: %v", err)
	}
	fail, failing := tcptest.Countdown(1)
	returned := make(chan error, 1)
	go func() {
		for {
			if err := accept(); !errors.Is(err, syscall.EMFILE) {
				returned <- err
				return
			}
			fail()
		}
	}()
	tcptest.Receive(t, failing, "error of Accept")
	sl.Stop()
	tcptest.RequireStoppedError(t, tcptest.Receive(t, returned, "return of the accept loop"))

	require.NoError(t, files[0].Close()) // for a client
	require.NoError(t, files[1].Close()) // for its connection
	tcptest.Dial(t, l)
	conn, err := tcptest.Wrap(t, l).Accept()
	require.NoError(t, err)
	conn.Close()
}

// useUpDescriptors lowers the limit of open descriptors of this process until the test ends, and
// opens files until no descriptor is free.
func useUpDescriptors(t *testing.T) (files []*os.File) {
	const limit = 64
	var before syscall.Rlimit
	require.NoError(t, syscall.Getrlimit(syscall.RLIMIT_NOFILE, &before))
	lower := before
	lower.Cur = limit
	require.NoError(t, syscall.Setrlimit(syscall.RLIMIT_NOFILE, &lower))
	t.Cleanup(func() { require.NoError(t, syscall.Setrlimit(syscall.RLIMIT_NOFILE, &before)) })
	for {
		file, err := os.Open(os.DevNull)
		if err != nil {
			require.ErrorIs(t, err, syscall.EMFILE)
			return files
		}
		t.Cleanup(func() { file.Close() })
		files = append(files, file)
		if len(files) == limit {
			t.Skip("there is no such limit here")
		}
	}
}
