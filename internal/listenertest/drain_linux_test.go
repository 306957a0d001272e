package listenertest_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
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
	"TCP":             {"tcp4", "127.0.0.1:0", "127.0.0.1", false},
	"Multipath TCP":   {"tcp4", "127.0.0.1:0", "127.0.0.1", true},
	"IPv6":            {"tcp6", "[::1]:0", "::1", false},
	"wildcard":        {"tcp4", ":0", "127.0.0.1", false},
	"both, with IPv4": {"tcp", ":0", "127.0.0.1", false},
	"both, with IPv6": {"tcp", ":0", "::1", false},
	"IPv4-mapped":     {"mapped", "", "127.0.0.1", false},
}

// listen listens on a socket of that kind, and returns the address for clients. It skips the test
// if the machine has no such socket.
func (k kind) listen(t *testing.T, level, option, value int) (l *net.TCPListener, addr string) {
	var listener net.Listener
	var err error
	if k.network == "mapped" {
		listener, err = listenMapped(level, option, value)
	} else {
		config := withOption(level, option, value)
		config.SetMultipathTCP(k.multipath)
		listener, err = config.Listen(context.Background(), k.network, k.addr)
	}
	if err != nil {
		t.Skip("no such socket: ", err)
	}
	t.Cleanup(func() { listener.Close() })
	_, port, err := net.SplitHostPort(listener.Addr().String())
	require.NoError(t, err)
	return listener.(*net.TCPListener), net.JoinHostPort(k.dialAddr, port)
}

