package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// result of a run, as -json prints it. Counted is what ended while it was being measured.
type result struct {
	Seconds       float64            `json:"seconds"`
	Streams       int                `json:"streams"`
	Errors        int                `json:"errors"`
	Immediate     int                `json:"immediate"`
	FirstError    string             `json:"first_error"`
	Chunks        int                `json:"chunks"`
	Microseconds  map[string]float64 `json:"latency_microseconds"`
	UserSeconds   float64            `json:"cpu_user_seconds"`
	SystemSeconds float64            `json:"cpu_system_seconds"`
	Targets       map[string]int     `json:"targets"`
}

// load runs streams for a while: closed loop, where -c of them are always open, or open loop, where they arrive at random
// with a mean rate and their latency counts from when they were due.
func load(args []string) error {
	flags := flag.NewFlagSet("load", flag.ExitOnError)
	address := flags.String("addr", "127.0.0.1:50052", "ext_proc address(es), comma separated")
	connections := flags.Int("conns", 2, "connections per address")
	concurrent := flags.Int("c", 32, "concurrent streams")
	duration := flags.Duration("d", 10*time.Second, "duration")
	rate := flags.Float64("rate", 0, "open-loop arrivals per second; 0: closed loop")
	size := flags.Int("size", 4096, "body bytes")
	sessions := flags.Int("sessions", 200, "distinct prompt prefixes")
	shared := flags.Float64("shared", 0.7, "share of the body that a session repeats")
	mode := flags.String("mode", "buffered", "buffered (lockstep headers, body) or duplex (as the Gateway API extension)")
	chunks := flags.Int("chunks", 0, "also send response headers and this many SSE chunks, one message each")
	strategy := flags.String("strategy", "", "routing-strategy header")
	pidList := flags.String("pids", "", "comma separated processes that are charged their CPU")
	warm := flags.Duration("warm", 2*time.Second, "warm-up")
	asJSON := flags.Bool("json", false, "print JSON")
	flags.Parse(args)

	clients, err := dial(*address, *connections)
	if err != nil {
		return err
	}
	pids, err := numbers(*pidList)
	if err != nil {
		return err
	}
	t := &traffic{prompts: newPrompts(*size, *sessions, *shared), strategy: *strategy, chunks: *chunks,
		duplex: *mode == "duplex", targets: map[string]int{}}

	var measuring atomic.Bool
	var wait sync.WaitGroup
	stop := make(chan struct{})
	due := make(chan time.Time, 1<<16)
	parts := make([]result, *concurrent)
	latencies := make([][]time.Duration, *concurrent)
	worker := func(number int) {
		defer wait.Done()
		r := rand.New(rand.NewSource(int64(number) + 1000))
		part := &parts[number]
		for {
			var since time.Time
			if *rate > 0 {
				select {
				case <-stop:
					return
				case since = <-due:
				}
			} else {
				select {
				case <-stop:
					return
				default:
				}
			}
			late := time.Duration(0)
			if *rate > 0 {
				late = time.Since(since)
			}
			outcome, err := t.one(r, clients[number%len(clients)])
			if err != nil && part.FirstError == "" {
				part.FirstError = err.Error()
			}
			if !measuring.Load() {
				continue
			}
			if err != nil {
				part.Errors++
				if errors.As(err, &refused{}) {
					part.Immediate++
				}
				continue
			}
			part.Streams++
			part.Chunks += outcome.chunks
			latencies[number] = append(latencies[number], late+outcome.routed)
		}
	}
	for number := range *concurrent {
		wait.Add(1)
		go worker(number)
	}
	if *rate > 0 {
		go arrivals(*rate, due, stop)
	}
	time.Sleep(*warm)
	userBefore, systemBefore := cpu(pids)
	measuring.Store(true)
	began := time.Now()
	time.Sleep(*duration)
	total := result{Seconds: time.Since(began).Seconds()}
	measuring.Store(false)
	userAfter, systemAfter := cpu(pids)
	close(stop)
	wait.Wait()

	total.UserSeconds, total.SystemSeconds = userAfter-userBefore, systemAfter-systemBefore
	total.Targets = t.targets
	for _, part := range parts {
		total.Streams += part.Streams
		total.Errors += part.Errors
		total.Immediate += part.Immediate
		total.Chunks += part.Chunks
		if total.FirstError == "" {
			total.FirstError = part.FirstError
		}
	}
	total.Microseconds = quantiles(slices.Concat(latencies...))
	if *asJSON {
		return json.NewEncoder(os.Stdout).Encode(total)
	}
	total.print(len(pids) > 0)
	return nil
}

// arrivals of a Poisson process.
func arrivals(rate float64, due chan<- time.Time, stop <-chan struct{}) {
	r := rand.New(rand.NewSource(3))
	next := time.Now()
	for {
		next = next.Add(time.Duration(r.ExpFloat64() / rate * 1e9))
		time.Sleep(time.Until(next))
		select {
		case <-stop:
			return
		case due <- next:
		}
	}
}

func numbers(list string) (found []int, err error) {
	for _, word := range strings.FieldsFunc(list, func(char rune) bool { return char == ',' }) {
		number, err := strconv.Atoi(word)
		if err != nil {
			return nil, fmt.Errorf("-pids: %q is no process id", word)
		}
		found = append(found, number)
	}
	return found, nil
}

// cpu seconds that processes have used, all threads, in user and in system mode.
func cpu(pids []int) (user, system float64) {
	for _, pid := range pids {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue
		}
		fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+2:]))
		ticks, _ := strconv.ParseFloat(fields[11], 64)
		user += ticks / 100
		ticks, _ = strconv.ParseFloat(fields[12], 64)
		system += ticks / 100
	}
	return user, system
}

func quantiles(all []time.Duration) map[string]float64 {
	found := map[string]float64{}
	if len(all) == 0 {
		return found
	}
	slices.Sort(all)
	for name, share := range map[string]float64{"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1} {
		found[name] = float64(all[int(share*float64(len(all)-1))].Nanoseconds()) / 1e3
	}
	return found
}

func (r *result) print(charged bool) {
	q := r.Microseconds
	fmt.Printf("%.0f streams/s  ok=%d err=%d immediate=%d targets=%d  latency_us p50=%.0f p90=%.0f p99=%.0f max=%.0f",
		float64(r.Streams)/r.Seconds, r.Streams, r.Errors, r.Immediate, len(r.Targets), q["p50"], q["p90"], q["p99"], q["max"])
	if charged {
		streams := float64(max(1, r.Streams))
		fmt.Printf("  cpu_us/stream=%.1f (user %.1f sys %.1f) cores=%.2f", (r.UserSeconds+r.SystemSeconds)/streams*1e6,
			r.UserSeconds/streams*1e6, r.SystemSeconds/streams*1e6, (r.UserSeconds+r.SystemSeconds)/r.Seconds)
	}
	if r.Chunks > 0 {
		fmt.Printf("  chunks=%d", r.Chunks)
	}
	fmt.Println()
	if r.FirstError != "" {
		fmt.Println("first error:", r.FirstError)
	}
}
