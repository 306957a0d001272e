package listenertest_test

import (
	"context"
	"errors"
	"net"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener"
	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

// Options that package syscall lacks.
const (
	soReusePort     = 15 // SO_REUSEPORT
	soBindToIfindex = 62 // SO_BINDTOIFINDEX
)

// A kind is a kind of listening socket.
type kind struct {
	network, addr, dialAddr string
	multipath               bool
}

var kinds = map[string]kind{
	"TCP":           {"tcp4", "127.0.0.1:0", "127.0.0.1", false},
	"Multipath TCP": {"tcp4", "127.0.0.1:0", "127.0.0.1", true},
	"IPv6":          {"tcp6", "[::1]:0", "::1", false},
	"wildcard":      {"tcp", ":0", "127.0.0.1", false},
}

// listen listens on a socket of that kind, and returns the address for clients. It skips the test
// if the machine has no such socket.
func (k kind) listen(t *testing.T, level, option, value int) (l *net.TCPListener, addr string) {
	config := withOption(level, option, value)
	config.SetMultipathTCP(k.multipath)
	listener, err := config.Listen(context.Background(), k.network, k.addr)
	if err != nil {
		t.Skip("no such socket: ", err)
	}
	t.Cleanup(func() { listener.Close() })
	_, port, err := net.SplitHostPort(listener.Addr().String())
	require.NoError(t, err)
	return listener.(*net.TCPListener), net.JoinHostPort(k.dialAddr, port)
}

// withOption sets an option of the socket.
func withOption(level, option, value int) *net.ListenConfig {
	return &net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		controlErr := c.Control(func(fd uintptr) {
			err = syscall.SetsockoptInt(int(fd), level, option, value)
		})
		return errors.Join(os.NewSyscallError("setsockopt", err), controlErr)
	}}
}

func (k kind) dial(addr string) (*net.TCPConn, error) {
	dialer := net.Dialer{Timeout: tcptest.Patience}
	dialer.SetMultipathTCP(k.multipath)
	conn, err := dialer.Dial("tcp", addr)
	if err != nil {
		return nil, err
	}
	return conn.(*net.TCPConn), conn.(*net.TCPConn).SetLinger(0) // as tcptest.DialOnce
}

func TestHandshakesThatHaveStartedComplete(t *testing.T) {
	t.Parallel()
	tcptest.RequireRefusal(t)
	for name, k := range kinds {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for attempt := 1; !completeHandshakes(t, k); attempt++ {
				require.Less(t, attempt, 10, "the machine is too slow: each handshake lasts too long")
			}
		})
	}
}

// completeHandshakes starts handshakes before Drain and completes them after it. It returns false
// if it was too late. With TCP_DEFER_ACCEPT, a handshake lasts until the client sends a byte.
func completeHandshakes(t *testing.T, k kind) bool {
	l, addr := k.listen(t, syscall.IPPROTO_TCP, syscall.TCP_DEFER_ACCEPT, 10)
	sl := tcptest.Wrap(t, l)
	clients := make([]*net.TCPConn, 2)
	for i := range clients {
		client, err := k.dial(addr)
		require.NoError(t, err)
		defer client.Close()
		clients[i] = client
	}
	waiting := tcptest.Accept(sl)
	tcptest.AwaitAcceptors(t, 1)
	start := time.Now()
	sl.Drain()
	_, err := k.dial(addr)
	require.ErrorIs(t, err, syscall.ECONNREFUSED)
	for _, client := range clients {
		select {
		case got := <-waiting:
			late := time.Since(start) >= tcptest.DrainWait
			require.True(t, late, "Accept has returned before the handshake: %v", got.Err)
			return false
		default:
		}
		_, err := client.Write([]byte("x"))
		require.NoError(t, err)
		late := time.Since(start) > tcptest.DrainWait/2
		got := tcptest.Receive(t, waiting, "return of Accept when the handshake is complete")
		if got.Err != nil && late {
			return false
		}
		require.NoError(t, got.Err, "a handshake has completed")
		defer got.Conn.Close()
		multipath, err := got.Conn.(*net.TCPConn).MultipathTCP()
		if k.multipath && (err != nil || !multipath) {
			t.Skip("no Multipath TCP here: ", err)
		}
		_, err = got.Conn.Write([]byte("x"))
		require.NoError(t, err)
		_, err = client.Read(make([]byte, 1))
		require.NoError(t, err, "the client has no response")
		start = time.Now()
		waiting = tcptest.Accept(sl)
	}
	tcptest.RequireDrained(t, waiting, 1)
	return true
}

