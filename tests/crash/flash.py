"""A flash in memory that logs every operation, so that the power can be cut after any of them. Never a disk.

The model: a write is pending until its file is synced, a name (creation, rename, unlink) until its directory
is. A cut leaves what was durable plus any subset of what was pending, in order; the last write may be torn.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterator
from typing import NamedTuple

Image = dict[str, bytes]  # what stands on the medium: path -> content

PENDING_EXHAUSTIVE_MAX = 6  # up to 64 subsets; beyond that prefixes and single losses


class Op(NamedTuple):
    kind: str  # write, truncate, fsync, fsync_dir, create, rename, unlink
    path: str
    offset: int = 0
    data: bytes = b""
    dst: str = ""


class PowerCut(BaseException):
    """The power is gone; nothing in the program may catch this."""


def directory_of(path: str) -> str:
    return path.rpartition("/")[0]


class Flash:
    """Implements tbox.durable.RangedStorage on an image; `log` is what happened to it since.

    cut_after: raise PowerCut once that many operations were logged. A path in `failing` raises EIO.
    """

    def __init__(self, image: Image | None = None, cut_after: int | None = None) -> None:
        self.start = dict(image or {})
        self.files = {path: bytearray(data) for path, data in self.start.items()}
        self.log: list[Op] = []
        self.cut_after = cut_after
        self.failing: set[str] = set()

    def _record(self, op: Op) -> None:
        if self.cut_after is not None and len(self.log) >= self.cut_after:
            raise PowerCut
        if op.path in self.failing:
            raise OSError(errno.EIO, "input/output error", op.path)
        self.log.append(op)

    def _file(self, path: str) -> bytearray:
        if path in self.failing:
            raise OSError(errno.EIO, "input/output error", path)
        if path not in self.files:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        return self.files[path]

    def read(self, path: str) -> bytes:
        return bytes(self._file(path))

    def write(self, path: str, data: bytes, offset: int = 0, *, create: bool = True) -> None:
        if path not in self.files:
            if not create:
                raise FileNotFoundError(errno.ENOENT, "no such file", path)
            self._record(Op("create", path))
            self.files[path] = bytearray()
        self._record(Op("write", path, offset, bytes(data)))
        _put(self.files[path], offset, data)

    def truncate(self, path: str, size: int) -> None:
        file = self._file(path)
        if len(file) == size:
            return
        self._record(Op("truncate", path, size))
        _resize(file, size)

    def fsync(self, path: str) -> None:
        self._file(path)
        self._record(Op("fsync", path))

    def fsync_dir(self, path: str) -> None:
        self._record(Op("fsync_dir", path))

    def rename(self, src: str, dst: str) -> None:
        self._file(src)
        self._record(Op("rename", src, dst=dst))
        self.files[dst] = self.files.pop(src)

    def unlink(self, path: str) -> None:
        self._file(path)
        self._record(Op("unlink", path))
        del self.files[path]

    def mkdir(self, path: str) -> None:
        return None

    def exists(self, path: str) -> bool:
        return path in self.files

    def listdir(self, path: str) -> list[str]:
        return sorted(name.rpartition("/")[2] for name in self.files if directory_of(name) == path)

    def size(self, path: str) -> int:
        return len(self._file(path))

    def read_at(self, path: str, offset: int, length: int) -> bytes:
        return bytes(self._file(path)[offset : offset + length])

    def read_medium(self, path: str, offset: int, length: int) -> bytes:
        return self.read_at(path, offset, length)


def _put(file: bytearray, offset: int, data: bytes) -> None:
    if len(file) < offset:
        file.extend(bytes(offset - len(file)))
    file[offset : offset + len(data)] = data


def _resize(file: bytearray, size: int) -> None:
    if len(file) > size:
        del file[size:]
    else:
        file.extend(bytes(size - len(file)))


class _Medium:
    """Files by identity and names by directory, so that a file and its name become durable apart."""

    def __init__(self, image: Image) -> None:
        self.names = {path: number for number, path in enumerate(image)}
        self.data = {number: bytearray(image[path]) for path, number in self.names.items()}

    def image(self) -> Image:
        return {path: bytes(self.data[number]) for path, number in self.names.items()}

    def copy(self) -> _Medium:
        twin = _Medium({})
        twin.names = dict(self.names)
        twin.data = {number: bytearray(data) for number, data in self.data.items()}
        return twin


class Pending(NamedTuple):
    """An operation that a cut may undo. number: of the file it is about."""

    op: Op
    number: int


def _apply(medium: _Medium, item: Pending) -> None:
    op, number = item
    if op.kind == "write":
        _put(medium.data[number], op.offset, op.data)
    elif op.kind == "truncate":
        _resize(medium.data[number], op.offset)
    elif op.kind == "create":
        medium.names[op.path] = number
    elif op.kind == "unlink":
        medium.names.pop(op.path, None)
    else:
        medium.names.pop(op.path, None)
        medium.names[op.dst] = number


def _replay(start: Image, log: list[Op]) -> tuple[_Medium, list[Pending]]:
    """Return what is durable after these operations, and what is pending, in order."""
    durable = _Medium(start)
    live = dict(durable.names)
    pending: list[Pending] = []
    fresh = itertools.count(len(live))
    for op in log:
        if op.kind == "create":
            live[op.path] = next(fresh)
            durable.data[live[op.path]] = bytearray()
            pending.append(Pending(op, live[op.path]))
        elif op.kind in ("write", "truncate"):
            pending.append(Pending(op, live[op.path]))
        elif op.kind == "rename":
            live[op.dst] = live.pop(op.path)
            pending.append(Pending(op, live[op.dst]))
        elif op.kind == "unlink":
            pending.append(Pending(op, live.pop(op.path)))
        else:
            pending = _settle(durable, pending, op, live)
    return durable, pending


def _settle(durable: _Medium, pending: list[Pending], op: Op, live: dict[str, int]) -> list[Pending]:
    left = []
    for item in pending:
        content = item.op.kind in ("write", "truncate")
        if op.kind == "fsync":
            done = content and item.number == live[op.path]
        else:
            done = not content and directory_of(item.op.path) == op.path
        if done:
            _apply(durable, item)
        else:
            left.append(item)
    return left


def _subsets(count: int) -> Iterator[tuple[bool, ...]]:
    """Which pending operations reached the medium: all subsets, or for many of them the telling ones."""
    if count <= PENDING_EXHAUSTIVE_MAX:
        yield from itertools.product((False, True), repeat=count)
        return
    for k in range(count + 1):
        yield tuple(i < k for i in range(count))
        yield tuple(i >= k for i in range(count))
    for k in range(count):
        yield tuple(i != k for i in range(count))
        yield tuple(i == k for i in range(count))


def _torn(op: Op) -> Iterator[Op]:
    """The ways a write can arrive in part: its beginning, its end, or stale bytes in between."""
    n = len(op.data)
    for part in sorted({1, n // 2, n - 1}):
        if 0 < part < n:
            yield op._replace(data=op.data[:part])
    if n > 1:
        yield op._replace(offset=op.offset + n // 2, data=op.data[n // 2 :])


def states_after(start: Image, log: list[Op]) -> Iterator[Image]:
    """Yield every state the medium can be in when the power goes after the last operation of `log`."""
    durable, pending = _replay(start, log)
    seen: set[tuple[tuple[str, bytes], ...]] = set()
    last_write = max((i for i, item in enumerate(pending) if item.op.kind == "write"), default=None)
    for kept in _subsets(len(pending)):
        variants: list[list[Pending]] = [[item for item, keep in zip(pending, kept, strict=True) if keep]]
        if last_write is not None and kept[last_write]:
            at = sum(kept[:last_write])
            for torn in _torn(pending[last_write].op):
                whole = variants[0]
                variants.append([*whole[:at], Pending(torn, pending[last_write].number), *whole[at + 1 :]])
        for items in variants:
            medium = durable.copy()
            for item in items:
                _apply(medium, item)
            image = medium.image()
            key = tuple(sorted(image.items()))
            if key not in seen:
                seen.add(key)
                yield image


def every_cut(start: Image, log: list[Op]) -> Iterator[tuple[int, Image]]:
    """Yield (number of operations done, state) for a cut after each prefix of the log."""
    for done in range(len(log) + 1):
        for image in states_after(start, log[:done]):
            yield done, image
