package benchmarks_test

import (
	"errors"
	"net"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/c2db162c/stoppablelistener/internal/tcptest"
)

// An arm is one way to stop an accept loop. It turns a bare listener into what the
// loop accepts from, and the function that stops the loop.
type arm struct {
	name string
	wrap func(*testing.B, *net.TCPListener) (l net.Listener, stop func())
}

var (
	bare = arm{"bare", func(_ *testing.B, l *net.TCPListener) (net.Listener, func()) {
		return l, func() { l.Close() }
	}}
	classic = arm{"classic", func(_ *testing.B, l *net.TCPListener) (net.Listener, func()) {
		p := &poller{l, make(chan struct{})}
		return p, func() { close(p.stop) }
	}}
	ours = arm{"ours", func(b *testing.B, l *net.TCPListener) (net.Listener, func()) {
		sl := tcptest.Wrap(b, l)
		return sl, sl.Stop
	}}
	arms = []arm{bare, classic, ours}
)

// A poller is the classic design: a deadline of one second before each accept, and a
// look at the stop channel after it.
type poller struct {
	*net.TCPListener
	stop chan struct{}
}

var errPollerStopped = errors.New("stopped")

func (p *poller) Accept() (net.Conn, error) {
	for {
		if err := p.SetDeadline(time.Now().Add(time.Second)); err != nil {
			return nil, err
		}
		conn, err := p.TCPListener.Accept()
		select {
		case <-p.stop:
			if err == nil {
				conn.Close() // else the garbage collector would, some day
			}
			return nil, errPollerStopped
		default:
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return conn, err
		}
	}
}

// inTurn returns arms, of which another one comes first in each iteration.
func inTurn(i int, arms ...arm) []arm {
	i %= len(arms)
	return append(slices.Clone(arms[i:]), arms[:i]...)
}
