package httpdrain_test

import (
	"context"
	"fmt"
	"log"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/c2db162c/stoppablelistener/httpdrain"
)

// A server behind a load balancer, such as a Kubernetes Service or haproxy. When SIGTERM shuts it
// down in a rolling update, hardly any request fails. A second signal kills it.
func Example() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal kills the process

	http.HandleFunc("/ready", func(w http.ResponseWriter, _ *http.Request) {
		if ctx.Err() != nil {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	})
	http.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "Hello") })
	drainer := httpdrain.New(&http.Server{Addr: ":" + os.Getenv("PORT")})
	drainer.Delay = 10 * time.Second // longer than the load balancer needs to notice
	if err := drainer.ListenAndServe(ctx); err != nil {
		log.Fatal(err)
	}
}
