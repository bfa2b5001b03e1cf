"""`pointsman explain` against a running router."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from bench.lab import Lab
from workers.explain import show

MODEL_CHAT = {"messages": [{"role": "user", "content": "word " * 500}]}


def explain(lab: Lab, body: object, *arguments: str) -> tuple[int, str, str]:
    run = subprocess.run(
        [sys.executable, "-m", "workers.cli", "explain", "-", "--config", str(lab.config_path), *arguments],
        input=json.dumps(body), capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    return run.returncode, run.stdout, run.stderr


def test_explain_shows_the_decision_and_makes_none() -> None:
    with Lab(pods=3, workers=1, with_envoy=False, strategy="prefix-cache", settings={"explain": True}) as lab:
        body = {"model": lab.model, **MODEL_CHAT}
        code, out, _ = explain(lab, body, "--json")
        receipt = json.loads(out)
        assert code == 0
        assert receipt["strategy"] == "prefix-cache"
        assert {row["pod"] for row in receipt["candidates"]} == {"pod-0", "pod-1", "pod-2"}
        assert all(row["matched_tokens"] == 0 and "score" in row for row in receipt["candidates"])
        code, out, _ = explain(lab, body, "-H", "routing-strategy: least-request")
        assert code == 0
        assert "by least-request" in out and "pod-2" in out
        code, out, _ = explain(lab, body, "-H", "routing-strategy: marginal-delay")
        assert code == 0
        assert "pod-2: " in out and " = queue 0" in out and " + prefill 0." in out
        assert [pod["own"]["chosen"] for pod in lab.believed_pods()] == [0, 0, 0]
        code, out, error = explain(lab, {"model": "gpt-9", "prompt": "x"})
        assert (code, out) == (1, "")
        assert error == "pointsman: the router refuses this request with 400: model gpt-9 does not exist\n"
        code, _, error = explain(lab, {"model": lab.model}, "--path", "/v1/chat/completions")
        assert "no messages in the request body" in error
        assert "cannot tell what kind of request" in explain(lab, {"model": lab.model})[2]


def test_a_router_with_tls_is_asked_as_envoy_would_ask_it() -> None:
    pem = Path(__file__).parent.parent / "fixtures" / "tls"
    files = {name: str(pem / f"{name}.pem") for name in ("server", "client", "ca")}
    settings = {
        "explain": True,
        "tls": {"certificate": files["server"], "key": str(pem / "server.key"), "client_ca": files["ca"]},
        "envoy": {"client_certificate": files["client"], "client_key": str(pem / "client.key")},
    }
    with Lab(pods=1, workers=1, with_envoy=False, settings=settings) as lab:
        body = {"model": lab.model, **MODEL_CHAT}
        for root in (None, files["ca"], files["client"]):
            config = yaml.safe_load(lab.config_path.read_text())
            config["envoy"]["router_ca"] = root
            lab.config_path.write_text(yaml.safe_dump(config))
            code, out, error = explain(lab, body, "--json")
            if root == files["client"]:
                assert (code, out) == (1, "")
                assert "no TLS with the router at 127.0.0.1:" in error and "certificate verify failed" in error
            else:
                assert (code, json.loads(out)["pod"]) == (0, "pod-0"), error


def test_explain_says_when_it_is_not_allowed() -> None:
    with Lab(pods=1, workers=1, with_envoy=False) as lab:
        code, _, error = explain(lab, {"model": lab.model, **MODEL_CHAT})
        assert (code, error) == (
            1,
            "pointsman: the router gives no receipts: set `explain: true` in its configuration\n",
        )
        lab.until(lambda: [pod["own"]["requests"] for pod in lab.believed_pods()] == [0], "the charge to be released")


def test_explain_says_when_nobody_answers() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "workers.cli", "explain", "-", "--address", "127.0.0.1:1"],
        input='{"model":"m","prompt":"x"}', capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert run.returncode == 1
    assert run.stderr.startswith("pointsman: no answer from the router at 127.0.0.1:1")


@pytest.mark.parametrize("terminal", [True, False])
def test_pod_names_are_shown_whole(terminal: bool) -> None:
    pod = "meta-llama-llama-3-8b-instruct-" + "10-0-0-1-" * 6 + "7"
    receipt = {
        "model": "m", "strategy": "s", "pod": pod, "prompt_tokens": 123456, "of": 2,
        "candidates": [{"pod": pod, "score": 1.23456e-7, "requests": 12345, "matched_tokens": 123456}],
    }  # fmt: skip
    out = io.StringIO()
    show(receipt, Console(file=out, width=80, force_terminal=terminal, color_system=None))
    table = out.getvalue().partition("\n")[2]
    assert "…" not in table and "1.23456e-07" in table
    folded = "".join(line.split("│")[1].strip() for line in table.splitlines() if line.startswith("│"))
    assert folded == pod
    assert max(map(len, table.splitlines())) <= (80 if terminal else 1000)
