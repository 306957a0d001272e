//go:build unix

package restart_test

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener/internal/testutil/httpclient"
	"github.com/c2db162c/stoppablelistener/internal/testutil/httpload"
	"github.com/c2db162c/stoppablelistener/internal/testutil/proctest"
	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
	"github.com/c2db162c/stoppablelistener/restart"
)

// timeoutEnv is the environment variable with the time in which a new process must be ready.
const timeoutEnv = "STOPPABLELISTENER_TEST_READY_TIMEOUT"

func init() {
	if timeout, err := time.ParseDuration(os.Getenv(timeoutEnv)); err == nil {
		restart.SetReadyTimeout(timeout)
	}
}

// A service is a program that is installed and serves.
type service struct {
	*proctest.Program
	proctest.Installation
	parent proctest.Process
	addrs  []string // at which it listens
}

// start starts a version of the program, which listens on a free port.
func start(t testing.TB, version string) *service { return startOn(t, version, "tcp,127.0.0.1:0") }

func startOn(t testing.TB, version string, addrs ...string) *service {
	t.Helper()
	installed := proctest.Install(t, version)
	return startCommand(t, exec.Command(installed.Path, addrs...), installed, version)
}

// startCommand starts cmd, which runs a version of the program.
func startCommand(t testing.TB, cmd *exec.Cmd, installed proctest.Installation, version string) *service {
	t.Helper()
	s := &service{Program: proctest.Start(t, cmd), Installation: installed}
	s.parent = s.Next(t)
	s.addrs = s.requireReady(t, version)
	return s
}

// requireReady requires that version reports that it is ready, and returns where it listens.
func (s *service) requireReady(t testing.TB, version string) (addrs []string) {
	t.Helper()
	name, _, _ := strings.Cut(version, ",")
	line := s.Line(t)
	require.Regexp(t, "^"+name+" ready", line, "standard error: %s", s.Errors(t))
	return strings.Fields(line)[2:]
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

// restart replaces the process that serves, whose version is from, by one of version to.
func (s *service) restart(t testing.TB, from, to string) proctest.Process {
	t.Helper()
	s.install(t, to)
	child := s.Next(t)
	require.Equal(t, s.addrs, s.requireReady(t, to), "addresses of the new process")
	s.RequireLines(t, from+" stopped: user defined signal 2")
	return child
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

// A request is in flight until it is finished.
type request struct{ *httpclient.Conn }

// startRequest sends a request to the service and returns when that handles it.
func (s *service) startRequest(t testing.TB) request {
	t.Helper()
	c := httpclient.Dial(t, s.addrs[0], nil)
	c.StartPost(t, "/")
	return request{c}
}

// finish finishes a request, whose response must come from that version.
func (r request) finish(t testing.TB, version string) {
	t.Helper()
	r.Send(t, "x")
	_, body := r.Response(t)
	require.Equal(t, version, body)
	r.Close()
}

// stop stops the service, which must exit with status 0 and leave no process.
func (s *service) stop(t testing.TB, serving string) {
	t.Helper()
	s.signal(t, syscall.SIGTERM)
	s.RequireLines(t, serving+" stopped: terminated")
	s.RequireStatus(t, 0)
	s.RequireNoProcess(t)
}

func requireRefused(t testing.TB, addr string) {
	t.Helper()
	tcptest.Await(t, "refusal of connections to "+addr, func() bool {
		conn, err := net.DialTimeout("tcp", addr, time.Second)
		if err == nil {
			conn.Close()
		}
		return errors.Is(err, syscall.ECONNREFUSED)
	})
}

// Restart

func TestRestartsFailNoRequestUnderLoad(t *testing.T) {
	t.Parallel()
	loads := restartUnderLoad(t, tcptest.Rounds(30), func(n int) string { return fmt.Sprint("version-", n) })
	for _, load := range loads {
		load.RequireNoneFailed(t)
	}
}

// restartUnderLoad restarts a service while clients send requests without pause. The n-th
// process has version(n).
func restartUnderLoad(t testing.TB, restarts int, version func(n int) string) (loads []*httpload.Load) {
	s := start(t, version(0))
	for _, keepAlive := range []bool{true, false} {
		load := httpload.Start(t, "http://"+s.addrs[0], 8, httpload.Any, func() *http.Client {
			return httpclient.NewClient(nil, false, keepAlive)
		})
		loads = append(loads, load)
	}
	var previous proctest.Process
	for n := range restarts {
		for _, load := range loads {
			load.AwaitRequests(t, 100)
		}
		s.Replace(t, version(n+1))
		s.signal(t, syscall.SIGUSR2)
		child := s.Next(t)
		require.Equal(t, version(n+1), child.Version)
		require.Equal(t, s.addrs, s.requireReady(t, version(n+1)))
		name, _, _ := strings.Cut(version(n), ",")
		s.RequireLines(t, name+" stopped: user defined signal 2")
		if n > 0 {
			previous.AwaitExit(t)
		}
		previous = child
	}
	for _, load := range loads {
		load.AwaitRequests(t, 100)
		load.Stop()
	}
	name, _, _ := strings.Cut(version(restarts), ",")
	s.stop(t, name)
	require.Empty(t, s.Errors(t))
	return loads
}

func TestRestartsLeaveNoDescriptorsOpen(t *testing.T) {
	t.Parallel()
	s := start(t, "0")
	var child proctest.Process
	descriptors := func(p proctest.Process) int {
		files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.Pid))
		if err != nil {
			t.Skip("unknown here: ", err)
		}
		return len(files)
	}
	ofParent, ofChild := 0, 0
	for n := range 5 {
		previous := child
		child = s.restart(t, fmt.Sprint(n), fmt.Sprint(n+1))
		if n > 0 {
			previous.AwaitExit(t)
		}
		s.install(t, "fails,"+exits)
		s.Next(t).AwaitExit(t)
		if n == 1 { // the first process has stopped serving by now
			ofParent, ofChild = descriptors(s.parent), descriptors(child)
		}
	}
	tcptest.Await(t, fmt.Sprintf("close of descriptors; at most %d in the parent and %d in the child", ofParent, ofChild), func() bool {
		return descriptors(s.parent) <= ofParent && descriptors(child) <= ofChild
	})
}

