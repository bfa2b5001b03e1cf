// extload drives an Envoy external-processing server as Envoy does, and serves stub pods for it to route to.
//
//	extload pods -n 64 -metrics page.txt               N stub pods on 127.0.1.x:8000
//	extload load -addr 127.0.0.1:50052 -size 4096      streams one after the other; latency, rate, the server's CPU
//	extload hold -addr 127.0.0.1:50052 -n 10000        many streams, routed and then left open
//
// A stream is one HTTP request: headers, wait for the reply, body, wait for the reply; with -chunks response headers
// and an SSE answer chunk by chunk, each waiting for its reply. It is then cancelled, as Envoy ends its streams.
package main

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

var commands = map[string]func(args []string) error{"pods": pods, "load": load, "hold": hold}

func main() {
	if len(os.Args) < 2 || commands[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "usage: extload pods|load|hold [flags]; -h after one of them lists its flags")
		os.Exit(2)
	}
	if err := commands[os.Args[1]](os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "extload:", err)
		os.Exit(1)
	}
}

// untilTold waits for SIGTERM or SIGINT.
func untilTold() {
	told := make(chan os.Signal, 1)
	signal.Notify(told, syscall.SIGTERM, syscall.SIGINT)
	<-told
}
