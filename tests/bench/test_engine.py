"""The engine model against schedules worked out by hand, and runs of steps against the same steps one by one."""

from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.engine import Engine, EngineParams, EngineRequest, Event, EventKind
from bench.engine_stats import Histogram


def params(**changes: float) -> EngineParams:
    """Step 1 s, 10 ms a prefill token, 100 ms a decoding request, 1 ms a KV token read; 4-token blocks."""
    base = {
        "step_seconds": 1.0,
        "prefill_token_seconds": 0.01,
        "decode_request_seconds": 0.1,
        "kv_token_seconds": 0.001,
        "num_blocks": 100,
        "block_tokens": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "max_model_len": 400,
    }
    return EngineParams(**(base | changes))  # type: ignore[arg-type]


def drain(engine: Engine) -> list[Event]:
    events = []
    while (at := engine.next_event()) is not None:
        events += engine.advance(at)
    return events


def told(events: list[Event]) -> list[tuple[str, object, float]]:
    return [(e.kind.value, e.request.key, round(e.at, 9)) for e in events]


def test_one_request() -> None:
    engine = Engine(params())
    request = EngineRequest(10, 3, key="a")
    engine.submit(request, 5.0)
    assert engine.running == 1 and engine.waiting == 0
    # Prefill 1 + 10 * 0.01 + 10 * 0.001; the two decode steps read 11 and 12 tokens.
    first, second, third = 1.11, 1 + 0.1 + 0.011, 1 + 0.1 + 0.012
    assert engine.next_step() == pytest.approx(5 + first)
    assert told(drain(engine)) == [
        ("first token", "a", round(5 + first, 9)),
        ("finished", "a", round(5 + first + second + third, 9)),
    ]
    assert engine.next_event() is None and engine.next_step() is None
    assert request.queue_seconds == 0
    assert request.ttft_seconds == request.prefill_seconds == pytest.approx(first)
    assert request.decode_seconds == pytest.approx(second + third)
    assert request.mean_itl_seconds == pytest.approx((second + third) / 2)
    assert request.e2e_seconds == pytest.approx(first + second + third)
    stats = engine.stats
    assert (stats.prompt_tokens, stats.generation_tokens, stats.finished_length, stats.steps) == (10, 3, 1, 3)
    assert (stats.inter_token_latency.count, stats.iteration_tokens.total) == (2, 13)
    assert engine.running == 0 and engine.kv_usage == 0


def test_prompt_in_chunks_keeps_the_decoding_going() -> None:
    engine = Engine(params(max_num_batched_tokens=16))
    engine.submit(EngineRequest(4, 5, key="short"), 0.0)
    engine.submit(EngineRequest(40, 1, key="long"), 0.1)
    t1 = 1 + 0.04 + 0.004  # short's prompt
    t2 = t1 + 1 + 0.1 + 0.15 + (5 + 15) * 0.001  # one token of short, 15 of long
    t3 = t2 + 1 + 0.1 + 0.15 + (6 + 30) * 0.001
    t4 = t3 + 1 + 0.1 + 0.10 + (7 + 40) * 0.001  # the last 10
    t5 = t4 + 1 + 0.1 + 8 * 0.001
    assert told(drain(engine)) == [
        ("first token", "short", round(t1, 9)),
        ("first token", "long", round(t4, 9)),
        ("finished", "long", round(t4, 9)),
        ("finished", "short", round(t5, 9)),
    ]


def test_prefill_attention_grows_with_the_context() -> None:
    engine = Engine(params(max_num_batched_tokens=16, prefill_pair_seconds=0.0001))
    engine.submit(EngineRequest(20, 1, key="a"), 0.0)
    whole = 2 + 0.2 + (16 + 20) * 0.001 + (16 * 17 / 2 + 4 * 16 + 4 * 5 / 2) * 0.0001
    assert told(drain(engine))[0] == ("first token", "a", round(whole, 9))


