"""The chapter of updates: a vehicle takes a good release, loses a bad one, refuses two. Judges nothing.

Runs in a process of its own beside the first ride: `python -m tbox.bench.update_ride DIRECTORY DBC_DIRECTORY`
prints the story, a JSON line a sentence, and leaves `evidence.json`. The agent is the package as it is here,
packed into images, booted from slots by `tbox boot`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from tbox.bench.factory import CRASHES, Factory
from tbox.bench.judge import UpdateEvidence
from tbox.bench.ride import DBC_FILES, RideError, Subscriber
from tbox.control import request
from tbox.errors import Refused, TboxError
from tbox.ota.serve import running
from tbox.sim.broker import HOST, Broker, start_broker

EVIDENCE_NAME = "evidence.json"
VEHICLE = "demo-updates"
WAIT_S = 60.0  # for any one step; the whole takes about half a minute
POLL_S = 0.1
DRIVE = "cycSecs,cycMps\n0,0\n3,12\n3600,12\n"
TBOX = (sys.executable, "-m", "tbox")


def config_text(directory: Path, dbc_directory: Path, broker: Broker, repository_url: str) -> str:
    """Return the second agent's configuration: short waits, so that a chapter is not an evening."""
    dbc = ", ".join(f'"{dbc_directory / name}"' for name in DBC_FILES)
    return f"""\
[vehicle]
id = "{VEHICLE}"

[device]
state_directory = "state"

[[bus]]
interface = "tbox"
channel = "{directory / "bus"}"
dbc = [{dbc}]

[edge.mode]
park_for_s = 1.0

[ota]
metadata_url = "{repository_url}/metadata"
trial_crash_free_s = 3
trial_grace_s = 40

[uplink]
host = "{HOST}"
port = {broker.port}
mqtt = "{broker.mqtt}"
tls = false

[uplink.session]
backoff_base_ms = 500
backoff_max_ms = 2000
"""


