"""A device's files: made, used on trial and opened again by whichever release is on the path. No assertions.

`python device.py make|trial|open DIRECTORY` runs with one release's `tbox`, and asks of it only what every
release since the first can do. `make`: what a device holds while a new image is on trial. `trial`: all that
an image on trial does to these files, until it is given up. `open`: what the image before it finds, as JSON.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from tbox import config
from tbox.clock import next_start
from tbox.durable import OsStorage, TwoCopies
from tbox.gap import FrameGaps
from tbox.ledger import Ledger
from tbox.model import NS_PER_S, Draft, Level, Now, TimeQuality
from tbox.ota import boot, engine, supervisor
from tbox.ota.audit import KEY_NAME, AuditLog, export, open_key, verify_export
from tbox.ota.bootctl import BootCtl
from tbox.ota.device import JOURNAL_STEM, load_journal
from tbox.ota.fetch import Downloads, FetchError, FetchSettings, Http, Reached
from tbox.ota.install import Job, install
from tbox.ota.policy import OtaSettings, Vitals
from tbox.ota.slots import Slots
from tbox.ota.source import SourceSettings, UpdateSource
from tbox.ota.trial import Proof
from tbox.ota.trust import TrustClient, verify_slot_manifest
from tbox.record.codec import Minter, decode_payload
from tbox.spool.starts import highest_start_seen
from tbox.spool.store import Spool, SpoolSettings

CONFIG = """\
[vehicle]
id = "car"
[device]
state_directory = "state"
[[bus]]
interface = "virtual"
channel = "can0"
dbc = ["bms.dbc"]
[uplink]
host = "127.0.0.1"
[ota]
metadata_url = "http://127.0.0.1:1/metadata"
soc_percent_min = 30
[ota.window]
begin_minute = 1320
end_minute = 360
[spool]
quota_bytes = 1048576
ballast = false
"""
UNKNOWN = Proof(
    covered=False, bus_alive=False, decoding=False, spool_writable=False, acked=False, ledger_clean=True
)
PATIENCE = FetchSettings(retries_max=0, retry_s=0.01, retry_s_max=0.01)


class Device:
    """The places of one device."""

    def __init__(self, top: Path) -> None:
        self.top, self.firmware, self.state, self.ota = top, top / "fw", top / "state", top / "state" / "ota"
        self.storage = OsStorage()
        self.ctl = BootCtl(self.storage, str(self.firmware))
        self.slots = Slots(self.storage, str(self.firmware))
        self.journal = TwoCopies(self.storage, str(self.ota), JOURNAL_STEM)

    @property
    def root(self) -> bytes:
        return (self.firmware / "root.json").read_bytes()

    @property
    def made_at(self) -> Now:
        return Now(NS_PER_S, int((self.top / "made_at").read_text()) * NS_PER_S, TimeQuality.NTP)

    def verify(self) -> Any:
        return partial(verify_slot_manifest, root=self.root)

    def trust(self) -> TrustClient:
        return TrustClient(
            self.root, self.storage, str(self.ota / "metadata"), str(self.ota / "floors"), lambda *_: None
        )

    def audit(self) -> AuditLog:
        key = open_key(self.storage, str(self.ota / KEY_NAME))
        return AuditLog(self.storage, str(self.ota), key, self.made_at, 1)

    def downloads(self) -> Downloads:
        return Downloads(Http(PATIENCE), self.storage, str(self.ota / "download"))

    def spool(self, start: int, *, migrate: bool) -> tuple[Spool, Minter]:
        minter = Minter(start, "car", guard=nullcontext())
        settings = SpoolSettings(quota_bytes=1 << 20, ballast=False)
        spool = Spool.open(
            str(self.state / "spool"), settings, start=start, mint=lambda draft: minter.mint(draft, Now(0)),
            now=Now(0), ledger=Ledger(), migrate=migrate,
        )  # fmt: skip
        return spool, minter

    def start(self, *, migrate: bool, records: int) -> dict[str, Any]:
        """One start of the agent as far as its files go; return what it found."""
        seen = highest_start_seen(str(self.state / "spool"))
        number = next_start(self.storage, str(self.state), seen=seen)
        gaps = FrameGaps(self.storage, str(self.state), number)
        now = Now((10 + number) * NS_PER_S, self.made_at.wall_ns, TimeQuality.NTP)
        spans = {"can0": (now.mono_ns, now.mono_ns)}
        told = gaps.tell(spans, now)
        gaps.note(spans, now, final=True)
        spool, minter = self.spool(number, migrate=migrate)
        before = spool.previous
        found = spool.offer(now, 1000)
        spool.requeue()
        drafts = [Draft("event", Level.INFO, n, {"event": "test", "n": n}) for n in range(records)]
        spool.append([minter.mint(draft, now) for draft in drafts])
        spool.tick(now)
        spool.close(now, clean=True, ledger_totals={})
        return {
            "start": number,
            "before": None if before is None else [before.start, before.clean],
            "gap": [body["since"] for body in told],
            "records": len(found),
            "read": [decode_payload(record.payload)["body"].get("n") for record in found],
        }


# --- made once, by the release itself ----------------------------------------------------------------------


def make(top: Path) -> None:
    from tbox.ota import image, publish
    from tbox.ota.keys import make_key, read_signer
    from tbox.ota.model import VerifiedTarget
    from tbox.ota.serve import running

    device, made_s = Device(top), int(time.time())
    for path in (device.firmware, device.ota, top / "keys", top / "tree"):
        path.mkdir(parents=True)
    (top / "made_at").write_text(f"{made_s}\n")
    (top / "tbox.toml").write_text(CONFIG)
    publisher = publish.Publisher(top / "repository", datetime.fromtimestamp(made_s, UTC))
    publisher.create()
    keys = {
        role: [make_key(top / "keys" / f"{role}-{n}.pem") for n in range(5)] for role in ("root", "targets")
    }
    online = make_key(top / "keys" / "online.pem")
    changes = [publish.KeyChange(role, keys[role], (), 3) for role in keys]
    changes += [publish.KeyChange(role, [online]) for role in ("snapshot", "timestamp", "rollout")]
    staged = publisher.rotate(changes)
    for counter in (1, 2):
        (top / "tree" / "app.py").write_text(f"VERSION = {counter}\n")
        header = image.ImageHeader(name="app", version=f"{counter}.0", entry="app:main")
        (top / f"{counter}.img").write_bytes(b"".join(image.build(top / "tree", header)))
        name = f"app/{counter}.0.img.zst"
        draft = msgspec.convert(
            {
                "name": name, "version": f"{counter}.0", "kind": "app", "length": 0, "sha256": "0" * 64,
                "security_counter": counter, "hardware_ids": ["tbox-sim"], "critical": True,
                "full": {"name": name, "length": 0, "sha256": "0" * 64}, "rxswin": f"rx {counter}",
            },
            VerifiedTarget,
        )  # fmt: skip
        staged.append(publisher.add_release(top / f"{counter}.img", draft, bases=0)[1])
        for path in dict.fromkeys(staged):
            publish.sign(path, [read_signer(top / "keys" / f"{path.stem}-{n}.pem") for n in range(3)])
        publisher.publish([read_signer(top / "keys" / "online.pem")])
        staged = []
        (device.firmware / "root.json").write_bytes(publisher.metadata.joinpath("1.root.json").read_bytes())
        with running(publisher.directory) as base:
            settings = SourceSettings(metadata_url=f"{base}/metadata")
            source = UpdateSource(settings, device.root, device.storage, str(device.ota), "tbox-sim")
            offer = source.check(device.made_at)
        assert offer.target is not None
        _bring_in(device, counter, offer.manifest)
    (device.ota / "cohort.key").write_bytes(random.randbytes(32))
    audit = device.audit()
    for number in range(4):
        audit.append(device.made_at, "check", {"event": "check", "number": number}, "rx 1")
    _begin_download(device)
    device.start(migrate=True, records=8)
    for name in ("keys", "tree", "repository", "1.img", "2.img"):
        path = top / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _bring_in(device: Device, counter: int, manifest: bytes) -> None:
    """The first release at the factory; the second as an update that is now in its first try."""
    path = str(device.top / f"{counter}.img")
    if counter == 1:
        supervisor.restore(device.ctl, device.slots, device.verify(), path, manifest)
        return
    target = device.verify()(manifest)
    install(Job(device.ctl, device.slots, "b", target, manifest, [Path(path).read_bytes()]))
    failed = boot.FailedImage(sha256="f" * 64, version="1.5", reason="crashed")
    control = boot.count_try(boot.activate(device.ctl.read(), "b"), "b")
    device.ctl.commit(msgspec.structs.replace(control, failed=(failed,)))
    attempts = (engine.Attempts(sha256=target.sha256, count=1, full_only=True),)
    journal = engine.Journal(attempts=attempts, approved=(target.sha256,), switched_to=target.sha256)
    device.journal.write(msgspec.msgpack.encode(journal))


def _begin_download(device: Device) -> None:
    """Leave a download that broke off half way."""
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    class Breaks(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "4000")
            self.end_headers()
            self.wfile.write(b"x" * 1000)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = HTTPServer(("127.0.0.1", 0), Breaks)
    Thread(target=server.handle_request).start()
    with suppress(FetchError):
        device.downloads().fetch(f"http://127.0.0.1:{server.server_address[1]}/f", 4000, "d" * 64)
    server.server_close()


# --- an image on trial, and the one before it --------------------------------------------------------------


def trial(top: Path) -> None:
    """Write to every file as an image on trial does, and be given up."""
    device = Device(top)
    device.start(migrate=False, records=5)
    identity = engine.Device("car", b"key", "b", lambda requires: "", boot_id="this boot")
    core = engine.Engine(OtaSettings(), identity, device.ctl.read(), load_journal(device.journal))
    audit = device.audit()
    for second, given_up in ((1, []), (2, [engine.RollBackByHand()])):
        step = core.step(Now(second * NS_PER_S), Vitals(), UNKNOWN, given_up)
        for draft in step.drafts:
            audit.append(device.made_at, str(draft.body["event"]), draft.body, "rx 2")
        for action in step.actions:
            if isinstance(action, engine.Commit):
                device.ctl.commit(action.control)
            elif isinstance(action, engine.Save):
                device.journal.write(msgspec.msgpack.encode(action.journal))
    client = device.trust()
    client._store.save(client.trusted)


def open_all(top: Path) -> dict[str, Any]:
    """Open every file as the image in slot a does at its start; return what it finds."""
    device = Device(top)
    control, journal = device.ctl.read(), load_journal(device.journal)
    chosen = supervisor.choose(device.ctl, device.slots, device.verify(), {})
    state = engine.resume_state(control, "a", journal)
    trusted = device.trust().trusted
    trusted.load_cached()
    audit = device.audit()
    report = verify_export(b"".join(export(device.storage, str(device.ota))))
    download = TwoCopies(device.storage, str(device.ota / "download"), "reached").read()
    settings = config.load(str(top / "tbox.toml"))
    return {
        "boots": None if isinstance(chosen, boot.LastResort) else [chosen[0], chosen[1].version],
        "state": state.value,
        "failed": [[image.version, image.reason] for image in control.failed],
        "floor": control.floor,
        "attempts": [[attempt.count, attempt.full_only] for attempt in journal.attempts],
        "approved": len(journal.approved),
        "trusted": sorted(trusted.kept),
        "floors": {role: floor.version for role, floor in trusted.floors.roles.items()},
        "timestamp": None if trusted.timestamp is None else trusted.timestamp.version,
        "audit": [report.whole, audit.recovered, report.entries],
        "cohort_key": len((device.ota / "cohort.key").read_bytes()),
        "download": None if download is None else msgspec.msgpack.decode(download[1], type=Reached).offset,
        "soc_percent_min": settings.ota.soc_percent_min,
        "start": device.start(migrate=True, records=1),
    }


def main(arguments: list[str]) -> None:
    what, top = arguments[0], Path(arguments[1])
    if what == "make":
        make(top)
    elif what == "trial":
        trial(top)
    else:
        print(json.dumps(open_all(top)))


if __name__ == "__main__":
    main(sys.argv[1:])
