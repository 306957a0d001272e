//go:build unix

package proctest

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener/internal/testutil/proctest/arg0"
)

// An Installation is a path at which a version of the program is installed.
type Installation struct{ Path string }

// Install installs a version of the program.
func Install(t testing.TB, version string) Installation {
	i := Installation{filepath.Join(t.TempDir(), "program")}
	i.Replace(t, version)
	return i
}

// Replace installs another version: a script that runs the test binary.
func (i Installation) Replace(t testing.TB, version string) {
	i.ReplaceText(t, fmt.Sprintf("#!/bin/sh\n%s=%s %s=\"$0\" exec '%s' \"$@\"\n",
		VersionEnv, version, arg0.PathEnv, Self(t)))
}

// ReplaceText installs an executable file with that content.
func (i Installation) ReplaceText(t testing.TB, text string) {
	next := i.Path + ".next"
	// If a process started meanwhile, it would have the file open, and no process could execute it.
	syscall.ForkLock.RLock()
	err := os.WriteFile(next, []byte(text), 0o700)
	syscall.ForkLock.RUnlock()
	require.NoError(t, err)
	require.NoError(t, os.Rename(next, i.Path))
}
