"""Ids for requests that bring none."""

import uuid

from router.request_ids import RequestIds


def test_ids_are_random_uuids_of_version_4_and_no_two_are_the_same() -> None:
    sources = [RequestIds(), RequestIds()]
    drawn = [source.new().decode() for source in sources for _ in range(1000)]
    assert len(set(drawn)) == 2000
    for text in drawn:
        parsed = uuid.UUID(text)
        assert str(parsed) == text
        assert parsed.version == 4 and parsed.variant == uuid.RFC_4122
    assert {text[20:] for text in drawn} != {drawn[0][20:]}
