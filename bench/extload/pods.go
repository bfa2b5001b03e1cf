package main

import (
	"bytes"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"
)

const answer = `{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"llama-3-8b","choices":[{"index":0,` +
	`"message":{"role":"assistant","content":"ok"},"finish_reason":"stop"}],` +
	`"usage":{"prompt_tokens":1000,"completion_tokens":1,"total_tokens":1001}}`

// streamed answers chunk by chunk, with usage at the end if the request asks for it.
func streamed(w http.ResponseWriter, chunks int, gap time.Duration, withUsage bool) {
	w.Header().Set("content-type", "text/event-stream")
	flush := http.NewResponseController(w).Flush
	for range chunks {
		io.WriteString(w, chunk)
		flush()
		time.Sleep(gap)
	}
	if withUsage {
		io.WriteString(w, lastChunk)
	} else {
		io.WriteString(w, "data: [DONE]\n\n")
	}
}

// pods serves the same metrics page on many addresses, and answers chats with a constant: at once, or, to those who
// ask for a stream, in chunks with pauses between them.
func pods(args []string) error {
	flags := flag.NewFlagSet("pods", flag.ExitOnError)
	count := flags.Int("n", 64, "pods, at most 254: 127.0.1.1, 127.0.1.2 and so on")
	port := flags.Int("port", 8000, "port of every pod")
	page := flags.String("metrics", "", "file with the metrics page")
	chunks := flags.Int("chunks", 20, "chunks of a streamed answer")
	gap := flags.Duration("gap", 5*time.Millisecond, "pause after each")
	flags.Parse(args)
	text, err := os.ReadFile(*page)
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/metrics", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("content-type", "text/plain; version=0.0.4")
		w.Write(text)
	})
	mux.HandleFunc("/v1/models", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("content-type", "application/json")
		io.WriteString(w, `{"object":"list","data":[{"id":"llama-3-8b","object":"model"}]}`)
	})
	mux.HandleFunc("/v1/chat/completions", func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if bytes.Contains(body, []byte(`"stream":true`)) {
			streamed(w, *chunks, *gap, bytes.Contains(body, []byte(`"include_usage":true`)))
			return
		}
		w.Header().Set("content-type", "application/json")
		io.WriteString(w, answer)
	})
	for i := 1; i <= *count; i++ {
		listener, err := net.Listen("tcp", fmt.Sprintf("127.0.1.%d:%d", i, *port))
		if err != nil {
			return err
		}
		go http.Serve(listener, mux)
	}
	fmt.Println("listening")
	untilTold()
	return nil
}
