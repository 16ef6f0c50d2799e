"""The daemon as a firmware engineer meets it: real processes, a real broker, kill -9, bad files."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tbox import config as configuration
from tbox.agent import Agent
from tbox.clock import WALL_FLOOR_NS, WALL_JUMP_NS_MIN, SystemClock, kernel_quality
from tbox.control import request
from tbox.model import NS_PER_S, TimeQuality
from tbox.record.codec import decode_payload
from tbox.sim.broker import MosquittoBroker, find_mosquitto, free_port
from tbox.sim.network import LinkCutter
from tests.daemon import DBC, TBOX, WAIT_S, Daemon, Judge, Vehicle, tbox, wait_for

needs_mosquitto = [
    pytest.mark.mosquitto,
    pytest.mark.slow,
    pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed"),
]


class Bench:
    """A broker, the link to it, a daemon, a judge; vehicles come and go."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._stack = stack
        self.broker = stack.enter_context(MosquittoBroker(str(directory / "broker")).start())
        self.link = stack.enter_context(LinkCutter(self.broker.port))
        self.judge = Judge(self.broker.port)
        stack.callback(self.judge.close)
        self.daemon = Daemon(directory, self.link.port)
        stack.callback(self.daemon.end)

    def vehicle(self, *arguments: str) -> Vehicle:
        vehicle = Vehicle(self.daemon.bus_url, *arguments)
        self._stack.callback(vehicle.end)
        return vehicle

    def frames_decoded(self) -> int:
        status = self.daemon.status()
        return int(status["ledger"]["decode"]["out"]) if status else 0


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(tmp_path, stack)


