package restart_test

import (
	"context"
	"errors"
	_ "expvar" // metrics, at /debug/vars
	"fmt"
	"log"
	"net/http"
	"os"
	"time"

	"github.com/c2db162c/stoppablelistener/httpdrain"
	"github.com/c2db162c/stoppablelistener/restart"
)

// Each process has a worker of its own, and inherits both ports. First the API stops, then its
// worker, then the admin port, and last the database, which is a file here. During a restart, the
// readiness probe does not fail: the service is ready.
func ExampleRun_shutdownOrder() {
	if err := restart.Run(serveInOrder); err != nil {
		log.Fatal(err)
	}
}

func serveInOrder(ctx context.Context, p *restart.Process) error {
	l, err := p.Listen("tcp", os.Getenv("ADDR"))
	if err != nil {
		return err
	}
	admin, err := p.Listen("tcp", os.Getenv("ADMIN_ADDR"))
	if err != nil {
		return err
	}
	db, err := os.OpenFile(os.Getenv("JOBS"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err // before Ready: the old process keeps serving
	}
	p.Ready()

	http.HandleFunc("/ready", func(w http.ResponseWriter, _ *http.Request) {
		if ctx.Err() != nil && !errors.Is(context.Cause(ctx), restart.ErrReplaced) {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	})
	// A Drainer, not http.Serve, because probes must not fail during a restart.
	adminCtx, stopAdmin := context.WithCancel(context.Background())
	adminServed := make(chan error, 1)
	go func() { adminServed <- httpdrain.New(new(http.Server)).Serve(adminCtx, admin) }()

	jobs, worked := make(chan string, 100), make(chan struct{})
	go func() {
		defer close(worked)
		for job := range jobs {
			if _, err := fmt.Fprintln(db, job); err != nil {
				log.Print(err)
			}
		}
	}()
	api := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		jobs <- r.FormValue("job")
		w.WriteHeader(http.StatusAccepted)
	})
	drainer := httpdrain.New(&http.Server{Handler: api})
	drainer.Delay = delay // not during a restart
	err = drainer.Serve(ctx, l)
	close(jobs) // a handler that Timeout has aborted panics if it sends now; package http recovers
	<-worked
	stopAdmin()
	return errors.Join(err, <-adminServed, db.Close())
}

// delay is longer than the load balancer needs to notice that the readiness probe fails.
var delay = 10 * time.Second