def test_two_requests_share_their_steps() -> None:
    engine = Engine(params())
    engine.submit(EngineRequest(10, 4, key="a"), 0.0)
    engine.submit(EngineRequest(20, 2, key="b"), 0.5)
    assert (engine.running, engine.waiting) == (1, 1)
    t1 = 1.11
    t2 = t1 + 1 + 0.2 + 0.1 + (11 + 20) * 0.001  # b's prompt and a's second token
    t3 = t2 + 1 + 0.2 + (12 + 21) * 0.001
    t4 = t3 + 1 + 0.1 + 13 * 0.001
    events = engine.advance(t1 + 1e-9)
    assert (engine.running, engine.waiting) == (2, 0)
    assert told(events + drain(engine)) == [
        ("first token", "a", round(t1, 9)),
        ("first token", "b", round(t2, 9)),
        ("finished", "b", round(t3, 9)),
        ("finished", "a", round(t4, 9)),
    ]


def test_an_arrival_cuts_a_run_at_the_end_of_the_step_under_way() -> None:
    engine = Engine(params(kv_token_seconds=0.0))
    a = EngineRequest(10, 100, key="a")
    engine.submit(a, 0.0)
    engine.advance(1.1)
    assert engine.next_event() == pytest.approx(1.1 + 99 * 1.1)
    b = EngineRequest(10, 1, key="b")
    engine.submit(b, 1.1 + 3.5 * 1.1)
    assert engine.generated(a) == 4
    assert engine.next_event() == pytest.approx(1.1 + 4 * 1.1)
    drain(engine)
    assert b.queue_seconds == pytest.approx(0.55)
    assert b.prefill_seconds == pytest.approx(1.2)


def test_requests_wait_for_a_place_in_order_of_arrival() -> None:
    engine = Engine(params(max_num_seqs=1, kv_token_seconds=0.0))
    for key in "abc":
        engine.submit(EngineRequest(10, 2, key=key), 0.0)
    assert (engine.running, engine.waiting) == (1, 2)
    assert [e.request.key for e in drain(engine) if e.kind is EventKind.FINISHED] == ["a", "b", "c"]


def test_prefix_is_found_from_the_end_of_the_step_that_computed_it() -> None:
    engine = Engine(params())
    hashes = [11, 12, 13]
    first = EngineRequest(14, 2, hashes)
    twin = EngineRequest(14, 2, hashes)  # in the queue while the first is computed
    engine.submit(first, 0.0)
    engine.submit(twin, 0.1)
    other = EngineRequest(13, 2, [11, 12, 99])
    engine.submit(other, 0.2)
    drain(engine)
    assert (first.cached_tokens, twin.cached_tokens, other.cached_tokens) == (0, 12, 8)
    assert engine.stats.prefix_queries_tokens == 41
    assert engine.stats.prefix_hits_tokens == 20
    assert engine.stats.prompt_tokens_cached == 20
    assert engine.stats.request_computed_tokens.total == 14 + 2 + 5


@pytest.mark.parametrize(("share", "cached"), [(False, 0), (True, 12)])
def test_twins_admitted_in_one_step(share: bool, cached: int) -> None:
    engine = Engine(params(share_within_step=share))
    engine.submit(EngineRequest(4, 2), 0.0)
    twins = [EngineRequest(14, 2, [1, 2, 3]) for _ in range(2)]
    for twin in twins:
        engine.submit(twin, 0.1)
    drain(engine)
    assert [twin.cached_tokens for twin in twins] == [0, cached]


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    engine = Engine(params())
    for _ in range(2):
        request = EngineRequest(12, 1, [1, 2, 3])
        engine.submit(request, engine.stats.steps * 10.0)
        drain(engine)
    assert request.cached_tokens == 8  # 11 would do, and blocks are found whole


def test_blocks_of_an_answer_serve_the_next_turn() -> None:
    engine = Engine(params())
    engine.submit(EngineRequest(6, 7, [1, 2, 3]), 0.0)  # 12 tokens have KV: the thirteenth was not fed back
    drain(engine)
    request = EngineRequest(20, 1, [1, 2, 3, 4, 5])
    engine.submit(request, 100.0)
    drain(engine)
    assert request.cached_tokens == 12


def test_the_least_recently_used_blocks_go_first_and_tails_before_heads() -> None:
    engine = Engine(params(num_blocks=6))
    clock = count(0, 100)

    def cached(hashes: list[int]) -> int:
        request = EngineRequest(len(hashes) * 4 + 1, 1, hashes)
        engine.submit(request, float(next(clock)))
        drain(engine)
        return request.cached_tokens

    assert cached([1, 2]) == 0  # holds 3 blocks: two of the prompt and one begun
    assert cached([3, 4]) == 0
    assert cached([1, 2]) == 8  # now 3, 4 is the older one
    assert cached([5]) == 0  # takes the two oldest: what was begun for 3, 4, then its tail 4
    assert cached([3, 4]) == 4  # takes two again: what was begun for 1, 2, then its tail 2
    assert cached([1, 2]) == 4