class TestWholeChain:
    pytestmark = needs_mosquitto

    def test_every_frame_and_record_of_a_drive_is_accounted_for(self, bench: Bench) -> None:
        bench.daemon.start()
        report = bench.vehicle("--seconds", "5").wait()
        wait_for("all frames decoded", lambda: bench.frames_decoded() == report["frames"])
        assert bench.daemon.stop() == 0
        wait_for("all records at the broker", bench.judge.complete)
        assert bench.judge.result().missing_explained == 0
        ledger = bench.judge.bodies("event", event="stop")[0]["ledger"]
        assert ledger["decode"]["into"] == report["frames"]
        assert ledger["bus"]["dropped"] == {}
        assert bench.judge.bodies("telemetry")
        assert not bench.judge.bodies("alarm")
        (offset,) = bench.judge.bodies("event", event="offset")
        assert offset["first"] is True and offset["quality"] == kernel_quality().name.lower()

    def test_kill_9_in_a_gap_loses_nothing_committed_and_the_open_tick_is_told(self, bench: Bench) -> None:
        bench.daemon.start()
        bench.vehicle()
        wait_for("records at the broker", lambda: bench.judge.result().received > 3)
        bench.link.cut()
        rows = bench.daemon.status()["spool"]["records"]
        wait_for("a backlog on flash", lambda: bench.daemon.status()["spool"]["records"] > rows + 5)
        bench.daemon.kill()
        bench.link.restore()
        bench.daemon.start()
        wait_for("the second start", lambda: len(bench.judge.bodies("event", event="start")) == 2)
        wait_for("the backlog at the broker", lambda: bench.judge.result().ok)
        told = bench.judge.bodies("event", event="start")[1]["previous"]
        assert told["clean"] is False and told["last_id"] is not None
        assert bench.daemon.stop() == 0
        wait_for("everything at the broker", bench.judge.complete)
        first = bench.judge.result().starts[0]
        assert first.end == "next start" and first.committed == told["last_id"] & 0xFFFF_FFFF
        assert {gap.why for gap in bench.judge.result().gaps_explained} <= {"open tick"}

    def test_a_broker_that_restarts_costs_nothing(self, bench: Bench) -> None:
        bench.daemon.start()
        bench.vehicle()
        wait_for("records at the broker", lambda: bench.judge.result().received > 3)
        bench.broker.stop()
        before = bench.judge.result().received
        wait_for("a backlog", lambda: bench.daemon.status()["spool"]["records"] > 2)
        bench.broker.start()
        wait_for("records after the restart", lambda: bench.judge.result().received > before + 3)
        assert bench.daemon.stop() == 0
        wait_for("everything at the broker", bench.judge.complete)

    def test_a_bus_that_falls_silent_is_alarmed_and_clears_when_it_comes_back(self, bench: Bench) -> None:
        bench.daemon.start()
        first = bench.vehicle()
        wait_for("frames", lambda: bench.frames_decoded() > 100)
        first.end()
        wait_for("the alarm", lambda: bench.judge.bodies("alarm", alarm="bms-silent", event="raise"))
        bench.vehicle()
        wait_for("its end", lambda: bench.judge.bodies("alarm", alarm="bms-silent", event="clear"))
        assert bench.daemon.stop() == 0
        wait_for("everything at the broker", bench.judge.complete)

    def test_sighup_takes_good_thresholds_and_refuses_bad_ones_without_stopping(self, bench: Bench) -> None:
        bench.daemon.start()
        rules = bench.daemon.directory / "rules.toml"
        rules.write_text('[rule.soc-low]\nbands = [ { level = "warning", limit = "20 fathoms" } ]\n')
        bench.daemon.hang_up()
        refused = wait_for("the refusal", lambda: bench.judge.bodies("event", event="reload", ok=False))
        assert f"{rules}:2" in refused[0]["why"] and "fathoms" in refused[0]["why"]
        rules.write_text(
            '[rule.soc-low]\nbands = [ { level = "warning", limit = "90 percent", clear = "95 percent" } ]\n'
        )
        bench.daemon.hang_up()
        wait_for("the acceptance", lambda: bench.judge.bodies("event", event="reload", ok=True))
        bench.vehicle()
        wait_for("the new threshold at work", lambda: bench.judge.bodies("alarm", alarm="soc-low"))
        assert bench.daemon.stop() == 0

    def test_a_latched_alarm_stands_until_it_is_reset_by_hand(self, bench: Bench) -> None:
        rule = '[rule.hvil-open]\nlatch = true\nclear_for = "0 s"\n'
        (bench.daemon.directory / "rules.toml").write_text(rule)
        bench.daemon.start()
        bench.vehicle("--fault", "hvil-open@3s:duration=3s")
        wait_for("it is latched", lambda: bench.judge.bodies("alarm", alarm="hvil-open", state="latched"))
        assert not bench.judge.bodies("alarm", alarm="hvil-open", event="clear")
        reset = ["reset-alarms", "--config", str(bench.daemon.config)]
        assert json.loads(tbox(*reset, "hvil-open").stdout) == {"ended": 1}
        (clear,) = wait_for("its end", lambda: bench.judge.bodies("alarm", alarm="hvil-open", event="clear"))
        assert "reset" in clear["text"]
        again = tbox(*reset, "hvil-open", check=False)
        assert again.returncode == 1 and "no alarm of hvil-open stands" in again.stderr
        assert bench.daemon.stop() == 0
        wait_for("everything at the broker", bench.judge.complete)

    def test_status_and_tail_show_a_running_daemon(self, bench: Bench) -> None:
        bench.daemon.start()
        bench.vehicle()
        # A vehicle's first frames after key-on say "not available".
        wait_for("a speed", lambda: bench.daemon.status()["edge"]["speed_kmh"] is not None)
        status = json.loads(tbox("status", "--config", str(bench.daemon.config)).stdout)
        assert status["uplink"]["state"] == "online" and status["edge"]["speed_kmh"] is not None
        with subprocess.Popen(
            [*TBOX, "tail", "--socket", bench.daemon.socket], stdout=subprocess.PIPE, text=True
        ) as tail:
            assert tail.stdout is not None
            assert json.loads(tail.stdout.readline())["kind"] in ("telemetry", "event", "alarm", "health")
            tail.terminate()

    def test_a_live_spool_is_looked_into_through_the_daemon(self, bench: Bench) -> None:
        bench.daemon.start()
        bench.link.cut()
        bench.vehicle()
        wait_for("a backlog", lambda: bench.daemon.status()["spool"]["records"] > 5)
        spool = str(bench.daemon.directory / "state" / "spool")
        assert json.loads(tbox("spool", "stat", spool).stdout)["records"] > 5
        newest = [json.loads(line) for line in tbox("spool", "tail", "-n", "3", spool).stdout.splitlines()]
        assert len(newest) == 3 and all(record["payload"] for record in newest)
        assert json.loads(tbox("spool", "verify", spool).stdout)["unreadable"] == 0
        assert bench.daemon.stop() == 0
        stopped = json.loads(tbox("spool", "verify", spool).stdout)
        assert stopped["whole"] and stopped["records"] > 5 and stopped["unreadable"] == 0

    def test_a_second_daemon_on_the_same_state_refuses(self, bench: Bench) -> None:
        bench.daemon.start()
        refused = tbox("run", "--config", str(bench.daemon.config), check=False)
        assert refused.returncode != 0
        assert "stop the agent that runs there" in refused.stderr
        assert bench.daemon.status()


