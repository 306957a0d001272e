package httpdrain_test

import (
	"context"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/c2db162c/stoppablelistener"
	"github.com/c2db162c/stoppablelistener/httpdrain"
)

// delay is longer than the load balancer needs to notice that the server is not ready.
const delay = 5 * time.Second

// A server behind a load balancer, such as a Kubernetes Service or haproxy. When SIGTERM shuts it
// down in a rolling update, no request fails. A second signal kills it.
func Example() {
	l, err := net.Listen("tcp", ":"+os.Getenv("PORT"))
	if err != nil {
		log.Fatal(err)
	}
	sl, err := stoppablelistener.New(l)
	if err != nil {
		log.Fatal(err)
	}
	var stopping atomic.Bool
	http.HandleFunc("/ready", func(w http.ResponseWriter, _ *http.Request) {
		if stopping.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	})
	http.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "Hello") })
	server := new(http.Server)
	drainer := httpdrain.New(server)

	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, cancel) // the next signal is not caught
	context.AfterFunc(ctx, func() {
		stopping.Store(true)
		drainer.DisableKeepAlives()
		time.Sleep(delay)
		sl.Drain()
	})
	log.Print("serving on ", sl.Addr())
	if err := server.Serve(sl); err != stoppablelistener.StoppedError {
		log.Fatal(err)
	}
	drainCtx, cancelDrain := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancelDrain()
	if err := drainer.Drain(drainCtx); err != nil {
		log.Fatal(err)
	}
}
