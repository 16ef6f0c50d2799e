"""The update log shows whatever was done to it, and survives what a power cut does to it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from tbox.errors import TboxError
from tbox.model import Now, TimeQuality
from tbox.ota import audit
from tbox.ota.audit import AuditError, AuditLog, export, open_key, verify_export
from tests.crash.flash import Flash, Image, every_cut

DIRECTORY = "/log"
KEY_PATH = f"{DIRECTORY}/{audit.KEY_NAME}"
NOW = Now(5, 1_800_000_000_000_000_000, TimeQuality.NTP)
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key().public_bytes_raw().hex()


def opened(flash: Flash, start: int = 1) -> AuditLog:
    return AuditLog(flash, DIRECTORY, open_key(flash, KEY_PATH), NOW, start)


def filled(count: int = 5) -> Flash:
    flash = Flash({KEY_PATH: KEY.private_bytes_raw()})
    log = opened(flash)
    for number in range(count):
        log.append(NOW, "offered", {"version": f"{number}.0"}, rxswin="R1")
    return flash


def image_of(flash: Flash) -> Image:
    return {path: bytes(data) for path, data in flash.files.items()}


def examined(flash: Flash, public: str = PUBLIC) -> audit.Report:
    return verify_export(b"".join(export(flash, DIRECTORY)), public)


def lines_of(flash: Flash) -> list[bytes]:
    return b"".join(export(flash, DIRECTORY)).splitlines()


def test_a_log_holds_and_tells_how_far_it_goes() -> None:
    flash = filled()
    report = examined(flash)
    assert report.whole and (report.entries, report.first, report.last) == (5, 1, 5)
    assert report.last_hash == opened(flash).head[1]
    entry = json.loads(lines_of(flash)[1])["entry"]
    assert (entry["event"], entry["body"], entry["rxswin"]) == ("offered", {"version": "0.0"}, "R1")


def test_a_log_goes_on_over_restarts_and_without_a_clock() -> None:
    flash = filled(2)
    log = opened(flash, start=2)
    assert log.recovered == ""
    log.append(Now(9), "good", {})
    assert examined(flash).whole
    assert json.loads(lines_of(flash)[-1])["entry"]["wall_ns"] is None


def edit_body(line: bytes) -> bytes:
    return line.replace(b"1.0", b"9.0")


EDITS: dict[str, tuple[Any, str]] = {
    "changed": (lambda lines: [*lines[:2], edit_body(lines[2]), *lines[3:]], "is not signed by this key"),
    "left out": (lambda lines: [*lines[:2], *lines[3:]], "entry 3 follows 1"),
    "swapped": (lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]], "entry 3 follows 1"),
    "twice": (lambda lines: [*lines[:3], lines[2], *lines[3:]], "entry 2 follows 2"),
    "torn": (lambda lines: [*lines[:2], lines[2][:50], *lines[3:]], "is no entry"),
    "nonsense": (lambda lines: [*lines[:2], b"\xff", *lines[2:]], "is no entry"),
    "all gone": (lambda lines: lines[:1], ""),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_was_done_to_a_log_shows(edit: str) -> None:
    change, problem = EDITS[edit]
    report = verify_export(b"\n".join(change(lines_of(filled()))) + b"\n", PUBLIC)
    assert not report.whole
    assert problem in "".join(report.problems[:1])


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_any_changed_bit_shows(at: int, bit: int) -> None:
    raw = bytearray(b"".join(RAW[1:]))
    raw[at % len(raw)] ^= 1 << bit
    assert not verify_export(RAW[0] + bytes(raw), PUBLIC).whole


RAW = [line + b"\n" for line in lines_of(filled())]


def test_a_log_by_another_key_does_not_hold() -> None:
    other = Ed25519PrivateKey.generate().public_key().public_bytes_raw().hex()
    report = examined(filled(), other)
    assert len(report.problems) == 5 and "not signed by this key" in report.problems[0]


def test_an_inserted_entry_signed_rightly_by_a_thief_of_the_key_still_breaks_the_chain() -> None:
    lines = lines_of(filled())
    entry = audit.parse_line(lines[3])[0].entry
    forged, _ = audit.encode_line(audit.Entry(**_fields(entry, event="nothing happened")), KEY)
    report = verify_export(b"\n".join([*lines[:3], forged.strip(), *lines[4:]]), PUBLIC)
    assert report.problems == ["line 4: entry 4 does not continue the one before"]


def _fields(entry: audit.Entry, **changes: object) -> dict[str, Any]:
    names = ("number", "before", "start", "mono_ns", "wall_ns", "rxswin", "event", "body")
    return {name: getattr(entry, name) for name in names} | changes


def test_a_tail_taken_away_shows_on_the_device() -> None:
    flash = filled()
    path = f"{DIRECTORY}/audit.000001.jsonl"
    kept = b"".join(bytes(flash.files[path]).splitlines(keepends=True)[:3])
    flash.files[path] = bytearray(kept)
    log = opened(flash)
    assert log.recovered == "entries 4 to 5 are gone"
    report = examined(flash)
    assert not report.whole and "entry 6 follows 3" in report.problems[0]


def test_a_torn_tail_is_cut_off_and_told() -> None:
    flash = filled()
    flash.files[f"{DIRECTORY}/audit.000001.jsonl"] += b'{"entry":{"numb'
    assert opened(flash).recovered == "cut off 15 bytes after entry 5"
    report = examined(flash)
    assert report.whole and report.last == 6
    assert json.loads(lines_of(flash)[-1])["entry"]["event"] == "audit-recovered"


def test_a_power_cut_anywhere_loses_at_most_the_entry_under_way_and_breaks_nothing() -> None:
    start = image_of(filled(2))
    flash = Flash(start)
    log = opened(flash)
    for number in (3, 4):
        log.append(NOW, "switch", {"n": number})
    states = 0
    for _, image in every_cut(start, flash.log):
        states += 1
        after = Flash(image)
        opened(after).append(NOW, "good", {})
        report = examined(after)
        assert report.whole, report.problems
        assert report.last >= 3
    assert states > 10


def test_an_entry_too_long_is_refused_and_leaves_the_log_as_it_was() -> None:
    flash = filled(1)
    log = opened(flash)
    with pytest.raises(AuditError, match="say less"):
        log.append(NOW, "x", {"text": "x" * audit.LINE_BYTES_MAX})
    log.append(NOW, "y", {})
    assert examined(flash).whole


def test_a_long_log_loses_its_oldest_segment_and_still_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "SEGMENT_BYTES_MAX", 2000)
    monkeypatch.setattr(audit, "SEGMENTS_MAX", 3)
    flash = filled(40)
    assert len([path for path in flash.files if path.endswith(".jsonl")]) == 3
    report = examined(flash)
    assert report.whole and report.last == 40 and report.first > 1
    assert opened(flash).recovered == ""


def test_what_is_no_log_is_told(tmp_path: Any) -> None:
    for raw in (b"", b"{}\n", b"\xff"):
        with pytest.raises(AuditError, match="not an exported log"):
            verify_export(raw)
    with pytest.raises(TboxError, match="no log here"):
        list(export(Flash(), DIRECTORY))
    with pytest.raises(AuditError, match="not a key"):
        open_key(Flash({KEY_PATH: b"short"}), KEY_PATH)
