package httpdrain_test

import (
	"context"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/c2db162c/stoppablelistener"
	"github.com/c2db162c/stoppablelistener/httpdrain"
)

// Ctrl+C or SIGTERM shuts the server down gracefully. Requests in flight have ten seconds
// to complete.
func Example() {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	sl, err := stoppablelistener.New(l)
	if err != nil {
		log.Fatal(err)
	}
	server := &http.Server{Handler: http.NotFoundHandler()}
	drainer := httpdrain.New(server)

	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, sl.Stop)
	context.AfterFunc(ctx, cancel) // a second Ctrl+C exits at once

	go cancel() // in this example only, instead of Ctrl+C

	if err := server.Serve(sl); err != stoppablelistener.StoppedError {
		log.Fatal(err)
	}
	drainCtx, cancelDrain := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancelDrain()
	if err := drainer.Drain(drainCtx); err != nil {
		log.Print(err)
	}
	fmt.Println("shut down")

	// Output:
	// shut down
}
