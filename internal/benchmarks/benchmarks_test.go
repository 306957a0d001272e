// The benchmarks of this folder compare an accept loop that can be stopped with the bare
// listener and with the classic one-second poll.
//
// The arms of a benchmark take turns within each iteration, so that whatever else the
// machine does meets all of them, and each has metrics of its own. Medians, because
// the machine does a lot else.
package benchmarks_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener"
	"github.com/c2db162c/stoppablelistener/internal/tcptest"
)

func BenchmarkAccept(b *testing.B) { benchmarkAccept(b, 1) }

func BenchmarkAcceptParallel(b *testing.B) { benchmarkAccept(b, 4) }

// benchmarkAccept takes connections from a filled queue with a number of acceptors.
func benchmarkAccept(b *testing.B, acceptors int) {
	const queued = 100 // less than any system's backlog
	blockInRead(b)
	b.StopTimer() // it runs only while connections are accepted
	times, allocs := samples{}, samples{}
	for i := range b.N {
		for _, arm := range inTurn(i, arms...) {
			raw := tcptest.Listen(b)
			l, _ := arm.wrap(b, raw)
			clients := make([]net.Conn, queued)
			for c := range clients {
				clients[c] = tcptest.DialOnce(b, l)
			}
			conns := make([]net.Conn, queued)
			begin := make(chan struct{})
			var end sync.WaitGroup
			for a := 1; a < acceptors; a++ {
				end.Add(1)
				go func() {
					defer end.Done()
					<-begin
					acceptInto(b, l, conns, a, acceptors)
				}()
			}

			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			b.StartTimer()
			start := time.Now()
			close(begin)
			acceptInto(b, l, conns, 0, acceptors)
			end.Wait()
			elapsed := time.Since(start)
			b.StopTimer()
			runtime.ReadMemStats(&after)

			times.add(arm, float64(elapsed.Nanoseconds())/queued)
			allocs.add(arm, float64(after.Mallocs-before.Mallocs)/queued)
			for c := range conns {
				clients[c].Close()
				conns[c].Close()
			}
			raw.Close()
		}
	}
	times.report(b, "ns/accept", 0.5)
	allocs.report(b, "allocs/accept", 0.5)
	times.reportRatio(b, "ours/bare", 0.5)
}

// acceptInto accepts every step-th connection.
func acceptInto(b *testing.B, l net.Listener, conns []net.Conn, from, step int) {
	for i := from; i < len(conns); i += step {
		conn, err := l.Accept()
		if err != nil {
			b.Error(err)
			return
		}
		conns[i] = conn
	}
}

// BenchmarkStop is the time from the call of stop, for the bare listener Close, to the
// return of the last Accept that was waiting.
func BenchmarkStop(b *testing.B) {
	for _, waiting := range []int{1, 10, 100} {
		b.Run(fmt.Sprintf("waiting=%d", waiting), func(b *testing.B) {
			blockInRead(b)
			times := samples{}
			for i := range b.N {
				for _, arm := range inTurn(i, bare, ours) {
					took := timeStop(b, arm, waiting, func() { tcptest.AwaitAcceptors(b, waiting) })
					times.add(arm, float64(took))
				}
			}
			b.StopTimer()
			if b.N > 1 { // the first run is only to find how many make a second
				for _, took := range timeClassicStops(b, waiting) {
					times.add(classic, float64(took))
				}
			}
			times.report(b, "p50-ns", 0.5)
			times.report(b, "p99-ns", 0.99)
			times.reportRatio(b, "p50-ours/bare", 0.5)
		})
	}
}

// timeStop stops goroutines that wait in Accept, once settle has returned.
func timeStop(b *testing.B, arm arm, waiting int, settle func()) time.Duration {
	raw := tcptest.Listen(b)
	defer raw.Close()
	l, stop := arm.wrap(b, raw)
	returned := make(chan time.Time, waiting)
	for range waiting {
		go func() {
			_, _ = l.Accept()
			returned <- time.Now()
		}()
	}
	settle()
	start := time.Now()
	stop()
	var last time.Duration
	for range waiting {
		last = max(last, (<-returned).Sub(start))
	}
	return last
}

