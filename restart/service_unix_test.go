//go:build unix

package restart_test

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener/internal/testutil/httpclient"
	"github.com/c2db162c/stoppablelistener/internal/testutil/proctest"
	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
	"github.com/c2db162c/stoppablelistener/restart"
)

// readyTimeoutEnv is an environment variable with the time in which a new process must be ready.
const readyTimeoutEnv = "STOPPABLELISTENER_TEST_READY_TIMEOUT"

func init() {
	if timeout, err := time.ParseDuration(os.Getenv(readyTimeoutEnv)); err == nil {
		restart.SetReadyTimeout(timeout)
	}
}

// A service is a program that is installed and runs.
type service struct {
	*proctest.Program
	proctest.Installation
	parent proctest.Process
	stdin  io.Writer // of all processes
	addrs  []string  // at which it listens
}

// start starts a service with a version of the program, and returns when that is ready.
func start(t testing.TB, version string, changes ...func(*exec.Cmd)) *service {
	t.Helper()
	s := launch(t, version, changes...)
	s.addrs = s.requireReady(t, version)
	return s
}

// launch starts a service with a version of the program, whose command the changes change.
// Without them, it listens on a free port.
func launch(t testing.TB, version string, changes ...func(*exec.Cmd)) *service {
	t.Helper()
	for _, sig := range []os.Signal{syscall.SIGHUP, syscall.SIGINT} {
		if signal.Ignored(sig) { // by nohup or a script, of which the program is to learn nothing
			signal.Notify(make(chan os.Signal, 1), sig)
		}
	}
	s := &service{Installation: proctest.Install(t, version)}
	cmd := exec.Command(s.Path, "tcp,127.0.0.1:0")
	cmd.Env = os.Environ()
	stdin, err := cmd.StdinPipe()
	require.NoError(t, err)
	for _, change := range changes {
		change(cmd)
	}
	s.Program, s.stdin = proctest.Start(t, cmd), stdin
	for _, file := range cmd.ExtraFiles {
		require.NoError(t, file.Close())
	}
	s.parent = s.Next(t)
	return s
}

// on makes a service listen on these addresses, each after its network and a comma.
func on(addrs ...string) func(*exec.Cmd) {
	return func(cmd *exec.Cmd) { cmd.Args = append(cmd.Args[:1], addrs...) }
}

// with adds variables to the environment of a service.
func with(variables ...string) func(*exec.Cmd) {
	return func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, variables...) }
}

// inGroup gives a service a process group of its own.
func inGroup(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} }

// throughShell makes a shell start a service: with a script, which ends in exec "$@".
func throughShell(script string) func(*exec.Cmd) {
	return func(cmd *exec.Cmd) {
		cmd.Args = append([]string{"sh", "-c", script, "sh", cmd.Path}, cmd.Args[1:]...)
		cmd.Path = "/bin/sh"
	}
}

// A filer is a socket.
type filer interface{ File() (*os.File, error) }

// activated passes sockets to a service, as systemd does. LISTEN_PID is pid, a shell expression.
func activated(t testing.TB, pid string, sockets ...filer) func(*exec.Cmd) {
	script := fmt.Sprintf(`LISTEN_FDS=%d LISTEN_PID=%s exec "$@"`, len(sockets), pid)
	return func(cmd *exec.Cmd) {
		throughShell(script)(cmd)
		passFiles(t, cmd, sockets...)
	}
}

// passFiles adds sockets to the descriptors of a service.
func passFiles(t testing.TB, cmd *exec.Cmd, sockets ...filer) {
	for _, l := range sockets {
		file, err := l.File()
		require.NoError(t, err)
		cmd.ExtraFiles = append(cmd.ExtraFiles, file)
	}
}

// requireReady requires that version reports that it is ready, and returns where it listens.
func (s *service) requireReady(t testing.TB, version string) (addrs []string) {
	t.Helper()
	line := s.Line(t)
	require.Regexp(t, "^"+nameOf(version)+" ready", line, "standard error: %s", s.Errors(t))
	return strings.Fields(line)[2:]
}

// nameOf returns the name of a version, without its features.
func nameOf(version string) string {
	name, _, _ := strings.Cut(version, ",")
	return name
}

// signal sends sig to the parent.
func (s *service) signal(t testing.TB, sig os.Signal) {
	t.Helper()
	require.NoError(t, s.parent.Signal(sig))
}

