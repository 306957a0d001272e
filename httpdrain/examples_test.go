package httpdrain_test

import (
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener/internal/testutil/httpclient"
	"github.com/c2db162c/stoppablelistener/internal/testutil/httpload"
	"github.com/c2db162c/stoppablelistener/internal/testutil/proctest"
	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

func init() {
	programs["listener"] = ExampleListener
	programs["reverse proxy"] = Example_reverseProxy
}

// startExample starts one of the programs, with these variables and a free port in PORT. It
// returns when the program listens there.
func startExample(t testing.TB, name string, variables ...string) (p *proctest.Program, addr string) {
	t.Helper()
	for range 10 {
		addr = freeAddr(t)
		cmd := exec.Command(proctest.Self(t), name)
		cmd.Env = append(append(os.Environ(), variables...), "PORT="+port(addr))
		p = proctest.Start(t, cmd)
		process, listens := p.Next(t), false
		tcptest.Await(t, "the example listens", func() bool {
			conn, err := net.Dial("tcp", addr)
			if listens = err == nil; listens {
				conn.Close()
			}
			return listens || len(process.Exited) > 0
		})
		if listens {
			return p, addr
		}
	}
	require.FailNow(t, "no free port: "+p.Errors(t))
	return nil, ""
}

// freeAddr returns an address at which nothing listens, unless another process takes it.
func freeAddr(t testing.TB) string {
	l := tcptest.Listen(t)
	require.NoError(t, l.Close())
	return l.Addr().String()
}

func port(addr string) string {
	_, port, _ := net.SplitHostPort(addr)
	return port
}

func TestExamplesFailNoRequestUnderLoad(t *testing.T) {
	tcptest.RequireRefusal(t)
	t.Parallel()
	backend := httptest.NewServer(hello)
	t.Cleanup(backend.Close)
	for _, name := range []string{"listener", "reverse proxy"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, addr := startExample(t, name, "BACKEND="+backend.URL)
			wait := httpload.PostUntilError("http://"+addr, 16, func(i int) *http.Client {
				return httpclient.NewClient(nil, false, i%2 == 0)
			})
			proctest.Signal(t, p.Process, syscall.SIGTERM)
			httpload.RequireRefused(t, wait())
			p.RequireStatus(t, 0)
			assert.Empty(t, p.Errors(t))
		})
	}
}

// Clients reject an informational response with Connection: close.
func TestExampleForwardsEarlyHints(t *testing.T) {
	t.Parallel()
	backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
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
	proctest.Signal(t, p.Process, syscall.SIGTERM)
	tcptest.AwaitRefused(t, addr)
	requireHints()
	c.RequireLastResponse(t, "Hello")
	p.RequireStatus(t, 0)
}
