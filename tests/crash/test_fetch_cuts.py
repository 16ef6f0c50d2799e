"""The power is cut at every write of a download: what is resumed is what came, and it arrives exactly."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tbox.ota import fetch as f
from tbox.ota.serve import running
from tests.crash.flash import Flash, Image, every_cut

DATA = random.Random(8).randbytes(3 * f.BLOCK_BYTES + 777)
SHA256 = hashlib.sha256(DATA).hexdigest()
OTHER = {f"/dl/{'0' * 64}.download": b"of the release before"}
SETTINGS = f.FetchSettings(checkpoint_bytes=f.BLOCK_BYTES, retries_max=0)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    top = tmp_path_factory.mktemp("repository")
    (top / "targets").mkdir()
    (Path(top) / "targets" / "file").write_bytes(DATA)
    with running(top) as base:
        yield f"{base}/targets/file"


def fetched(image: Image, url: str) -> tuple[Flash, int]:
    """Download to the end from this state; return the medium and how much of it was resumed."""
    flash, told = Flash(image), list[int]()
    downloads = f.Downloads(f.Http(SETTINGS), flash, "/dl")
    path = downloads.fetch(url, len(DATA), SHA256, progress=lambda here, _: told.append(here))
    assert flash.read(path) == DATA
    return flash, told[0]


def states(start: Image, url: str) -> Iterator[Image]:
    seen = set()
    for _, image in every_cut(start, fetched(start, url)[0].log):
        key = tuple(sorted(image.items()))
        if key not in seen:
            seen.add(key)
            yield image


def test_a_download_cut_anywhere_resumes_from_what_is_there_and_arrives(url: str) -> None:
    resumed = {fetched(image, url)[1] for image in states(OTHER, url)}
    assert {0, len(DATA)} < resumed, "nothing was resumed half way"


@pytest.mark.slow
def test_a_resumed_download_may_be_cut_again(url: str) -> None:
    for number, image in enumerate(states(OTHER, url)):
        if number % 9 == 0:
            for again in states(image, url):
                fetched(again, url)


def test_a_whole_download_is_not_fetched_again_and_writes_nothing(url: str) -> None:
    flash, _ = fetched(OTHER, url)
    again, resumed = fetched({path: bytes(data) for path, data in flash.files.items()}, url)
    assert resumed == len(DATA) and again.log == []


def test_resuming_on_the_size_alone_would_be_caught(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def believe(job: Any, reached: f.Reached) -> bool:
        """Take the bytes for those that were written down, as long as there are so many."""
        if not job._storage.exists(job._path) or job._storage.size(job._path) < reached.offset:
            return False
        job._hash = hashlib.sha256(job._storage.read_at(job._path, 0, reached.offset))
        return True

    def say_first(job: Any) -> None:
        """Write down how far it came before that is durable."""
        sync, job._storage.fsync = job._storage.fsync, lambda path: None
        save(job)
        job._storage.fsync = sync

    save = f._Job._save
    monkeypatch.setattr(f._Job, "_rehash", believe)
    monkeypatch.setattr(f._Job, "_save", say_first)
    with pytest.raises(f.ServerRefused, match="what came is not the signed file"):
        for image in states(OTHER, url):
            fetched(image, url)
