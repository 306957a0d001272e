// Package proctest runs the test binary as the program under test, in processes of its own.
//
// Each process reports to the test and stays connected until it exits, so the test knows
// of all processes, including those that were started by others, and kills what is left.
package proctest

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

const (
	reportEnv  = "STOPPABLELISTENER_TEST_REPORT"  // address to report to
	VersionEnv = "STOPPABLELISTENER_TEST_VERSION" // that is installed
)

// patience is how long a process may take until it starts, exits or prints a line. It is longer than
// [tcptest.Patience], because tests that run in parallel may all start processes at the same time.
const patience = time.Minute

// Main runs the tests or, in a process that a test has started, program. TestMain calls it.
func Main(m *testing.M, program func(version string)) {
	addr := os.Getenv(reportEnv)
	if addr == "" {
		// The tests wait most of the time, so the number of processors need not limit them.
		_ = flag.Set("test.parallel", "16")
		os.Exit(m.Run())
	}
	conn, err := net.Dial("tcp", addr)
	if err == nil {
		_, err = fmt.Fprintln(conn, os.Getpid(), os.Getenv(VersionEnv))
	}
	if err != nil {
		panic(err)
	}
	program(os.Getenv(VersionEnv))
	runtime.KeepAlive(conn)
}

// TB is what a program passes to helpers of tests: it panics instead of failing a test.
type TB struct{ testing.TB }

func (TB) Name() string { return "program" }

func (TB) Helper() {}

func (TB) Cleanup(func()) {} // the system cleans up at exit

func (TB) Errorf(format string, args ...any) { panic(fmt.Sprintf(format, args...)) }

// A Program is a command and all processes that it has started.
type Program struct {
	*exec.Cmd
	Processes <-chan Process // as they start
	stdout    *os.File       // what all processes write to standard output
	lines     *bufio.Scanner // of stdout
	stderr    *os.File       // what all processes write to standard error
}

// A Process runs one version of the program.
type Process struct {
	*os.Process
	Version string
	Exited  <-chan struct{} // closed when the process has exited
}

// AwaitExit waits until the process has exited.
func (p Process) AwaitExit(t testing.TB) {
	t.Helper()
	receive(t, p.Exited, fmt.Sprintf("exit of process %d, version %q", p.Pid, p.Version))
}

// receive is [tcptest.Receive] with patience.
func receive[T any](t testing.TB, ch <-chan T, what string) T {
	t.Helper()
	return tcptest.ReceiveWithin(t, patience, ch, what)
}

// Start starts the command. Its processes are killed when the test ends.
func Start(t testing.TB, cmd *exec.Cmd) *Program {
	t.Helper()
	processes, addr := awaitProcesses(t)
	p := &Program{Cmd: cmd, Processes: processes}
	if cmd.Env == nil {
		cmd.Env = os.Environ()
	}
	// The race detector would make each process wait for a second before it exits.
	cmd.Env = append(cmd.Env, reportEnv+"="+addr, "GORACE=atexit_sleep_ms=0 "+os.Getenv("GORACE"))
	stdout, w, err := os.Pipe()
	require.NoError(t, err)
	defer w.Close()
	p.stdout, p.lines = stdout, bufio.NewScanner(stdout)
	p.stderr, err = os.CreateTemp(t.TempDir(), "stderr")
	require.NoError(t, err)
	if cmd.Stdout == nil {
		cmd.Stdout = w
	}
	if cmd.Stderr == nil {
		cmd.Stderr = p.stderr
	}
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		stdout.Close()
		p.stderr.Close()
	})
	return p
}

// awaitProcesses receives the reports of processes, which they send to addr.
func awaitProcesses(t testing.TB) (processes <-chan Process, addr string) {
	l := tcptest.Listen(t)
	ch := make(chan Process, 1000)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			process, err := receiveReport(conn)
			if err == io.EOF {
				continue // killed before it could report
			}
			if err != nil {
				t.Error(err)
				return
			}
			t.Cleanup(func() {
				select {
				case <-process.Exited:
				default:
					_ = process.Kill()
					<-process.Exited
				}
			})
			ch <- process
		}
	}()
	return ch, l.Addr().String()
}

func receiveReport(conn net.Conn) (Process, error) {
	reader := bufio.NewReader(conn)
	line, err := reader.ReadString('\n')
	if err != nil {
		return Process{}, err
	}
	var pid int
	var version string
	_, _ = fmt.Sscan(line, &pid, &version) // the version may be empty
	process, err := os.FindProcess(pid)
	exited := make(chan struct{})
	go func() {
		defer close(exited)
		_, _ = reader.ReadByte()
		conn.Close()
	}()
	return Process{process, version, exited}, err
}

// Self returns the path of the test binary.
func Self(t testing.TB) string {
	path, err := os.Executable()
	require.NoError(t, err)
	return path
}

// RequireInheritance skips the test where no child process can inherit a socket.
func RequireInheritance(t testing.TB) {
	t.Helper()
	dir, attr := t.TempDir(), &os.ProcAttr{Files: make([]*os.File, 4)}
	// Elsewhere, the error is that a directory is not a program.
	if _, err := os.StartProcess(dir, nil, attr); errors.Is(err, errors.ErrUnsupported) {
		t.Skip("no process can inherit a fourth file: ", err)
	}
}

// Next waits for the next process that starts.
func (p *Program) Next(t testing.TB) Process {
	t.Helper()
	return receive(t, p.Processes, "start of a process; standard error: "+p.Errors(t))
}

// Line returns the next line of standard output, or "EOF" when no process has it open.
func (p *Program) Line(t testing.TB) string {
	t.Helper()
	line := make(chan string, 1)
	go func() {
		if p.lines.Scan() {
			line <- p.lines.Text()
		} else {
			line <- "EOF"
		}
	}()
	return receive(t, line, "line on standard output")
}

// CloseOutput closes the pipe to which the processes write their standard output.
func (p *Program) CloseOutput(t testing.TB) {
	require.NoError(t, p.stdout.Close())
}

// RequireLines requires these lines to be the next ones on standard output.
func (p *Program) RequireLines(t testing.TB, lines ...string) {
	t.Helper()
	for _, line := range lines {
		require.Equal(t, line, p.Line(t), "standard error: %s", p.Errors(t))
	}
}

// Errors returns what has been written to standard error so far.
func (p *Program) Errors(t testing.TB) string {
	text, err := os.ReadFile(p.stderr.Name())
	require.NoError(t, err)
	return string(text)
}

// Signal sends sig to a process. It skips the test where there are no signals.
func Signal(t testing.TB, p *os.Process, sig os.Signal) {
	t.Helper()
	err := p.Signal(sig)
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skip(err)
	}
	require.NoError(t, err)
}

// RequireStatus waits for the first process to exit and requires its exit status.
func (p *Program) RequireStatus(t testing.TB, status int) {
	t.Helper()
	exited := make(chan error, 1)
	go func() { exited <- p.Wait() }()
	err := receive(t, exited, "exit of the first process; standard error: "+p.Errors(t))
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) {
		require.NoError(t, err)
	}
	require.Equal(t, status, p.ProcessState.ExitCode(),
		"exit status of the first process (%v); standard error: %s", p.ProcessState, p.Errors(t))
}

// RequireNoProcess requires that no process has the standard output open.
func (p *Program) RequireNoProcess(t testing.TB) {
	t.Helper()
	require.Equal(t, "EOF", p.Line(t), "a process is running, or has written this line")
}
