//go:build unix

package restart_test

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"slices"
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
)

// Restart

func TestRestartsFailNoRequestUnderLoad(t *testing.T) {
	t.Parallel()
	loads := restartUnderLoad(t, tcptest.Rounds(10), func(n int) string {
		return fmt.Sprint("version-", n)
	})
	for _, load := range loads {
		load.RequireNoneFailed(t)
	}
}

// restartUnderLoad restarts a service while clients send requests without pause. The n-th
// process has version(n).
func restartUnderLoad(
	t testing.TB, restarts int, version func(n int) string,
) (loads []*httpload.Load) {
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
		child := s.restart(t, version(n), version(n+1))
		if n > 0 {
			previous.AwaitExit(t)
		}
		previous = child
	}
	for _, load := range loads {
		load.AwaitRequests(t, 100)
		load.Stop()
	}
	s.stop(t, version(restarts))
	require.Empty(t, s.Errors(t))
	return loads
}

func TestRestartsLeaveNoDescriptorsOpen(t *testing.T) {
	tcptest.SkipIfShort(t, "starts many processes")
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
	what := fmt.Sprintf("close of descriptors; at most %d in the parent and %d in the child",
		ofParent, ofChild)
	tcptest.Await(t, what, func() bool {
		return descriptors(s.parent) <= ofParent && descriptors(child) <= ofChild
	})
}

func TestServingProcessServesUntilTheNewOneIsReady(t *testing.T) {
	t.Parallel()
	s := start(t, "1")
	for _, versions := range [][2]string{{"1", "2"}, {"2", "3"}} {
		s.install(t, versions[1]+","+waits)
		s.RequireLines(t, versions[1]+" waits")
		for range 10 {
			require.Equal(t, versions[0], s.get(t, "/"))
		}
		s.enter(t, "")
		s.requireReady(t, versions[1])
		s.RequireLines(t, versions[0]+" replaced: user defined signal 2")
		require.Equal(t, versions[1], s.get(t, "/"))
	}
}

func TestFailedRestartsChangeNothing(t *testing.T) {
	t.Parallel()
	s := start(t, "1")
	load := httpload.Start(t, "http://"+s.addrs[0], 2, "1", func() *http.Client {
		return httpclient.NewClient(nil, false, true)
	})
	s.install(t, "2,"+exits)
	s.Next(t).AwaitExit(t)
	s.awaitReport(t, 1, "restart: not restarted: "+
		"process [0-9]+ exited before it was ready: exit status 3")
	load.AwaitRequests(t, 10)
	s.ReplaceText(t, "neither a script nor a binary")
	s.signal(t, syscall.SIGUSR2)
	s.awaitReport(t, 2, "restart: not restarted: .*exec format error")
	load.AwaitRequests(t, 10)
	require.NoError(t, os.Remove(s.Path))
	s.signal(t, syscall.SIGUSR2)
	s.awaitReport(t, 3, "restart: not restarted: .*no such file.*")
	load.AwaitRequests(t, 10)
	load.RequireNoneFailed(t)

	s.restart(t, "1", "2")
	s.stop(t, "2")
}

// The timeout may be over before the new process has reported its start to the test.
func TestNewProcessThatIsNeverReadyIsKilled(t *testing.T) {
	tcptest.SkipIfShort(t, "takes a second")
	t.Parallel()
	s := start(t, "1", with(readyTimeoutEnv+"=100ms"))
	for n := range 2 {
		s.install(t, "2,"+hangs)
		s.awaitReport(t, n+1,
			"restart: not restarted: process [0-9]+ was not ready within 100ms")
		var pid int
		_, err := fmt.Sscanf(strings.Split(s.Errors(t), "\n")[n],
			"restart: not restarted: process %d", &pid)
		require.NoError(t, err)
		tcptest.Await(t, fmt.Sprint("exit of process ", pid), func() bool {
			return syscall.Kill(pid, 0) == syscall.ESRCH
		})
		require.Equal(t, "1", s.get(t, "/"))
	}
	s.signal(t, syscall.SIGTERM)
	s.RequireStatus(t, 0)
	assert.Equal(t, 2, strings.Count(s.Errors(t), "\n"), "lines on standard error")
}