// timeClassicStops stops many listeners of the classic design side by side, each at
// some point of its poll.
func timeClassicStops(b *testing.B, waiting int) []time.Duration {
	took := make([]time.Duration, 50)
	var stops sync.WaitGroup
	for i := range took {
		stops.Add(1)
		go func() {
			defer stops.Done()
			phase := rand.N(time.Second)
			took[i] = timeStop(b, classic, waiting, func() { time.Sleep(phase) })
		}()
	}
	stops.Wait()
	return took
}

// BenchmarkStopUnderLoad counts the connections that were established and got no answer
// because the accept loop was stopped, and the socket served again right away.
func BenchmarkStopUnderLoad(b *testing.B) {
	const stops = 10
	blockInRead(b)
	lost := map[string]int64{}
	for i := range b.N {
		for _, arm := range inTurn(i, arms...) {
			lost[arm.name] += countLost(b, arm, stops)
		}
	}
	for _, arm := range arms {
		b.ReportMetric(float64(lost[arm.name])/float64(b.N*stops), arm.name+"-lost/stop")
	}
	b.ReportMetric(0, "ns/op")
}

// countLost stops and serves a socket again under load, and returns how many
// connections were lost.
func countLost(b *testing.B, arm arm, stops int) int64 {
	raw := tcptest.Listen(b)
	addr := raw.Addr().String()
	var lost atomic.Int64
	stopLoad := tcptest.Repeatedly(b, 8, func() bool {
		var conns []*net.TCPConn
		for range 16 {
			conn, err := net.DialTimeout("tcp", addr, tcptest.Patience)
			if err == nil { // else nobody listens: not established, not lost
				conns = append(conns, conn.(*net.TCPConn))
			}
		}
		for _, conn := range conns {
			_ = conn.SetReadDeadline(time.Now().Add(time.Second))
			if _, err := conn.Read(make([]byte, 1)); err != nil {
				lost.Add(1)
			}
			_ = conn.SetLinger(0) // as tcptest.DialOnce
			conn.Close()
		}
		return true
	})

	for n := range stops + 1 {
		if errors.Is(raw.SetDeadline(time.Time{}), net.ErrClosed) { // by the bare arm's stop
			l, err := net.Listen("tcp", addr)
			require.NoError(b, err)
			raw = l.(*net.TCPListener)
			b.Cleanup(func() { l.Close() })
		}
		l, stop := arm.wrap(b, raw)
		last := n == stops
		if last { // no client is left to be lost by it
			go func() {
				stopLoad()
				stop()
			}()
		}
		for served := 1; ; served++ {
			conn, err := l.Accept()
			if err != nil {
				break
			}
			_, _ = conn.Write([]byte("x"))
			conn.Close()
			if served == 100 && !last {
				stop()
			}
		}
	}
	raw.Close()
	return lost.Load()
}

// BenchmarkServe is whole HTTP requests through http.Server, a connection for each.
func BenchmarkServe(b *testing.B) {
	const requests = 20
	blockInRead(b)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	times := samples{}
	for i := range b.N {
		for _, arm := range inTurn(i, arms...) {
			l, _ := arm.wrap(b, tcptest.Listen(b))
			server := http.Server{Handler: http.NotFoundHandler()}
			ended := make(chan error, 1)
			go func() { ended <- server.Serve(l) }()
			tcptest.Get(b, client, l) // now Serve serves
			start := time.Now()
			for range requests {
				tcptest.Get(b, client, l)
			}
			times.add(arm, float64(time.Since(start).Nanoseconds())/requests)
			server.Close()
			<-ended
		}
	}
	times.report(b, "ns/request", 0.5)
	times.reportRatio(b, "ours/bare", 0.5)
}

