// The tests of this file are what happens to an accept loop in production: load, a child process
// that serves the same socket, and many rounds.
package listenertest_test

import (
	"io"
	"net"
	"os"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener/internal/testutil/proctest"
	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

// Connections are always pending, so that no Accept blocks and no poll ends.
func TestSaturatedAcceptLoopsStopAndDropNoConnection(t *testing.T) {
	const acceptors, clients, cycles = 3, 4, 30
	l := tcptest.Listen(t)
	stopLoad := load(t, l, clients, func(string) {})
	for range cycles {
		sl := tcptest.Wrap(t, l)
		var stopped atomic.Bool
		accepted, enough := tcptest.Countdown(50)
		served := make(chan error, acceptors)
		for range acceptors {
			late := 0
			go func() {
				err := serve(sl, "served", func() {
					accepted()
					if stopped.Load() {
						late++
					}
				})
				assert.LessOrEqual(t, late, 1, "connections that an accept loop got after Stop")
				served <- err
			}()
		}
		tcptest.Receive(t, enough, "50 connections")
		sl.Stop()
		stopped.Store(true)
		for range acceptors {
			tcptest.RequireStoppedError(t, tcptest.Receive(t, served, "return of the accept loop"))
		}
	}

	sl := tcptest.Wrap(t, l)
	served := make(chan error, 1)
	go func() { served <- serve(sl, "served", func() {}) }()
	stopLoad()
	sl.Stop()
	tcptest.RequireStoppedError(t, tcptest.Receive(t, served, "return of the accept loop"))
}

// child serves the socket that it has inherited, until the parent closes standard input.
func child() {
	t := proctest.TB{}
	inherited, err := net.FileListener(os.NewFile(3, "listener"))
	require.NoError(t, err)
	sl := tcptest.Wrap(t, inherited)
	served := make(chan error, 1)
	go func() { served <- serve(sl, "child", func() {}) }()
	_, err = io.Copy(io.Discard, os.Stdin)
	require.NoError(t, err)
	sl.Stop()
	tcptest.RequireStoppedError(t, tcptest.Receive(t, served, "return of the accept loop"))
}

// The child process is started while the parent accepts.
func TestChildProcessServesTheSameSocket(t *testing.T) {
	proctest.RequireInheritance(t)
	l := tcptest.Listen(t)
	byParent, parentServes := tcptest.Countdown(100)
	byChild, childServes := tcptest.Countdown(100)
	stopLoad := load(t, l, 8, func(name string) {
		if name == "child" {
			byChild()
		}
	})
	sl := tcptest.Wrap(t, l)
	served := make(chan error, 1)
	go func() { served <- serve(sl, "parent", byParent) }()
	tcptest.Receive(t, parentServes, "100 responses of the parent")

	file, err := sl.File()
	require.NoError(t, err)
	p, stdin := start(t, "child", file)
	require.NoError(t, file.Close())
	tcptest.Receive(t, childServes, "100 responses of the child")
	sl.Stop()
	tcptest.RequireStoppedError(t, tcptest.Receive(t, served, "return of the accept loop"))
	require.NoError(t, l.Close())

	stopLoad()
	require.NoError(t, stdin.Close())
	p.RequireStatus(t, 0)
}

func TestManyRoundsLeakNothing(t *testing.T) {
	l := tcptest.Listen(t)
	drain := func() {
		sl := tcptest.Wrap(t, tcptest.Listen(t))
		sl.Drain()
		tcptest.RequireDrained(t, tcptest.Accept(sl), 1)
		require.NoError(t, sl.Close())
	}
	descriptors := func() int {
		files, err := os.ReadDir("/dev/fd") // without that, the test checks goroutines only
		if err != nil {
			return 0
		}
		return len(files)
	}
	drain() // the runtime opens some descriptors
	goroutines, files := runtime.NumGoroutine(), descriptors()
	for range 3 {
		drain()
	}
	for range 100 {
		sl := tcptest.Wrap(t, l)
		client := tcptest.DialOnce(t, l)
		conn, err := sl.Accept()
		require.NoError(t, err)
		conn.Close()
		client.Close()
		waiting := tcptest.Accept(sl)
		sl.Stop()
		tcptest.RequireStopped(t, waiting, 1)
	}
	tcptest.Await(t, "as few goroutines as before", func() bool {
		return runtime.NumGoroutine() <= goroutines
	})
	assert.LessOrEqual(t, descriptors(), files, "open descriptors")
}

// Helpers

// load connects clients to l until stop is called, each with eight connections at a time.
// Each connection must get a response, with which load calls responded.
func load(t testing.TB, l net.Listener, clients int, responded func(string)) (stop func()) {
	addr := l.Addr().String()
	return tcptest.Loop(t, clients, func() bool {
		conns := make([]net.Conn, 8)
		for i := range conns {
			conn, err := net.DialTimeout("tcp", addr, tcptest.Patience)
			if !assert.NoError(t, err, "a client cannot connect") {
				return false
			}
			defer conn.Close()
			_ = conn.(*net.TCPConn).SetLinger(0) // as DialOnce
			_ = conn.SetDeadline(time.Now().Add(tcptest.Patience))
			conns[i] = conn
		}
		for _, conn := range conns {
			response, err := io.ReadAll(conn)
			if !assert.NoError(t, err, "a connection was dropped") ||
				!assert.NotEmpty(t, response, "a response") {
				return false
			}
			responded(string(response))
		}
		return true
	})
}

// serve responds to each client of l with name, and then calls responded, until Accept fails.
func serve(l net.Listener, name string, responded func()) error {
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		if _, err := io.WriteString(conn, name); err != nil {
			return err
		}
		if err := conn.Close(); err != nil {
			return err
		}
		responded()
	}
}
