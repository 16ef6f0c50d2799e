"""Bytes a sample of routine telemetry: one second of the simulated pack's cells and probes as one record.

The samples come the way they come in a vehicle: simulator, CAN frames, decoder. Peers: a JSON object per
frame, as a plain script would publish it, and the same objects of a second in one zlib-compressed message.
"""

from __future__ import annotations

import json
import statistics
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from tbox.decode.database import DbcFile, DecodeSettings, load_database
from tbox.decode.roles import RoleMap
from tbox.decode.stage import DecodeStage
from tbox.ledger import Ledger
from tbox.model import NS_PER_S, Column, Draft, FrameBatch, Level, Now, SampleBatch, Series, Validity
from tbox.record.codec import Minter, decode_payload
from tbox.sim.simulator import Simulator
from tests.bench.harness import Result, interleaved, seconds

ROOT = Path(__file__).resolve().parents[2]
SEED = 1
WARM_UP_S = 5  # key-on and the first metres: not routine
RIDE_S = 30
GOAL_BYTES = 0.60
SCALES = {"cell_voltage": 0.001, "probe_temperature": 0.1}  # as the bus carries them

Second = tuple[list[FrameBatch], SampleBatch]


def ride() -> tuple[DecodeStage, list[Second]]:
    """Return the decoder and, second by second, the frames and samples of a ride."""
    files = [DbcFile(str(ROOT / "dbc" / name), 0) for name in ("tbox_bms.dbc", "tbox_vehicle.dbc")]
    decode = DecodeStage(load_database(files), RoleMap.load([]), Ledger(), DecodeSettings())
    sim = Simulator(SEED)
    story = []
    for second in range(1, WARM_UP_S + RIDE_S + 1):
        frames = sim.frames_until(second * NS_PER_S)
        parts = [decode.step(Now(second * NS_PER_S), batch) for batch in frames]
        samples = SampleBatch(
            *(np.concatenate([getattr(part, name) for part in parts]) for name in SampleBatch.__slots__)
        )
        story.append((frames, samples))
    return decode, story[WARM_UP_S:]


def table_of(decode: DecodeStage, samples: SampleBatch, start_ns: int) -> tuple[Series, ...]:
    """Return the cells and probes of one second as raw columns, one series per role."""
    tables = []
    for role, scale in SCALES.items():
        columns, times = [], None
        for i, signal in enumerate(decode.catalog):
            if signal.role != role:
                continue
            mine = (samples.column == i) & (samples.validity == Validity.VALID)
            times = samples.t_ns[mine] if times is None else times
            raw = np.rint(samples.value[mine] / scale).astype(np.int64)
            columns.append(Column(f"{role}.{signal.index}", scale, 0.0, raw[: len(times)]))
        assert times is not None
        tables.append(Series((times - start_ns) // 1_000_000, tuple(columns)))
    return tuple(tables)


def json_of(decode: DecodeStage, samples: SampleBatch) -> list[bytes]:
    """Return one JSON object per frame: its time, its message and its signals."""
    messages: dict[tuple[int, str], dict[str, float]] = {}
    for t_ns, column, value in zip(
        samples.t_ns.tolist(), samples.column.tolist(), samples.value.tolist(), strict=True
    ):
        signal = decode.catalog[column]
        if signal.role in SCALES:
            name = f"{signal.role}_{signal.index}"  # a short one: no peer is charged for our long names
            messages.setdefault((t_ns, signal.message), {})[name] = round(value, 3)
    return [
        json.dumps({"t": t_ns / 1e9, "name": name, "signals": signals}).encode()
        for (t_ns, name), signals in messages.items()
    ]


def entropy_bytes(tables: tuple[Series, ...]) -> float:
    """Return the order-0 entropy of the differences along time: what no coder of them alone can beat."""
    deltas = np.concatenate([np.diff(c.raw) for table in tables for c in table.columns])
    counts = np.unique(deltas, return_counts=True)[1]
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum() / 8)


def cases() -> Iterator[Result]:
    decode, story = ride()
    minter = Minter(1, "bench", guard=nullcontext())
    ours, plain, packed, floor = [], [], [], []
    drafts: list[tuple[Draft, Now]] = []
    for n, (_, samples) in enumerate(story):
        start_ns = (WARM_UP_S + n) * NS_PER_S
        tables = table_of(decode, samples, start_ns)
        count = sum(len(column.raw) for table in tables for column in table.columns)
        draft = Draft("telemetry", Level.INFO, start_ns, {"series": list(tables)})
        drafts.append((draft, Now(start_ns)))
        payload = minter.mint(*drafts[-1]).payload
        decode_payload(payload, expand=True)
        objects = json_of(decode, samples)
        ours.append(len(payload) / count)
        plain.append(sum(map(len, objects)) / count)
        packed.append(len(zlib.compress(b"\n".join(objects), 9)) / count)
        floor.append(entropy_bytes(tables))
    value, per_frame, zipped = (statistics.median(figures) for figures in (ours, plain, packed))
    case = "bytes a sample, one second"
    yield Result(
        bench="payload", case=case, value=value, unit="B", peer="JSON per frame", peer_value=per_frame,
        ratio=per_frame / value, goal=f"<= {GOAL_BYTES}", ok=value <= GOAL_BYTES,
        note=f"order-0 entropy of the deltas {statistics.median(floor):.2f}",
    )  # fmt: skip
    yield Result(
        bench="payload", case=case, value=value, unit="B", peer="JSON of a second, zlib -9",
        peer_value=zipped, ratio=zipped / value,
    )  # fmt: skip
    yield cpu(decode, story, drafts, minter)


def cpu(decode: DecodeStage, story: list[Second], drafts: list[tuple[Draft, Now]], minter: Minter) -> Result:
    """What it costs to make the payloads of the ride, against JSON and zlib of the same samples."""

    def mint() -> float:
        return seconds(lambda: [minter.mint(*one) for one in drafts]) / len(drafts) * 1e6

    def peer() -> float:
        def work() -> None:
            for _, samples in story:
                zlib.compress(b"\n".join(json_of(decode, samples)), 9)

        return seconds(work) / len(story) * 1e6

    value, peer_value, ratio = interleaved(mint, peer, runs=3)
    return Result(
        bench="payload", case="CPU for one second's payload", value=value, unit="us",
        peer="JSON of a second, zlib -9", peer_value=peer_value, ratio=ratio,
    )  # fmt: skip
