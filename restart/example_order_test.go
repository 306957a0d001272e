package restart_test

import (
	"context"
	"errors"
	_ "expvar" // metrics, at /debug/vars
	"log"
	"net/http"
	"os"
	"time"

	"github.com/c2db162c/stoppablelistener/httpdrain"
	"github.com/c2db162c/stoppablelistener/restart"
)

// Each process has a worker of its own, and inherits both ports. First the API stops, then its
// worker, and then the admin port. During a restart, the readiness probe does not fail: the service
// is ready. What the worker needs, such as a database, is opened before Ready and closed last.
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
	p.Ready()

	http.HandleFunc("/ready", func(w http.ResponseWriter, _ *http.Request) {
		if ctx.Err() != nil && !errors.Is(context.Cause(ctx), restart.ErrReplaced) {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	})
	adminCtx, stopAdmin := context.WithCancel(context.Background())
	adminServed := make(chan error, 1)
	go func() { adminServed <- httpdrain.New(new(http.Server)).Serve(adminCtx, admin) }()

	jobs, worked := make(chan string, 100), make(chan struct{})
	go func() {
		defer close(worked)
		for job := range jobs {
			log.Print("done: ", job)
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
	return errors.Join(err, <-adminServed)
}

// delay is longer than the load balancer needs to notice that the readiness probe fails.
var delay = 5 * time.Second
