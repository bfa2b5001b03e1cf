"""What long prompts cost more, as learnt from samples."""

import random

import pytest

from router.attention import MOST, Attention, Sent


def learnt(pair: float, lengths: list[int], per_token: float = 2.0, seed: int = 1) -> tuple[float, float]:
    """(pair, mean tokens before one) as learnt from 4 pods, each of which gets prompts of one of these lengths for some
    time and then of another, on engines that take (per_token + per_token * pair * tokens before) times the prior's
    seconds."""
    rng = random.Random(seed)
    attention = Attention(4)
    sent = [Sent() for _ in range(4)]
    before = tokens = 0.0
    for number in range(2400):
        pod = sent[number % 4]
        for _ in range(rng.choice((1, 2, 5))):
            prompt = lengths[(number // 400 + number) % len(lengths)]
            pod.add(prompt, prompt)
            tokens, before = tokens + prompt, before + prompt * prompt / 2
        decode, prefill = rng.uniform(0.5, 1.0), rng.uniform(0.2, 2.0)
        seconds = decode + prefill * per_token * (1.0 + pair * pod.pairs / pod.tokens)
        attention.add(pod, decode / seconds, prefill / seconds, 1.0)
        pod.fade(1.0)
    attention.solve()
    return attention.slope / attention.flat, before / tokens


@pytest.mark.parametrize("pair", [0.0, 1e-5, 5e-5])
def test_it_is_learnt_from_pods_with_longer_and_shorter_prompts(pair: float) -> None:
    found, _ = learnt(pair, [500, 2000, 12_000, 60_000])
    assert found == pytest.approx(pair, rel=0.2, abs=1e-6)


def test_the_mean_token_costs_one() -> None:
    sent = Sent()
    attention = Attention(1)
    for number in range(300):
        sent.add(1000 * (1 + number % 7) ** 2, 1000)
        before = sent.pairs / sent.tokens
        prefill = 1.0 / (1.0 + 3e-5 * before)
        attention.add(sent, 0.5 * prefill * (1 + number % 3), prefill * (1.0 - 0.25 * (1 + number % 3)), 1.0)
        sent.fade(1.0)
    attention.solve()
    assert attention.slope > 0
    assert attention.cost(sent) == pytest.approx(1.0, abs=0.1)
    assert attention.cost(Sent()) == 1.0


def test_where_all_prompts_are_alike_nothing_is_made_of_it() -> None:
    found, before = learnt(5e-5, [4000])
    assert found * before < 0.02


def test_nothing_is_taken_to_cost_less_than_nothing() -> None:
    assert learnt(-1e-6, [500, 60_000])[0] == 0.0
    assert learnt(1.0, [500, 60_000])[0] <= MOST


def test_without_samples_all_tokens_cost_the_same() -> None:
    attention = Attention(3)
    attention.add(Sent(), 0.5, 0.5, 1.0)
    attention.solve()
    assert (attention.flat, attention.slope) == (1.0, 0.0)
