package httpdrain_test

import (
	"context"
	"log"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/signal"
	"syscall"

	"github.com/c2db162c/stoppablelistener/httpdrain"
)

// A reverse proxy forwards 103 Early Hints and 100 Continue of its backend. Some clients reject
// such a response if it carries Connection: close, so the proxy sends that with the final one only.
// If the backend sends neither, the ReverseProxy can be the server's Handler. Upgraded connections,
// such as WebSockets, are cut when the program exits.
func Example_reverseProxy() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal kills the process

	backend, err := url.Parse(os.Getenv("BACKEND"))
	if err != nil {
		log.Fatal(err)
	}
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		connection := w.Header().Get("Connection") // "close" during the shutdown
		w.Header().Del("Connection")
		proxy := &httputil.ReverseProxy{
			Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(backend) },
			ModifyResponse: func(resp *http.Response) error {
				if connection != "" {
					resp.Header.Set("Connection", connection)
				}
				return nil
			},
			ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
				log.Print(err)
				if connection != "" {
					w.Header().Set("Connection", connection)
				}
				w.WriteHeader(http.StatusBadGateway)
			},
		}
		proxy.ServeHTTP(w, r)
	})
	server := &http.Server{Addr: ":" + os.Getenv("PORT"), Handler: handler}
	if err := httpdrain.New(server).ListenAndServe(ctx); err != nil {
		log.Fatal(err)
	}
}
