// Command example serves HTTP until it gets a signal, and then ends in order: it
// stops the listener, waits for Serve, and lets the requests in flight finish.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/c2db162c/stoppablelistener"
)

// drainTimeout is how long requests in flight may take once the server has stopped.
const drainTimeout = 10 * time.Second

const (
	defaultAddr = ":8080"
	usage       = "usage: example [-addr host:port] (default " + defaultAddr + ")"
)

func main() {
	flags := flag.NewFlagSet("example", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // package flag would print several lines
	addr := flags.String("addr", defaultAddr, "")
	err := flags.Parse(os.Args[1:])
	if errors.Is(err, flag.ErrHelp) {
		fmt.Println(usage)
		return
	}
	if err == nil && flags.NArg() > 0 {
		err = fmt.Errorf("unexpected argument: %s", flags.Arg(0))
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%v (%s)\n", err, usage)
		os.Exit(2)
	}
	if err := serve(*addr); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// serve answers requests on addr until the process is interrupted or terminated.
func serve(addr string) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	sl, err := stoppablelistener.New(l)
	if err != nil {
		return err
	}

	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)

	var conns sync.WaitGroup // one for each open connection
	server := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprint(w, "Hello HTTP!")
		}),
		ConnState: func(_ net.Conn, state http.ConnState) {
			switch state {
			case http.StateNew:
				conns.Add(1)
			case http.StateClosed:
				conns.Done()
			}
		},
		ReadHeaderTimeout: drainTimeout / 2, // a client that stays silent holds nothing up
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(sl) }()
	fmt.Println("Serving HTTP")

	select {
	case sig := <-signals:
		fmt.Printf("Got signal:%v\n", sig)
	case err := <-served:
		return err
	}
	go func() {
		<-signals // whoever asks twice does not want to wait
		os.Exit(1)
	}()

	fmt.Println("Stopping listener")
	sl.Stop()
	fmt.Println("Waiting on server")
	if err := <-served; !errors.Is(err, stoppablelistener.StoppedError) {
		return err
	}

	// Shutdown would do for most servers. But since Go 1.25 it drops a connection that
	// was accepted just before, and whose request it has not read yet.
	server.SetKeepAlivesEnabled(false)
	drained := make(chan struct{})
	go func() {
		conns.Wait()
		close(drained)
	}()
	select {
	case <-drained:
	case <-time.After(drainTimeout):
		fmt.Fprintf(os.Stderr, "requests cut off after %v\n", drainTimeout)
	}
	return nil
}
