package stoppablelistener_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/rpc"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/c2db162c/stoppablelistener"
)

// Package net/rpc has no way to stop its accept loop, which returns on the first error.
func Example_rpc() {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	defer l.Close()
	sl, err := stoppablelistener.New(l)
	if err != nil {
		log.Fatal(err)
	}

	server := rpc.NewServer()
	if err := server.Register(Greeter{}); err != nil {
		log.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Add(1)
	go func() {
		defer serving.Done()
		server.Accept(sl) // logs StoppedError when it returns
	}()

	client, err := rpc.Dial("tcp", l.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	var greeting string
	if err := client.Call("Greeter.Greet", "RPC", &greeting); err != nil {
		log.Fatal(err)
	}
	fmt.Println(greeting)

	sl.Drain()
	serving.Wait()
	fmt.Println("Accept has returned")

	// The connection stays open until the client closes it.
	if err := client.Call("Greeter.Greet", "again", &greeting); err != nil {
		log.Fatal(err)
	}
	fmt.Println(greeting)

	// Output:
	// Hello RPC!
	// Accept has returned
	// Hello again!
}

// Greeter is the service of the net/rpc example.
type Greeter struct{}

// Greet sets reply to a greeting for name.
func (Greeter) Greet(name string, reply *string) error {
	*reply = "Hello " + name + "!"
	return nil
}

// Without Drain, GracefulStop of a gRPC server resets the connections in the accept queue. It also
// closes those whose HTTP/2 handshake has not ended, so a moment passes before the call. Behind a
// load balancer, make the health check fail some seconds before Drain.
func Example_gRPC() {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	sl, err := stoppablelistener.New(l)
	if err != nil {
		log.Fatal(err)
	}

	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, sl.Drain)
	context.AfterFunc(ctx, cancel) // a second signal kills the process

	go cancel() // in this example only, instead of Ctrl+C

	server := new(grpcServer) // grpc.NewServer(), with its services
	if err := server.Serve(sl); !errors.Is(err, stoppablelistener.StoppedError) {
		log.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond)          // for HTTP/2 handshakes on the last connections
	time.AfterFunc(10*time.Second, server.Stop) // aborts the calls that take longer
	server.GracefulStop()
	fmt.Println("stopped")

	// Output:
	// stopped
}

// A grpcServer stands for the type of package google.golang.org/grpc, which this module does not
// require.
type grpcServer struct{ http.Server }

func (s *grpcServer) GracefulStop() { _ = s.Shutdown(context.Background()) }

func (s *grpcServer) Stop() { _ = s.Close() }

// The client is still in the accept queue when Drain is called. It gets its response, and then
// the accept loop returns. The next response on each connection that clients keep is the last one.
// If your protocol has a message for that, send it, as the WebSocket example of package httpdrain
// does: a client that sends its next line at once can lose it otherwise.
func ExampleStoppableListener_Drain() {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	sl, err := stoppablelistener.New(l)
	if err != nil {
		log.Fatal(err)
	}

	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, sl.Drain)
	context.AfterFunc(ctx, cancel) // a second signal kills the process

	client, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	cancel() // in this example only, instead of Ctrl+C

	var conns sync.WaitGroup
	for {
		conn, err := sl.Accept()
		if errors.Is(err, stoppablelistener.StoppedError) {
			break
		}
		if err != nil { // such as EMFILE
			log.Print(err)
			time.Sleep(10 * time.Millisecond)
			continue
		}
		conns.Add(1)
		go func() {
			defer conns.Done()
			greet(ctx, conn)
		}()
	}
	if err := l.Close(); err != nil { // resets no connection
		log.Fatal(err)
	}

	if _, err := fmt.Fprintln(client, "TCP"); err != nil {
		log.Fatal(err)
	}
	response, err := bufio.NewReader(client).ReadString('\n')
	if err != nil {
		log.Fatal(err)
	}
	fmt.Print(response)
	client.Close()
	conns.Wait()

	// Output:
	// Hello TCP!
}

// greet responds to each line. When ctx is done, it closes the connection after the next response,
// or after a second.
func greet(ctx context.Context, conn net.Conn) {
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now().Add(time.Second)) })
	defer stop()
	for lines := bufio.NewScanner(conn); lines.Scan(); {
		isLast := ctx.Err() != nil // not later, when the client may be sending the next line
		if _, err := fmt.Fprintf(conn, "Hello %s!\n", lines.Text()); err != nil || isLast {
			return
		}
	}
}

// The same socket is served again after Stop. The client that connects in between waits in
// the accept queue, and gets its response from the next server.
func ExampleStoppableListener_Stop() {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	defer l.Close()

	// serve starts a server that responds with its name. It accepts from l until stop is called.
	serve := func(name string) (stop func()) {
		sl, err := stoppablelistener.New(l)
		if err != nil {
			log.Fatal(err)
		}
		handler := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprintln(w, "response of the", name)
		})
		served := make(chan error)
		go func() { served <- http.Serve(keepOpen{sl}, handler) }()
		return func() {
			sl.Stop()
			if err := <-served; err != stoppablelistener.StoppedError {
				log.Fatal(err)
			}
		}
	}

	stopFirst := serve("first")
	stopFirst()

	client, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	if _, err := fmt.Fprint(client, "GET / HTTP/1.0\r\n\r\n"); err != nil {
		log.Fatal(err)
	}

	stopSecond := serve("second")
	resp, err := http.ReadResponse(bufio.NewReader(client), nil)
	if err != nil {
		log.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.Copy(os.Stdout, resp.Body); err != nil {
		log.Fatal(err)
	}
	stopSecond()

	// Output:
	// response of the second
}

// keepOpen keeps the socket open when Serve, Shutdown or Close of an http.Server closes its
// listener.
type keepOpen struct {
	*stoppablelistener.StoppableListener
}

// Close calls Stop, so that Serve returns. Shutdown and Close of the server wait for that.
func (l keepOpen) Close() error {
	l.Stop()
	return nil
}
