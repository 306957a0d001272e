package httpdrain_test

import (
	"context"
	"io"
	"log"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/c2db162c/stoppablelistener/httpdrain"
)

// A WebSocket is a hijacked connection, for which ListenAndServe does not wait. So the program says
// goodbye on each, and waits until the clients have closed them, for up to five seconds. With a
// package for WebSockets, send a message of your protocol: after a close frame, what a client has
// just sent cannot be answered. With Delay, say goodbye in a function that RegisterOnShutdown
// registers: before, clients may connect to this server again.
func Example_webSocket() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal kills the process

	chat := &chat{ctx: ctx}
	server := &http.Server{Addr: "localhost:8080", Handler: chat}
	if err := httpdrain.New(server).ListenAndServe(ctx); err != nil {
		log.Fatal(err)
	}
	chat.open.Wait()
}

type chat struct {
	ctx  context.Context
	open sync.WaitGroup
}

func (c *chat) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	c.open.Add(1) // before Hijack: until then, ListenAndServe waits for the connection
	defer c.open.Done()
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\n"+
		"Upgrade: chat\r\nConnection: Upgrade\r\n\r\n")
	stop := context.AfterFunc(c.ctx, func() {
		_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
		_, _ = io.WriteString(conn, "goodbye\n")
	})
	defer stop()
	_, _ = io.Copy(conn, rw)
}
