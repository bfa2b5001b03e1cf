"""Generators: what each says of itself."""

from collections import Counter
from itertools import pairwise
from statistics import mean, stdev

import pytest

from bench.replay.generators import GENERATORS, LADDER, generate


def content(name: str, seed: int, **options: float) -> list[tuple[object, ...]]:
    return [
        (r.at, r.prompt_tokens, r.output_tokens, tuple(r.ids), r.after, r.session)
        for r in generate(name, seed, int(options.get("requests", 400)), options.get("rate", 0.0))
    ]


@pytest.mark.parametrize("name", GENERATORS)
def test_a_seed_gives_one_load_and_another_seed_another(name: str) -> None:
    assert content(name, 1) == content(name, 1)
    assert len(content(name, 1)) == 400
    if not name.startswith("burst"):
        assert content(name, 1) != content(name, 2)


@pytest.mark.parametrize("name", GENERATORS)
def test_every_prompt_has_names_for_all_of_it(name: str) -> None:
    assert all(request.named_tokens >= request.prompt_tokens for request in generate(name, 1, 400))


def test_shared_prefix_has_150_groups_of_5_prompts() -> None:
    requests = generate("shared-prefix", 1, 1500, 10.0)
    assert {(r.prompt_tokens, r.output_tokens) for r in requests} == {(7200, 1000)}
    assert len({r.ids[0] for r in requests}) == 150
    assert len({tuple(r.ids) for r in requests}) == 750
    assert requests[-1].at == pytest.approx(150, rel=0.1)


def test_without_a_rate_shared_prefix_climbs_from_3_to_60_a_second() -> None:
    requests = generate("shared-prefix", 1, 6300)
    step = 6300 / sum(LADDER)
    for first, last in ((0, 5), (5, 10), (15, 20)):
        arrived = sum(1 for r in requests if first * step <= r.at < last * step)
        assert arrived / step == pytest.approx(sum(LADDER[first:last]), rel=0.15)


@pytest.mark.parametrize("name", ["multi-turn", "agents"])
def test_a_turn_continues_the_one_it_waits_for_and_holds_its_answer(name: str) -> None:
    requests = generate(name, 1, 600)
    followed = 0
    for request in requests:
        if request.after >= 0:
            before = requests[request.after]
            followed += 1
            assert request.session == before.session
            assert list(request.ids[: len(before.ids)]) == list(before.ids)
            assert request.prompt_tokens > before.prompt_tokens + before.output_tokens == before.named_tokens
            assert request.at > 0
    assert followed > 400
    firsts = [r for r in requests if r.after < 0]
    assert all(a.at < b.at for a, b in pairwise(firsts))
    assert len({r.ids[0] for r in requests}) == (4 if name == "multi-turn" else 3)


def test_agents_go_deep() -> None:
    requests = generate("agents", 1, 4000)
    depth = [(len(r.ids) - 1) // 2 for r in requests]
    assert max(depth) > 35
    assert mean(r.prompt_tokens for r in requests) > 15_000


def test_no_prefix_shares_nothing() -> None:
    requests = generate("no-prefix", 1, 500, 20.0)
    assert len({r.ids[0] for r in requests}) == 500
    assert requests[-1].at == pytest.approx(25, rel=0.2)


def test_every_half_minute_another_prompt_is_hot() -> None:
    requests = generate("hot-shift", 1, 2000, 20.0)
    for begin in (0.0, 30.0, 60.0):
        roots = Counter(r.ids[0] for r in requests if begin <= r.at < begin + 30.0)
        hot, uses = roots.most_common(1)[0]
        assert uses == pytest.approx(360, rel=0.15)
        assert {r.ids[0] == hot for r in requests if not begin <= r.at < begin + 30.0} == {False}


def test_tools_have_hot_beginnings_and_steps_that_go_on() -> None:
    requests = generate("tools", 1, 4000)
    assert all(a.at <= b.at for a, b in pairwise(requests))
    roots = Counter(r.ids[0] for r in requests)
    assert len(roots) == 40
    assert roots.most_common(1)[0][1] > 600
    assert mean(len(r.ids) > 3 for r in requests) == pytest.approx(0.42, abs=0.04)
    assert 6000 < mean(r.prompt_tokens for r in requests) < 11_000


@pytest.mark.parametrize(
    ("name", "roots", "prompt", "answer"),
    [("documents", 400, 30_060, 54), ("short-answers", 10, 1980, 5), ("bursts", 100, 3690, 320)],
)
def test_beginnings_are_drawn_by_zipfs_law(name: str, roots: int, prompt: float, answer: float) -> None:
    requests = generate(name, 1, 4000)
    counts = [count for _, count in Counter(r.ids[0] for r in requests).most_common()]
    assert roots * 0.9 <= len(counts) <= roots
    assert counts[0] == pytest.approx(2 * counts[1], rel=0.2)
    assert mean(r.prompt_tokens for r in requests) == pytest.approx(prompt, rel=0.05)
    assert mean(r.output_tokens for r in requests) == pytest.approx(answer, rel=0.05)


def test_bursts_are_three_times_as_irregular_as_chance() -> None:
    gaps = [b.at - a.at for a, b in pairwise(generate("bursts", 1, 8000, 10.0))]
    assert mean(gaps) == pytest.approx(0.1, rel=0.15)
    assert stdev(gaps) == pytest.approx(0.3, rel=0.15)


def test_bursts_come_at_one_instant() -> None:
    for name, distinct in (("burst-identical", 1), ("burst-distinct", 100)):
        requests = generate(name, 1)
        assert len(requests) == 100
        assert len({r.at for r in requests}) == 1
        assert len({r.ids[0] for r in requests}) == distinct
