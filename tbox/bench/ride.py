"""The first ride: a simulated vehicle drives, loses coverage, overheats, recovers, arrives. Judges nothing.

The agent is the daemon as it is shipped, in a process of its own, on a CAN-FD bus between processes. This
process plays the vehicle, cuts the link without a word, and listens at the broker.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tbox.bench.judge import Arrival, Evidence
from tbox.bus.reader import open_bus, parse_bus_url
from tbox.control import ControlError, request
from tbox.errors import TboxError
from tbox.record.proof import Proof
from tbox.sim.broker import HOST, Broker, start_broker
from tbox.sim.faults import Fault, make_fault
from tbox.sim.layout import ISOLATION_REQUEST_ID
from tbox.sim.network import LinkCutter
from tbox.sim.player import Player
from tbox.sim.simulator import SimSettings, Simulator
from tbox.sim.vehicle import CYCLES
from tbox.uplink.receive import Receiver
from tbox.uplink.session import UplinkSettings

SECONDS_DEFAULT = 80.0
SECONDS_MIN = 30.0
VEHICLE = "demo"
DBC_FILES = ("tbox_bms.dbc", "tbox_vehicle.dbc")
READY_WAIT_S = 60.0
DRAIN_WAIT_S = 60.0
STOP_WAIT_S = 60.0
POLL_S = 0.25

# The story, in shares of the ride.
TUNNEL_BEGINS, OVERHEAT_BEGINS, DRIFT_BEGINS, TUNNEL_ENDS = 0.17, 0.22, 0.27, 0.62
OVERHEAT_SHARE, DRIFT_SHARE = 0.25, 0.40
OVERHEAT_S_MIN = 18.0  # a short ride still lets the module reach its critical temperature
# A hot day, so that a module warming by less than 1 degC/s (no runaway) gets there within the ride.
AMBIENT_C, PACK_C, OVERHEAT_W = 35.0, 41.0, 650.0
BACKLOG_RECORDS_S, LIVE_RECORDS = 10, 10  # a thin link after the tunnel, so that one sees who goes first
DRIFT_LEAK_A, DRIFT_RAMP_S = 200.0, 4.0

# Which rules may tell of a fault, any one of them: what shows first depends on the load of the moment.
TOLD_BY = {
    "module-overheat": frozenset({"over-temperature-discharge", "thermal-runaway"}),
    "cell-drift": frozenset({"cell-drift", "cell-voltage-drop", "imbalance", "imbalance-sigma"}),
}

Watch = Callable[[float, dict[str, Any], bool, list[tuple[float, str]]], None]


class RideError(TboxError):
    """The ride could not be made; nothing is said about the proof."""

    exit_code = 1


class Subscriber:
    """Listens at the broker, not through the tunnel, and keeps every record with the time it came."""

    def __init__(self, broker: Broker, vehicle: str) -> None:
        self.arrivals: list[Arrival] = []
        self.proof = Proof()
        self._lock = threading.Lock()
        mqtt: Literal["5", "3.1.1"] = "5" if broker.mqtt == "5" else "3.1.1"
        settings = UplinkSettings(host=HOST, port=broker.port, mqtt=mqtt)
        self._receiver = Receiver(settings, vehicle, self._on_message).start()

    def _on_message(self, topic: str, payload: bytes, _mono_ns: int, _retained: bool) -> None:
        wall_ns = time.time_ns()
        with self._lock:
            before = self.proof.received
            record = self.proof.feed_message(topic, payload)
            if record is not None and self.proof.received > before:
                self.arrivals.append(Arrival(wall_ns, record))

    @property
    def complete(self) -> bool:
        """Whether the vehicle said where it ended and everything up to there has come."""
        with self._lock:
            return self.proof.stopped and self.proof.result().missing_unexplained == 0

    def close(self) -> None:
        self._receiver.close()


@dataclass
class Ride:
    """One ride in `directory`. `run` blocks until it is over and returns the evidence."""

    directory: Path
    dbc_directory: Path
    seconds: float = SECONDS_DEFAULT
    seed: int = 1
    embedded_broker: bool = False
    story: list[tuple[float, str]] = field(default_factory=list)

    def run(self, watch: Watch) -> Evidence:
        """Drive. Raises RideError when a part does not start or dies."""
        with contextlib.ExitStack() as stack:
            broker = start_broker(str(self.directory / "broker"), embedded=self.embedded_broker)
            stack.callback(broker.stop)
            cutter = stack.enter_context(LinkCutter(broker.port))
            subscriber = Subscriber(broker, VEHICLE)
            stack.callback(subscriber.close)
            agent = stack.enter_context(self._agent(cutter.port, broker.mqtt))
            bus = open_bus(parse_bus_url(f"tbox:{self.directory / 'bus'}"))
            stack.callback(bus.shutdown)
            player = Player(bus, Simulator(self.seed, self._settings(), self._faults()))
            cut = self._drive(player, cutter, agent, watch)
            exit_code = self._arrive(agent, subscriber)
            report = player.report()
            return Evidence(
                frames_written=report["frames"],
                frames_unwritten=report["unwritten"],
                arrivals=list(subscriber.arrivals),
                proof=subscriber.proof.result(),
                cut_wall_ns=cut,
                told_by={fault.name: TOLD_BY[fault.name] for fault in self._faults()},
                contactors_opened=len(report["contactors_opened_s"]),
                exit_code=exit_code,
            )

    # --- the parts ------------------------------------------------------------------------------------

    def _settings(self) -> SimSettings:
        """The demo cycle, stretched or pressed to the length of the ride."""
        phases = CYCLES["demo"]
        stretch = self.seconds / sum(phase.seconds for phase in phases)
        lines, t_s = ["cycSecs,cycMps", "0,0"], 0.0
        for phase in phases:
            t_s += phase.seconds * stretch
            lines.append(f"{t_s:.3f},{phase.speed_kmh / 3.6:.3f}")
        path = self.directory / "ride.csv"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return SimSettings(cycle=str(path), loop=False, ambient_c=AMBIENT_C, pack_c=PACK_C)

    def _faults(self) -> list[Fault]:
        overheat_s = max(OVERHEAT_S_MIN, OVERHEAT_SHARE * self.seconds)
        return [
            make_fault(
                "module-overheat", OVERHEAT_BEGINS * self.seconds, duration_s=overheat_s, power=OVERHEAT_W
            ),
            make_fault(
                "cell-drift", DRIFT_BEGINS * self.seconds, duration_s=DRIFT_SHARE * self.seconds,
                leak=DRIFT_LEAK_A, ramp=DRIFT_RAMP_S,
            ),
        ]  # fmt: skip

    @contextlib.contextmanager
    def _agent(self, port: int, protocol: str) -> Iterator[subprocess.Popen[bytes]]:
        """Start `tbox run` and wait until it answers; end it at the latest when the ride is over."""
        config = self.directory / "tbox.toml"
        config.write_text(self._config(port, protocol), encoding="utf-8")
        with (self.directory / "agent.log").open("wb") as log:
            agent = subprocess.Popen(
                [sys.executable, "-m", "tbox", "run", "--config", str(config)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        try:
            self._wait_until_ready(agent)
            yield agent
        finally:
            if agent.poll() is None:
                agent.kill()
                agent.wait()

    def _config(self, port: int, protocol: str) -> str:
        dbc = ", ".join(f'"{self.dbc_directory / name}"' for name in DBC_FILES)
        return f"""\
