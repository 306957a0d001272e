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
			if err := ignoreOptions(soBindToIfindex); err != nil {
				return err
			}
			sl.Drain()
			return nil
		})
	})
}

// ignoreOptions lets setsockopt with that option return zero and do nothing, in this thread.
func ignoreOptions(option uint32) error {
	const (
		load                      = syscall.BPF_LD | syscall.BPF_W | syscall.BPF_ABS
		jumpIfEqual               = syscall.BPF_JMP | syscall.BPF_JEQ | syscall.BPF_K
		result                    = syscall.BPF_RET | syscall.BPF_K
		callOffset, optnameOffset = 0, 32                 // in struct seccomp_data
		returnZero, allow         = 5 << 16, 0x7fff << 16 // SECCOMP_RET_ERRNO, SECCOMP_RET_ALLOW
	)
	filter := []syscall.SockFilter{
		{Code: load, K: callOffset},
		{Code: jumpIfEqual, K: syscall.SYS_SETSOCKOPT, Jf: 3},
		{Code: load, K: optnameOffset},
		{Code: jumpIfEqual, K: option, Jf: 1},
		{Code: result, K: returnZero},
		{Code: result, K: allow},
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
