package httpdrain_test

import (
	"context"
	"database/sql"
	"errors"
	_ "expvar" // metrics, at /debug/vars
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/c2db162c/stoppablelistener/httpdrain"
)

// First the API stops, then its background worker, then the admin port, and last the database. The
// readiness probe fails as soon as the signal has arrived, and the admin port serves until the
// worker has done its jobs.
func Example_shutdownOrder() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal kills the process

	db, err := sql.Open("postgres", os.Getenv("DATABASE_URL"))
	if err != nil {
		log.Fatal(err)
	}
	admin, err := net.Listen("tcp", ":"+os.Getenv("ADMIN_PORT"))
	if err != nil {
		log.Fatal(err)
	}
	http.HandleFunc("/ready", func(w http.ResponseWriter, _ *http.Request) {
		if ctx.Err() != nil {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	})
	go http.Serve(admin, nil)

	jobs, worked := make(chan string, 100), make(chan struct{})
	go func() {
		defer close(worked)
		for job := range jobs {
			if _, err := db.Exec("INSERT INTO jobs VALUES ($1)", job); err != nil {
				log.Print(err)
			}
		}
	}()
	api := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		jobs <- r.FormValue("job")
		w.WriteHeader(http.StatusAccepted)
	})
	drainer := httpdrain.New(&http.Server{Addr: ":" + os.Getenv("PORT"), Handler: api})
	drainer.Delay = delay
	err = drainer.ListenAndServe(ctx)
	close(jobs) // a handler that Timeout has aborted panics if it sends now; package http recovers
	<-worked
	if err := errors.Join(err, admin.Close(), db.Close()); err != nil {
		log.Fatal(err)
	}
}

// delay is longer than the load balancer needs to notice that the readiness probe fails.
var delay = 10 * time.Second
