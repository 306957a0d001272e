// The benchmarks of this file compare a StoppableListener with the plain listener and with
// the classic one-second poll.
//
// The variants of a benchmark take turns within each iteration, so that other load of the
// machine affects all of them. Each has metrics of its own, which are medians.
package listenertest_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"runtime/debug"
	"runtime/metrics"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener"
	"github.com/c2db162c/stoppablelistener/internal/testutil/proctest"
	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

// BenchmarkAccept takes connections from a filled accept queue.
func BenchmarkAccept(b *testing.B) {
	const pending = 100 // less than the backlog
	blockInRead(b)
	b.StopTimer() // it runs only while connections are accepted
	times := samples{}
	for i := range b.N {
		for _, variant := range inTurn(i, variants...) {
			raw := tcptest.Listen(b)
			l, _ := variant.wrap(b, raw)
			clients, conns := make([]net.Conn, pending), make([]net.Conn, pending)
			for c := range clients {
				clients[c] = tcptest.DialOnce(b, l)
			}
			b.StartTimer()
			start := time.Now()
			for c := range conns {
				conn, err := l.Accept()
				if err != nil {
					b.Fatal(err)
				}
				conns[c] = conn
			}
			elapsed := time.Since(start)
			b.StopTimer()
			times.add(variant, float64(elapsed.Nanoseconds())/pending)
			for c := range conns {
				clients[c].Close()
				conns[c].Close()
			}
			raw.Close()
		}
	}
	times.report(b, "ns/accept", 0.5)
	times.reportRatio(b, "ours/plain", 0.5)
}

// BenchmarkStop measures the time from the call of Stop, or of Close for the plain listener, to
// the return of a blocked Accept.
func BenchmarkStop(b *testing.B) {
	blockInRead(b)
	times := samples{}
	for i := range b.N {
		for _, variant := range inTurn(i, plain, ours) {
			settle := func() { tcptest.AwaitAcceptors(b, 1) }
			times.add(variant, float64(timeStop(b, variant, settle)))
		}
	}
	b.StopTimer()
	if b.N > 1 { // in the first run, the testing package only estimates b.N
		for _, took := range timeClassicStops(b) {
			times.add(classic, float64(took))
		}
	}
	times.report(b, "p50-ns", 0.5)
	times.report(b, "p99-ns", 0.99)
	times.reportRatio(b, "p50-ours/plain", 0.5)
}

// timeStop stops a goroutine that is blocked in Accept, once settle has returned.
func timeStop(b *testing.B, variant variant, settle func()) time.Duration {
	raw := tcptest.Listen(b)
	defer raw.Close()
	l, stop := variant.wrap(b, raw)
	returned := make(chan time.Time, 1)
	go func() {
		_, _ = l.Accept()
		returned <- time.Now()
	}()
	settle()
	start := time.Now()
	stop()
	return (<-returned).Sub(start)
}

// timeClassicStops stops many listeners of the classic design in parallel, each at a random
// time of its poll.
func timeClassicStops(b *testing.B) []time.Duration {
	took := make([]time.Duration, 50)
	var stops sync.WaitGroup
	for i := range took {
		stops.Add(1)
		go func() {
			defer stops.Done()
			phase := rand.N(time.Second)
			took[i] = timeStop(b, classic, func() { time.Sleep(phase) })
		}()
	}
	stops.Wait()
	return took
}

// BenchmarkStopUnderLoad counts the connections that are established and then dropped because
// the accept loop is stopped. The socket is served again right away.
func BenchmarkStopUnderLoad(b *testing.B) {
	const stops = 10
	blockInRead(b)
	dropped := map[string]int64{}
	for i := range b.N {
		for _, variant := range inTurn(i, variants...) {
			dropped[variant.name] += countDropped(b, variant, stops)
		}
	}
	for _, variant := range variants {
		perStop := float64(dropped[variant.name]) / float64(b.N*stops)
		b.ReportMetric(perStop, variant.name+"-dropped/stop")
	}
	b.ReportMetric(0, "ns/op")
}

