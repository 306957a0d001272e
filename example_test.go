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

	"github.com/c2db162c/stoppablelistener"
)

// Stop ends Serve, and the connections go on: the request in flight is answered in full.
// To end those too, and fail no request, copy drain.go from the folder example.
func Example() {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	sl, err := stoppablelistener.New(l)
	if err != nil {
		log.Fatal(err)
	}

	inFlight, finish := make(chan struct{}), make(chan struct{})
	handler := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		close(inFlight)
		<-finish
		fmt.Fprint(w, "Hello HTTP!")
	})
	served := make(chan error)
	go func() { served <- http.Serve(sl, handler) }()

	answer := make(chan string)
	go func() {
		defer close(answer)
		resp, err := http.Get("http://" + l.Addr().String())
		if err != nil {
			log.Print(err)
			return
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			log.Print(err)
			return
		}
		answer <- string(body)
	}()
	<-inFlight

	sl.Stop()
	if err := <-served; err != stoppablelistener.StoppedError {
		log.Fatal(err)
	}
	fmt.Println("Serve has returned")

	close(finish)
	fmt.Println(<-answer)

	// Output:
	// Serve has returned
	// Hello HTTP!
}

// Ctrl+C, SIGTERM, or whatever else ends a context, stops the listener.
func Example_signals() {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	sl, err := stoppablelistener.New(l)
	if err != nil {
		log.Fatal(err)
	}

	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	context.AfterFunc(ctx, sl.Stop)

	go cancel() // here in place of Ctrl+C

	err = http.Serve(sl, http.NotFoundHandler())
	fmt.Println(err == stoppablelistener.StoppedError)

	// Output:
	// true
}

// A standard server without any stop of its own: net/rpc's Accept ends on any error.
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
		server.Accept(sl) // logs StoppedError as it ends
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

	sl.Stop()
	serving.Wait()
	fmt.Println("Accept has returned")

	// The connection is the client's to end.
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

// Greet puts a greeting for name into reply.
func (Greeter) Greet(name string, reply *string) error {
	*reply = "Hello " + name + "!"
	return nil
}

// New refuses what it cannot wrap, and says what it was given.
func ExampleNew() {
	_, err := stoppablelistener.New(nil)
	fmt.Println(err)

	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	sl, err := stoppablelistener.New(l)
	if err != nil {
		log.Fatal(err)
	}
	_, err = stoppablelistener.New(sl)
	fmt.Println(err)

	if err := l.Close(); err != nil {
		log.Fatal(err)
	}
	_, err = stoppablelistener.New(l)
	fmt.Println(errors.Is(err, net.ErrClosed))

	// Output:
	// stoppablelistener: cannot wrap <nil>, only *net.TCPListener
	// stoppablelistener: cannot wrap *stoppablelistener.StoppableListener, only *net.TCPListener
	// true
}

// The accept loop of a TCP protocol, here echo, ends cleanly on StoppedError and
// then waits for its connections.
func ExampleStoppableListener_Accept() {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	defer l.Close()
	sl, err := stoppablelistener.New(l)
	if err != nil {
		log.Fatal(err)
	}

	serve := func() error {
		var conns sync.WaitGroup
		defer conns.Wait()
		for {
			conn, err := sl.Accept()
			if err == stoppablelistener.StoppedError {
				return nil
			}
			if err != nil {
				return err
			}
			conns.Add(1)
			go func() {
				defer conns.Done()
				defer conn.Close()
				if _, err := io.Copy(conn, conn); err != nil {
					log.Print(err)
				}
			}()
		}
	}
	served := make(chan error)
	go func() { served <- serve() }()

	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	fmt.Fprintln(conn, "Hello TCP!")
	var word1, word2 string
	if _, err := fmt.Fscan(conn, &word1, &word2); err != nil {
		log.Fatal(err)
	}
	fmt.Println(word1, word2)

	sl.Stop()
	if err := conn.Close(); err != nil {
		log.Fatal(err)
	}
	fmt.Println(<-served)

	// Output:
	// Hello TCP!
	// <nil>
}

// The same socket is stopped and served again. The client that comes in between
// waits in the kernel's queue, and the next server answers it.
func ExampleStoppableListener_Stop() {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	defer l.Close()

	// serve answers requests on l with the name, until stop is called.
	serve := func(name string) (stop func()) {
		sl, err := stoppablelistener.New(l)
		if err != nil {
			log.Fatal(err)
		}
		handler := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprintln(w, "answered by the", name)
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
	// answered by the second
}

// keepOpen keeps the socket open when http.Server closes its listener, which Serve does
// as it returns, and Shutdown and Close while they wait for Serve to return.
type keepOpen struct {
	*stoppablelistener.StoppableListener
}

// Close ends Serve, and leaves the socket to be served again.
func (l keepOpen) Close() error {
	l.Stop()
	return nil
}
