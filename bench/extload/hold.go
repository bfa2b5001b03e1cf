package main

import (
	"context"
	"flag"
	"fmt"
	"math/rand"
	"sync"
)

// hold opens streams that are routed and then wait for a response that does not come.
func hold(args []string) error {
	flags := flag.NewFlagSet("hold", flag.ExitOnError)
	address := flags.String("addr", "127.0.0.1:50052", "ext_proc address(es), comma separated")
	connections := flags.Int("conns", 16, "connections per address")
	count := flags.Int("n", 10000, "streams")
	size := flags.Int("size", 4096, "body bytes")
	strategy := flags.String("strategy", "", "routing-strategy header")
	flags.Parse(args)
	clients, err := dial(*address, *connections)
	if err != nil {
		return err
	}
	t := &traffic{prompts: newPrompts(*size, 200, 0.7), strategy: *strategy, targets: map[string]int{}}
	var wait sync.WaitGroup
	errors := make(chan error, *count)
	turns := make(chan struct{}, 64) // opened at once
	for i := range *count {
		wait.Add(1)
		turns <- struct{}{}
		go func() {
			defer wait.Done()
			_, _, err := t.route(context.Background(), rand.New(rand.NewSource(int64(i))), clients[i%len(clients)])
			<-turns
			if err != nil {
				errors <- err
			}
		}()
	}
	wait.Wait()
	if len(errors) > 0 {
		return fmt.Errorf("%d of %d streams failed, the first one: %w", len(errors), *count, <-errors)
	}
	fmt.Println("open")
	untilTold()
	return nil
}
