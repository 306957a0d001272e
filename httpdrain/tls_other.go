//go:build !go1.27

package httpdrain

const servesHTTP2OnAnyTLSConn = false
