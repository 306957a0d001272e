package httpdrain

import (
	"bytes"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
)

func appendFrame(b []byte, typ, flags byte, stream uint32, payload []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(payload))<<8|uint32(typ))
	b = append(b, flags)
	return append(binary.BigEndian.AppendUint32(b, stream), payload...)
}

// randomFrames returns what a server may write, from SETTINGS on.
func randomFrames(r *rand.Rand) []byte {
	payload := func() []byte { return make([]byte, r.IntN(40)) }
	b := appendFrame(nil, frameSettings, 0, 0, payload())
	for range r.IntN(20) {
		switch stream := r.Uint32() >> 1; r.IntN(8) {
		case 0:
			b = appendFrame(b, frameGoAway, 0, 0, append(make([]byte, 8), payload()...))
		case 1, 2, 3: // HEADERS or PUSH_PROMISE
			typ := []byte{frameHeaders, framePushPromise}[r.IntN(2)]
			flags, more := byte(r.Uint32()), r.IntN(3)
			for range more {
				b = appendFrame(b, typ, flags&^flagEndHeaders, stream, payload())
				typ = frameContinuation
			}
			b = appendFrame(b, typ, flags|flagEndHeaders, stream, payload())
		default: // DATA, WINDOW_UPDATE, PING, SETTINGS
			typ := []byte{0, 8, 6, frameSettings}[r.IntN(4)]
			b = appendFrame(b, typ, byte(r.Uint32()), stream, payload())
		}
	}
	return b
}

// A shortWriter cuts some of what is written short.
type shortWriter struct {
	bytes.Buffer
	r *rand.Rand
}

func (w *shortWriter) Write(p []byte) (int, error) {
	if w.r.IntN(4) > 0 {
		return w.Buffer.Write(p)
	}
	n, _ := w.Buffer.Write(p[:w.r.IntN(len(p)+1)])
	if n < len(p) {
		return n, os.ErrDeadlineExceeded
	}
	return n, nil
}

// goAwayAllowed returns where the first GOAWAY may be inserted into what a server writes.
func goAwayAllowed(b []byte) (offsets []int) {
	response, headerBlock := false, false
	for n := 0; n < len(b); {
		typ, flags := b[n+3], b[n+4]
		n += frameHeaderLen + int(binary.BigEndian.Uint32(b[n:])>>8)
		switch typ {
		case frameGoAway:
			return offsets
		case frameHeaders, framePushPromise, frameContinuation:
			response = response || typ == frameHeaders
			headerBlock = flags&flagEndHeaders == 0
		}
		if response && !headerBlock {
			offsets = append(offsets, n)
		}
	}
	return offsets
}

// What a server writes, in pieces that are cut short, is not changed, except that the first GOAWAY
// is inserted once, where that is allowed, after it has been wanted.
func FuzzGoAway(f *testing.F) {
	for seed := range uint64(2000) {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, seed uint64) {
		r := rand.New(rand.NewPCG(seed, 0))
		conn, wanted := &shortWriter{r: r}, new(atomic.Bool)
		w := newGoAwayWriter(conn, wanted)
		all := randomFrames(r)
		if r.IntN(10) == 0 {
			copy(all, "HTTP/1.1 ")
		}
		wantedAt := r.IntN(len(all) + 1)
		written := 0
		for written < len(all) || !wanted.Load() {
			if written >= wantedAt && !wanted.Load() {
				wantedAt = written
				wanted.Store(true)
				w.sendIfIdle()
			}
			n, err := w.Write(all[written:min(len(all), written+r.IntN(60))])
			written += n
			if err != nil {
				require.ErrorIs(t, err, os.ErrDeadlineExceeded)
			}
		}
		for range 20 { // each may be cut short
			w.sendIfIdle()
		}

		got := conn.Bytes()
		allowed := []int(nil)
		if !bytes.HasPrefix(all, []byte("HTTP/1.1 ")) {
			allowed = goAwayAllowed(all)
		}
		allowed = slices.DeleteFunc(allowed, func(offset int) bool { return offset < wantedAt })
		if len(allowed) == 0 {
			require.Equal(t, all, got, "GOAWAY is not allowed anywhere")
			return
		}
		ok := slices.ContainsFunc(allowed, func(offset int) bool {
			return bytes.Equal(got, slices.Insert(slices.Clone(all), offset, goAwayFrame...))
		})
		require.True(t, ok, "GOAWAY is allowed at %v\nframes: %x\ngot:    %x", allowed, all, got)
	})
}

// BenchmarkHTTP2Write measures what the wrapper adds to a Write of package http.
func BenchmarkHTTP2Write(b *testing.B) {
	response := appendFrame(nil, frameHeaders, flagEndHeaders, 1, make([]byte, 40))
	response = appendFrame(response, 0, 1, 1, make([]byte, 100))
	w := newGoAwayWriter(io.Discard, new(atomic.Bool))
	_, err := w.Write(appendFrame(nil, frameSettings, 0, 0, nil))
	require.NoError(b, err)
	b.ReportAllocs()
	b.ResetTimer()
	for range b.N {
		_, _ = w.Write(response)
	}
}