// install installs a version, and starts a restart.
func (s *service) install(t testing.TB, version string) {
	t.Helper()
	s.Replace(t, version)
	s.signal(t, syscall.SIGUSR2)
}

// restart makes a new process of version to replace the serving process, of version from.
func (s *service) restart(t testing.TB, from, to string) proctest.Process {
	t.Helper()
	s.install(t, to)
	child := s.Next(t)
	require.Equal(t, nameOf(to), nameOf(child.Version), "version of the new process")
	require.Equal(t, s.addrs, s.requireReady(t, to), "addresses of the new process")
	s.RequireLines(t, nameOf(from)+" replaced: user defined signal 2")
	return child
}

// kill sends SIGTERM to the parent until that exits. One that comes too soon counts for nothing.
func (s *service) kill(t testing.TB) {
	t.Helper()
	tcptest.Await(t, "exit after the second signal", func() bool {
		_ = s.parent.Signal(syscall.SIGTERM)
		select {
		case <-s.parent.Exited:
			return true
		default:
			return false
		}
	})
	s.RequireStatus(t, 1)
}

// suspend suspends the parent. SIGCONT makes it run again.
func (s *service) suspend(t testing.TB) {
	t.Helper()
	s.signal(t, syscall.SIGSTOP)
	untraced := 2 // WUNTRACED, which package syscall lacks on AIX
	if runtime.GOOS == "solaris" || runtime.GOOS == "illumos" {
		untraced = 4
	}
	var status syscall.WaitStatus
	for !status.Stopped() {
		_, err := syscall.Wait4(s.parent.Pid, &status, untraced, nil)
		if err != syscall.EINTR {
			require.NoError(t, err)
		}
	}
}

// enter writes a line to the standard input of all processes, of which one reads it.
func (s *service) enter(t testing.TB, line string) {
	t.Helper()
	_, err := io.WriteString(s.stdin, line+"\n")
	require.NoError(t, err)
}

// awaitReport waits until a line on standard error is the n-th, counted from 1, and requires it
// to match a regular expression.
func (s *service) awaitReport(t testing.TB, n int, want string) {
	t.Helper()
	tcptest.Await(t, fmt.Sprintf("line %d on standard error: %s", n, want), func() bool {
		return strings.Count(s.Errors(t), "\n") >= n
	})
	require.Regexp(t, "^"+want+"$", strings.Split(s.Errors(t), "\n")[n-1], "standard error")
}

// requireHelper returns the process ID of the helper that the program starts. It is killed when
// the test ends.
func (s *service) requireHelper(t testing.TB) (pid int) {
	t.Helper()
	_, err := fmt.Sscanf(s.Line(t), "helper %d", &pid)
	require.NoError(t, err)
	t.Cleanup(func() { _ = syscall.Kill(pid, syscall.SIGKILL) })
	return pid
}

// send sends a GET request.
func (s *service) send(t testing.TB, path string) *httpclient.Conn {
	t.Helper()
	c := httpclient.Dial(t, s.addrs[0], nil)
	c.Get(t, path)
	return c
}

// get returns the body of the response to a GET request.
func (s *service) get(t testing.TB, path string) string {
	t.Helper()
	return getFrom(t, s.addrs[0], path)
}

func getFrom(t testing.TB, addr, path string) string {
	t.Helper()
	c := httpclient.Dial(t, addr, nil)
	defer c.Close()
	c.Get(t, path)
	_, body := c.Response(t)
	return body
}

// startRequest sends a request to the service and returns when that handles it. It may be in flight
// for as long as processes take to start.
func (s *service) startRequest(t testing.TB) *httpclient.Conn {
	t.Helper()
	c := httpclient.Dial(t, s.addrs[0], nil)
	c.StartPost(t, "/")
	require.NoError(t, c.SetDeadline(time.Now().Add(time.Minute)))
	return c
}

// stop stops the service, which must exit with status 0 and leave no process.
func (s *service) stop(t testing.TB, serving string) {
	t.Helper()
	s.signal(t, syscall.SIGTERM)
	s.RequireLines(t, nameOf(serving)+" stopped: terminated")
	s.requireExit(t)
}

// requireExit requires that the service exits with status 0, and leaves no process.
func (s *service) requireExit(t testing.TB) {
	t.Helper()
	s.RequireStatus(t, 0)
	s.RequireNoProcess(t)
}