// When the parent runs again, the new process has been ready for some time, and the timeout is
// over. With GOMAXPROCS=1, it sees that first.
func TestNewProcessThatIsReadyWhileTheParentIsSuspendedIsNotKilled(t *testing.T) {
	tcptest.SkipIfShort(t, "takes two seconds")
	t.Parallel()
	const timeout = 2 * time.Second
	s := start(t, "1", with(readyTimeoutEnv+"="+timeout.String(), "GOMAXPROCS=1"))
	s.install(t, "2,"+waits)
	s.RequireLines(t, "2 waits")
	s.suspend(t)
	s.enter(t, "")
	s.requireReady(t, "2")
	time.Sleep(timeout)
	s.signal(t, syscall.SIGCONT)
	s.RequireLines(t, "1 replaced: user defined signal 2")
	require.Empty(t, s.Errors(t))
	s.stop(t, "2")
}

func TestRestartWhileTheLastOneIsNotComplete(t *testing.T) {
	t.Parallel()
	s := start(t, "1")
	first := s.startRequest(t)
	s.restart(t, "1", "2")
	second := s.startRequest(t)
	s.restart(t, "2", "3")
	require.Equal(t, "3", s.get(t, "/"))
	first.Finish(t, "1")
	second.Finish(t, "2")
	s.stop(t, "3")
}

