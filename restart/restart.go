// Package restart restarts a TCP server with zero downtime.
//
// On SIGUSR2, it starts the program, or its new version, in a new process, which inherits the
// listening sockets. Once that is ready, the serving process shuts down gracefully. New
// connections are neither refused nor reset:
//
//	err := restart.Run(func(ctx context.Context, p *restart.Process) error {
//		sl, err := p.Listen("tcp", ":8080") // inherited, in a child
//		...                                 // accept connections from sl
//		p.Ready()                           // this is the serving process now
//		<-ctx.Done()                        // signaled, or replaced by a new process
//		p.Stop(sl)                          // the accept loop returns
//		...                                 // shut down gracefully, and return
//	})
//
// When the service is stopped, [Process.Stop] resets none either, within the limits of
// [stoppablelistener.StoppableListener.Drain]. Then close the open connections with package
// httpdrain, or with the graceful shutdown of another server. The example of [Run] is a
// complete program.
//
// # Processes
//
// The parent is the process that is started first. It starts all others, its children. The
// serving process is the parent until the first restart, and then the child that has become
// ready last. A new process is a child that is not ready yet.
//
// The parent runs until the service is stopped, although after the first restart it only starts
// and stops children. Supervisors, containers and shells know its process ID, and take its exit
// for that of the service. So no PID file is needed, and no process becomes an orphan, unlike
// with packages whose parent exits after each restart (tableflip, endless).
//
// A child has the arguments, the environment and the working directory that the parent was
// started with. The parent may change its own in main: they are taken when this package is
// initialized. The program is that at os.Args[0], relative to this directory or found in this
// PATH. Standard streams are those of the parent. In a child, the descriptors from 3 on are its
// sockets, so only the parent can use others that a supervisor passes, such as s6's for
// notifications.
//
// To deploy by a symbolic link to the current release, start the program by a path that contains
// the link, or in that directory. The name of the directory is taken from PWD, which shells set;
// a unit for systemd then needs Environment=PWD=/srv/current with WorkingDirectory=/srv/current.
//
// # Signals
//
// Send signals to the parent, whose process ID is [Process.Pid]. SIGINT and SIGTERM stop the
// service; a second one kills it. One that is delivered to the parent and its children counts
// once, as when Ctrl+C is typed or systemd stops the service. SIGUSR2 has an effect once Run has
// called serve. If it arrives before the Go runtime has started, it kills the process.
//
// After the first restart, the parent passes SIGHUP and SIGUSR1, which logrotate sends for
// example, on to the serving process; not SIGHUP if that is ignored, as with nohup. A new process
// does not get those that arrive before it is ready.
//
// The program may be notified of all these signals too, but must not call [os/signal.Reset] or
// [os/signal.Ignore] for them: they would lose their effect on the service.
//
// If the parent is killed, a new process exits with status 1 at once, and the other children
// shut down gracefully, so that a supervisor can start the service again. If the serving process
// is a child and exits, whatever the reason, the service is stopped.
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
// With it, systemctl reload restarts the server. It reports only whether the signal was sent;
// the log shows whether the restart failed. Other commands that send the signal are sv 2 server
// (runit), supervisorctl signal USR2 server, and docker kill --signal USR2 server. If a shell
// script starts the program, it must do so with exec.
//
// Listen also returns the sockets of systemd's socket activation. With these, systemctl restart
// does not refuse connections either: they stay in the accept queue until the service accepts
// again. That requires a socket unit:
//
//	[Socket]
//	ListenStream=8080
//
// # Load balancers
//
// A load balancer keeps sending connections until it has noticed that the service is stopped.
// A restart needs no such delay, because another process already serves:
//
//	<-ctx.Done()
//	if !errors.Is(context.Cause(ctx), restart.ErrReplaced) {
//		drainer.DisableKeepAlives()
//		time.Sleep(delay)
//	}
//	p.Stop(sl)
//
// # Limitations
//
//   - Only Unix systems can restart. On others, Run serves until [os.Interrupt].
//   - During a restart, two processes run. If the program needs what only one process can have,
//     such as a file lock or a port that is not opened with Listen, the new process fails, and
//     the serving process keeps serving.
//   - A new process has a minute to call Ready.
//   - A framework must be able to serve a listener that it has not opened.
//   - The parent keeps running the version of the program that it was started with, and its
//     limits and user are those of all children.
//   - A restart cannot change a wildcard address to a specific one, or back, or its network: they
//     conflict while the old socket is open.
//   - A restart fails if the working directory has been removed, or cannot be entered.
//   - Run closes sockets of socket activation that are not TCP listeners.
//   - With systemd, notifications from children require NotifyAccess=all. WatchdogSec is not
//     supported, because systemd expects its notifications from the parent.
//   - In a container, where the parent is process 1, processes that outlive the children that
//     started them become zombies; docker run --init avoids that.
package restart

import (
	"context"
	"net"
	"os"

	"github.com/c2db162c/stoppablelistener"
	"github.com/c2db162c/stoppablelistener/internal/replaced"
)

// ErrReplaced is the cause of a context if another process serves from now on:
//
//	errors.Is(context.Cause(ctx), restart.ErrReplaced)
//
// With any other cause, this process is being stopped: with the service, or because it was
// signaled alone, or because its parent was killed.
var ErrReplaced = replaced.Err

