"""One document, one publisher, any number of readers."""

import os
import time

import pytest
from fleet import end_of, in_child, kill_all, make_record
from hypothesis import given
from hypothesis import strategies as st

from state.catalog import Catalog, CatalogDocument, CatalogFull, PodRecord
from state.segment import Segment

ROOM = 1 << 16


def make_catalog(room: int = ROOM) -> Catalog:
    return Catalog(Segment.create({"catalog": Catalog.size(room)}).region("catalog"))


def document(number: int) -> CatalogDocument:
    """Of a size that differs from number to number, every field a function of it."""
    pods = tuple(
        make_record(slot, generation=number * 100 + slot, name=f"pod-{number}-{slot}" + "x" * (number % 13))
        for slot in range(number * 7 % 20)
    )
    return CatalogDocument(pods, {f"m{number}": {"number": number}})


def test_before_the_first_document_there_is_an_empty_one() -> None:
    catalog = make_catalog()
    assert catalog.version == 0
    assert catalog.read() == (0, CatalogDocument())


def test_versions_go_up_and_the_last_document_counts() -> None:
    catalog = make_catalog()
    for number in range(1, 30):
        catalog.publish(document(number))
        assert catalog.version == number
        assert catalog.read() == (number, document(number))


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(
    st.lists(
        st.builds(
            PodRecord,
            st.integers(0, 2**31),
            st.integers(0, 2**62),
            _TEXT,
            _TEXT,
            st.lists(_TEXT).map(tuple),
            draining=st.booleans(),
            labels=st.dictionaries(_TEXT, _TEXT, max_size=3),
        ),
        max_size=4,
    ).map(tuple),
    st.dictionaries(
        _TEXT, st.dictionaries(_TEXT, st.one_of(_TEXT, st.integers(-(2**53), 2**53), st.none())), max_size=3
    ),
)
def test_what_is_published_is_what_is_read(pods: tuple[PodRecord, ...], models: dict[str, dict[str, object]]) -> None:
    catalog = make_catalog()
    catalog.publish(CatalogDocument(pods, models))
    assert catalog.read() == (1, CatalogDocument(pods, models))


def test_a_document_that_does_not_fit_changes_nothing_and_says_what_to_do() -> None:
    catalog = make_catalog(4096)
    catalog.publish(document(3))
    with pytest.raises(CatalogFull, match=r"raise capacity\.catalog_bytes"):
        catalog.publish(CatalogDocument(tuple(make_record(slot) for slot in range(200))))
    assert catalog.read() == (1, document(3))


def test_a_publisher_that_died_half_way_is_not_seen() -> None:
    catalog = make_catalog()
    catalog.publish(document(5))
    catalog._buffers[0][:400] = b"\xff" * 400  # where the second document goes
    assert catalog.read() == (1, document(5))
    catalog.publish(document(6))
    assert catalog.read() == (2, document(6))


def test_readers_never_see_half_a_document() -> None:
    catalog = make_catalog()
    catalog.publish(document(1))
    until = time.monotonic() + 1.5
    read_fd, write_fd = os.pipe()

    def read() -> None:
        last = changes = 0
        while time.monotonic() < until:
            version, found = catalog.read()
            assert version >= last
            changes += version != last
            last = version
            assert found == document(version)
        os.write(write_fd, changes.to_bytes(4, "little"))

    readers = [in_child(read) for _ in range(3)]
    number = 1
    while time.monotonic() < until:
        number += 1
        catalog.publish(document(number))
    assert [end_of(pid) for pid in readers] == [0, 0, 0]
    seen = [int.from_bytes(os.read(read_fd, 4), "little") for _ in readers]
    os.close(read_fd)
    os.close(write_fd)
    assert min(seen) > 5


def test_readers_go_on_when_the_publisher_is_killed() -> None:
    catalog = make_catalog()
    catalog.publish(document(1))

    def publish() -> None:
        number = 1
        while True:
            number += 1
            catalog.publish(document(number))

    for _ in range(5):
        publisher = in_child(publish) if catalog.version == 1 else in_child(lambda: _go_on(catalog))
        time.sleep(0.05)
        kill_all([publisher])
        version, found = catalog.read()
        assert version > 1
        assert found == document(version)


def _go_on(catalog: Catalog) -> None:
    while True:
        catalog.publish(document(catalog.version + 1))
