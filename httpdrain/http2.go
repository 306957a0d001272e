package httpdrain

import (
	"crypto/tls"
	"net"
	"net/http"
	"slices"
	"sync/atomic"
)

// protocols are those that a server serves.
type protocols struct {
	http1, http2 bool // over TLS

	// Two GOAWAYs are sent without TLS, and over TLS. That needs the HTTP/2 of package http, not
	// that of x/net, and a version of Go that serves HTTP/2 on connections of another type.
	wrapTCP, wrapTLS bool
}

// setUpHTTP2 makes server serve HTTP/2 in each Serve, if that is not disabled, as it does in
// ServeTLS. Otherwise, the first Serve would decide that for all, and not do so if TLSConfig is
// set and does not list "h2".
func setUpHTTP2(server *http.Server) protocols {
	ofPackageHTTP := server.TLSNextProto == nil
	server.TLSConfig = server.TLSConfig.Clone() // the server changes it
	// ServeTLS fails, because there is no such file, after it has set up HTTP/2, or with the error
	// that each Serve will return.
	_ = server.ServeTLS(nil, "\x00", "\x00")
	p := protocols{http1: true}
	_, p.http2 = server.TLSNextProto["h2"]
	p.restrict(server)
	p.wrapTCP = p.wrapTCP && ofPackageHTTP
	p.wrapTLS = p.http2 && ofPackageHTTP && servesHTTP2OnAnyTLSConn
	return p
}

// tlsConfig returns a copy of config with the certificate, as ServeTLS of package http makes it.
func (p *protocols) tlsConfig(config *tls.Config, certFile, keyFile string) (*tls.Config, error) {
	if config == nil {
		config = new(tls.Config)
	}
	config = config.Clone()
	config.NextProtos = setProto(slices.Clone(config.NextProtos), "h2", p.http2)
	config.NextProtos = setProto(config.NextProtos, "http/1.1", p.http1)
	hasCertificate := len(config.Certificates) > 0 ||
		config.GetCertificate != nil || config.GetConfigForClient != nil
	if !hasCertificate || certFile != "" || keyFile != "" {
		cert, err := tls.LoadX509KeyPair(certFile, keyFile)
		if err != nil {
			return nil, err
		}
		config.Certificates = []tls.Certificate{cert}
	}
	return config, nil
}

// setProto adds proto to protos if it is enabled, and removes it if not.
func setProto(protos []string, proto string, enabled bool) []string {
	switch has := slices.Contains(protos, proto); {
	case enabled && !has:
		return append(protos, proto)
	case has && !enabled:
		return slices.DeleteFunc(protos, func(p string) bool { return p == proto })
	}
	return protos
}

// wrap returns a connection that sends two GOAWAYs, the first once goAway is true, if conn may
// become HTTP/2.
func (p *protocols) wrap(conn net.Conn, goAway *atomic.Bool) net.Conn {
	switch c := conn.(type) {
	case *tls.Conn:
		if p.wrapTLS {
			return &tlsConn{c, newGoAwayWriter(c, goAway)}
		}
	case interface{ ConnectionState() tls.ConnectionState }: // of another package
	case *net.TCPConn:
		if p.wrapTCP {
			return &tcpConn{c, newGoAwayWriter(c, goAway)}
		}
	default:
		if p.wrapTCP {
			return &wrappedConn{conn, newGoAwayWriter(conn, goAway)}
		}
	}
	return conn
}