func TestNewProcessHasArgumentsEnvironmentAndStandardStreams(t *testing.T) {
	t.Parallel()
	installed := proctest.Install(t, "1")
	cmd := exec.Command(installed.Path, "tcp,127.0.0.1:0")
	cmd.Env = append(os.Environ(), "TEST_VARIABLE=value")
	stdin, err := cmd.StdinPipe()
	require.NoError(t, err)
	s := startCommand(t, cmd, installed, "1")
	s.restart(t, "1", "2")
	assert.Equal(t, fmt.Sprint(s.parent.Pid, cmd.Args[1:], "value"), s.get(t, "/process"))
	_, err = io.WriteString(stdin, "a line\n")
	require.NoError(t, err)
	assert.Equal(t, "a line\n", s.get(t, "/stdin"))
	s.get(t, "/stderr")
	assert.Equal(t, "2 writes to standard error\n", s.Errors(t))
	s.stop(t, "2") // standard output
}

func TestPreviousProcessServesUntilTheNewOneIsReady(t *testing.T) {
	t.Parallel()
	installed := proctest.Install(t, "1")
	cmd := exec.Command(installed.Path, "tcp,127.0.0.1:0")
	stdin, err := cmd.StdinPipe()
	require.NoError(t, err)
	s := startCommand(t, cmd, installed, "1")
	for _, versions := range [][2]string{{"1", "2"}, {"2", "3"}} {
		s.install(t, versions[1]+","+waits)
		s.RequireLines(t, versions[1]+" waits")
		for range 10 {
			require.Equal(t, versions[0], s.get(t, "/"))
		}
		_, err = io.WriteString(stdin, "\n")
		require.NoError(t, err)
		s.requireReady(t, versions[1])
		s.RequireLines(t, versions[0]+" stopped: user defined signal 2")
		require.Equal(t, versions[1], s.get(t, "/"))
	}
}

