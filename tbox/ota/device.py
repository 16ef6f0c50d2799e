"""Carries out what the engine decides: the thread `ota` of the agent. It decides nothing by itself.

Metadata, downloads and the vehicle's values come through `Ports`; what happened leaves through `emit`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
import structlog
import zstandard

from tbox.durable import RangedStorage, TwoCopies
from tbox.errors import TboxError
from tbox.model import Draft, Level, Now
from tbox.ota import engine as e
from tbox.ota import patch
from tbox.ota.boot import BootControl, SlotName
from tbox.ota.bootctl import BootCtl
from tbox.ota.install import WRITE_BLOCK_BYTES, Job, install
from tbox.ota.model import Delta, Full, Offer, VerifiedTarget
from tbox.ota.policy import Vitals
from tbox.ota.slots import BootBackend, Slots
from tbox.ota.trial import Proof

log = structlog.get_logger()

READ_BLOCK_BYTES = 64 * 1024
BASE_WINDOW_BYTES = 256 * 1024
ZSTD_WINDOW_BYTES_MAX = 8 << 20  # what the publisher's level needs; a frame that wants more is refused
JOURNAL_STEM = "journal"


class Held(Exception):
    """A download stopped because a condition of the policy came up. Raised by `Ports.fetch`."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class Ports(Protocol):
    """All that the engine's thread needs of the rest of the agent."""

    def check(self) -> Offer:
        """Refresh and verify the metadata; return what it offers this device. Raises TboxError, OSError."""
        ...

    def fetch(self, target: VerifiedTarget, artifact: Full | Delta, hold: Callable[[], str]) -> str:
        """Download one file, resuming, verify its digest, return its path.

        Asks `hold` between blocks and raises Held when it answers. Raises TboxError, OSError.
        """
        ...

    def vitals(self) -> Vitals: ...
    def proof(self) -> Proof: ...
    def emit(self, draft: Draft) -> None: ...
    def restart(self, command: Sequence[str]) -> None:
        """Have the agent stop in order; then `command` runs, or `tbox boot` chooses when it is empty."""
        ...


def load_journal(copies: TwoCopies) -> e.Journal:
    """Return the journal; an empty one when there is none or it is damaged. Only counts are lost with it."""
    newest = copies.read()
    try:
        return msgspec.msgpack.decode(newest[1], type=e.Journal) if newest else e.Journal()
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError):
        log.warning("ota_journal_damaged")
        return e.Journal()


# --- where an image's bytes come from ------------------------------------------------------------------


def windowed(read_at: patch.ReadAt, window_bytes: int = BASE_WINDOW_BYTES) -> patch.ReadAt:
    """Return a reader that fetches a window at a time: patches read small pieces, mostly forwards."""
    begin, window = 0, b""

    def read(offset: int, length: int) -> bytes:
        nonlocal begin, window
        if not begin <= offset <= offset + length <= begin + len(window):
            begin, window = offset, read_at(offset, max(length, window_bytes))
        return window[offset - begin : offset - begin + length]

    return read


def file_blocks(storage: RangedStorage, path: str) -> Iterator[bytes]:
    offset = 0
    while block := storage.read_at(path, offset, READ_BLOCK_BYTES):
        offset += len(block)
        yield block


class _FileReader:
    """What zstandard wants to read from."""

    def __init__(self, storage: RangedStorage, path: str) -> None:
        self._storage, self._path, self._offset = storage, path, 0

    def read(self, size: int = -1) -> bytes:
        block = self._storage.read_at(self._path, self._offset, size if size > 0 else READ_BLOCK_BYTES)
        self._offset += len(block)
        return block


def full_chunks(storage: RangedStorage, path: str, full: Full) -> Iterator[bytes]:
    """Yield the image out of a downloaded file; never more than a block at a time, whatever it expands to."""
    if full.codec == "identity":
        yield from file_blocks(storage, path)
        return
    unpack = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES_MAX)
    try:
        with unpack.stream_reader(_FileReader(storage, path)) as reader:  # type: ignore[arg-type]
            while block := reader.read(READ_BLOCK_BYTES):
                yield block
    except zstandard.ZstdError as error:
        raise TboxError(f"cannot unpack: {error}", where=full.name) from None