def test_blocks_in_use_are_not_evicted_and_the_queue_waits_for_them() -> None:
    engine = Engine(params(num_blocks=6))
    a = EngineRequest(12, 4, [1, 2, 3], key="a")  # 3 blocks, then 4
    b = EngineRequest(13, 1, [7, 8, 9], key="b")  # needs 4 at once
    engine.submit(a, 0.0)
    engine.submit(b, 0.5)
    engine.advance(1.2)
    assert (engine.running, engine.waiting) == (1, 1)
    assert engine.kv_usage == pytest.approx(4 / 6)
    events = drain(engine)
    assert b.scheduled == a.finished
    assert [e.kind for e in events] == [EventKind.FINISHED, EventKind.FIRST_TOKEN, EventKind.FINISHED]
    assert engine.stats.preemptions == 0


def test_two_requests_hold_one_copy_of_what_they_share() -> None:
    engine = Engine(params(kv_token_seconds=0.0))
    engine.submit(EngineRequest(17, 50, [1, 2, 3, 4]), 0.0)
    engine.advance(2.0)
    engine.submit(EngineRequest(17, 50, [1, 2, 3, 4]), 2.0)
    engine.advance(4.0)
    assert engine.running == 2
    assert engine.kv_usage == pytest.approx((4 + 2) / 100)


def test_out_of_blocks_the_last_one_is_preempted_and_recomputed() -> None:
    engine = Engine(params(num_blocks=5, kv_token_seconds=0.0))
    a = EngineRequest(8, 8, [1, 2], key="a")
    b = EngineRequest(6, 3, [3], key="b")
    engine.submit(a, 0.0)
    engine.submit(b, 0.0)
    t1 = 1 + 0.08  # a's prompt takes 2 blocks
    t2 = t1 + 1 + 0.1 + 0.06  # b's prompt takes 2, a takes its third: all 5 are in use
    t3 = t2 + 1 + 0.2  # both decode; b has 7 tokens in 2 blocks, a 10 in 3
    t4 = t3 + 1 + 0.2  # b's third token: done
    events = drain(engine)
    assert told(events)[:3] == [
        ("first token", "a", round(t1, 9)),
        ("first token", "b", round(t2, 9)),
        ("finished", "b", round(t4, 9)),
    ]
    assert engine.stats.preemptions == 0

    engine = Engine(params(num_blocks=5, kv_token_seconds=0.0))
    a = EngineRequest(8, 8, [1, 2], key="a")
    b = EngineRequest(6, 9, [3], key="b")
    engine.submit(a, 0.0)
    engine.submit(b, 0.0)
    # b has 8 tokens with KV after t4 and needs a third block for the next: there is none, and b is the last one.
    events = drain(engine)
    t5 = t4 + 4 * 1.1  # a decodes alone: 4 tokens so far, 8 at the end
    # b comes back at the end of a's first step alone only if 3 blocks were free: 5 - a's 3 = 2 are not, so it waits
    # until a is done. Of its two whole blocks a has taken the second for its own fourth; the first is found again and
    # 5 of 9 tokens are computed.
    t6 = t5 + 1 + 0.05
    assert told(events)[2:] == [
        ("preempted", "b", round(t4, 9)),
        ("finished", "a", round(t5, 9)),
        ("finished", "b", round(t6 + 5 * 1.1, 9)),
    ]
    assert b.preemptions == 1 and b.cached_tokens == 0
    assert engine.stats.preemptions == 1
    assert engine.stats.generation_tokens == 17
    assert engine.stats.prefix_queries_tokens == 14  # a readmission is not a query
    assert engine.stats.inter_token_latency.count == 7 + 8
    assert engine.pool.free == 5


