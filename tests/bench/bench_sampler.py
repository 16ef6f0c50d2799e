"""What telemetry and the black box cost, per sample and per frame, against a plain-Python window fold.

Taken on this machine in user mode. The pack is 192 cells and 48 probes whose noise is a sensor's; payloads
are the daemon's own, encoded and compressed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np

from tbox.edge.blackbox import BlackBox
from tbox.edge.mode import Context, Mode
from tbox.edge.sampler import Sampler
from tbox.ledger import StageLedger
from tbox.model import (
    CANFD_FDF,
    FRAME_DTYPE,
    NS_PER_MS,
    NS_PER_S,
    Draft,
    FrameBatch,
    Level,
    Now,
    SampleBatch,
    Signal,
)
from tbox.record.codec import Minter
from tests.bench.harness import Result, interleaved, seconds

BATCH_MS = 10
SECONDS = 20
CITY = Context(Mode.CITY, 1)
VSS = "Vehicle.Powertrain.TractionBattery."
NOISE_STEPS = 1.0  # standard deviation, in steps of the signal


def catalog() -> tuple[Signal, ...]:
    cells = [
        Signal(
            f"cell{i}",
            "Cells",
            0,
            "V",
            "cell_voltage",
            i,
            vss=f"{VSS}CellVoltage.CellVoltages[{i}]",
            scale=0.001,
        )
        for i in range(192)
    ]
    probes = [
        Signal(
            f"probe{i}",
            "Probes",
            0,
            "degC",
            "probe_temperature",
            i,
            vss=f"{VSS}Temperature.CellTemperature[{i}]",
            scale=0.1,
        )
        for i in range(48)
    ]
    return (*cells, *probes)


def batches(per_batch: int) -> list[SampleBatch]:
    """Samples that go round the catalog, as frames of a scan do."""
    rng = np.random.default_rng(1)
    signals = catalog()
    scales = np.array([signal.scale for signal in signals])
    levels = np.array([3700.0] * 192 + [250.0] * 48)
    out = []
    for i in range(SECONDS * 1000 // BATCH_MS):
        column = (i * per_batch + np.arange(per_batch)) % len(signals)
        steps = np.round(levels[column] + rng.normal(0, NOISE_STEPS, per_batch))
        t_ns = np.full(per_batch, i * BATCH_MS * NS_PER_MS)
        out.append(SampleBatch(t_ns, column, steps * scales[column], np.zeros(per_batch, dtype=np.uint8)))
    return out


def fold(samples: list[SampleBatch]) -> list[Draft]:
    sampler = Sampler(catalog(), StageLedger("sampler", "samples"))
    drafts: list[Draft] = []
    for i, batch in enumerate(samples):
        drafts += sampler.step(Now((i + 1) * BATCH_MS * NS_PER_MS), batch, CITY)
    return drafts + sampler.flush(Now(SECONDS * NS_PER_S), CITY)


def fold_plainly(samples: list[SampleBatch]) -> None:
    """The same statistics as a loop over samples would make them."""
    windows: dict[tuple[int, int], list[float]] = {}
    for batch in samples:
        for t_ns, column, value in zip(
            batch.t_ns.tolist(), batch.column.tolist(), batch.value.tolist(), strict=True
        ):
            window = windows.get((column, t_ns // 500_000_000))
            if window is None:
                windows[column, t_ns // 500_000_000] = [value, value, value, value, 1]
                continue
            window[0] = min(window[0], value)
            window[1] = max(window[1], value)
            window[2] += value
            window[3] = value
            window[4] += 1


def telemetry(case: str, per_batch: int) -> Iterator[Result]:
    samples = batches(per_batch)
    count = sum(len(batch) for batch in samples)
    ours, peer, ratio = interleaved(
        lambda: seconds(lambda: fold(samples)), lambda: seconds(lambda: fold_plainly(samples)), 3
    )
    yield Result(
        bench="sampler", case=case, value=ours / count * 1e9, unit="ns/sample", peer="plain Python fold",
        peer_value=peer / count * 1e9, ratio=ratio,
    )  # fmt: skip
    drafts = fold(samples)
    minter = Minter(1, "vehicle", guard=nullcontext())
    payloads = [minter.mint(draft, Now(SECONDS * NS_PER_S)).payload for draft in drafts]
    values = sum(
        (len(series.columns) + sum(len(block.raw) for block in series.blocks)) * len(series.t_ms)
        for draft in drafts
        for series in draft.body["series"]
    )
    size = sum(map(len, payloads))
    yield Result(
        bench="sampler", case=f"{case}: payload", value=size / values, unit="bytes/value",
        note=f"{size / SECONDS:.0f} bytes a second",
    )  # fmt: skip


def black_box() -> Iterator[Result]:
    frames = np.zeros(100, dtype=FRAME_DTYPE)
    frames["len"], frames["flags"] = 64, CANFD_FDF
    frames["data"] = np.random.default_rng(1).integers(0, 8, (100, 64), dtype=np.uint8)
    account = StageLedger("blackbox", "frames")
    box = BlackBox(account)

    def batch(i: int) -> FrameBatch:
        return FrameBatch(0, frames, np.full(100, i * BATCH_MS * NS_PER_MS))

    given = [batch(i) for i in range(3100)]
    cost = seconds(lambda: [box.step(Now(int(b.t_ns[0])), b) for b in given])
    yield Result(
        bench="sampler", case="black box, 10,000 frames/s", value=cost / 310_000 * 1e6, unit="us/frame"
    )
    ring = box.status()["ring_bytes"] / 1e6
    yield Result(
        bench="sampler", case="30 s ring at 10,000 frames/s", value=ring, unit="MB",
        goal="<= 26", ok=ring <= 26,
    )  # fmt: skip
    now = Now(int(given[-1].t_ns[0]))
    box.trigger(now, Draft("alarm", Level.ALARM, now.mono_ns, {"alarm": "a", "event": "raise"}))
    steps = [seconds(lambda: box.step(now, None)) for _ in range(50)]
    yield Result(bench="sampler", case="sealing, the longest step", value=max(steps) * 1e3, unit="ms")


def cases() -> Iterator[Result]:
    yield from telemetry("10,000 frames/s (2,000 samples a batch)", 2000)
    yield from telemetry("1,340 frames/s (270 samples a batch)", 270)
    yield from black_box()
