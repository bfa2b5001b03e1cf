"""The users that a worker starts with while their file cannot be used."""

import os
from pathlib import Path

import pytest
from fleet import end_of, in_child

from router.limits import Limits
from workers.last_users import LastUsers
from workers.users import UserBook, UsersError


def test_the_last_text_is_kept_whoever_dies_while_writing() -> None:
    last = LastUsers()
    assert last.text() is None
    for text in ("", "one", "two, which is longer", "2"):
        last.keep(text)
        last.keep(text)
        assert last.text() == text
    assert end_of(in_child(lambda: last.keep("of a child"))) == 0
    assert last.text() == "of a child"

    def die() -> None:
        os.ftruncate = lambda *_: os._exit(9)
        last.keep("never written")

    assert end_of(in_child(die)) == 9
    assert last.text() == "of a child"
    newest = max(last._files, key=lambda file: last._read(file)[0])
    os.pwrite(newest, b"half", 20)
    assert last.text() == "2"
    last.keep("good again")
    assert last.text() == "good again"


def test_a_book_opened_on_a_file_that_cannot_be_used_holds_what_was_read_before(tmp_path: Path) -> None:
    path, last = tmp_path / "users.yaml", LastUsers()
    path.write_text("users: [")
    with pytest.raises(UsersError):
        UserBook(path, 10, last)
    path.write_text("users: [{name: alice, rpm: 7}]")
    assert UserBook(path, 10, last).limits_of("alice") == Limits(7, 7000)
    for spoil in (lambda: path.write_text("users: ["), path.unlink):
        spoil()
        assert UserBook(path, 10, last).limits_of("alice") == Limits(7, 7000)
