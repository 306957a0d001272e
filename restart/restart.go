// Package restart restarts a TCP server with zero downtime.
//
// On SIGUSR2, it starts the program, or its new version, in a new process, which inherits the
// listening sockets. Once that is ready, the serving process shuts down gracefully. New
// connections are neither refused nor reset. The program calls [Run] with a function that serves:
//
//	func serve(ctx context.Context, p *restart.Process) error {
//		l, err := p.Listen("tcp", ":8080") // inherited, in a new process
//		if err != nil {
//			return err
//		}
//		p.Ready()                                  // this is the serving process now
//		return httpdrain.New(server).Serve(ctx, l) // until it is replaced or signaled
//	}
//
// Any other server calls [Listener.Drain] when ctx is done, shuts down gracefully, and returns.
//
// # Processes
//
// The parent is the process that is started first. It starts all others, its children, and runs
// until the service is stopped. So supervisors, containers and shells, which know its process
// ID, see one service, unlike with packages whose parent exits after each restart (tableflip,
// endless). The serving process is the parent until the first restart, and then the child that
// has become ready last. A new process is a child that is not ready yet.
//
// A child has the arguments, the environment and the working directory that the parent was
// started with, whatever main changes, and its standard streams. It runs os.Args[0], relative to
// that directory or found in that PATH. A script that starts the program, or replaces it, must end
// in exec.
//
// To deploy by a symbolic link to the current release, start the program by a path that contains
// the link, or in that directory. The name of the directory is taken from PWD, which shells set;
// a unit for systemd needs Environment=PWD=/srv/current with WorkingDirectory=/srv/current.
//
// # Signals
//
// Send signals to the parent, whose process ID is [Process.Pid]. SIGINT and SIGTERM stop the
// service; a second one kills it, unless it comes within 100 ms, as with timeout, npm or Ctrl+C.
// If the serving process is signaled itself, the service is stopped too, unless it is replaced at
// that time. SIGUSR2 has an effect once Run has called serve; before the Go runtime has started,
// it kills the process.
//
// After the first restart, the parent passes SIGHUP and SIGUSR1 (logrotate) on to the serving
// process. One sent to the process group reaches that twice. SIGINT and SIGHUP stay ignored if
// they were (nohup, or & in a script).
//
// If the parent is killed, the serving process shuts down gracefully, and a new process exits at
// once, so that a supervisor can start the service again.
//
// # Supervisors
//
// A unit for systemd (Type may also be exec, or notify if the program sends READY=1):
//
//	[Service]
//	Type=simple
//	ExecStart=/usr/local/bin/server
//	ExecReload=/bin/kill -USR2 $MAINPID
//
// With it, systemctl reload restarts the server; the log shows whether that has failed. Other
// commands are sv 2 server (runit), s6-svc -2 server, supervisorctl signal USR2 server, and
// docker kill --signal USR2 server. Not supported are Type=notify-reload (use notify) and
// WatchdogSec: systemd expects their notifications from the parent, which sends none. With
// NotifyAccess=all, children can send others. With a socket unit (ListenStream=8080), systemctl
// restart refuses no connection either: they stay in the accept queue until the next start. But
// systemd closes the socket if there are more starts than StartLimitBurst.
//
// # Limitations
//
//   - Only Unix systems can restart. On others, Run serves until [os.Interrupt].
//   - During a restart, up to three processes run, and more if old ones still serve requests. If
//     there is not enough memory for them, the system may kill the parent. What only one process
//     can have, such as a file lock, must be taken after Ready, as in the example Lock of Run.
//   - The parent keeps running the version of the program, with the limits and as the user, that
//     it was started with. What packages and main start there, such as periodic tasks and metrics,
//     never stops: start it in serve. When serve returns, unused memory is returned to the system.
//   - A restart cannot change a wildcard address to a specific one, or back, or its network: they
//     conflict while the old socket is open.
//   - Descriptors that a supervisor passes, such as s6's for notifications, are the parent's only.
//   - In a container, where the parent is process 1, processes that outlive the children that
//     started them become zombies; docker run --init avoids that.
package restart

import (
	"context"
	"net"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/c2db162c/stoppablelistener"
	"github.com/c2db162c/stoppablelistener/internal/replaced"
)

