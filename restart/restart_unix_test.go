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
	loads := restartUnderLoad(t, 1+tcptest.Rounds(10)/2, func(n int) string {
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
			load.AwaitRequests(t, 20)
		}
		child := s.restart(t, version(n), version(n+1))
		if n > 0 {
			previous.AwaitExit(t)
		}
		previous = child
	}
	for _, load := range loads {
		load.AwaitRequests(t, 20)
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

// When the parent runs again, the new process, which suspends it, has been ready for some time, and
// the timeout is over. With GOMAXPROCS=1, it sees that first.
func TestNewProcessThatIsReadyWhileTheParentIsSuspendedIsNotKilled(t *testing.T) {
	tcptest.SkipIfShort(t, "takes two seconds")
	t.Parallel()
	const timeout = 2 * time.Second
	s := start(t, "1", with(readyTimeoutEnv+"="+timeout.String(), "GOMAXPROCS=1"))
	s.ReplaceText(t, fmt.Sprintf("#!/bin/sh\nkill -STOP $PPID\n%s=2 exec '%s' \"$@\"\n",
		proctest.VersionEnv, proctest.Self(t)))
	s.signal(t, syscall.SIGUSR2)
	s.requireReady(t, "2")
	time.Sleep(timeout)
	s.signal(t, syscall.SIGCONT)
	s.RequireLines(t, "1 replaced: user defined signal 2")
	require.Empty(t, s.Errors(t))
	s.stop(t, "2")
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

// Signals for the serving process

func TestSignalsArePassedOnToTheServingProcess(t *testing.T) {
	tcptest.SkipIfShort(t, "starts many processes")
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
	for name, tt := range map[string]struct {
		protocol string
		passed   []filer
		want     string
	}{
		"no socket":    {"1 4711", nil, noLink},
		"other socket": {"1 4711", []filer{tcptest.Listen(t)}, noLink},
		"unknown protocol": {"2 4711", nil,
			`restart: the parent uses version "2" of the protocol, not "1"` + "\n"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := launch(t, "1", with("STOPPABLELISTENER_RESTART="+tt.protocol+"\n"),
				func(cmd *exec.Cmd) { passFiles(t, cmd, tt.passed...) })
			s.RequireStatus(t, 1)
			assert.Equal(t, tt.want, s.Errors(t))
		})
	}
}

// Stop

func TestSignalStopsTheService(t *testing.T) {
	t.Parallel()
	s := start(t, "1")
	ofParent := s.startRequest(t)
	s.restart(t, "1", "2")
	ofChild := s.startRequest(t)
	s.signal(t, syscall.SIGINT)
	s.RequireLines(t, "2 stopped: interrupt")
	tcptest.AwaitRefused(t, s.addrs[0])
	ofParent.Finish(t, "1")
	ofChild.Finish(t, "2")
	s.requireExit(t)
	assert.Empty(t, s.Errors(t))
}

// The program exits with status 4 because of that error.
func TestStatusOfTheServingChildIsThatOfTheService(t *testing.T) {
	t.Parallel()
	s := start(t, "1")
	s.restart(t, "1", "2,"+fails)
	s.signal(t, syscall.SIGTERM)
	s.RequireStatus(t, 4)
	assert.Equal(t, "serve fails\n", s.Errors(t))
}

// The service is stopped at some point of its first restart, while a request is in flight.
func TestSignalDuringARestartStopsTheService(t *testing.T) {
	tcptest.SkipIfShort(t, "starts many processes")
	t.Parallel()
	for name, target := range map[string]int{"process": 1, "group": -1} {
		for round := range 4 {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				signalDuringRestart(t, target, round)
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
	t.Parallel()
	s := start(t, "1")
	ofParent := s.startRequest(t)
	s.restart(t, "1", "2")
	ofChild := s.startRequest(t)
	s.signal(t, syscall.SIGTERM)
	s.RequireLines(t, "2 stopped: terminated")
	s.kill(t)
	s.RequireNoProcess(t)
	ofParent.AwaitClosed(t)
	ofChild.AwaitClosed(t)
}

func TestSecondSignalKillsAProcessThatIsStuckInListen(t *testing.T) {
	t.Parallel()
	s := launch(t, "1,"+isStuck)
	s.RequireLines(t, "1 is stuck")
	s.kill(t)
}

// A process that is not ready is terminated. But it may have called Ready at that moment, and would
// wait for a message. Here, it is a script, which prints the parent's message.
func TestNewProcessIsSentAMessageThatTheServiceIsStopped(t *testing.T) {
	t.Parallel()
	s := start(t, "1")
	s.ReplaceText(t, `#!/bin/sh
		trap "terminated=yes" TERM
		echo 2 waits
		message=$(od -An -tu1 -N1 <&4)
		until [ $terminated ]; do sleep 0.01; done
		echo 2 received: $message
	`)
	inFlight := s.startRequest(t)
	s.signal(t, syscall.SIGUSR2)
	s.RequireLines(t, "2 waits")
	s.signal(t, syscall.SIGINT)
	lines := []string{s.Line(t), s.Line(t)}
	slices.Sort(lines)
	require.Equal(t, []string{"1 stopped: interrupt", "2 received: 2"}, lines)
	inFlight.Finish(t, "1")
	s.requireExit(t)
	assert.Empty(t, s.Errors(t))
}

func TestRunReturnsWhenTheServingChildExits(t *testing.T) {
	tcptest.SkipIfShort(t, "starts many processes")
	t.Parallel()
	for name, tt := range map[string]struct {
		request string
		status  int
		stderr  string // a regular expression
	}{
		"serve returns": {"/return", 0, "^$"},
		"serve returns an error": {
			"/return?error=1", 1, "^serve fails\nrestart: process [0-9]+: exit status 4\n$",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := start(t, "1")
			s.restart(t, "1", "2")
			s.send(t, tt.request)
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
	assert.Regexp(t, "^restart: process [0-9]+: signal: killed\n$", s.Errors(t))
}

// The sockets are not drained, so connections are refused only if the helper has inherited none.
func TestChildrenShutDownGracefullyWhenTheParentIsKilled(t *testing.T) {
	t.Parallel()
	s := start(t, "1")
	s.install(t, "2,"+helper)
	pid := s.requireHelper(t)
	s.requireReady(t, "2")
	s.RequireLines(t, "1 replaced: user defined signal 2")
	inFlight := s.startRequest(t)
	require.NoError(t, s.parent.Kill())
	s.RequireLines(t, "2 stopped: parent process exited")
	tcptest.AwaitRefused(t, s.addrs[0])
	inFlight.Finish(t, "2")
	require.NoError(t, syscall.Kill(pid, 0), "the helper is not running")
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
