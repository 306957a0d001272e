//go:build !go1.24

package httpdrain

import "net/http"

func (p *protocols) restrict(*http.Server) {}