// listenMapped binds an IPv6 socket to an IPv4 address, which package net never does.
func listenMapped(level, option, value int) (net.Listener, error) {
	fd, err := syscall.Socket(syscall.AF_INET6, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	file := os.NewFile(uintptr(fd), "mapped")
	defer file.Close()
	addr := syscall.SockaddrInet6{Addr: [16]byte(net.IPv4(127, 0, 0, 1))}
	if err := errors.Join(
		syscall.SetsockoptInt(fd, syscall.IPPROTO_IPV6, syscall.IPV6_V6ONLY, 0),
		syscall.SetsockoptInt(fd, level, option, value),
		syscall.Bind(fd, &addr),
		syscall.Listen(fd, syscall.SOMAXCONN),
	); err != nil {
		return nil, err
	}
	return net.FileListener(file)
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

// listenDeferred listens on a socket on which a handshake lasts until the client sends a byte.
func (k kind) listenDeferred(t *testing.T) (l *net.TCPListener, addr string) {
	return k.listen(t, syscall.IPPROTO_TCP, syscall.TCP_DEFER_ACCEPT, 10)
}

// startHandshake connects a client whose handshake completes when it sends a byte.
func (k kind) startHandshake(t *testing.T, addr string) *net.TCPConn {
	client, err := k.dial(addr)
	require.NoError(t, err)
	t.Cleanup(func() { client.Close() })
	return client
}

// requireServed sends a byte as the client, which is still in the handshake or pending, and as
// the connection that is accepted.
func requireServed(t *testing.T, client net.Conn, waiting <-chan tcptest.Accepted) net.Conn {
	t.Helper()
	_, err := client.Write([]byte("x"))
	require.NoError(t, err)
	got := tcptest.Receive(t, waiting, "return of Accept when the handshake is complete")
	requireResponse(t, client, got)
	return got.Conn
}

// requireLastServed is requireServed for the last client. Two goroutines are in Accept: when one of
// them has taken the connection, the other may be the first to return.
func requireLastServed(t *testing.T, client net.Conn, waiting <-chan tcptest.Accepted) {
	t.Helper()
	_, err := client.Write([]byte("x"))
	require.NoError(t, err)
	got := tcptest.Receive(t, waiting, "return of Accept when the last handshake is complete")
	other := tcptest.Receive(t, waiting, "return of the other Accept")
	if got.Err != nil {
		got, other = other, got
	}
	requireResponse(t, client, got)
	require.Equal(t, stoppablelistener.StoppedError, other.Err)
}

// requireResponse sends a byte on the connection that was accepted to its client.
func requireResponse(t *testing.T, client net.Conn, got tcptest.Accepted) {
	t.Helper()
	require.NoError(t, got.Err, "a handshake has completed")
	t.Cleanup(func() { got.Conn.Close() })
	_, err := got.Conn.Write([]byte("x"))
	require.NoError(t, err)
	require.NoError(t, client.SetReadDeadline(time.Now().Add(tcptest.Patience)))
	_, err = client.Read(make([]byte, 1))
	require.NoError(t, err, "the client has no response")
}

// requireNotYet requires results to be empty.
func requireNotYet(t *testing.T, results <-chan tcptest.Accepted, what string) {
	t.Helper()
	select {
	case got := <-results:
		require.FailNow(t, "Accept has returned before "+what, "%v", got.Err)
	default:
	}
}

const (
	// maxHandshake is the time from Drain during which Accept waits for handshakes.
	maxHandshake = 2 * time.Second

	// soon is longer than a drain takes that waits for nothing, and shorter than one that waits
	// for maxHandshake.
	soon = maxHandshake / 2
)

func TestAcceptWaitsForHandshakesAfterDrain(t *testing.T) {
	t.Parallel()
	tcptest.RequireRefusal(t)
	for name, k := range kinds {
		lasts := tcptest.BlindWait * 3 / 2
		if name == "TCP" && !testing.Short() {
			lasts = 1200 * time.Millisecond
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			retryIfLate(t, func() (inTime bool) {
				l, addr := k.listenDeferred(t)
				sl := tcptest.Wrap(t, l)
				first, second := k.startHandshake(t, addr), k.startHandshake(t, addr)
				waiting := tcptest.AcceptMany(sl, 3)
				tcptest.AwaitAcceptors(t, 3)
				start := time.Now()
				sl.Drain()
				_, err := k.dial(addr)
				require.ErrorIs(t, err, syscall.ECONNREFUSED)
				time.Sleep(lasts)
				if time.Since(start) > maxHandshake*3/4 {
					return false
				}
				requireNotYet(t, waiting, "the handshakes")
				conn := requireServed(t, first, waiting)
				requireLastServed(t, second, waiting)
				multipath, err := conn.(*net.TCPConn).MultipathTCP()
				if k.multipath && (err != nil || !multipath) {
					t.Skip("no Multipath TCP here: ", err)
				}
				return true
			})
		})
	}
}

// retryIfLate calls f until it returns true: it returns false if the machine was so busy that a
// time was over that f depends on.
func retryIfLate(t *testing.T, f func() (inTime bool)) {
	t.Helper()
	for attempt := 1; !f(); attempt++ {
		require.Less(t, attempt, 10, "the machine is too slow")
	}
}

// The list of the kernel does not fit into one message then.
func TestAcceptWaitsForManyHandshakesAfterDrain(t *testing.T) {
	t.Parallel()
	tcptest.RequireRefusal(t)
	k := kinds["TCP"]
	retryIfLate(t, func() (inTime bool) {
		l, addr := k.listenDeferred(t)
		sl := tcptest.Wrap(t, l)
		clients := make([]net.Conn, 1000)
		start := time.Now()
		for i := range clients {
			clients[i] = k.startHandshake(t, addr)
		}
		if time.Since(start) > 2*maxHandshake { // the first handshakes may complete by themselves soon
			return false
		}
		start = time.Now()
		sl.Drain()
		waiting := tcptest.Accept(sl)
		time.Sleep(tcptest.BlindWait / 4) // Accept looks for the first time
		late := func() bool { return time.Since(start) > maxHandshake*3/4 }
		for _, client := range clients[1:] {
			if late() {
				return false
			}
			requireServed(t, client, waiting)
			waiting = tcptest.Accept(sl)
		}
		time.Sleep(tcptest.BlindWait) // Accept looks again
		if late() {
			return false
		}
		requireServed(t, clients[0], waiting)
		tcptest.RequireDrained(t, tcptest.Accept(sl), 1)
		return true
	})
}

// A handshake that completes moves to the accept queue, when Accept may be about to return
// StoppedError.
func TestHandshakesThatCompleteAtTheEndOfDrain(t *testing.T) {
	t.Parallel()
	tcptest.RequireRefusal(t)
	k := kinds["TCP"]
	for range 4 {
		const n = 16
		done := make(chan error, n)
		for i := range n {
			l, addr := k.listenDeferred(t)
			sl := tcptest.Wrap(t, l)
			client := k.startHandshake(t, addr)
			go func() {
				sl.Drain()
				time.Sleep(4*time.Millisecond + time.Duration(i)*200*time.Microsecond)
				done <- exchange(client, "x")
			}()
			go func() {
				for {
					conn, err := sl.Accept()
					if err != nil {
						return
					}
					go echo(t, conn)
				}
			}()
		}
		for range n {
			require.NoError(t, tcptest.Receive(t, done, "response"))
		}
	}
}

func TestAcceptDoesNotWaitLongForAHandshakeThatNeverCompletes(t *testing.T) {
	tcptest.SkipIfShort(t, "takes two seconds")
	t.Parallel()
	tcptest.RequireRefusal(t)
	l, addr := kinds["TCP"].listenDeferred(t)
	sl := tcptest.Wrap(t, l)
	kinds["TCP"].startHandshake(t, addr)
	sl.Drain()
	defer tcptest.Loop(t, 1, func() bool {
		time.Sleep(10 * time.Millisecond)
		sl.Drain() // postpones nothing
		return true
	})()
	tcptest.RequireDrained(t, tcptest.Accept(sl), 1)
}

// Each of these drains takes milliseconds, unless the machine is busy.
func TestDrainEndsAtOnceIfNoHandshakeIsToBeWaitedFor(t *testing.T) {
	t.Parallel()
	tcptest.RequireRefusal(t)
	for _, tt := range []struct {
		name    string
		connect func(*testing.T, *net.TCPListener)
		age     time.Duration // of the connection
	}{
		{"idle", func(*testing.T, *net.TCPListener) {}, 0},
		{"connection that is half-open for three seconds", connectHalfOpen, 3500 * time.Millisecond},
		{"handshake with another address", func(t *testing.T, l *net.TCPListener) {
			k := kinds["TCP"]
			k.dialAddr = "127.0.0.2"
			k.addr = fmt.Sprintf("127.0.0.2:%d", l.Addr().(*net.TCPAddr).Port)
			_, addr := k.listenDeferred(t)
			k.startHandshake(t, addr)
		}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.age > 0 {
				tcptest.SkipIfShort(t, "takes more than three seconds")
			}
			t.Parallel()
			var took []time.Duration
			for range 5 {
				l := tcptest.Listen(t)
				sl := tcptest.Wrap(t, l)
				tt.connect(t, l)
				time.Sleep(tt.age)
				start := time.Now()
				sl.Drain()
				tcptest.RequireDrained(t, tcptest.Accept(sl), 1)
				took = append(took, time.Since(start))
				if took[len(took)-1] < tcptest.BlindWait {
					return
				}
			}
			require.Fail(t, "no drain ends at once", "they took %v", took)
		})
	}
}

