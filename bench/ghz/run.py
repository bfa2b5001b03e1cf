"""ghz against a running router: `python -m bench.ghz.run 127.0.0.1:50052 [--body-bytes 4096] [-- OPTIONS OF GHZ]`.

Each call is one stream of two messages, request headers and a chat body, as Envoy sends them; the client then closes
its half and the router ends the stream. ghz sends the second message without waiting for the first one's reply, and
costs far more CPU than the router: read its latencies, and take throughput and cost from `pointsman bench`.
`make ghz` builds the binary.
"""

import base64
import json
import os
import sys
import tempfile
from pathlib import Path

import click

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
METHOD = "envoy.service.ext_proc.v3.ExternalProcessor.Process"


def messages(body_bytes: int, strategy: str, model: str) -> list[dict[str, object]]:
    """The stream in protobuf's JSON form, where bytes are base64."""
    chat = {"model": model, "messages": [{"role": "user", "content": ""}], "max_tokens": 64}
    text = "To be routed, or not to be routed. " * (body_bytes // 30 + 1)
    chat["messages"] = [{"role": "user", "content": text[: max(1, body_bytes - len(json.dumps(chat)))]}]
    body = json.dumps(chat).encode()
    headers = {
        ":authority": "llm.example.com", ":path": "/v1/chat/completions", ":method": "POST", ":scheme": "http",
        "content-type": "application/json", "content-length": str(len(body)),
    }  # fmt: skip
    if strategy:
        headers["routing-strategy"] = strategy
    listed = [{"key": key, "rawValue": _base64(value.encode())} for key, value in headers.items()]
    return [
        {"requestHeaders": {"headers": {"headers": listed}}},
        {"requestBody": {"body": _base64(body), "endOfStream": True}},
    ]


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@click.command(context_settings={"show_default": True})
@click.argument("address", default="127.0.0.1:50052")
@click.argument("options", nargs=-1)
@click.option("--body-bytes", default=4096)
@click.option("--strategy", default="", help="Value of the routing-strategy header.")
@click.option("--model", default="llama-3-8b")
def main(address: str, options: tuple[str, ...], body_bytes: int, strategy: str, model: str) -> None:
    """Run ghz against the router at ADDRESS: 10,000 streams, 16 at once, unless OPTIONS say otherwise."""
    ghz = ROOT / "bin" / "ghz"
    if not ghz.exists():
        raise click.ClickException(f"there is no {ghz}; `make ghz` builds it if Go is installed")
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as data:
        json.dump(messages(body_bytes, strategy, model), data)
    own = () if options else ("--total", "10000", "--concurrency", "16")
    try:
        code = os.spawnv(
            os.P_WAIT, str(ghz),
            ["ghz", "--insecure", "--proto", str(FOLDER / "ext_proc_service.proto"), "--import-paths",
             f"{FOLDER},{ROOT / 'protos'}", "--call", METHOD, "--data-file", data.name, *own, *options, address],
        )  # fmt: skip
    finally:
        Path(data.name).unlink()
    sys.exit(code)


if __name__ == "__main__":
    main()
