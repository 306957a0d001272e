//go:build go1.24

package httpdrain

import "net/http"

// restrict restricts p to the server's Protocols.
func (p *protocols) restrict(server *http.Server) {
	enabled := server.Protocols
	if enabled == nil {
		return
	}
	p.wrapTCP = p.http2 && enabled.UnencryptedHTTP2()
	p.http2 = p.http2 && enabled.HTTP2()
	p.http1 = enabled.HTTP1() || *enabled == http.Protocols{}
}
