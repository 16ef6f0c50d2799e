"""The whole daemon against a plain pipeline: CPU, memory, and the way from a critical frame to the request;
and how old a live record is at the broker, while a backlog drains beside it.

Both read the bus between processes (interface "tbox"), where `tbox sim` writes; CPU is what the kernel booked
for the whole process, user and system, over the same seconds. Once more they read SocketCAN, on a kernel
without CAN by way of stand_in.py, and user-mode time is told from the kernel's, as bench_ingest does.
The peer is tests/bench/peer_pipeline.py.
"""

from __future__ import annotations

import json
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import can
import numpy as np

from tbox.bus.local import LocalBus
from tbox.model import NS_PER_MS, NS_PER_S, Now
from tbox.record.codec import PayloadError, decode_payload
from tbox.sim.broker import find_mosquitto, start_broker
from tbox.sim.layout import ISOLATION_REQUEST_ID
from tbox.uplink.receive import Receiver
from tbox.uplink.session import UplinkSettings
from tests.bench import stand_in
from tests.bench.bench_ingest import INTERFACE, SYSCALL_US, has_vcan, where
from tests.bench.bench_spool import fill, open_spool, portions
from tests.bench.harness import Result
from tests.daemon import DBC, TBOX, Daemon, Vehicle

RATES = ((10_000, 1 / 10), (1_340, 1 / 2))  # frames a second, share of the peer's CPU to reach
SETTLE_S, MEASURE_S = 4.0, 8.0
USER_MEASURE_S, CALLS_MEASURE_S = 20.0, 3.0
RUNS = 3
RSS_LIMIT_MIB = {10_000: 128, 1_340: 90}
RING_S = 31.0  # the black box's ring is full after 30 s
LATENCY_RATE = 10_000
LATENCY_MS_MAX = 20.0
PROBES_ID, PROBES = 0x7E0, 64  # one round for each probe: none is taken for a flapping alarm
COOL_RAW, HOT_RAW = 65, 160  # 25 and 120 degC
HOT_S = 0.1
WITHDRAWN_S = 0.8  # three frames 200 ms apart; then nothing presses any more
PHASE_S = 0.003
AGE_RATE, AGE_S = 1_340, 40.0
AGE_BACKLOG, AGE_BACKLOG_BYTES = 40_000, 2_600  # at 1 MiB/s it lasts longer than the measurement
AGE_GROWTH_MAX = 1.05  # a twentieth of some 200 ms: less than one round trip of a mobile network
AGE_RECORD_MS = 100
DBC_FILES = [str(DBC / "tbox_bms.dbc"), str(DBC / "tbox_vehicle.dbc")]


def cases() -> Iterator[Result]:
    with tempfile.TemporaryDirectory(prefix="tbox-bench-") as place:
        for rate, share in RATES:
            yield from _load(Path(place) / f"load-{rate}", rate, share)
        yield _socketcan(Path(place) / "socketcan")
        yield _latency(Path(place) / "latency")
        yield _age(Path(place) / "age")


def _load(place: Path, rate: int, share: float) -> Iterator[Result]:
    ours, peers, rss = [], [], 0.0
    for run in range(RUNS):
        here = place / str(run)
        here.mkdir(parents=True)
        with _daemon(here) as daemon, _vehicle(daemon.bus_url, rate):
            pid = daemon.pid
            time.sleep(RING_S if run == 0 else SETTLE_S)
            ours.append(_cpu_share(pid))
            rss = max(rss, _rss_mib(pid))
        bus = f"tbox:{here / 'peer'}"
        with _peer(bus) as peer, _vehicle(bus, rate):
            time.sleep(SETTLE_S)
            peers.append(_cpu_share(peer.pid))
    ratio = statistics.median(b / a for a, b in zip(ours, peers, strict=True))
    yield Result(
        bench="agent", case=f"CPU at {rate} frames/s",
        value=100 * statistics.median(ours), unit="% of a core",
        peer="Notifier + cantools + JSON", peer_value=100 * statistics.median(peers), ratio=ratio,
        goal=f"<= {share:g} of it", ok=ratio >= 1 / share, note="bus between processes, this kernel",
    )  # fmt: skip
    yield Result(
        bench="agent", case=f"memory at {rate} frames/s, ring full", value=rss, unit="MiB RSS",
        goal=f"<= {RSS_LIMIT_MIB[rate]}", ok=rss <= RSS_LIMIT_MIB[rate],
    )  # fmt: skip


