//go:build unix

package restart_test

import (
	"testing"
	"time"
)

// BenchmarkRestart counts the requests that fail because the process that serves is replaced,
// and measures the longest of the others. One variant shuts its connections down with package
// httpdrain, the other one with Shutdown.
func BenchmarkRestart(b *testing.B) {
	const restarts = 20
	failed := make(map[string]int64)
	longest := make(map[string]time.Duration)
	variants := map[string]string{"drain": "1", "Shutdown": "1," + shutsDown}
	for range b.N {
		for variant, version := range variants {
			all := func(int) string { return version }
			for _, load := range restartUnderLoad(b, restarts, all) {
				failed[variant] += load.Failed()
				longest[variant] = max(longest[variant], load.Longest())
			}
		}
	}
	for variant, n := range failed {
		b.ReportMetric(float64(n)/float64(b.N*restarts), variant+"-failed/restart")
		b.ReportMetric(float64(longest[variant].Milliseconds()), variant+"-longest-ms")
	}
	b.ReportMetric(0, "ns/op")
}
