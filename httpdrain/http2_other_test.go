//go:build !go1.27

package httpdrain_test

const tlsSendsTwoGoAways = false
