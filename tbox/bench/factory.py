"""Signed releases of this very agent, as a publisher makes them, and what a thief would publish. For benches.

Images are built from the package that runs; a version differs from another by what is added to its files.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from tuf.api.metadata import Metadata, MetaFile, Snapshot, Timestamp

import tbox
from tbox.durable import OsStorage
from tbox.model import NS_PER_S, Now, TimeQuality
from tbox.ota import image, publish
from tbox.ota.bootctl import BootCtl
from tbox.ota.keys import make_key, read_signer
from tbox.ota.model import VerifiedTarget
from tbox.ota.publish import KeyChange, Publisher
from tbox.ota.serve import running
from tbox.ota.slots import Slots
from tbox.ota.source import SourceSettings, UpdateSource
from tbox.ota.supervisor import restore
from tbox.ota.trust import verify_slot_manifest

ENTRY = "tbox.cli.main:main"
HARDWARE_ID = "tbox-sim"
KEYS, THRESHOLD = 5, 3
ROOT_NAME = "root.json"
# Crashes a second after its start, as often as it is started.
CRASHES = {
    "agent.py": """

_supervise = Agent.supervise


def _fail_soon(agent: Agent) -> bool:
    if agent.clock.mono_ns() - agent._started_ns > NS_PER_S:
        raise RuntimeError("a bug that only this release has")
    return _supervise(agent)


Agent.supervise = _fail_soon
"""
}


class Factory:
    """A publisher in `directory` with five keys for root and for targets, three of which must sign."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.publisher = Publisher(directory / "repo", datetime.now(UTC))
        (directory / "keys").mkdir(parents=True)
        self.publisher.create()
        offline = {
            role: [make_key(self._key(f"{role}-{n}")) for n in range(KEYS)] for role in ("root", "targets")
        }
        online = make_key(self._key("online"))
        changes = [KeyChange(role, keys, (), THRESHOLD) for role, keys in offline.items()]
        changes += [KeyChange(role, [online]) for role in ("snapshot", "timestamp")]
        (root,) = self.publisher.rotate(changes)
        self._sign(root, "root", THRESHOLD)

    @property
    def repository(self) -> Path:
        return self.publisher.directory

    @property
    def first_root(self) -> bytes:
        return (self.publisher.metadata / "1.root.json").read_bytes()

    def _key(self, name: str) -> Path:
        return self.directory / "keys" / f"{name}.pem"

    def _sign(self, staged: Path, role: str, signatures: int) -> None:
        for n in range(signatures):  # one person at a time
            publish.sign(staged, [read_signer(self._key(f"{role}-{n}"))])

    def image(self, version: str, added: Mapping[str, str] | None = None) -> Path:
        """Build the image of this package under another version, with text added to some of its files."""
        tree = self.directory / f"tree-{version}"
        shutil.copytree(
            Path(tbox.__file__).parent, tree / "tbox", ignore=shutil.ignore_patterns("__pycache__")
        )
        (tree / "tbox" / "__init__.py").write_text(
            f'"""The T-Box, as release {version}."""\n\n__version__ = "{version}"\n'
        )
        for name, text in (added or {}).items():
            with (tree / "tbox" / name).open("a") as file:
                file.write(text)
        path = self.directory / f"{version}.img"
        header = image.ImageHeader(name="tbox", version=version, entry=ENTRY)
        with path.open("wb") as file:
            file.writelines(image.build(tree, header))
        shutil.rmtree(tree)
        return path

    def stage(
        self,
        path: Path,
        counter: int,
        *,
        signatures: int = THRESHOLD,
        delist: Sequence[str] = (),
        edition: str = "",
        bases: int = publish.DELTA_BASES,
    ) -> VerifiedTarget:
        """Stage a release that may be downloaded at any hour, with so many signatures."""
        version = path.stem
        name = f"app/{version}{edition}.img.zst"
        draft = msgspec.convert(
            {
                "name": name, "version": version, "kind": "app", "length": 0, "sha256": "0" * 64,
                "security_counter": counter, "hardware_ids": (HARDWARE_ID,), "critical": True,
                "full": {"name": name, "length": 0, "sha256": "0" * 64}, "rxswin": f"tbox {version}",
            },
            VerifiedTarget,
        )  # fmt: skip
        release, staged = self.publisher.add_release(path, draft, bases=bases, delist=delist)
        self._sign(staged, "targets", signatures)
        return release

    def publish(self) -> None:
        """Make what is staged public, as a publisher does. Raises Refused when signatures are missing."""
        self.publisher.publish([read_signer(self._key("online"))])

    def publish_by_theft(self) -> None:
        """Make the staged targets public as a thief would who has the online key and too few others."""
        metadata, online = self.publisher.metadata, read_signer(self._key("online"))
        staged = self.publisher.staged / "targets.json"
        raw = staged.read_bytes()
        version = Metadata.from_bytes(raw).signed.version
        timestamp = Metadata[Timestamp].from_file(str(metadata / "timestamp.json"))
        before = timestamp.signed.snapshot_meta.version
        snapshot = Metadata[Snapshot].from_file(str(metadata / f"{before}.snapshot.json"))
        snapshot.signed.meta["targets.json"] = MetaFile.from_data(version, raw, ["sha256"])
        snapshot.signed.version += 1
        snapshot.sign(online)
        timestamp.signed.snapshot_meta = MetaFile.from_data(before + 1, snapshot.to_bytes(), ["sha256"])
        timestamp.signed.version += 1
        timestamp.sign(online)
        staged.rename(metadata / f"{version}.targets.json")
        (metadata / f"{before + 1}.snapshot.json").write_bytes(snapshot.to_bytes())
        (metadata / "timestamp.json").write_bytes(timestamp.to_bytes())

    def provision(self, slots_directory: Path, path: Path) -> None:
        """Bring the published release into a new device's slot a, and the trusted root beside it."""
        slots_directory.mkdir()
        (slots_directory / ROOT_NAME).write_bytes(self.first_root)
        storage = OsStorage()
        with running(self.repository) as base:
            settings = SourceSettings(metadata_url=f"{base}/metadata")
            source = UpdateSource(
                settings, self.first_root, storage, str(self.directory / "provision"), HARDWARE_ID
            )
            wall_ns = int(datetime.now(UTC).timestamp()) * NS_PER_S
            offer = source.check(Now(0, wall_ns, TimeQuality.NTP))
        restore(
            BootCtl(storage, str(slots_directory)),
            Slots(storage, str(slots_directory)),
            lambda manifest: verify_slot_manifest(manifest, self.first_root),
            str(path),
            offer.manifest,
        )
