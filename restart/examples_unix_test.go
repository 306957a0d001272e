//go:build unix && !aix && !solaris

package restart_test

import (
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener/internal/testutil/httpclient"
	"github.com/c2db162c/stoppablelistener/internal/testutil/httpload"
	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

func init() { examples["lock"] = ExampleRun_lock }

func TestExampleWithLockRestartsWithoutAFailedRequest(t *testing.T) {
	t.Parallel()
	l := tcptest.Listen(t)
	path := filepath.Join(t.TempDir(), "file")
	s := launch(t, "lock", with("ADDR="+l.Addr().String(), "FILE="+path), activated(t, "$$", l))
	load := httpload.Start(t, "http://"+l.Addr().String(), 8, httpload.Any, func() *http.Client {
		return httpclient.NewClient(nil, false, true)
	})
	serving := s.parent
	for range 2 {
		load.AwaitRequests(t, 20)
		s.signal(t, syscall.SIGUSR2)
		child := s.Next(t)
		if serving != s.parent {
			serving.AwaitExit(t)
		}
		serving = child
	}
	load.AwaitRequests(t, 20)
	load.RequireNoneFailed(t)

	file, err := os.Open(path)
	require.NoError(t, err)
	defer file.Close()
	err = syscall.Flock(int(file.Fd()), syscall.LOCK_SH|syscall.LOCK_NB)
	require.ErrorIs(t, err, syscall.EWOULDBLOCK, "the lock of the serving process")
	s.signal(t, syscall.SIGTERM)
	s.requireExit(t)
}
