"""Slots as files or block devices, and the boot loaders that start them, side by side. Decides nothing.

A slot is a name, an image path and a manifest path. What is in a slot never says whether it may boot.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping
from typing import Protocol

from tbox.durable import RangedStorage
from tbox.errors import TboxError
from tbox.ota.boot import SLOT_NAMES, SlotName, other_slot
from tbox.ota.model import IMAGE_BYTES_MAX, MANIFEST_BYTES_MAX

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

    def digest(self, name: SlotName, length: int) -> str:
        """Return the SHA-256 of the first `length` image bytes on the medium, "" when they are not there."""
        sha256, found = hashlib.sha256(), 0
        try:
            for block in self.blocks(name, length):
                sha256.update(block)
                found += len(block)
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
    """What differs between boot loaders; the order of an update does not."""

    name: str

    def running(self) -> SlotName:
        """Return the slot this process was started from. Raises SlotError when nobody says."""
        ...

    def arm(self, name: SlotName) -> list[str]:
        """Let the next start try slot `name`; return the command that restarts, [] for `tbox boot` itself."""
        ...

    def settle(self, name: SlotName) -> None:
        """Make slot `name` what starts from now on, durable."""
        ...


class SimBackend:
    """`tbox boot`: boot control alone says what starts next, so nothing is left to do here."""

    name = "sim"

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def running(self) -> SlotName:
        for name in SLOT_NAMES:
            if self._environment.get("TBOX_SLOT") == name:
                return name
        raise SlotError(
            "TBOX_SLOT is not set, so nobody says which slot runs", mend="start the agent by `tbox boot`"
        )

    def arm(self, name: SlotName) -> list[str]:
        return []

    def settle(self, name: SlotName) -> None:
        return None


class RpiTrybootBackend:
    """Raspberry Pi's own A/B: `autoboot.txt` names the default boot partition and the one to try once.

    The firmware's one-shot tryboot flag starts the [tryboot] partition; any later reset starts the [all]
    one again. partitions: slot -> boot partition number. Source: Raspberry Pi documentation, autoboot.txt.
    """

    name = "rpi-tryboot"
    FIRMWARE_NODE = "/proc/device-tree/chosen/bootloader/partition"

    def __init__(
        self,
        storage: RangedStorage,
        boot_directory: str,
        partitions: Mapping[SlotName, int],
        firmware_node: str = FIRMWARE_NODE,
    ) -> None:
        self._storage = storage
        self._directory = boot_directory
        self._partitions = partitions
        self._firmware_node = firmware_node

    def running(self) -> SlotName:
        try:
            (number,) = struct.unpack(">I", self._storage.read(self._firmware_node))
        except (OSError, struct.error):
            raise SlotError(
                "the firmware does not say which partition was booted",
                where=self._firmware_node,
                mend="update the Pi's boot loader",
            ) from None
        for name, partition in self._partitions.items():
            if partition == number:
                return name
        raise SlotError(f"partition {number} is no slot", where=self._firmware_node, mend="mend [ota] slots")

    def arm(self, name: SlotName) -> list[str]:
        self._write_autoboot(default=other_slot(name))
        return ["reboot", "0 tryboot"]

    def settle(self, name: SlotName) -> None:
        self._write_autoboot(default=name)

    def _write_autoboot(self, default: SlotName) -> None:
        path = f"{self._directory}/autoboot.txt"
        text = (
            f"[all]\ntryboot_a_b=1\nboot_partition={self._partitions[default]}\n"
            f"[tryboot]\nboot_partition={self._partitions[other_slot(default)]}\n"
        ).encode()
        if self._storage.exists(path) and self._storage.read(path) == text:
            return
        fresh = f"{path}.new"
        self._storage.write(fresh, text)
        self._storage.truncate(fresh, len(text))
        self._storage.fsync(fresh)
        self._storage.rename(fresh, path)
        self._storage.fsync_dir(self._directory)
