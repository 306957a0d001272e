package listenertest_test

import (
	"errors"
	"net"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

// A variant is one way to stop an accept loop. Its function wrap returns the listener that the
// loop accepts from and the function that stops the loop.
type variant struct {
	name string
	wrap func(testing.TB, *net.TCPListener) (l net.Listener, stop func())
}

var (
	plain = variant{"plain", func(_ testing.TB, l *net.TCPListener) (net.Listener, func()) {
		return l, func() { l.Close() }
	}}
	classic = variant{"classic", func(_ testing.TB, l *net.TCPListener) (net.Listener, func()) {
		p := &poller{l, make(chan struct{})}
		return p, func() { close(p.stop) }
	}}
	ours = variant{"ours", func(b testing.TB, l *net.TCPListener) (net.Listener, func()) {
		sl := tcptest.Wrap(b, l)
		return sl, sl.Stop
	}}
	variants = []variant{plain, classic, ours}
)

// A poller is the classic design: it sets a deadline of one second before each accept and
// checks the stop channel after it.
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
				conn.Close() // otherwise, the garbage collector closes it some time
			}
			return nil, errPollerStopped
		default:
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return conn, err
		}
	}
}

// inTurn returns variants, with another one first in each iteration.
func inTurn(i int, variants ...variant) []variant {
	i %= len(variants)
	return append(slices.Clone(variants[i:]), variants[:i]...)
}
