//go:build unix

package restart_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/c2db162c/stoppablelistener"
	"github.com/c2db162c/stoppablelistener/httpdrain"
	"github.com/c2db162c/stoppablelistener/internal/testutil/proctest"
	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
	"github.com/c2db162c/stoppablelistener/restart"
)

// In the processes that the tests start, the test binary is a server that listens on the
// addresses in its arguments, each after its network and a comma.
func TestMain(m *testing.M) { proctest.Main(m, program) }

// These are features of a version of the program. Its name and its features are separated by
// commas.
const (
	// before Run
	exits       = "exits"       // with status 3
	hangs       = "hangs"       // and prints a line before
	helper      = "helper"      // starts a process, which keeps running
	changes     = "changes"     // its arguments, environment and directory
	logsSlowly  = "logsSlowly"  // to standard output
	ignoresCHLD = "ignoresCHLD" // SIGCHLD
	reaps       = "reaps"       // waits for all children
	signals     = "signals"     // prints SIGHUP and SIGUSR1
	hasNoFiles  = "hasNoFiles"  // no descriptor is free
	reuses3     = "reuses3"     // closes descriptor 3, and opens another file, which gets that number

	// in serve
	waits       = "waits"       // for a line on standard input, before it listens
	isEarly     = "isEarly"     // accepts connections, and then waits for such a line
	isLarge     = "isLarge"     // uses 50 MB until it returns
	announces   = "announces"   // prints a line when ctx is done
	isLate      = "isLate"      // listens when ctx is done
	controls    = "controls"    // prints a line for each socket that it creates
	isStuck     = "isStuck"     // in Listen, as if a name server did not respond
	atLimit     = "atLimit"     // listens twice when only one descriptor is free
	listensLess = "listensLess" // not on the last address
	listensMore = "listensMore" // on one address more
	listensTCP4 = "listensTCP4" // on tcp4 instead of tcp
	fails       = "fails"       // returns an error
	isHasty     = "isHasty"     // has the grace period of package httpdrain, not a longer one
	shutsDown   = "shutsDown"   // uses Shutdown, not package httpdrain

	lingers = "lingers" // after Run
)

var errFails = errors.New("serve fails")

// An instance is the program in this process.
type instance struct {
	name     string
	features []string
	args     []string
	stdin    *bufio.Reader
	ready    chan struct{} // closed after the call of Ready
	serve    chan error    // makes serve return
	files    []*os.File    // opened to use up the descriptors

	process   *restart.Process
	listeners []*restart.Listener
}

// examples are versions that are an example instead.
var examples = map[string]func(){}

func program(version string) {
	if example, ok := examples[version]; ok {
		example()
		return
	}
	log.SetFlags(0)
	features := strings.Split(version, ",")
	in := &instance{
		name:     features[0],
		features: features[1:],
		args:     slices.Clone(os.Args[1:]),
		stdin:    bufio.NewReader(os.Stdin),
		ready:    make(chan struct{}),
		serve:    make(chan error, 1),
	}
	in.prepare()
	err := restart.Run(in.run)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	if in.has(lingers) {
		fmt.Println(in.name, "lingers")
		<-time.After(time.Hour)
	}
	switch {
	case errors.Is(err, errFails):
		os.Exit(4)
	case err != nil:
		os.Exit(1)
	}
}

func (in *instance) has(feature string) bool { return slices.Contains(in.features, feature) }