// connectHalfOpen starts a handshake whose client ignores the SYN-ACK.
func connectHalfOpen(t *testing.T, l *net.TCPListener) {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_NONBLOCK|
		syscall.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	t.Cleanup(func() { syscall.Close(fd) })
	//lint:ignore SA1019 package x/net/bpf would be another requirement
	require.NoError(t, syscall.AttachLsf(fd, []syscall.SockFilter{
		{Code: syscall.BPF_RET | syscall.BPF_K, K: 0}, // no byte of any packet is received
	}))
	addr := syscall.SockaddrInet4{Port: l.Addr().(*net.TCPAddr).Port, Addr: [4]byte{127, 0, 0, 1}}
	require.ErrorIs(t, syscall.Connect(fd, &addr), syscall.EINPROGRESS)
}

func TestStopAndCloseInterruptADrainThatWaits(t *testing.T) {
	t.Parallel()
	tcptest.RequireRefusal(t)
	for name, interrupt := range map[string]func(*stoppablelistener.StoppableListener){
		"Stop":  (*stoppablelistener.StoppableListener).Stop,
		"Close": func(sl *stoppablelistener.StoppableListener) { sl.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			retryIfLate(t, func() (inTime bool) {
				l, addr := kinds["TCP"].listenDeferred(t)
				sl := tcptest.Wrap(t, l)
				client := kinds["TCP"].startHandshake(t, addr)
				waiting := tcptest.AcceptMany(sl, 2)
				tcptest.AwaitAcceptors(t, 2)
				start := time.Now()
				sl.Drain()
				time.Sleep(tcptest.BlindWait / 4) // Accept has looked
				interrupt(sl)
				tcptest.RequireDrained(t, waiting, 2)
				if time.Since(start) > soon {
					return false
				}
				if name == "Stop" { // the socket still accepts what is in flight
					requireServed(t, client, tcptest.Accept(tcptest.Wrap(t, l)))
				}
				return true
			})
		})
	}
}

