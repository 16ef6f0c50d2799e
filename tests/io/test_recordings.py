"""Recordings: every format in, the same frames out; what is damaged is counted and never guessed at."""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Callable
from pathlib import Path

import can
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tbox.bus import load_mf4
from tbox.bus.frames import FD_LENGTHS
from tbox.bus.recordings import (
    DAMAGED_KEPT_MAX,
    DIALECTS,
    LoggedFrame,
    Recording,
    RecordingError,
    message_of_logged,
    recording_batches,
    write_recording,
)
from tbox.model import CAN_EFF_FLAG, CAN_ERR_FLAG, CANFD_BRS, CANFD_FDF, NS_PER_MS
from tests.data import data_file

KONA = ("can", "kona-pcan-ccan-power-on-ready-off.gvret.csv")


@pytest.fixture
def log(tmp_path: Path) -> Callable[..., Recording]:
    def write(text: str | bytes, name: str = "x.log", dialect: str | None = None) -> Recording:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return Recording(path, dialect=dialect)

    return write


def essence(frames: list[LoggedFrame]) -> list[tuple[object, ...]]:
    return [(f.n, f.channel, f.can_id, f.fd, f.brs, f.data, f.remote, f.error, f.rx) for f in frames]


def frame(**given: object) -> LoggedFrame:
    fields: dict[str, object] = {
        "n": 1, "channel": 0, "t_s": 0.0, "can_id": 0x123, "fd": False, "brs": False, "data": b"\1\2",
        "remote": False, "error": False, "rx": True, "line": 1,
    }  # fmt: skip
    return LoggedFrame(**{**fields, **given})  # type: ignore[arg-type]


# --- each dialect ---------------------------------------------------------------------------------------


def test_candump_with_time_name_and_direction(log: Callable[..., Recording]) -> None:
    recording = log(
        "(1436509052.249713) can1 123#0102FF R\n(1436509052.25) can1 1ABCDEF0# T\n"
        "(1436509053.0) vcan0 321##7" + "AB" * 12 + "\n(1436509054.0) can1 044#R\n"
        "(1436509055.0) can1 20000080#0000000000000000\n(1436509056.0) can1 7FF#1122334455667788_F\n"
    )
    frames = list(recording)
    assert recording.dialect == "candump" and not recording.damaged
    assert essence(frames) == [
        (1, 1, 0x123, False, False, b"\1\2\xff", False, False, True),
        (2, 1, 0x1ABCDEF0 | CAN_EFF_FLAG, False, False, b"", False, False, False),
        (1, 0, 0x321, True, True, b"\xab" * 12, False, False, True),
        (3, 1, 0x44, False, False, b"", True, False, True),
        (4, 1, 0x80 | CAN_ERR_FLAG, False, False, bytes(8), False, True, True),
        (5, 1, 0x7FF, False, False, bytes.fromhex("1122334455667788"), False, False, True),
    ]
    assert frames[0].t_s == 1436509052.249713
    assert recording.channels == {1: "can1", 0: "vcan0"}


def test_candump_without_time_has_none(log: Callable[..., Recording]) -> None:
    frames = list(log("can0 123#01\n123#02\n"))
    assert [f.t_s for f in frames] == [None, None] and [f.data for f in frames] == [b"\1", b"\2"]


def test_candump_as_on_the_terminal(log: Callable[..., Recording]) -> None:
    recording = log(
        " (001.500000)  can0  RX - -  123   [3]  11 22 33   '.\"3'\n"
        "  can0  12345678  [08]  01 02 03 04 05 06 07 08\n"
        "  can0  TX B -  7FF  [12]  " + " ".join(["AA"] * 12) + "\n"
        "  can0  044   [0]  remote request\n"
        "  can0  20000004   [8]  00 01 00 00 00 00 00 00   ERRORFRAME\n"
        " (2026-01-02 03:04:05.250000)  can0  123   [0] \n"
    )
    frames = list(recording)
    assert recording.dialect == "candump-screen" and not recording.damaged
    assert essence(frames) == [
        (1, 0, 0x123, False, False, b'\x11"3', False, False, True),
        (2, 0, 0x12345678 | CAN_EFF_FLAG, True, False, bytes(range(1, 9)), False, False, True),
        (3, 0, 0x7FF, True, True, b"\xaa" * 12, False, False, False),
        (4, 0, 0x44, False, False, b"", True, False, True),
        (5, 0, 4 | CAN_ERR_FLAG, False, False, b"\0\1" + bytes(6), False, True, True),
        (6, 0, 0x123, False, False, b"", False, False, True),
    ]
    assert frames[0].t_s == 1.5 and frames[5].t_s == 1767323045.25


