//go:build !unix

package restart

import (
	"context"
	"net"
	"os"
	"os/signal"
	"syscall"
)

// A process has no parent and no children here.
type process struct{}

func (*process) run(serve func(context.Context) error) error {
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
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

func (*process) listen(network, address string) (*net.TCPListener, error) {
	l, err := net.Listen(network, address)
	if err != nil {
		return nil, err
	}
	return l.(*net.TCPListener), nil
}

func (*process) ready() {}