func TestFailedRestartsChangeNothing(t *testing.T) {
	t.Parallel()
	s := start(t, "1")
	load := httpload.Start(t, "http://"+s.addrs[0], 2, "1", func() *http.Client {
		return httpclient.NewClient(nil, false, true)
	})
	want := 0
	requireReport := func(text string) {
		t.Helper()
		want++
		tcptest.Await(t, "line on standard error", func() bool { return strings.Count(s.Errors(t), "\n") == want })
		line := strings.Split(s.Errors(t), "\n")[want-1]
		require.Regexp(t, "^restart: not restarted: .*"+text, line)
		load.AwaitRequests(t, 10)
	}
	s.install(t, "2,"+exits)
	s.Next(t).AwaitExit(t)
	requireReport("process [0-9]* exited before it was ready: exit status 3")
	s.ReplaceText(t, "neither a script nor a binary")
	s.signal(t, syscall.SIGUSR2)
	requireReport("exec format error")
	require.NoError(t, os.Remove(s.Path))
	s.signal(t, syscall.SIGUSR2)
	requireReport("no such file")
	load.RequireNoneFailed(t)

	s.restart(t, "1", "2")
	s.stop(t, "2")
}

func TestNewProcessThatIsNeverReadyIsKilled(t *testing.T) {
	t.Parallel()
	installed := proctest.Install(t, "1")
	cmd := exec.Command(installed.Path, "tcp,127.0.0.1:0")
	cmd.Env = append(os.Environ(), timeoutEnv+"=300ms")
	s := startCommand(t, cmd, installed, "1")
	want := ""
	for range 2 {
		s.install(t, "2,"+hangs)
		hanging := s.Next(t)
		hanging.AwaitExit(t)
		want += fmt.Sprintf("restart: not restarted: process %d was not ready within 300ms\n", hanging.Pid)
		tcptest.Await(t, "line on standard error", func() bool { return s.Errors(t) == want })
		require.Equal(t, "1", s.get(t, "/"))
	}
	s.stop(t, "1")
}

func TestRestartWhileTheLastOneIsNotComplete(t *testing.T) {
	t.Parallel()
	s := start(t, "1")
	first := s.startRequest(t)
	s.restart(t, "1", "2")
	second := s.startRequest(t)
	s.restart(t, "2", "3")
	require.Equal(t, "3", s.get(t, "/"))
	first.finish(t, "1")
	second.finish(t, "2")
	s.stop(t, "3")
}

func TestRestartWaitsUntilTheFirstProcessIsReady(t *testing.T) {
	t.Parallel()
	installed := proctest.Install(t, "1,"+waits)
	cmd := exec.Command(installed.Path, "tcp,127.0.0.1:0")
	stdin, err := cmd.StdinPipe()
	require.NoError(t, err)
	s := &service{Program: proctest.Start(t, cmd), Installation: installed}
	s.parent = s.Next(t)
	s.RequireLines(t, "1 waits")
	s.install(t, "2")
	_, err = io.WriteString(stdin, "\n")
	require.NoError(t, err)
	s.addrs = s.requireReady(t, "1")
	require.Equal(t, s.addrs, s.requireReady(t, "2"), "addresses of the new process")
	s.RequireLines(t, "1 stopped: user defined signal 2")
	s.stop(t, "2")
}

func TestNoRestartAfterStop(t *testing.T) {
	t.Parallel()
	s := start(t, "1")
	inFlight := s.startRequest(t)
	s.signal(t, syscall.SIGTERM)
	s.RequireLines(t, "1 stopped: terminated")
	s.install(t, "2")
	select {
	case <-s.Processes:
		assert.Fail(t, "another process has started")
	case <-time.After(300 * time.Millisecond):
	}
	inFlight.finish(t, "1")
	s.RequireStatus(t, 0)
	s.RequireNoProcess(t)
	assert.Empty(t, s.Errors(t))
}

func TestChildrenIgnoreSIGUSR2(t *testing.T) {
	t.Parallel()
	s := start(t, "1")
	child := s.restart(t, "1", "2")
	require.NoError(t, child.Signal(syscall.SIGUSR2))
	require.Equal(t, "2", s.get(t, "/"))
	s.stop(t, "2")
}