// If the kernel dropped the SYN, the client would send it again a second later.
func TestNewConnectionsAreRefusedAtOnce(t *testing.T) {
	tcptest.RequireRefusal(t)
	for name, k := range kinds {
		t.Run(name, func(t *testing.T) {
			l, addr := k.listen(t, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1)
			tcptest.Wrap(t, l).Drain()
			tcptest.RequireMedian(t, 500*time.Millisecond, "times to refuse", func() time.Duration {
				start := time.Now()
				_, err := k.dial(addr)
				took := time.Since(start)
				require.ErrorIs(t, err, syscall.ECONNREFUSED)
				return took
			})
		})
	}
}

func TestDrainNeedsNoPrivilege(t *testing.T) {
	t.Parallel()
	tcptest.RequireRefusal(t)
	l := tcptest.Listen(t)
	sl := tcptest.Wrap(t, l)
	withoutCapabilities(t, sl.Drain)
	tcptest.RequireRefused(t, l)
	tcptest.RequireDrained(t, tcptest.Accept(sl), 1)
}

// While one of two sockets at the same address is drained, the kernel may still choose it for a new
// connection. It drops the SYN then, and the client sends it again a second later.
func TestDrainOfOneOfTwoSocketsAtTheSameAddressFailsNoClient(t *testing.T) {
	tcptest.SkipIfShort(t, "takes more than a second")
	t.Parallel()
	tcptest.RequireRefusal(t)
	config := withOption(syscall.SOL_SOCKET, soReusePort, 1)
	drained, err := config.Listen(context.Background(), "tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	defer drained.Close()
	addr := drained.Addr().String()
	stays, err := config.Listen(context.Background(), "tcp4", addr)
	require.NoError(t, err)
	defer stays.Close()

	var served atomic.Int64
	returned := make(chan error, 1)
	serve := func(l net.Listener) {
		for {
			conn, err := l.Accept()
			if err != nil {
				returned <- err
				return
			}
			go echo(t, conn)
		}
	}
	sl := tcptest.Wrap(t, drained)
	go serve(sl)
	go serve(stays)
	stopLoad := tcptest.Loop(t, 8, func() bool {
		conn, err := net.DialTimeout("tcp", addr, tcptest.Patience)
		if !assert.NoError(t, err, "a client cannot connect, although another socket listens") {
			return false
		}
		defer conn.Close()
		served.Add(1)
		return assert.NoError(t, exchange(conn, "request"), "a connection has no response")
	})
	await := func(n int64) {
		enough := served.Load() + n
		tcptest.Await(t, "more connections", func() bool { return served.Load() >= enough })
	}
	await(500)
	sl.Drain()
	err = tcptest.Receive(t, returned, "return of the accept loop after Drain")
	tcptest.RequireStoppedError(t, err)
	require.NoError(t, drained.Close())
	await(500)
	stopLoad() // waits for the clients that send a SYN again
}

// Accept keeps returning connections for some time, but not forever.
func TestConnectionsThatASocketBoundToADeviceDoesNotRefuse(t *testing.T) {
	t.Parallel()
	sl, drain := wrapBoundToDevice(t)
	tcptest.RequireAcceptsUntilStopped(t, sl, drain)
}

func TestSlowLoopOnASocketBoundToADevice(t *testing.T) {
	t.Parallel()
	sl, drain := wrapBoundToDevice(t)
	drain()
	tcptest.Dial(t, sl) // not refused
	time.Sleep(tcptest.DrainWait * 6 / 5)
	tcptest.RequireDrained(t, tcptest.Accept(sl), 1) // the time is counted from Drain
}

// wrapBoundToDevice wraps a socket. The drain that it returns calls Drain, which cannot make
// the system refuse connections there.
func wrapBoundToDevice(t *testing.T) (sl *stoppablelistener.StoppableListener, drain func()) {
	lo, err := net.InterfaceByName("lo")
	require.NoError(t, err)
	l, _ := kinds["TCP"].listen(t, syscall.SOL_SOCKET, soBindToIfindex, lo.Index)
	sl = tcptest.Wrap(t, l)
	return sl, func() { withoutCapabilities(t, sl.Drain) }
}

// withoutCapabilities calls f in a thread that has no capabilities, and ends with its goroutine.
func withoutCapabilities(t testing.TB, f func()) {
	onOwnThread(t, func() error {
		const version3 = 0x20080522 // _LINUX_CAPABILITY_VERSION_3
		header := struct {
			version uint32
			thread  int32 // zero is this one
		}{version: version3}
		var none [2]struct{ effective, permitted, inheritable uint32 }
		_, _, errno := syscall.RawSyscall(syscall.SYS_CAPSET,
			uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&none)), 0)
		if errno != 0 {
			return os.NewSyscallError("capset", errno)
		}
		f()
		return nil
	})
}

// onOwnThread calls f in a thread that nothing else uses, now or later.
func onOwnThread(t testing.TB, f func() error) {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // without UnlockOSThread, the thread ends with the goroutine
		done <- f()
	}()
	require.NoError(t, tcptest.Receive(t, done, "end of the thread"))
}
