"""Writes an image into the slot that does not run, in the one order that survives a cut. Chooses no image.

The order is `STEPS`: unbootable first, then bytes, sync, read back from the medium, what an archive holds,
the signed metadata, tries. Making the slot active is a later decision of the engine (`boot.activate`), and
always the last write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tbox.errors import Refused
from tbox.ota import boot, image
from tbox.ota.boot import BootControl, SlotName
from tbox.ota.bootctl import BootCtl
from tbox.ota.model import VerifiedTarget
from tbox.ota.slots import Slots

WRITE_BLOCK_BYTES = 1 << 20
# No more is left to the last sync than a slow card takes in seconds: nobody can show life while that lasts.
UNSYNCED_BYTES_MAX = 32 << 20


class InstallError(Refused):
    """The image did not arrive in the slot as signed. The slot stays unbootable."""


def _ignore(_done_bytes: int) -> None:
    return None


@dataclass
class Job:
    """One installation. chunks: the image's bytes in order, of any sizes.

    progress is told the bytes written so far, then those read back so far, block by block, and may raise to
    stop; the slot then stays unbootable.
    """

    ctl: BootCtl
    slots: Slots
    name: SlotName
    target: VerifiedTarget
    manifest: bytes
    chunks: Iterable[bytes]
    tries: int = boot.TRIES
    block_bytes: int = WRITE_BLOCK_BYTES
    progress: Callable[[int], None] = _ignore
    manifest_sha256: str = ""


def mark_unbootable(job: Job) -> None:
    job.ctl.commit(boot.erase(job.ctl.read(), job.name, job.target))


def write_image(job: Job) -> None:
    written, synced, block = 0, 0, bytearray()
    for chunk in job.chunks:
        if written + len(block) + len(chunk) > job.target.length:
            raise InstallError(
                f"image is longer than the signed {job.target.length} bytes", where=job.target.name
            )
        block += chunk
        while len(block) >= job.block_bytes:
            job.slots.write(job.name, written, bytes(block[: job.block_bytes]))
            del block[: job.block_bytes]
            written += job.block_bytes
            job.progress(written)
            if written - synced >= UNSYNCED_BYTES_MAX:
                job.slots.sync(job.name)
                synced = written
    if block:
        job.slots.write(job.name, written, bytes(block))
        written += len(block)
        job.progress(written)
    if written != job.target.length:
        raise InstallError(
            f"image ends after {written} of the signed {job.target.length} bytes", where=job.target.name
        )


def sync_image(job: Job) -> None:
    job.slots.sync(job.name)


def read_back(job: Job) -> None:
    found = job.slots.digest(job.name, job.target.length, job.progress)
    if found != job.target.sha256:
        raise InstallError(
            "what stands on the medium is not the signed image",
            where=job.slots.image_path(job.name),
            mend="it is fetched again; if it happens twice, replace the medium",
        )


def check_archive(job: Job) -> None:
    """Refuse now what the boot loader would refuse to unpack: it is signed, and may be hostile still."""
    if job.target.kind == "app":
        image.check(lambda offset, length: job.slots.read_at(job.name, offset, length), job.target.length)


def store_manifest(job: Job) -> None:
    job.manifest_sha256 = job.slots.put_manifest(job.name, job.manifest)


def seal(job: Job) -> None:
    job.ctl.commit(boot.seal(job.ctl.read(), job.name, job.manifest_sha256, job.tries))


Step = Callable[[Job], None]
STEPS: tuple[Step, ...] = (
    mark_unbootable,
    write_image,
    sync_image,
    read_back,
    check_archive,
    store_manifest,
    seal,
)


def install(job: Job, steps: Sequence[Step] = STEPS) -> BootControl:
    """Bring the image into the slot and seal it; return boot control as it then stands.

    Raises InstallError, Refused (nothing to fall back on, too big), OSError; the slot is then unbootable
    and the running image untouched.
    """
    if job.target.length > job.slots.capacity_bytes(job.name):
        raise Refused(
            f"image of {job.target.length} bytes does not fit", where=job.slots.image_path(job.name)
        )
    for step in steps:
        step(job)
    return job.ctl.read()