class UpdateRide:
    """One chapter in `directory`, which exists. tell: called with each sentence of the story."""

    def __init__(self, directory: Path, dbc_directory: Path, tell: Callable[[str], None]) -> None:
        self._directory, self._dbc_directory, self._tell = directory, dbc_directory, tell
        self._sim: subprocess.Popen[bytes] | None = None
        self._subscriber: Subscriber | None = None
        # Without what diffs (the extra "publish") the second release goes out as a whole.
        self._bases = 3 if importlib.util.find_spec("bsdiff4") else 0

    def run(self, *, embedded_broker: bool) -> UpdateEvidence:
        """Live through the chapter. Raises RideError when a step does not come about."""
        factory = Factory(self._directory / "publisher")
        first = factory.image("1.0")
        factory.stage(first, 1)
        factory.publish()
        factory.provision(self._directory / "slots", first)
        with contextlib.ExitStack() as stack:
            broker = start_broker(str(self._directory / "broker"), embedded=embedded_broker)
            stack.callback(broker.stop)
            self._subscriber = Subscriber(broker, VEHICLE)
            stack.callback(self._subscriber.close)
            base = stack.enter_context(running(factory.repository))
            agent = stack.enter_context(self._agent(config_text(
                self._directory, self._dbc_directory, broker, base
            )))  # fmt: skip
            stack.callback(self._end_sim)
            delta_bytes, image_bytes = self._take_a_good_one(factory)
            self._lose_a_bad_one(factory)
            self._refuse_two(factory, first)
            exit_code = self._stop(agent)
            proof = self._subscriber.proof.result()
            return UpdateEvidence(
                delta_bytes=delta_bytes,
                image_bytes=image_bytes,
                records=[a.record for a in self._subscriber.arrivals if _of_updates(a.record)],
                received=proof.received,
                unexplained=proof.missing_unexplained,
                explained=proof.missing_explained,
                exit_code=exit_code,
            )

    # --- the steps ------------------------------------------------------------------------------------

    def _take_a_good_one(self, factory: Factory) -> tuple[int, int]:
        """Offer 2.0 on the road; return the bytes of its delta (0: none) and of its image."""
        self._drive("--cycle", self._drive_file(), "--once")
        self._until("the vehicle drives", lambda: (self._status("speed_kmh") or 0) > 10)
        release = factory.stage(factory.image("2.0"), 2, bases=self._bases)
        factory.publish()
        self._tell("2.0 is offered to a vehicle on the road")
        self._check()
        self._until("2.0 is installed", lambda: self._told("held", state="ready"))
        self._tell("2.0 stands in the other slot and waits until the vehicle is parked")
        self._drive("--cycle", "ready")
        self._until("2.0 runs", lambda: self._started("2.0"))
        self._tell("parked: 2.0 runs, on trial")
        self._until("2.0 proved itself", lambda: self._told("passed"))
        self._tell("2.0 has proved itself")
        return sum(delta.length for delta in release.deltas), release.length

    def _lose_a_bad_one(self, factory: Factory) -> None:
        factory.stage(factory.image("3.0", CRASHES), 3, bases=self._bases)
        factory.publish()
        self._check()
        self._until("3.0 starts", lambda: self._started("3.0"))
        self._tell("3.0 runs, and crashes after each start")
        self._until("2.0 is back", lambda: self._told("rolled-back"))
        self._tell("3.0 is given up: 2.0 runs again")

    def _refuse_two(self, factory: Factory, first: Path) -> None:
        factory.stage(factory.image("4.0"), 4, signatures=2, bases=0)
        with contextlib.suppress(Refused):
            factory.publish()
            raise RideError("the publisher let 4.0 out with two signatures", where=str(factory.directory))
        factory.publish_by_theft()
        self._refused_with("4.0 is refused", "signed by 2 of the 3")
        self._tell("4.0, signed with two keys of the three it needs, is refused")
        factory.stage(first, 1, delist=["1.0", "2.0", "3.0", "4.0"], edition="-again", bases=0)
        factory.publish()
        self._refused_with("1.0 is refused", "a downgrade")
        self._tell("1.0, signed well but older, is refused")

    def _refused_with(self, what: str, why: str) -> None:
        self._check()
        self._until(what, lambda: [b for b in self._told("refused") if why in b["reason"]])

    # --- the parts ------------------------------------------------------------------------------------

    def _drive_file(self) -> str:
        path = self._directory / "drive.csv"
        path.write_text(DRIVE, encoding="utf-8")
        return str(path)

    def _drive(self, *arguments: str) -> None:
        """Put the vehicle on the bus, in place of the one that drove before."""
        self._end_sim()
        self._sim = subprocess.Popen(
            [*TBOX, "sim", "--bus", f"tbox:{self._directory / 'bus'}", *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def _end_sim(self) -> None:
        if self._sim is not None:
            self._sim.terminate()
            self._sim.wait()

    @contextlib.contextmanager
    def _agent(self, config: str) -> Iterator[subprocess.Popen[bytes]]:
        path = self._directory / "tbox.toml"
        path.write_text(config, encoding="utf-8")
        slots, run = self._directory / "slots", self._directory / "run"
        with (self._directory / "agent.log").open("wb") as log:
            agent = subprocess.Popen(
                [*TBOX, "boot", "--dir", slots, "--run-dir", run, "--", "run", "--config", path],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        try:
            self._until("the agent starts", lambda: self._ask("status"))
            yield agent
        finally:
            if agent.poll() is None:
                agent.kill()
                agent.wait()

    def _stop(self, agent: subprocess.Popen[bytes]) -> int | None:
        assert self._subscriber is not None
        agent.terminate()
        subscriber = self._subscriber
        try:
            exit_code: int | None = agent.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            exit_code = None
        self._until("the last record", lambda: subscriber.complete)
        return exit_code

    def _ask(self, command: str, **more: str) -> dict[str, Any]:
        with contextlib.suppress(TboxError):
            return request(str(self._directory / "state" / "control.sock"), {"cmd": command, **more})
        return {}

    def _check(self) -> None:
        """Have the agent look at the repository now; it may just be starting."""
        self._until("the agent takes the command", lambda: self._ask("ota", do="check"))

    def _status(self, name: str) -> Any:
        return self._ask("status").get("edge", {}).get(name)

    def _records(self) -> list[dict[str, Any]]:
        assert self._subscriber is not None
        return [arrival.record for arrival in list(self._subscriber.arrivals)]

    def _told(self, event: str, **wanted: str) -> list[dict[str, Any]]:
        bodies = [r["body"] for r in self._records() if r["kind"] == "ota" and r["body"]["event"] == event]
        return [body for body in bodies if all(body.get(k) == v for k, v in wanted.items())]

    def _started(self, version: str) -> bool:
        return any(_is_start(r) and r["body"]["version"] == version for r in self._records())

    def _until(self, what: str, fact: Callable[[], object]) -> None:
        until = time.monotonic() + WAIT_S
        while time.monotonic() < until:
            if fact():
                return
            time.sleep(POLL_S)
        raise RideError(f"not within {WAIT_S:g} s: {what}", where=str(self._directory / "agent.log"))


def _is_start(record: dict[str, Any]) -> bool:
    return bool(record["kind"] == "event" and record["body"]["event"] == "start")


def _of_updates(record: dict[str, Any]) -> bool:
    return record["kind"] == "ota" or _is_start(record)


# --- from the demo's side ----------------------------------------------------------------------------------


class Chapter:
    """The chapter in its own process, so that neither ride waits for the other."""

    def __init__(self, directory: Path, dbc_directory: Path, *, embedded_broker: bool) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        command = [sys.executable, "-m", "tbox.bench.update_ride", str(directory), str(dbc_directory)]
        self._story = directory / "story.jsonl"
        with self._story.open("wb") as story, (directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                command + ["--embedded-broker"] * embedded_broker,
                stdin=subprocess.DEVNULL, stdout=story, stderr=log,
            )  # fmt: skip
        self._told = 0

    def news(self) -> list[str]:
        """Return the sentences since the last call."""
        lines = self._story.read_text(encoding="utf-8").splitlines()
        fresh, self._told = lines[self._told :], len(lines)
        return [str(json.loads(line)["story"]) for line in fresh]

    def finish(self) -> UpdateEvidence:
        """Wait for its end. Raises RideError with its last words."""
        code = self._process.wait(5 * WAIT_S)
        if code:
            lines = (self._directory / "log").read_text(errors="replace").splitlines()
            raise RideError(f"the chapter of updates failed: {' / '.join(lines[-1:])}")
        return msgspec.json.decode((self._directory / EVIDENCE_NAME).read_bytes(), type=UpdateEvidence)

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("dbc_directory", type=Path)
    parser.add_argument("--embedded-broker", action="store_true")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing it started is left behind

    def tell(sentence: str) -> None:
        print(json.dumps({"story": sentence}), flush=True)

    ride = UpdateRide(options.directory, options.dbc_directory, tell)
    try:
        evidence = ride.run(embedded_broker=options.embedded_broker)
    except TboxError as error:
        sys.exit(str(error))
    (options.directory / EVIDENCE_NAME).write_bytes(msgspec.json.encode(evidence))


if __name__ == "__main__":
    main()
