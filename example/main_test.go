package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// runMain makes the test binary run the program instead of its tests.
const runMain = "STOPPABLELISTENER_RUN_EXAMPLE"

func TestMain(m *testing.M) {
	if os.Getenv(runMain) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// A program is the example as a process of its own.
type program struct {
	*exec.Cmd
	lines  *bufio.Scanner // its standard output
	stderr bytes.Buffer
}

// start starts the program with args; it is killed when the test ends. A short run
// starts none.
func start(t *testing.T, args ...string) *program {
	if testing.Short() {
		t.Skip("starts a process")
	}
	exe, err := os.Executable()
	require.NoError(t, err)
	p := &program{Cmd: exec.Command(exe, args...)}
	p.Env = append(os.Environ(), runMain+"=1")
	p.Stderr = &p.stderr
	stdout, err := p.StdoutPipe()
	require.NoError(t, err)
	p.lines = bufio.NewScanner(stdout)
	require.NoError(t, p.Start())
	guard := time.AfterFunc(time.Minute, func() { _ = p.Process.Kill() })
	t.Cleanup(func() {
		guard.Stop()
		_ = p.Process.Kill()
		_ = p.Wait()
	})
	return p
}

// line returns the next line of standard output, and "EOF" when there is none.
func (p *program) line() string {
	if !p.lines.Scan() {
		return "EOF"
	}
	return p.lines.Text()
}

// signal sends the program its first signal, and returns when it waits for the server.
func (p *program) signal(t *testing.T, sig os.Signal) {
	require.NoError(t, p.Process.Signal(sig))
	for _, line := range []string{"Got signal:" + sig.String(), "Stopping listener", "Waiting on server"} {
		require.Equal(t, line, p.line())
	}
}

// status waits for the program to end and returns its exit status.
func (p *program) status(t *testing.T) int {
	err := p.Wait()
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) {
		require.NoError(t, err)
	}
	return p.ProcessState.ExitCode()
}

// startServing starts the program on a free port. If somebody else takes that port
// first, it tries another.
func startServing(t *testing.T) (p *program, addr string) {
	for range 10 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		addr = l.Addr().String()
		require.NoError(t, l.Close())
		p = start(t, "-addr", addr)
		if p.line() == "Serving HTTP" {
			return p, addr
		}
		require.Equal(t, 1, p.status(t), p.stderr.String())
	}
	require.FailNow(t, "no free port", p.stderr.String())
	return nil, ""
}

// get returns the page that the server at addr answers with.
func get(t *testing.T, addr string) string {
	resp, err := http.Get("http://" + addr + "/")
	require.NoError(t, err)
	defer resp.Body.Close()
	assert.Equal(t, http.StatusOK, resp.StatusCode)
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return string(body)
}

// hold begins a request to addr that an empty line completes, and returns when the
// server has accepted it.
func hold(t *testing.T, addr string) net.Conn {
	conn, err := net.Dial("tcp", addr)
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	_, err = fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: %s\r\n", addr)
	require.NoError(t, err)
	assert.Equal(t, "Hello HTTP!", get(t, addr)) // accepted later than conn
	return conn
}

func skipWithoutSignals(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("no way to send a signal")
	}
}

func TestSignalEndsInOrder(t *testing.T) {
	skipWithoutSignals(t)
	for _, sig := range []os.Signal{os.Interrupt, syscall.SIGTERM} {
		t.Run(sig.String(), func(t *testing.T) {
			p, addr := startServing(t)
			slow := hold(t, addr)

			p.signal(t, sig)
			_, err := slow.Write([]byte("\r\n"))
			require.NoError(t, err)
			resp, err := http.ReadResponse(bufio.NewReader(slow), nil)
			require.NoError(t, err)
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			require.NoError(t, err)
			assert.Equal(t, "Hello HTTP!", string(body))

			assert.Equal(t, "EOF", p.line())
			assert.Zero(t, p.status(t))
			assert.Empty(t, p.stderr.String())
		})
	}
}

func TestSecondSignalEndsAtOnce(t *testing.T) {
	skipWithoutSignals(t)
	p, addr := startServing(t)
	slow := hold(t, addr)

	p.signal(t, os.Interrupt)
	require.NoError(t, p.Process.Signal(os.Interrupt))
	second := time.Now()
	assert.Equal(t, 1, p.status(t))
	assert.Less(t, time.Since(second), drainTimeout/2)
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
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := start(t, tt.args...)
			assert.Equal(t, "EOF", p.line())
			assert.Equal(t, tt.status, p.status(t))
			assert.Contains(t, p.stderr.String(), tt.stderr)
			assert.Equal(t, 1, strings.Count(p.stderr.String(), "\n"), p.stderr.String())
		})
	}
}

func TestHelp(t *testing.T) {
	p := start(t, "-h")
	assert.Equal(t, usage, p.line())
	assert.Equal(t, "EOF", p.line())
	assert.Zero(t, p.status(t))
}