// Without a descriptor, the kernel cannot be asked for handshakes. That lasts longer here than
// Accept waits if it can never be asked. The limit is that of this process.
func TestNoDescriptorIsFreeDuringAHandshake(t *testing.T) {
	tcptest.SkipIfShort(t, "takes half a second")
	tcptest.RequireRefusal(t)
	retryIfLate(t, func() (inTime bool) {
		l, addr := kinds["TCP"].listenDeferred(t)
		sl := tcptest.Wrap(t, l)
		client := kinds["TCP"].startHandshake(t, addr)
		var inTimeAll bool
		t.Run("", func(t *testing.T) { // which restores the limit
			files := useUpDescriptors(t)
			start := time.Now()
			sl.Drain()
			waiting := make(chan tcptest.Accepted, 1)
			go func() {
				for {
					conn, err := sl.Accept()
					if errors.Is(err, syscall.EMFILE) {
						time.Sleep(time.Millisecond)
						continue
					}
					waiting <- tcptest.Accepted{Conn: conn, Err: err}
					return
				}
			}()
			time.Sleep(tcptest.BlindWait * 3 / 2)
			for _, file := range files[:3] {
				require.NoError(t, file.Close())
			}
			if inTimeAll = time.Since(start) < maxHandshake*3/4; inTimeAll {
				requireServed(t, client, waiting)
				tcptest.RequireDrained(t, tcptest.Accept(sl), 1)
			}
		})
		return inTimeAll
	})
}

// Without the list of handshakes, Accept waits for a time, and then until the queue is empty.
func TestDrainInAnotherNetworkNamespace(t *testing.T) {
	t.Parallel()
	tcptest.RequireRefusal(t)
	requireBlindDrain(t, func() error { return syscall.Unshare(syscall.CLONE_NEWNET) })
}

