"""Prompts of which this replica cannot know: all replicas expect them at the same pod, and so it comes true."""

from collections import Counter
from typing import Any

import pytest

from router.rates import ELSEWHERE_SECONDS
from router.strategies.delays import MIN_FORGOTTEN, MIN_UNSEEN
from state.catalog import PodRecord

NAME = "marginal-delay"
PODS = 8


def others_route_too(fleet: Any, elsewhere: float = 3.0) -> None:
    """Engines run so many requests for each one that this replica knows of, and have for long."""
    for _ in range(4):
        fleet.now += ELSEWHERE_SECONDS
        for slot in [record.slot for record in fleet.records]:
            requests, _ = fleet.tables.ledger.load(slot)
            fleet.poll(slot, running=requests + elsewhere * max(requests, 1), waiting=0.0, num_gpu_blocks=1e5)
        fleet.scores(NAME, fleet.request(tokens=100))


def have_conversations(fleet: Any, prompt: Any, times: int = 3) -> None:
    """Most prompts of late were found, and none is in flight any more."""
    for _ in range(times):
        for number in range(10):
            fleet.send(NAME, fleet.request(prompt(f"known {number}", 8)))
            fleet.finish()
    fleet.now += 3.0


def among_others(fleet: Any, prompt: Any) -> Any:
    """A replica as it is where others route as well, and prompts are found again."""
    have_conversations(fleet, prompt)
    others_route_too(fleet)
    have_conversations(fleet, prompt)
    return fleet


def home(fleet: Any, text: bytes) -> list[int]:
    """The row where a prompt is expected, or none."""
    request = fleet.request(text)
    strategy, candidates = fleet.strategy(NAME), fleet.candidates()
    *_, others, _ = strategy._weigh(request, candidates, fleet.now)
    delays = strategy.delays(candidates, fleet.now)
    known = request.prefix.uncached_and_scarce(strategy._prefixes.index, fleet.now, 0)[2]
    added = others[len(known) :]
    assert delays.unseen or delays.forgotten or not added
    return [candidates.pods[index].slot for indices, _, _ in added for index in indices]


def test_replicas_that_do_not_hear_of_each_other_send_a_new_prompt_to_the_same_pod(lab: Any, prompt: Any) -> None:
    fleets = [lab(PODS), lab(PODS)]
    for fleet in fleets:
        among_others(fleet, prompt)
    chosen = []
    for number in range(24):
        text = prompt(f"new {number}", 32)
        chosen.append([fleet.send(NAME, fleet.request(text)) for fleet in fleets])
        for fleet in fleets:
            fleet.finish()
            fleet.now += 4.0
            have_conversations(fleet, prompt, times=1)
    assert all(first == second for first, second in chosen)
    assert max(Counter(first for first, _ in chosen).values()) <= 9


def test_one_that_sees_every_request_expects_nothing(lab: Any, prompt: Any) -> None:
    fleet = lab(PODS)
    have_conversations(fleet, prompt)
    for slot in range(PODS):
        fleet.load(slot, 10)
    others_route_too(fleet, elsewhere=0.8 * MIN_UNSEEN)
    have_conversations(fleet, prompt)
    assert home(fleet, prompt("new", 32)) == []


def test_where_no_prompt_is_found_again_none_is_expected_anywhere(lab: Any, prompt: Any) -> None:
    fleet = lab(PODS)
    others_route_too(fleet)
    for number in range(30):
        fleet.send(NAME, fleet.request(prompt(f"once {number}", 8)))
        fleet.finish()
    assert home(fleet, prompt("new", 32)) == []


def test_a_prompt_of_which_nothing_is_known_is_not_expected_anywhere(lab: Any, prompt: Any) -> None:
    fleet = among_others(lab(PODS), prompt)
    assert home(fleet, b"") == []
    assert home(fleet, prompt("known 1", 8)) == []  # all of it is known
    assert home(fleet, prompt("new", 32)) != []


def test_whoever_waits_longest_is_no_home(lab: Any, prompt: Any) -> None:
    fleet = among_others(lab(PODS), prompt)
    text = prompt("new", 32)
    (slot,) = home(fleet, text)
    fleet.promise(slot, 5_000_000)
    assert fleet.send(NAME, fleet.request(text)) != slot