def test_a_preempted_request_finds_the_blocks_of_its_own_answer_again() -> None:
    engine = Engine(params(num_blocks=5, kv_token_seconds=0.0))
    a = EngineRequest(8, 5, [1, 2])  # done before it needs a fourth block
    b = EngineRequest(6, 9, [3])  # preempted with 8 tokens in two whole blocks, of which only the first has a name
    engine.submit(a, 0.0)
    engine.submit(b, 0.0)
    drain(engine)
    assert b.preemptions == 1
    assert b.finished == a.finished + (1.01 + 5 * 1.1) * 1e12
    assert engine.stats.prefix_hits_tokens == 0


@pytest.mark.parametrize("step_by_step", [True, False])
def test_the_head_of_the_queue_is_tried_again_when_an_answer_publishes_a_block(step_by_step: bool) -> None:
    engine = Engine(params(num_blocks=8, kv_token_seconds=0.0), step_by_step=step_by_step)
    a = EngineRequest(6, 12, [1, 2])
    c = EngineRequest(9, 12, [7, 3])
    b = EngineRequest(17, 1, [1, 2, 3, 4])
    engine.submit(a, 0.0)
    t1 = 1.06
    engine.submit(c, 0.5)
    t2 = t1 + 1.1 + 0.09
    engine.submit(b, t1 + 0.5)
    # At t2 b needs 5 blocks and shares the first; 4 more are not free. In the next step a fills the block named 2,
    # which lets b find 3 as well, held by c: 2 of the 2 that remain are enough.
    t3 = t2 + 1.2
    drain(engine)
    assert b.scheduled / 1e12 == pytest.approx(t3)
    assert b.cached_tokens == 12


def test_abort_takes_effect_when_the_step_ends() -> None:
    engine = Engine(params(kv_token_seconds=0.0))
    a, b = EngineRequest(10, 100, key="a"), EngineRequest(10, 100, key="b")
    engine.submit(a, 0.0)
    engine.submit(b, 0.0)
    engine.abort(b, 0.5)  # still in the queue
    engine.advance(1.2)
    assert (engine.running, engine.waiting) == (1, 0)
    engine.abort(a, 1.2)
    engine.abort(a, 1.3)
    assert engine.next_event() == pytest.approx(2.2)
    assert drain(engine) == []
    assert (engine.running, engine.stats.aborted, engine.kv_usage) == (0, 2, 0)
    engine.abort(a, 5.0)
    assert engine.stats.aborted == 2


