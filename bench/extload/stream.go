package main

import (
	"context"
	"fmt"
	"math/rand"
	"strconv"
	"strings"
	"sync"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	ext "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

const corpusBytes = 8 << 20

const chunk = `data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"llama-3-8b",` +
	`"choices":[{"index":0,"delta":{"content":" word"},"finish_reason":null}]}` + "\n\n"

const lastChunk = `data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"llama-3-8b","choices":[],` +
	`"usage":{"prompt_tokens":1000,"completion_tokens":99,"total_tokens":1099}}` + "\n\ndata: [DONE]\n\n"

// prompts makes chat bodies. Each begins with the prefix of one of some sessions and goes on with text of its own, which
// is a piece of a long random text: cheap, so that the generator is not what is measured.
type prompts struct {
	size     int
	prefixes []string
	corpus   string
}

func newPrompts(size, sessions int, shared float64) *prompts {
	chance := rand.New(rand.NewSource(7))
	words := make([]string, 4000)
	for i := range words {
		word := make([]byte, 2+chance.Intn(8))
		for j := range word {
			word[j] = byte('a' + chance.Intn(26))
		}
		words[i] = string(word)
	}
	text := func(r *rand.Rand, length int) string {
		var all strings.Builder
		for all.Len() < length {
			all.WriteString(words[r.Intn(len(words))])
			all.WriteByte(' ')
		}
		return all.String()[:length]
	}
	p := &prompts{size: size, prefixes: make([]string, sessions), corpus: text(chance, corpusBytes)}
	for i := range p.prefixes {
		p.prefixes[i] = text(rand.New(rand.NewSource(int64(i+1))), int(float64(size)*shared))
	}
	return p
}

func (p *prompts) body(r *rand.Rand) []byte {
	prefix := p.prefixes[r.Intn(len(p.prefixes))]
	own := max(16, p.size-len(prefix)-150)
	from := r.Intn(len(p.corpus) - own)
	body := make([]byte, 0, p.size+256)
	body = append(body, `{"max_tokens":64,"messages":[{"content":"`...)
	body = append(body, prefix...)
	body = append(body, `","role":"system"},{"content":"`...)
	body = append(body, p.corpus[from:from+own]...)
	return append(body, `","role":"user"}],"model":"llama-3-8b","stream":false}`...)
}

// traffic is what all streams of a run have in common.
type traffic struct {
	prompts  *prompts
	strategy string
	chunks   int
	duplex   bool

	mutex   sync.Mutex
	targets map[string]int
}

// outcome of one stream: the time until it was routed, and how many chunks were answered.
type outcome struct {
	routed time.Duration
	chunks int
}

type refused struct{ reply *ext.ProcessingResponse }

func (r refused) Error() string { return fmt.Sprintf("immediate response: %v", r.reply) }

func header(key, value string) *core.HeaderValue {
	return &core.HeaderValue{Key: key, RawValue: []byte(value)}
}

func httpHeaders(headers ...*core.HeaderValue) *ext.HttpHeaders {
	return &ext.HttpHeaders{Headers: &core.HeaderMap{Headers: headers}}
}

func (t *traffic) requestHeaders(r *rand.Rand, bodyBytes int) *ext.ProcessingRequest {
	id := fmt.Sprintf("%08x-%04x-4a86-98b8-%012x", r.Uint32(), r.Intn(65536), r.Int63()&0xffffffffffff)
	headers := httpHeaders(
		header(":authority", "llm.example.com"), header(":path", "/v1/chat/completions"), header(":method", "POST"),
		header(":scheme", "http"), header("content-type", "application/json"),
		header("content-length", strconv.Itoa(bodyBytes)), header("user-agent", "OpenAI/Python 1.50.2"),
		header("authorization", "Bearer sk-12345678901234567890"), header("accept", "application/json"),
		header("accept-encoding", "gzip, deflate"), header("x-forwarded-proto", "http"), header("x-request-id", id),
		header("x-stainless-lang", "python"))
	if t.strategy != "" {
		headers.Headers.Headers = append(headers.Headers.Headers, header("routing-strategy", t.strategy))
	}
	return &ext.ProcessingRequest{Request: &ext.ProcessingRequest_RequestHeaders{RequestHeaders: headers}}
}

func receive(stream ext.ExternalProcessor_ProcessClient) (*ext.ProcessingResponse, error) {
	reply, err := stream.Recv()
	if err == nil && reply.GetImmediateResponse() != nil {
		err = refused{reply}
	}
	return reply, err
}

// route opens a stream, sends headers and body, and returns once the pod is known.
func (t *traffic) route(ctx context.Context, r *rand.Rand, client ext.ExternalProcessorClient) (
	ext.ExternalProcessor_ProcessClient, time.Duration, error) {
	body := t.prompts.body(r)
	headers := t.requestHeaders(r, len(body))
	request := &ext.ProcessingRequest{Request: &ext.ProcessingRequest_RequestBody{
		RequestBody: &ext.HttpBody{Body: body, EndOfStream: true}}}
	began := time.Now()
	stream, err := client.Process(ctx)
	if err != nil {
		return nil, 0, err
	}
	if err = stream.Send(headers); err != nil {
		return nil, 0, err
	}
	if !t.duplex {
		if _, err = receive(stream); err != nil {
			return nil, 0, err
		}
	}
	if err = stream.Send(request); err != nil {
		return nil, 0, err
	}
	for done := false; !done; {
		reply, err := receive(stream)
		if err != nil {
			return nil, 0, err
		}
		t.note(reply.GetRequestBody().GetResponse().GetHeaderMutation())
		t.note(reply.GetRequestHeaders().GetResponse().GetHeaderMutation())
		done = !t.duplex || reply.GetRequestBody().GetResponse().GetBodyMutation().GetStreamedResponse().GetEndOfStream()
	}
	return stream, time.Since(began), nil
}

func (t *traffic) note(mutation *ext.HeaderMutation) {
	for _, option := range mutation.GetSetHeaders() {
		key := option.GetHeader().GetKey()
		if key == "target-pod" || key == "x-gateway-destination-endpoint" {
			target := string(option.GetHeader().GetRawValue())
			if target == "" {
				target = option.GetHeader().GetValue()
			}
			t.mutex.Lock()
			t.targets[target]++
			t.mutex.Unlock()
		}
	}
}

// answer sends the response. A server may end the stream before: Envoy accepts that too.
func (t *traffic) answer(stream ext.ExternalProcessor_ProcessClient) (answered int) {
	headers := httpHeaders(header(":status", "200"), header("content-type", "text/event-stream; charset=utf-8"),
		header("server", "uvicorn"), header("transfer-encoding", "chunked"))
	request := &ext.ProcessingRequest{Request: &ext.ProcessingRequest_ResponseHeaders{ResponseHeaders: headers}}
	if stream.Send(request) != nil {
		return 0
	}
	if _, err := stream.Recv(); err != nil {
		return 0
	}
	for i := range t.chunks {
		body := &ext.HttpBody{Body: []byte(chunk)}
		if i == t.chunks-1 {
			body = &ext.HttpBody{Body: []byte(lastChunk), EndOfStream: true}
		}
		request := &ext.ProcessingRequest{Request: &ext.ProcessingRequest_ResponseBody{ResponseBody: body}}
		if stream.Send(request) != nil {
			return i
		}
		if _, err := stream.Recv(); err != nil {
			return i
		}
	}
	return t.chunks
}

// one HTTP request from its headers to its end.
func (t *traffic) one(r *rand.Rand, client ext.ExternalProcessorClient) (outcome, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	stream, routed, err := t.route(ctx, r, client)
	if err != nil {
		return outcome{}, err
	}
	answered := 0
	if t.chunks > 0 {
		answered = t.answer(stream)
	}
	stream.CloseSend()
	return outcome{routed, answered}, nil
}

// dial opens some connections to each of the comma separated addresses.
func dial(addresses string, connections int) ([]ext.ExternalProcessorClient, error) {
	var clients []ext.ExternalProcessorClient
	for range connections {
		for _, address := range strings.Split(addresses, ",") {
			connection, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()),
				grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
			if err != nil {
				return nil, err
			}
			clients = append(clients, ext.NewExternalProcessorClient(connection))
		}
	}
	return clients, nil
}
