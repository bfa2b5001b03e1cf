"""All sections, in the order of the document."""

from bench.figures import accounting, processes, streams, through_envoy
from bench.figures.figure import Section

SECTIONS: dict[str, Section] = {
    section.name: section
    for section in (
        Section(
            "streams",
            "Two-message streams, one after the other",
            "CPU of an ext_proc stream driven as Envoy does it: headers, wait, body, wait; 16 at once, prompts of 200 "
            "sessions that share 70 % of their text, 64 pods. The router, all its processes charged, is on one core "
            "and the load generator on the other. Shares are of the grpc.aio server in the same round.",
            streams.lockstep,
        ),
        Section(
            "saturation",
            "Saturation",
            "`h2load -c4 -m16`: headers and a 2 KB body in one go, the stream ended after the body's reply; how many "
            "streams a second of one worker's CPU carries, which on a quiet machine is what the clock shows too.",
            streams.saturation,
        ),
        Section(
            "chunks",
            "Streamed answers, chunk by chunk",
            "Headers, body, response headers, and 100 SSE chunks as 100 messages, as an Envoy set up for AIBrix sends "
            "them: the CPU of the whole stream over its 100 chunks.",
            streams.chunks,
        ),
        Section(
            "bodies",
            "Long prompts",
            "One body of 220 KB per stream, 16 at once, one worker: how many streams a second of its CPU carries.",
            streams.bodies,
        ),
        Section(
            "envoy",
            "Through Envoy",
            "Two Envoys with `--concurrency 1` and the bootstrap of `pointsman envoy` before one router, prefix-aware "
            "strategy: one reaches it over TCP, the other over a unix socket. Added latency is against a second route "
            "of the same Envoy that leads past the router to the same pods; one client takes the two in turns.",
            through_envoy.envoy,
        ),
        Section(
            "accounting",
            "Watching responses",
            "Three Envoys with `--concurrency 1` before one router: with AIBrix's processing modes (request body "
            "buffered, response headers and body streamed by, no mode overrides), and with what `pointsman envoy` "
            f"writes for accounting by stream and by access log. 2 KB chats, wrk -c32, `{accounting.STRATEGY}`; "
            f"streamed answers come in {accounting.CHUNKS} chunks 5 ms apart. Usage is counted for a user with a limit "
            "of tokens. CPU is that of all the router's processes. Added latency as above, of JSON answers.",
            accounting.accounting,
        ),
        Section(
            "idle-streams",
            "Open streams",
            "10,000 streams on 16 connections, each routed and then left waiting for its response.",
            processes.idle_streams,
        ),
        Section(
            "workers",
            "More workers",
            "Streams of 4 KB, 64 at once on four connections, to 1, 2 or 4 workers on one core, and to as many servers "
            "that route nothing: CPU of a stream. `core full` is `h2load -m64` on four connections: the core never "
            "rests.",
            processes.workers,
        ),
        Section(
            "one-core",
            "Everything on one core",
            "Supervisor, worker, scraper and admin server pinned to one core, 64 pods that serve a captured 51 KB vLLM "
            "page, each polled every second, prefix-aware strategy; 200 streams of 4 KB per second arrive at random.",
            processes.one_core,
        ),
        Section(
            "scrape",
            "Scraping",
            "A captured 51 KB page of vLLM 0.32, and a router at rest that polls 100 pods every second.",
            processes.scrape,
        ),
        Section(
            "strategies",
            "Ten strategies",
            "16 pods that all show the same metrics, polled every second, 2 workers, 16 streams at once.",
            processes.strategies,
        ),
        Section(
            "failover",
            "A worker killed",
            f"{through_envoy.REQUESTS_PER_SECOND} streamed requests a second through Envoy to 4 simulated pods; each "
            "of the two workers is killed with SIGKILL once.",
            through_envoy.failover,
        ),
        Section(
            "memory",
            "Start and memory",
            "A router with 2 workers and 64 pods on one core, right after its start.",
            processes.memory,
        ),
    )
}
