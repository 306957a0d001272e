package restart_test

import (
	"context"
	"log"
	"net/http"

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
	l, err := p.Listen("tcp", "localhost:8080")
	if err != nil {
		return err
	}
	p.Ready()
	server := &http.Server{Handler: http.NotFoundHandler()}
	return httpdrain.New(server).Serve(ctx, l)
}
