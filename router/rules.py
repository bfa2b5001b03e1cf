"""What a model's settings say of its requests: routing profiles, whether it is awake, which engine serves it.

Worked out once per version of the catalog and model. Most models have no settings at all; for them there are no rules
(None), and a request pays one look-up in a dictionary.

A pod that hosts several models of which some sleep says so by its claims (`router/claims.py`). A model's own settings
may say `state` instead, for all of its pods.
"""

from collections.abc import Callable, Iterator
from typing import Any, Final

from router.claims import ACTIVE, SLEEPING, STATES, claims_of, state_in
from router.fleet import Candidates, Fleet, Model, Pod
from router.profiles import ProfileError, Profiles, parse_profiles
from router.selectors import SelectorError, parse_selector

CONFIG: Final = "model.aibrix.ai/config"
ENGINE: Final = "model.aibrix.ai/engine"
NAME: Final = "model.aibrix.ai/name"
PORT: Final = "model.aibrix.ai/port"
_MAX_SELECTORS: Final = 64


class Rules:
    """See the head of this file."""

    __slots__ = ("asleep", "engine", "profiles", "sleeper", "sleepers")

    def __init__(
        self, engine: str, profiles: Profiles | None, asleep: str, sleepers: frozenset[int], sleeper: Pod | None
    ) -> None:
        self.engine = engine
        """Of the first pod, where its label names one."""
        self.profiles = profiles
        self.asleep = asleep
        """The state of a model that is not active anywhere; else empty."""
        self.sleepers = sleepers
        """Slots of the pods on which it is not active, while it is on others."""
        self.sleeper = sleeper
        """The pod to be woken for a request, where the model sleeps everywhere."""


def rules_of(model: Model, fleet: Fleet) -> Rules | None:
    """The rules of a model; None where there are none."""
    engine = next((engine_of(pod) for pod in model.pods), "")
    states = {pod.slot: claims_of(pod.record.labels).get(model.name, "") for pod in model.pods}
    claimed = {state for state in states.values() if state}
    asleep = ""
    if claimed and claimed.issuperset(states.values()) and ACTIVE not in claimed:
        asleep = min(claimed, key=STATES.index)
    stated = state_in(model.settings.get("state"))
    if stated and stated != ACTIVE:
        asleep = stated
    sleepers = frozenset(slot for slot, state in states.items() if state not in ("", ACTIVE))
    profiles = next(_profiles(model, fleet), None)
    if engine != "xdit" and profiles is None and not asleep and not sleepers:
        return None
    sleeping = next((pod for pod in model.pods if states[pod.slot] == SLEEPING), model.pods[0])
    return Rules(engine, profiles, asleep, sleepers, sleeping if asleep == SLEEPING else None)


def awake(candidates: Candidates, rules: Rules) -> Candidates:
    """The pods on which the model is not asleep."""
    if not rules.sleepers:
        return candidates
    found: Candidates | None = candidates.derived.get(Rules)
    if found is None:
        found = candidates.derived[Rules] = _those(candidates, lambda pod: pod.slot not in rules.sleepers)
    return found


def filtered(candidates: Candidates, selector: str) -> Candidates | None:
    """The pods whose labels fit a label selector; None where it is none. The last few answers are kept until the next
    poll, since what is worked out for candidates is kept with them."""
    known: dict[str, Candidates] = candidates.derived.setdefault("selected", {})
    found = known.get(selector)
    if found is None:
        try:
            matches = parse_selector(selector).matches
        except SelectorError:
            return None
        if len(known) >= _MAX_SELECTORS:
            known.clear()
        found = known[selector] = _those(candidates, lambda pod: matches(labels_of(pod)))
    return found


def _those(candidates: Candidates, wanted: Callable[[Pod], bool]) -> Candidates:
    """The pods that are wanted, and of those that prefill for them the wanted ones."""
    places = [i for i, pod in enumerate(candidates.pods) if wanted(pod)]
    prefill = candidates.prefill
    for_prefill = [i for i, pod in enumerate(prefill.pods) if wanted(pod)] if prefill is not None else []
    if len(places) == len(candidates) and (prefill is None or len(for_prefill) == len(prefill)):
        return candidates
    found = candidates.subset(places)
    if prefill is not None:
        found.prefill = prefill.subset(for_prefill)
    return found


def labels_of(pod: Pod) -> dict[str, str]:
    """A pod's labels, and those that AIBrix's pods always carry, where nobody has set them to something else."""
    record = pod.record
    known = {NAME: record.models[0], ENGINE: record.engine, PORT: record.address.rpartition(":")[2]}
    if record.role:
        known |= {"role-name": record.role, "roleset-name": record.roleset}
    return {**known, **record.labels}


def engine_of(pod: Pod) -> str:
    """What serves the model there: its label, or what discovery says."""
    return pod.record.labels.get(ENGINE) or pod.record.engine


def _profiles(model: Model, fleet: Fleet) -> Iterator[Profiles]:
    """Those that can be read, the likeliest first: the model's own, then its pods': what a label says, or what the base
    model of an adapter has."""
    sources: list[Any] = [model.settings]
    for pod in model.pods:
        sources.append(pod.record.labels.get(CONFIG))
        sources += [fleet.models[name].settings for name in pod.record.models if name in fleet.models]
    for source in sources:
        if source:
            try:
                yield parse_profiles(source)
            except ProfileError:
                continue