[vehicle]
id = "{VEHICLE}"

[device]
state_directory = "state"
health_s = 10

[[bus]]
interface = "tbox"
channel = "{self.directory / "bus"}"
dbc = [{dbc}]
send = [0x{ISOLATION_REQUEST_ID:X}]

[edge.isolation]
mode = "send"

[spool]
backlog_records_s = {BACKLOG_RECORDS_S}
live_records_max = {LIVE_RECORDS}

[privacy]
journeys = true
position = true

[uplink]
host = "{HOST}"
port = {port}
mqtt = "{protocol}"
tls = false

[uplink.session]
ack_deadline_ms = 3000
connect_deadline_ms = 3000
backoff_base_ms = 500
backoff_max_ms = 2000
"""

    def _wait_until_ready(self, agent: subprocess.Popen[bytes]) -> None:
        until = time.monotonic() + READY_WAIT_S
        while time.monotonic() < until and agent.poll() is None:
            if self._status().get("uplink", {}).get("state") == "online":
                return
            time.sleep(POLL_S)
        raise RideError(f"the agent does not start: {self._last_words()}", where=str(self.directory))

    def _last_words(self) -> str:
        lines = (self.directory / "agent.log").read_text(errors="replace").splitlines()
        return " / ".join(lines[-3:]) or "it said nothing"

    def _status(self) -> dict[str, Any]:
        with contextlib.suppress(ControlError):
            return request(str(self.directory / "state" / "control.sock"), {"cmd": "status"})
        return {}

    # --- the story ------------------------------------------------------------------------------------

    def _drive(
        self, player: Player, cutter: LinkCutter, agent: subprocess.Popen[bytes], watch: Watch
    ) -> tuple[int, int]:
        """Play the vehicle and the tunnel; return the wall times of its ends."""
        driver = threading.Thread(target=player.run, args=(self.seconds,), name="vehicle", daemon=True)
        begin = time.monotonic()
        driver.start()
        cut_ns = [0, 0]

        def enter_tunnel() -> None:
            cutter.cut()
            cut_ns[0] = time.time_ns()

        def leave_tunnel() -> None:
            cut_ns[1] = time.time_ns()
            cutter.restore()

        chapters: list[tuple[float, str, Callable[[], None] | None]] = [
            (0.0, "the vehicle drives off", None),
            (TUNNEL_BEGINS, "a tunnel: the link falls silent, nothing is closed", enter_tunnel),
            (OVERHEAT_BEGINS, "a module loses its coolant and heats up", None),
            (DRIFT_BEGINS, "a cell begins to drain through an internal leak", None),
            (TUNNEL_ENDS, "coverage returns: live first, then the backlog", leave_tunnel),
        ]
        while driver.is_alive():
            elapsed = time.monotonic() - begin
            while chapters and elapsed >= chapters[0][0] * self.seconds:
                _, text, act = chapters.pop(0)
                self.story.append((elapsed, text))
                if act is not None:
                    act()
            if agent.poll() is not None:
                raise RideError(f"the agent died: {self._last_words()}", where=str(self.directory))
            watch(elapsed, self._status(), not (cut_ns[0] and not cut_ns[1]), self.story)
            driver.join(POLL_S)
        self.story.append((time.monotonic() - begin, "arrived"))
        watch(self.seconds, self._status(), True, self.story)
        return cut_ns[0], cut_ns[1]

    def _arrive(self, agent: subprocess.Popen[bytes], subscriber: Subscriber) -> int | None:
        """Let the backlog drain, stop the agent in order, wait for what it still had to say."""
        until = time.monotonic() + DRAIN_WAIT_S
        while time.monotonic() < until and self._status().get("spool", {}).get("records", 0) > 0:
            time.sleep(POLL_S)
        agent.terminate()
        try:
            exit_code: int | None = agent.wait(STOP_WAIT_S)
        except subprocess.TimeoutExpired:
            exit_code = None
        until = time.monotonic() + DRAIN_WAIT_S
        while time.monotonic() < until and not subscriber.complete:
            time.sleep(POLL_S)
        return exit_code
