"""The whole daemon against a plain pipeline: CPU, memory, and the way from a critical frame to the request.

Both read the bus between processes (interface "tbox"), where `tbox sim` writes; CPU is what the kernel booked
for the whole process, user and system, over the same seconds. The peer is tests/bench/peer_pipeline.py.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tbox.bus.local import LocalBus
from tbox.bus.reader import open_bus, parse_bus_url
from tbox.model import FRAME_BYTES
from tbox.sim.broker import find_mosquitto, start_broker
from tbox.sim.faults import make_fault
from tbox.sim.layout import BMS_STATUS, ISOLATION_REQUEST_ID
from tbox.sim.simulator import SimSettings, Simulator
from tests.bench.harness import Result
from tests.daemon import DBC, Daemon, Vehicle

RATES = ((10_000, 1 / 10), (1_340, 1 / 2))  # frames a second, share of the peer's CPU to reach
SETTLE_S, MEASURE_S = 4.0, 8.0
RUNS = 3
RSS_LIMIT_MIB = {10_000: 128, 1_340: 90}
RING_S = 31.0  # the black box's ring is full after 30 s
LATENCY_RATE = 10_000
LATENCY_ROUNDS = 60
LATENCY_MS_MAX = 20.0
ROUND_S, FAULT_S = 0.6, 0.25
TICKS_S = os.sysconf("SC_CLK_TCK")
DBC_FILES = [str(DBC / "tbox_bms.dbc"), str(DBC / "tbox_vehicle.dbc")]


def cases() -> Iterator[Result]:
    with tempfile.TemporaryDirectory(prefix="tbox-bench-") as place:
        for rate, share in RATES:
            yield from _load(Path(place) / f"load-{rate}", rate, share)
        yield _latency(Path(place) / "latency")


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
        bus = here / "peer"
        with _peer(bus) as peer, _vehicle(f"tbox:{bus}", rate):
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


def _latency(place: Path) -> Result:
    """Open the HVIL again and again on a loaded bus and time the way to the request."""
    place.mkdir()
    faults = [make_fault("hvil-open", 3.0 + n * ROUND_S, duration_s=FAULT_S) for n in range(LATENCY_ROUNDS)]
    simulator = Simulator(1, SimSettings(rate_hz=LATENCY_RATE, position=False), faults)
    with _daemon(place, rules=_AT_ONCE) as daemon:
        waits_ms = _time_requests(daemon.bus_url, simulator, 3.0 + (LATENCY_ROUNDS + 1) * ROUND_S)
    p99 = sorted(waits_ms)[max(0, int(len(waits_ms) * 0.99) - 1)] if waits_ms else float("inf")
    heard = len(waits_ms) >= 0.9 * LATENCY_ROUNDS
    return Result(
        bench="agent", case=f"critical frame to isolation request, p99 at {LATENCY_RATE} frames/s",
        value=p99, unit="ms", goal=f"<= {LATENCY_MS_MAX:g}", ok=heard and p99 <= LATENCY_MS_MAX,
        note=f"{len(waits_ms)} of {LATENCY_ROUNDS} rounds, "
        f"median {statistics.median(waits_ms or [0]):.1f} ms, the flood's own Python included",
    )  # fmt: skip


# A rule that asks at once, so that the time is the daemon's and not the rule's.
_AT_ONCE = """\
[rule.hvil-open]
for = "0 s"
clear_for = "0 s"
repeat = "0 s"
isolate = true
bands = [ { level = "critical", limit = "0.1", clear = "0.9" } ]
"""


def _time_requests(url: str, simulator: Simulator, seconds: float) -> list[float]:
    """Write the simulator's frames in real time; return ms from each first open HVIL to a request heard."""
    bus = open_bus(parse_bus_url(url))
    assert isinstance(bus, LocalBus)
    opened_ns: list[int] = []
    heard_ns: list[int] = []

    over = threading.Event()

    def listen() -> None:
        while not over.is_set():
            message = bus.recv(0.2)
            if message and message.arbitration_id == ISOLATION_REQUEST_ID and message.data[2] == 1:
                heard_ns.append(time.monotonic_ns())

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    begin, was_open, t_ns = time.monotonic_ns(), False, 0
    try:
        while t_ns < seconds * 1e9:
            t_ns = time.monotonic_ns() - begin
            for batch in simulator.frames_until(t_ns):
                raw = batch.frames.tobytes()
                for i, can_id in enumerate(batch.frames["id"].tolist()):
                    frame = raw[i * FRAME_BYTES : (i + 1) * FRAME_BYTES]
                    bus.send_packed(frame)
                    if can_id == BMS_STATUS.can_id:
                        is_open = _hvil_open(frame)
                        if is_open and not was_open:
                            opened_ns.append(time.monotonic_ns())
                        was_open = is_open
            time.sleep(0.001)
    finally:
        over.set()
        listener.join()
        bus.shutdown()
    waits = []
    for at_ns, until_ns in zip(opened_ns, [*opened_ns[1:], time.monotonic_ns()], strict=True):
        first = next((h for h in heard_ns if at_ns <= h < until_ns), None)
        if first is not None:
            waits.append((first - at_ns) / 1e6)
    return waits


def _hvil_open(frame: bytes) -> bool:
    hvil = next(sig for sig in BMS_STATUS.signals if sig.name == "Hvil")
    raw = int.from_bytes(frame[FRAME_BYTES - 64 :], "little") >> hvil.start
    return raw & ((1 << hvil.bits) - 1) == 0


@contextmanager
def _daemon(place: Path, rules: str = "") -> Iterator[Daemon]:
    with ExitStack() as stack:
        broker = start_broker(str(place / "broker"), embedded=find_mosquitto() is None)
        stack.callback(broker.stop)
        daemon = Daemon(place, broker.port, more='[edge.isolation]\nmode = "send"\n')
        daemon.config.write_text(
            daemon.config.read_text().replace("[uplink]\n", f'[uplink]\nmqtt = "{broker.mqtt}"\n')
        )
        (place / "rules.toml").write_text(rules)
        stack.callback(daemon.end)
        yield daemon.start()


@contextmanager
def _vehicle(url: str, rate: int) -> Iterator[None]:
    vehicle = Vehicle(url, "--rate", str(rate))
    try:
        yield
    finally:
        vehicle.end()


@contextmanager
def _peer(bus: Path) -> Iterator[subprocess.Popen[bytes]]:
    script = str(Path(__file__).with_name("peer_pipeline.py"))
    process = subprocess.Popen([sys.executable, script, str(bus), *DBC_FILES], stdout=subprocess.DEVNULL)
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
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_S


def _rss_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024