// prepare is what the program does before Run.
func (in *instance) prepare() {
	if in.has(exits) {
		os.Exit(3)
	}
	if in.has(hangs) {
		fmt.Println(in.name, "hangs")
		<-time.After(time.Hour)
	}
	if in.has(helper) {
		cmd := exec.Command("sleep", "60")
		check(cmd.Start())
		fmt.Println("helper", cmd.Process.Pid)
	}
	if in.has(changes) {
		for i := range os.Args {
			os.Args[i] = "changed"
		}
		os.Args = os.Args[:1]
		check(os.Setenv("TEST_VARIABLE", "changed"))
		check(os.Unsetenv("TEST_SECRET"))
		check(os.Setenv("PATH", ""))
		check(os.Chdir("/"))
	}
	if in.has(logsSlowly) {
		log.SetOutput(slowWriter{in.name})
	}
	if in.has(ignoresCHLD) {
		signal.Ignore(syscall.SIGCHLD)
	}
	if in.has(reaps) {
		go func() {
			for ; ; time.Sleep(time.Millisecond) {
				_, _ = syscall.Wait4(-1, nil, 0, nil)
			}
		}()
	}
	if in.has(hasNoFiles) {
		in.useUpDescriptors()
	}
	if in.has(reuses3) {
		check(syscall.Close(3))
		file, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
		check(err)
		in.files = append(in.files, file)
	}
	if in.has(signals) {
		received := make(chan os.Signal, 1)
		signal.Notify(received, syscall.SIGHUP, syscall.SIGUSR1)
		go func() {
			for sig := range received {
				fmt.Println(in.name, "received:", sig)
			}
		}()
	}
}

// run is what Run calls.
func (in *instance) run(ctx context.Context, p *restart.Process) error {
	in.process = p
	in.beforeListen(ctx)
	if in.has(isLarge) {
		memory := make([]byte, 50<<20)
		for i := 0; i < len(memory); i += os.Getpagesize() {
			memory[i] = 1
		}
		defer func() { _ = memory[0] }()
	}
	server := &http.Server{Handler: in.handler()}
	drainer := httpdrain.New(server)
	drainer.Timeout = 0 // a process that is not killed waits for its requests
	if !in.has(isHasty) {
		drainer.Grace = tcptest.Patience // on a busy machine, a client waits before it sends a request
	}
	line := in.name + " ready"
	for _, addr := range in.addrs() {
		network, address, _ := strings.Cut(addr, ",")
		sl, err := p.Listen(network, address)
		if err != nil {
			return err
		}
		in.listeners = append(in.listeners, sl)
		line += " " + sl.Addr().String()
	}
	served, stopped := make(chan error), make(chan struct{}, len(in.listeners))
	for _, sl := range in.listeners {
		if in.has(shutsDown) {
			context.AfterFunc(ctx, sl.Drain)
			go func() { served <- server.Serve(sl) }()
		} else {
			go func() { served <- drainer.Serve(ctx, reporting{sl, stopped}) }()
		}
	}
	if in.has(isEarly) {
		fmt.Println(in.name, "waits")
		_, _ = in.stdin.ReadString('\n')
	}
	if p.Pid() == os.Getpid() {
		p.Ready() // so that a restart is possible when the test reads the line
	}
	fmt.Println(line) // in a child, before what the parent prints because of Ready
	p.Ready()
	close(in.ready)

	select {
	case err := <-in.serve:
		return err
	case <-ctx.Done():
	}
	if in.has(announces) {
		fmt.Println(in.name, "is done")
	}
	for _, sl := range in.listeners {
		if !in.has(shutsDown) {
			<-stopped
			continue
		}
		sl.Drain() // once more, perhaps at the same time
		if err := <-served; err != stoppablelistener.StoppedError {
			return err
		}
	}
	how := "stopped:"
	if errors.Is(context.Cause(ctx), restart.ErrReplaced) {
		how = "replaced:"
	}
	fmt.Println(in.name, how, context.Cause(ctx))
	var err error
	if in.has(shutsDown) {
		err = server.Shutdown(context.Background())
	} else {
		for range in.listeners {
			if e := <-served; e != stoppablelistener.StoppedError { // the test has called Drain before
				err = errors.Join(err, e)
			}
		}
	}
	if in.has(fails) {
		return errFails
	}
	return err
}

// reporting is a listener that reports that its accept loop has returned. Until then, Accept, if it
// was blocked, may return a connection that a client has opened just after Stop.
type reporting struct {
	*restart.Listener
	stopped chan<- struct{}
}

func (l reporting) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err == stoppablelistener.StoppedError {
		l.stopped <- struct{}{}
	}
	return conn, err
}