def _socketcan(place: Path) -> Result:
    """User-mode time plus SYSCALL_US for each system call, of the whole process, both on SocketCAN."""
    url, receive, send = f"socketcan:{INTERFACE}", [sys.executable], [sys.executable]
    if not has_vcan():
        url = f"socketcan:{stand_in.INTERFACE}"
        receive = [sys.executable, stand_in.__file__, str(_free_port()), "receive"]
        send = [*receive[:-1], "send"]
    tbox = ["-m", "tbox"] if has_vcan() else ["tbox"]
    ours, peers = [], []
    for run in range(RUNS):
        here = place / str(run)
        here.mkdir(parents=True)
        with (
            _daemon(here, bus_url=url, command=[*receive, *tbox]) as daemon,
            _vehicle(url, RATES[0][0], [*send, *tbox]),
        ):
            time.sleep(SETTLE_S)
            ours.append(_user_share(daemon.pid))
        with _peer(url, receive) as peer, _vehicle(url, RATES[0][0], [*send, *tbox]):
            time.sleep(SETTLE_S)
            peers.append(_user_share(peer.pid))
    ratio = statistics.median(b / a for a, b in zip(ours, peers, strict=True))
    return Result(
        bench="agent", case=f"user-mode time and system calls at {RATES[0][0]} frames/s on SocketCAN",
        value=100 * statistics.median(ours), unit="% of a core",
        peer="Notifier + cantools + JSON", peer_value=100 * statistics.median(peers), ratio=ratio,
        goal=f"<= {RATES[0][1]:g} of it", ok=ratio >= 1 / RATES[0][1],
        note=f"{where()}; plus {SYSCALL_US} us for each system call",
    )  # fmt: skip


def _user_share(pid: int) -> float:
    """Return the share of a core that user mode takes over the next seconds, its system calls added."""
    begin, began, at = _user_ticks(pid), _cpu_s(pid), time.monotonic()
    time.sleep(USER_MEASURE_S)
    user, system = (b - a for a, b in zip(begin, _user_ticks(pid), strict=True))
    share = (_cpu_s(pid) - began) / (time.monotonic() - at) * user / max(1, user + system)
    return share + _calls_per_s(pid) * SYSCALL_US / 1e6


