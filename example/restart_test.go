//go:build unix

package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener/internal/tcptest"
)

// install puts a program at path: an executable file with that text.
func install(t testing.TB, path, text string) {
	next := path + ".next"
	require.NoError(t, os.WriteFile(next, []byte(text), 0o700))
	require.NoError(t, os.Rename(next, path))
}

// script is some version of the program, which runs the test binary.
func script(t testing.TB, version string) string {
	return fmt.Sprintf("#!/bin/sh\n%s=%s %s=\"$0\" exec '%s' \"$@\"\n", versionEnv, version, pathEnv, self(t))
}

// startInstalled starts a version of the program from a path at which others can be put.
func startInstalled(t testing.TB, version string) (p *program, first process, path, addr string) {
	path = filepath.Join(t.TempDir(), "program")
	install(t, path, script(t, version))
	p, addr = startInheriting(t, path)
	first = tcptest.Receive(t, p.processes, "start of a process")
	require.Equal(t, version, first.version)
	return p, first, path, addr
}

// startInheriting starts the program at path with a socket as descriptor 3.
func startInheriting(t testing.TB, path string) (p *program, addr string) {
	l := tcptest.Listen(t)
	file, err := l.File()
	require.NoError(t, err)
	p = &program{Cmd: exec.Command(path, "-fd", "3")}
	p.ExtraFiles = []*os.File{file}
	p.start(t)
	require.NoError(t, file.Close())
	require.NoError(t, l.Close())
	require.Equal(t, "Serving HTTP", p.line())
	return p, l.Addr().String()
}

// restart has process restarted, and returns the one that serves then.
func (p *program) restart(t testing.TB, old process) process {
	p.signal(t, old.Process, syscall.SIGHUP)
	require.Equal(t, "Serving HTTP", p.line())
	return tcptest.Receive(t, p.processes, "start of a process")
}

// end ends the last of the program's processes.
func (p *program) end(t testing.TB, last process) {
	p.signal(t, last.Process, syscall.SIGTERM)
	tcptest.Receive(t, last.ended, "exit of the process")
	assert.Equal(t, "EOF", p.line(), "no process is left")
}

func TestRestartFailsNoRequestUnderLoad(t *testing.T) {
	const restarts = 30
	answered, failed := restartUnderLoad(t, restarts, func(n int) string { return fmt.Sprint("version-", n) })
	t.Logf("%d restarts, %d requests", restarts, answered+failed)
	assert.Zero(t, failed)
}

// BenchmarkRestart counts the requests that fail because a server is restarted in place.
func BenchmarkRestart(b *testing.B) {
	const restarts = 20
	lost := make(map[string]int64)
	for range b.N {
		for name, version := range map[string]string{"drain": "1", "Shutdown": shutsDown} {
			_, failed := restartUnderLoad(b, restarts, func(int) string { return version })
			lost[name] += failed
		}
	}
	for name, n := range lost {
		b.ReportMetric(float64(n)/float64(b.N*restarts), name+"-lost/restart")
	}
	b.ReportMetric(0, "ns/op")
}

// restartUnderLoad has a program restarted in place while clients post without pause, and
// returns how many requests were answered and how many were not. The n-th process is to be
// of version(n).
func restartUnderLoad(t testing.TB, restarts int, version func(n int) string) (answered, failed int64) {
	p, first, path, addr := startInstalled(t, version(0))
	var loads []*load
	for _, keepAlive := range []bool{true, false} {
		load := startLoad(t, "http://"+addr, 12, "Hello HTTP!", func() *http.Client {
			return newClient(nil, false, keepAlive)
		})
		loads = append(loads, load)
	}
	processes := []process{first}
	for n := 1; n <= restarts; n++ {
		for _, load := range loads {
			load.await(t, 100)
		}
		install(t, path, script(t, version(n)))
		next := p.restart(t, processes[n-1])
		assert.Equal(t, version(n), next.version)
		processes = append(processes, next)
	}
	for _, old := range processes[:restarts] {
		tcptest.Receive(t, old.ended, "exit of the process")
	}
	assert.Zero(t, p.status(t))
	for _, load := range loads {
		load.await(t, 100)
		load.stop()
	}
	p.end(t, processes[restarts])
	assert.Empty(t, p.errors(t))
	for _, load := range loads {
		answered += load.answered.Load()
		failed += load.failed.Load()
	}
	return answered, failed
}