// addrs are the addresses that this version listens on.
func (in *instance) addrs() []string {
	addrs := slices.Clone(in.args)
	if in.has(listensLess) {
		addrs = addrs[:len(addrs)-1]
	}
	if in.has(listensMore) {
		addrs = append(addrs, "tcp,localhost:0")
	}
	if in.has(listensTCP4) {
		for i := range addrs {
			addrs[i] = strings.Replace(addrs[i], "tcp,", "tcp4,", 1)
		}
	}
	return addrs
}

// beforeListen is what the program does in serve before it listens.
func (in *instance) beforeListen(ctx context.Context) {
	if in.has(waits) {
		fmt.Println(in.name, "waits")
		_, _ = in.stdin.ReadString('\n')
	}
	if in.has(isLate) {
		fmt.Println(in.name, "waits")
		<-ctx.Done()
	}
	if in.has(controls) {
		in.process.ListenConfig.Control = func(network, address string, _ syscall.RawConn) error {
			fmt.Println(in.name, "controls", network)
			return nil
		}
	}
	if in.has(isStuck) {
		in.process.ListenConfig.Control = func(string, string, syscall.RawConn) error {
			fmt.Println(in.name, "is stuck")
			<-time.After(time.Hour)
			return nil
		}
	}
	if in.has(atLimit) {
		l, err := in.process.Listen("tcp", "localhost:0") // may open files that stay open
		check(err)
		in.useUpDescriptors()
		check(in.files[0].Close())
		for range 2 {
			_, err := in.process.Listen("tcp", "127.0.0.1:0")
			fmt.Println(in.name, "listens:", err)
		}
		in.freeDescriptors()
		check(l.Close())
	}
}

// useUpDescriptors leaves no descriptor free.
func (in *instance) useUpDescriptors() {
	check(syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: 64, Max: 64}))
	for {
		file, err := os.Open(os.DevNull)
		if errors.Is(err, syscall.EMFILE) {
			return
		}
		check(err)
		in.files = append(in.files, file)
	}
}

func (in *instance) freeDescriptors() {
	for _, file := range in.files {
		_ = file.Close()
	}
	in.files = nil
}

func (in *instance) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		fmt.Fprint(w, in.name)
	})
	mux.HandleFunc("/process", func(w http.ResponseWriter, _ *http.Request) {
		dir, _ := os.Getwd()
		fmt.Fprintln(w, os.Getppid(), os.Args,
			os.Getenv("TEST_VARIABLE"), os.Getenv("TEST_SECRET"), dir)
	})
	mux.HandleFunc("/pid", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, in.process.Pid())
	})
	mux.HandleFunc("/variables", func(w http.ResponseWriter, _ *http.Request) {
		for _, variable := range os.Environ() {
			if strings.HasPrefix(variable, "LISTEN_") ||
				strings.HasPrefix(variable, "STOPPABLELISTENER_RESTART") {
				fmt.Fprintln(w, variable)
			}
		}
	})
	mux.HandleFunc("/write", func(w http.ResponseWriter, r *http.Request) {
		fd, err := strconv.Atoi(r.FormValue("descriptor"))
		check(err)
		_, err = syscall.Write(fd, []byte("text"))
		fmt.Fprint(w, err)
	})
	mux.HandleFunc("/return", func(w http.ResponseWriter, r *http.Request) {
		if r.FormValue("error") == "" {
			in.serve <- nil
		} else {
			in.serve <- errFails
		}
	})
	mux.HandleFunc("/drain", func(http.ResponseWriter, *http.Request) {
		for _, sl := range in.listeners {
			sl.Drain()
		}
	})
	mux.HandleFunc("/limit", func(http.ResponseWriter, *http.Request) { in.useUpDescriptors() })
	mux.HandleFunc("/no-limit", func(http.ResponseWriter, *http.Request) { in.freeDescriptors() })
	mux.HandleFunc("/listen-and-close", func(w http.ResponseWriter, _ *http.Request) {
		<-in.ready
		l, err := in.process.Listen("tcp", "localhost:0")
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

// A slowWriter is the log of a version.
type slowWriter struct{ name string }

func (w slowWriter) Write(text []byte) (int, error) {
	time.Sleep(100 * time.Millisecond)
	fmt.Printf("%s logs: %s", w.name, text)
	return len(text), nil
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}
