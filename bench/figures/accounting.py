"""What it costs to watch responses: the router's CPU and the time it adds, by how Envoy is set up.

Three Envoys stand before one router. `aibrix` sends everything: headers, the buffered request body, response headers,
and the response's body as it streams, chunk by chunk, whoever needs it. `stream` and `access-log` are what `pointsman
envoy` writes for the two ways in which the end of a request becomes known.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from bench.figures.figure import Figure
from bench.figures.rig import MODEL, Rig, all_pids, cpu_seconds, tool
from bench.figures.through_envoy import added_latency, envoy_binary, run_wrk, with_bare_route
from bench.lab import Lab, free_ports
from workers.config import Config
from workers.envoy import bootstrap

STRATEGY = "least-request"
"""The cheapest: what is compared is the rest."""
MODES = {"aibrix": "AIBrix's modes", "stream": "ours, by stream", "access-log": "ours, by access log"}
CHUNKS = 20
PODS = 8
COUNTED_USER = "counted"

# wrk's own language.
WRK_SCRIPT = """
local headers = {["content-type"] = "application/json", ["routing-strategy"] = "{strategy}"{headers}}
local text = string.rep("All work and no play makes Jack a dull boy. ", 42)
local body = '{"model":"{model}"{options},"messages":[{"role":"user","content":"' .. text .. '"}]}'
request = function()
  return wrk.format("POST", "/v1/chat/completions", headers, body)
end
"""
COUNTED = f', ["user"] = "{COUNTED_USER}"'
ANSWERS = {
    "json": ("JSON answers", "", ""),
    "json-usage": ("JSON answers, usage counted", "", COUNTED),
    "sse": (f"SSE answers of {CHUNKS} chunks", ',"stream":true', ""),
    "sse-usage": (
        f"SSE answers of {CHUNKS} chunks, usage counted",
        ',"stream":true,"stream_options":{"include_usage":true}',
        COUNTED,
    ),
}
"""By the end of a figure's key: what it is called, what its requests say, and their headers."""


def as_aibrix(document: dict[str, Any], *, overrides: bool = False) -> dict[str, Any]:
    """Our bootstrap with AIBrix's processing mode, and with or without the right to change it."""
    manager = document["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    for ours in ("access_log", "local_reply_config"):
        manager.pop(ours, None)
    ext_proc = manager["http_filters"][0]["typed_config"]
    ext_proc["processing_mode"] = {
        "request_header_mode": "SEND", "request_body_mode": "BUFFERED", "response_header_mode": "SEND",
        "response_body_mode": "STREAMED", "request_trailer_mode": "SKIP", "response_trailer_mode": "SKIP",
    }  # fmt: skip
    ext_proc["allow_mode_override"] = overrides
    ext_proc.pop("route_cache_action")
    ext_proc["grpc_service"].pop("initial_metadata")
    return document


def accounting(rig: Rig) -> list[Figure]:
    """CPU of a request by mode and kind of answer, and added latency by mode."""
    binary, wrk = envoy_binary(), tool("wrk", "wrk")
    pods = rig.pods(PODS, "-chunks", CHUNKS)
    limits = {"limits": {"users_file": str(rig.users(COUNTED_USER))}}
    lab = rig.router(pods, workers=1, strategy=STRATEGY, more=limits)
    envoys = {}
    for mode in MODES:
        rig.progress(f"starting Envoy, {mode}")
        config = envoys[mode] = envoy_of(lab.config, mode)
        document = bootstrap(config)
        rig.envoy(binary, with_bare_route(as_aibrix(document) if mode == "aibrix" else document, pods))
    return [*_cpu(rig, lab, envoys, wrk), *_latency(rig, envoys)]


def envoy_of(config: Config, mode: str) -> Config:
    """The router's configuration for one more Envoy, in a mode of MODES."""
    listen, admin = (f"127.0.0.1:{port}" for port in free_ports(2))
    way = "stream" if mode == "aibrix" else mode
    envoy = config.envoy.model_copy(update={"listen": listen, "admin": admin, "accounting": way})
    return config.model_copy(update={"envoy": envoy})


def _cpu(rig: Rig, lab: Lab, envoys: dict[str, Config], wrk: str) -> list[Figure]:
    router = all_pids(lab)
    rates: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:

        def cell(mode: str, answer: str) -> Callable[[], float]:
            _, options, headers = ANSWERS[answer]
            script = Path(folder) / f"{answer}.lua"
            words = {"strategy": STRATEGY, "headers": headers, "model": MODEL, "options": options}
            text = WRK_SCRIPT
            for name, value in words.items():
                text = text.replace(f"{{{name}}}", value)
            script.write_text(text)
            url = f"http://{envoys[mode].envoy.listen}"

            def measured() -> float:
                before = cpu_seconds(router)
                count, seconds = run_wrk(wrk, url, script, rig.seconds / rig.rounds)
                rates.setdefault((mode, answer), []).append(count / seconds)
                return (cpu_seconds(router) - before) / count * 1e6

            return measured

        cells = {(mode, answer): cell(mode, answer) for answer in ANSWERS for mode in MODES}
        for mode in MODES:
            cells[mode, "json"]()  # opens the connections
        rates.clear()
        values = rig.take_turns(cells)
    return [
        Figure.over(
            f"accounting/{mode}/{answer}",
            f"CPU a request, {ANSWERS[answer][0]}: {MODES[mode]}",
            values[mode, answer],
            "µs",
            f"{median(rates[mode, answer]):,.0f} requests/s",
        )
        for mode, answer in cells
    ]


def _latency(rig: Rig, envoys: dict[str, Config]) -> list[Figure]:
    figures = []
    for mode, (added, bare) in added_latency(rig, envoys).items():
        figures += [
            Figure.over(
                f"accounting/{mode}/{quantile}",
                f"4 KB, one at a time: added {quantile}, {MODES[mode]}",
                values,
                "ms",
                f"{median(bare[quantile]):.2f} ms without a router",
            )
            for quantile, values in added.items()
        ]
    return figures
