//go:build unix && !aix && !solaris

package restart_test

import (
	"bytes"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener/internal/testutil/httpclient"
	"github.com/c2db162c/stoppablelistener/internal/testutil/httpload"
	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

func init() {
	examples["lock"] = ExampleRun_lock
	examples["order"] = func() {
		delay = 500 * time.Millisecond
		ExampleRun_shutdownOrder()
	}
}

func TestExampleWithLockRestartsWithoutAFailedRequest(t *testing.T) {
	tcptest.SkipIfShort(t, "starts many processes")
	t.Parallel()
	l := tcptest.Listen(t)
	path := filepath.Join(t.TempDir(), "file")
	s := launch(t, "lock", with("ADDR="+l.Addr().String(), "FILE="+path), activated(t, "$$", l))
	restartExample(t, s, l)

	file, err := os.Open(path)
	require.NoError(t, err)
	defer file.Close()
	err = syscall.Flock(int(file.Fd()), syscall.LOCK_SH|syscall.LOCK_NB)
	require.ErrorIs(t, err, syscall.EWOULDBLOCK, "the lock of the serving process")
	s.signal(t, syscall.SIGTERM)
	s.requireExit(t)
}

func TestExampleKeepsTheOrderOfTheShutdown(t *testing.T) {
	tcptest.SkipIfShort(t, "starts many processes")
	t.Parallel()
	l, admin := tcptest.Listen(t), tcptest.Listen(t)
	adminAddr := admin.Addr().String()
	path := filepath.Join(t.TempDir(), "jobs")
	s := launch(t, "order", activated(t, "$$", l, admin),
		with("ADDR="+l.Addr().String(), "ADMIN_ADDR="+adminAddr, "JOBS="+path))
	stopProbes := tcptest.Loop(t, 2, func() bool {
		status := httpclient.Status(t, adminAddr, "/ready")
		return assert.Equal(t, http.StatusOK, status, "readiness during a restart")
	})
	accepted := restartExample(t, s, l)
	stopProbes()

	idle := httpclient.Dial(t, l.Addr().String(), nil)
	idle.Get(t, "/?job=last")
	idle.Response(t)
	s.signal(t, syscall.SIGTERM)
	tcptest.Await(t, "failure of the readiness probe", func() bool {
		return httpclient.Status(t, adminAddr, "/ready") == http.StatusServiceUnavailable
	})
	assert.Equal(t, http.StatusOK, httpclient.Status(t, adminAddr, "/debug/vars"), "while the API shuts down")
	idle.AwaitClosed(t)
	s.RequireStatus(t, 0)
	jobs, err := os.ReadFile(path)
	require.NoError(t, err)
	assert.EqualValues(t, accepted+1, bytes.Count(jobs, []byte("\n")), "jobs done")
}

// restartExample restarts an example that serves l twice under load, and returns how many requests
// have succeeded.
func restartExample(t testing.TB, s *service, l net.Listener) (requests int64) {
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
	return load.Succeeded()
}
