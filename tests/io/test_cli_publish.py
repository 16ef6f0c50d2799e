"""The publisher's commands as people type them: several signers, releases, rotation, rollout, audit."""

from __future__ import annotations

import hashlib
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click import UsageError
from click.testing import CliRunner

from tbox.cli.ota import ota
from tbox.durable import OsStorage
from tbox.errors import Refused, TboxError
from tbox.model import Now
from tbox.ota import image as app_image
from tbox.ota.audit import KEY_NAME, AuditLog, open_key
from tests.daemon import tbox

ROLES = ("root", "targets")


@dataclass
class Publisher:
    """Types `tbox ota` in a directory with keys and a repository."""

    directory: Path

    @property
    def repository(self) -> str:
        return str(self.directory / "repo")

    def key(self, name: str, suffix: str = "pem") -> str:
        return str(self.directory / "keys" / f"{name}.{suffix}")

    def types(self, *words: str) -> str:
        """Return what was printed. Raises what the command raises, which `tbox` prints as one line."""
        done = CliRunner().invoke(ota, list(words), standalone_mode=False)
        if done.exception is not None:
            raise done.exception
        return done.output

    def signs(self, role: str, *names: str) -> str:
        keys = [word for name in names for word in ("--key", self.key(name))]
        return self.types("sign", f"{self.repository}/staged/{role}.json", *keys)

    def goes_public(self) -> str:
        return self.types("publish", self.repository, "--key", self.key("online"))

    def stages(self, data: bytes, version: str, counter: int, *more: str) -> str:
        path = self.directory / "image"
        path.write_bytes(data)
        return self.types(
            "publish", self.repository, str(path), "--kind", "raw", "--name", "os", "--version", version,
            "--counter", str(counter), "--hardware", "tbox-sim", *more,
        )  # fmt: skip


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    made = Publisher(tmp_path)
    names = [f"{role}-{n}" for role in ROLES for n in range(1, 6)]
    made.types("keys", *names, "online", "--dir", str(tmp_path / "keys"))
    adds = [word for name in names for word in (f"--{name[:-2]}", made.key(name, "pub"))]
    made.types("rotate", made.repository, *adds, "--online", made.key("online", "pub"))
    for role in ROLES:
        made.signs(role, f"{role}-1", f"{role}-3", f"{role}-4")
    made.goes_public()
    return made


def test_three_people_sign_one_after_the_other_and_then_it_is_public(publisher: Publisher) -> None:
    data = random.Random(1).randbytes(20_000)
    said = publisher.stages(data, "1", 1, "--key", publisher.key("targets-1"))
    assert "targets: 1 of the 3 keys of targets" in said
    with pytest.raises(Refused, match="have the others sign it"):
        publisher.goes_public()
    said = publisher.signs("targets", "targets-2") + publisher.signs("targets", "targets-5")
    assert f"1 for tbox-sim: counter 1, image {hashlib.sha256(data).hexdigest()[:12]}" in said
    assert "targets: 3 of the 3 keys" in said
    assert "published targets version 2" in publisher.goes_public()
    said = publisher.stages(data + b"more", "2", 2)
    assert f"bytes from {hashlib.sha256(data).hexdigest()[:12]}" in said


def test_an_app_image_says_itself_what_it_is(publisher: Publisher, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "hello.py").write_text("def main(): ...\n")
    header = app_image.ImageHeader(name="hello", version="3.1", entry="hello:main")
    path = tmp_path / "app.img"
    path.write_bytes(b"".join(app_image.build(tmp_path / "tree", header)))
    said = publisher.types(
        "publish", publisher.repository, str(path), "--counter", "1", "--hardware", "tbox-sim"
    )
    assert said.startswith("3.1: ")
    staged = json.loads((Path(publisher.repository) / "staged" / "targets.json").read_bytes())
    assert "hello/3.1.img.zst" in staged["signed"]["targets"]


def test_a_key_is_revoked_by_id(publisher: Publisher) -> None:
    gone_file = publisher.key("targets-1", "pub")
    gone = json.loads(Path(gone_file).read_bytes())["keyid"]
    publisher.types("keys", "targets-6", "--dir", str(Path(gone_file).parent))
    instead = ["--revoke", gone, "--targets", publisher.key("targets-6", "pub")]
    said = publisher.types("rotate", publisher.repository, *instead)
    assert "root: 0 of the 3 keys of the root before" in said
    publisher.signs("root", "root-1", "root-2", "root-5")
    with pytest.raises(Refused, match=r"targets\.json: signed by 2 of the 3"):
        publisher.goes_public()
    publisher.stages(b"image", "1", 1)
    publisher.signs("targets", "targets-2", "targets-3", "targets-6")
    assert "published root version 2" in publisher.goes_public()