def image_chunks(
    slots: Slots,
    control: BootControl,
    running: SlotName,
    target: VerifiedTarget,
    artifact: Full | Delta,
    path: str,
) -> Iterator[bytes]:
    """Yield the new image from the downloaded file, and for a delta from the running slot."""
    storage = slots.storage
    if isinstance(artifact, Full):
        return full_chunks(storage, path, artifact)
    return patch.apply(
        windowed(lambda offset, length: slots.read_at(running, offset, length)),
        control.slot(running).length,
        lambda offset, length: storage.read_at(path, offset, length),
        storage.size(path),
        target.length,
    )


# --- the shell -----------------------------------------------------------------------------------------


@dataclass
class Progress:
    """How far the file or image under way has come, for people."""

    what: str = ""
    done_bytes: int = 0
    total_bytes: int = 0


class OtaDevice:
    """The engine, its boot control and its journal. Used by one thread; `beat` advances with every turn."""

    def __init__(
        self,
        engine: e.Engine,
        ctl: BootCtl,
        slots: Slots,
        journal: TwoCopies,
        backend: BootBackend,
        ports: Ports,
        tries: int = 3,
        block_bytes: int = WRITE_BLOCK_BYTES,
        installer: Callable[[Job], BootControl] = install,
    ) -> None:
        self.engine = engine
        self.progress = Progress()
        self.beat = 0
        self.restarting = False
        self._ctl, self._slots, self._journal = ctl, slots, journal
        self._backend, self._ports = backend, ports
        self._tries, self._block_bytes, self._installer = tries, block_bytes, installer
        self._running = backend.running()
        self._fetched_path = ""

    def turn(self, now: Now, inputs: Sequence[e.Input] = ()) -> int:
        """Let the engine decide and carry it out, until it has nothing more to do now.

        Returns the monotonic ns of the next turn. Raises OSError when boot control cannot be written, and
        Refused for a command that does not fit.
        """
        pending = list(inputs)
        while True:
            self.beat += 1
            step = self.engine.step(now, self._ports.vitals(), self._ports.proof(), pending)
            pending = []
            for draft in step.drafts:
                self._ports.emit(draft)
            for action in step.actions:
                result = self._perform(action)
                if result is not None:
                    pending.append(result)
            if not pending:
                return step.next_wake_ns

    def _perform(self, action: e.Action) -> e.Input | None:
        match action:
            case e.Check():
                return self._check()
            case e.Fetch():
                return self._fetch(action)
            case e.Install():
                return self._install(action)
            case e.Commit():
                self._ctl.commit(action.control)
            case e.Save():
                self._journal.write(msgspec.msgpack.encode(action.journal))
            case e.Settle():
                self._backend.settle(action.slot)
            case e.Restart():
                self.restarting = True
                self._ports.restart(self._backend.arm(action.slot, trial=action.trial))
        return None

    def _check(self) -> e.CheckDone:
        try:
            return e.CheckDone(self._ports.check())
        except (TboxError, OSError) as error:
            return e.CheckDone(None, str(error))

    def _fetch(self, action: e.Fetch) -> e.FetchDone:
        try:
            self._fetched_path = self._ports.fetch(
                action.target,
                action.artifact,
                lambda: self.engine.hold_download(self._ports.vitals()),
            )
        except Held as held:
            return e.FetchDone(held=held.reason)
        except (TboxError, OSError) as error:
            return e.FetchDone(str(error))
        return e.FetchDone()

    def _install(self, action: e.Install) -> e.InstallDone:
        self.progress = Progress("install", 0, action.target.length)
        try:
            control = self._ctl.read()
            chunks = image_chunks(
                self._slots, control, self._running, action.target, action.artifact, self._fetched_path
            )
            job = Job(
                self._ctl,
                self._slots,
                action.slot,
                action.target,
                action.manifest,
                chunks,
                self._tries,
                self._block_bytes,
                self._written,
            )
            return e.InstallDone(self._installer(job))
        except (TboxError, OSError) as error:
            log.warning("ota_install_failed", error=str(error))
            return e.InstallDone(self._ctl.read(), str(error))

    def _written(self, done_bytes: int) -> None:
        self.beat += 1
        self.progress.done_bytes = done_bytes


def broken(error: Exception, now: Now) -> Draft:
    """Return the alarm of a device whose boot control cannot be written: it runs on, without updates."""
    body = {"event": "broken", "state": "broken", "reason": f"boot control cannot be written: {error}"}
    return Draft("ota", Level.ALARM, now.mono_ns, body)
