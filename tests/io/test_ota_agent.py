"""The real agent as an app image: it updates itself as a vehicle drives, and proves itself or goes back."""

from __future__ import annotations

import json
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from tbox.bench.factory import CRASHES, Factory
from tbox.control import ControlError, request
from tbox.errors import Refused
from tbox.model import COUNTER_BITS, NS_PER_S
from tbox.ota.serve import running
from tbox.sim.broker import Broker, find_mosquitto, start_broker
from tbox.spool import schema
from tests.daemon import TBOX, WAIT_S, Daemon, Judge, Vehicle, tbox, wait_for

pytestmark = [
    pytest.mark.mosquitto,
    pytest.mark.slow,
    pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed"),
]
# Its spool has a step more than that of the release before.
MIGRATES = {"spool/schema.py": "\n\nMIGRATIONS += (lambda db: db['alarm'].add_column('later', int),)\n"}
DRIVING = "cycSecs,cycMps\n0,0\n3,10\n3600,10\n"
SETTINGS = """\
[edge.mode]
park_for_s = 1.0
[ota]
metadata_url = "{base}/metadata"
trial_crash_free_s = 2
trial_grace_s = 40
"""


class Car(Daemon):
    """The daemon out of slot a, started by `tbox boot`; a publisher; the vehicle around both."""

    def __init__(self, directory: Path, broker: Broker, factory: Factory, base: str) -> None:
        super().__init__(directory, broker.port, more=SETTINGS.format(base=base), mqtt=broker.mqtt)
        self.factory = factory
        self.slots = directory / "slots"
        self.installed = factory.image("1.0")
        factory.stage(self.installed, 1)
        factory.publish()
        factory.provision(self.slots, self.installed)
        (directory / "drive.csv").write_text(DRIVING)

    def start(self) -> Car:
        boot = ["boot", "--dir", str(self.slots), "--run-dir", str(self.directory / "run")]
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*TBOX, *boot, "--", "run", "--config", str(self.config)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        wait_for("the agent answers", lambda: self._alive() and self.status())
        return self

    def ota(self, do: str = "status") -> dict[str, Any]:
        """Ask the running agent; {} while none answers."""
        try:
            return request(self.socket, {"cmd": "ota", "do": do})
        except (ControlError, Refused):
            return {}

    def control(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(tbox("boot", "--status", "--dir", str(self.slots)).stdout)
        return found

    def spool_schema(self) -> int:
        with closing(sqlite3.connect(self.directory / "state" / "spool" / "spool.db")) as db:
            return schema.version(db)

    def runs(self, version: str) -> bool:
        return bool(self.status().get("version") == version)


class Bench:
    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._stack = stack
        broker = start_broker(str(directory / "broker"))
        stack.callback(broker.stop)
        self.judge = Judge(broker.port, broker.mqtt)
        stack.callback(self.judge.close)
        self.factory = Factory(directory / "factory")
        base = stack.enter_context(running(self.factory.repository))
        self.car = Car(directory, broker, self.factory, base)
        stack.callback(self.car.end)

    def vehicle(self, *arguments: str) -> Vehicle:
        vehicle = Vehicle(self.car.bus_url, *arguments)
        self._stack.callback(vehicle.end)
        return vehicle

    def drive(self) -> Vehicle:
        vehicle = self.vehicle("--cycle", str(self.car.directory / "drive.csv"), "--once")
        wait_for("it drives", lambda: (self.car.status().get("edge") or {}).get("speed_kmh") or 0 > 10)
        return vehicle

    def speed_kmh(self) -> float | None:
        speed: float | None = self.car.status().get("edge", {}).get("speed_kmh")
        return speed

    def park(self) -> Vehicle:
        return self.vehicle("--cycle", "ready")

    def offer(self, version: str, counter: int, added: dict[str, str] | None = None) -> None:
        self.factory.stage(self.factory.image(version, added), counter)
        self.factory.publish()
        assert self.car.ota("check")

    def told(self, event: str, **wanted: Any) -> list[dict[str, Any]]:
        return self.judge.bodies("ota", event=event, **wanted)

    def stop(self) -> None:
        assert self.car.stop() == 0
        wait_for("everything at the broker", self.judge.complete)


def _instants(bench: Bench, event: str, start: int) -> list[int]:
    """Return the monotonic times of a start's records of an event."""
    return [
        record["mono"]
        for record in bench.judge.records
        if record["body"].get("event") == event and record["id"] >> COUNTER_BITS == start
    ]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(tmp_path, stack)


def test_a_delta_is_installed_while_driving_switched_to_once_parked_and_proves_itself(bench: Bench) -> None:
    bench.car.start()
    assert bench.car.runs("1.0") and bench.car.ota()["running"]["slot"] == "a"
    assert bench.car.ota()["rxswin"] == "tbox 1.0"
    drive = bench.drive()
    bench.offer("2.0", 2, MIGRATES)
    held = wait_for("it is held until parked", lambda: bench.told("held", state="ready"))
    assert held[-1]["reason"] == "the vehicle is not parked"
    assert bench.told("go")[0]["reason"].endswith(".bsdiff"), "the delta was not taken"
    assert bench.car.runs("1.0") and not bench.told("switch")

    drive.stop()
    bench.park()
    wait_for("2.0 runs", lambda: bench.car.runs("2.0"))
    wait_for("it proved itself", lambda: bench.told("passed"))
    state = bench.car.control()
    assert state["slots"]["b"]["state"] == "good" and state["floor"] == 2
    assert bench.car.ota()["running"] | {"sha256": ""} == {"slot": "b", "version": "2.0", "sha256": ""}
    assert bench.car.ota()["rxswin"] == "tbox 2.0"

    bench.stop()
    proof = bench.judge.result()
    assert proof.ok and proof.missing_explained == 0
    first, second = bench.judge.bodies("event", event="start")
    assert (first["version"], second["version"]) == ("1.0", "2.0")
    assert second["previous"]["start"] == first["start"] and second["previous"]["clean"] is True
    stop = bench.judge.bodies("event", event="stop")[0]
    assert stop["ledger"]["bus"]["dropped"] == {}
    (gap,) = bench.judge.bodies("event", event="frames_resumed")
    assert (gap["bus"], gap["since"], gap["clock"]) == (bench.car.bus_url, first["start"], "monotonic")
    assert 0 < gap["gap_s"] < WAIT_S and gap["upper_bound"] is False
    resumed_ns = stop["last_frames"][gap["bus"]]["mono_ns"] + gap["gap_s"] * NS_PER_S
    (stopped_ns,) = _instants(bench, "stop", first["start"])
    (started_ns,) = _instants(bench, "start", second["start"])
    assert stopped_ns < started_ns < resumed_ns, "the gap does not span the restart"
    audit = tbox("ota", "audit", "--json", str(bench.car.directory / "state" / "ota")).stdout
    events = [json.loads(line)["event"] for line in audit.splitlines()[:-1]]
    assert events.index("installed") < events.index("switch") < events.index("passed")

    released = bench.car.spool_schema()
    assert released == schema.FAMILY * schema.FAMILY_SIZE + len(schema.MIGRATIONS), "it migrated on trial"
    bench.car.start()
    assert bench.car.stop() == 0
    assert bench.car.spool_schema() == released + 1


def test_what_must_not_come_in_does_not_and_what_crashes_goes_back(bench: Bench) -> None:
    bench.car.start()
    bench.park()
    wait_for("frames", lambda: bench.speed_kmh() is not None)
    bench.offer("3.0", 3, CRASHES)
    wait_for("3.0 was tried", lambda: len(bench.judge.bodies("event", event="start", version="3.0")) >= 1)
    wait_for("it was rolled back", lambda: bench.told("rolled-back"))
    wait_for("1.0 runs", lambda: bench.car.runs("1.0"))
    state = bench.car.control()
    assert state["floor"] == 1 and state["slots"]["a"]["state"] == "good"
    assert [failed["version"] for failed in state["failed"]] == ["3.0"]
    wait_for("the same image is refused", lambda: _refused(bench, "given up before"))

    bench.factory.stage(bench.factory.image("4.0"), 4, signatures=2)
    with pytest.raises(Refused, match="signed by 2 of the 3"):
        bench.factory.publish()
    bench.factory.publish_by_theft()
    bench.car.ota("check")
    wait_for("forged metadata is refused", lambda: _refused(bench, "signed by 2 of the 3"))
    assert bench.car.runs("1.0")
    bench.stop()
    assert bench.judge.result().ok
    _check_audit(bench)


def _check_audit(bench: Bench) -> None:
    """Hold each decision that was sent against the entry of the audit log that it names."""
    lines = tbox("ota", "audit", "--json", str(bench.car.directory / "state" / "ota")).stdout.splitlines()
    entries = {entry["number"]: entry for entry in map(json.loads, lines[:-1])}
    told = bench.judge.bodies("ota")
    assert {"switch", "rolled-back", "refused"} <= {body["event"] for body in told}
    for body in told:
        entry = entries[body["audit"]["number"]]
        assert (entry["event"], entry["body"]["reason"]) == (body["event"], body["reason"])


def _refused(bench: Bench, why: str) -> bool:
    return any(why in body["reason"] for body in bench.told("refused"))


def test_an_older_release_offered_again_is_refused(bench: Bench) -> None:
    bench.car.start()
    bench.park()
    wait_for("frames", lambda: bench.speed_kmh() is not None)
    bench.offer("2.0", 2)
    wait_for("2.0 is good", lambda: bench.told("passed") and bench.car.runs("2.0"))
    bench.factory.stage(bench.car.installed, 1, delist=["1.0", "2.0"], edition="-again")
    bench.factory.publish()
    bench.car.ota("check")
    wait_for("the downgrade is refused", lambda: _refused(bench, "a downgrade"))
    assert bench.car.runs("2.0")
    bench.stop()
    assert bench.judge.result().ok


def test_an_agent_that_no_boot_loader_started_says_so(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, 1)
    try:
        daemon.start()
        done = tbox("ota", "status", "--socket", daemon.socket, check=False)
    finally:
        daemon.end()
    assert done.returncode == 1 and "no updates here" in done.stderr and "tbox boot" in done.stderr
