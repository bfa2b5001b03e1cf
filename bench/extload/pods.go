package main

import (
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
)

const answer = `{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"llama-3-8b","choices":[{"index":0,` +
	`"message":{"role":"assistant","content":"ok"},"finish_reason":"stop"}],` +
	`"usage":{"prompt_tokens":1000,"completion_tokens":1,"total_tokens":1001}}`

// pods serves the same metrics page on many addresses, and answers chats at once with a constant.
func pods(args []string) error {
	flags := flag.NewFlagSet("pods", flag.ExitOnError)
	count := flags.Int("n", 64, "pods, at most 254: 127.0.1.1, 127.0.1.2 and so on")
	port := flags.Int("port", 8000, "port of every pod")
	page := flags.String("metrics", "", "file with the metrics page")
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
		io.Copy(io.Discard, r.Body)
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