func TestRestartWaitsUntilTheParentIsReady(t *testing.T) {
	t.Parallel()
	s := launch(t, "1,"+waits)
	s.RequireLines(t, "1 waits")
	s.install(t, "2")
	s.enter(t, "")
	s.addrs = s.requireReady(t, "1")
	require.Equal(t, s.addrs, s.requireReady(t, "2"), "addresses of the new process")
	s.RequireLines(t, "1 replaced: user defined signal 2")
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
	inFlight.Finish(t, "1")
	s.requireExit(t)
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

// The error is that of the parent, and then that of a child.
func TestErrorsOfServeAfterARestart(t *testing.T) {
	t.Parallel()
	s := start(t, "1,"+fails)
	s.restart(t, "1", "2,"+fails)
	s.awaitReport(t, 1, "restart: serve fails") // of the parent
	child := s.restart(t, "2", "3")
	s.awaitReport(t, 2, "serve fails")
	require.NoError(t, child.Signal(syscall.Signal(0)), "the third process is not running")
	require.Equal(t, "3", s.get(t, "/"))
	s.stop(t, "3")
}

// The parent is killed so that the socket is not drained, which would refuse connections too.
func TestHelperProcessesDoNotInheritSockets(t *testing.T) {
	t.Parallel()
	s := start(t, "1")
	s.install(t, "2,"+helper)
	pid := s.requireHelper(t)
	s.requireReady(t, "2")
	s.RequireLines(t, "1 replaced: user defined signal 2")
	require.NoError(t, s.parent.Kill())
	s.RequireLines(t, "2 stopped: parent process exited")
	tcptest.AwaitRefused(t, s.addrs[0])
	require.NoError(t, syscall.Kill(pid, 0), "the helper is not running")
}

// It leaves a process that has inherited its end of the link.
func TestExitOfANewProcessIsReportedWhileItsLinkIsOpen(t *testing.T) {
	t.Parallel()
	s := start(t, "1")
	s.ReplaceText(t, "#!/bin/sh\nsleep 60 &\necho helper $!\nexit 3\n")
	s.signal(t, syscall.SIGUSR2)
	s.requireHelper(t)
	s.awaitReport(t, 1, "restart: not restarted: "+
		"process [0-9]+ exited before it was ready: exit status 3")
	s.restart(t, "1", "2")
}

// If the parent has no descriptor free, it cannot receive the sockets of the new process.
func TestNewProcessWhoseSocketsCannotBeReceivedShutsDown(t *testing.T) {
	t.Parallel()
	s := start(t, "1")
	kept := httpclient.Dial(t, s.addrs[0], nil)
	inFlight := s.startRequest(t)
	s.install(t, "2,"+waits)
	child := s.Next(t)
	s.RequireLines(t, "2 waits")
	kept.Get(t, "/limit")
	kept.Response(t)
	s.enter(t, "")
	s.requireReady(t, "2")
	s.awaitReport(t, 1,
		"restart: not restarted: process [0-9]+: recvmsg: too many open files")
	s.RequireLines(t, "2 replaced: user defined signal 2")
	child.AwaitExit(t)

	kept.Get(t, "/no-limit")
	kept.Response(t)
	kept.Close()
	inFlight.Finish(t, "1")
	require.Equal(t, "1", s.get(t, "/"))
	s.restart(t, "1", "3")
	s.stop(t, "3")
	assert.Equal(t, 1, strings.Count(s.Errors(t), "\n"), "lines on standard error")
}

func TestReportsArePrintedWithPackageLog(t *testing.T) {
	t.Parallel()
	s := start(t, "1,"+logs+","+fails)
	s.install(t, "2,"+exits)
	assert.Regexp(t, "^restart: not restarted: process [0-9]+ exited before", s.Line(t))
	s.Next(t)
	s.restart(t, "1", "2")
	s.RequireLines(t, "restart: serve fails")
	s.stop(t, "2")
	assert.Empty(t, s.Errors(t))
}

// ctx is done because the new process has been signaled.
func TestReadyDoesNothingOnceTheContextIsDone(t *testing.T) {
	t.Parallel()
	s := start(t, "1")
	s.install(t, "2,"+isLate)
	child := s.Next(t)
	s.RequireLines(t, "2 waits")
	require.NoError(t, child.Signal(syscall.SIGTERM))
	s.requireReady(t, "2")
	s.RequireLines(t, "2 stopped: terminated")
	s.awaitReport(t, 1, "restart: not restarted: "+
		"process [0-9]+ exited before it was ready: exit status 0")
	require.Equal(t, "1", s.get(t, "/"))
	s.restart(t, "1", "3")
	s.stop(t, "3")
}

func TestPidIsThatOfTheParent(t *testing.T) {
	t.Parallel()
	s := start(t, "1")
	for n := 1; n < 4; n++ {
		require.Equal(t, fmt.Sprint(s.parent.Pid), s.get(t, "/pid"))
		s.restart(t, fmt.Sprint(n), fmt.Sprint(n+1))
	}
}

// Signals for the serving process

func TestSignalsArePassedOnToTheServingProcess(t *testing.T) {
	t.Parallel()
	s := start(t, "1")
	s.install(t, "2,"+exits) // does not serve
	s.Next(t).AwaitExit(t)
	for n := 2; n < 4; n++ {
		s.restart(t, fmt.Sprint(n-1), fmt.Sprint(n, ",", signals))
		s.signal(t, syscall.SIGHUP)
		s.RequireLines(t, fmt.Sprint(n, " received: hangup"))
		s.signal(t, syscall.SIGUSR1)
		s.RequireLines(t, fmt.Sprint(n, " received: user defined signal 1"))
	}
	s.stop(t, "3")
}

func TestSignalsHaveTheirEffectBeforeTheFirstRestart(t *testing.T) {
	t.Parallel()
	s := start(t, "1")
	s.install(t, "2,"+exits)
	s.Next(t).AwaitExit(t)
	s.awaitReport(t, 1, "restart: not restarted: .*")
	s.signal(t, syscall.SIGHUP)
	s.RequireStatus(t, -1)
	assert.Equal(t, "signal: hangup", s.ProcessState.String())
}

// As with nohup. The second child would not ignore it if the parent were notified of it.
func TestHangupThatIsIgnoredIsNotPassedOn(t *testing.T) {
	t.Parallel()
	s := start(t, "1", throughShell(`trap "" HUP; exec "$@"`))
	s.restart(t, "1", "2")
	child := s.restart(t, "2", "3")
	s.signal(t, syscall.SIGHUP)
	require.NoError(t, child.Signal(syscall.SIGHUP))
	require.Equal(t, "3", s.get(t, "/"))
	s.stop(t, "3")
}

// SIGCHLD

func TestChildrenWhoseStatusIsUnknownHaveNotFailed(t *testing.T) {
	tcptest.SkipIfShort(t, "starts many processes")
	t.Parallel()
	for _, feature := range []string{ignoresCHLD, reaps} {
		t.Run(feature, func(t *testing.T) {
			t.Parallel()
			s := start(t, "1,"+feature)
			s.install(t, "2,"+exits)
			s.awaitReport(t, 1, "restart: not restarted: "+
				"process [0-9]+ exited before it was ready: (unknown status|exit status 3)")
			s.Next(t)
			s.restart(t, "1", "2")
			s.restart(t, "2", "3")
			s.stop(t, "3")
		})
	}
}

// Child processes without a parent

func TestRunReturnsTheErrorOfTheLink(t *testing.T) {
	tcptest.SkipIfShort(t, "starts many processes")
	t.Parallel()
	const noLink = "restart: descriptor 3 is not a link to the parent\n"
	nothing := func(*testing.T, *exec.Cmd) {}
	for name, tt := range map[string]struct {
		protocol string
		pass     func(*testing.T, *exec.Cmd)
		want     string
	}{
		"no descriptor": {"1 4711", nothing, noLink},
		"file": {"1 4711", func(t *testing.T, cmd *exec.Cmd) {
			file, err := os.Open(os.DevNull)
			require.NoError(t, err)
			cmd.ExtraFiles = []*os.File{file}
		}, noLink},
		"other socket": {"1 4711", func(t *testing.T, cmd *exec.Cmd) {
			passFiles(t, cmd, tcptest.Listen(t))
		}, noLink},
		"unknown protocol": {"2 4711", nothing,
			`restart: the parent uses version "2" of the protocol, not "1"` + "\n"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := launch(t, "1", with("STOPPABLELISTENER_RESTART="+tt.protocol+"\n"),
				func(cmd *exec.Cmd) { tt.pass(t, cmd) })
			s.RequireStatus(t, 1)
			assert.Equal(t, tt.want, s.Errors(t))
		})
	}
}

