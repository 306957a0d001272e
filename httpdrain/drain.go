package httpdrain

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/c2db162c/stoppablelistener/internal/replaced"
)

const (
	// tick is how long the drain waits before it checks whether the process was suspended.
	tick = 50 * time.Millisecond

	// maxChecks is how many ticks it waits at most after a time is over. Otherwise, a process
	// that is throttled all the time, and so seems to be suspended, would wait forever.
	maxChecks = 100

	// goAwayTimeout is longer than package http keeps an HTTP/2 connection open after GOAWAY.
	goAwayTimeout = 2 * time.Second
)

// A drain is the graceful shutdown of a server: its state, and what it waits for.
type drain struct {
	delay, grace, timeout time.Duration
	server                *http.Server
	conns                 conns

	known   atomic.Bool   // load balancers may know the server
	started atomic.Bool   // a context is done
	done    chan struct{} // no values sent; closed when the drain is over
	err     error         // set before done is closed

	mu          sync.Mutex // guards the fields below
	acceptLoops map[*acceptLoop]struct{}
	draining    bool // the listeners' Drain is called
	shutdown    bool // the server's Shutdown is called

	// Only the goroutine of run uses these.
	deadline  time.Time // the end of timeout
	unsettled int       // quiet ticks until what came while the process was suspended is handled
}

// add adds an accept loop that is about to start. It returns false if the server is shut down.
func (d *drain) add(a *acceptLoop) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.shutdown {
		return false
	}
	d.acceptLoops[a] = struct{}{}
	if d.draining {
		go a.listener.Drain()
	}
	return true
}

// remove removes an accept loop that has returned err. It reports whether that was the drain's
// doing.
func (d *drain) remove(a *acceptLoop, err error) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.acceptLoops, a)
	d.conns.wakeDrain()
	if err == http.ErrServerClosed {
		return d.shutdown // or other code has shut down the server
	}
	return d.draining
}

// run shuts down the server, if that has not been started. The cause is that of the context.
func (d *drain) run(cause error) {
	if d.started.Swap(true) {
		return
	}
	if d.known.Load() && !errors.Is(cause, replaced.Err) {
		time.Sleep(d.delay)
	}
	d.drainListeners()
	d.conns.sendGoAway()
	if d.timeout <= 0 {
		d.timeout = math.MaxInt64
	}
	d.deadline = time.Now().Add(d.timeout)
	for {
		d.awaitAcceptLoops()
		d.awaitConns()
		if d.startShutdown() {
			break
		} // otherwise, Serve was called again
	}
	d.shutDown()
	close(d.done)
}

// drainListeners calls Drain of each listener at the same time, because it may take a second.
func (d *drain) drainListeners() {
	var drained sync.WaitGroup
	defer drained.Wait()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.draining = true
	for a := range d.acceptLoops {
		drained.Add(1)
		go func() {
			defer drained.Done()
			a.listener.Drain()
		}()
	}
}

// awaitAcceptLoops waits until the accept loops have returned. If that takes longer than the grace
// period, Accept may be blocked in a wrapper that waits until a connection is closed.
func (d *drain) awaitAcceptLoops() {
	grace := max(d.grace, tick)
	for !d.wait(time.Now().Add(grace), d.noAcceptLoop) && !d.expired() {
		unusedSince := time.Now().Add(-grace)
		d.conns.closeIn(http.StateNew, unusedSince)
		d.conns.closeIn(http.StateIdle, unusedSince)
	}
}

// awaitConns waits until the connections are closed, or the grace period is over, also for those
// that have become idle in it.
func (d *drain) awaitConns() {
	start := time.Now()
	if !d.wait(start.Add(d.grace), d.noConn) {
		d.wait(d.conns.lastIdle().Add(d.grace), func() bool {
			return d.conns.lastIdle().Before(start)
		})
	}
}

// startShutdown reports whether Shutdown may be called: no accept loop is running, or it is too
// late to wait for it.
func (d *drain) startShutdown() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.shutdown = len(d.acceptLoops) == 0 || d.expired()
	return d.shutdown
}

// shutDown closes the connections, those with a request in flight after that.
func (d *drain) shutDown() {
	// Shutdown waits for accept loops, whatever its context is, and so does Close.
	expired, cancel := context.WithCancel(context.Background())
	cancel()
	var called atomic.Bool
	go func() {
		_ = d.server.Shutdown(expired)
		called.Store(true)
		d.conns.wakeDrain()
	}()
	// It also waits for idle clients over TLS that do not read.
	d.wait(time.Now().Add(time.Second), called.Load)
	d.conns.closeIn(http.StateNew, time.Now())
	// It may miss an HTTP/2 connection that has just been set up, which then stays idle.
	for left := goAwayTimeout; !d.wait(time.Now().Add(left), d.noConn) && !d.expired(); left = tick {
		d.conns.closeIn(http.StateIdle, time.Now().Add(-goAwayTimeout))
	}
	if requests := d.conns.abort(); requests > 0 {
		d.err = fmt.Errorf("httpdrain: requests aborted: %d: %w", requests, context.DeadlineExceeded)
	}
}

func (d *drain) noAcceptLoop() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.acceptLoops) == 0
}

func (d *drain) noConn() bool { return d.conns.open.Load() == 0 }

func (d *drain) expired() bool { return !time.Now().Before(d.deadline) }

// wait waits until done returns true, and returns false if the end or the deadline comes before.
//
// That a time is over proves nothing: the process may have been suspended, and what it waits for
// may be there. So wait goes on until all that came meanwhile has been handled.
func (d *drain) wait(end time.Time, done func() bool) bool {
	if d.deadline.Before(end) {
		end = d.deadline
	}
	for checks := 0; !done(); {
		left := time.Until(end)
		if left <= 0 {
			if d.unsettled == 0 || checks == maxChecks {
				return false
			}
			checks++
			left = tick
		}
		d.waitTick(min(left, tick))
	}
	return true
}

// waitTick waits until it is woken, but no longer than dur.
func (d *drain) waitTick(dur time.Duration) {
	start, changes := time.Now(), d.conns.changes.Load()
	timer := time.NewTimer(dur)
	defer timer.Stop()
	select {
	case <-d.conns.wake:
	case <-timer.C:
	}
	switch took := time.Since(start); {
	case took > dur+tick:
		d.unsettled = 2 // not one, in which the process may not have run
	case took >= tick && took < tick*6/5 && d.conns.changes.Load() == changes:
		// No request has come in a whole tick, nor waits for a processor.
		d.unsettled = max(0, d.unsettled-1)
	}
}
