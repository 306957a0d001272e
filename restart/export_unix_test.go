//go:build unix

package restart

import "time"

// SetReadyTimeout sets how long a new process may take until it calls Ready.
func SetReadyTimeout(d time.Duration) { readyTimeout = d }
