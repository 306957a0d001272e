//go:build unix

package restart

import "time"

// SetReadyTimeout sets how long a new process may take until it calls Ready.
func SetReadyTimeout(d time.Duration) { readyTimeout = d }

// SetWordTimeout sets how long Drain waits in a child that is signaled itself.
func SetWordTimeout(d time.Duration) { wordTimeout = d }
