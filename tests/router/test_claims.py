"""What a pod's labels say of the models it holds."""

import pytest
from exchanges import Contract
from fleet import chat, make_record
from hypothesis import given
from hypothesis import strategies as st

from router.claims import PREFIX, STATES, claims_of


@pytest.mark.parametrize(
    ("text", "claims"),
    [
        ('{"model":"org/qwen","port":0,"state":"sleeping"}', {"org/qwen": "sleeping"}),
        ('{"model":"org/qwen","port":8000,"state":"active"}', {"org/qwen": "active"}),
        ('{"model":"org/qwen","port":8000}', {"org/qwen": "active"}),
        ('{"model":"org/qwen","port":0}', {"org/qwen": "activating"}),
        ('{"state":"failed"}', {"c": "failed"}),
        ("sleeping", {"c": "sleeping"}),
        (" Active ", {"c": "active"}),
        ('{"model":"org/qwen","state":"dreaming"}', {}),
        ('{"model":5,"state":"failed"}', {"c": "failed"}),
        ("dreaming", {}),
        ("[]", {}),
        ("", {}),
    ],
)
def test_claims(text: str, claims: dict[str, str]) -> None:
    assert claims_of({"zone": "sleeping", f"{PREFIX}c": text}) == claims


@given(st.dictionaries(st.sampled_from(["", "a", "b"]).map(PREFIX.__add__), st.text(max_size=40)))
def test_any_label_is_a_claim_or_none(labels: dict[str, str]) -> None:
    assert set(claims_of(labels).values()) <= set(STATES)


def test_one_pod_may_hold_several_models_of_which_some_sleep() -> None:
    labels = {
        f"{PREFIX}one": '{"model":"org/a","port":8000,"state":"active"}',
        f"{PREFIX}two": '{"model":"org/b","port":0,"state":"sleeping"}',
    }
    contract = Contract(records=[make_record(0, models=("base", "org/a", "org/b"), labels=labels)])
    assert contract.routed(body=chat("org/a")).last.headers["target-pod"] == "10.0.0.1:8000"
    assert contract.routed(body=chat("base")).last.headers["target-pod"] == "10.0.0.1:8000"
    said = contract.routed(body=chat("org/b")).last
    assert (said.status, said.error["message"]) == (503, "model org/b is sleeping; retry shortly")
    assert (said.headers["Retry-After"], said.headers["x-error-no-model-backends"]) == ("10", "org/b")
