// The tests of this directory are those of the listener for which the top level has no room.
package listenertest_test

import (
	"os"
	"testing"

	"github.com/c2db162c/stoppablelistener/internal/testutil/proctest"
)

// programs are what the processes that the tests start do, by their first argument.
var programs = map[string]func(){"child": child, "idle": idle}

func TestMain(m *testing.M) { proctest.Main(m, func(string) { programs[os.Args[1]]() }) }
