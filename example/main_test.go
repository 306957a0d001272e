package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener"
	"github.com/c2db162c/stoppablelistener/internal/tcptest"
)

// controlEnv makes the test binary run the program instead of its tests. Its value is the
// address at which each process that does so reports, and then stays connected.
const controlEnv = "STOPPABLELISTENER_EXAMPLE_CONTROL"

// The test binary then plays a version of the program, installed at a path, with a patience.
const (
	versionEnv = "STOPPABLELISTENER_EXAMPLE_VERSION"
	pathEnv    = "STOPPABLELISTENER_EXAMPLE_PATH"
	timeoutEnv = "STOPPABLELISTENER_EXAMPLE_TIMEOUT"
)

const (
	hangs     = "hangs"     // a version that never serves
	shutsDown = "shutsDown" // a version that ends with Shutdown, once it has been replaced
)

func TestMain(m *testing.M) {
	addr := os.Getenv(controlEnv)
	if addr == "" {
		os.Exit(m.Run())
	}
	version := os.Getenv(versionEnv)
	control, err := net.Dial("tcp", addr)
	if err == nil {
		_, err = fmt.Fprintln(control, os.Getpid(), version)
	}
	if err != nil {
		panic(err)
	}
	if path := os.Getenv(pathEnv); path != "" {
		os.Args[0] = path
	}
	if timeout, err := time.ParseDuration(os.Getenv(timeoutEnv)); err == nil {
		drainTimeout, restartTimeout = timeout, timeout
	}
	hello := page
	page = func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body) // says when a request is in progress, as hold asks
		hello(w, r)
	}
	switch version {
	case hangs:
		_, _ = control.Read(make([]byte, 1))
	case shutsDown:
		shutDownMain()
	default:
		main()
	}
	runtime.KeepAlive(control)
}

// shutDownMain is main, but for Shutdown in place of the drainer.
func shutDownMain() {
	l, err := inherit(3)
	if err != nil {
		panic(err)
	}
	sl, err := stoppablelistener.New(l)
	if err != nil {
		panic(err)
	}
	end, replace := make(chan os.Signal, 1), make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGTERM)
	notifyRestart(replace)
	server := &http.Server{Handler: page}
	fmt.Println("Serving HTTP")
	ready()
	replaced, err := serveUntil(end, replace, server, sl)
	if err == nil && replaced {
		err = restart(context.Background(), sl.TCPListener)
	}
	if err == nil {
		err = server.Shutdown(context.Background())
	}
	if err != nil {
		panic(err)
	}
}

// A program is the example, as a process of its own and those that it restarts as.
type program struct {
	*exec.Cmd
	lines     *bufio.Scanner // the standard output of all its processes
	stderr    *os.File
	processes <-chan process // as they begin
}

// A process has one version of the program, and ends some day.
type process struct {
	*os.Process
	version string
	ended   <-chan struct{}
}

// start starts the program with args.
func start(t testing.TB, args ...string) *program {
	p := &program{Cmd: exec.Command(self(t), args...)}
	p.start(t)
	return p
}

// start starts the program; what is left of it is killed when the test ends. A short run
// starts none.
func (p *program) start(t testing.TB) {
	if testing.Short() {
		t.Skip("starts a process")
	}
	processes, addr := awaitProcesses(t)
	p.processes = processes
	p.Env = append(os.Environ(), controlEnv+"="+addr)
	stdout, w, err := os.Pipe()
	require.NoError(t, err)
	defer w.Close()
	p.Stdout, p.lines = w, bufio.NewScanner(stdout)
	p.stderr, err = os.CreateTemp(t.TempDir(), "")
	require.NoError(t, err)
	p.Stderr = p.stderr
	require.NoError(t, p.Start())
	t.Cleanup(func() {
		_ = p.Process.Kill()
		_ = p.Wait()
		stdout.Close()
		p.stderr.Close()
	})
}

// awaitProcesses returns the processes that report at addr, as they begin to run, and kills
// those that are left when the test ends.
func awaitProcesses(t testing.TB) (processes <-chan process, addr string) {
	l := tcptest.Listen(t)
	ch := make(chan process, 100)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			var pid int
			var version string
			control := bufio.NewReader(conn)
			line, err := control.ReadString('\n')
			if err != nil {
				t.Error(err)
				return
			}
			_, _ = fmt.Sscan(line, &pid, &version) // the version may be empty
			running, err := os.FindProcess(pid)
			if err != nil {
				t.Error(err)
				return
			}
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				_, _ = control.ReadByte()
			}()
			t.Cleanup(func() {
				select {
				case <-ended:
				default:
					_ = running.Kill()
					<-ended
				}
			})
			ch <- process{running, version, ended}
		}
	}()
	return ch, l.Addr().String()
}

// self is the path of the test binary.
func self(t testing.TB) string {
	path, err := os.Executable()
	require.NoError(t, err)
	return path
}

// line returns the next line of standard output, and "EOF" when no process is left to write
// one.
func (p *program) line() string {
	if !p.lines.Scan() {
		return "EOF"
	}
	return p.lines.Text()
}

