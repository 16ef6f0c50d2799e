"""`tbox decode` equals cantools frame by frame, on every format of recording and every public DBC at hand."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import can
import cantools.database
import numpy as np
import pytest
from click.testing import CliRunner

from tbox.bus.recordings import LoggedFrame, Recording, message_of_logged, write_recording
from tbox.cli.decode import decode
from tbox.decode.database import DbcError, DbcFile, Definition, load_database
from tbox.errors import TboxError
from tbox.model import CAN_EFF_FLAG
from tests import dbcs
from tests.data import data_file

KONA_LOG = ("can", "kona-pcan-ccan-power-on-ready-off.gvret.csv")
BUSES = {"kona": "kona-pcan.dbc", "foxbms": "foxbms.dbc", "model3": "model3.dbc", "gm": "gm-hv-cells.dbc"}


def run(log: Path, files: list[Path], out: Path, *more: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run the command; return the objects and the counts."""
    arguments = [str(log), *(a for f in files for a in ("--dbc", str(f))), "--out", str(out), *more]
    result = CliRunner().invoke(decode, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in out.read_text().splitlines()], json.loads(result.stdout)


def expected(
    frames: list[LoggedFrame], database: Any, channel: int | None, *, choices: bool = False
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The oracle: what cantools says of each frame, one by one."""
    lines, counts = [], Counter[str]()
    for frame in frames:
        if channel is not None and frame.channel != channel:
            continue
        counts["frames"] += 1
        extended = bool(frame.can_id & CAN_EFF_FLAG)
        can_id = frame.can_id & ~CAN_EFF_FLAG
        try:
            message = database.get_message_by_frame_id(can_id, force_extended_id=extended)
        except KeyError:
            counts["unknown"] += 1
            continue
        line = {"n": frame.n, "t": frame.t_s, "id": can_id, "name": message.name}
        if channel is None:
            line["channel"] = frame.channel
        try:
            signals = message.decode(frame.data, decode_choices=choices, allow_truncated=True)
        except Exception as error:
            counts["malformed"] += 1
            lines.append(line | {"error": str(error)})
            continue
        counts["decoded"] += 1
        line["signals"] = {k: v if isinstance(v, int | float) else str(v) for k, v in signals.items()}
        if len(frame.data) < message.length:
            counts["short"] += 1
            line["short"] = True
        lines.append(line)
    return lines, counts


@lru_cache
def cantools_of(path: Path) -> Any:
    """A DBC as cantools has it; the Kona's is published without BS_: and gets it here by hand."""
    text = path.read_text(encoding="cp1252")
    if "BS_:" not in text:
        text = text.replace("BO_ 127", "BS_:\n\nBO_ 127", 1)
    return cantools.database.load_string(text, "dbc", strict=False)


def assert_same(got: list[dict[str, Any]], want: list[dict[str, Any]]) -> None:
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        assert repr(sorted(ours.items())) == repr(sorted(theirs.items()))  # 1 is not 1.0


def random_log(definitions: list[Definition], count: int) -> list[LoggedFrame]:
    """Frames of all kinds of a bus, on channels 0 and 1, classic and FD."""
    block = dbcs.frames_of(np.random.default_rng(5), definitions, count, wild=False)
    rng = np.random.default_rng(6)
    numbers: Counter[int] = Counter()
    frames = []
    for n, one in enumerate(block):
        channel = n % 2
        numbers[channel] += 1
        length = int(one["len"]) if rng.random() < 0.8 else int(rng.integers(0, 9))
        data = one["data"][:length].tobytes()
        can_id = int(one["id"]) if rng.random() < 0.95 else 0x7F0
        frames.append(
            LoggedFrame(
                numbers[channel], channel, 1000 + n / 1000, can_id, len(data) > 8, False, data, False, False,
                True, n + 1,
            )
        )  # fmt: skip
    return frames


def write(path: Path, frames: list[LoggedFrame], dialect: str) -> None:
    if dialect == "trc":
        with can.TRCWriter(path) as writer:
            for frame in frames:
                writer.on_message_received(message_of_logged(frame))
    else:
        write_recording(path, frames, dialect)


@pytest.mark.slow
def test_the_kona_recording_decodes_as_cantools_does_frame_by_frame(tmp_path: Path) -> None:
    log, dbc = data_file(*KONA_LOG), data_file("dbc", "kona-pcan.dbc")
    got, counts = run(log, [dbc], tmp_path / "out.jsonl", "--channel", "0")
    want, tally = expected(list(Recording(log)), cantools_of(dbc), 0)
    assert_same(got, want)
    assert counts["frames"] == 24_263 == tally["frames"]
    assert {k: counts[k] for k in ("decoded", "unknown", "short", "malformed")} == {
        k: tally[k] for k in ("decoded", "unknown", "short", "malformed")
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bus", "dialect"),
    [
        *(("gm", d) for d in ("candump", "asc", "blf", "trc")),
        ("kona", "asc"),
        ("foxbms", "trc"),
        ("model3", "blf"),
    ],
)
def test_every_bus_decodes_as_in_cantools_from_every_format(tmp_path: Path, bus: str, dialect: str) -> None:
    dbc = data_file("dbc", BUSES[bus])
    definitions = load_database([DbcFile(str(dbc))]).definitions
    log = tmp_path / f"log.{'log' if dialect == 'candump' else dialect}"
    write(log, random_log(definitions, 600), dialect)
    for channel in (None, 1):
        more = [] if channel is None else ["--channel", str(channel)]
        got, counts = run(log, [dbc], tmp_path / "out.jsonl", *more)
        want, tally = expected(list(Recording(log)), cantools_of(dbc), channel)
        assert_same(got, want)
        for name in ("frames", "decoded", "unknown", "short", "malformed"):
            assert counts[name] == tally[name]
        assert counts["frames"] == counts["decoded"] + counts["unknown"] + counts["malformed"]


@pytest.mark.slow
def test_choices_are_given_by_name_where_the_dbc_names_them(tmp_path: Path) -> None:
    dbc = data_file("dbc", "model3.dbc")
    definitions = load_database([DbcFile(str(dbc))]).definitions
    log = tmp_path / "x.log"
    write(log, random_log(definitions, 300), "candump")
    got, _ = run(log, [dbc], tmp_path / "out.jsonl", "--choices")
    want, _ = expected(list(Recording(log)), cantools_of(dbc), None, choices=True)
    assert_same(got, want)


DBC = (
    'VERSION ""\n\nNS_ :\n\nBS_:\n\nBU_: E\n\nBO_ 291 Msg: 8 E\n'
    ' SG_ Page M : 0|2@1+ (1,0) [0|0] "" E\n SG_ A m0 : 8|8@1+ (1,0) [0|0] "" E\n'
    ' SG_ B m1 : 8|8@1+ (0.5,0) [0|0] "" E\n SG_ C : 56|8@1+ (1,0) [0|0] "" E\n'
    '\nBO_ 2147484000 Ext: 4 E\n SG_ X : 0|32@1- (1,0) [0|0] "" E\n'
)


def files(tmp_path: Path, log: str) -> tuple[Path, Path, Path]:
    (tmp_path / "x.dbc").write_text(DBC)
    (tmp_path / "x.log").write_text(log)
    return tmp_path / "x.log", tmp_path / "x.dbc", tmp_path / "out.jsonl"


def test_the_lines_are_as_documented(tmp_path: Path) -> None:
    log, dbc, out = files(
        tmp_path,
        "(1.5) can0 123#0005000000000007\n"  # whole
        "can1 123#0105\n"  # short, without time
        "(2.0) can0 123#03\n"  # a page that is not there
        "(2.5) can0 00000160#FFFFFFFF\n"  # extended
        "(3.0) can0 7FF#00\n"  # unknown
        "(3.1) can0 123#R\n"
        "garbage\n",
    )  # fmt: skip
    got, counts = run(log, [dbc], out)
    assert got == [
        {"n": 1, "t": 1.5, "id": 291, "name": "Msg", "channel": 0, "signals": {"Page": 0, "A": 5, "C": 7}},
        {
            "n": 1, "t": None, "id": 291, "name": "Msg", "channel": 1,
            "signals": {"Page": 1, "B": 2.5}, "short": True,
        },
        {
            "n": 2, "t": 2.0, "id": 291, "name": "Msg", "channel": 0,
            "error": "expected multiplexer id 0 or 1, but got 3",
        },
        {"n": 3, "t": 2.5, "id": 352, "name": "Ext", "channel": 0, "signals": {"X": -1}},
    ]  # fmt: skip
    assert counts == {
        "frames": 5, "decoded": 3, "unknown": 1, "short": 1, "malformed": 1,
        "causes": {
            "unknown_mux": 1, "short": 1, "unknown_id": 1, "remote": 1, "damaged: not a candump line": 1,
        },
    }  # fmt: skip


def test_two_dbc_files_serve_one_bus_and_an_id_in_both_is_an_error_naming_both_places(tmp_path: Path) -> None:
    log, dbc, out = files(tmp_path, "can0 123#0005000000000007\ncan0 124#01\n")
    other = tmp_path / "y.dbc"
    other.write_text(DBC.replace("291 Msg", "292 Other").replace("2147484000", "2147484001"))
    got, _ = run(log, [dbc, other], out)
    assert [line["name"] for line in got] == ["Msg", "Other"]
    with pytest.raises(DbcError) as caught:
        run(log, [dbc, dbc.rename(tmp_path / "z.dbc"), *[other][:0]], out)
    other.write_text(DBC)
    (tmp_path / "x.dbc").write_text(DBC)
    with pytest.raises(DbcError) as caught:
        run(log, [dbc, other], out)
    assert f"{other}:9" in str(caught.value) and f"{dbc}:9" in str(caught.value)


def test_bad_input_is_one_error_that_names_the_file(tmp_path: Path) -> None:
    log, dbc, out = files(tmp_path, "can0 123#00\n")
    bad = tmp_path / "bad.dbc"
    bad.write_text("nonsense\n")
    for arguments in (
        (log, [bad], out),
        (tmp_path / "no.log", [dbc], out),
        (log, [dbc], tmp_path / "no" / "x"),
    ):
        with pytest.raises(TboxError) as caught:
            run(*arguments)
        assert str(tmp_path) in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize("more", [[], ["--dialect", "blf"]])
def test_a_pipe_that_would_be_read_twice_is_refused_in_one_line(tmp_path: Path, more: list[str]) -> None:
    _, dbc, out = files(tmp_path, "")
    result = decode_pipe(dbc, out, *more)
    assert result.returncode == 2 and not out.exists()
    assert result.stderr.startswith("tbox: /dev/stdin: a pipe cannot be read twice; write it to a file first")
    assert result.stderr.count("\n") == 1


def test_a_pipe_of_a_named_text_format_is_decoded(tmp_path: Path) -> None:
    _, dbc, out = files(tmp_path, "")
    result = decode_pipe(dbc, out, "--dialect", "candump")
    assert result.returncode == 0 and json.loads(result.stdout)["decoded"] == 1


def decode_pipe(dbc: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    arguments = ["decode", "/dev/stdin", "--dbc", str(dbc), "--out", str(out), *more]
    command = [sys.executable, "-m", "tbox", *arguments]
    log = "can0 123#0005000000000007\n"
    return subprocess.run(command, input=log, capture_output=True, text=True, timeout=60, check=False)
