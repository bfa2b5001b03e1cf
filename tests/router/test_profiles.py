import orjson
import pytest

from router.profiles import ProfileError, effective_strategy, parse_profiles


def config(**hints: dict[str, object]) -> dict[str, object]:
    return {"profiles": {name: {"routingStrategy": name, "routingConfig": routing} for name, routing in hints.items()}}


def auto(settings: dict[str, object], prompt: int, most: int = 0) -> tuple[str | None, str]:
    resolved = parse_profiles(settings).resolve(" Auto ", lambda: prompt, most)
    return (resolved.profile.name if resolved.profile else None), resolved.chosen_by_auto


def never() -> int:
    raise AssertionError("tokens are only counted for auto")


FULL = {
    "lockedRoutingStrategy": "random",
    "defaultProfile": "calm",
    "profiles": {
        "calm": {"routingStrategy": "least-request", "requestsPerSecond": 5},
        "pd": {"routingStrategy": "pd", "routingConfig": {"combined": True}},
    },
}


@pytest.mark.parametrize("source", [FULL, orjson.dumps(FULL), orjson.dumps(FULL).decode()])
def test_a_configuration_is_read_as_text_or_parsed(source: object) -> None:
    profiles = parse_profiles(source)  # type: ignore[arg-type]
    resolved = profiles.resolve("pd", never, 0)
    assert resolved.profile is not None
    assert (resolved.profile.name, resolved.profile.routing_strategy) == ("pd", "pd")
    assert resolved.profile.routing_config == {"combined": True}
    assert (resolved.locked_strategy, resolved.chosen_by_auto) == ("random", "")


@pytest.mark.parametrize("requested", ["", " ", "nobody", "Calm", "calm "])
def test_an_unknown_profile_is_the_default_one(requested: str) -> None:
    resolved = parse_profiles(FULL).resolve(requested, never, 0)
    assert resolved.profile is not None
    assert (resolved.profile.name, resolved.profile.requests_per_second) == ("calm", 5)


def test_without_a_default_there_may_be_none() -> None:
    profiles = parse_profiles({"lockedRoutingStrategy": "random", "profiles": {"a": {}}})
    resolved = profiles.resolve("b", never, 0)
    assert (resolved.profile, resolved.locked_strategy) == (None, "random")
    named = parse_profiles({"profiles": {"default": {"routingStrategy": "x"}}}).resolve("", never, 0).profile
    assert named is not None and named.name == "default"


@pytest.mark.parametrize(
    "source",
    [
        "",
        "{",
        "[]",
        "null",
        {},
        {"lockedRoutingStrategy": "random"},
        {"profiles": {}},
        {"profiles": None},
        {"profiles": []},
        {"profiles": {"a": 7}},
        {"profiles": {"a": {"routingStrategy": 7}}},
        {"profiles": {"a": {"requestsPerSecond": "5"}}},
        {"profiles": {"a": {"requestsPerSecond": True}}},
        {"profiles": {"a": {}}, "defaultProfile": 7},
    ],
)
def test_what_is_no_configuration_is_refused(source: object) -> None:
    with pytest.raises(ProfileError):
        parse_profiles(source)  # type: ignore[arg-type]


def test_auto_takes_the_profile_whose_hints_fit() -> None:
    settings = config(short={"promptTokensLt": 100}, long={"promptTokensGte": 100}, default={})
    assert auto(settings, 99) == ("short", "short")
    assert auto(settings, 100) == ("long", "long")


def test_output_hints_need_an_output_bound() -> None:
    settings = config(brief={"maxTokensLt": 10}, wordy={"maxTokensGte": 10}, default={})
    assert auto(settings, 0, 9) == ("brief", "brief")
    assert auto(settings, 0, 10) == ("wordy", "wordy")
    assert auto(settings, 0) == ("default", "default")


def test_without_a_fit_auto_is_the_default_profile() -> None:
    assert auto(config(a={"promptTokensGte": 9}), 1) == (None, "")
    assert auto({**config(a={"promptTokensGte": 9}), "lockedRoutingStrategy": "random"}, 1) == (None, "default")
    assert auto({**config(a={"promptTokensGte": 9}), "defaultProfile": "a"}, 1) == ("a", "a")


@pytest.mark.parametrize(
    ("hints", "wanted"),
    [
        ({"a": {"promptTokensGte": 50}, "b": {"promptTokensGte": 1, "promptTokensLt": 999}}, "b"),
        ({"a": {"promptTokensGte": 50}, "b": {"promptTokensGte": 60}}, "b"),
        ({"a": {"promptTokensLt": 300}, "b": {"promptTokensLt": 200}}, "b"),
        ({"a": {"maxTokensGte": 5}, "b": {"maxTokensGte": 6}}, "b"),
        ({"a": {"maxTokensLt": 30}, "b": {"maxTokensLt": 20}}, "b"),
        ({"a": {"maxTokensGte": 6}, "b": {"promptTokensGte": 1}}, "b"),
        ({"b": {"promptTokensGte": 50}, "a": {"promptTokensGte": 50}}, "a"),
        ({"a": {"promptTokensGte": "50"}, "b": {"promptTokensGte": 1}}, "b"),
        ({"a": {"promptTokensGte": 50, "promptTokensLt": 1.5}, "b": {"promptTokensGte": 1}}, "b"),
        ({"a": None, "b": {"promptTokensGte": 1}}, "b"),
        ({"a": [], "b": {"promptTokensGte": 0}}, "b"),
    ],
)
def test_of_several_that_fit_the_more_specific_one_is_taken(hints: dict[str, object], wanted: str) -> None:
    assert auto(config(**hints), 100, 10) == (wanted, wanted)  # type: ignore[arg-type]


def test_lock_header_profile_default() -> None:
    profile = parse_profiles(FULL).resolve("", never, 0).profile
    assert effective_strategy("random", "bad", profile, "d") == "random"
    assert effective_strategy(" ", " a ", profile, "d") == "a"
    assert effective_strategy("", " ", profile, "d") == "least-request"
    assert effective_strategy("", "", None, "d") == "d"
    assert effective_strategy("", "", None, "") == ""
