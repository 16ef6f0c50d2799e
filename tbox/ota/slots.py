"""Slots as files or block devices, and the boot loaders that start them, side by side. Decides nothing.

A slot is a name, an image path and a manifest path. What is in a slot never says whether it may boot.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Protocol

import msgspec
from msgspec import Meta

from tbox.clock import BOOT_ID_FILE, boot_id
from tbox.durable import RangedStorage
from tbox.errors import TboxError
from tbox.ota.boot import SLOT_NAMES, SlotName, other_slot
from tbox.ota.model import IMAGE_BYTES_MAX, MANIFEST_BYTES_MAX, ImageKind

READ_BLOCK_BYTES = 1 << 20


class SlotError(TboxError):
    """A slot could not be read or written."""

    exit_code = 1


class Slots:
    """Both slots of one device. Files `slot_a.img` … in `directory`, or the block devices named."""

    def __init__(
        self,
        storage: RangedStorage,
        directory: str,
        devices: Mapping[SlotName, str] | None = None,
        slot_bytes_max: int = IMAGE_BYTES_MAX,
    ) -> None:
        self.storage = storage
        self.directory = directory
        self._devices = devices or {}
        self._slot_bytes_max = slot_bytes_max

    def image_path(self, name: SlotName) -> str:
        return self._devices.get(name) or f"{self.directory}/slot_{name}.img"

    def manifest_path(self, name: SlotName) -> str:
        return f"{self.directory}/slot_{name}.manifest"

    def capacity_bytes(self, name: SlotName) -> int:
        device = self._devices.get(name)
        return min(self._slot_bytes_max, self.storage.size(device)) if device else self._slot_bytes_max

    def write(self, name: SlotName, offset: int, data: bytes) -> None:
        """Write image bytes; not durable before `sync`. Raises OSError."""
        self.storage.write(self.image_path(name), data, offset, create=name not in self._devices)

    def sync(self, name: SlotName) -> None:
        """Make the image durable, its name too."""
        self.storage.fsync(self.image_path(name))
        if name not in self._devices:
            self.storage.fsync_dir(self.directory)

    def read_at(self, name: SlotName, offset: int, length: int) -> bytes:
        return self.storage.read_at(self.image_path(name), offset, length)

    def blocks(self, name: SlotName, length: int) -> Iterator[bytes]:
        """Yield the first `length` image bytes as they stand on the medium; ends early where they end."""
        path, offset = self.image_path(name), 0
        while offset < length:
            block = self.storage.read_medium(path, offset, min(READ_BLOCK_BYTES, length - offset))
            if not block:
                return
            yield block
            offset += len(block)

    def digest(
        self, name: SlotName, length: int, progress: Callable[[int], None] = lambda done_bytes: None
    ) -> str:
        """Return the SHA-256 of the first `length` image bytes on the medium, "" when they are not there.

        progress is told the bytes read so far.
        """
        sha256, found = hashlib.sha256(), 0
        try:
            for block in self.blocks(name, length):
                sha256.update(block)
                found += len(block)
                progress(found)
        except FileNotFoundError:
            return ""
        return sha256.hexdigest() if found == length else ""

    def put_manifest(self, name: SlotName, manifest: bytes) -> str:
        """Store the signed metadata of a slot that does not boot, durable; return its SHA-256."""
        assert len(manifest) <= MANIFEST_BYTES_MAX
        path = self.manifest_path(name)
        self.storage.write(path, manifest)
        self.storage.truncate(path, len(manifest))
        self.storage.fsync(path)
        self.storage.fsync_dir(self.directory)
        digest = hashlib.sha256(manifest).hexdigest()
        if self.manifest(name, digest) is None:
            raise SlotError("read back other bytes than were written", where=path, mend="replace the medium")
        return digest

    def manifest(self, name: SlotName, sha256: str) -> bytes | None:
        """Return the stored manifest if its digest is the one given."""
        path = self.manifest_path(name)
        try:
            if self.storage.size(path) > MANIFEST_BYTES_MAX:
                return None
            manifest = self.storage.read_medium(path, 0, MANIFEST_BYTES_MAX)
        except FileNotFoundError:
            return None
        return manifest if hashlib.sha256(manifest).hexdigest() == sha256 else None


# --- boot loaders --------------------------------------------------------------------------------------


class BootBackend(Protocol):
    """What differs between boot loaders; the order of an update does not.

    counts_tries: the boot loader reads boot control and counts tries itself. kind: of images it starts.
    """

    name: str
    kind: ImageKind
    counts_tries: bool

    def running(self) -> SlotName:
        """Return the slot this process was started from. Raises SlotError when nobody says."""
        ...

    def boot_id(self) -> str:
        """Return a name for this boot of the machine, "" where each start of the agent is a boot."""
        ...

    def arm(self, name: SlotName, *, trial: bool) -> list[str]:
        """Let the next start be slot `name`: once, if on trial, so that any later one is the other slot's.

        Returns the command that restarts, [] for `tbox boot` itself.
        """
        ...

    def settle(self, name: SlotName) -> None:
        """Make slot `name` what starts from now on, durable."""
        ...


class SimBackend:
    """`tbox boot`: boot control alone says what starts next, so nothing is left to do here."""

    name = "sim"
    kind: ImageKind = "app"
    counts_tries = True

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def running(self) -> SlotName:
        for name in SLOT_NAMES:
            if self._environment.get("TBOX_SLOT") == name:
                return name
        raise SlotError(
            "TBOX_SLOT is not set, so nobody says which slot runs", mend="start the agent by `tbox boot`"
        )

    def boot_id(self) -> str:
        return ""

    def arm(self, name: SlotName, *, trial: bool) -> list[str]:
        return []

    def settle(self, name: SlotName) -> None:
        return None


AbsolutePath = Annotated[str, Meta(pattern="^/[^\0]+$", max_length=4000)]


class PiSlot(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One slot of a Pi: the block device an image is written to, and its number as a boot partition."""

    device: AbsolutePath
    partition: Annotated[int, Meta(ge=1, le=4)]  # what MBR has room for


class TrybootSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A Pi that starts `raw` images by its own firmware.

    directory: boot control, manifests and the first root, on a disk that neither slot holds.
    boot_directory: where the partition with autoboot.txt is mounted. The last two are the kernel's.
    """

    directory: AbsolutePath
    boot_directory: AbsolutePath
    a: PiSlot
    b: PiSlot
    firmware_node: AbsolutePath = "/proc/device-tree/chosen/bootloader/partition"
    boot_id_file: AbsolutePath = BOOT_ID_FILE

    def slot(self, name: SlotName) -> PiSlot:
        return self.a if name == "a" else self.b


class RpiTrybootBackend:
    """Raspberry Pi's own A/B: `autoboot.txt` names the default boot partition and the one to try once.

    The firmware's one-shot tryboot flag starts the [tryboot] partition; any later reset starts the [all]
    one again. Source: Raspberry Pi documentation, autoboot.txt.
    """

    name = "rpi-tryboot"
    kind: ImageKind = "raw"
    counts_tries = False

    def __init__(self, storage: RangedStorage, settings: TrybootSettings) -> None:
        self._storage, self._settings = storage, settings

    def running(self) -> SlotName:
        node = self._settings.firmware_node
        try:
            (number,) = struct.unpack(">I", self._storage.read(node))
        except (OSError, struct.error):
            raise SlotError(
                "the firmware does not say which partition was booted",
                where=node,
                mend="update the Pi's boot loader",
            ) from None
        for name in SLOT_NAMES:
            if self._settings.slot(name).partition == number:
                return name
        raise SlotError(f"partition {number} is no slot", where=node, mend="mend [ota.rpi_tryboot]")

    def boot_id(self) -> str:
        return boot_id(self._storage, self._settings.boot_id_file)

    def arm(self, name: SlotName, *, trial: bool) -> list[str]:
        self.settle(other_slot(name) if trial else name)
        return ["reboot", "0 tryboot"] if trial else ["reboot"]

    def settle(self, name: SlotName) -> None:
        path = f"{self._settings.boot_directory}/autoboot.txt"
        default, once = self._settings.slot(name), self._settings.slot(other_slot(name))
        text = (
            f"[all]\ntryboot_a_b=1\nboot_partition={default.partition}\n"
            f"[tryboot]\nboot_partition={once.partition}\n"
        ).encode()
        if self._storage.exists(path) and self._storage.read(path) == text:
            return
        fresh = f"{path}.new"
        self._storage.write(fresh, text)
        self._storage.truncate(fresh, len(text))
        self._storage.fsync(fresh)
        self._storage.rename(fresh, path)
        self._storage.fsync_dir(self._settings.boot_directory)
