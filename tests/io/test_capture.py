"""Tests of `tbox capture export`: what the black box sealed comes out as a recording, and holes are told."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from tbox.bus.recordings import Recording
from tbox.cli.capture import capture
from tbox.edge.blackbox import BlackBox
from tbox.errors import TboxError
from tbox.ledger import StageLedger
from tbox.model import (
    CAN_EFF_FLAG,
    CANFD_BRS,
    CANFD_FDF,
    FRAME_DTYPE,
    NS_PER_MS,
    Draft,
    FrameBatch,
    Level,
    Now,
    TimeQuality,
)
from tbox.record.capture import Received, to_line
from tbox.record.codec import Minter

WALL_LESS_MONO_NS = 1_800_000_000_000_000_000


def batch(channel: int, begin_ms: int, count: int) -> FrameBatch:
    """Ten frames a second: classic on channel 0, CAN-FD with 29-bit ids on 1; numbered in their data."""
    frames = np.zeros(count, dtype=FRAME_DTYPE)
    t_ms = begin_ms + 100 * np.arange(count) + channel
    frames["id"] = 0x123 if channel == 0 else 0x18DAF110 | CAN_EFF_FLAG
    frames["len"] = 8 if channel == 0 else 48
    frames["flags"] = 0 if channel == 0 else CANFD_FDF | CANFD_BRS
    frames["data"][:, :4] = t_ms.astype("<u4").view(np.uint8).reshape(-1, 4)
    return FrameBatch(channel, frames, t_ms.astype(np.int64) * NS_PER_MS)


def payloads(captures: int = 1, start: int = 5) -> list[bytes]:
    """The payloads of captures of 10 s each, as the daemon publishes them."""
    box = BlackBox(StageLedger("blackbox", "frames"))
    minter = Minter(start, "vehicle", guard=nullcontext())
    drafts: list[Draft] = []
    for number in range(captures):
        begin_ms = number * 100_000
        for second in range(10):
            now = Now((begin_ms + second * 1000 + 1000) * NS_PER_MS)
            for channel in range(2):
                drafts += box.step(now, batch(channel, begin_ms + second * 1000, 10))
        drafts += box.trigger(now, Draft("alarm", Level.ALARM, now.mono_ns, {"alarm": "a", "event": "raise"}))
        drafts += box.flush(now)
        box.clear(now, Draft("alarm", Level.ALARM, now.mono_ns, {"alarm": "a", "event": "clear"}))
    return [
        minter.mint(draft, Now(draft.mono_ns, draft.mono_ns + WALL_LESS_MONO_NS, TimeQuality.GNSS)).payload
        for draft in drafts
    ]


def files(folder: Path, contents: list[bytes]) -> list[str]:
    paths = []
    for number, content in enumerate(contents):
        path = folder / f"{number}.bin"
        path.write_bytes(content)
        paths.append(str(path))
    return paths


def export(*arguments: str) -> Result:
    return CliRunner().invoke(capture, ["export", *arguments])


@pytest.mark.parametrize("name", ["x.log", "x.asc", "x.blf", "x.log.gz"])
def test_every_frame_comes_out_in_order_with_its_time_and_bytes(tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    result = export(*files(tmp_path, payloads()), "--out", str(out))
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["frames"] == 200 and told["missing"] == [] and told["captures"] == ["5:1"]
    frames = list(Recording(out))
    assert len(frames) == 200
    for channel in range(2):
        mine = [frame for frame in frames if frame.channel == frames[channel].channel]
        assert [int.from_bytes(frame.data[:4], "little") for frame in mine] == [
            100 * i + channel for i in range(100)
        ]
    classic, wide = frames[0], frames[1]
    assert (classic.fd, len(classic.data), classic.can_id) == (False, 8, 0x123)
    assert (wide.fd, wide.brs, len(wide.data), wide.can_id) == (True, True, 48, 0x18DAF110 | CAN_EFF_FLAG)
    assert classic.t_s is not None and wide.t_s is not None
    assert wide.t_s - classic.t_s == pytest.approx(0.001, abs=2e-6)
    if name.startswith("x.log"):
        assert classic.t_s == pytest.approx(WALL_LESS_MONO_NS / 1e9, abs=1e-3)


def test_messages_saved_by_verify_and_folders_are_read_too(tmp_path: Path) -> None:
    saved = tmp_path / "saved.jsonl"
    contents = payloads()
    lines = [to_line(Received("tbox/1/v/capture", content, 0)) for content in contents + contents]
    saved.write_bytes(b"".join(lines))
    result = export(str(saved), "--out", str(tmp_path / "x.log"))
    assert result.exit_code == 0 and json.loads(result.stdout)["frames"] == 200, "a redelivery counts once"
    folder = tmp_path / "folder"
    folder.mkdir()
    files(folder, contents)
    assert export(str(folder), "--out", str(tmp_path / "y.log")).exit_code == 0
    assert (tmp_path / "x.log").read_bytes() == (tmp_path / "y.log").read_bytes()


def test_a_missing_part_is_told_and_the_rest_is_written(tmp_path: Path) -> None:
    contents = payloads()
    result = export(*files(tmp_path, contents[:1] + contents[2:]), "--out", str(tmp_path / "x.log"))
    assert result.exit_code == 1 and "missing 5:1: part 1" in str(result.exception)
    assert 0 < json.loads(result.stdout)["frames"] < 200
    result = export(*files(tmp_path, contents[1:-1]), "--out", str(tmp_path / "y.log"))
    assert "the beginning" in str(result.exception) and "the end" in str(result.exception)


def test_of_several_captures_one_must_be_chosen(tmp_path: Path) -> None:
    paths = files(tmp_path, payloads(captures=2) + payloads(start=6))
    result = export(*paths, "--out", str(tmp_path / "x.log"))
    assert isinstance(result.exception, TboxError) and "5:1, 5:2, 6:1" in str(result.exception)
    result = export(*paths, "--out", str(tmp_path / "x.log"), "--capture", "5:2")
    assert result.exit_code == 0 and json.loads(result.stdout)["captures"] == ["5:2"]
    result = export(*paths, "--out", str(tmp_path / "x.log"), "--capture", "5:1", "--capture", "5:2")
    assert json.loads(result.stdout)["frames"] == 400
    result = export(*paths, "--out", str(tmp_path / "x.log"), "--capture", "5:1", "--capture", "6:1")
    assert "different starts" in str(result.exception)
    assert "no capture 9:9" in str(export(*paths, "--out", "x.log", "--capture", "9:9").exception)


def test_what_is_no_capture_is_refused_in_one_line(tmp_path: Path) -> None:
    (path,) = files(tmp_path, [b"\x00 this is no payload"])
    result = export(path, "--out", str(tmp_path / "x.log"))
    assert isinstance(result.exception, TboxError) and result.exception.exit_code == 2
    assert path in str(result.exception) and "\n" not in str(result.exception)
    result = export(path, "--out", str(tmp_path / "x.pcap"))
    assert "end the name in .log, .asc or .blf" in str(result.exception)