WEAK = {
    "one signature": (["--threshold", "1"], "1 of 5 keys would do, 3 of 5 should"),
    "two signatures": (["--threshold", "2"], "2 of 5 keys would do, 3 of 5 should"),
    "four keys": (["--revoke", "{gone}"], "targets: 3 of 4 keys would do, 3 of 5 should"),
}


@pytest.mark.parametrize("case", WEAK)
def test_less_than_three_of_five_must_be_meant(publisher: Publisher, case: str) -> None:
    words, why = WEAK[case]
    gone = json.loads(Path(publisher.key("targets-1", "pub")).read_bytes())["keyid"]
    change = ["rotate", publisher.repository, *(word.format(gone=gone) for word in words)]
    with pytest.raises(Refused, match=f"{why}.*--weaker-than-3-of-5") as refused:
        publisher.types(*change)
    assert refused.value.exit_code == 1
    assert list((Path(publisher.repository) / "staged").iterdir()) == []
    assert "staged" in publisher.types(*change, "--weaker-than-3-of-5")


def test_the_first_root_is_three_of_five_unless_told_otherwise(publisher: Publisher, tmp_path: Path) -> None:
    root = json.loads((Path(publisher.repository) / "metadata" / "1.root.json").read_bytes())["signed"]
    shares = {role: (entry["threshold"], len(entry["keyids"])) for role, entry in root["roles"].items()}
    assert shares == {"root": (3, 5), "targets": (3, 5), "snapshot": (1, 1), "timestamp": (1, 1)}
    toy, key = str(tmp_path / "toy"), publisher.key("root-1", "pub")
    alone = ["rotate", toy, *(word for role in ROLES for word in (f"--{role}", key)), "--online", key]
    with pytest.raises(Refused, match="1 keys cannot reach a threshold of 3"):
        publisher.types(*alone)
    with pytest.raises(Refused, match="root: 1 of 1 keys would do"):
        publisher.types(*alone, "--threshold", "1")
    publisher.types(*alone, "--threshold", "1", "--weaker-than-3-of-5")


@pytest.mark.parametrize("at_s", ["NaN", "Infinity", "1e999", '"soon"'])
def test_a_report_of_no_time_is_named_by_its_line(publisher: Publisher, tmp_path: Path, at_s: str) -> None:
    publisher.stages(b"image", "1", 1)
    path = tmp_path / "reports.jsonl"
    path.write_text(f'{{"vehicle": "v", "at_s": {at_s}, "body": {{"event": "good"}}}}\n')
    words = ["rollout", publisher.repository, "--version", "1", "--key", publisher.key("online")]
    with pytest.raises(TboxError, match=r"reports\.jsonl:1: not a report"):
        publisher.types(*words, "--reports", str(path))


def test_what_would_expire_is_renewed_by_its_signers(publisher: Publisher) -> None:
    said = publisher.types("rotate", publisher.repository, "--renew", "root", "--renew", "targets")
    assert "root: 0 of the 3 keys of the root before" in said
    for role in ROLES:
        publisher.signs(role, f"{role}-1", f"{role}-2", f"{role}-5")
    said = publisher.goes_public()
    assert "published root version 2" in said
    assert "published targets version 2" in said


def test_a_release_carries_its_window_and_its_preconditions(publisher: Publisher) -> None:
    words = ["--window", "23:30-05:00", "--soc-min", "40", "--consent", "--key", publisher.key("targets-1")]
    publisher.stages(b"image", "1", 1, *words)
    staged = json.loads((Path(publisher.repository) / "staged" / "targets.json").read_bytes())
    custom = staged["signed"]["targets"]["os/1.img.zst"]["custom"]["tbox"]
    assert custom["window"] == {"begin_minute": 23 * 60 + 30, "end_minute": 5 * 60}
    assert custom["preconditions"] | {"consent": True, "soc_percent_min": 40} == custom["preconditions"]


@pytest.mark.parametrize("window", ["22-06", "22:00", "24:00-06:00", "22:00-06:60:00"])
def test_a_window_that_is_no_span_of_the_day_is_refused(publisher: Publisher, window: str) -> None:
    with pytest.raises((UsageError, TboxError), match=r"window|out of bounds"):
        publisher.stages(b"image", "1", 1, "--window", window)


