//go:build unix && !aix && !solaris

package restart_test

import (
	"context"
	"log"
	"net/http"
	"os"
	"syscall"

	"github.com/c2db162c/stoppablelistener/httpdrain"
	"github.com/c2db162c/stoppablelistener/restart"
)

// Only one process can have the lock, as with a bbolt database or a device. A new process is ready
// first; then the old one shuts down and unlocks the file. New connections wait in the accept queue
// until then: some milliseconds, Grace (1.25 s) if a connection is idle, and for a long request up
// to Timeout (10 s). While another program has the lock, only a second signal ends the service.
func ExampleRun_lock() {
	if err := restart.Run(serveLocked); err != nil {
		log.Fatal(err)
	}
}

func serveLocked(ctx context.Context, p *restart.Process) error {
	l, err := p.Listen("tcp", os.Getenv("ADDR"))
	if err != nil {
		return err
	}
	file, err := os.OpenFile(os.Getenv("FILE"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err // before Ready: the old process keeps serving
	}
	defer file.Close() // unlocks it when Serve has returned
	p.Ready()
	if err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX); err != nil { // waits
		return err
	}
	server := &http.Server{Handler: http.NotFoundHandler()}
	return httpdrain.New(server).Serve(ctx, l)
}
