//go:build unix

package restart_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener/internal/testutil/proctest"
	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

// Processes that hang, that are suspended or that are signaled twice, and what else a program, or
// who starts it, may do

// The new process is suspended, so that it does not even exit on SIGTERM.
func TestServiceEndsAlthoughANewProcessHangs(t *testing.T) {
	tcptest.SkipIfShort(t, "takes a second")
	t.Parallel()
	for _, restarted := range []bool{false, true} {
		t.Run(fmt.Sprint("restarted ", restarted), func(t *testing.T) {
			t.Parallel()
			s := start(t, "1")
			serving, sig, status := s.parent, syscall.SIGTERM, 0
			if restarted {
				serving, sig, status = s.restart(t, "1", "2"), syscall.SIGKILL, 1
			}
			s.install(t, "3,"+waits)
			hanging := s.Next(t)
			s.RequireLines(t, "3 waits")
			require.NoError(t, hanging.Signal(syscall.SIGSTOP))
			require.NoError(t, serving.Signal(sig))
			s.RequireStatus(t, status)
			hanging.AwaitExit(t)
			tcptest.AwaitRefused(t, s.addrs[0])
		})
	}
}

// The serving process handles a request for longer than a new process may outlive it.
func TestNewProcessThatAcceptsBeforeReadyIsNotKilledSoon(t *testing.T) {
	tcptest.SkipIfShort(t, "takes two seconds")
	t.Parallel()
	s := start(t, "1")
	ofParent := s.startRequest(t)
	s.install(t, "2,"+isEarly)
	s.RequireLines(t, "2 waits")
	s.suspend(t) // so the new process accepts the next connection
	ofChild := s.startRequest(t)
	s.signal(t, syscall.SIGTERM)
	s.signal(t, syscall.SIGCONT)
	s.RequireLines(t, "1 stopped: terminated")
	time.Sleep(2 * time.Second)
	ofChild.Finish(t, "2")
	ofParent.Finish(t, "1")
	s.RequireStatus(t, 0)
}

// As with timeout, or after Ctrl+C with npm.
func TestTwoSignalsWithinAMomentCountOnce(t *testing.T) {
	tcptest.SkipIfShort(t, "starts many processes")
	t.Parallel()
	for name, signals := range map[string]func(t *testing.T, s *service){
		"at the same time": func(t *testing.T, s *service) {
			s.suspend(t)
			s.signal(t, syscall.SIGTERM)
			s.signal(t, syscall.SIGINT)
			s.signal(t, syscall.SIGCONT)
		},
		"one after the other": func(t *testing.T, s *service) {
			s.signal(t, syscall.SIGTERM)
			s.RequireLines(t, "1 is done")
			s.signal(t, syscall.SIGTERM)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const moment = 100 * time.Millisecond
			for took := moment; took >= moment; { // on a busy machine, once more
				s := start(t, "1,"+announces)
				inFlight := s.startRequest(t)
				start := time.Now()
				signals(t, s)
				if took = time.Since(start); took < moment {
					tcptest.AwaitRefused(t, s.addrs[0])
					time.Sleep(2 * moment) // in which the service must not be killed
					inFlight.Finish(t, "1")
					s.RequireStatus(t, 0)
				}
			}
		})
	}
}

// blockedLog makes standard error a pipe that is full, and that nothing reads.
func blockedLog(t *testing.T) func(*exec.Cmd) {
	r, w, err := os.Pipe()
	require.NoError(t, err)
	t.Cleanup(func() {
		r.Close()
		w.Close()
	})
	for _, size := range []int{1000, 1} {
		require.NoError(t, w.SetWriteDeadline(time.Now().Add(100*time.Millisecond)))
		for err = nil; err == nil; {
			_, err = w.Write(make([]byte, size))
		}
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	}
	w.Fd() // sets blocking mode, which the processes have too
	return func(cmd *exec.Cmd) { cmd.Stderr = w }
}

func TestNothingWaitsForTheLog(t *testing.T) {
	tcptest.SkipIfShort(t, "starts many processes")
	t.Parallel()
	s := start(t, "1,"+fails, blockedLog(t))
	for range 2 {
		s.install(t, "2,"+exits)
		s.Next(t).AwaitExit(t)
	}
	s.restart(t, "1", "2")
	s.restart(t, "2", "3")
	s.stop(t, "3")
}

func TestNewProcessExitsWithItsParentWhateverReadsTheLog(t *testing.T) {
	tcptest.SkipIfShort(t, "takes a second")
	t.Parallel()
	s := start(t, "1", blockedLog(t))
	s.install(t, "2,"+waits)
	child := s.Next(t)
	s.RequireLines(t, "2 waits")
	require.NoError(t, s.parent.Kill())
	child.AwaitExit(t)
}

// The parent, which has been replaced, exits with the last report.
func TestLastReportIsPrintedWithPackageLog(t *testing.T) {
	t.Parallel()
	s := start(t, "1,"+logsSlowly+","+fails)
	inFlight := s.startRequest(t)
	child := s.restart(t, "1", "2")
	s.signal(t, syscall.SIGTERM)
	s.RequireLines(t, "2 stopped: terminated")
	child.AwaitExit(t)
	inFlight.Finish(t, "1")
	s.RequireLines(t, "1 logs: restart: serve fails")
	s.requireExit(t)
}

