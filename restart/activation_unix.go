//go:build unix

package restart

import (
	"os"
	"strconv"
	"syscall"
)

// firstFD is the first descriptor after the standard streams. Sockets are passed from there on.
const firstFD = 3

// A descriptor is one that this process was started with.
type descriptor struct {
	fd   int
	name string
	stat syscall.Stat_t // before main, which may close it and open something else
}

// newDescriptor is called before main. No process that is started inherits the descriptor.
func newDescriptor(fd int, name string) descriptor {
	syscall.CloseOnExec(fd)
	d := descriptor{fd: fd, name: name}
	_ = syscall.Fstat(fd, &d.stat)
	return d
}

// isUnchanged reports whether the descriptor is still that of the same file.
func (d descriptor) isUnchanged() bool {
	var stat syscall.Stat_t
	err := syscall.Fstat(d.fd, &stat)
	return err == nil &&
		stat.Dev == d.stat.Dev && stat.Ino == d.stat.Ino && stat.Mode == d.stat.Mode
}

// activationEnv are the environment variables of socket activation; see sd_listen_fds(3).
var activationEnv = []string{"LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES"}

// activation are the sockets that socket activation has passed to this process.
var activation = activatedSockets()

// activatedSockets is called before main.
func activatedSockets() (sockets []descriptor) {
	for fd := firstFD; fd < firstFD+activated(); fd++ {
		d := newDescriptor(fd, activatedMark)
		if d.stat.Mode == 0 { // not open
			break
		}
		if isSocket(fd) {
			sockets = append(sockets, d)
		}
	}
	return sockets
}

// activated returns how many descriptors socket activation has passed to this process.
func activated() int {
	if os.Getenv("LISTEN_PID") != strconv.Itoa(os.Getpid()) {
		return 0
	}
	n, _ := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	return max(n, 0)
}

// takeActivation returns the sockets of socket activation, unless main has taken them.
func takeActivation() (sockets []descriptor) {
	if activated() > 0 {
		sockets = activation
	}
	activation = nil
	for _, key := range activationEnv {
		_ = os.Unsetenv(key)
	}
	return sockets
}

func isSocket(fd int) bool {
	_, err := syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_TYPE)
	return err == nil
}
