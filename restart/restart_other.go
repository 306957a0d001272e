//go:build !unix

package restart

import (
	"context"
	"net"
	"os"
	"os/signal"
	"syscall"
)

// A system has no parent and no children here.
type system struct{}

func (*system) run(serve func(context.Context) error) error {
	ctx, cancel := context.WithCancelCause(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(signals)
	go func() {
		cancel(signalError{<-signals})
		<-signals
		os.Exit(1)
	}()
	return serve(ctx)
}

func (*system) listen(
	config *net.ListenConfig, network, address string,
) (*net.TCPListener, error) {
	l, err := config.Listen(context.Background(), network, address)
	if err != nil {
		return nil, err
	}
	return l.(*net.TCPListener), nil
}

func (*system) ready() {}

// drains reports true, because no other process has the socket.
func (*system) drains(net.Addr) bool { return true }

func (*system) pid() int { return os.Getpid() }
