//go:build unix

package restart_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener/internal/testutil/proctest"
	"github.com/c2db162c/stoppablelistener/internal/testutil/tcptest"
)

// What a child is started with

// The parent changes its arguments, its environment and its directory before it calls Run.
func TestNewProcessIsStartedAsTheParentWas(t *testing.T) {
	tcptest.SkipIfShort(t, "starts many processes")
	t.Parallel()
	dir := t.TempDir()
	s := start(t, "1,"+changes, func(cmd *exec.Cmd) { cmd.Dir = dir },
		with("TEST_VARIABLE=value", "TEST_SECRET=secret", "PWD="+dir))
	s.restart(t, "1", "2,"+changes)
	for n := 2; n < 5; n += 2 { // restarted by the parent, which has served and then has not
		s.restart(t, fmt.Sprint(n), fmt.Sprint(n+1))
		args := []string{s.Path, "tcp,127.0.0.1:0"}
		want := fmt.Sprintln(s.parent.Pid, args, "value", "secret", dir)
		assert.Equal(t, want, s.get(t, "/process"))
		s.restart(t, fmt.Sprint(n+1), fmt.Sprint(n+2, ",", changes))
	}
}

// As in "cd current && ./server", where current is a symbolic link to a release.
func TestNewProcessFollowsTheSymbolicLinkOfADeploy(t *testing.T) {
	tcptest.SkipIfShort(t, "starts many processes")
	t.Parallel()
	for name, script := range map[string]string{
		"relative path": `cd current && exec ./program "$2"`,
		"absolute path": `cd current && exec "$PWD/program" "$2"`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			current := filepath.Join(dir, "current")
			// deploy makes the link lead to a release, and deletes the others.
			deploy := func(release string) {
				t.Helper()
				releases := filepath.Join(dir, "releases")
				require.NoError(t, os.RemoveAll(releases))
				require.NoError(t, os.MkdirAll(filepath.Join(releases, release), 0o700))
				proctest.Installation{Path: filepath.Join(releases, release, "program")}.
					Replace(t, release)
				require.NoError(t, os.Symlink(filepath.Join("releases", release), current+".next"))
				require.NoError(t, os.Rename(current+".next", current))
			}
			deploy("1")
			s := start(t, "1", func(cmd *exec.Cmd) {
				cmd.Args = []string{"sh", "-c", script, "sh", dir, "tcp,127.0.0.1:0"}
				cmd.Path, cmd.Dir = "/bin/sh", dir
			})
			require.Equal(t, "1", s.get(t, "/"))
			for n := 1; n < 3; n++ {
				deploy(fmt.Sprint(n + 1))
				s.signal(t, syscall.SIGUSR2)
				require.Equal(t, s.addrs, s.requireReady(t, fmt.Sprint(n+1)))
				s.RequireLines(t, fmt.Sprint(n, " replaced: user defined signal 2"))
				assert.Contains(t, s.get(t, "/process"), current+"\n", "working directory")
			}
			s.stop(t, "3")
		})
	}
}

// The program changes PATH and its directory.
func TestProgramIsFoundInThePATHOfTheParent(t *testing.T) {
	tcptest.SkipIfShort(t, "starts many processes")
	t.Parallel()
	for name, path := range map[string]func(dir string) string{
		"absolute": func(dir string) string { return dir },
		"relative": func(string) string { return "." },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := start(t, "1", func(cmd *exec.Cmd) {
				dir := filepath.Dir(cmd.Path)
				cmd.Path, cmd.Args[0] = proctest.Self(t), filepath.Base(cmd.Path)
				cmd.Dir = dir
				with("PATH="+path(dir)+":"+os.Getenv("PATH"),
					proctest.VersionEnv+"=1,"+changes)(cmd)
			})
			s.restart(t, "1", "2")
			s.stop(t, "2")
		})
	}
}
