"""Decode against cantools: the batch decoder at several batch sizes, and the whole stage with its checks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cantools.database
import numpy as np
import numpy.typing as npt

from tbox.decode.batch import Decoder
from tbox.decode.database import Database, DbcFile, DecodeSettings, Definition, load_database
from tbox.decode.roles import RoleMap
from tbox.decode.stage import DecodeStage
from tbox.decode.table import compile_table
from tbox.ledger import Ledger
from tbox.model import FRAME_DTYPE, NS_PER_MS, FrameBatch, Now
from tbox.sim.simulator import Simulator
from tests.bench.harness import Result, interleaved
from tests.data import DATA

REPO = Path(__file__).resolve().parents[2]
FRAMES = 2_000
MEASURE_S = 0.1
# Issue figures: batch size -> how many times cantools' speed.
GOALS = {1: 0.5, 5: 0.5, 50: 5.0, 100: 8.0, 1000: 12.0}


def cases() -> Iterator[Result]:
    for name, database, frames in _mixes():
        for size, goal in GOALS.items():
            yield _against_cantools(name, database, frames, size, goal)
    own = load_database([DbcFile(str(REPO / "dbc" / f"tbox_{n}.dbc")) for n in ("bms", "vehicle")])
    for size in (13, 100):  # what 10 ms bring at 1,340 and 10,000 frames/s
        yield _stage(own, size)


def _mixes() -> Iterator[tuple[str, Database, npt.NDArray[np.void]]]:
    """Mixed ids: our BMS and vehicle, and a production car's bus of about 20 signals a message."""
    own = load_database([DbcFile(str(REPO / "dbc" / f"tbox_{n}.dbc")) for n in ("bms", "vehicle")])
    yield "own", own, _random_frames(own)
    model3 = DATA / "dbc" / "model3.dbc"
    if model3.exists():
        tesla = load_database([DbcFile(str(model3))])
        yield "model3", tesla, _random_frames(tesla)


def _random_frames(database: Database) -> npt.NDArray[np.void]:
    """Random payloads that cantools decodes, each message as often as any other."""
    rng = np.random.default_rng(1)
    frames = np.zeros(FRAMES, FRAME_DTYPE)
    count = 0
    while count < FRAMES:
        definition = database.definitions[int(rng.integers(len(database.definitions)))]
        payload = rng.integers(0, 256, definition.message.length, np.uint8).tobytes()
        if _decodes(definition, payload):
            data = np.frombuffer(payload.ljust(64, b"\0"), np.uint8)
            frames[count] = (definition.can_id, len(payload), 0, (0, 0), data)
            count += 1
    return frames


def _decodes(definition: Definition, payload: bytes) -> bool:
    try:
        return bool(definition.message.decode(payload, decode_choices=False))
    except Exception:
        return False


def _us_per_frame(work: Callable[[], Any], frames: int) -> float:
    """Both sides work equally long: a pass of ours takes under 1 ms, much of it to warm the caches."""
    begin, passes, spent_s = time.process_time(), 0, 0.0
    while spent_s < MEASURE_S:
        work()
        passes += 1
        spent_s = time.process_time() - begin
    return spent_s / passes / frames * 1e6


def _against_cantools(
    name: str, database: Database, frames: npt.NDArray[np.void], size: int, goal: float
) -> Result:
    decoder = Decoder(compile_table(database.definitions))
    parts = [np.ascontiguousarray(frames[n : n + size]) for n in range(0, len(frames), size)]
    peer_database = cantools.database.can.Database([d.message for d in database.definitions], strict=False)
    known = [(int(f["id"]), f["data"][: f["len"]].tobytes()) for f in frames]

    def ours() -> None:
        for part in parts:
            decoder.decode(0, part)

    def peer() -> None:
        for can_id, payload in known:
            peer_database.decode_message(can_id, payload, decode_choices=False)

    us, peer_us, ratio = interleaved(
        lambda: _us_per_frame(ours, len(frames)), lambda: _us_per_frame(peer, len(frames))
    )
    signals = len(decoder.decode(0, frames).value) / len(frames)
    return Result(
        bench="decode", case=f"{name}, batch {size}", value=round(us, 3), unit="us/frame",
        peer="cantools decode_message", peer_value=round(peer_us, 3), ratio=round(ratio, 2),
        goal=f">= {goal}x", ok=ratio >= goal, note=f"{signals:.1f} signals a frame",
    )  # fmt: skip


def _stage(database: Database, size: int) -> Result:
    """The stage with roles and all validity checks on a simulated drive; its goal is the agent's."""
    batches = list(Simulator(1).frames_until(20_000 * NS_PER_MS))
    frames = np.concatenate([batch.frames for batch in batches])
    t_ns = np.concatenate([batch.t_ns for batch in batches])
    parts = [
        FrameBatch(0, np.ascontiguousarray(frames[n : n + size]), t_ns[n : n + size])
        for n in range(0, len(frames), size)
    ]

    def ours() -> float:
        stage = DecodeStage(database, RoleMap.load(), Ledger(), DecodeSettings())
        stage.step(Now(0), parts[0])

        def work() -> None:
            for part in parts[1:]:
                stage.step(Now(0), part)

        return _us_per_frame(work, len(frames) - size)

    us, _, _ = interleaved(ours, lambda: 1.0)
    return Result(
        bench="decode", case=f"whole stage with all checks, batch {size}", value=round(us, 3),
        unit="us/frame", note="BMS and vehicle of the simulator",
    )  # fmt: skip
