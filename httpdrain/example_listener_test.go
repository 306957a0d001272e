package httpdrain_test

import (
	"context"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"

	"github.com/c2db162c/stoppablelistener"
	"github.com/c2db162c/stoppablelistener/httpdrain"
)

// A listener of another package, such as a LimitListener of golang.org/x/net/netutil or one for
// the PROXY protocol, wraps a StoppableListener. A struct adds the Drain method.
func ExampleListener() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal kills the process

	l, err := net.Listen("tcp", ":"+os.Getenv("PORT"))
	if err != nil {
		log.Fatal(err)
	}
	sl, err := stoppablelistener.New(l)
	if err != nil {
		log.Fatal(err)
	}
	server := &http.Server{Handler: http.NotFoundHandler()}
	if err := httpdrain.New(server).Serve(ctx, drainable{limitListener(sl, 1000), sl}); err != nil {
		log.Fatal(err)
	}
}

type drainable struct {
	net.Listener
	sl httpdrain.Listener // a StoppableListener, or a Listener of package restart
}

func (d drainable) Drain() { d.sl.Drain() }

// limitListener stands for netutil.LimitListener.
func limitListener(l net.Listener, _ int) net.Listener { return l }