// Stop

func TestSignalStopsTheService(t *testing.T) {
	tcptest.SkipIfShort(t, "starts many processes")
	t.Parallel()
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
				tcptest.AwaitRefused(t, s.addrs[0])
				inFlight.Finish(t, serving)
				s.requireExit(t)
				assert.Empty(t, s.Errors(t))
			})
		}
	}
}

// The program exits with status 4 because of that error.
func TestErrorOfServeIsThatOfTheService(t *testing.T) {
	tcptest.SkipIfShort(t, "starts many processes")
	t.Parallel()
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
	s := start(t, "1", inGroup)
	first := s.startRequest(t)
	s.restart(t, "1", "2")
	second := s.startRequest(t)
	require.NoError(t, syscall.Kill(-s.parent.Pid, syscall.SIGINT))
	s.RequireLines(t, "2 stopped: interrupt")
	first.Finish(t, "1")
	second.Finish(t, "2")
	s.requireExit(t)
}

// The service is stopped at some point of its first restart, while a request is in flight.
func TestSignalDuringARestartStopsTheService(t *testing.T) {
	t.Parallel()
	const workers = 5
	for name, target := range map[string]int{"process": 1, "group": -1} {
		for range workers {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				for round := range tcptest.Rounds(10) / workers {
					signalDuringRestart(t, target, round)
				}
			})
		}
	}
}

func signalDuringRestart(t *testing.T, target, round int) {
	s := start(t, "1", inGroup)
	inFlight := s.startRequest(t)
	s.signal(t, syscall.SIGUSR2)
	// The first half millisecond has more steps than the rest. A sleep is not as exact.
	delay := rand.N([]time.Duration{time.Millisecond / 2, 12 * time.Millisecond}[round%2])
	for start := time.Now(); time.Since(start) < delay; {
	}
	require.NoError(t, syscall.Kill(target*s.parent.Pid, syscall.SIGTERM))
	tcptest.AwaitRefused(t, s.addrs[0])
	inFlight.Finish(t, "1")
	s.RequireStatus(t, 0)
	for line := ""; line != "EOF"; line = s.Line(t) { // no process is left
	}
}

func TestSecondSignalKillsAllProcesses(t *testing.T) {
	tcptest.SkipIfShort(t, "starts many processes")
	t.Parallel()
	for _, restarted := range []bool{false, true} {
		t.Run(fmt.Sprint("restarted ", restarted), func(t *testing.T) {
			t.Parallel()
			s := start(t, "1")
			inFlight := []*httpclient.Conn{s.startRequest(t)}
			serving := "1"
			if restarted {
				s.restart(t, "1", "2")
				inFlight = append(inFlight, s.startRequest(t))
				serving = "2"
			}
			s.signal(t, syscall.SIGTERM)
			s.RequireLines(t, serving+" stopped: terminated")
			s.kill(t)
			s.RequireNoProcess(t)
			for _, r := range inFlight {
				r.AwaitClosed(t)
			}
		})
	}
}