def planted(daemon: Daemon, plant: str) -> subprocess.CompletedProcess[str]:
    """Run the shipped daemon to its end, with one line of Python in it that the release has not."""
    program = f"import sys\n{plant}\nfrom tbox.cli.main import main\nmain()"
    return subprocess.run(
        [sys.executable, "-c", program, "run", "--config", str(daemon.config)],
        capture_output=True, text=True, timeout=WAIT_S, check=False,
    )  # fmt: skip


class TestABugInside:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("plant", "thread"),
        [
            ("import tbox.bus.local as m; m.LocalBus.recv_frames = lambda *_: 1 / 0", "bus_thread_died"),
            ("import tbox.flow as m; m.Flow.step = lambda *_: 1 / 0", "pipeline_thread_died"),
        ],
    )
    def test_an_error_in_a_thread_ends_the_daemon_in_order_and_the_next_start_says_so(
        self, tmp_path: Path, plant: str, thread: str
    ) -> None:
        """Where it went unnoticed, the bus would be deaf for ever."""
        daemon = Daemon(tmp_path, free_port())
        done = planted(daemon, plant)
        assert done.returncode == 1
        assert thread in done.stderr and "ZeroDivisionError" in done.stderr and "stopped" in done.stderr
        with ExitStack() as stack:
            stack.callback(daemon.end)
            daemon.start()
            assert daemon.stop() == 0
        exported = tbox("spool", "export", str(tmp_path / "state" / "spool")).stdout.splitlines()
        records = [decode_payload(base64.b64decode(json.loads(line)["payload"])) for line in exported]
        starts = [r["body"] for r in records if r["kind"] == "event" and r["body"]["event"] == "start"]
        assert [body["previous"] and body["previous"]["clean"] for body in starts] == [None, False]

    def test_a_thread_that_computes_holds_the_others_up_for_a_millisecond_at_a_time(
        self, tmp_path: Path
    ) -> None:
        """Python's own five make a waker 5 ms late, and up to 80."""
        plant = (
            "from tbox.agent import Agent; "
            "Agent.start = lambda self: (print(sys.getswitchinterval()), sys.exit(0))"
        )
        assert planted(Daemon(tmp_path, free_port()), plant).stdout == "0.001\n"


class Clocks:
    """The machine's clocks, to be set."""

    def __init__(self) -> None:
        self.ahead_ns, self.quality = 17, TimeQuality.RTC  # of the wall clock before the monotonic one

    def system(self) -> SystemClock:
        return SystemClock(wall_ns=lambda: time.monotonic_ns() + self.ahead_ns, quality=lambda: self.quality)


def test_a_clock_that_is_set_jumps_or_finds_a_keeper_is_told_by_how_much(tmp_path: Path) -> None:
    """A Pi without a battery-backed clock: 1970, then a guess, then what a time daemon knows."""
    daemon, clocks = Daemon(tmp_path, 1), Clocks()
    agent = Agent(configuration.load(str(daemon.config)), clocks.system())

    def offsets() -> list[dict[str, Any]]:
        assert agent.supervise()
        records = request(daemon.socket, {"cmd": "spool-tail", "lines": 100})["records"]
        bodies = [decode_payload(base64.b64decode(record["payload"]))["body"] for record in records]
        return [body for body in bodies if body.get("event") == "offset"]

    agent.start()
    try:
        assert offsets() == []
        clocks.ahead_ns = WALL_FLOOR_NS + 10**17
        (first,) = wait_for("the first time", offsets)
        assert first["first"] is True and first["quality"] == "rtc" and first["wall_ns"] > WALL_FLOOR_NS
        assert abs(first["step_ns"] - clocks.ahead_ns) < WALL_JUMP_NS_MIN
        clocks.ahead_ns, clocks.quality = clocks.ahead_ns + 3600 * NS_PER_S, TimeQuality.NTP
        _, second = wait_for("the jump", lambda: offsets()[1:] and offsets())
        assert second["first"] is False and second["quality"] == "ntp"
        assert abs(second["step_ns"] - 3600 * NS_PER_S) < WALL_JUMP_NS_MIN
        assert agent.clock.now().quality is TimeQuality.NTP
    finally:
        agent.stop(0)


