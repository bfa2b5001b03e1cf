from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.selectors import MAX_SELECTOR_LENGTH, SelectorError, parse_selector

POD = {"env": "prod", "tier": "gold", "app.kubernetes.io/name": "llama", "rank": "7", "empty": "", "in": "x"}


@pytest.mark.parametrize(
    "selector",
    [
        "",
        "  ",
        "env",
        "env=prod",
        "env==prod",
        " env = prod , tier==gold ",
        "env!=dev",
        "zone!=a",
        "!zone",
        "! zone",
        "env in (dev, prod)",
        "env in(prod)",
        "env notin (dev)",
        "zone notin (a,b)",
        "app.kubernetes.io/name=llama",
        "rank>6",
        "rank < 8",
        "in",
        "in=x,!notin",
        "in in (x,in)",
        "empty=",
        "empty==,env",
        "empty in ()",
        "empty in (a,)",
        "env!=",
        "env=prod,tier in (gold,silver),!zone,rank>3",
    ],
)
def test_matches(selector: str) -> None:
    assert parse_selector(selector).matches(POD)


@pytest.mark.parametrize(
    "selector",
    [
        "zone",
        "notin",
        "!env",
        "env=dev",
        "env!=prod",
        "zone=a",
        "zone=",
        "env==",
        "env in (dev)",
        "zone in (a)",
        "zone in ()",
        "env notin (dev,prod)",
        "rank>7",
        "rank<7",
        "env>1",
        "zone<1",
        "env=prod,tier=silver",
    ],
)
def test_does_not_match(selector: str) -> None:
    assert not parse_selector(selector).matches(POD)


@pytest.mark.parametrize(
    "selector",
    [
        ",",
        "=",
        "=prod",
        "env=prod,,tier",
        "env prod",
        "env in",
        "env in prod",
        "env in (a",
        "env in (a b)",
        "env in a)",
        "in (a)",
        "env=prod,",
        "env=prod, ",
        "rank>-1",
        "rank<+9",
        "!",
        "!!env",
        "!env=prod",
        "env=prod=x",
        "env=a b",
        "env>",
        "env>x",
        "env>1.5",
        "-env",
        "env-",
        "/env",
        "UP/env",
        "a/b/c",
        "env=-x",
        "env=x!",
        "é=x",
        "env=é",
        "e" * 64,
        "env=" + "v" * 64,
        "p" * 254 + "/env",
        "env\x00",
        "env=(a)",
    ],
)
def test_is_no_selector(selector: str) -> None:
    with pytest.raises(SelectorError):
        parse_selector(selector)


def test_errors_are_worded_as_kubernetes_words_them() -> None:
    with pytest.raises(SelectorError, match=r"^unable to parse requirement: found 'prod', expected: in, notin, =, =="):
        parse_selector("env prod")


def test_a_selector_is_parsed_once_and_few_are_kept() -> None:
    assert parse_selector("env=prod") is parse_selector("env=prod")
    for n in range(2000):
        parse_selector(f"k{n}")
    assert parse_selector.cache_info().currsize <= 256
    with pytest.raises(SelectorError):
        parse_selector("a" * (MAX_SELECTOR_LENGTH + 1))


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(["env", "prod", "in", "notin", "(", ")", "!", "=", ",", "<", ">", " ", "1", "é", "/"]),
        max_size=12,
    )
)
def test_every_text_is_a_selector_or_an_error(words: list[str]) -> None:
    with suppress(SelectorError):
        assert parse_selector("".join(words)).matches(POD) in (True, False)
