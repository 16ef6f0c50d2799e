"""The simulated vehicle on a real bus: frames written are counted, requests heard, a down bus is borne."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import can
import pytest
from click.testing import CliRunner

from tbox.bus.local import LocalBus
from tbox.cli.sim import sim
from tbox.errors import TboxError
from tbox.sim.packing import crc8
from tbox.sim.player import Player
from tbox.sim.simulator import SimSettings, Simulator

PATIENCE_S = 60.0  # a loaded machine is slow, a broken one silent
QUIET = SimSettings(key_on_sentinels_ms=0)
MAIN = "from tbox.cli.main import main; main()"


def request(counter: int) -> can.Message:
    body = bytes([counter, 1, 7, 1, 0, 0, 0])
    data = bytes([crc8(body + b"\xf0")]) + body
    return can.Message(arbitration_id=0x6F0, data=data, is_extended_id=False)


class Listener:
    """Another member of the bus: a thread that counts what it hears, by id, and keeps it."""

    def __init__(self, directory: Path) -> None:
        self.bus = LocalBus(str(directory))
        self.heard: list[can.Message] = []
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._listen)

    def __enter__(self) -> Listener:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join(PATIENCE_S)
        self.bus.shutdown()

    def _listen(self) -> None:
        while not self._closing.is_set():
            message = self.bus.recv(0.05)
            if message is not None:
                self.heard.append(message)

    def wait(self, count: int) -> Counter[int]:
        """Return what was heard once `count` frames came in all, or patience ended."""
        until = time.monotonic() + PATIENCE_S
        while len(self.heard) < count and time.monotonic() < until:
            time.sleep(0.01)
        return Counter(message.arbitration_id for message in list(self.heard))


@contextmanager
def local(directory: Path) -> Iterator[LocalBus]:
    bus = LocalBus(str(directory))
    try:
        yield bus
    finally:
        bus.shutdown()


def test_what_is_written_is_what_is_heard(tmp_path: Path) -> None:
    with Listener(tmp_path) as listener, local(tmp_path) as bus:
        player = Player(bus, Simulator(1, QUIET), speed=20.0)
        player.run(20.0)
        report = player.report()
        assert listener.wait(report["frames"]) == player.written
    assert report["frames"] == sum(report["ids"].values()) > 2900
    assert (report["unwritten"], report["not_taken"], report["seconds"]) == (0, 0, 20.0)


def test_a_flood_of_ten_thousand_frames_a_second_is_written_in_full(tmp_path: Path) -> None:
    with Listener(tmp_path) as listener, local(tmp_path) as bus:
        player = Player(bus, Simulator(1, SimSettings(rate_hz=10_000)))
        player.run(1.0)
        assert listener.wait(player.written.total()) == player.written
    assert player.written.total() == pytest.approx(10_000, rel=0.02)


def opened(message: can.Message) -> bool:
    """BMS_Status says: the request is taken, and the contactors are open."""
    return message.arbitration_id == 0x101 and message.data[2] & 7 == 0 and message.data[3] & 3 == 1


def test_a_request_on_the_bus_is_acknowledged_on_the_bus_and_opens_the_contactors(tmp_path: Path) -> None:
    with Listener(tmp_path) as listener, local(tmp_path) as bus:
        player = Player(bus, Simulator(1, SimSettings(cycle="ready")), speed=4.0)
        runner = threading.Thread(target=player.run)
        runner.start()
        until, counter = time.monotonic() + PATIENCE_S, 0
        while not any(map(opened, list(listener.heard))) and time.monotonic() < until:
            listener.bus.send(request(counter % 15))
            counter += 1
            time.sleep(0.05)
        player.stop()
        runner.join(PATIENCE_S)
        assert any(map(opened, listener.heard))
    assert player.report()["requests"]["accepted"] >= 1


class FlakyBus(can.BusABC):
    """A bus that is down for a while: the world's fault, planted."""

    def __init__(self) -> None:
        super().__init__(channel="flaky")
        self.channel_info = "flaky"
        self.down = False
        self.taken = 0

    def send(self, msg: can.Message, timeout: float | None = None) -> None:
        if self.down:
            raise can.CanOperationError("Network is down", errno.ENETDOWN)
        self.taken += 1

    def _recv_internal(self, timeout: float | None) -> tuple[can.Message | None, bool]:
        if self.down:
            raise can.CanOperationError("Network is down")
        return None, True