@pytest.mark.parametrize(
    ("stamps", "seconds"),
    [
        (["1953613500", "1953613800", "1953623500"], [1953.6135, 1953.6138, 1953.6235]),  # us
        (["1000", "1000", "1001", "1010", "1010", "1011"], [1.0, 1.0, 1.001, 1.01, 1.01, 1.011]),  # ms
        (["100", "200", "300", "400", "500"], [0.1, 0.2, 0.3, 0.4, 0.5]),  # ms, one slow message
        (["-2147483600", "-2147473600", "-2147463600"], [-2147.4836, -2147.4736, -2147.4636]),  # wrapped us
        (["-20", "-10", "0", "10"], [-0.02, -0.01, 0.0, 0.01]),
        (["0.5", "0.75", "1.25"], [0.5, 0.75, 1.25]),  # seconds
    ],
)
def test_the_unit_of_gvret_stamps_is_found(
    log: Callable[..., Recording], stamps: list[str], seconds: list[float]
) -> None:
    text = "Time Stamp,ID,Extended,Bus,LEN,D1,D2,D3,D4,D5,D6,D7,D8\n"
    text += "".join(f"{stamp},00000109,false,0,2,0A,0B,\n" for stamp in stamps)
    recording = log(text, "x.csv")
    assert [f.t_s for f in recording] == pytest.approx(seconds) and recording.dialect == "gvret"


def test_the_unit_of_gvret_stamps_can_be_told(log: Callable[..., Recording]) -> None:
    text = "Time Stamp,ID,Extended,Bus,LEN,D1\n5,1,false,0,1,AA\n5000,1,false,0,1,AA\n"
    assert [f.t_s for f in log(text, dialect="gvret-ms")] == [0.005, 5.0]
    assert [f.t_s for f in log(text, dialect="gvret-us")] == [5e-6, 0.005]


def test_gvret_with_directions_and_extended_ids(log: Callable[..., Recording]) -> None:
    frames = list(
        log(
            "Time Stamp,ID,Extended,Dir,Bus,LEN,D1,D2,D3,D4,D5,D6,D7,D8\r\n"
            "166064000,0000021A,false,Rx,0,2,FE,36,,,,,,\r\n166065000,1CEBFF23,true,Tx,2,3,1,2,FF,\r\n"
            "166066000,18DAF110,false,Rx,1,0,\r\n"
        )
    )
    assert essence(frames) == [
        (1, 0, 0x21A, False, False, b"\xfe6", False, False, True),
        (1, 2, 0x1CEBFF23 | CAN_EFF_FLAG, False, False, b"\1\2\xff", False, False, False),
        (1, 1, 0x18DAF110 | CAN_EFF_FLAG, False, False, b"", False, False, True),
    ]


def test_vector_asc(log: Callable[..., Recording]) -> None:
    recording = log(
        "date Sam Sep 30 15:06:13.191 2017\nbase hex  timestamps absolute\ninternal events logged\n"
        "// version 9.0.0\nBegin Triggerblock Sam Sep 30 15:06:13.191 2017\n"
        "   0.000000 Start of measurement\n"
        "   0.015991 CAN 1 Status:chip status error passive - TxErr: 132 RxErr: 0\n"
        "   1.015991 1  Statistic: D 0 R 0 XD 0 XR 0 E 0 O 0 B 0.00%\n"
        "   2.501000 1  ErrorFrame\n"
        "   3.501000 2  410x            Tx   d 3 00 0B FF  Length = 288000 BitCount = 145\n"
        "   4.501000 1  C8              Rx   r\n"
        "   5.501000 1  C9              TxRq d 1 00\n"
        "  30.300981 CANFD   3 Tx     18EBFF00x      a_name  1 0 d 32 " + "9E " * 32 + " 130000 130 3000 0\n"
        "  30.506898 CANFD   1 Rx        50      0 0 8  8 01 02 03 04 05 06 07 08 0 0 1000 0\n"
        "End TriggerBlock\n"
    )
    frames = list(recording)
    assert recording.dialect == "asc" and not recording.damaged
    assert essence(frames) == [
        (1, 0, CAN_ERR_FLAG, False, False, b"", False, True, True),
        (1, 1, 0x410 | CAN_EFF_FLAG, False, False, b"\0\x0b\xff", False, False, False),
        (2, 0, 0xC8, False, False, b"", True, False, True),
        (1, 2, 0x18EBFF00 | CAN_EFF_FLAG, True, True, b"\x9e" * 32, False, False, False),
        (3, 0, 0x50, True, False, bytes(range(1, 9)), False, False, True),
    ]
    assert [f.t_s for f in frames] == [2.501, 3.501, 4.501, 30.300981, 30.506898]


