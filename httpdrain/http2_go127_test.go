//go:build go1.27

package httpdrain_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener/internal/testutil/httpclient"
	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

const tlsSendsTwoGoAways = true

func init() {
	shared := kind{servers: 5, tls: true, http2: true, keepAlive: true, shared: true}
	const name = "HTTP/2 over TLS, many at a time"
	kinds[name], rollingKinds[name] = shared, shared
}

// The client closes the connection when it has received GOAWAY, so Serve does not wait until the
// grace period is over. Before Go 1.27, a Transport waits for the server.
func TestIdleHTTP2ConnectionIsClosedByItsClient(t *testing.T) {
	s := startService(t, tcptest.Listen(t), httpclient.ServerTLS(), hello)
	_, err := httpclient.Post(httpclient.NewClient(s.config, true, true), s.url(), "")
	require.NoError(t, err)
	start := time.Now()
	s.stop()
	s.requireDrained(t)
	assert.Less(t, time.Since(start), s.drainer.Grace/2)
}
