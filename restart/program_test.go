package restart_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/c2db162c/stoppablelistener"
	"github.com/c2db162c/stoppablelistener/httpdrain"
	"github.com/c2db162c/stoppablelistener/internal/testutil/proctest"
	"github.com/c2db162c/stoppablelistener/restart"
)

// In the processes that the tests start, the test binary is a server that listens on the
// addresses in its arguments, each after its network and a comma.
func TestMain(m *testing.M) { proctest.Main(m, program) }

// These are features of a version of the program. Its name and its features are separated by
// commas.
const (
	exits       = "exits"       // with status 3, before Run
	hangs       = "hangs"       // before Run
	helper      = "helper"      // starts a process before Run, which keeps running
	waits       = "waits"       // for a line on standard input, before it listens
	fails       = "fails"       // returns an error from serve
	listensLess = "listensLess" // not on the last address
	listensMore = "listensMore" // on one address more
	shutsDown   = "shutsDown"   // uses Shutdown, not package httpdrain
)

var errFails = errors.New("serve fails")

// An instance is the program in this process.
type instance struct {
	name     string
	features []string
	stdin    *bufio.Reader
	ready    chan struct{} // closed after the call of Ready
	serve    chan error    // makes serve return
}

func program(version string) {
	features := strings.Split(version, ",")
	in := &instance{features[0], features[1:], bufio.NewReader(os.Stdin), make(chan struct{}), make(chan error, 1)}
	switch {
	case in.has(exits):
		os.Exit(3)
	case in.has(hangs):
		<-time.After(time.Hour)
	case in.has(helper):
		cmd := exec.Command("sleep", "60")
		if err := cmd.Start(); err != nil {
			panic(err)
		}
		fmt.Println("helper", cmd.Process.Pid)
	}
	if err := restart.Run(in.run); err != nil {
		fmt.Fprintln(os.Stderr, err)
		if errors.Is(err, errFails) {
			os.Exit(4)
		}
		os.Exit(1)
	}
}

func (in *instance) has(feature string) bool { return slices.Contains(in.features, feature) }

// run is what Run calls.
func (in *instance) run(ctx context.Context, p *restart.Process) error {
	if in.has(waits) {
		fmt.Println(in.name, "waits")
		_, _ = in.stdin.ReadString('\n')
	}
	addrs := os.Args[1:]
	if in.has(listensLess) {
		addrs = addrs[:len(addrs)-1]
	}
	if in.has(listensMore) {
		addrs = append(addrs, "tcp,localhost:0")
	}

	server := &http.Server{Handler: in.handler(p)}
	drainer := httpdrain.New(server)
	var listeners []*stoppablelistener.StoppableListener
	line := in.name + " ready"
	for _, addr := range addrs {
		network, address, _ := strings.Cut(addr, ",")
		l, err := p.Listen(network, address)
		if err != nil {
			return err
		}
		sl, err := stoppablelistener.New(l)
		if err != nil {
			return err
		}
		listeners = append(listeners, sl)
		line += " " + sl.Addr().String()
	}
	served := make(chan error)
	for _, sl := range listeners {
		go func() { served <- server.Serve(sl) }()
	}
	fmt.Println(line)
	p.Ready()
	close(in.ready)

	select {
	case err := <-in.serve:
		return err
	case <-ctx.Done():
	}
	for _, sl := range listeners {
		sl.Stop()
		if err := <-served; err != stoppablelistener.StoppedError {
			return err
		}
	}
	fmt.Println(in.name, "stopped:", context.Cause(ctx))
	drain := drainer.Drain
	if in.has(shutsDown) {
		drain = server.Shutdown
	}
	err := drain(context.Background())
	if in.has(fails) {
		return errFails
	}
	return err
}

func (in *instance) handler(p *restart.Process) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		fmt.Fprint(w, in.name)
	})
	mux.HandleFunc("/process", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, os.Getppid(), os.Args[1:], os.Getenv("TEST_VARIABLE"))
	})
	mux.HandleFunc("/variables", func(w http.ResponseWriter, _ *http.Request) {
		for _, variable := range os.Environ() {
			if strings.HasPrefix(variable, "LISTEN_") || strings.HasPrefix(variable, "STOPPABLELISTENER_RESTART") {
				fmt.Fprintln(w, variable)
			}
		}
	})
	mux.HandleFunc("/stdin", func(w http.ResponseWriter, _ *http.Request) {
		line, _ := in.stdin.ReadString('\n')
		fmt.Fprint(w, line)
	})
	mux.HandleFunc("/stderr", func(http.ResponseWriter, *http.Request) {
		fmt.Fprintln(os.Stderr, in.name, "writes to standard error")
	})
	mux.HandleFunc("/return", func(w http.ResponseWriter, r *http.Request) {
		if r.FormValue("error") == "" {
			in.serve <- nil
		} else {
			in.serve <- errFails
		}
	})
	mux.HandleFunc("/listen-and-close", func(w http.ResponseWriter, _ *http.Request) {
		<-in.ready
		l, err := p.Listen("tcp", "localhost:0")
		if err == nil {
			fmt.Fprint(w, l.Addr())
			err = l.Close()
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	})
	return mux
}
