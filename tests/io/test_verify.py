"""`tbox verify` and `tbox payload` as a person runs them: over a broker, over a capture, over damage."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from tbox.cli.main import main
from tbox.cli.payload import as_text
from tbox.cli.verify import parse_broker
from tbox.model import Record
from tbox.record.capture import Received, to_line
from tbox.record.codec import PayloadError, decode_payload
from tbox.sim.broker import MosquittoBroker
from tests.io.uplink_bench import VEHICLE, an_uplink, needs_mosquitto, settings_for, wait_for
from tests.memory_spool import MemorySpool, a_start, minter


class Outcome:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return answer


@pytest.fixture
def tbox(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    def run(*args: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["tbox", *args])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Outcome(code, *capsys.readouterr())

    yield run
    structlog.reset_defaults()  # `main` bound the log to this test's stderr, which is closed for the next


def save(path: Path, records: list[Record]) -> str:
    lines = [to_line(Received(f"tbox/1/v/{record.kind}", record.payload, 1)) for record in records]
    path.write_bytes(b"".join(lines))
    return str(path)


def test_a_complete_capture_is_proved(tmp_path: Path, tbox: Any) -> None:
    outcome = tbox("verify", "--capture", save(tmp_path / "c.jsonl", a_start(minter(), 20)))
    assert outcome.code == 0 and outcome.err == ""
    assert outcome.json["ok"] and outcome.json["received"] == 22 and outcome.json["torn_lines"] == 0


def test_a_gap_in_a_capture_is_named_and_exits_1(tmp_path: Path, tbox: Any) -> None:
    records = a_start(minter(7), 20)
    outcome = tbox("verify", "--capture", save(tmp_path / "c.jsonl", records[:5] + records[8:]))
    assert outcome.code == 1
    assert outcome.json["missing_unexplained"] == 3
    assert "3 records are missing and nothing explains it: start 7 ids 6-8" in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_an_expected_start_that_is_absent_exits_1(tmp_path: Path, tbox: Any) -> None:
    path = save(
        tmp_path / "c.jsonl", a_start(minter(2), 3, {"start": 1, "last_id": 1 << 32 | 5, "clean": True})
    )
    assert tbox("verify", "--capture", path).code == 0
    outcome = tbox("verify", "--capture", path, "--expect-start", "1")
    assert outcome.code == 1 and outcome.json["gaps_unexplained"][0]["count"] == 5


def test_a_torn_capture_is_read_as_far_as_it_goes(tmp_path: Path, tbox: Any) -> None:
    path = tmp_path / "c.jsonl"
    save(path, a_start(minter(), 20))
    path.write_bytes(path.read_bytes()[:-10])
    outcome = tbox("verify", "--capture", str(path))
    assert outcome.code == 0 and outcome.json["torn_lines"] == 1
    assert "has not said where it ends" in outcome.json["notes"][0]


def test_an_empty_capture_proves_nothing(tmp_path: Path, tbox: Any) -> None:
    outcome = tbox("verify", "--capture", save(tmp_path / "c.jsonl", []))
    assert outcome.code == 1 and "nothing was received" in outcome.err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "--broker"),
        (("--capture", "/no/such/file"), "/no/such/file"),
        (("--broker", "host:x", "--vehicle", "v"), "HOST[:PORT]"),
        (("--broker", "127.0.0.1", "--vehicle", "v", "--tls-ca", "/no/ca.pem"), "/no/ca.pem"),
    ],
)
def test_bad_usage_exits_2_with_the_reason(args: tuple[str, ...], words: str, tbox: Any) -> None:
    outcome = tbox("verify", *args)
    assert outcome.code == 2 and words in outcome.err and "Traceback" not in outcome.err


def test_a_broker_is_a_host_and_maybe_a_port() -> None:
    assert parse_broker("host") == ("host", 0)
    assert parse_broker("host:1884") == ("host", 1884)
    assert parse_broker("[::1]:1884") == ("::1", 1884)
    assert parse_broker("[::1]") == ("::1", 0)
    for text in ("", ":1", "host:99999", "host:"):
        with pytest.raises(click.UsageError):
            parse_broker(text)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[MosquittoBroker]:
    with MosquittoBroker(str(tmp_path / "broker")).start() as running:
        yield running


@needs_mosquitto[0]
@needs_mosquitto[1]
def test_over_a_broker_until_the_vehicle_stops_and_what_was_saved_says_the_same(
    broker: MosquittoBroker, tmp_path: Path, tbox: Any
) -> None:
    command = [
        sys.executable, "-c", "from tbox.cli.main import main; main()", "verify",
        "--broker", f"127.0.0.1:{broker.port}", "--vehicle", VEHICLE, "--until-stop", "--idle", "0.3",
        "--save", str(tmp_path / "saved.jsonl"), "--timeout", "120",
    ]  # fmt: skip
    log = broker._directory / "mosquitto.log"
    verify = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for("the subscriber", lambda: f"tbox/1/{VEHICLE}/#" in log.read_text())
    records = a_start(minter(), 100)
    spool = MemorySpool(records)
    uplink = an_uplink(settings_for(broker.port), spool)
    uplink.start()
    wait_for("every PUBACK", lambda: spool.empty)
    uplink.stop(5.0)
    out, err = verify.communicate(timeout=120)
    assert (verify.returncode, err) == (0, "")
    answer = json.loads(out)
    assert answer["received"] == len(records) and answer["state"]["state"] == "offline"
    again = tbox("verify", "--capture", str(tmp_path / "saved.jsonl")).json
    assert again == answer


@needs_mosquitto[0]
@needs_mosquitto[1]
def test_over_a_silent_broker_it_ends_at_its_time_limit_with_exit_1(
    broker: MosquittoBroker, tbox: Any
) -> None:
    address = f"127.0.0.1:{broker.port}"
    outcome = tbox("verify", "--broker", address, "--vehicle", "nobody", "--timeout", "0.3")
    assert outcome.code == 1 and "nothing was received" in outcome.err
    assert (
        tbox("verify", "--broker", address, "--vehicle", "v", "--mqtt", "3.1.1", "--timeout", "0.2").code == 1
    )


# --- tbox payload -------------------------------------------------------------------------------------


def test_a_payload_is_printed_as_json(tmp_path: Path, tbox: Any) -> None:
    path = tmp_path / "one.payload"
    path.write_bytes(a_start(minter(3), 2)[1].payload)
    answer = tbox("payload", str(path)).json
    assert (answer["start"], answer["counter"], answer["kind"]) == (3, 2, "telemetry")
    assert answer["body"] == {"n": 0} and answer["time"].startswith("2026-")


def test_a_capture_is_printed_line_by_line_and_damage_exits_1(tmp_path: Path, tbox: Any) -> None:
    path = tmp_path / "c.jsonl"
    save(path, a_start(minter(), 2))
    outcome = tbox("payload", str(path))
    assert outcome.code == 0
    assert [json.loads(line)["counter"] for line in outcome.out.splitlines()] == [1, 2, 3, 4]
    path.write_bytes(path.read_bytes() + to_line(Received("tbox/1/v/event", b"?", 1)) + b"{torn")
    outcome = tbox("payload", str(path))
    assert outcome.code == 1 and "1 payloads and 1 lines cannot be read" in outcome.err
    assert len(outcome.out.splitlines()) == 4


@pytest.mark.parametrize("raw", [b"", b"garbage", b"\x28\xb5\x2f\xfd\x00", b"\xc1"])
def test_what_is_no_payload_exits_2_with_one_line(raw: bytes, tmp_path: Path, tbox: Any) -> None:
    path = tmp_path / "bad"
    path.write_bytes(raw)
    outcome = tbox("payload", str(path))
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1 and "bad" in outcome.err


BODIES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.integers(0, 99) | st.binary(max_size=3), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(st.dictionaries(st.text(max_size=5), BODIES, max_size=3), st.none() | st.integers(-(2**63), 2**63 - 1))
def test_whatever_a_payload_holds_is_printed_as_strict_json(body: dict[str, Any], wall: int | None) -> None:
    record = {"v": 1, "id": 1, "kind": "event", "level": 1, "mono": 0, "wall": wall, "q": 7, "body": body}
    try:
        decoded = decode_payload(msgspec.msgpack.encode(record), expand=True)
    except PayloadError:
        return
    json.loads(as_text(decoded, indent=False), parse_constant=pytest.fail)
