package tcptest

import (
	"fmt"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener"
)

// BlindWait is how long Accept returns connections after Drain if the system does not refuse them,
// and how long it waits for handshakes if the system does not show them.
const BlindWait = 250 * time.Millisecond

// RequireRefusal skips the test where the system does not refuse new connections after Drain.
// On Linux since version 5.7, it fails the test instead.
func RequireRefusal(t testing.TB) {
	t.Helper()
	err := dialAfterDrain()
	if IsRefused(err) {
		return
	}
	if release := linuxRelease(); release != "" {
		require.FailNow(t, fmt.Sprintf(
			"Linux %s does not refuse connections after Drain, connect returned: %v", release, err))
	}
	t.Skip("no connection is refused after Drain here, connect returned: ", err)
}

// RefusesAfterDrain reports whether the system refuses new connections after Drain.
func RefusesAfterDrain() bool { return IsRefused(dialAfterDrain()) }

// dialAfterDrain is the error of a client that connects after Drain.
var dialAfterDrain = sync.OnceValue(func() error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer l.Close()
	sl, err := stoppablelistener.New(l)
	if err != nil {
		return err
	}
	sl.Drain()
	return dialOnly(l.Addr().String(), Patience)
})

// linuxRelease is the version of Linux, if that is 5.7 or newer, or not known; otherwise empty.
func linuxRelease() string {
	if runtime.GOOS != "linux" {
		return ""
	}
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return err.Error()
	}
	var major, minor int
	_, err = fmt.Sscanf(string(release), "%d.%d", &major, &minor)
	if err == nil && (major < 5 || major == 5 && minor < 7) {
		return ""
	}
	return strings.TrimSpace(string(release))
}

// RequireRefused requires the system to refuse a new connection to l.
func RequireRefused(t testing.TB, l net.Listener) {
	t.Helper()
	err := dialOnly(l.Addr().String(), Patience)
	require.True(t, IsRefused(err), "the connection is not refused, connect returned: %v", err)
}

// AwaitRefused waits until the system refuses new connections to addr.
func AwaitRefused(t testing.TB, addr string) {
	t.Helper()
	Await(t, "refusal of connections to "+addr, func() bool {
		return IsRefused(dialOnly(addr, time.Second))
	})
}

func dialOnly(addr string, timeout time.Duration) error {
	conn, err := net.DialTimeout("tcp", addr, timeout)
	if err == nil {
		conn.Close()
	}
	return err
}

// IsRefused reports whether err is what connect returns if the connection is refused.
func IsRefused(err error) bool {
	return err != nil && strings.Contains(err.Error(), "refused") // Plan 9 has no ECONNREFUSED
}

// RequireDrained receives n results, which must be StoppedError.
func RequireDrained(t testing.TB, results <-chan Accepted, n int) {
	t.Helper()
	requireStopped(t, results, n, "Drain")
}

// RequireAcceptsUntilStopped calls drain while clients connect to sl without pause. The system must
// not refuse them then, and Accept must return StoppedError although they keep coming.
func RequireAcceptsUntilStopped(
	t testing.TB, sl *stoppablelistener.StoppableListener, drain func(),
) {
	t.Helper()
	var closing atomic.Bool
	stopLoad := Loop(t, 16, func() bool {
		conn, err := net.DialTimeout("tcp", sl.Addr().String(), Patience)
		if err != nil {
			if !closing.Load() {
				t.Errorf("a client cannot connect: %v", err)
			}
			return false
		}
		_ = conn.(*net.TCPConn).SetLinger(0) // as DialOnce
		_, _ = conn.Read(make([]byte, 1))    // returns when the connection is closed
		return conn.Close() == nil
	})
	accepted, enough := Countdown(16)
	stopped := make(chan error, 1)
	go func() {
		for {
			conn, err := sl.Accept()
			if err != nil {
				stopped <- err
				return
			}
			accepted()
			time.Sleep(time.Millisecond) // so that the accept queue is never empty
			conn.Close()
		}
	}()
	Receive(t, enough, "connections")
	start := time.Now()
	drain()
	require.NoError(t, sl.TCPListener.SetDeadline(Past)) // does not count
	err := Receive(t, stopped, "return of Accept after Drain, while connections keep coming")
	took := time.Since(start)
	closing.Store(true)
	sl.Close()
	stopLoad()
	RequireStoppedError(t, err)
	require.GreaterOrEqual(t, took, BlindWait, "Accept has returned StoppedError too soon")
	require.Less(t, took, Patience/2, "Accept has returned connections for too long")
}