def reports(directory: Path, sha256: str, failed: int, of: int, at_s: float = 10.0) -> str:
    lines = []
    for n in range(of):
        said = [{"event": "switch", "target": {"sha256": sha256}}]
        said.append(
            {"event": "rolled-back"} if n < failed else {"event": "good", "running": {"sha256": sha256}}
        )
        lines += [{"vehicle": f"v{n}", "at_s": at_s + n, "body": body} for body in said]
    path = directory / "reports.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_a_rollout_advances_halts_and_resumes(publisher: Publisher, tmp_path: Path) -> None:
    data = b"image " * 1000
    publisher.stages(data, "1", 1)
    publisher.signs("targets", "targets-1", "targets-2", "targets-4")
    publisher.goes_public()
    sha256 = hashlib.sha256(data).hexdigest()
    (tmp_path / "fast.toml").write_text("soak_s = 0\n")
    words = ["rollout", publisher.repository, "--version", "1", "--settings", str(tmp_path / "fast.toml")]
    words += ["--key", publisher.key("online"), "--reports"]
    assert "advance: to 5 %" in publisher.types(*words, reports(tmp_path, sha256, 0, 100))
    assert "published: 15 % of the fleet" in publisher.types(*words, reports(tmp_path, sha256, 1, 100))
    halted = reports(tmp_path, sha256, 3, 100)
    with pytest.raises(Refused, match="the rollout is halted"):
        publisher.types(*words, halted)
    assert b"3 of 100 vehicles gave it up within 15 min" in newest(publisher, "rollout")
    with pytest.raises(Refused, match="the rollout is halted"):
        publisher.types(*words, reports(tmp_path, sha256, 0, 100))
    # The reports that halted it are still in the file, and are past.
    assert "wait: 0 vehicles found it good" in publisher.types(*words, halted, "--resume")
    later_s = time.time() + 60
    assert "advance: to 5 %" in publisher.types(*words, reports(tmp_path, sha256, 0, 100, later_s))
    assert b"leave_sha256" not in newest(publisher, "rollout")


def test_a_release_begins_in_the_first_cohort_unless_it_is_for_everyone(publisher: Publisher) -> None:
    said = publisher.stages(b"image", "1", 1)
    assert "it comes to 1 % of the fleet; widen that with `tbox ota rollout`" in said
    publisher.signs("targets", "targets-1", "targets-2", "targets-4")
    assert "published rollout version 2" in publisher.goes_public()
    first = hashlib.sha256(b"image").hexdigest()
    assert points(publisher) == {first: 100}
    assert "of the fleet" not in publisher.stages(b"for all", "2", 2, "--everyone")
    publisher.signs("targets", "targets-1", "targets-2", "targets-4")
    assert "rollout" not in publisher.goes_public()
    assert points(publisher) == {first: 100}


def points(publisher: Publisher) -> dict[str, int]:
    found: dict[str, int] = json.loads(newest(publisher, "rollout"))["signed"]["tbox"]["basis_points"]
    return found


def test_a_halt_becomes_public_whatever_else_is_half_signed_and_after_a_failure(
    publisher: Publisher, tmp_path: Path
) -> None:
    publisher.stages(b"image", "1", 1)
    publisher.signs("targets", "targets-1", "targets-2", "targets-4")
    publisher.goes_public()
    publisher.stages(b"next", "2", 2, "--key", publisher.key("targets-1"))
    publisher.types("keys", "online-2", "--dir", str(Path(publisher.key("online")).parent))
    old = json.loads(Path(publisher.key("online", "pub")).read_bytes())["keyid"]
    publisher.types(
        "rotate", publisher.repository, "--online", publisher.key("online-2", "pub"), "--revoke", old
    )
    sha256 = hashlib.sha256(b"image").hexdigest()
    words = [
        "rollout",
        publisher.repository,
        "--version",
        "1",
        "--reports",
        reports(tmp_path, sha256, 3, 100),
    ]
    with pytest.raises(Refused, match="signed by 0 of the 1 keys of rollout"):
        publisher.types(*words, "--key", publisher.key("root-1"))
    assert b"leave_sha256" not in newest(publisher, "rollout")
    with pytest.raises(Refused, match="the rollout is halted"):
        publisher.types(*words, "--key", publisher.key("online"))
    assert b'"leave_sha256":"%s"' % sha256.encode() in newest(publisher, "rollout")
    assert points(publisher)[sha256] == 0
    for role in ROLES:
        publisher.signs(role, f"{role}-1", f"{role}-2", f"{role}-4")
    said = publisher.types("publish", publisher.repository, "--key", publisher.key("online-2"))
    assert "published targets version 3" in said


