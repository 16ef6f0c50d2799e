"""`tbox boot`: the boot loader of the simulator and supervisor on a Pi. It parses, calls and prints."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import click
import structlog

from tbox import log
from tbox.durable import OsStorage
from tbox.errors import Refused, TboxError
from tbox.ota import boot as table
from tbox.ota import supervisor
from tbox.ota.boot import BootControl, LastResort
from tbox.ota.bootctl import BootCtl
from tbox.ota.model import MANIFEST_BYTES_MAX, VerifyManifest
from tbox.ota.slots import Slots

ROOT_NAME = "root.json"  # the first trusted root, put beside the slots when the device is provisioned


def verifier(directory: Path) -> VerifyManifest:
    """Return the check of a slot's signed metadata against the root that stands beside the slots."""
    root = directory / ROOT_NAME
    try:
        embedded = root.read_bytes()
    except OSError as error:
        raise TboxError(
            f"no trusted root: {error.strerror}", where=str(root), mend="put the publisher's first root there"
        ) from None
    # Metadata libraries are slow to load; a missing root or a `--status` is answered before.
    from tbox.ota.trust import verify_slot_manifest

    return functools.partial(verify_slot_manifest, root=embedded)


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold the slots for this process; two boot loaders at once would start two agents."""
    with (directory / "boot.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Refused("another `tbox boot` holds these slots", where=str(directory)) from None
        yield


def control_status(control: BootControl) -> dict[str, object]:
    """Return boot control as plain values."""
    slots = {}
    for name in table.SLOT_NAMES:
        entry = control.slot(name)
        slots[name] = {
            "state": entry.state.value,
            "version": entry.version,
            "priority": entry.priority,
            "tries_left": entry.tries_left,
            "security_counter": entry.security_counter,
            "sha256": entry.sha256,
            "unfit": table.unfit(control, name),
        }
    failed = [{"version": f.version, "sha256": f.sha256, "reason": f.reason} for f in control.failed]
    return {
        "slots": slots,
        "floor": control.floor,
        "fallback_floor": control.fallback_floor,
        "failed": failed,
    }


def _default_run_directory() -> Path:
    return Path(os.environ.get("RUNTIME_DIRECTORY") or f"/dev/shm/tbox-boot-{os.getuid()}")


@click.command(context_settings={"ignore_unknown_options": True})
@click.option(
    "--dir", "directory", type=click.Path(path_type=Path), default=Path("firmware_slots"), show_default=True
)
@click.option(
    "--run-dir", type=click.Path(path_type=Path), help="Where the image is unpacked; a memory disk."
)
@click.option("--status", is_flag=True, help="Print boot control as JSON and start nothing.")
@click.option(
    "--recover",
    type=click.Path(path_type=Path),
    help="Bring this signed image into a slot that does not boot; also provisions a new device.",
)
@click.option(
    "--manifest", type=click.Path(path_type=Path), help="The signed metadata of the image to recover."
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def boot(
    directory: Path,
    run_dir: Path | None,
    status: bool,
    recover: Path | None,
    manifest: Path | None,
    arguments: tuple[str, ...],
) -> None:
    """Start the agent from the slot that boot control says, with ARGUMENTS for its `tbox` command.

    Ends with exit code 1, and says why per slot, when neither may boot.
    """
    if not directory.is_dir():
        raise TboxError("no such directory", where=str(directory), mend="name the slots with --dir")
    storage = OsStorage()
    ctl, slots = BootCtl(storage, str(directory)), Slots(storage, str(directory))
    if status:
        click.echo(json.dumps(control_status(ctl.read()), indent=2))
        return
    with _alone(directory):
        if recover is not None:
            _recover(ctl, slots, verifier(directory), recover, manifest)
            return
        log.set_up()
        run = supervisor.prepare_run_directory(run_dir or _default_run_directory())
        loader = supervisor.Supervisor(ctl, slots, verifier(directory), run, arguments)
        for sign in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sign, lambda *_: loader.stop())
        report(loader.run(), directory)


def report(end: LastResort | None, directory: Path) -> None:
    """Raise the last resort as the refusal it is, with the way out."""
    if end is not None:
        reasons = "; ".join(f"slot {name}: {why}" for name, why in end.reasons.items())
        raise Refused(
            f"last resort, nothing may boot: {reasons}",
            where=str(directory),
            mend=f"recover with `tbox boot --dir {directory} --recover IMAGE --manifest FILE`",
        )


def _recover(ctl: BootCtl, slots: Slots, verify: VerifyManifest, image: Path, manifest: Path | None) -> None:
    if manifest is None:
        raise click.UsageError("--recover needs --manifest")
    try:
        signed = manifest.read_bytes()
        image.stat()
    except OSError as error:
        raise TboxError(f"cannot be read: {error.strerror}", where=str(error.filename)) from None
    if len(signed) > MANIFEST_BYTES_MAX:
        raise Refused(f"longer than {MANIFEST_BYTES_MAX} bytes", where=str(manifest))
    slot, target = supervisor.restore(ctl, slots, verify, str(image), signed)
    structlog.get_logger().info("slot_recovered", slot=slot, version=target.version)
    click.echo(f"slot {slot} holds {target.version} and starts next")
