"""A model of what a power cut may leave of files: replays a log of operations and draws images from it.

A sync makes a file's pending writes durable; a directory sync makes pending names durable. A cut keeps any
subset of what is pending: writes whole, absent or torn at 512 bytes; names made, renamed or removed or not.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

SECTOR_BYTES = 512
# Per operation at most this many variants that drop or keep one single pending write.
SINGLES_MAX = 6


class Op(NamedTuple):
    """One operation on the recorded directory. what: create write truncate sync syncdir unlink rename."""

    what: str
    name: str
    offset: int = 0
    data: bytes = b""
    to: str = ""


Image = dict[str, bytes]


@dataclass
class _Inode:
    durable: bytearray = field(default_factory=bytearray)
    pending: list[tuple[str, int, bytes]] = field(default_factory=list)

    def settle(self) -> None:
        for what, offset, data in self.pending:
            _apply(self.durable, what, offset, data)
        self.pending.clear()


def _apply(content: bytearray, what: str, offset: int, data: bytes) -> None:
    if what == "truncate":
        if offset < len(content):
            del content[offset:]
        else:
            content.extend(bytes(offset - len(content)))
        return
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


def _tear(content: bytearray, offset: int, data: bytes, rng: random.Random) -> None:
    """Apply a write so that only some of the sectors it covers reached the medium."""
    end = offset + len(data)
    at = offset
    while at < end:
        stop = min(end, (at // SECTOR_BYTES + 1) * SECTOR_BYTES)
        if rng.random() < 0.5:
            _apply(content, "write", at, data[at - offset : stop - offset])
        at = stop
    if len(content) < end and rng.random() < 0.5:
        content.extend(bytes(end - len(content)))  # the size reached the medium, the data did not


class Disk:
    """The medium as of some operation: what is durable, and what is pending on top of it."""

    def __init__(self, image: Image | None = None) -> None:
        self._inodes: list[_Inode] = []
        self._names: dict[str, int] = {}  # as the running program sees them
        self._durable_names: dict[str, int] = {}
        self._pending_names: list[tuple[str, str, str, int]] = []
        for name, content in (image or {}).items():
            self._inodes.append(_Inode(bytearray(content)))
            self._names[name] = self._durable_names[name] = len(self._inodes) - 1

    def apply(self, op: Op) -> None:
        if op.what == "create":
            self._inodes.append(_Inode())
            self._names[op.name] = len(self._inodes) - 1
            self._pending_names.append(("link", op.name, "", self._names[op.name]))
        elif op.what in ("write", "truncate"):
            self._inodes[self._names[op.name]].pending.append((op.what, op.offset, op.data))
        elif op.what == "sync":
            if op.name in self._names:
                self._inodes[self._names[op.name]].settle()
        elif op.what == "syncdir":
            _rename_all(self._durable_names, self._pending_names)
            self._pending_names.clear()
        elif op.what == "unlink":
            del self._names[op.name]
            self._pending_names.append(("unlink", op.name, "", 0))
        else:
            assert op.what == "rename", op
            self._names[op.to] = self._names.pop(op.name)
            self._pending_names.append(("rename", op.name, op.to, 0))

    def images(self, rng: random.Random, variants: int) -> Iterator[Image]:
        """Yield what a cut right now may leave: the two extremes, single losses, and random tears."""
        yield self._image(lambda _i, _n: "lost", lambda _i: False)
        yield self._image(lambda _i, _n: "kept", lambda _i: True)
        pending = sum(len(inode.pending) for inode in self._inodes)
        names = len(self._pending_names)
        if not pending and not names:
            return
        if names:
            yield self._image(lambda _i, _n: "kept", lambda _i: False)
            yield self._image(lambda _i, _n: "lost", lambda _i: True)
        singles = (
            range(pending) if pending <= SINGLES_MAX else sorted(rng.sample(range(pending), SINGLES_MAX))
        )
        for single in singles if pending > 1 else ():
            yield self._image(lambda _i, n, s=single: "lost" if n == s else "kept", lambda _i: True)
            yield self._image(lambda _i, n, s=single: "kept" if n == s else "lost", lambda _i: True)
        for _ in range(variants):
            odds = rng.choice(((1, 1, 2), (4, 1, 1), (1, 4, 1)))
            yield self._image(
                lambda _i, _n, odds=odds: rng.choices(("kept", "lost", "torn"), odds)[0],
                lambda _i: rng.random() < 0.5,
                rng,
            )

    def _image(self, fate, keeps_name, rng: random.Random | None = None) -> Image:  # type: ignore[no-untyped-def]
        """Build one image. fate(inode, n) of the n-th pending write: kept, lost or torn."""
        contents: list[bytes] = []
        n = 0
        for number, inode in enumerate(self._inodes):
            if not inode.pending:
                contents.append(inode.durable)  # type: ignore[arg-type]
                continue
            content = bytearray(inode.durable)
            for what, offset, data in inode.pending:
                outcome = fate(number, n)
                n += 1
                if outcome == "kept" or (outcome == "torn" and what == "truncate"):
                    _apply(content, what, offset, data)
                elif outcome == "torn":
                    assert rng is not None
                    _tear(content, offset, data, rng)
            contents.append(content)  # type: ignore[arg-type]
        names = dict(self._durable_names)
        _rename_all(names, [op for i, op in enumerate(self._pending_names) if keeps_name(i)])
        return {name: bytes(contents[number]) for name, number in names.items()}


def _rename_all(names: dict[str, int], ops: list[tuple[str, str, str, int]]) -> None:
    for what, name, to, number in ops:
        if what == "link":
            names[name] = number
        elif what == "unlink":
            names.pop(name, None)
        elif name in names:
            names[to] = names.pop(name)


class ImageStorage:
    """The small files of an image, held in memory; the database's files stand in a real directory as well."""

    def __init__(self, image: Image, directory: str) -> None:
        self._files = dict(image)
        self._strip = len(directory) + 1

    def _name(self, path: str) -> str:
        return path[self._strip :]

    def read(self, path: str) -> bytes:
        try:
            return self._files[self._name(path)]
        except KeyError:
            raise FileNotFoundError(path) from None

    def write(self, path: str, data: bytes, offset: int = 0, *, create: bool = True) -> None:
        content = bytearray(self._files.get(self._name(path), b""))
        _apply(content, "write", offset, data)
        self._files[self._name(path)] = bytes(content)

    def truncate(self, path: str, size: int) -> None:
        self._files[self._name(path)] = self.read(path)[:size]

    def fsync(self, path: str) -> None: ...

    def fsync_dir(self, path: str) -> None: ...

    def rename(self, src: str, dst: str) -> None:
        self._files[self._name(dst)] = self._files.pop(self._name(src))
        if Path(src).exists():
            Path(src).rename(dst)

    def unlink(self, path: str) -> None:
        del self._files[self._name(path)]
        Path(path).unlink(missing_ok=True)

    def mkdir(self, path: str) -> None: ...

    def exists(self, path: str) -> bool:
        return len(path) < self._strip or self._name(path) in self._files

    def listdir(self, path: str) -> list[str]:
        return sorted(self._files)