def newest(publisher: Publisher, role: str) -> bytes:
    files = (Path(publisher.repository) / "metadata").glob(f"*.{role}.json")
    return max(files, key=lambda path: int(path.name.split(".")[0])).read_bytes()


def test_what_is_no_report_is_told_with_its_line(publisher: Publisher, tmp_path: Path) -> None:
    publisher.stages(b"image", "1", 1)
    (tmp_path / "bad.jsonl").write_text('{"vehicle": "v", "at_s": 1, "body": {}}\n{"vehicle": 1}\n')
    words = ["--version", "1", "--reports", str(tmp_path / "bad.jsonl"), "--key", publisher.key("online")]
    with pytest.raises(TboxError, match=r"bad\.jsonl:2: not a report"):
        publisher.types("rollout", publisher.repository, *words)


BAD_USE: dict[str, tuple[list[str], str]] = {
    "nothing staged": (["publish", "{new}"], "no targets to publish"),
    "no counter": (["publish", "{repo}", "{image}", "--kind", "raw"], "needs --counter, --hardware"),
    "nothing changes": (["rotate", "{new}"], "nothing changes"),
    "no such key": (["sign", "{repo}/metadata/1.root.json", "--key", "nowhere.pem"], "cannot be read"),
    "a public key to sign": (
        ["sign", "{repo}/metadata/1.root.json", "--key", "{public}"],
        "not a private key",
    ),
    "not metadata": (["sign", "{image}", "--key", "{private}"], "not metadata"),
    "no release": (
        ["rollout", "{repo}", "--version", "9", "--reports", "{image}", "--key", "{private}"],
        "no release 9 is listed",
    ),
    "no log": (["audit", "{new}"], "cannot be read|no log here"),
}


@pytest.mark.parametrize("case", BAD_USE)
def test_bad_use_is_told_in_one_line(publisher: Publisher, tmp_path: Path, case: str) -> None:
    words, message = BAD_USE[case]
    (tmp_path / "image").write_bytes(b"x")
    places = {
        "new": str(tmp_path / "new"),
        "repo": publisher.repository,
        "image": str(tmp_path / "image"),
        "public": publisher.key("root-1", "pub"),
        "private": publisher.key("online"),
    }
    with pytest.raises(Exception, match=message) as caught:
        publisher.types(*(word.format(**places) for word in words))
    assert "\n" not in str(caught.value)


def test_the_audit_log_is_verified_exported_and_told(tmp_path: Path) -> None:
    log = tmp_path / "ota"
    log.mkdir()
    key = open_key(OsStorage(), str(log / KEY_NAME))
    made = AuditLog(OsStorage(), str(log), key, Now(1), start=1)
    made.append(Now(2), "offered", {"version": "2.0"}, rxswin="R155 7")
    made.append(Now(3), "good", {})
    person = Publisher(tmp_path)
    exported = str(tmp_path / "log.jsonl")
    assert "entries 1 to 2 hold" in person.types("audit", str(log), "--export", exported)
    public = made.public_key()
    said = person.types("audit", exported, "--public-key", public, "--json")
    first: dict[str, Any] = json.loads(said.splitlines()[0])
    assert (first["event"], first["rxswin"]) == ("offered", "R155 7")
    text = Path(exported).read_text()
    Path(exported).write_text(text.replace('"2.0"', '"9.0"'))
    with pytest.raises(Refused, match="the log does not hold"):
        person.types("audit", exported)
    Path(exported).write_text(text.splitlines()[0] + "\n")
    with pytest.raises(Refused, match="the log is empty"):
        person.types("audit", exported)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["publish", "{repo}", "nowhere.img", "--counter", "1", "--hardware", "x"],
        ["publish", "{repo}", "nowhere.img", "--kind", "raw", "--counter", "1", "--hardware", "x",
         "--version", "1", "--name", "os"],
        ["keys", "a", "--dir", "/proc/nowhere"],
        ["rotate", "/proc/nowhere", "--root", "x.pub"],
        ["rollout", "{repo}", "--version", "1", "--reports", "nowhere", "--key", "x.pem"],
        ["serve", "nowhere"],
    ],
)  # fmt: skip
def test_what_is_not_there_is_one_line_and_exit_2(publisher: Publisher, words: list[str]) -> None:
    done = tbox("ota", *(word.format(repo=publisher.repository) for word in words), check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("tbox: ")
