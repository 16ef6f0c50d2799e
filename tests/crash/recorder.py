"""Records every write, truncate, sync and delete that SQLite and the durable files make in one directory.

The operations pass through to the real files, so the program under test runs as it does on a device.
"""

# ruff: noqa: N802 - the methods are named by apsw

from __future__ import annotations

import itertools
import os
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import apsw

from tbox.durable import OsStorage
from tests.crash.disk import Image, Op

_serial = itertools.count()

Fault = Callable[[str, str], None]  # (operation, path): may raise instead of letting the operation through


class Recorder:
    """The log of one directory, the connection and the storage that write to it."""

    def __init__(self, directory: str, fault: Fault | None = None) -> None:
        self.directory = directory
        self.ops: list[Op] = []
        self.fault = fault
        self._vfs = _RecordingVfs(f"recording-{os.getpid()}-{next(_serial)}", self)
        self.storage = _RecordingStorage(self)

    def start_image(self) -> Image:
        """Return the files as they are: the durable state that a log starts from."""
        return {path.name: path.read_bytes() for path in Path(self.directory).iterdir() if path.is_file()}

    def connect(self, path: str, **_options: Any) -> RecordingConnection:
        return RecordingConnection(path, self._vfs.vfs_name)

    def name(self, path: str) -> str:
        return path.rpartition("/")[2]

    def note(self, what: str, path: str, offset: int = 0, data: bytes = b"", to: str = "") -> None:
        self.ops.append(Op(what, self.name(path), offset, bytes(data), self.name(to)))

    def check(self, what: str, path: str) -> None:
        if self.fault is not None:
            self.fault(what, path)


class RecordingConnection:
    """apsw behind the part of sqlite3's interface that the spool uses; its errors are sqlite3's."""

    def __init__(self, path: str, vfs: str) -> None:
        try:
            self._db = apsw.Connection(path, vfs=vfs)
        except apsw.Error as error:
            raise _as_sqlite3(error) from error

    @property
    def in_transaction(self) -> bool:
        return bool(self._db.in_transaction)

    def execute(self, sql: str, parameters: Sequence[Any] = (), /) -> RecordingCursor:
        try:
            return RecordingCursor(self._db.execute(sql, tuple(parameters)))
        except apsw.Error as error:
            raise _as_sqlite3(error) from error

    def close(self) -> None:
        try:
            self._db.close()
        except apsw.Error as error:
            raise _as_sqlite3(error) from error


class RecordingCursor:
    def __init__(self, cursor: Any) -> None:
        self._cursor = cursor

    def fetchone(self) -> Any:
        try:
            return self._cursor.fetchone()
        except apsw.Error as error:
            raise _as_sqlite3(error) from error

    def fetchall(self) -> list[Any]:
        try:
            return list(self._cursor.fetchall())
        except apsw.Error as error:
            raise _as_sqlite3(error) from error

    def close(self) -> None:
        self._cursor.close(True)


def _as_sqlite3(error: apsw.Error) -> sqlite3.Error:
    mine = sqlite3.OperationalError(str(error))
    mine.sqlite_errorcode = int(getattr(error, "extendedresult", 0) or getattr(error, "result", 1) or 1)
    return mine


class _RecordingVfs(apsw.VFS):
    def __init__(self, name: str, recorder: Recorder) -> None:
        super().__init__(name, "")
        self.vfs_name = name
        self._recorder = recorder

    def xOpen(self, name: Any, flags: list[int]) -> Any:
        return _RecordingFile(name, flags, self._recorder)

    def xDelete(self, filename: str, syncdir: bool) -> None:
        self._recorder.check("unlink", filename)
        existed = Path(filename).exists()
        super().xDelete(filename, syncdir)
        if existed:
            self._recorder.note("unlink", filename)
        if syncdir:
            self._recorder.note("syncdir", "")


class _RecordingFile(apsw.VFSFile):
    def __init__(self, name: Any, flags: list[int], recorder: Recorder) -> None:
        self._path = name.filename() if isinstance(name, apsw.URIFilename) else str(name)
        self._recorder = recorder
        recorder.check("open", self._path)
        existed = Path(self._path).exists()
        super().__init__("", name, flags)
        created = not existed and Path(self._path).exists()
        if created:
            recorder.note("create", self._path)
        # SQLite's unix VFS syncs the directory at the first sync of a journal or log that it created.
        journal = flags[0] & (apsw.SQLITE_OPEN_MAIN_JOURNAL | apsw.SQLITE_OPEN_WAL)
        self._sync_dir = bool(created and journal)

    def xRead(self, amount: int, offset: int) -> bytes:
        self._recorder.check("read", self._path)
        return bytes(super().xRead(amount, offset))

    def xWrite(self, data: bytes, offset: int) -> None:
        self._recorder.check("write", self._path)
        super().xWrite(data, offset)
        self._recorder.note("write", self._path, offset, data)

    def xTruncate(self, newsize: int) -> None:
        self._recorder.check("truncate", self._path)
        super().xTruncate(newsize)
        self._recorder.note("truncate", self._path, newsize)

    def xSync(self, flags: int) -> None:
        self._recorder.check("sync", self._path)
        super().xSync(flags)
        self._recorder.note("sync", self._path)
        if self._sync_dir:
            self._recorder.note("syncdir", "")
            self._sync_dir = False


class _RecordingStorage(OsStorage):
    """The durable files' door to the disk, recorded."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def read(self, path: str) -> bytes:
        self._recorder.check("read", path)
        return super().read(path)

    def write(self, path: str, data: bytes, offset: int = 0, *, create: bool = True) -> None:
        self._recorder.check("write", path)
        existed = self.exists(path)
        super().write(path, data, offset, create=create)
        if not existed:
            self._recorder.note("create", path)
        self._recorder.note("write", path, offset, data)

    def truncate(self, path: str, size: int) -> None:
        super().truncate(path, size)
        self._recorder.note("truncate", path, size)

    def fsync(self, path: str) -> None:
        self._recorder.check("sync", path)
        super().fsync(path)
        self._recorder.note("sync", path)

    def fsync_dir(self, path: str) -> None:
        self._recorder.check("syncdir", path)
        super().fsync(path)
        self._recorder.note("syncdir", path)

    def rename(self, src: str, dst: str) -> None:
        self._recorder.check("rename", src)
        super().rename(src, dst)
        self._recorder.note("rename", src, to=dst)

    def unlink(self, path: str) -> None:
        super().unlink(path)
        self._recorder.note("unlink", path)
