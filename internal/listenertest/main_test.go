// The tests of this directory are those of the listener for which the top level has no room.
package listenertest_test

import (
	"io"
	"os"
	"os/exec"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/c2db162c/stoppablelistener/internal/testutil/proctest"
)

// programs are what the processes that the tests start do, by their first argument.
var programs = map[string]func(){"child": child, "idle": idle}

func TestMain(m *testing.M) { proctest.Main(m, func(string) { programs[os.Args[1]]() }) }

// start starts one of the programs, which inherits files.
func start(t *testing.T, name string, files ...*os.File) (p *proctest.Program, stdin io.WriteCloser) {
	cmd := exec.Command(proctest.Self(t), name)
	cmd.ExtraFiles = files
	stdin, err := cmd.StdinPipe()
	require.NoError(t, err)
	return proctest.Start(t, cmd), stdin
}