class TestBadInput:
    def test_a_dbc_that_does_not_load_is_named_and_the_others_keep_working(self, tmp_path: Path) -> None:
        bad = tmp_path / "bad.dbc"
        bad.write_text('BO_ 1 M: 8 X\n SG_ S : 0|8@1+ (1,0) [0|1] "" X\nBO_ 1 N: 8 X\n')
        good = f'"{DBC}/tbox_bms.dbc"'
        lenient = Daemon(tmp_path, 1, bus=f'dbc = ["{bad}", {good}]')
        done = tbox("run", "--check", "--config", str(lenient.config))
        assert json.loads(done.stdout) == {"ok": True}
        assert "dbc_left_out" in done.stderr and "bad.dbc:3" in done.stderr
        for daemon in (
            Daemon(tmp_path, 1, bus=f'dbc = ["{bad}", {good}]', more="[decode]\nstrict = true\n"),
            Daemon(tmp_path, 1, bus=f'dbc = ["{bad}"]'),
        ):
            done = tbox("run", "--check", "--config", str(daemon.config), check=False)
            assert done.returncode == 2 and "bad.dbc:3" in done.stderr

    @pytest.mark.parametrize(
        ("edit", "said"),
        [
            (('id = "car"', 'id = "car"\ncolour = "red"'), "tbox.toml:3: unknown key 'colour'"),
            (("[device]", "[device]\nhealth_min = 1"), "did you mean 'health_s'?"),
            (("port = 1", "port = 70000"), "<= 65535"),
            (("tbox_bms.dbc", "none.dbc"), "none.dbc"),
            (('interface = "tbox"', 'interface = "tbocks"'), "tbocks"),
            (('id = "car"', ""), "either id or vin"),
            (("send = [0x6F0]", "send = [0x6F0"), "tbox.toml:"),
            (("[vehicle]", "vehicle]"), "tbox.toml:1: is not TOML"),
        ],
    )
    def test_a_bad_configuration_is_one_line_and_exit_2(
        self, tmp_path: Path, edit: tuple[str, str], said: str
    ) -> None:
        daemon = Daemon(tmp_path, 1, more="[decode]\nstrict = true\n")
        text = daemon.config.read_text()
        assert edit[0] in text
        daemon.config.write_text(text.replace(*edit, 1))
        done = tbox("run", "--config", str(daemon.config), check=False)
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1
        assert said in done.stderr

    def test_a_bad_unit_in_the_thresholds_names_file_line_and_mend(self, tmp_path: Path) -> None:
        daemon = Daemon(tmp_path, 1)
        rules = tmp_path / "rules.toml"
        rules.write_text('[rule.soc-low]\n\nbands = [ { level = "warning", limit = "20 kg" } ]\n')
        done = tbox("run", "--config", str(daemon.config), check=False)
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1
        assert f"{rules}:3" in done.stderr and "percent" in done.stderr

    def test_a_state_directory_that_cannot_be_made_is_one_line(self, tmp_path: Path) -> None:
        daemon = Daemon(tmp_path, 1)
        (tmp_path / "state").write_text("a file is in the way")
        done = tbox("run", "--config", str(daemon.config), check=False)
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1 and "state_directory" in done.stderr

    def test_a_good_configuration_is_said_to_be_good(self, tmp_path: Path) -> None:
        daemon = Daemon(tmp_path, 1)
        assert json.loads(tbox("run", "--check", "--config", str(daemon.config)).stdout) == {"ok": True}
        assert DBC.is_dir()
