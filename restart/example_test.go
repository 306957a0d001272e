package restart_test

import (
	"context"
	"log"
	"net/http"
	"time"

	"github.com/c2db162c/stoppablelistener"
	"github.com/c2db162c/stoppablelistener/httpdrain"
	"github.com/c2db162c/stoppablelistener/restart"
)

// SIGUSR2 restarts this HTTP server with zero downtime. Ctrl+C and SIGTERM shut it down
// gracefully.
func ExampleRun() {
	if err := restart.Run(serve); err != nil {
		log.Fatal(err)
	}
}

func serve(ctx context.Context, p *restart.Process) error {
	sl, err := p.Listen("tcp", "localhost:8080")
	if err != nil {
		return err
	}
	server := &http.Server{Handler: http.NotFoundHandler()}
	drainer := httpdrain.New(server)
	served := make(chan error, 1)
	go func() { served <- server.Serve(sl) }()
	p.Ready()

	context.AfterFunc(ctx, func() {
		drainer.DisableKeepAlives()
		sl.Drain()
	})
	if err := <-served; err != stoppablelistener.StoppedError {
		return err
	}
	drainCtx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return drainer.Drain(drainCtx)
}