// A Process is what [Run] passes to serve: the listening sockets of the running process, and
// its part in restarts. Multiple goroutines may invoke its methods simultaneously.
type Process struct {
	// ListenConfig creates the sockets that are not inherited. Set it before the first call of
	// Listen. Inherited sockets have the options that Control has set when they were created;
	// KeepAlive and KeepAliveConfig have no effect on their connections.
	ListenConfig net.ListenConfig

	system system // what differs by system
}

// Run calls serve, and restarts the program on SIGUSR2. In the parent, it returns after all
// children have exited. It returns the error of serve, unless the parent has been replaced by
// then; see below. Call it once, from main, and exit when it returns.
//
// The function serve listens with p.Listen, starts to accept connections, and calls p.Ready.
// When ctx is done, it calls p.Stop, shuts down gracefully, and returns; there is no limit on
// how long that may take. [context.Cause](ctx) is [ErrReplaced], with the text "user defined
// signal 2", if another process serves. Otherwise, its text is the name of the signal
// ("interrupt" or "terminated"), or "parent process exited".
//
// On SIGINT or SIGTERM, ctx is done in all processes. If the serving process is a child, and
// then exits with a status other than 0, Run calls [os.Exit] with the same status in the parent.
// On a second SIGINT or SIGTERM, Run kills the children and calls os.Exit(1).
//
// On SIGUSR2, Run starts a new process, with the sockets that Listen keeps. Once that has called
// Ready, ctx is done in the serving process, and an error that serve returns there is reported.
// If SIGUSR2 arrives after Run has called serve, while the parent or a new process is not ready,
// it takes effect when that is ready.
//
// If the new process cannot be started or exits, if it is not ready within a minute (then it is
// killed), or if the parent cannot receive its sockets, the reason is reported, and the serving
// process keeps serving. Reports are printed with package log.
//
// If serve returns before ctx is done in the serving process, the service stops. If that
// process is a child, Run returns an error in the parent, unless the exit status of the child
// is 0, or unknown because something else has waited for it.
//
// Run also disables SIGPIPE, so that a write to a closed pipe returns an error even on
// standard output, and a program in a pipeline can shut down gracefully after Ctrl+C.
func Run(serve func(ctx context.Context, p *Process) error) error {
	p := new(Process)
	return p.system.run(func(ctx context.Context) error { return serve(ctx, p) })
}

// Listen returns the inherited socket for the address, from the parent or from socket
// activation, and otherwise listens on it as ListenConfig says. The network must be "tcp",
// "tcp4" or "tcp6".
//
// A socket from the parent is found by the network and address that were passed to Listen
// before the restart, even if the port is 0. If there is none, a socket is found by the address
// that it is bound to. If that is a specific IP address, the network's name does not matter. For
// each network, ":8080", "0.0.0.0:8080" and "[::]:8080", which mean all interfaces, are the same.
//
// Call Listen before Ready: it keeps a duplicate of the socket for the next new process, but not
// of a socket that it returns later. So the port stays open, even if the caller closes the
// listener, until the service is stopped or a new process has called Ready without having called
// Listen for it. The latter resets the connections in the accept queue.
func (p *Process) Listen(network, address string) (*stoppablelistener.StoppableListener, error) {
	switch network {
	case "tcp", "tcp4", "tcp6":
	default:
		return nil, net.UnknownNetworkError(network)
	}
	l, err := p.system.listen(&p.ListenConfig, network, address)
	if err != nil {
		return nil, err
	}
	return stoppablelistener.New(l)
}

// Ready reports that this process accepts connections. A new process then becomes the serving
// process, unless the restart fails. So first do what can fail, such as loading the certificates
// that ServeTLS would load. Ready closes the inherited sockets that Listen has not
// returned. It does nothing after the first call, and once the context that Run has passed to
// serve is done.
func (p *Process) Ready() { p.system.ready() }

// Stop stops the accept loop of a listener that Listen has returned. Call it when the context
// that Run has passed to serve is done, for example with [context.AfterFunc]. It may be called
// any number of times.
//
// It calls the listener's Drain if the service is being stopped because the parent was signaled,
// which the children are told. Drain affects each process that has the socket. So Stop calls the
// listener's Stop instead
//
//   - if the context is not done, or if its cause is [ErrReplaced];
//   - if the socket comes from socket activation: connections stay in its accept queue;
//   - in a child that is signaled, but not its parent;
//   - in a child whose parent exits, because a supervisor may start it again;
//   - in a child whose parent runs a version of this package that has no Stop.
//
// In a child that is ready and is signaled itself, Stop waits until the parent tells it whether
// the service is being stopped. If both were signaled, that takes milliseconds; it waits at most
// a second.
//
// On systems other than Unix, Stop always calls Drain.
func (p *Process) Stop(sl *stoppablelistener.StoppableListener) {
	if p.system.drains(sl.Addr()) {
		sl.Drain()
	} else {
		sl.Stop()
	}
}

// Pid returns the process ID of the parent, in the parent and in its children. It is that of the
// service: signals are sent to it, and it belongs in a PID file. In the parent, it is equal to
// [os.Getpid]().
func (p *Process) Pid() int { return p.system.pid() }

// A signalError is the cause of a context that is done because of a signal.
type signalError struct{ os.Signal }

func (e signalError) Error() string { return e.String() }
