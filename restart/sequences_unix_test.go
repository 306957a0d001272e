//go:build unix

package restart_test

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener/internal/testutil/httpclient"
	"github.com/c2db162c/stoppablelistener/internal/testutil/httpload"
	"github.com/c2db162c/stoppablelistener/internal/testutil/proctest"
	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

var (
	sequencesFlag = flag.Duration("sequences", 3*time.Second, "for how long to try random `sequences`")
	seedFlag      = flag.Uint64("seed", 0, "repeat the random sequence with this `seed`")
)

// No request fails, whatever happens to the processes, until connections are refused in the end.
func TestRandomSequences(t *testing.T) {
	tcptest.SkipIfShort(t, "takes seconds")
	t.Parallel()
	tcptest.RequireRefusal(t)
	ok := true
	for start := time.Now(); ok && time.Since(start) < *sequencesFlag; {
		seed := *seedFlag
		if seed == 0 {
			seed = rand.Uint64()
		}
		ok = t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			q := &sequence{TB: t, Rand: rand.New(rand.NewPCG(seed, 0))}
			q.run()
		})
	}
}

// A sequence is what happens to a service.
type sequence struct {
	testing.TB
	*rand.Rand
	service  *service
	version  int // the last one that was installed
	serving  proctest.Process
	isChild  bool // that the serving process is
	hangs    bool // a new process does, so no more restarts are possible
	resuming sync.WaitGroup
}

func (q *sequence) run() {
	q.service = start(q, "0,"+isHasty, inGroup)
	q.serving = q.service.parent
	requireRefused := q.startClients()
	steps := []func(){q.restart, q.failedRestart, q.lateRestart, q.hangingRestart, q.suspend, q.suspend}
	for range 2 + q.IntN(5) {
		if !q.hangs {
			steps[q.IntN(len(steps))]()
		}
	}
	q.end()
	requireRefused()
	q.service.RequireStatus(q, 0)
	q.resuming.Wait()
	for line := ""; line != "EOF"; line = q.service.Line(q) { // no process is left
	}
}

// startClients starts clients, half of them on connections that are kept. The function that it
// returns requires each client to be refused in the end.
func (q *sequence) startClients() (requireRefused func()) {
	var clients sync.WaitGroup
	errs := make([]error, 6)
	for i := range errs {
		clients.Add(1)
		go func() {
			defer clients.Done()
			client := httpclient.NewClient(nil, false, i%2 == 0)
			defer client.CloseIdleConnections()
			for errs[i] == nil {
				_, errs[i] = httpclient.Post(client, "http://"+q.service.addrs[0], "text")
				time.Sleep(time.Millisecond)
			}
		}()
	}
	return func() {
		q.Helper()
		clients.Wait()
		httpload.RequireRefused(q, errs)
	}
}

func (q *sequence) restart() {
	q.Log("restart")
	child := q.install("")
	q.becomesReady(child)
}

func (q *sequence) failedRestart() {
	q.Log("failed restart")
	q.install(exits).AwaitExit(q)
}

// lateRestart is one whose new process takes a while, or is killed meanwhile.
func (q *sequence) lateRestart() {
	child := q.hang()
	time.Sleep(time.Duration(q.IntN(50)) * time.Millisecond)
	if q.IntN(3) == 0 {
		q.Log("the new process is killed")
		require.NoError(q, child.Kill())
		child.AwaitExit(q)
		return
	}
	q.service.enter(q, "")
	q.becomesReady(child)
}

// hangingRestart leaves a new process that is never ready.
func (q *sequence) hangingRestart() {
	child := q.hang()
	q.hangs = true
	if q.IntN(2) == 0 {
		q.Log("the new process is suspended")
		require.NoError(q, child.Signal(syscall.SIGSTOP))
	}
}

func (q *sequence) hang() proctest.Process {
	q.Log("restart that takes a while")
	child := q.install(waits)
	q.await(fmt.Sprint(q.version, " waits"))
	return child
}

// install starts a restart.
func (q *sequence) install(feature string) proctest.Process {
	q.version++
	q.service.install(q, fmt.Sprint(q.version, ",", isHasty, ",", feature))
	return q.service.Next(q)
}

func (q *sequence) becomesReady(child proctest.Process) {
	q.await(fmt.Sprint(q.version, " ready"))
	q.await(" replaced")
	q.serving, q.isChild = child, true
}

// await waits for a line that contains text.
func (q *sequence) await(text string) {
	q.Helper()
	for {
		line := q.service.Line(q)
		require.NotEqual(q, "EOF", line, "waiting for %q, standard error: %s", text, q.service.Errors(q))
		if strings.Contains(line, text) {
			return
		}
	}
}

// suspend suspends a process for a while. What happens next happens meanwhile.
func (q *sequence) suspend() {
	p, name := q.serving, "serving process"
	if q.IntN(2) == 0 {
		p, name = q.service.parent, "parent"
	}
	d := time.Duration(q.IntN(50)) * time.Millisecond
	if q.IntN(8) == 0 {
		d = time.Duration(q.IntN(3000)) * time.Millisecond // Grace of package httpdrain is 1250 ms
	}
	q.Logf("the %s is suspended for %v", name, d)
	require.NoError(q, p.Signal(syscall.SIGSTOP))
	q.resuming.Add(1)
	time.AfterFunc(d, func() {
		defer q.resuming.Done()
		_ = p.Signal(syscall.SIGCONT)
	})
}

// end stops the service.
func (q *sequence) end() {
	switch n := q.IntN(4); {
	case n == 0 && q.isChild && !q.hangs: // otherwise, it serves until that new process is killed
		q.Log("SIGTERM to the serving process")
		require.NoError(q, q.serving.Signal(syscall.SIGTERM))
	case n == 1:
		q.Log("SIGTERM to the group")
		require.NoError(q, syscall.Kill(-q.service.parent.Pid, syscall.SIGTERM))
	case n == 2:
		q.Log("SIGTERM and SIGINT to the group")
		q.service.signal(q, syscall.SIGSTOP) // so that the parent receives both at the same time
		require.NoError(q, syscall.Kill(-q.service.parent.Pid, syscall.SIGTERM))
		require.NoError(q, syscall.Kill(-q.service.parent.Pid, syscall.SIGINT))
		q.service.signal(q, syscall.SIGCONT)
	default:
		q.Log("SIGTERM to the parent")
		q.service.signal(q, syscall.SIGTERM)
	}
	if q.IntN(2) == 0 {
		q.suspend()
	}
}