// The error is that of the first process, and then that of a child.
func TestErrorsOfServeAfterARestart(t *testing.T) {
	t.Parallel()
	s := start(t, "1,"+fails)
	s.restart(t, "1", "2,"+fails)
	tcptest.Await(t, "error of the first process", func() bool { return s.Errors(t) == "restart: serve fails\n" })
	child := s.restart(t, "2", "3")
	tcptest.Await(t, "error of the second process", func() bool {
		return s.Errors(t) == "restart: serve fails\nserve fails\n"
	})
	require.NoError(t, child.Signal(syscall.Signal(0)), "the third process is not running")
	require.Equal(t, "3", s.get(t, "/"))
	s.stop(t, "3")
}

func TestHelperProcessesDoNotInheritSockets(t *testing.T) {
	t.Parallel()
	s := start(t, "1")
	s.install(t, "2,"+helper)
	var pid int
	_, err := fmt.Sscanf(s.Line(t), "helper %d", &pid)
	require.NoError(t, err)
	killHelper(t, pid)
	s.requireReady(t, "2")
	s.RequireLines(t, "1 stopped: user defined signal 2")
	s.signal(t, syscall.SIGTERM)
	s.RequireStatus(t, 0)
	requireRefused(t, s.addrs[0])
	require.NoError(t, syscall.Kill(pid, 0), "the helper is not running")
}

// killHelper kills a helper when the test ends.
func killHelper(t testing.TB, pid int) {
	t.Cleanup(func() { _ = syscall.Kill(pid, syscall.SIGKILL) })
}

// Stop

func TestSignalStopsTheService(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		for _, restarted := range []bool{false, true} {
			t.Run(fmt.Sprintf("%v, restarted %v", sig, restarted), func(t *testing.T) {
				t.Parallel()
				s := start(t, "1")
				serving := "1"
				if restarted {
					s.restart(t, "1", "2")
					serving = "2"
				}
				inFlight := s.startRequest(t)
				s.signal(t, sig)
				s.RequireLines(t, serving+" stopped: "+sig.String())
				requireRefused(t, s.addrs[0])
				inFlight.finish(t, serving)
				s.RequireStatus(t, 0)
				s.RequireNoProcess(t)
				assert.Empty(t, s.Errors(t))
			})
		}
	}
}

// The program exits with status 4 because of that error.
func TestErrorOfServeIsThatOfTheService(t *testing.T) {
	for _, restarted := range []bool{false, true} {
		t.Run(fmt.Sprint("restarted ", restarted), func(t *testing.T) {
			t.Parallel()
			s := start(t, "1,"+fails)
			if restarted {
				s = start(t, "1")
				s.restart(t, "1", "2,"+fails)
			}
			s.signal(t, syscall.SIGTERM)
			s.RequireStatus(t, 4)
			assert.Equal(t, "serve fails\n", s.Errors(t))
		})
	}
}

// As after Ctrl+C: the signal reaches the parent and its children.
func TestSignalOfTheWholeGroupCountsOnce(t *testing.T) {
	t.Parallel()
	s := startGroup(t)
	first := s.startRequest(t)
	s.restart(t, "1", "2")
	second := s.startRequest(t)
	require.NoError(t, syscall.Kill(-s.parent.Pid, syscall.SIGINT))
	s.RequireLines(t, "2 stopped: interrupt")
	first.finish(t, "1")
	second.finish(t, "2")
	s.RequireStatus(t, 0)
	s.RequireNoProcess(t)
}

// startGroup starts a service with a process group of its own.
func startGroup(t testing.TB) *service {
	installed := proctest.Install(t, "1")
	cmd := exec.Command(installed.Path, "tcp,127.0.0.1:0")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return startCommand(t, cmd, installed, "1")
}