def _user_ticks(pid: int) -> tuple[int, int]:
    """Return ticks in user mode and in the kernel: their share is sampled, their sum comes from schedstat."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]), int(fields[12])


def _calls_per_s(pid: int) -> float:
    command = ["strace", "-f", "-qq", "-c", "-U", "calls,name", "-p", str(pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        time.sleep(CALLS_MEASURE_S)
        strace.send_signal(signal.SIGINT)
        _, counts = strace.communicate()
    totals = [line.split() for line in counts.splitlines() if line.split()[1:] == ["total"]]
    return int(totals[-1][0]) / CALLS_MEASURE_S


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port


def _latency(place: Path) -> Result:
    """Overheat one probe after another on a loaded bus; times are those at which frames were sent."""
    place.mkdir()
    (place / "bench.dbc").write_text(_probe_dbc())
    (place / "bench_map.toml").write_text(_PROBE_MAP)
    files = json.dumps([*DBC_FILES, str(place / "bench.dbc")])
    with (
        _daemon(
            place, rules=_AT_ONCE, bus=f"dbc = {files}\nsend = [{ISOLATION_REQUEST_ID}]",
            more='[decode]\nmapping = ["bench_map.toml"]\n',
        ) as daemon,
        _vehicle(daemon.bus_url, LATENCY_RATE),
        LocalBus(daemon.bus_url.removeprefix("tbox:")) as bus,
    ):  # fmt: skip
        _probes(bus, -1)
        time.sleep(SETTLE_S)
        waits_ms = [wait for probe in range(PROBES) if (wait := _round(bus, probe)) is not None]
    p99 = float(np.percentile(waits_ms, 99, method="higher")) if waits_ms else float("inf")
    heard = len(waits_ms) >= 0.95 * PROBES
    return Result(
        bench="agent", case=f"critical frame to isolation request, p99 at {LATENCY_RATE} frames/s",
        value=p99, unit="ms", goal=f"<= {LATENCY_MS_MAX:g}", ok=heard and p99 <= LATENCY_MS_MAX,
        note=f"{len(waits_ms)} of {PROBES} rounds; median {statistics.median(waits_ms or [0]):.1f}",
    )  # fmt: skip


def _age(place: Path) -> Result:
    """The age of live telemetry at the broker, with and without a backlog that drains at the default rate."""
    quiet, _ = _ages(place / "quiet", backlog=0)
    busy, drained = _ages(place / "busy", backlog=AGE_BACKLOG)
    p99, quiet_p99 = (float(np.percentile(ages, 99, method="higher")) for ages in (busy, quiet))
    return Result(
        bench="agent", case="age of a live record at the broker, p99, while a backlog drains", value=p99,
        unit="ms", peer="no backlog", peer_value=quiet_p99, ratio=quiet_p99 / p99,
        goal=f"unchanged: <= {AGE_GROWTH_MAX} of it", ok=p99 <= AGE_GROWTH_MAX * quiet_p99,
        note=f"{len(busy)} records, median {statistics.median(busy):.0f} against "
        f"{statistics.median(quiet):.0f} ms; {drained / AGE_S:.0f} backlog records/s",
    )  # fmt: skip


def _ages(place: Path, backlog: int) -> tuple[list[float], int]:
    """Return the ages in ms of the live telemetry of AGE_S seconds, and how much backlog came beside it."""
    state = place / "state"
    state.mkdir(parents=True)
    if backlog:
        spool = open_spool(str(state / "spool"))  # an earlier start's
        fill(spool, portions(backlog // 100, 100, AGE_BACKLOG_BYTES))
        spool.close(Now(0), clean=True, ledger_totals={})
    plans = "".join(f"[edge.sampler.{mode}]\n{_FINE_PLAN}" for mode in ("idle", "city", "highway"))
    ages: list[float] = []
    others = 0

    def take(_topic: str, payload: bytes, mono_ns: int, _retained: bool) -> None:
        nonlocal others
        try:
            record = decode_payload(payload)
        except PayloadError:  # the backlog's are noise
            others += 1
            return
        # Coarse windows begin long before their record leaves.
        if record["kind"] == "telemetry" and max(record["body"]["windows_ms"]) <= AGE_RECORD_MS:
            ages.append((mono_ns - record["mono"]) / NS_PER_MS - AGE_RECORD_MS)

    with _daemon(place, more=plans) as daemon, _vehicle(daemon.bus_url, AGE_RATE):
        settings = UplinkSettings(host="127.0.0.1", port=daemon.port, mqtt=daemon.mqtt)
        time.sleep(SETTLE_S)
        with Receiver(settings, "car", take).start():
            time.sleep(AGE_S)
    return ages, others


_FINE_PLAN = f"""\
window_ms = {AGE_RECORD_MS}
record_ms = {AGE_RECORD_MS}
other_window_ms = 1000
other_record_ms = 10000
"""


def _probe_dbc() -> str:
    """One CAN-FD message whose every byte is a probe, so that each frame is a whole scan of its own."""
    signals = "\n".join(
        f' SG_ BenchProbe_{n} : {8 * n}|8@1+ (1,-40) [-40|200] "degC" TBOX' for n in range(PROBES)
    )
    return f'VERSION ""\nBS_:\nBU_: TBOX BENCH\nBO_ {PROBES_ID} BENCH_Probes: {PROBES} BENCH\n{signals}\n'


# The vehicle's own probes are left out: a scan would wait for them.
_PROBE_MAP = """\
[[signal]]
message = "BENCH_Probes"
signal = 'BenchProbe_(?P<index>\\d+)'
role = "probe_temperature"
glitch = 0.0