// countDropped stops and serves a socket again under load, and returns how many connections
// were dropped.
func countDropped(b *testing.B, variant variant, stops int) int64 {
	raw := tcptest.Listen(b)
	addr := raw.Addr().String()
	var dropped atomic.Int64
	stopLoad := tcptest.Loop(b, 8, func() bool {
		var conns []*net.TCPConn
		for range 16 {
			conn, err := net.DialTimeout("tcp", addr, tcptest.Patience)
			if err == nil { // otherwise, the listener is closed: not established, not dropped
				conns = append(conns, conn.(*net.TCPConn))
			}
		}
		for _, conn := range conns {
			_ = conn.SetReadDeadline(time.Now().Add(time.Second))
			if _, err := conn.Read(make([]byte, 1)); err != nil {
				dropped.Add(1)
			}
			_ = conn.SetLinger(0) // as tcptest.DialOnce
			conn.Close()
		}
		return true
	})

	for n := range stops + 1 {
		if errors.Is(raw.SetDeadline(time.Time{}), net.ErrClosed) { // by stop of the plain variant
			l, err := net.Listen("tcp", addr)
			require.NoError(b, err)
			raw = l.(*net.TCPListener)
			b.Cleanup(func() { l.Close() })
		}
		l, stop := variant.wrap(b, raw)
		last := n == stops
		if last { // all clients have been stopped before
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
	return dropped.Load()
}

// BenchmarkIdle counts how often a goroutine that is blocked in Accept wakes up in a minute.
// Each variant is a process of its own, because the runtime counts for a whole process.
func BenchmarkIdle(b *testing.B) {
	tcptest.SkipIfShort(b, "takes a minute")
	wakeUps := samples{}
	for range b.N {
		programs := make([]*proctest.Program, len(variants))
		for i, variant := range variants {
			programs[i] = proctest.Start(b, exec.Command(proctest.Self(b), "idle", variant.name))
		}
		for i, p := range programs {
			<-p.Next(b).Exited // after a minute
			var n float64
			_, err := fmt.Sscan(p.Line(b), &n)
			require.NoError(b, err, p.Errors(b))
			p.RequireStatus(b, 0)
			wakeUps.add(variants[i], n)
		}
	}
	wakeUps.report(b, "wake-ups/min", 0.5)
	// .ci/run checks this.
	assert.InDelta(b, 1, wakeUps.quantile(ours, 0.5), 0.3, "wake-ups a minute")
}

// idle prints how often a goroutine of the variant in the arguments wakes up in a minute.
func idle() {
	const listeners = 2000
	b, name := proctest.TB{}, os.Args[2]
	variant := variants[slices.IndexFunc(variants, func(v variant) bool { return v.name == name })]
	for i := range listeners {
		l, _ := variant.wrap(b, tcptest.Listen(b))
		if sl, ok := l.(*stoppablelistener.StoppableListener); ok && i%2 == 0 {
			require.NoError(b, sl.SetDeadline(time.Now().Add(time.Hour))) // makes no poll longer
		}
		tcptest.Accept(l)
	}
	tcptest.AwaitAcceptors(b, listeners)
	debug.FreeOSMemory() // otherwise, the runtime does so meanwhile, which counts too
	before := timesScheduled()
	time.Sleep(time.Minute)
	fmt.Println(float64(timesScheduled()-before) / listeners)
}

// samples are what was measured, by name of the variant.
type samples map[string][]float64

func (s samples) add(v variant, sample float64) { s[v.name] = append(s[v.name], sample) }

// quantile returns the q-quantile of a variant's samples.
func (s samples) quantile(v variant, q float64) float64 {
	sorted := slices.Clone(s[v.name])
	slices.Sort(sorted)
	return sorted[int(q*float64(len(sorted)-1))]
}

// report reports the q-quantile of each variant in unit, instead of the time of an iteration.
func (s samples) report(b *testing.B, unit string, q float64) {
	for _, variant := range variants {
		if len(s[variant.name]) > 0 {
			b.ReportMetric(s.quantile(variant, q), variant.name+"-"+unit)
		}
	}
	b.ReportMetric(0, "ns/op")
}

func (s samples) reportRatio(b *testing.B, unit string, q float64) {
	b.ReportMetric(s.quantile(ours, q)/s.quantile(plain, q), unit)
}

// blockInRead keeps a goroutine blocked in a network read. A process accepts faster while no
// goroutine waits in the network poller, and a pending deadline would seem to cost the
// difference.
func blockInRead(b *testing.B) {
	l := tcptest.Listen(b)
	tcptest.Dial(b, l)
	conn, err := l.Accept()
	require.NoError(b, err)
	go conn.Read(make([]byte, 1))
	b.Cleanup(func() { conn.Close() })
}

// timesScheduled returns how often the runtime has scheduled a goroutine of this process.
func timesScheduled() uint64 {
	sample := []metrics.Sample{{Name: "/sched/latencies:seconds"}}
	metrics.Read(sample)
	var n uint64
	for _, count := range sample[0].Value.Float64Histogram().Counts {
		n += count
	}
	return n * 8 // the runtime records one of eight
}
