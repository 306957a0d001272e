package httpdrain_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener/internal/testutil/httpclient"
	"github.com/c2db162c/stoppablelistener/internal/testutil/httpload"
	"github.com/c2db162c/stoppablelistener/internal/testutil/proctest"
	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

func init() {
	programs["delay"] = Example
	programs["listener"] = ExampleListener
	programs["reverse proxy"] = Example_reverseProxy
	programs["shutdown order"] = serveInOrder
}

// startExample starts one of the programs, with these variables and a free port in PORT. It
// returns when the program listens there.
func startExample(
	t testing.TB, name string, variables ...string,
) (p *proctest.Program, addr string) {
	t.Helper()
	addr = tcptest.FreeAddr(t)
	cmd := exec.Command(proctest.Self(t), name)
	cmd.Env = append(append(os.Environ(), variables...), "PORT="+port(addr))
	p = proctest.Start(t, cmd)
	tcptest.Await(t, "the example listens", func() bool {
		conn, err := net.Dial("tcp", addr)
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
	return p, addr
}

func port(addr string) string {
	_, port, _ := net.SplitHostPort(addr)
	return port
}

func TestExamplesFailNoRequestUnderLoad(t *testing.T) {
	tcptest.SkipIfShort(t, "starts programs")
	tcptest.RequireRefusal(t)
	t.Parallel()
	backend := httptest.NewServer(hello)
	t.Cleanup(backend.Close)
	for _, name := range []string{"listener", "reverse proxy"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, addr := startExample(t, name, "BACKEND="+backend.URL)
			httpload.RequireSignalFailsNoRequest(t, p, addr)
		})
	}
}

// Clients reject an informational response with Connection: close. The final one carries it, also if
// the backend fails.
func TestExampleForwardsEarlyHints(t *testing.T) {
	t.Parallel()
	backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/abort" {
			panic(http.ErrAbortHandler)
		}
		w.WriteHeader(http.StatusEarlyHints)
		hello(w, r)
	}))
	t.Cleanup(backend.Close)
	p, addr := startExample(t, "reverse proxy", "BACKEND="+backend.URL)
	c := httpclient.Dial(t, addr, nil)
	requireHints := func() {
		c.Get(t, "/")
		hints, _ := c.Response(t)
		require.Equal(t, http.StatusEarlyHints, hints.StatusCode)
		assert.False(t, hints.Close, "Early Hints carry Connection: close")
	}
	requireHints()
	c.Response(t)
	failing := httpclient.Dial(t, addr, nil)
	failing.Get(t, "/")
	failing.Response(t) // Early Hints
	failing.Response(t)
	proctest.Signal(t, p.Process, syscall.SIGTERM)
	tcptest.AwaitRefused(t, addr)
	requireHints()
	c.RequireLastResponse(t, "Hello")
	failing.Get(t, "/abort")
	failing.RequireLastResponse(t, "") // 502
	p.RequireStatus(t, 0)
}

// The worker is busy until the test has seen that the API has stopped and the admin port has not.
func TestExampleStopsWhatOthersNeedAfterThem(t *testing.T) {
	tcptest.SkipIfShort(t, "starts a program")
	tcptest.RequireRefusal(t)
	t.Parallel()
	admin := tcptest.FreeAddr(t)
	p, addr := startExample(t, "shutdown order", "ADMIN_PORT="+port(admin))
	require.Equal(t, http.StatusOK, httpclient.Status(t, admin, "/ready"))
	idle := httpclient.Dial(t, addr, nil)
	idle.Get(t, "/")
	idle.Response(t)
	var accepted atomic.Int64
	wait := httpload.PostUntilError("http://"+addr, 16, func(i int) *http.Client {
		client := httpclient.NewClient(nil, false, i%2 == 0)
		client.Transport = counting{client.Transport, &accepted}
		return client
	})
	start := time.Now()
	proctest.Signal(t, p.Process, syscall.SIGTERM)
	tcptest.Await(t, "failure of the readiness probe", func() bool {
		return httpclient.Status(t, admin, "/ready") == http.StatusServiceUnavailable
	})
	httpload.RequireRefused(t, wait())
	assert.GreaterOrEqual(t, time.Since(start), shortDelay, "until connections are refused")

	idle.Get(t, "/?job="+lastJob)
	idle.AwaitClosed(t)
	<-time.After(50 * time.Millisecond) // what does not wait for the worker stops now
	require.Equal(t, http.StatusOK, httpclient.Status(t, admin, "/debug/vars"))
	httpclient.Dial(t, admin, nil).Get(t, "/finish") // the program may exit before it responds
	p.RequireLines(t, fmt.Sprint("closed, with ", accepted.Load()+2, " jobs"))
	p.RequireStatus(t, 0)
	assert.Empty(t, p.Errors(t))
}

// counting counts the responses to requests that were accepted.
type counting struct {
	http.RoundTripper
	accepted *atomic.Int64
}

func (c counting) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := c.RoundTripper.RoundTrip(r)
	if err == nil && resp.StatusCode == http.StatusAccepted {
		c.accepted.Add(1)
	}
	return resp, err
}

const shortDelay = 200 * time.Millisecond

// lastJob is a job that is not done before the path /finish of the admin port is requested.
const lastJob = "last"

// A database counts the jobs that are inserted.
type database struct {
	jobs   int
	finish chan struct{}
}

func serveInOrder() {
	db := &database{finish: make(chan struct{})}
	sql.Register("postgres", db)
	http.HandleFunc("/finish", func(http.ResponseWriter, *http.Request) { close(db.finish) })
	delay = shortDelay
	Example_shutdownOrder()
}

func (db *database) Open(string) (driver.Conn, error)               { return db, nil }
func (db *database) OpenConnector(string) (driver.Connector, error) { return connector{db}, nil }
func (db *database) Prepare(string) (driver.Stmt, error)            { return nil, driver.ErrSkip }
func (db *database) Begin() (driver.Tx, error)                      { return nil, driver.ErrSkip }
func (db *database) Close() error                                   { return nil }

func (db *database) ExecContext(
	_ context.Context, _ string, args []driver.NamedValue,
) (driver.Result, error) {
	if args[0].Value == lastJob {
		<-db.finish
	}
	db.jobs++
	return driver.ResultNoRows, nil
}

// A connector is what sql.DB closes.
type connector struct{ *database }

func (c connector) Connect(context.Context) (driver.Conn, error) { return c.database, nil }

func (c connector) Driver() driver.Driver { return c.database }

func (c connector) Close() error {
	fmt.Println("closed, with", c.jobs, "jobs")
	return nil
}
