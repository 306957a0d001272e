//go:build amd64 || arm64

package listenertest_test

import (
	"os"
	"runtime"
	"syscall"
	"testing"
	"unsafe"

	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

// In gVisor, setting an option that it does not know succeeds and has no effect. A filter of system
// calls does the same here.
func TestConnectionsThatASandboxDoesNotRefuse(t *testing.T) {
	t.Parallel()
	l := tcptest.Listen(t)
	sl := tcptest.Wrap(t, l)
	tcptest.RequireAcceptsUntilStopped(t, sl, func() {
		onOwnThread(t, func() error {
			err := filterCalls(syscall.SYS_SETSOCKOPT, 2, soBindToIfindex, 0)
			if err != nil {
				return err
			}
			sl.Drain()
			return nil
		})
	})
}

// RestrictAddressFamilies of systemd does this, for example.
func TestDrainInASandboxWithoutNetlink(t *testing.T) {
	t.Parallel()
	tcptest.RequireRefusal(t)
	requireBlindDrain(t, func() error {
		return filterCalls(syscall.SYS_SOCKET, 0, syscall.AF_NETLINK, syscall.EAFNOSUPPORT)
	})
}

// filterCalls lets a system call with that argument return result and do nothing, in this thread.
func filterCalls(call, argument int, value uint32, result syscall.Errno) error {
	const (
		load                  = syscall.BPF_LD | syscall.BPF_W | syscall.BPF_ABS
		jumpIfEqual           = syscall.BPF_JMP | syscall.BPF_JEQ | syscall.BPF_K
		ret                   = syscall.BPF_RET | syscall.BPF_K
		callOffset, argOffset = 0, 16                 // in struct seccomp_data
		returnErrno, allow    = 5 << 16, 0x7fff << 16 // SECCOMP_RET_ERRNO, SECCOMP_RET_ALLOW
	)
	filter := []syscall.SockFilter{
		{Code: load, K: callOffset},
		{Code: jumpIfEqual, K: uint32(call), Jf: 3},
		{Code: load, K: argOffset + 8*uint32(argument)},
		{Code: jumpIfEqual, K: value, Jf: 1},
		{Code: ret, K: returnErrno | uint32(result)},
		{Code: ret, K: allow},
	}
	program := syscall.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	const setNoNewPrivs, setSeccomp, modeFilter = 38, 22, 2 // PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP
	_, _, errno := syscall.RawSyscall(syscall.SYS_PRCTL, setNoNewPrivs, 1, 0)
	if errno == 0 {
		_, _, errno = syscall.RawSyscall(syscall.SYS_PRCTL, setSeccomp, modeFilter,
			uintptr(unsafe.Pointer(&program)))
	}
	runtime.KeepAlive(filter)
	if errno != 0 {
		return os.NewSyscallError("prctl", errno)
	}
	return nil
}
