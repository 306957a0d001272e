//go:build !unix

package restart

import (
	"context"
	"net"
	"os"
)

// A single process has no parent and no children.
type single struct {
	ctx    context.Context // that serve has
	cancel context.CancelCauseFunc
}

func newRole() role {
	s := new(single)
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	return s
}

func (s *single) run(serve func(context.Context) error) error {
	defer onStopSignals(
		func(sig os.Signal) { s.cancel(signalError{sig}) },
		func() { os.Exit(1) },
	)()
	return serve(s.ctx)
}

func (*single) listen(
	config *net.ListenConfig, network, address string,
) (*net.TCPListener, bool, error) {
	l, err := config.Listen(context.Background(), network, address)
	if err != nil {
		return nil, false, err
	}
	return l.(*net.TCPListener), false, nil
}

func (*single) ready() {}

// endsService reports true, because no other process has the socket.
func (*single) endsService() bool { return true }

func (*single) pid() int { return os.Getpid() }