// errors returns what the program has written to standard error.
func (p *program) errors(t testing.TB) string {
	text, err := os.ReadFile(p.stderr.Name())
	require.NoError(t, err)
	return string(text)
}

// signal sends one of the program's processes its first signal, and returns when that waits
// for the server. Windows has no signals, which skips the test.
func (p *program) signal(t testing.TB, to *os.Process, sig os.Signal) {
	err := to.Signal(sig)
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skip(err)
	}
	require.NoError(t, err)
	for _, line := range []string{"Got signal:" + sig.String(), "Stopping listener", "Waiting on server"} {
		require.Equal(t, line, p.line())
	}
}

// status waits for the program to end and returns its exit status.
func (p *program) status(t testing.TB) int {
	err := p.Wait()
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) {
		require.NoError(t, err)
	}
	return p.ProcessState.ExitCode()
}

// startServing starts the program on a free port. If somebody else takes that port first, it
// tries another.
func startServing(t testing.TB) (p *program, addr string) {
	for range 10 {
		l := tcptest.Listen(t)
		addr = l.Addr().String()
		require.NoError(t, l.Close())
		p = start(t, "-addr", addr)
		if p.line() == "Serving HTTP" {
			return p, addr
		}
		require.Equal(t, 1, p.status(t), p.errors(t))
	}
	require.FailNow(t, "no free port", p.errors(t))
	return nil, ""
}

// hold begins a request to addr that one byte more completes, and returns when its handler
// waits for that.
func hold(t testing.TB, addr string) *client {
	c := dial(t, addr, nil)
	c.send(t, "POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 1\r\nExpect: 100-continue\r\n\r\n")
	resp, _ := c.answer(t)
	require.Equal(t, http.StatusContinue, resp.StatusCode)
	return c
}

func TestSignalEndsInOrder(t *testing.T) {
	for _, sig := range []os.Signal{os.Interrupt, syscall.SIGTERM} {
		t.Run(sig.String(), func(t *testing.T) {
			p, addr := startServing(t)
			p.requireOrder(t, addr, sig)
		})
	}
}

// requireOrder ends the program with sig, and wants that to be in order.
func (p *program) requireOrder(t testing.TB, addr string, sig os.Signal) {
	slow := hold(t, addr)
	p.signal(t, p.Process, sig)
	await(t, func() bool { // nobody queues for nothing
		conn, err := net.Dial("tcp", addr)
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
	slow.send(t, "x")
	resp, body := slow.answer(t)
	for !resp.Close { // the handler was faster than the drain
		slow.get(t, "/")
		resp, body = slow.answer(t)
	}
	assert.Equal(t, "Hello HTTP!\n", body)

	assert.Equal(t, "EOF", p.line())
	assert.Zero(t, p.status(t))
	assert.Empty(t, p.errors(t))
}

func TestRequestsAreCutOffInTheEnd(t *testing.T) {
	t.Setenv(timeoutEnv, "100ms")
	p, addr := startServing(t)
	slow := hold(t, addr)
	p.signal(t, p.Process, os.Interrupt)
	slow.requireEnd(t)
	assert.Equal(t, 1, p.status(t))
	assert.Equal(t, "requests cut off: context deadline exceeded\n", p.errors(t))
}

func TestSecondSignalEndsAtOnce(t *testing.T) {
	p, addr := startServing(t)
	slow := hold(t, addr)
	p.signal(t, p.Process, os.Interrupt)
	require.NoError(t, p.Process.Signal(os.Interrupt))
	second := time.Now()
	assert.Equal(t, 1, p.status(t))
	assert.Less(t, time.Since(second), drainTimeout/2)
	assert.Empty(t, p.errors(t))
	_, err := slow.Read(make([]byte, 1))
	assert.Error(t, err, "the request is cut off")
}

func TestErrorsAreOneLine(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()

	for _, tt := range []struct {
		name   string
		args   []string
		status int
		stderr string // a part of it
	}{
		{"busy port", []string{"-addr", l.Addr().String()}, 1, l.Addr().String()},
		{"bad address", []string{"-addr", "nowhere"}, 1, "nowhere"},
		{"bad flag", []string{"-port", "80"}, 2, "-port"},
		{"flag without its value", []string{"-addr"}, 2, "-addr"},
		{"argument", []string{"localhost:80"}, 2, "localhost:80"},
		{"bad descriptor", []string{"-fd", "999"}, 1, "999"},
		{"no descriptor", []string{"-fd", "-1"}, 2, "-fd"},
		{"address and descriptor", []string{"-addr", "localhost:80", "-fd", "3"}, 2, "-addr and -fd"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := start(t, tt.args...)
			assert.Equal(t, "EOF", p.line())
			assert.Equal(t, tt.status, p.status(t))
			assert.Contains(t, p.errors(t), tt.stderr)
			assert.Equal(t, 1, strings.Count(p.errors(t), "\n"), p.errors(t))
		})
	}
}

func TestHelp(t *testing.T) {
	p := start(t, "-h")
	assert.Equal(t, usage, p.line())
	assert.Equal(t, "EOF", p.line())
	assert.Zero(t, p.status(t))
}