// The service is stopped at some point of its first restart, while a request is in flight.
func TestSignalDuringARestartStopsTheService(t *testing.T) {
	for name, target := range map[string]int{"process": 1, "group": -1} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for round := range tcptest.Rounds(40) {
				s := startGroup(t)
				inFlight := s.startRequest(t)
				s.signal(t, syscall.SIGUSR2)
				// The first half millisecond has more steps than the rest. A sleep is not as exact.
				delay := rand.N([]time.Duration{time.Millisecond / 2, 12 * time.Millisecond}[round%2])
				for start := time.Now(); time.Since(start) < delay; {
				}
				require.NoError(t, syscall.Kill(target*s.parent.Pid, syscall.SIGTERM))
				requireRefused(t, s.addrs[0])
				inFlight.finish(t, "1")
				s.RequireStatus(t, 0)
				for line := ""; line != "EOF"; line = s.Line(t) { // no process is left
				}
			}
		})
	}
}

func TestSecondSignalKillsAllProcesses(t *testing.T) {
	for _, restarted := range []bool{false, true} {
		t.Run(fmt.Sprint("restarted ", restarted), func(t *testing.T) {
			t.Parallel()
			s := start(t, "1")
			inFlight := []request{s.startRequest(t)}
			serving := "1"
			if restarted {
				s.restart(t, "1", "2")
				inFlight = append(inFlight, s.startRequest(t))
				serving = "2"
			}
			s.signal(t, syscall.SIGTERM)
			s.RequireLines(t, serving+" stopped: terminated")
			s.signal(t, syscall.SIGTERM)
			s.RequireStatus(t, 1)
			s.RequireNoProcess(t)
			for _, r := range inFlight {
				r.AwaitClosed(t)
			}
		})
	}
}

// A process that hangs before Run gets SIGTERM.
func TestSignalStopsANewProcessThatIsNotReady(t *testing.T) {
	t.Parallel()
	s := start(t, "1")
	s.install(t, "2,"+hangs)
	hanging := s.Next(t)
	s.stop(t, "1")
	hanging.AwaitExit(t)
	assert.Empty(t, s.Errors(t))
}

func TestRunReturnsWhenTheServingChildExits(t *testing.T) {
	for name, tt := range map[string]struct {
		exit   func(t *testing.T, s *service, child proctest.Process)
		status int
		stderr string // a regular expression
	}{
		"serve returns": {
			func(t *testing.T, s *service, _ proctest.Process) { s.send(t, "/return") }, 0, "^$",
		},
		"serve returns an error": {
			func(t *testing.T, s *service, _ proctest.Process) { s.send(t, "/return?error=1") },
			1, "^serve fails\nrestart: process [0-9]+: exit status 4\n$",
		},
		"it is killed": {
			func(t *testing.T, _ *service, child proctest.Process) { require.NoError(t, child.Kill()) },
			1, "^restart: process [0-9]+: signal: killed\n$",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := start(t, "1")
			child := s.restart(t, "1", "2")
			tt.exit(t, s, child)
			s.RequireStatus(t, tt.status)
			s.RequireNoProcess(t)
			assert.Regexp(t, tt.stderr, s.Errors(t))
			requireRefused(t, s.addrs[0])
		})
	}
}

func TestChildrenShutDownGracefullyWhenTheParentIsKilled(t *testing.T) {
	t.Parallel()
	s := start(t, "1")
	s.restart(t, "1", "2")
	inFlight := s.startRequest(t)
	require.NoError(t, s.parent.Kill())
	s.RequireLines(t, "2 stopped: parent process exited")
	requireRefused(t, s.addrs[0])
	inFlight.finish(t, "2")
	s.RequireNoProcess(t)
}

// As in "program | tee log" after Ctrl+C, when tee has exited.
func TestWritesToAClosedPipeDoNotKillTheProcess(t *testing.T) {
	t.Parallel()
	installed := proctest.Install(t, "1")
	cmd := exec.Command(installed.Path, "tcp,127.0.0.1:0")
	s := startCommand(t, cmd, installed, "1")
	inFlight := s.startRequest(t)
	s.CloseOutput(t)
	s.signal(t, syscall.SIGINT)
	requireRefused(t, s.addrs[0])
	inFlight.finish(t, "1")
	s.RequireStatus(t, 0)
}
