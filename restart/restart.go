// Package restart restarts a TCP server with zero downtime: on SIGUSR2, a new process, which
// may be a new version of the program, inherits the listening sockets, so that the restart
// refuses and resets no connection:
//
//	err := restart.Run(func(ctx context.Context, p *restart.Process) error {
//		l, err := p.Listen("tcp", ":8080") // inherited, if there is a parent
//		...                                // accept connections from l
//		p.Ready()                          // now the previous process may stop serving
//		<-ctx.Done()                       // signaled, or replaced by a new process
//		...                                // shut down gracefully, and return
//	})
//
// Stop accepting with package stoppablelistener, which drops no connection while another
// process has the socket, and then close the open connections with package httpdrain or with the graceful shutdown of another server. The
// example of [Run] is a complete program.
//
// # Processes
//
// The service is the first process and its children. The first process is the parent of the
// others and runs until the service is stopped. So its process ID, which shells, containers
// and supervisors know, does not change. It serves until the first restart. After that it only
// starts and stops children, of which the last one serves. Each child has the arguments, the
// environment and the standard streams of the parent, and runs main from the start.
//
// Send signals to the parent only, and SIGUSR2 only after it has called Run. Before that, the
// signal has no effect, or kills the process while that is being loaded. A SIGINT or SIGTERM
// that is delivered to parent and children counts as one signal, as when Ctrl+C is typed or
// systemd stops the service. If only the parent is killed, its children shut down gracefully.
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
// With it, systemctl reload restarts the server. That reports only whether the signal was
// sent; the log says if the restart failed. Other commands that send the signal are sv 2
// server (runit), supervisorctl signal USR2 server, and docker kill --signal USR2 server. If a
// shell script starts the program, it must do so with exec.
//
// Listen also returns the sockets of systemd's socket activation. With these, systemctl
// restart fails no request either, but new connections wait in the accept queue until the
// old process has exited and the new one accepts. That requires a socket unit:
//
//	[Socket]
//	ListenStream=8080
//
// # Limitations
//
//   - Only Unix systems can restart. On others, Run serves until [os.Interrupt].
//   - The parent keeps running the version of the program that it was started with, and its
//     environment, limits and user are those of all children.
//   - A program that changes its working directory must be started by an absolute path.
//   - Of the sockets of socket activation, Run closes those that are not TCP listeners.
//   - With systemd, notifications from children require NotifyAccess=all. WatchdogSec is not
//     supported, because systemd expects its notifications from the parent.
//   - In a container, where the parent is process 1, processes that outlive the children that
//     started them become zombies; docker run --init avoids that.
package restart

import (
	"context"
	"net"
	"os"
)

// A Process is the running process, as [Run] passes it to serve. Multiple goroutines may
// invoke its methods simultaneously.
type Process struct {
	process // by system
}

// Run calls serve, and restarts the program on SIGUSR2. It returns the error of serve, in the
// parent not before all children have exited. Call it once, from main, and exit when it
// returns.
//
// The function serve listens with p.Listen, starts to accept connections, and calls p.Ready.
// When ctx is done, it stops accepting, shuts down gracefully, and returns; there is no limit
// on how long that may take. The text of [context.Cause](ctx) is "user defined signal 2" if a
// new process is ready, the name of the signal ("interrupt" or "terminated") if the service is
// stopped, or "parent process exited".
//
// On SIGINT or SIGTERM, ctx is done in all processes. If the child that served exits with a
// status other than 0, Run calls [os.Exit] with the same status. On a second SIGINT or
// SIGTERM, Run kills the children and calls os.Exit(1).
//
// On SIGUSR2, Run starts the program at os.Args[0] in a new process, with the sockets that
// Listen keeps. Once the new process has called Ready, ctx is done in the one that served
// before, and an error that serve returns there is printed on standard error. SIGUSR2 that
// arrives after Run has called serve, but before the first process or a new one has called
// Ready, causes a restart after that.
//
// If the new process cannot be started, exits, or does not call Ready within a minute, after
// which it is killed, the reason is printed on standard error, and the previous process keeps
// serving.
//
// If serve returns before ctx is done in the process that serves, the service stops. If that
// process is a child, Run returns an error, unless the exit status of the child is 0.
//
// Run also disables SIGPIPE, so that a write to a closed pipe returns an error even on
// standard output, and a program in a pipeline can shut down gracefully after Ctrl+C.
func Run(serve func(ctx context.Context, p *Process) error) error {
	p := new(Process)
	return p.run(func(ctx context.Context) error { return serve(ctx, p) })
}

// Listen returns the inherited socket for the address, from the parent or from socket
// activation, and otherwise what [net.Listen] returns. The network must be "tcp", "tcp4" or
// "tcp6".
//
// A socket from the parent is found by the network and address that were passed to Listen
// there, even if the port is 0. If there is none, a socket is found by the address that it is
// bound to; ":8080", "0.0.0.0:8080" and "[::]:8080", which mean all interfaces, are the same.
//
// If called before Ready, Listen keeps a duplicate of the socket for the next process. So the
// port stays open, even if the caller closes the listener, until the service is stopped or a
// new process has called Ready without having called Listen for it.
func (p *Process) Listen(network, address string) (*net.TCPListener, error) {
	switch network {
	case "tcp", "tcp4", "tcp6":
		return p.listen(network, address)
	default:
		return nil, net.UnknownNetworkError(network)
	}
}

// Ready reports that this process accepts connections, so that the previous one stops serving.
// It closes the inherited sockets that Listen has not returned. Calls after the first do
// nothing.
func (p *Process) Ready() { p.ready() }

// A signalError is the cause of a context that is done because of a signal.
type signalError struct{ os.Signal }

func (e signalError) Error() string { return e.String() }
