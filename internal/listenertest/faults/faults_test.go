// The tests of this directory are what happens to an accept loop in production: load, a child
// process that serves the same socket, no free descriptor, and thousands of rounds.
package faults_test

import (
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

// Connections are always pending, so that no Accept blocks and no poll ends.
func TestSaturatedAcceptLoopsStopAndDropNoConnection(t *testing.T) {
	const acceptors, clients, cycles = 3, 4, 300
	l := tcptest.Listen(t)
	stopLoad := load(t, l, clients, func(string) {})
	for range tcptest.Rounds(cycles) {
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
				assert.LessOrEqual(t, late, 1, "connections that one accept loop has returned after Stop")
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

// The test binary itself is the child process. It is started while the parent accepts.
func TestChildProcessServesTheSameSocket(t *testing.T) {
	const child = "child"
	if tcptest.ChildRole() == child {
		inherited, err := net.FileListener(os.NewFile(3, "listener"))
		require.NoError(t, err)
		sl := tcptest.Wrap(t, inherited)
		served := make(chan error, 1)
		go func() { served <- serve(sl, child, func() {}) }()
		_, err = io.Copy(io.Discard, os.Stdin) // the parent closes it
		require.NoError(t, err)
		sl.Stop()
		tcptest.RequireStoppedError(t, tcptest.Receive(t, served, "return of the accept loop"))
		return
	}
	tcptest.RequireInheritance(t)

	for range 3 {
		cmd, output := tcptest.ChildProcess(t, child)
		l := tcptest.Listen(t)
		byParent, parentServes := tcptest.Countdown(100)
		byChild, childServes := tcptest.Countdown(100)
		stopLoad := load(t, l, 8, func(name string) {
			if name == child {
				byChild()
			}
		})
		sl := tcptest.Wrap(t, l)
		served := make(chan error, 1)
		go func() { served <- serve(sl, "parent", byParent) }()
		tcptest.Receive(t, parentServes, "100 responses of the parent")

		file, err := sl.File()
		require.NoError(t, err)
		cmd.ExtraFiles = []*os.File{file}
		stdin, err := cmd.StdinPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		require.NoError(t, file.Close())
		tcptest.Receive(t, childServes, "100 responses of the child")
		sl.Stop()
		tcptest.RequireStoppedError(t, tcptest.Receive(t, served, "return of the accept loop"))
		require.NoError(t, l.Close())

		stopLoad()
		require.NoError(t, stdin.Close())
		require.NoError(t, cmd.Wait(), output)
	}
}

// The test binary itself runs as a child process with few descriptors. Linux keeps a
// connection in the accept queue if no descriptor is free, and macOS drops it.
func TestNoDescriptorIsFree(t *testing.T) {
	const child, limit = "no descriptors", 64
	if tcptest.ChildRole() != child {
		sh, err := exec.LookPath("sh")
		if err != nil {
			t.Skip("no shell to lower the limit: ", err)
		}
		cmd, output := tcptest.ChildProcess(t, child)
		cmd.Args = append([]string{"sh", "-c", `ulimit -n 64 && exec "$0" "$@"`, cmd.Path}, cmd.Args[1:]...)
		cmd.Args = append(cmd.Args, "-test.v")
		cmd.Path = sh
		require.NoError(t, cmd.Run(), output)
		if strings.Contains(output.String(), "--- SKIP") {
			t.Skip(output)
		}
		return
	}

	const fails = 3
	l := tcptest.Listen(t)
	sl := tcptest.Wrap(t, l)
	for range fails + 1 {
		tcptest.Dial(t, l)
	}
	var files []*os.File
	for {
		file, err := os.Open(os.DevNull)
		if err != nil {
			require.ErrorIs(t, err, syscall.EMFILE)
			break
		}
		files = append(files, file)
		if len(files) == limit {
			t.Skip("there is no such limit here")
		}
	}

	for range fails {
		_, err := sl.Accept()
		require.ErrorIs(t, err, syscall.EMFILE)
		var temporary interface{ Temporary() bool }
		require.ErrorAs(t, err, &temporary)
		require.True(t, temporary.Temporary(), "the error is not temporary: %v", err)
	}
	fail, failing := tcptest.Countdown(1)
	returned := make(chan error, 1)
	go func() {
		for {
			_, err := sl.Accept()
			if !errors.Is(err, syscall.EMFILE) {
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

func TestManyRoundsLeakNothing(t *testing.T) {
	l := tcptest.Listen(t)
	descriptors := func() int {
		files, err := os.ReadDir("/dev/fd") // without that, the test checks goroutines only
		if err != nil {
			return 0
		}
		return len(files)
	}
	goroutines, files := runtime.NumGoroutine(), descriptors()
	for range tcptest.Rounds(10_000) {
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
			if !assert.NoError(t, err, "a connection was dropped") || !assert.NotEmpty(t, response, "a response") {
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