func TestSecondSignalKillsAProcessThatIsStuckInListen(t *testing.T) {
	t.Parallel()
	s := launch(t, "1,"+isStuck)
	s.RequireLines(t, "1 is stuck")
	s.kill(t)
}

// A process that hangs before Run gets SIGTERM.
func TestSignalStopsANewProcessThatIsNotReady(t *testing.T) {
	t.Parallel()
	s := start(t, "1")
	inFlight := s.startRequest(t)
	s.install(t, "2,"+hangs)
	hanging := s.Next(t)
	s.RequireLines(t, "2 hangs")
	s.signal(t, syscall.SIGTERM)
	s.RequireLines(t, "1 stopped: terminated")
	hanging.AwaitExit(t)
	inFlight.Finish(t, "1")
	s.requireExit(t)
	assert.Empty(t, s.Errors(t))
}

// It may have called Ready at that moment, and would wait for word. Here, it is a script, which
// prints the parent's word.
func TestNewProcessIsSentWordThatTheServiceIsStopped(t *testing.T) {
	t.Parallel()
	s := start(t, "1")
	s.ReplaceText(t, `#!/bin/sh
		trap "" TERM
		echo 2 waits
		echo 2 received: $(od -An -tu1 -N1 <&4)
	`)
	s.signal(t, syscall.SIGUSR2)
	s.RequireLines(t, "2 waits")
	s.signal(t, syscall.SIGINT)
	lines := []string{s.Line(t), s.Line(t)}
	slices.Sort(lines)
	require.Equal(t, []string{"1 stopped: interrupt", "2 received: 2"}, lines)
	s.requireExit(t)
}

func TestRunReturnsWhenTheServingChildExits(t *testing.T) {
	tcptest.SkipIfShort(t, "starts many processes")
	t.Parallel()
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
			func(t *testing.T, _ *service, child proctest.Process) {
				require.NoError(t, child.Kill())
			},
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
			tcptest.AwaitRefused(t, s.addrs[0])
		})
	}
}

// The parent waits for the old process, and keeps no socket open that nothing serves.
func TestConnectionsAreRefusedOnceTheServingChildHasExited(t *testing.T) {
	tcptest.SkipIfShort(t, "starts many processes")
	t.Parallel()
	s := start(t, "1")
	s.restart(t, "1", "2")
	inFlight := s.startRequest(t)
	child := s.restart(t, "2", "3")
	require.NoError(t, child.Kill())
	tcptest.AwaitRefused(t, s.addrs[0])
	inFlight.Finish(t, "2")
	s.RequireStatus(t, 1)
	s.RequireNoProcess(t)
}

func TestChildrenShutDownGracefullyWhenTheParentIsKilled(t *testing.T) {
	t.Parallel()
	s := start(t, "1")
	s.restart(t, "1", "2")
	inFlight := s.startRequest(t)
	require.NoError(t, s.parent.Kill())
	s.RequireLines(t, "2 stopped: parent process exited")
	tcptest.AwaitRefused(t, s.addrs[0])
	inFlight.Finish(t, "2")
	s.RequireNoProcess(t)
}

func TestSignalAfterRunHasItsEffect(t *testing.T) {
	t.Parallel()
	s := start(t, "1,"+lingers)
	s.signal(t, syscall.SIGTERM)
	s.RequireLines(t, "1 stopped: terminated", "1 lingers")
	s.signal(t, syscall.SIGTERM)
	s.RequireStatus(t, -1)
	assert.Equal(t, "signal: terminated", s.ProcessState.String())
}

// As in "program | tee log" after Ctrl+C, when tee has exited.
func TestWritesToAClosedPipeDoNotKillTheProcess(t *testing.T) {
	t.Parallel()
	s := start(t, "1")
	inFlight := s.startRequest(t)
	s.CloseOutput(t)
	s.signal(t, syscall.SIGINT)
	tcptest.AwaitRefused(t, s.addrs[0])
	inFlight.Finish(t, "1")
	s.RequireStatus(t, 0)
}