func TestRestartThatFailsLosesNobody(t *testing.T) {
	t.Setenv(timeoutEnv, "1s")
	p, process, path, addr := startInstalled(t, "1")
	load := startLoad(t, "http://"+addr, 4, "Hello HTTP!", func() *http.Client { return newClient(nil, false, true) })
	var want []string
	for _, program := range []struct{ text, why string }{
		{"#!/bin/sh\nexit 3\n", "has ended: exit status 3"},
		{"neither a script nor a binary", "exec format error"},
		{script(t, hangs), "does not serve: context deadline exceeded"},
		{"", "no such file"},
	} {
		load.await(t, 100)
		if program.text == "" {
			require.NoError(t, os.Remove(path))
		} else {
			install(t, path, program.text)
		}
		p.signal(t, process.Process, syscall.SIGHUP)
		want = append(want, program.why)
		await(t, func() bool { return strings.Count(p.errors(t), "\n") == len(want) })
		if strings.Contains(program.text, hangs) {
			tcptest.Receive(t, tcptest.Receive(t, p.processes, "start of a process").ended, "exit of the process")
		}
	}
	for n, line := range strings.SplitAfter(p.errors(t), "\n")[:len(want)] {
		assert.True(t, strings.HasPrefix(line, "not restarted, serving on: "), line)
		assert.Contains(t, line, want[n])
	}

	install(t, path, script(t, "2"))
	next := p.restart(t, process)
	assert.Equal(t, "2", next.version)
	assert.Zero(t, p.status(t))
	load.stop()
	assert.Zero(t, load.failed.Load())
	p.end(t, next)
}

func TestSignalEndsARestartThatHangs(t *testing.T) {
	p, process, path, _ := startInstalled(t, "1")
	install(t, path, script(t, hangs))
	p.signal(t, process.Process, syscall.SIGHUP)
	hanging := tcptest.Receive(t, p.processes, "start of a process")
	p.end(t, process)
	tcptest.Receive(t, hanging.ended, "exit of the process")
	assert.Zero(t, p.status(t))
	assert.Contains(t, p.errors(t), "does not serve: context canceled\n")
}

// A signal that asks for a restart does not hurry an end.
func TestSecondHangupIsIgnored(t *testing.T) {
	t.Parallel()
	p, process, _, addr := startInstalled(t, "1")
	slow := hold(t, addr)
	next := p.restart(t, process)
	require.NoError(t, process.Signal(syscall.SIGHUP))
	require.NoError(t, process.Signal(syscall.SIGHUP))
	slow.send(t, "x")
	_, body := slow.answer(t)
	assert.Equal(t, "Hello HTTP!\n", body)
	assert.Zero(t, p.status(t))
	p.end(t, next)
}

func TestInheritedSocketIsServedAndClosed(t *testing.T) {
	p, addr := startInheriting(t, self(t))
	p.requireOrder(t, addr, syscall.SIGTERM)
}

func TestReadyIsSaidOnce(t *testing.T) {
	r, w, err := os.Pipe()
	require.NoError(t, err)
	defer r.Close()
	fd, err := syscall.Dup(int(w.Fd()))
	require.NoError(t, err)
	require.NoError(t, w.Close())
	t.Setenv(readyEnv, fmt.Sprint(fd))
	ready()
	ready()
	said, err := io.ReadAll(r)
	require.NoError(t, err)
	assert.Equal(t, "\n", string(said))
	assert.Empty(t, os.Getenv(readyEnv))
}