def test_vector_asc_in_decimals_with_relative_times(log: Callable[..., Recording]) -> None:
    frames = list(log("base dec  timestamps relative\n 0.5 1 291 Rx d 2 10 255\n 0.25 1 100x Rx d 0\n"))
    assert [(f.t_s, f.can_id, f.data) for f in frames] == [
        (0.5, 291, b"\x0a\xff"), (0.75, 100 | CAN_EFF_FLAG, b"")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (  # 1.0, without a version
            "     1)      1841 0001 8  00 00 00 00 00 00 00 00 \n     2)      1842 00000123 2  01 02\n"
            "     3)      1900 FFFFFFFF 4  00 00 00 04\n     4)      1901 0003 3  RTR\n",
            [(0, 1.841, 1, bytes(8)), (0, 1.842, 0x123 | CAN_EFF_FLAG, b"\1\2"), (0, 1.901, 3, b"")],
        ),
        (
            ";$FILEVERSION=1.1\n;$STARTTIME=37704.5\n  1)    17.7  Rx     0001  8  01 02 03 04 05 06 07 08\n"
            "  2)    18.0  Warng  FFFFFFFF  4  00 00 00 08  BUSHEAVY\n  3)    20.5  Tx    0002  1  AA\n",
            [(0, 0.0177, 1, bytes(range(1, 9))), (0, 0.0205, 2, b"\xaa")],
        ),
        (
            ";$FILEVERSION=1.3\n      1)      1059.900 2  Rx        0300 -  2    00 01\n",
            [(1, 1.0599, 0x300, b"\0\1")],
        ),
        (
            ";$FILEVERSION=2.1\n;$COLUMNS=N,O,T,B,I,d,R,L,D\n"
            "      1      1059.900 DT 1      0300 Rx -  7    00 00 00 00 04 00 00\n"
            "      2      1283.231 FB 2  18DAF110 Tx -  13   " + "02 " * 32 + "\n"
            "      3      1298.945 ST 1         - Rx -  4    00 00 00 00\n"
            "      4      1323.201 RR 1      0300 Rx -  7\n      5  1400.0 ER 1 - Rx - 5 04 00 02 00 00\n",
            [
                (0, 1.0599, 0x300, b"\0\0\0\0\4\0\0"), (1, 1.283231, 0x18DAF110 | CAN_EFF_FLAG, b"\2" * 32),
                (0, 1.323201, 0x300, b""), (0, 1.4, CAN_ERR_FLAG, b""),
            ],
        ),
        (
            ";$FILEVERSION=2.0\n;$COLUMNS=N,O,T,I,d,l,D\n   1   10.5 FD 0300 Rx 12 " + "0A " * 12 + "\n",
            [(0, 0.0105, 0x300, b"\n" * 12)],
        ),
    ],
    ids=["1.0", "1.1", "1.3", "2.1", "2.0"],
)  # fmt: skip
def test_pcan_trc_of_all_versions(
    log: Callable[..., Recording], text: str, expected: list[tuple[object, ...]]
) -> None:
    recording = log(text, "x.trc")
    frames = list(recording)
    assert recording.dialect == "trc" and not recording.damaged
    assert [(f.channel, pytest.approx(f.t_s), f.can_id, f.data) for f in frames] == expected