// ErrReplaced is the cause of a context if another process serves from now on:
//
//	errors.Is(context.Cause(ctx), restart.ErrReplaced)
//
// Package httpdrain knows it, and then skips its Delay. A readiness probe must not fail then, since
// the service is ready. With any other cause, this process is being stopped: with the service,
// because it was signaled itself, or because its parent was killed.
var ErrReplaced = replaced.Err

// A Process is what [Run] passes to serve: the listening sockets of the running process, and
// its part in restarts. Multiple goroutines may invoke its methods simultaneously.
type Process struct {
	// ListenConfig creates the sockets that are not inherited. Set it before the first call of
	// Listen. Inherited sockets have the options that Control has set when they were created;
	// KeepAlive and KeepAliveConfig have no effect on their connections.
	ListenConfig net.ListenConfig

	role role
}

// A role is that of the parent or that of a child.
type role interface {
	run(serve func(context.Context) error) error
	listen(config *net.ListenConfig, network, address string) (
		l *net.TCPListener, activated bool, err error)
	ready()
	endsService() bool // the service is being stopped, for which a child may have to wait
	pid() int
}

// Run calls serve, and restarts the program on SIGUSR2. In the parent, it returns after all
// children have exited. It returns the error of serve, unless the parent has been replaced by
// then; see below. Call it once, from main, and exit when it returns.
//
// The function serve listens with p.Listen, calls p.Ready, and accepts connections. When ctx is
// done, it calls the listener's Drain, shuts down gracefully, and returns; there is no limit on
// how long that may take. It must not call [os.Exit] or [log.Fatal]: in the parent, even if that
// has been replaced, that would end the service. [context.Cause](ctx) is [ErrReplaced], with the
// text "user defined signal 2", if another process serves. Otherwise, its text is the name of the
// signal ("interrupt" or "terminated"), or "parent process exited".
//
// On SIGINT or SIGTERM, ctx is done in all processes. If the serving process is a child, and
// then exits with a status other than 0, Run calls os.Exit with the same status in the parent. A
// new process that is not ready is killed a second after the serving process has exited. On a
// second SIGINT or SIGTERM, more than 100 ms later, Run kills the children and calls os.Exit(1).
// The program may be notified of all signals that Run handles, but must not call
// [os/signal.Reset] or [os/signal.Ignore] for them.
//
// On SIGUSR2, Run starts a new process, with the sockets that Listen keeps. Once that has called
// Ready, ctx is done in the serving process, and an error that serve returns there is reported.
// If SIGUSR2 arrives while the parent or a new process is not ready, that is reported, and it
// takes effect later.
//
// A restart fails if the new process cannot be started or exits, if it is not ready within a
// minute (then it is killed), or if the parent cannot receive its sockets. Then the reason is
// reported, and the serving process keeps serving. Reports are printed with package log. A process
// that exits waits up to a second for that; nothing else does.
//
// If serve returns before ctx is done in the serving process, the service stops. If that is a
// child, Run returns an error in the parent, unless the child's exit status is 0, or unknown
// because something else has waited for it.
//
// Run also disables SIGPIPE, so that a program in a pipeline can shut down gracefully after
// Ctrl+C: a write to a closed pipe returns an error even on standard output.
func Run(serve func(ctx context.Context, p *Process) error) error {
	p := &Process{role: newRole()}
	return p.role.run(func(ctx context.Context) error { return serve(ctx, p) })
}

// Listen returns the inherited socket for the address, from the parent or from socket
// activation, and otherwise listens on it as ListenConfig says. The network must be "tcp",
// "tcp4" or "tcp6". Call it for each port, also one for metrics: with [net.Listen], a new process
// finds the address in use.
//
// A socket from the parent is found by the network and address that were passed to Listen
// before the restart, even if the port is 0. If there is none, a socket is found by the address
// that it is bound to. If that is a specific IP address, the network's name does not matter. For
// each network, ":8080", "0.0.0.0:8080" and "[::]:8080", which mean all interfaces, are the same.
// Sockets of socket activation that are not TCP listeners are closed.
//
// Call Listen before Ready: it keeps a duplicate of the socket for the next new process. A later
// Listen keeps none, and the next new process finds the address in use. The port stays open, even
// if the caller closes the listener, until the service is stopped or a new process has called Ready
// without having called Listen for it. The latter resets the connections in the accept queue.
func (p *Process) Listen(network, address string) (*Listener, error) {
	switch network {
	case "tcp", "tcp4", "tcp6":
	default:
		return nil, net.UnknownNetworkError(network)
	}
	tcp, activated, err := p.role.listen(&p.ListenConfig, network, address)
	if err != nil {
		return nil, err
	}
	sl, err := stoppablelistener.New(tcp)
	if err != nil {
		return nil, err
	}
	return &Listener{sl, p.role, activated}, nil
}

