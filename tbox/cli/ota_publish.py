"""`tbox ota keys|rotate|sign|publish|serve|rollout|audit`: the publisher's half. Parses, calls and prints."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from tbox.durable import OsStorage
from tbox.errors import Refused, TboxError

if TYPE_CHECKING:
    from securesystemslib.signer import Key

    from tbox.ota.keys import Signer
    from tbox.ota.publish import Publisher

# The modules behind these commands are imported when one runs: the device's commands need none of them.

PASSWORD_VARIABLE = "TBOX_KEY_PASSWORD"
TOP_ROLES = ("root", "targets", "snapshot", "timestamp")
Command = Callable[..., Any]

repository = click.argument("repository", type=click.Path(path_type=Path))
KEY_HELP = "A private key file, or pkcs11:token=…;object=…?module-path=…&pin-source=…; repeatable."
key_places = click.option("--key", "keys", multiple=True, help=KEY_HELP)
key_places_needed = click.option("--key", "keys", multiple=True, required=True, help=KEY_HELP)


def _publisher(directory: Path) -> Publisher:
    from tbox.ota.publish import Publisher

    return Publisher(directory, datetime.fromtimestamp(time.time(), UTC))


def _signers(keys: Sequence[str]) -> list[Signer]:
    from tbox.ota.keys import open_signer

    password = os.environ.get(PASSWORD_VARIABLE, "").encode() or None
    return [open_signer(place, password) for place in keys]


def _standing(publisher: Publisher, role: str) -> bool:
    """Say how far a staged file is signed; True when it is enough."""
    found = publisher.standing(role)
    for standing in found:
        click.echo(f"{role}: {standing.signed} of the {standing.threshold} keys of {standing.whose}")
    return all(standing.enough for standing in found)


@click.command()
@click.argument("names", nargs=-1, required=True)
@click.option("--dir", "directory", type=click.Path(path_type=Path), default=Path("keys"), show_default=True)
@click.option("--kind", type=click.Choice(["ed25519", "rsa"]), default="ed25519", show_default=True)
@click.option("--token", help="Make none: write the .pub of the key at this pkcs11: URI, as the one NAME.")
def keys(names: tuple[str, ...], directory: Path, kind: Any, token: str | None) -> None:
    """Make a key pair for each of NAMES: NAME.pem stays with its owner, NAME.pub goes to the repository.

    With TBOX_KEY_PASSWORD set, the private keys are encrypted with it.
    """
    from tbox.ota.keys import make_key

    directory.mkdir(parents=True, exist_ok=True)
    if token is not None:
        _export_public(token, names, directory)
        return
    password = os.environ.get(PASSWORD_VARIABLE, "").encode() or None
    for name in names:
        public = make_key(directory / f"{name}.pem", kind, password)
        click.echo(f"{name}  {public.keyid}")


def _export_public(uri: str, names: tuple[str, ...], directory: Path) -> None:
    from tbox.ota.hsm import parse_uri, read_public
    from tbox.ota.keys import write_public

    if len(names) != 1:
        raise click.UsageError("a token's key gets one NAME")
    public = read_public(parse_uri(uri))
    write_public(directory / f"{names[0]}.pub", public)
    click.echo(f"{names[0]}  {public.keyid}")


@click.command()
@repository
@click.option("--root", multiple=True, type=click.Path(path_type=Path), help="Add a public key; repeatable.")
@click.option("--targets", multiple=True, type=click.Path(path_type=Path), help="As --root, for targets.")
@click.option("--online", multiple=True, type=click.Path(path_type=Path), help="For the keys at the server.")
@click.option("--revoke", multiple=True, help="Take this key id away from every role; repeatable.")
@click.option("--threshold", type=click.IntRange(1, 64), help="Signatures of root and targets; 3 at first.")
@click.option(
    "--weaker-than-3-of-5", "weaker", is_flag=True, help="Let fewer people sign root and targets: a toy's."
)
@click.option("--renew", multiple=True, type=click.Choice(["root", "targets"]), help="Before it expires.")
@key_places
def rotate(
    repository: Path,
    root: tuple[Path, ...],
    targets: tuple[Path, ...],
    online: tuple[Path, ...],
    revoke: tuple[str, ...],
    threshold: int | None,
    weaker: bool,
    renew: tuple[str, ...],
    keys: tuple[str, ...],
) -> None:
    """Stage a root with other keys, or the same for longer; the first one makes the repository.

    Root and targets take 3 of at least 5 keys. What is staged must be signed with `tbox ota sign` by enough
    of the old keys and of the new ones.
    """
    from tbox.ota.keys import read_public

    publisher = _publisher(repository)
    publisher.create()
    offline = {"root": root, "targets": targets}
    changes = _changes(publisher, offline, online, set(revoke), threshold, read_public)
    if not changes and not renew:
        raise click.UsageError("nothing changes: give keys to add, --revoke or --renew")
    staged = [*publisher.rotate(changes, weaker=weaker), *map(publisher.renew, renew)]
    for path in dict.fromkeys(staged):
        _sign_and_say(publisher, path, keys)


def _changes(
    publisher: Publisher,
    offline: dict[str, tuple[Path, ...]],
    online: tuple[Path, ...],
    revoke: set[str],
    threshold: int | None,
    read: Callable[[Path], Key],
) -> list[Any]:
    from tbox.ota.publish import KeyChange
    from tbox.ota.releases import ROLLOUT_ROLE

    found = []
    for role in (*TOP_ROLES, ROLLOUT_ROLE):
        add = [read(path) for path in offline.get(role, online)]
        gone = sorted(revoke & publisher.key_ids(role))
        new = threshold if role in offline else None
        if add or gone or new:
            found.append(KeyChange(role, add, gone, new))
    return found


def _sign_and_say(publisher: Publisher, path: Path, keys: Sequence[str]) -> None:
    from tbox.ota import publish

    if keys:
        publish.sign(path, _signers(keys))
    click.echo(f"staged {path}")
    _standing(publisher, path.stem)


@click.command()
@click.argument("staged", type=click.Path(path_type=Path))
@key_places_needed
def sign(staged: Path, keys: tuple[str, ...]) -> None:
    """Add a signature to a STAGED file; the file may be carried from one person to the next.

    A token's PIN comes from the file of pin-source, or from TBOX_PKCS11_PIN.
    """
    from tbox.ota import publish

    for line in publish.summary(staged):
        click.echo(line)
    publish.sign(staged, _signers(keys))
    if staged.parent.name == "staged":
        _standing(_publisher(staged.parent.parent), staged.stem)


def _release_options(command: Command) -> Command:
    for option in (
        click.option("--version", help="Of the release; read from an app image when not given."),
        click.option("--counter", type=click.IntRange(1), help="Security counter, above every one before."),
        click.option("--hardware", multiple=True, help="Hardware id it is for; repeatable."),
        click.option("--kind", type=click.Choice(["app", "raw"]), default="app", show_default=True),
        click.option("--name", help="Folder of the files; read from an app image when not given."),
        click.option(
            "--percent", type=click.FloatRange(0, 100), default=100.0, help="Never to more of them."
        ),
        click.option(
            "--everyone", is_flag=True, help="To all vehicles at once, without a rollout's cohorts."
        ),
        click.option("--deltas", type=click.IntRange(0, 16), default=3, show_default=True),
        click.option("--requires", multiple=True, help='What the device must carry, as "numpy>=2,<3".'),
        click.option("--notes", default="", help="What the user is told."),
        click.option("--rxswin", default="", help="Software identification number (UN R156)."),
        click.option("--fallback-min", type=click.IntRange(0), default=0, help="Least counter to go back to"),
        click.option("--window", help="Download only between these hours of the day, as 22:00-06:00."),
        click.option("--soc-min", type=click.IntRange(0, 100), help="Least charge to switch at, in %."),
        click.option("--consent", is_flag=True, help="The user must agree before the switch."),
        click.option("--critical", is_flag=True, help="May be downloaded outside the window."),
        click.option("--emergency", type=click.IntRange(1), help="Permit a downgrade up to this floor."),
        click.option("--reason", default="", help="Why, for --emergency."),
        click.option("--delist", multiple=True, help="Take this version off the list; repeatable."),
    ):
        command = option(command)
    return command


@click.command()
@repository
@click.argument("image", required=False, type=click.Path(path_type=Path))
@_release_options
@key_places
def publish(repository: Path, image: Path | None, keys: tuple[str, ...], **options: Any) -> None:
    """Stage IMAGE as a release; without one, make public what is staged and signed.

    Also run without IMAGE before the timestamp expires, which is after a week. --key: those at hand; making
    public takes the online key.
    """
    publisher = _publisher(repository)
    if image is not None:
        release, path = publisher.add_release(
            image, _draft(image, options), bases=options["deltas"], delist=options["delist"]
        )
        sizes = ", ".join(f"{delta.length:,} bytes from {delta.base_sha256[:12]}" for delta in release.deltas)
        click.echo(f"{release.version}: {release.full.length:,} bytes whole; deltas: {sizes or 'none'}")
        if not options["everyone"]:
            _begin_rollout(publisher, release.sha256)
        _sign_and_say(publisher, path, keys)
        return
    for role, version in publisher.publish(_signers(keys)).items():
        click.echo(f"published {role} version {version}")


def _begin_rollout(publisher: Publisher, sha256: str) -> None:
    """Let the release come to the first cohort only, where there is a role that can say so."""
    from tbox.ota.releases import ROLLOUT_ROLE

    progress = publisher.rollout(sha256, time.time())
    if publisher.key_ids(ROLLOUT_ROLE) and publisher.stage_notice(progress):
        percent = progress.basis_points / 100
        click.echo(f"it comes to {percent:g} % of the fleet; widen that with `tbox ota rollout`")


def _draft(image: Path, options: dict[str, Any]) -> Any:
    """Return the release as far as a person says it; what the image itself knows is taken from there."""
    from tbox.ota.image import read_header
    from tbox.ota.model import VerifiedTarget

    version, name = options["version"], options["name"]
    if options["kind"] == "app":
        with image.open("rb") as file:

            def read_at(offset: int, length: int) -> bytes:
                file.seek(offset)
                return file.read(length)

            header = read_header(read_at, image.stat().st_size)
        version, name = version or header.version, name or header.name
    if not version or not name or options["counter"] is None or not options["hardware"]:
        raise click.UsageError(
            "an image needs --counter, --hardware and, unless it says so, --version, --name"
        )
    emergency = options["emergency"]
    path = f"{name}/{version}.img.zst"
    fields = {
        "name": path,
        "version": version,
        "kind": options["kind"],
        "length": 0,
        "sha256": "0" * 64,
        "security_counter": options["counter"],
        "hardware_ids": options["hardware"],
        "full": {"name": path, "length": 0, "sha256": "0" * 64},
        "requires": options["requires"],
        "fallback_counter_min": options["fallback_min"],
        "cohort_percent": options["percent"],
        "window": _window(options["window"]),
        "preconditions": _preconditions(options),
        "critical": options["critical"],
        "emergency": {"floor_max": emergency, "reason": options["reason"]} if emergency else None,
        "rxswin": options["rxswin"],
        "notes": options["notes"],
    }
    try:
        return msgspec.convert(fields, VerifiedTarget)
    except msgspec.ValidationError as error:
        raise TboxError(f"the release is out of bounds: {error}", where=str(image)) from None


def _window(text: str | None) -> dict[str, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d\d):(\d\d)-(\d\d):(\d\d)", text)
    if match is None:
        raise click.UsageError(f"--window is no span of the day: {text}; write it as 22:00-06:00")
    begin_h, begin_min, end_h, end_min = map(int, match.groups())
    return {"begin_minute": 60 * begin_h + begin_min, "end_minute": 60 * end_h + end_min}


def _preconditions(options: dict[str, Any]) -> dict[str, Any]:
    said = {"consent": options["consent"], "soc_percent_min": options["soc_min"]}
    return {name: value for name, value in said.items() if value is not None}


@click.command()
@repository
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True)
def serve(repository: Path, host: str, port: int) -> None:
    """Serve a repository over HTTP with ranges, for tests and the bench."""
    from tbox.ota.serve import PUBLIC, server

    if not all((repository / part).is_dir() for part in PUBLIC):
        raise TboxError("no repository here", where=str(repository), mend="make one with `tbox ota rotate`")
    try:
        http = server(repository, host, port)
    except OSError as error:
        raise TboxError(f"cannot listen: {error.strerror}", where=f"{host}:{port}") from None
    with http:
        click.echo(f"http://{host}:{http.server_address[1]}/metadata")
        http.serve_forever()


@click.command()
@repository
@click.option("--version", required=True, help="The release that is rolled out.")
@click.option("--reports", type=click.Path(path_type=Path), required=True, help="JSON lines, see below.")
@click.option("--resume", is_flag=True, help="Go on from the first cohort after a halt.")
@click.option("--settings", type=click.Path(path_type=Path), help="TOML of rollout settings.")
@key_places_needed
def rollout(
    repository: Path,
    version: str,
    reports: Path,
    resume: bool,
    settings: Path | None,
    keys: tuple[str, ...],
) -> None:
    """Widen a release's cohort, or halt it and order it left, by what vehicles report. Exit 1 when halted.

    A line of REPORTS is {"vehicle": …, "at_s": …, "body": {…}} with the body of a record of kind "ota".
    """
    from tbox import toml
    from tbox.ota import rollout as core
    from tbox.ota.releases import ROLLOUT_ROLE

    publisher = _publisher(repository)
    limits = toml.load(str(settings), core.RolloutSettings) if settings else core.RolloutSettings()
    release = next((entry for entry in publisher.releases() if entry.version == version), None)
    if release is None:
        raise TboxError(f"no release {version} is listed", where=str(repository))
    now_s = time.time()
    progress = publisher.rollout(release.sha256, now_s)
    if resume and progress.halted:
        progress = core.resume(progress, now_s)
    counted = core.tally(_outcomes(reports), release.sha256, limits.halt_window_s, progress.from_s)
    decision = core.decide(progress, counted, now_s, limits)
    click.echo(f"{decision.step.value}: {decision.why}")
    click.echo(
        f"{counted.tried} vehicles tried it, {counted.good} found it good, {counted.failed} gave it up"
    )
    if publisher.save_rollout(decision.progress):
        publisher.publish(_signers(keys), [ROLLOUT_ROLE])  # a release half signed must not hold up a halt
        click.echo(f"published: {decision.progress.basis_points / 100:g} % of the fleet")
    if decision.progress.halted:
        raise Refused(
            "the rollout is halted", where=version, mend="go on with --resume once it is understood"
        )


def _outcomes(path: Path) -> list[Any]:
    from tbox.ota.rollout import OUTCOMES_MAX, Reports

    reports, found = Reports(), []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number > OUTCOMES_MAX:
                raise TboxError(f"more than {OUTCOMES_MAX} lines", where=str(path))
            try:
                entry = json.loads(line)
                at_s = float(entry["at_s"])
                if not math.isfinite(at_s):
                    raise ValueError(f"at_s is {at_s}")
                outcome = reports.outcome(str(entry["vehicle"]), dict(entry["body"]), at_s)
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
                raise TboxError(f"not a report: {error!r}", where=f"{path}:{number}") from None
            if outcome is not None:
                found.append(outcome)
    return found


@click.command()
@click.argument("log", type=click.Path(path_type=Path))
@click.option("--export", "target", type=click.Path(path_type=Path), help="Write it as one file for others.")
@click.option("--public-key", default="", help="The device's key, hex; without it only wholeness is shown.")
@click.option("--json", "as_json", is_flag=True, help="Print every entry as a JSON line.")
def audit(log: Path, target: Path | None, public_key: str, as_json: bool) -> None:
    """Verify the update log in LOG, a device's directory or an exported file. Exit 1 unless it holds."""
    from tbox.ota import audit as core

    raw = b"".join(core.export(OsStorage(), str(log))) if log.is_dir() else _read(log)
    if target is not None:
        target.write_bytes(raw)
    report = core.verify_export(raw, public_key)
    if as_json:
        for line in raw.splitlines()[1:]:
            click.echo(bytes(core.parse_line(line)[1]))
    for problem in report.problems:
        click.echo(problem, err=True)
    if not report.whole:
        raise Refused("the log does not hold" if report.entries else "the log is empty", where=str(log))
    click.echo(f"entries {report.first} to {report.last} hold; the newest is {report.last_hash}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TboxError(f"cannot be read: {error.strerror}", where=str(path)) from None