// BenchmarkIdle counts, for a minute, how often a goroutine that waits in Accept is
// woken. Each arm is a process, since the runtime counts for a whole process.
func BenchmarkIdle(b *testing.B) {
	const listeners = 2000
	if name := tcptest.ChildRole(); name != "" {
		arm := arms[slices.IndexFunc(arms, func(a arm) bool { return a.name == name })]
		for i := range listeners {
			l, _ := arm.wrap(b, tcptest.Listen(b))
			if sl, ok := l.(*stoppablelistener.StoppableListener); ok && i%2 == 0 {
				require.NoError(b, sl.SetDeadline(time.Now().Add(time.Hour))) // makes no poll longer
			}
			tcptest.Accept(l)
		}
		tcptest.AwaitAcceptors(b, listeners)
		debug.FreeOSMemory() // else the runtime does so by and by, which counts as well
		before := timesScheduled()
		time.Sleep(time.Minute)
		fmt.Printf("\nwoken: %g\n", float64(timesScheduled()-before)/listeners)
		os.Exit(0)
	}
	woken := samples{}
	for range b.N {
		var idling sync.WaitGroup
		outputs := make([]*bytes.Buffer, len(arms))
		for i, arm := range arms {
			var cmd *exec.Cmd
			cmd, outputs[i] = tcptest.ChildProcess(b, arm.name)
			cmd.Args = append(cmd.Args, "-test.bench", "^"+b.Name()+"$", "-test.benchtime", "1x")
			idling.Add(1)
			go func() {
				defer idling.Done()
				assert.NoError(b, cmd.Run(), outputs[i])
			}()
		}
		idling.Wait()
		for i, arm := range arms {
			_, after, _ := strings.Cut(outputs[i].String(), "woken:")
			var n float64
			_, err := fmt.Sscan(after, &n)
			require.NoError(b, err, outputs[i])
			woken.add(arm, n)
		}
	}
	woken.report(b, "wakeups/min", 0.5)
	assert.InDelta(b, 1, woken.quantile(ours, 0.5), 0.3, "a poll lasts a minute") // .ci/run looks
}

// samples are what was measured, by the name of the arm.
type samples map[string][]float64

func (s samples) add(a arm, v float64) { s[a.name] = append(s[a.name], v) }

// quantile returns the q-quantile of an arm's samples.
func (s samples) quantile(a arm, q float64) float64 {
	sorted := slices.Clone(s[a.name])
	slices.Sort(sorted)
	return sorted[int(q*float64(len(sorted)-1))]
}

// report reports the q-quantile of each arm in unit, in place of the time of an
// iteration, which means nothing here.
func (s samples) report(b *testing.B, unit string, q float64) {
	for _, arm := range arms {
		if len(s[arm.name]) > 0 {
			b.ReportMetric(s.quantile(arm, q), arm.name+"-"+unit)
		}
	}
	b.ReportMetric(0, "ns/op")
}

func (s samples) reportRatio(b *testing.B, unit string, q float64) {
	b.ReportMetric(s.quantile(ours, q)/s.quantile(bare, q), unit)
}

// blockInRead keeps a goroutine blocked in a network read. A process in which nothing
// waits in the network poller accepts faster, and a pending deadline would look as if
// it cost that difference.
func blockInRead(b *testing.B) {
	l := tcptest.Listen(b)
	tcptest.Dial(b, l)
	conn, err := l.Accept()
	require.NoError(b, err)
	go conn.Read(make([]byte, 1))
	b.Cleanup(func() { conn.Close() })
}

// timesScheduled returns how often a goroutine of this process has begun to run.
func timesScheduled() uint64 {
	sample := []metrics.Sample{{Name: "/sched/latencies:seconds"}}
	metrics.Read(sample)
	var n uint64
	for _, count := range sample[0].Value.Float64Histogram().Counts {
		n += count
	}
	return n * 8 // the runtime notes one time out of eight
}
