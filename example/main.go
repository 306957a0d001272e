// Command example is an HTTP server that shuts down gracefully on SIGINT or SIGTERM, and
// restarts with zero downtime on SIGUSR2.
package main

import (
	"context"
	"flag"
	"fmt"
	"net/http"
	"os"
	"time"

	"github.com/c2db162c/stoppablelistener/httpdrain"
	"github.com/c2db162c/stoppablelistener/restart"
)

func main() {
	addr := flag.String("addr", "localhost:8080", "serve HTTP on `host:port`")
	timeout := flag.Duration("timeout", 10*time.Second, "for requests in flight after a signal")
	flag.Parse()
	err := restart.Run(func(ctx context.Context, p *restart.Process) error {
		return serve(ctx, p, *addr, *timeout)
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func serve(ctx context.Context, p *restart.Process, addr string, timeout time.Duration) error {
	l, err := p.Listen("tcp", addr)
	if err != nil {
		return err
	}
	server := &http.Server{
		Handler:           http.HandlerFunc(hello),
		ReadHeaderTimeout: 10 * time.Second,
	}
	fmt.Println("Serving HTTP")
	p.Ready()
	drainer := httpdrain.New(server)
	drainer.Timeout = timeout
	return drainer.Serve(ctx, listener{l, ctx})
}

// A listener reports that it is drained.
type listener struct {
	*restart.Listener
	ctx context.Context
}

func (l listener) Drain() {
	// These lines, and that above, are the output of the program in the article
	// "Stopping a listening HTTP Server in Go" (Eric Urban, 2014).
	fmt.Printf("Got signal:%v\n", context.Cause(l.ctx))
	fmt.Println("Stopping listener")
	l.Listener.Drain()
	fmt.Println("Waiting on server")
}

func hello(w http.ResponseWriter, _ *http.Request) {
	fmt.Fprintln(w, "Hello HTTP!")
}
