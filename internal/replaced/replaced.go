// Package replaced has the error with which package restart and package httpdrain recognize that
// another process serves from now on.
package replaced

import "errors"

// Err is restart.ErrReplaced.
var Err = errors.New("user defined signal 2")