def test_a_home_is_known_by_its_address(lab: Any, prompt: Any) -> None:
    """Rows are given out by each replica as pods come."""
    fleets = [lab(PODS), lab(0)]
    records = [
        PodRecord(slot, slot + 1, f"pod-{slot}", record.address, ("m",))
        for slot, record in enumerate(reversed(fleets[0].records))
    ]
    for record in records:
        fleets[1].records.append(record)
        fleets[1].tables.pods.claim(record.slot, record.generation)
        fleets[1].poll(record.slot)
    fleets[1].publish()
    for fleet in fleets:
        among_others(fleet, prompt)
    for number in range(8):
        text = prompt(f"new {number}", 32)
        addresses = {
            record.address for fleet in fleets for record in fleet.records if [record.slot] == home(fleet, text)
        }
        assert len(addresses) == 1


def test_what_goes_on_after_an_answer_is_expected_where_that_was_given(lab: Any, prompt: Any) -> None:
    fleet = among_others(lab(PODS), prompt)
    for number in range(6):
        text = prompt(f"session {number}", 16)
        slots = []
        for _ in range(2):  # the second is found: prompts go on there
            slots.append(fleet.send(NAME, fleet.request(text)))
            fleet.finish()
        assert home(fleet, text + prompt("next turn", 8))[0] in slots


def test_what_goes_on_after_a_prompt_is_expected_there_only_if_that_is_usual(lab: Any, prompt: Any) -> None:
    fleet = lab(PODS)
    others_route_too(fleet)
    for number in range(30):
        fleet.send(NAME, fleet.request(prompt(f"once {number}", 16)))
        fleet.finish()
    assert home(fleet, prompt("once 29", 16) + prompt("next turn", 8)) == []


def test_prompts_too_short_to_be_found_say_nothing(lab: Any, prompt: Any) -> None:
    fleet = lab(PODS)
    others_route_too(fleet)
    for number in range(20):
        fleet.send(NAME, fleet.request(prompt(f"once {number}", 8)))
        fleet.send(NAME, fleet.request(b"hi"))
        fleet.finish()
    assert home(fleet, prompt("new", 32)) == []


def test_where_replicas_tell_each_other_nothing_is_guessed(lab: Any, prompt: Any) -> None:
    fleet = among_others(lab(PODS), prompt)
    assert home(fleet, prompt("new", 32)) != []
    fleet.worker()[2].prefixes.homes = False
    assert home(fleet, prompt("newer", 32)) == []


def test_what_a_full_index_has_forgotten_is_expected_at_home(lab: Any, prompt: Any) -> None:
    """Also where replicas tell each other everything: that they hear it does not mean that they can keep it."""
    fleet = lab(PODS)
    prefixes = fleet.worker()[2].prefixes
    prefixes.homes = False
    for slot in range(PODS):
        fleet.poll(slot, num_gpu_blocks=1e5, block_size=16.0)
    have_conversations(fleet, prompt)
    assert home(fleet, prompt("new", 32)) == []
    prefixes.index._max_blocks = 2 * prefixes.index.blocks
    for number in range(60):
        for turns in (1, 2):
            fleet.send(NAME, fleet.request(b"".join(prompt(f"{number} {turn}", 8) for turn in range(turns))))
            fleet.finish()
            fleet.now += 0.1
    assert prefixes.index.forgotten() > MIN_FORGOTTEN
    (slot,) = home(fleet, prompt("new", 32))
    assert fleet.send(NAME, fleet.request(prompt("new", 32))) == slot


def test_polls_that_differ_by_chance_are_no_other_replica(lab: Any, prompt: Any) -> None:
    """What one pod seems to have more than it was sent, others seem to have less."""
    fleet = lab(PODS)
    for slot in range(PODS):
        fleet.load(slot, 4)
    have_conversations(fleet, prompt)
    for number in range(20):
        fleet.now += 5.0
        for slot in range(PODS):
            fleet.poll(slot, running=4.0 + (4.0 if (slot + number) % 2 else -4.0), waiting=0.0)
        fleet.scores(NAME, fleet.request(tokens=100))
    assert home(fleet, prompt("new", 32)) == []


def test_the_terms_add_up_to_the_score_where_a_home_is_expected(lab: Any, prompt: Any) -> None:
    for pods in (1, 2, PODS):
        fleet = among_others(lab(pods), prompt)
        for text in (prompt("new", 32), prompt("known 3", 8) + prompt("new", 32)):
            request = fleet.request(text)
            assert home(fleet, text)
            terms = fleet.strategy(NAME).terms(request, fleet.candidates(), fleet.now)
            assert sum(terms.values()) == pytest.approx(fleet.scores(NAME, fleet.request(text)), rel=1e-6)
