"""Runs the shipped daemon, the simulated vehicle and a judge at a real broker, for tests and benches."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tbox.control import ControlError, request
from tbox.record.proof import Proof, ProofResult
from tbox.sim.broker import Mqtt
from tbox.uplink.receive import Receiver
from tbox.uplink.session import UplinkSettings

DBC = Path(__file__).parents[1] / "dbc"
WAIT_S = 60.0  # generous: tests run side by side on two cores
POLL_S = 0.05
TBOX = [sys.executable, "-m", "tbox"]
FAST_SESSION = """\
[uplink.session]
ack_deadline_ms = 2000
connect_deadline_ms = 2000
backoff_base_ms = 200
backoff_max_ms = 500
"""


def wait_for(what: str, condition: Callable[[], Any], wait_s: float = WAIT_S) -> Any:
    """Return the first true answer; fail naming `what` when none comes."""
    until = time.monotonic() + wait_s
    while time.monotonic() < until:
        if answer := condition():
            return answer
        time.sleep(POLL_S)
    raise AssertionError(f"not within {wait_s:g} s: {what}")


def tbox(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    done = subprocess.run([*TBOX, *arguments], capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert not check or done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done


class Daemon:
    """`tbox run` in a directory of its own, on the bus `tbox:<directory>/bus` unless another is named."""

    def __init__(
        self, directory: Path, port: int, *, bus: str = "", more: str = "", mqtt: Mqtt = "5",
        bus_url: str = "", command: Sequence[str] = TBOX,
    ) -> None:  # fmt: skip
        self.directory, self.port, self.mqtt, self._command = directory, port, mqtt, command
        self.bus_url = bus_url or f"tbox:{directory / 'bus'}"
        interface, _, channel = self.bus_url.partition(":")
        self.config = directory / "tbox.toml"
        self.socket = str(directory / "state" / "control.sock")
        bus = bus or f'dbc = ["{DBC}/tbox_bms.dbc", "{DBC}/tbox_vehicle.dbc"]\nsend = [0x6F0]'
        self.config.write_text(
            f"""\
[vehicle]
id = "car"
[device]
state_directory = "state"
[rules]
files = ["rules.toml"]
[[bus]]
interface = "{interface}"
channel = "{channel}"
{bus}
[uplink]
host = "127.0.0.1"
port = {port}
mqtt = "{mqtt}"
{FAST_SESSION}{more}"""
        )
        (directory / "rules.toml").write_text("")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Daemon:
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self._command, "run", "--config", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_for("the daemon answers", lambda: self._alive() and self.status())
        return self

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def status(self) -> dict[str, Any]:
        with contextlib.suppress(ControlError):
            return request(self.socket, {"cmd": "status"})
        return {}

    def kill(self) -> None:
        """End it as a power cut would end the process."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def hang_up(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGHUP)

    def stop(self) -> int:
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(WAIT_S)

    def end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")

    def _alive(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log[-2000:]
        return True


class Vehicle:
    """`tbox sim` on a bus."""

    def __init__(self, bus_url: str, *arguments: str, command: Sequence[str] = TBOX) -> None:
        self._process = subprocess.Popen(
            [*command, "sim", "--bus", bus_url, *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def wait(self) -> dict[str, Any]:
        """Return what it reports when its time is over."""
        out, _ = self._process.communicate(timeout=WAIT_S * 2)
        report: dict[str, Any] = json.loads(out)
        return report

    def stop(self) -> dict[str, Any]:
        self._process.terminate()
        return self.wait()

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


class Judge:
    """Keeps every record that reaches the broker."""

    def __init__(self, port: int, mqtt: Mqtt = "5") -> None:
        self.records: list[dict[str, Any]] = []
        self._proof = Proof()
        self._lock = threading.Lock()
        settings = UplinkSettings(host="127.0.0.1", port=port, mqtt=mqtt)
        self._receiver = Receiver(settings, "car", self._take).start()

    def _take(self, topic: str, payload: bytes, _mono_ns: int, _retained: bool) -> None:
        with self._lock:
            record = self._proof.feed_message(topic, payload)
            if record is not None:
                self.records.append(record)

    def result(self) -> ProofResult:
        with self._lock:
            return self._proof.result()

    def complete(self) -> bool:
        with self._lock:
            return self._proof.stopped and self._proof.result().ok

    def bodies(self, kind: str, **wanted: Any) -> list[dict[str, Any]]:
        """Return the bodies of one kind whose fields are as wanted."""
        with self._lock:
            bodies = [record["body"] for record in self.records if record["kind"] == kind]
        return [body for body in bodies if all(body.get(k) == v for k, v in wanted.items())]

    def close(self) -> None:
        self._receiver.close()