[[signal]]
signal = 'ProbeTemperature_\\d+'
ignore = true
"""

# A rule that asks at once, so that the time is the daemon's and not the rule's; and no other that asks.
_AT_ONCE = """\
[rule.bench]
watch = "probe_temperature"
when = "above"
for = "0 s"
clear_for = "0 s"
repeat = "0 s"
isolate = true
bands = [ { level = "critical", limit = "100 degC", clear = "90 degC" } ]
text = "{item} is at {value}"
""" + "".join(
    f"[rule.{name}]\nenabled = false\n"
    for name in ("over-temperature-discharge", "over-temperature-charge", "thermal-runaway")
)


def _probes(bus: LocalBus, hot: int) -> int:
    """Send all probes, one of them hot (-1: none); return when, in monotonic ns."""
    data = bytearray([COOL_RAW]) * PROBES
    if hot >= 0:
        data[hot] = HOT_RAW
    begin_ns = time.monotonic_ns()
    bus.send(can.Message(arbitration_id=PROBES_ID, is_extended_id=False, is_fd=True, data=data))
    return begin_ns


def _round(bus: LocalBus, probe: int) -> float | None:
    """Overheat a probe; return ms until the request was sent, None if none was. Ends with everything cool."""
    begin_ns = _probes(bus, probe)
    wait_ms = None
    until_ns = begin_ns + int(HOT_S * NS_PER_S)
    while (left_ns := until_ns - time.monotonic_ns()) > 0:
        got = bus.recv_frames(left_ns / NS_PER_S)
        if got is None or wait_ms is not None:
            continue
        frames, t_ns, _ = got
        asks = (frames["id"] == ISOLATION_REQUEST_ID) & (frames["data"][:, 2] == 1) & (t_ns >= begin_ns)
        if asks.any():
            wait_ms = float(t_ns[asks][0] - begin_ns) / NS_PER_MS
    _probes(bus, -1)
    quiet_s = WITHDRAWN_S + probe * PHASE_S  # not in step with anything the daemon does
    until_ns = time.monotonic_ns() + int(quiet_s * NS_PER_S)
    while (left_ns := until_ns - time.monotonic_ns()) > 0:
        bus.recv_frames(left_ns / NS_PER_S)
    return wait_ms


@contextmanager
def _daemon(
    place: Path, rules: str = "", bus: str = "", more: str = "", bus_url: str = "",
    command: Sequence[str] = TBOX,
) -> Iterator[Daemon]:  # fmt: skip
    with ExitStack() as stack:
        broker = start_broker(str(place / "broker"), embedded=find_mosquitto() is None)
        stack.callback(broker.stop)
        more = f'[edge.isolation]\nmode = "send"\n{more}'
        daemon = Daemon(
            place, broker.port, bus=bus, more=more, mqtt=broker.mqtt, bus_url=bus_url, command=command
        )
        (place / "rules.toml").write_text(rules)
        stack.callback(daemon.end)
        yield daemon.start()


@contextmanager
def _vehicle(url: str, rate: int, command: Sequence[str] = TBOX) -> Iterator[None]:
    vehicle = Vehicle(url, "--rate", str(rate), command=command)
    try:
        yield
    finally:
        vehicle.end()


@contextmanager
def _peer(bus_url: str, launcher: Sequence[str] = (sys.executable,)) -> Iterator[subprocess.Popen[bytes]]:
    script = str(Path(__file__).with_name("peer_pipeline.py"))
    process = subprocess.Popen([*launcher, script, bus_url, *DBC_FILES], stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _cpu_share(pid: int) -> float:
    """Return the share of one core the process takes over the next MEASURE_S seconds."""
    begin, at = _cpu_s(pid), time.monotonic()
    time.sleep(MEASURE_S)
    return (_cpu_s(pid) - begin) / (time.monotonic() - at)


def _cpu_s(pid: int) -> float:
    """Return what all threads have run for, to the ns: a tick of `stat` is a tenth of what we measure."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / NS_PER_S


def _rss_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024