def test_ovms_crtd(log: Callable[..., Recording]) -> None:
    recording = log(
        "100.602 CXX Info Type:crtd; Path:'/sd/drive.crtd';\n1542473901.020305 1R11 7E8 02 01 0C\n"
        "1542473901.021 2T29 18DAF110 FF\n1542473901.022 R11 100\n1542473901.03 1CEV vehicle.on\n", "x.crtd",
    )  # fmt: skip
    assert recording.dialect == "crtd"
    assert essence(list(recording)) == [
        (1, 0, 0x7E8, False, False, b"\2\1\x0c", False, False, True),
        (1, 1, 0x18DAF110 | CAN_EFF_FLAG, False, False, b"\xff", False, False, False),
        (2, 0, 0x100, False, False, b"", False, False, True),
    ]
    assert not recording.damaged


def test_mf4_as_python_can_writes_it(tmp_path: Path) -> None:
    pytest.importorskip("asammdf", reason="asammdf is not installed (pip install tbox[mf4])")
    frames = [
        frame(t_s=100.0, can_id=0x12),
        frame(t_s=100.5, can_id=0x99 | CAN_EFF_FLAG, data=bytes(64), fd=True),
    ]
    path = tmp_path / "x.mf4"
    with load_mf4().MF4Writer(path) as writer:
        for one in frames:
            writer.on_message_received(message_of_logged(one))
    recording = Recording(path)
    assert recording.dialect == "mf4"
    assert [(f.can_id, f.data, f.fd) for f in recording] == [(f.can_id, f.data, f.fd) for f in frames]


# --- there and back -------------------------------------------------------------------------------------

payloads = st.sampled_from(FD_LENGTHS).flatmap(lambda size: st.binary(min_size=size, max_size=size))


@st.composite
def logged(draw: st.DrawFn) -> LoggedFrame:
    fd = draw(st.booleans())
    data = draw(payloads if fd else st.binary(max_size=8))
    extended = draw(st.booleans())
    number = draw(st.integers(0, 0x1FFFFFFF if extended else 0x7FF))
    return frame(
        channel=draw(st.integers(0, 3)), can_id=number | (CAN_EFF_FLAG if extended else 0), data=data, fd=fd,
        brs=fd and draw(st.booleans()), rx=draw(st.booleans()),
    )  # fmt: skip


def numbered(frames: list[LoggedFrame]) -> list[LoggedFrame]:
    counts: dict[int, int] = {}
    out = []
    for index, one in enumerate(frames):
        counts[one.channel] = counts.get(one.channel, 0) + 1
        out.append(one._replace(n=counts[one.channel], t_s=1000 + index / 1000))
    return out