def test_what_can_never_run_is_refused() -> None:
    engine = Engine(params(num_blocks=5))
    with pytest.raises(ValueError, match=r"exceed max_model_len .* or the KV cache"):
        engine.submit(EngineRequest(15, 6), 0.0)
    with pytest.raises(ValueError, match="at least 1"):
        engine.submit(EngineRequest(0, 6), 0.0)
    request = EngineRequest(3, 1)
    engine.submit(request, 1.0)
    with pytest.raises(ValueError, match="submitted before"):
        engine.submit(request, 1.0)
    with pytest.raises(ValueError, match="backwards"):
        engine.advance(0.5)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"max_num_batched_tokens": 4}, "below max_num_seqs"),
        ({"step_seconds": 0.0}, "at least a picosecond"),
        ({"kv_token_seconds": -1.0}, "kv_token_seconds is -1.0"),
        ({"num_blocks": 0}, "num_blocks is 0"),
    ],
)
def test_impossible_parameters_are_named(changes: dict[str, float], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        params(**changes)


def test_twice_as_fast_takes_half_the_time() -> None:
    ends = []
    for factor in (1.0, 2.0):
        engine = Engine(params().faster(factor))
        request = EngineRequest(10, 30)
        engine.submit(request, 0.0)
        drain(engine)
        ends.append(request.e2e_seconds)
    assert ends[0] == pytest.approx(2 * ends[1])


# Runs against single steps


def snapshot(engine: Engine, requests: list[EngineRequest]) -> list[object]:
    stats = vars(engine.stats)
    return [
        engine.running,
        engine.waiting,
        engine.kv_usage,
        engine.pool.cached,
        [engine.generated(r) for r in requests],
        {k: (v.counts, v.total) if isinstance(v, Histogram) else v for k, v in stats.items()},
    ]


arrivals = st.lists(
    st.tuples(
        st.floats(0, 4, allow_nan=False),  # seconds after the one before
        st.integers(1, 60),  # prompt
        st.integers(1, 60),  # answer
        st.integers(0, 3),  # which prefix
        st.integers(0, 15),  # how many of its blocks, beyond the prompt: of the answer
        st.sampled_from([None, None, None, 0.3, 5.0, 40.0]),  # aborted after
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=200, deadline=None)
@given(
    arrivals,
    st.integers(30, 60),
    st.sampled_from([1, 2, 4, 16]),
    st.integers(1, 6),
    st.integers(6, 40),
    st.booleans(),
    st.sampled_from([0.0, 0.000123456789]),
    st.lists(st.floats(0, 60, allow_nan=False), max_size=5),
)
def test_a_run_equals_its_steps(
    plan: list[tuple[float, int, int, int, int, float | None]],
    num_blocks: int,
    block_tokens: int,
    max_num_seqs: int,
    budget: int,
    share: bool,
    kv_seconds: float,
    looks: list[float],
) -> None:
    """Same events at the same instants, same counters and histograms whenever somebody looks."""
    setting = params(
        num_blocks=num_blocks * 4 // block_tokens if block_tokens > 1 else num_blocks * 3,
        block_tokens=block_tokens,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(budget, max_num_seqs),
        kv_token_seconds=kv_seconds,
        share_within_step=share,
        step_seconds=0.0123456789,
        prefill_token_seconds=0.00987654321,
        decode_request_seconds=0.000333333333,
    )
    outcomes = []
    for step_by_step in (True, False):
        engine = Engine(setting, step_by_step=step_by_step)
        capacity = setting.num_blocks * block_tokens
        requests, actions, now = [], [], 0.0
        for gap, prompt, answer, prefix, hashes, abort in plan:
            now += gap
            prompt = min(prompt, capacity - 1)
            answer = min(answer, capacity - prompt)
            named = min(hashes, (prompt + answer) // block_tokens)
            request = EngineRequest(prompt, answer, [prefix * 100 + i for i in range(named)], key=len(requests))
            requests.append(request)
            actions.append((now, 0, request))
            if abort is not None:
                actions.append((now + abort, 1, request))
        actions += [(look, 2, requests[0]) for look in looks]
        seen: list[object] = []
        events: list[Event] = []
        for at, kind, request in sorted(actions, key=lambda action: action[:2]):
            while (wake := engine.next_event()) is not None and wake <= at:
                happened = engine.advance(wake)
                assert all(event.at == pytest.approx(wake, abs=1e-9) for event in happened)
                events += happened
            if kind == 0:
                engine.submit(request, at)
            elif kind == 1:
                engine.abort(request, at)
            else:
                events += engine.advance(at)
            seen.append(snapshot(engine, requests))
        events += drain(engine)
        seen.append(snapshot(engine, requests))
        assert engine.running == engine.waiting == 0
        assert engine.pool.free == setting.num_blocks
        outcomes.append(
            (
                [(e.kind, e.request.key, e.at) for e in events],
                [(r.scheduled, r.first_token, r.finished, r.cached_tokens, r.preemptions) for r in requests],
                seen,
            )
        )
    by_step, by_run = outcomes
    assert by_run[0] == by_step[0]
    assert by_run[1] == by_step[1]
    assert by_run[2] == by_step[2]


@given(st.integers(1, 50), st.integers(0, 9), st.integers(1, 40), st.integers(1, 3))
def test_a_histogram_counts_a_run_as_its_values(first: int, slope: int, length: int, times: int) -> None:
    at_once, one_by_one = Histogram((5, 10, 20, 50, 100)), Histogram((5, 10, 20, 50, 100))
    at_once.observe_run(first, slope, length, times)
    for j in range(length):
        one_by_one.observe(first + slope * j, times)
    assert at_once.counts == one_by_one.counts
    assert at_once.total == one_by_one.total


def test_a_prompt_prefilled_elsewhere_takes_its_room_and_one_token_of_time() -> None:
    engine = Engine(params())
    request = EngineRequest(40, 2, block_hashes=range(10), key="a", prefilled=True)
    engine.submit(request, 0.0)
    assert engine.kv_usage == pytest.approx(0.10)
    drain(engine)
    assert request.ttft_seconds == pytest.approx(1 + 0.01 + 0.040)
    assert request.cached_tokens == 39 and engine.stats.prefix_hits_tokens == 0
