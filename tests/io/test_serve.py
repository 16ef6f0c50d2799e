"""The publisher's own server: ranges as devices and others ask for them."""

from __future__ import annotations

from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tbox.ota.serve import running

DATA = bytes(range(200))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets" / "file").write_bytes(DATA)
    with running(tmp_path) as base:
        yield urlsplit(base).netloc


def answer(place: str, **headers: str) -> tuple[int, str | None, bytes]:
    connection = HTTPConnection(place, timeout=5)
    connection.request("GET", "/targets/file", headers=headers)
    response = connection.getresponse()
    found = (response.status, response.headers["Content-Range"], response.read())
    connection.close()
    return found


@pytest.mark.parametrize(
    ("asked", "begin", "end"),
    [("bytes=0-9", 0, 10), ("bytes=150-", 150, 200), ("bytes=190-999", 190, 200), ("bytes=5-5", 5, 6)],
)
def test_a_range_is_sent_and_named(place: str, asked: str, begin: int, end: int) -> None:
    assert answer(place, Range=asked) == (206, f"bytes {begin}-{end - 1}/200", DATA[begin:end])


@pytest.mark.parametrize(
    "asked", ["bytes=9-5", "bytes=-", "bytes=a-b", "bytes=0-1,5-6", "rows=0-1", "", "9" * 5000]
)
def test_what_is_no_single_range_gets_it_whole(place: str, asked: str) -> None:
    assert answer(place, Range=asked) == (200, None, DATA)


@pytest.mark.parametrize("asked", ["bytes=200-", "bytes=500-600", "bytes=999999999999999999-"])
def test_a_range_beyond_the_end_is_told(place: str, asked: str) -> None:
    assert answer(place, Range=asked) == (416, "bytes */200", b"")


def test_a_number_too_long_to_be_one_ends_no_thread(place: str) -> None:
    assert answer(place, Range=f"bytes={'9' * 5000}-")[0] == 200


def test_a_range_of_another_version_gets_it_whole(place: str) -> None:
    assert answer(place, **{"Range": "bytes=5-9", "If-Range": '"another"'}) == (200, None, DATA)