@pytest.mark.parametrize("name", ["x.candump", "x.candump.gz", "x.asc", "x.asc.gz", "x.blf"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frames=st.lists(logged(), min_size=1, max_size=20).map(numbered))
def test_what_is_written_reads_back(tmp_path: Path, name: str, frames: list[LoggedFrame]) -> None:
    dialect = name.split(".")[1]
    path = tmp_path / name
    assert write_recording(path, frames, dialect) == len(frames)
    recording = Recording(path)
    got = list(recording)
    if dialect == "asc":  # a remote frame there is an FD frame of no bytes
        assert recording.dialect == "asc"
    assert essence(got) == essence(frames) and not recording.damaged
    steps = [round(f.t_s - got[0].t_s, 4) for f in got if f.t_s is not None and got[0].t_s is not None]
    assert steps == [round(index / 1000, 4) for index in range(len(frames))]


@pytest.mark.parametrize("dialect", ["candump", "asc", "blf", "trc"])
def test_python_can_is_read_as_it_reads_itself(tmp_path: Path, dialect: str) -> None:
    writers = {
        "candump": can.CanutilsLogWriter,
        "asc": can.ASCWriter,
        "blf": can.BLFWriter,
        "trc": can.TRCWriter,
    }
    readers = {
        "candump": can.CanutilsLogReader,
        "asc": can.ASCReader,
        "blf": can.BLFReader,
        "trc": can.TRCReader,
    }
    messages = [
        can.Message(timestamp=1000.0 + n / 1000, arbitration_id=(0x100 + n) << (18 if n % 2 else 0),
                    is_extended_id=bool(n % 2), data=bytes([n] * (n % 9)), channel=n % 2, is_rx=n % 3 > 0)
        for n in range(50)
    ]  # fmt: skip
    path = tmp_path / f"x.{dialect}"
    if dialect == "candump":
        path = tmp_path / "x.log"
    with writers[dialect](path) as writer:
        for message in messages:
            writer.on_message_received(message)
    recording = Recording(path)
    got = list(recording)
    assert recording.dialect == dialect and not recording.damaged
    theirs = list(readers[dialect](path))
    assert len(got) == len(theirs) == 50
    for ours, peer in zip(got, theirs, strict=True):
        assert message_of_logged(ours).equals(peer, timestamp_delta=None, check_channel=False)


def test_times_below_zero_are_shifted_where_the_format_cannot_say_them(tmp_path: Path) -> None:
    frames = numbered([frame(), frame()])
    frames = [f._replace(t_s=-2147.0 + n) for n, f in enumerate(frames)]
    for dialect in ("asc", "blf"):
        write_recording(tmp_path / "x", frames, dialect)
        got = [f.t_s for f in Recording(tmp_path / "x")]
        assert got[0] is not None and got[1] is not None and got[1] - got[0] == pytest.approx(1.0)


# --- damage ---------------------------------------------------------------------------------------------


def test_damaged_lines_are_counted_with_their_numbers_and_the_rest_is_read(
    log: Callable[..., Recording],
) -> None:
    recording = log(
        b"(1.0) can0 123#01\n(1.1) can0 123#0\n(1.2) can0 1234#00\n\n(1.3) can0 FFF#00\n(1.4) can0 12\0\0\0\n"
        b"(1.5) can0 123#112233445566778899\n(x) can0 123#01\n\xff\xfe\n"
        + b"9" * 5000
        + b"\n(1.6) can0 123#02\n"
    )
    assert [f.line for f in recording] == [1, 11]
    assert recording.damaged == [
        (2, "not hexadecimal"), (3, "not a candump line"), (5, "id out of range"), (6, "NUL bytes"),
        (7, "too many bytes"), (8, "not a time"), (9, "not text"), (10, "line too long"),
    ]  # fmt: skip
    assert sum(recording.damaged_count.values()) == 8


def test_a_time_that_no_clock_shows_is_damage(log: Callable[..., Recording]) -> None:
    recording = log("(1.0) can0 123#01\n(99999999999.0) can0 123#02\n(-5e9) can0 123#03\n(2.0) can0 123#04\n")
    assert sum(len(batch) for batch in recording_batches(recording, None, 0)) == 2
    assert recording.damaged == [(2, "time out of range"), (3, "time out of range")]


def test_the_list_of_damage_is_bounded_and_the_count_is_not(log: Callable[..., Recording]) -> None:
    recording = log("can0 1#\n" * 3000 + "can0 123#01\n", dialect="candump")
    assert len(list(recording)) == 1
    assert len(recording.damaged) == DAMAGED_KEPT_MAX
    assert recording.damaged_count == {"not a candump line": 3000}


def test_each_reading_begins_anew(log: Callable[..., Recording]) -> None:
    recording = log("can0 123#01\nrubbish\ncan0 123#02\n")
    assert [f.n for f in recording] == [f.n for f in recording] == [1, 2]
    assert recording.damaged_count == {"not a candump line": 1}


def test_a_gzip_cut_short_gives_what_it_holds(log: Callable[..., Recording]) -> None:
    whole = gzip.compress("".join(f"can0 123#{os.urandom(8).hex()}\n" for _ in range(5000)).encode())
    recording = log(whole[: len(whole) // 2], "x.log.gz")
    assert 1000 < len(list(recording)) < 4000
    assert recording.damaged_count == {"gzip cut short": 1}


def test_a_blf_cut_short_gives_what_it_holds(tmp_path: Path, log: Callable[..., Recording]) -> None:
    frames = numbered([frame(data=os.urandom(8)) for _ in range(20_000)])
    write_recording(tmp_path / "whole.blf", frames, "blf")
    whole = (tmp_path / "whole.blf").read_bytes()
    recording = log(whole[: len(whole) // 2], "x.blf")
    assert 1000 < len(list(recording)) < 20_000
    assert sum(recording.damaged_count.values()) == 1


def test_what_is_no_recording_is_refused_in_one_line(log: Callable[..., Recording], tmp_path: Path) -> None:
    for text in ("", "hello\nworld\n", b"\0" * 100):
        with pytest.raises(RecordingError, match="no frame in any known format"):
            log(text)
    with pytest.raises(RecordingError, match="cannot read"):
        Recording(tmp_path / "none")
    with pytest.raises(RecordingError, match="unknown format"):
        log("can0 123#01\n", dialect="cantata")
    with pytest.raises(RecordingError, match="cannot write trc"):
        write_recording(tmp_path / "x", [], "trc")


SAMPLE_LINES = [
    "(1.0) can0 123#0102 R", "can0 123##10102", " can0  123   [2]  11 22", "123,0000021A,false,0,2,FE,36,",
    "Time Stamp,ID,Extended,Bus,LEN,D1", "1.5 1 123x Rx d 2 01 02", "1.5 CANFD 1 Rx 50 n 0 0 8 8 01 02 0 0",
    ";$COLUMNS=N,O,T,B,I,d,R,L,D", "1 1059.9 DT 1 0300 Rx - 2 00 01", "1) 17.7 Rx 0001 2 01 02",
    "154.02 1R11 7E8 02 01", "base dec timestamps relative", "nan", "1e400,1,true,0,0,", "",
]  # fmt: skip


# MF4 is left out: asammdf's own destructor complains about files it could not open.
@pytest.mark.parametrize("dialect", [dialect for dialect in DIALECTS if dialect != "mf4"])
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_file_makes_a_reader_raise(tmp_path: Path, dialect: str, data: st.DataObject) -> None:
    line = st.sampled_from(SAMPLE_LINES).map(str.encode)
    mangled = st.tuples(line, st.integers(0, 40), st.binary(max_size=6)).map(
        lambda given: given[0][: given[1]] + given[2] + given[0][given[1] :]
    )
    head = blf_bytes() if dialect == "blf" else b""
    content = data.draw(st.lists(st.one_of(line, mangled, st.binary(max_size=80)), max_size=15))
    cut = data.draw(st.integers(0, len(head)))
    path = tmp_path / "fuzzed"
    path.write_bytes(head[:cut] + b"\n".join(content) + head[cut:])
    recording = Recording(path, dialect=dialect)
    for one in recording:
        assert len(one.data) <= (64 if one.fd else 8)
        assert one.t_s is None or one.t_s == one.t_s
    assert sum(len(batch) for batch in recording_batches(recording, None, 0)) <= len(list(recording))


def blf_bytes() -> bytes:
    buffer = io.BytesIO()
    buffer.close = lambda: None  # type: ignore[method-assign]
    with can.BLFWriter(buffer) as writer:
        for number in range(5):
            writer.on_message_received(message_of_logged(frame(can_id=number)))
    return buffer.getvalue()


# --- as batches, and the real thing ---------------------------------------------------------------------


def test_batches_hold_the_kernels_layout_and_times_that_never_run_backwards() -> None:
    frames = [
        frame(t_s=-5.0, can_id=1 | CAN_EFF_FLAG, data=b"\xaa"), frame(t_s=-4.5, remote=True, data=b""),
        frame(t_s=-4.0, channel=1), frame(t_s=-4.9, fd=True, brs=True, data=bytes(range(64))),
        frame(t_s=None),
        frame(t_s=-4.95), frame(error=True),
    ]  # fmt: skip
    (batch,) = recording_batches(frames, 0, channel=3)
    assert batch.channel == 3 and len(batch) == 4
    assert batch.frames["id"].tolist() == [1 | CAN_EFF_FLAG, 0x123, 0x123, 0x123]
    assert batch.frames["flags"].tolist() == [0, CANFD_FDF | CANFD_BRS, 0, 0]
    assert batch.frames["data"][0].tolist() == [0xAA] + [0] * 63
    assert batch.t_ns.tolist() == [0, 100 * NS_PER_MS, 100 * NS_PER_MS, 100 * NS_PER_MS]


@pytest.mark.slow
def test_the_kona_recording_is_read_whole() -> None:
    recording = Recording(data_file(*KONA))
    frames = list(recording)
    assert recording.dialect == "gvret" and not recording.damaged
    assert sum(f.channel == 0 for f in frames) == 24_263 == max(f.n for f in frames if f.channel == 0)
    assert (frames[0].t_s, frames[0].can_id, frames[0].data.hex()) == (1953.6135, 0x109, "000100ffffff0f3d")
    assert sum(len(batch) for batch in recording_batches(recording, 0, 0)) == 24_263
