"""A TUF repository under a test's control, in memory and over real HTTP. It signs whatever it is told to."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    SuccinctRoles,
    TargetFile,
    Targets,
    Timestamp,
)

START = datetime(2026, 3, 1, 12, tzinfo=UTC)
ROLES = ("root", "timestamp", "snapshot", "targets")


@functools.cache
def pool(kind: str, number: int) -> CryptoSigner:
    """Return key `number` of a kind; the same one every time, since making RSA keys is slow."""
    make = {
        "ed25519": CryptoSigner.generate_ed25519,
        "ecdsa": CryptoSigner.generate_ecdsa,
        "rsa": CryptoSigner.generate_rsa,
        "rsa-pkcs1v15": functools.partial(CryptoSigner.generate_rsa, scheme="rsa-pkcs1v15-sha256"),
    }
    return make[kind]()


class Repository:
    """Edit `root`, `timestamp`, `snapshot`, `targets` or `roles[name]`, then `publish` what changed."""

    def __init__(self, now: datetime = START, *, first_key: int = 0) -> None:
        self.now = now
        self.expires = now + timedelta(days=30)
        self._next_key = first_key  # repositories that begin apart share no key
        self.with_hashes = False
        self.prefix_targets = True
        self.signers: dict[str, list[CryptoSigner]] = {role: [] for role in ROLES}
        self.root = Root(expires=self.expires)
        self.timestamp = Timestamp(expires=self.expires)
        self.snapshot = Snapshot(expires=self.expires)
        self.roles: dict[str, Targets] = {"targets": Targets(expires=self.expires)}
        self.files: dict[str, bytes] = {}
        self.served: dict[str, list[bytes]] = {}  # role -> its versions, as served
        self.asked: list[tuple[str, int | None]] = []
        self.asked_targets: list[str] = []
        self.hostile: dict[str, Answer] = {}  # metadata path -> how the server answers instead
        for role in ROLES:
            self.add_key(role)
        self.publish("root", "targets", "snapshot", "timestamp")

    @property
    def targets(self) -> Targets:
        return self.roles["targets"]

    # --- keys ------------------------------------------------------------------------------------

    def key(self, kind: str = "ed25519") -> CryptoSigner:
        """Return a key not used by this repository before; its public part is the caller's own."""
        signer = pool(kind, self._next_key)
        self._next_key += 1
        return CryptoSigner(signer._private_key, deepcopy(signer.public_key))

    def add_key(self, role: str, signer: CryptoSigner | None = None) -> CryptoSigner:
        signer = signer or self.key()
        self.root.add_key(signer.public_key, role)
        self.signers[role].append(signer)
        return signer

    def rotate(self, role: str) -> None:
        """Replace all keys of a top-level role."""
        for keyid in list(self.root.roles[role].keyids):
            self.root.revoke_key(keyid, role)
        self.signers[role].clear()
        for _ in range(self.root.roles[role].threshold):
            self.add_key(role)

    # --- content ---------------------------------------------------------------------------------

    def add_target(self, path: str, data: bytes, role: str = "targets", **custom: object) -> TargetFile:
        file = TargetFile.from_data(path, data, ["sha256"])
        if custom:
            file.unrecognized_fields["custom"] = custom
        self.roles[role].targets[path] = file
        self.files[path] = data
        return file

    def delegate(self, delegator: str, role: DelegatedRole, targets: Targets | None = None) -> CryptoSigner:
        above = self.roles[delegator]
        if above.delegations is None:
            above.delegations = Delegations({}, roles={})
        assert above.delegations.roles is not None
        above.delegations.roles[role.name] = role
        signer = self.key()
        above.add_key(signer.public_key, role.name)
        self.signers.setdefault(role.name, []).append(signer)
        self.roles.setdefault(role.name, targets or Targets(expires=self.expires))
        return signer

    def delegate_bins(self, delegator: str, bits: int, prefix: str) -> None:
        signer = self.key()
        bins = SuccinctRoles([], 1, bits, prefix)
        self.roles[delegator].delegations = Delegations({}, None, bins)
        self.roles[delegator].add_key(signer.public_key)
        for name in bins.get_roles():
            self.roles[name] = Targets(expires=self.expires)
            self.signers[name] = [signer]

    # --- publishing ------------------------------------------------------------------------------

    def signed(self, role: str) -> Root | Timestamp | Snapshot | Targets:
        if role in self.roles:
            return self.roles[role]
        top: dict[str, Root | Timestamp | Snapshot] = {
            "root": self.root,
            "timestamp": self.timestamp,
            "snapshot": self.snapshot,
        }
        return top[role]

    def sign(self, role: str) -> bytes:
        metadata: Metadata[Root | Timestamp | Snapshot | Targets] = Metadata(self.signed(role))  # type: ignore[type-var]
        for signer in self.signers[role]:
            metadata.sign(signer, append=True)
        return metadata.to_bytes()

    def publish(self, *roles: str, bump: bool = True) -> None:
        """Sign and serve these, in this order, each with the next version, named by what is above it."""
        for role in roles:
            signed = self.signed(role)
            if bump and role in self.served:
                signed.version += 1
            raw = self.sign(role)
            self.served.setdefault(role, []).append(raw)
            self.tell(role, raw)

    def tell(self, role: str, raw: bytes) -> None:
        """Name a file in the metadata above it, which is not published by this."""
        file = MetaFile(self.signed(role).version)
        if self.with_hashes:
            file = MetaFile.from_data(file.version, raw, ["sha256"])
        if role in self.roles:
            self.snapshot.meta[f"{role}.json"] = file
        elif role == "snapshot":
            self.timestamp.snapshot_meta = file

    def publish_all(self) -> None:
        self.publish(*self.roles, "snapshot", "timestamp")

    # --- serving ---------------------------------------------------------------------------------

    def fetch(self, path: str, length_max: int = 1 << 30) -> bytes | None:
        """Answer a request for a metadata file as a server would; a `metadata.Want` fits."""
        stem = path.removesuffix(".json")
        version, dot, role = stem.partition(".")
        if dot and version.isdigit() and (role == "root" or self.root.consistent_snapshot):
            self.asked.append((role, int(version)))
            versions = self.served.get(unquote(role), [])
            return versions[int(version) - 1] if 1 <= int(version) <= len(versions) else None
        self.asked.append((stem, None))
        versions = self.served.get(unquote(stem), [])
        return versions[-1] if versions else None

    def fetch_target(self, path: str) -> bytes | None:
        if self.root.consistent_snapshot and self.prefix_targets:
            directory, slash, name = path.rpartition("/")
            path = f"{directory}{slash}{name.partition('.')[2]}"
        self.asked_targets.append(path)
        return self.files.get(path)


Answer = Callable[[BaseHTTPRequestHandler], None]


class _Handler(BaseHTTPRequestHandler):
    repository: Repository

    def do_GET(self) -> None:
        kind, _, path = self.path.lstrip("/").partition("/")
        if kind == "metadata" and path in self.repository.hostile:
            self.repository.hostile[path](self)
            return
        data = (
            self.repository.fetch(path) if kind == "metadata" else self.repository.fetch_target(unquote(path))
        )
        if data is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@contextlib.contextmanager
def serving(repository: Repository) -> Iterator[str]:
    """Serve a repository on 127.0.0.1; yield its base URL, below which are metadata/ and targets/."""
    handler = type("Handler", (_Handler,), {"repository": repository})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
