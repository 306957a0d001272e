// Package httpload is clients that send requests without pause, while a test shuts down or
// restarts their server.
package httpload

import (
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener/internal/testutil/httpclient"
	"github.com/c2db162c/stoppablelistener/internal/testutil/proctest"
	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

// What the body of a response to a [Load] must be.
const (
	Echo = "" // the body of the request
	Any  = "any"
)

// A Load is clients that send requests without pause.
type Load struct {
	url  string
	stop atomic.Bool
	done sync.WaitGroup

	succeeded, failed atomic.Int64
	firstError        atomic.Pointer[error]
	longest           atomic.Int64 // in nanoseconds
}

// Start starts clients that post to url, each one request after the other on connections of
// its own, until Stop is called or the test ends. The responses must have the body want.
func Start(
	t testing.TB, url string, clients int, want string, newClient func() *http.Client,
) *Load {
	ld := &Load{url: url}
	t.Cleanup(ld.Stop)
	for i := range clients {
		ld.done.Add(1)
		go func() {
			defer ld.done.Done()
			client := newClient()
			defer client.CloseIdleConnections()
			for n := 0; !ld.stop.Load(); n++ {
				ld.post(client, fmt.Sprintf("client %d, request %d", i, n), want)
			}
		}()
	}
	return ld
}

func (ld *Load) post(client *http.Client, text, want string) {
	start := time.Now()
	body, err := httpclient.Post(client, ld.url, text)
	if want == Echo {
		want = text
	}
	if err == nil && want != Any && body != want {
		err = fmt.Errorf("the body of the response is %q, not %q", body, want)
	}
	if err != nil {
		ld.failed.Add(1)
		ld.firstError.CompareAndSwap(nil, &err)
		return
	}
	ld.succeeded.Add(1)
	took := int64(time.Since(start))
	for longest := ld.longest.Load(); took > longest && !ld.longest.CompareAndSwap(longest, took); {
		longest = ld.longest.Load()
	}
}

// Stop waits until the clients have returned.
func (ld *Load) Stop() {
	ld.stop.Store(true)
	ld.done.Wait()
}

// AwaitRequests waits until n more requests have succeeded.
func (ld *Load) AwaitRequests(t testing.TB, n int64) {
	t.Helper()
	enough := ld.succeeded.Load() + n
	tcptest.Await(t, fmt.Sprintf("%d more responses", n), func() bool {
		return ld.succeeded.Load() >= enough
	})
}

// Succeeded returns how many requests have succeeded.
func (ld *Load) Succeeded() int64 { return ld.succeeded.Load() }

// Failed returns how many requests have failed.
func (ld *Load) Failed() int64 { return ld.failed.Load() }

// Longest returns how long the longest request has taken.
func (ld *Load) Longest() time.Duration { return time.Duration(ld.longest.Load()) }

// RequireNoneFailed stops the load and fails the test with the first error, if a request
// has failed.
func (ld *Load) RequireNoneFailed(t testing.TB) {
	t.Helper()
	ld.Stop()
	if failed := ld.failed.Load(); failed > 0 {
		require.Failf(t, "requests failed", "%d of %d, the first with: %v",
			failed, failed+ld.succeeded.Load(), *ld.firstError.Load())
	}
	t.Logf("%d requests, none failed, the longest took %v", ld.succeeded.Load(), ld.Longest())
}

// PostUntilError starts clients that post to url, each until a request fails, and returns when
// each has had ten responses. The function that it returns waits until all have failed.
func PostUntilError(
	url string, clients int, newClient func(i int) *http.Client,
) (wait func() []error) {
	var busy, posting sync.WaitGroup
	busy.Add(clients)
	posting.Add(clients)
	errs := make([]error, clients)
	for i := range clients {
		go func() {
			defer posting.Done()
			isBusy := sync.OnceFunc(busy.Done)
			defer isBusy()
			client := newClient(i)
			defer client.CloseIdleConnections()
			for n := 0; errs[i] == nil; n++ {
				if n == 10 {
					isBusy()
				}
				_, errs[i] = httpclient.Post(client, url, "text")
			}
		}()
	}
	busy.Wait()
	return func() []error {
		posting.Wait()
		return errs
	}
}

// RequireRefused requires each error to be that a connection was refused.
func RequireRefused(t testing.TB, errs []error) {
	t.Helper()
	for i, err := range errs {
		require.True(t, tcptest.IsRefused(err), "the last request of client %d: %v", i, err)
	}
}

// RequireSignalFailsNoRequest sends SIGTERM to a program that serves HTTP at addr, while half of the
// clients keep their connections. The program must exit with status 0, without a message, and fail
// no request but those that are refused in the end.
func RequireSignalFailsNoRequest(t testing.TB, p *proctest.Program, addr string) {
	t.Helper()
	wait := PostUntilError("http://"+addr, 16, func(i int) *http.Client {
		return httpclient.NewClient(nil, false, i%2 == 0)
	})
	proctest.Signal(t, p.Process, syscall.SIGTERM)
	RequireRefused(t, wait())
	p.RequireStatus(t, 0)
	assert.Empty(t, p.Errors(t))
}