// requireBlindDrain requires a drain, all of it in a thread that has been prepared, to wait for a
// handshake, and then for a slow accept loop.
func requireBlindDrain(t *testing.T, prepare func() error) {
	retryIfLate(t, func() (inTime bool) {
		l := tcptest.Listen(t)
		sl := tcptest.Wrap(t, l)
		tcptest.Dial(t, l)
		onOwnThread(t, func() error {
			if err := prepare(); err != nil {
				return err
			}
			start := time.Now()
			sl.Drain()
			time.Sleep(tcptest.BlindWait * 6 / 5)
			conn, err := sl.Accept()
			if err != nil {
				return fmt.Errorf("a connection is pending: %w", err)
			}
			conn.Close()
			if _, err := sl.Accept(); err != stoppablelistener.StoppedError {
				return err
			}
			inTime = time.Since(start) < maxHandshake
			return nil
		})
		return inTime
	})
	sl := tcptest.Wrap(t, tcptest.Listen(t))
	onOwnThread(t, func() error {
		if err := prepare(); err != nil {
			return err
		}
		start := time.Now()
		sl.Drain()
		if _, err := sl.Accept(); err != stoppablelistener.StoppedError {
			return err
		}
		if took := time.Since(start); took < tcptest.BlindWait {
			return fmt.Errorf("Accept has not waited for handshakes, only for %v", took)
		}
		return nil
	})
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

// Two processes may drain the socket. The one that is later cannot bind it to an interface again,
// and finds it bound.
func TestDrainOfASocketThatIsBeingDrained(t *testing.T) {
	t.Parallel()
	tcptest.RequireRefusal(t)
	l := tcptest.Listen(t)
	first, second := tcptest.Wrap(t, l), tcptest.Wrap(t, l)
	client := tcptest.Dial(t, l)
	withoutCapabilities(t, func() { first.Drain(); second.Drain() })
	time.Sleep(tcptest.BlindWait * 6 / 5)
	tcptest.RequireClient(t, client, tcptest.Accept(second))
	tcptest.RequireDrained(t, tcptest.Accept(second), 1)
	tcptest.RequireDrained(t, tcptest.Accept(first), 1)
}

// Each instance listens before the one before it is drained, whose socket stays open. Until a drain
// has ended, the kernel may choose its socket for a new connection. It drops the SYN then, and the
// client sends it again a second later. The handshakes with the next instance, of which there are
// always some, do not delay the drain.
func TestDrainOfInstancesAtTheSameAddressFailsNoClient(t *testing.T) {
	tcptest.SkipIfShort(t, "takes more than a second")
	t.Parallel()
	tcptest.RequireRefusal(t)
	config := &net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		_ = c.Control(func(fd uintptr) {
			err = errors.Join(
				syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, soReusePort, 1),
				syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_DEFER_ACCEPT, 10))
		})
		return err
	}}
	config.SetMultipathTCP(false)
	addr := "127.0.0.1:0"
	var served atomic.Int64
	start := func() (sl *stoppablelistener.StoppableListener, returned <-chan error) {
		l, err := config.Listen(context.Background(), "tcp4", addr)
		require.NoError(t, err)
		t.Cleanup(func() { l.Close() })
		sl = tcptest.Wrap(t, l)
		ch := make(chan error, 1)
		go func() {
			for {
				conn, err := sl.Accept()
				if err != nil {
					ch <- err
					return
				}
				go echo(t, conn)
			}
		}()
		return sl, ch
	}
	sl, returned := start()
	addr = sl.Addr().String()
	stopLoad := tcptest.Loop(t, 32, func() bool {
		start := time.Now()
		conn, err := net.DialTimeout("tcp", addr, tcptest.Patience)
		if !assert.NoError(t, err, "a client cannot connect, although another socket listens") {
			return false
		}
		defer conn.Close()
		time.Sleep(150 * time.Millisecond) // in the handshake
		err = exchange(conn, "request")
		served.Add(1)
		if time.Since(start) > maxHandshake*3/4 {
			return true // the machine is busy
		}
		return assert.NoError(t, err, "a connection has no response")
	})
	await := func(n int64) {
		t.Helper()
		enough := served.Load() + n
		tcptest.Await(t, "more connections", func() bool { return served.Load() >= enough })
	}
	var took []time.Duration
	for range 2 {
		await(20)
		next, nextReturned := start()
		await(20)
		start := time.Now()
		sl.Drain()
		err := tcptest.Receive(t, returned, "return of the accept loop after Drain")
		took = append(took, time.Since(start))
		tcptest.RequireStoppedError(t, err)
		sl, returned = next, nextReturned
	}
	await(20)
	stopLoad() // waits for the clients that send a SYN again

	require.Less(t, slices.Min(took), soon, "drains took %v", took)
}

// Accept keeps returning connections for some time, but not forever.
func TestConnectionsThatASocketBoundToADeviceDoesNotRefuse(t *testing.T) {
	t.Parallel()
	lo, err := net.InterfaceByName("lo")
	require.NoError(t, err)
	l, _ := kinds["TCP"].listen(t, syscall.SOL_SOCKET, soBindToIfindex, lo.Index)
	sl := tcptest.Wrap(t, l)
	tcptest.RequireAcceptsUntilStopped(t, sl, func() { withoutCapabilities(t, sl.Drain) })
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
