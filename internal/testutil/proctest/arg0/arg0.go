// Package arg0 lets a process of the tests look as if it had been started as the program that is
// installed, although that is a script, which cannot choose os.Args[0] of what it executes.
//
// It must do so before package restart is initialized, which takes the arguments then. So it
// imports nothing that is initialized later: of packages that can be initialized, Go takes the
// one whose import path sorts first.
package arg0

import "os"

// PathEnv is the environment variable with the path at which the program is installed.
const PathEnv = "STOPPABLELISTENER_TEST_PATH"

func init() {
	if path := os.Getenv(PathEnv); path != "" {
		os.Args[0] = path
	}
}
