"""Addresses as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.address import Parsed, join_address, parse_address


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("0.0.0.0:50052", ("tcp", "0.0.0.0", 50052)),
        ("pods.svc.cluster.local:80", ("tcp", "pods.svc.cluster.local", 80)),
        ("[::1]:65535", ("tcp", "::1", 65535)),
        ("[::]:1", ("tcp", "::", 1)),
        ("unix:/run/a.sock", ("unix", "/run/a.sock", 0)),
        ("unix:///run/a.sock", ("unix", "/run/a.sock", 0)),
        ("unix:/run/a{i}.sock", ("unix", "/run/a{i}.sock", 0)),
    ],
)
def test_addresses(text: str, parsed: tuple[str, str, int]) -> None:
    assert parse_address(text) == Parsed(*parsed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    ["", "host", ":80", "host:", "host:0", "host:65536", "host:+80", "host:-1", "host:8a", "host:٣", "::1:80", "[]:80",
     "unix:", "unix:relative", "unix:/" + "x" * 100],
)  # fmt: skip
def test_what_is_no_address_says_so_and_shows_one(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not an address: .*(such as|may have)"):
        parse_address(text)


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("http://vllm:8000", "http://"),
        ("https://vllm", "https://"),
        ("http://[::1]:8000/v1", "http:// and /v1"),
        ("vllm:8000/v1/models?x=1", "/v1/models?x=1"),
        ("vllm/v1", "/v1"),
        ("vllm:8000/", "/"),
    ],
)
def test_a_url_is_told_to_be_one(text: str, without: str) -> None:
    for of_pod in (False, True):
        with pytest.raises(ValueError, match="is not an address") as raised:
            parse_address(text, of_pod=of_pod)
        assert str(raised.value) == f"{text!r} is not an address: write host:port alone, without {without}"


def test_a_pod_is_not_told_of_unix_paths() -> None:
    for text in ("vllm:x", "unix:/run/x", "unix:x", "/run/x"):
        with pytest.raises(ValueError, match="write host:port") as raised:
            parse_address(text, of_pod=True)
        assert "unix:/path" not in str(raised.value)


@given(st.one_of(st.ip_addresses().map(str), st.from_regex(r"\A[a-z][a-z0-9.-]{0,20}\Z")), st.integers(1, 65535))
def test_joining_and_parsing(host: str, port: int) -> None:
    assert parse_address(join_address(host, port)) == ("tcp", host, port)


@given(st.text(max_size=30))
def test_any_text_is_an_address_or_a_value_error(text: str) -> None:
    try:
        parsed = parse_address(text)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert parsed.place
