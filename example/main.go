// Command example serves HTTP until it gets a signal. Interrupted or terminated, it ends in
// order: it stops the listener, waits for Serve, and lets the open connections finish
// (drain.go). On SIGHUP it does so too, once the program that now lies at its path serves
// on the same socket (restart.go).
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/c2db162c/stoppablelistener"
)

// Variables, because the tests are less patient.
var (
	drainTimeout   = 10 * time.Second // for requests in progress, once the listener has stopped
	restartTimeout = 10 * time.Second // for a new program, until it serves
)

const defaultAddr = "localhost:8080"

var page = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
	fmt.Fprintln(w, "Hello HTTP!")
})

func main() {
	flags := flag.NewFlagSet("example", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // package flag would print several lines
	addr := flags.String("addr", defaultAddr, "")
	fd := flags.Uint("fd", math.MaxUint, "")
	err := flags.Parse(os.Args[1:])
	if errors.Is(err, flag.ErrHelp) {
		fmt.Println(usage)
		return
	}
	if err == nil && flags.NArg() > 0 {
		err = fmt.Errorf("unexpected argument: %s", flags.Arg(0))
	}
	if err == nil && flags.NFlag() > 1 {
		err = errors.New("-addr and -fd exclude each other")
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%v (%s)\n", err, usage)
		os.Exit(2)
	}

	var l net.Listener
	if *fd == math.MaxUint {
		l, err = net.Listen("tcp", *addr)
	} else {
		l, err = inherit(uintptr(*fd))
	}
	if err == nil {
		err = serve(l)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// inherit returns the listening socket that this process was started with as descriptor fd.
func inherit(fd uintptr) (net.Listener, error) {
	file := os.NewFile(fd, fmt.Sprintf("descriptor %d", fd))
	if file == nil {
		return nil, fmt.Errorf("descriptor %d: %w", fd, os.ErrInvalid)
	}
	defer file.Close()
	return net.FileListener(file)
}

// serve answers requests on l until the process is told to end, or is replaced.
func serve(l net.Listener) error {
	sl, err := stoppablelistener.New(l)
	if err != nil {
		return err
	}
	end, replace := make(chan os.Signal, 1), make(chan os.Signal, 1)
	signal.Notify(end, os.Interrupt, syscall.SIGTERM)
	notifyRestart(replace)
	server := &http.Server{
		Handler:           page,
		ReadHeaderTimeout: 10 * time.Second,
	}
	connections := newDrainer(server)
	fmt.Println("Serving HTTP")
	ready()

	for {
		replaced, err := serveUntil(end, replace, server, sl)
		if err != nil {
			return err
		}
		if !replaced {
			break
		}
		// A signal that ends the wait is in the channel end too, and ends the process next.
		told, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		ctx, cancel := context.WithTimeout(told, restartTimeout)
		err = restart(ctx, sl.TCPListener)
		cancel()
		stop()
		if err == nil {
			break
		}
		fmt.Fprintf(os.Stderr, "not restarted, serving on: %v\n", err)
		if sl, err = stoppablelistener.New(l); err != nil {
			return err
		}
	}

	go func() {
		<-end // whoever asks twice does not want to wait
		os.Exit(1)
	}()
	if err := l.Close(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), drainTimeout)
	defer cancel()
	return connections.drain(ctx)
}

// serveUntil has server serve on sl until there is a signal, and reports whether that came
// from replace. Connections may still be open then.
func serveUntil(end, replace <-chan os.Signal, server *http.Server, sl *stoppablelistener.StoppableListener) (bool, error) {
	served := make(chan error, 1)
	go func() { served <- server.Serve(keepOpen{sl}) }()
	var sig os.Signal
	replaced := false
	select {
	case sig = <-end:
	case sig = <-replace:
		replaced = true
	case err := <-served:
		return false, err
	}
	fmt.Printf("Got signal:%v\n", sig)
	fmt.Println("Stopping listener")
	sl.Stop()
	fmt.Println("Waiting on server")
	if err := <-served; !errors.Is(err, stoppablelistener.StoppedError) {
		return false, err
	}
	return replaced, nil
}

// keepOpen keeps the socket open when http.Server closes its listener, as Serve does when
// it returns.
type keepOpen struct {
	*stoppablelistener.StoppableListener
}

// Close ends Serve, and leaves the socket to the next one.
func (l keepOpen) Close() error {
	l.Stop()
	return nil
}