// It keeps serving until it is known who serves next, however long that takes.
func TestServingChildIsSignaledDuringARestart(t *testing.T) {
	tcptest.SkipIfShort(t, "takes two seconds")
	t.Parallel()
	tcptest.RequireRefusal(t)
	for _, succeeds := range []bool{true, false} {
		t.Run(fmt.Sprint("that succeeds ", succeeds), func(t *testing.T) {
			t.Parallel()
			s := start(t, "1")
			child := s.restart(t, "1", "2,"+announces)
			s.install(t, "3,"+waits)
			newProcess := s.Next(t)
			s.RequireLines(t, "3 waits")
			require.NoError(t, child.Signal(syscall.SIGTERM))
			s.RequireLines(t, "2 is done")
			time.Sleep(1500 * time.Millisecond)
			requireRefused := startClients(t, s.addrs[0])
			if succeeds {
				s.enter(t, "")
				s.requireReady(t, "3")
				s.RequireLines(t, "2 stopped: terminated")
				require.Equal(t, "3", s.get(t, "/"))
				s.signal(t, syscall.SIGTERM)
				s.RequireLines(t, "3 stopped: terminated")
			} else {
				require.NoError(t, newProcess.Kill())
				s.RequireLines(t, "2 stopped: terminated")
			}
			requireRefused()
			s.requireExit(t)
		})
	}
}

func TestReasonOfAFailedRestart(t *testing.T) {
	tcptest.SkipIfShort(t, "starts many processes")
	t.Parallel()
	t.Run("descriptors", func(t *testing.T) {
		t.Parallel()
		l := tcptest.Listen(t) // whose address would be in use otherwise
		s := start(t, "1", on("tcp,"+l.Addr().String()), activated(t, "$$", l))
		s.install(t, "2,"+hasNoFiles)
		s.awaitReport(t, 2, "restart: not restarted: "+
			"process [0-9]+ exited before it was ready: exit status 1")
		assert.Contains(t, s.Errors(t), "too many open files")
	})
	for _, want := range []string{"not a directory", "permission denied"} {
		t.Run("directory: "+want, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "directory")
			require.NoError(t, os.Mkdir(dir, 0o700))
			s := start(t, "1", with("PWD="+dir), func(cmd *exec.Cmd) { cmd.Dir = dir })
			require.NoError(t, os.Remove(dir))
			if want == "not a directory" {
				require.NoError(t, os.WriteFile(dir, nil, 0o600))
			} else if require.NoError(t, os.Mkdir(dir, 0)); os.Getuid() == 0 {
				t.Skip("root has permission")
			}
			s.signal(t, syscall.SIGUSR2)
			s.awaitReport(t, 1, "restart: not restarted: chdir "+dir+": "+want)
			s.stop(t, "1")
		})
	}
}

// Its log, for example, must not be taken for a socket.
func TestDescriptorThatMainUsesForSomethingElseIsLeftAlone(t *testing.T) {
	t.Parallel()
	s := start(t, "1,"+reuses3, activated(t, "$$", tcptest.Listen(t)))
	assert.Equal(t, "<nil>", s.get(t, "/write?descriptor=3"), "error of writing to the file")
}

// As with nohup, or with "program &" in a script.
func TestSignalsThatAreIgnoredStayIgnored(t *testing.T) {
	tcptest.SkipIfShort(t, "starts many processes")
	t.Parallel()
	s := start(t, "1", throughShell(`trap "" INT HUP; exec "$@"`), inGroup)
	for n := 1; n < 4; n++ {
		require.NoError(t, syscall.Kill(-s.parent.Pid, syscall.SIGINT))
		require.NoError(t, syscall.Kill(-s.parent.Pid, syscall.SIGHUP))
		require.Equal(t, fmt.Sprint(n), s.get(t, "/"))
		s.restart(t, fmt.Sprint(n), fmt.Sprint(n+1))
	}
	s.stop(t, "4")
}

func TestRestartThatWaitsIsReported(t *testing.T) {
	tcptest.SkipIfShort(t, "starts many processes")
	t.Parallel()
	s := start(t, "1")
	s.install(t, "2,"+waits)
	hanging := s.Next(t)
	s.RequireLines(t, "2 waits")
	s.install(t, "3")
	s.awaitReport(t, 1, fmt.Sprintf(
		"restart: process %d is not ready yet; the next restart waits for it", hanging.Pid))
	require.NoError(t, hanging.Kill())
	s.requireReady(t, "3")
	s.RequireLines(t, "1 replaced: user defined signal 2")
	s.stop(t, "3")
}

func TestMemoryOfServeIsFreedInTheParent(t *testing.T) {
	tcptest.SkipIfShort(t, "starts many processes")
	t.Parallel()
	s := start(t, "1,"+isLarge)
	megabytes := func() (n int) {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.parent.Pid))
		_, rss, ok := strings.Cut(string(status), "VmRSS:")
		if err != nil || !ok {
			t.Skip("unknown here: ", err)
		}
		_, err = fmt.Sscan(rss, &n)
		require.NoError(t, err)
		return n / 1024
	}
	before := megabytes()
	s.restart(t, "1", "2")
	tcptest.Await(t, "less memory in the parent", func() bool { return megabytes() < before-20 })
}

// The parent's child is a shell.
func TestPidWhereANewVersionIsAScriptWithoutExec(t *testing.T) {
	tcptest.SkipIfShort(t, "starts many processes")
	t.Parallel()
	s := start(t, "1")
	s.ReplaceText(t, fmt.Sprintf("#!/bin/sh\n%s=2 '%s' \"$@\"\nexit $?\n",
		proctest.VersionEnv, proctest.Self(t)))
	s.signal(t, syscall.SIGUSR2)
	s.requireReady(t, "2")
	s.RequireLines(t, "1 replaced: user defined signal 2")
	require.Equal(t, fmt.Sprint(s.parent.Pid), s.get(t, "/pid"))
	s.stop(t, "2")
}