class Steps:
    """A clock that only moves when it is told to."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        self.now_ns += 20_000_000
        return self.now_ns


def test_frames_that_a_down_bus_refused_are_counted_apart_and_it_goes_on_when_it_is_up() -> None:
    bus = FlakyBus()
    player = Player(bus, Simulator(1, QUIET), mono_ns=Steps())
    player.run(2.0)
    bus.down = True
    player.run(4.0)
    assert (player.unwritten > 0) and player.written.total() == bus.taken
    bus.down = False
    written = bus.taken
    player.run(6.0)
    assert bus.taken > written and player.written.total() == bus.taken
    assert player.written.total() + player.unwritten == player._simulator.truth().frames
    bus.shutdown()


class FullQueue(FlakyBus):
    """A transmit queue that is full now and then: every tenth frame fits only at the third try."""

    def __init__(self) -> None:
        super().__init__()
        self.tries = 0

    def send(self, msg: can.Message, timeout: float | None = None) -> None:
        self.tries += 1
        if self.tries % 12 in (10, 11):
            raise can.CanOperationError("No buffer space available", errno.ENOBUFS)
        super().send(msg)


def test_a_full_transmit_queue_is_waited_for_and_nothing_is_lost() -> None:
    bus = FullQueue()
    player = Player(bus, Simulator(1, QUIET), mono_ns=Steps())
    player.run(3.0)
    assert player.unwritten == 0 and bus.tries > bus.taken
    assert player.written.total() == bus.taken == player._simulator.truth().frames
    bus.shutdown()


def test_after_a_long_stop_the_vehicle_waits_instead_of_bursting() -> None:
    class Jump(Steps):
        jumped = False

        def __call__(self) -> int:
            if self.now_ns > 2_000_000_000 and not self.jumped:
                self.jumped, self.now_ns = True, self.now_ns + 3600 * 1_000_000_000
            return super().__call__()

    bus = FlakyBus()
    player = Player(bus, Simulator(1, QUIET), mono_ns=Jump())
    player.run(5.0)
    assert bus.taken == pytest.approx(5 * 153, rel=0.02)
    bus.shutdown()


# --- the command ----------------------------------------------------------------------------------------


def command(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(sim, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    (line,) = result.stdout.splitlines()
    report: dict[str, Any] = json.loads(line)
    return report


def test_the_command_prints_one_line_of_json(tmp_path: Path) -> None:
    report = command("--bus", f"tbox:{tmp_path}/bus", "--seconds", "5", "--speed", "20", "--cycle", "city")
    assert report["frames"] == sum(report["ids"].values()) == pytest.approx(5 * 153, abs=25)


def test_one_seed_writes_the_same_frames_whatever_the_speed(tmp_path: Path) -> None:
    def frames(speed: str) -> list[bytes]:
        with Listener(tmp_path / speed) as listener:
            report = command(
                "--bus", f"tbox:{tmp_path / speed}", "--seconds", "3", "--speed", speed, "--seed", "9"
            )
            listener.wait(report["frames"])
        return [bytes(message.data) for message in listener.heard]

    assert frames("10") == frames("50") != []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fault", "meltdown@1s"], "module-overheat"),
        (["--fault", "crc-errors@1s:message=0x123"], "0x123"),
        (["--cycle", "moon"], "highway"),
        (["--cells-hz", "1e9"], "cells_hz"),
        (["--soc", "101"], "soc_percent"),
    ],
)
def test_bad_options_are_one_line_that_says_what_would_be_right(arguments: list[str], said: str) -> None:
    with pytest.raises(TboxError) as error:
        CliRunner().invoke(sim, ["--bus", "virtual:x", "--seconds", "0", *arguments], catch_exceptions=False)
    assert error.value.exit_code == 2 and said in str(error.value)


@pytest.mark.parametrize("bus", ["nonsense", "warp:9"])
def test_a_bus_that_cannot_be_is_refused(bus: str) -> None:
    with pytest.raises(TboxError):
        CliRunner().invoke(sim, ["--bus", bus, "--seconds", "0"], catch_exceptions=False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order_with_its_count(tmp_path: Path, number: int) -> None:
    with Listener(tmp_path) as listener:
        process = subprocess.Popen(
            [sys.executable, "-c", MAIN, "sim", "--bus", f"tbox:{tmp_path}", "--fault", "isolation-loss@0s"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        listener.wait(50)
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, err
        report = json.loads(out)
        assert listener.wait(report["frames"]).total() == report["frames"] >= 50