// Ready reports that this process can accept connections. A new process then becomes the serving
// process, unless the restart fails. So first do what can fail, such as loading the certificates
// that ServeTLS would load, but not what waits for the old process, such as taking its lock.
//
// A new process that accepts connections before Ready aborts them if the parent is killed. Ready
// closes the inherited sockets that Listen has not returned. It does nothing after the first call,
// and once the context that Run has passed to serve is done.
func (p *Process) Ready() { p.role.ready() }

// Pid returns the process ID of the parent, in the parent and in its children. It is that of the
// service: signals are sent to it, and it belongs in a PID file. In the parent, it is equal to
// [os.Getpid]().
func (p *Process) Pid() int { return p.role.pid() }

// A Listener is a [stoppablelistener.StoppableListener] whose Drain calls Stop if another process
// may serve the socket next. [Process.Listen] returns it.
type Listener struct {
	*stoppablelistener.StoppableListener
	role      role
	activated bool // the service manager has the socket too
}

// Drain stops the accept loop. Call it when the context that Run has passed to serve is done, or
// later, for example with [context.AfterFunc]; package httpdrain does so. It may be called any
// number of times.
//
// If the service is being stopped, it is the Drain of the StoppableListener, which affects each
// process that has the socket: clients are served or refused. Otherwise, it is the Stop of the
// StoppableListener, and connections stay in the accept queue for the process that serves next:
//
//   - if that context is not done, or if its cause is [ErrReplaced];
//   - if the socket comes from socket activation;
//   - in a child whose parent exits, since it does not know who else has the socket;
//   - in a child that is signaled itself and is replaced, or is not ready yet.
//
// In a child that is signaled itself, Drain waits until the parent tells it whether the service is
// being stopped. That takes milliseconds, unless a restart is going on or the parent is suspended:
// then it takes until that ends. Connections are accepted meanwhile.
//
// On systems other than Unix, it is always the Drain of the StoppableListener.
func (l *Listener) Drain() {
	if !l.activated && l.role.endsService() {
		l.StoppableListener.Drain()
	} else {
		l.Stop()
	}
}

// A signalError is the cause of a context that is done because of a signal.
type signalError struct{ os.Signal }

func (e signalError) Error() string { return e.String() }

// mergeTimeout is for how long a signal counts as the same as the one before. A process may be
// signaled alone and with its group, as by timeout, or as an effect of Ctrl+C by npm and its like.
const mergeTimeout = 100 * time.Millisecond

// onStopSignals calls stop on the first SIGINT or SIGTERM and kill on the second, until the
// function that it returns is called.
func onStopSignals(stop func(os.Signal), kill func()) (end func()) {
	signals := make(chan os.Signal, 2)
	notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		stop(<-signals)
		await(nil, mergeTimeout)
		for len(signals) > 0 {
			<-signals
		}
		<-signals
		kill()
	}()
	return func() { signal.Stop(signals) }
}

// notify is signal.Notify without the signals that are ignored: a shell without job control starts
// a program in the background so, and nohup does.
func notify(ch chan<- os.Signal, signals ...os.Signal) {
	for _, sig := range signals {
		if !signal.Ignored(sig) {
			signal.Notify(ch, sig)
		}
	}
}

// await reports whether ch is closed in time. When the time is over, this process may have been
// suspended, and may be about to close ch because of what has happened meanwhile. So await checks
// again after a shorter time, until that has taken no longer than expected.
func await(ch <-chan struct{}, timeout time.Duration) bool {
	again := min(timeout, time.Second) / 4
	for wait := timeout; ; wait = again {
		start := time.Now()
		select {
		case <-ch:
			return true
		case <-time.After(wait):
		}
		if wait == again && time.Since(start) < 2*again {
			return closed(ch)
		}
	}
}

func closed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}
