"""The frames of the simulated vehicle as data, and the DBC text they make. Packs nothing, knows no physics.

The files in dbc/ are written from these tables (`python -m tbox.sim.layout dbc`) and a test holds both
together; cantools, reading the files, is the judge of the packing.

Every message of an ECU starts with a CRC in byte 0 and an alive counter, 0 to 14, in the low nibble of
byte 1 (AUTOSAR E2E profile 1 counts so; 15 is never sent). dbc/README.md describes both.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

CELLS = 192
MODULES = 8
CELLS_PER_MODULE = CELLS // MODULES
PROBES = 48
PROBES_PER_MODULE = PROBES // MODULES
PROBES_PER_FRAME = 24

ISOLATION_REQUEST_ID = 0x6F0
CRC_NAME = "CRC"
COUNTER_NAME = "AliveCounter"
COUNTER_VALUES = 15  # 0..14

_SENDER_BMS, _SENDER_VEHICLE, _SENDER_TBOX = "BMS", "VCU", "TBOX"


class Sig(NamedTuple):
    """One signal: value = raw * scale + offset. start: as a DBC counts it (Motorola: the MSB's bit).

    lo, hi: the physical range. sna: the raw value that says "signal not available", outside [lo, hi].
    mux: the selector value under which it is present. selector: it is the selector.
    """

    name: str
    start: int
    bits: int
    scale: float = 1.0
    offset: float = 0.0
    lo: float = 0.0
    hi: float = 0.0
    unit: str = ""
    signed: bool = False
    sna: int | None = None
    choices: Mapping[int, str] = {}
    mux: int | None = None
    selector: bool = False

    @property
    def raw_min(self) -> int:
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def raw_max(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1


class Msg(NamedTuple):
    """One message. cycle_ms: the nominal cycle. motorola: every signal's byte order."""

    name: str
    can_id: int
    length: int
    cycle_ms: int
    sender: str
    signals: tuple[Sig, ...]
    comment: str
    motorola: bool = False

    @property
    def fd(self) -> bool:
        return self.length > 8

    @property
    def data_id(self) -> int:
        """The byte that ends the CRC's input, so that a frame under a wrong id does not pass."""
        return self.can_id & 0xFF


def _head(motorola: bool = False) -> tuple[Sig, Sig]:
    crc = Sig(CRC_NAME, 7 if motorola else 0, 8, hi=255)
    return crc, Sig(COUNTER_NAME, 11 if motorola else 8, 4, hi=14)


# --- the BMS, Intel byte order ------------------------------------------------------------------------


def cell_name(cell: int) -> str:
    return f"CellVoltage_{cell:03d}"


def probe_name(probe: int) -> str:
    return f"ProbeTemperature_{probe:02d}"


def _cells(module: int) -> Msg:
    first = module * CELLS_PER_MODULE
    cells = tuple(
        Sig(cell_name(first + i), 16 + 16 * i, 16, 0.001, hi=5, unit="V", sna=0xFFFF)
        for i in range(CELLS_PER_MODULE)
    )
    total = Sig("ModuleVoltage", 400, 16, 0.002, hi=130, unit="V", sna=0xFFFF)
    return Msg(
        f"BMS_Cells_M{module}", 0x110 + module, 64, 100, _SENDER_BMS, (*_head(), *cells, total),
        f"Module {module}: cells {first} to {first + CELLS_PER_MODULE - 1}, from 0 at the negative end.",
    )  # fmt: skip


def _temps(half: int) -> Msg:
    first = half * PROBES_PER_FRAME
    probes = tuple(
        Sig(probe_name(first + i), 16 + 16 * i, 16, 0.1, lo=-40, hi=200, unit="degC", signed=True, sna=0x7FFF)
        for i in range(PROBES_PER_FRAME)
    )
    return Msg(
        f"BMS_Temps_{half}", 0x120 + half, 64, 200, _SENDER_BMS, (*_head(), *probes),
        f"Probes {first} to {first + PROBES_PER_FRAME - 1}; probe j: module j div {PROBES_PER_MODULE}.",
    )  # fmt: skip


BMS_PACK = Msg(
    "BMS_Pack", 0x100, 16, 100, _SENDER_BMS,
    (
        *_head(),
        Sig("PackVoltage", 16, 16, 0.02, hi=1200, unit="V", sna=0xFFFF),
        Sig("PackCurrent", 32, 16, 0.1, lo=-3000, hi=3000, unit="A", signed=True, sna=0x7FFF),
        Sig("Soc", 48, 16, 0.01, hi=110, unit="%", sna=0xFFFF),
        Sig("Soh", 64, 8, 0.5, hi=100, unit="%", sna=0xFF),
        Sig("LinkVoltage", 80, 16, 0.02, hi=1200, unit="V", sna=0xFFFF),
        Sig("DischargeCurrentLimit", 96, 16, 0.1, hi=3000, unit="A", sna=0xFFFF),
        Sig("ChargeCurrentLimit", 112, 16, 0.1, hi=3000, unit="A", sna=0xFFFF),
    ),
    "The pack as a whole. PackCurrent is positive into the battery (COVESA VSS).",
)  # fmt: skip

BMS_STATUS = Msg(
    "BMS_Status", 0x101, 16, 100, _SENDER_BMS,
    (
        *_head(),
        Sig("ContactorState", 16, 3, hi=3, sna=7,
            choices={0: "Open", 1: "Precharge", 2: "Closed", 3: "Failed"}),
        Sig("ContactorCommand", 19, 2, hi=1, sna=3, choices={0: "Open", 1: "Close"}),
        Sig("Hvil", 21, 2, hi=1, sna=3, choices={0: "Interrupted", 1: "Closed"}),
        Sig("IsolationAck", 24, 2, hi=1, sna=3, choices={0: "None", 1: "Taken"}),
        Sig("BmsState", 26, 3, hi=4, sna=7,
            choices={0: "Sleep", 1: "Precharge", 2: "Operate", 3: "Derate", 4: "Isolated"}),
        Sig("IsolationResistance", 32, 16, hi=50000, unit="kOhm", sna=0xFFFF),
        Sig("IsolationAckIndex", 48, 16, hi=65535),
        Sig("CoolantTemperature", 64, 16, 0.1, lo=-40, hi=120, unit="degC", signed=True, sna=0x7FFF),
        Sig("IsolationRequestsRefused", 80, 8, hi=255),
    ),
    "Contactors, interlock, isolation, and the answer to TBOX_IsolationRequest: IsolationAck is Taken from "
    "the first accepted request until it is withdrawn, IsolationAckIndex repeats that request's index.",
)  # fmt: skip

BMS_EXTREMES = Msg(
    "BMS_Extremes", 0x102, 16, 100, _SENDER_BMS,
    (
        *_head(),
        Sig("CellVoltageMin", 16, 16, 0.001, hi=5, unit="V", sna=0xFFFF),
        Sig("CellVoltageMax", 32, 16, 0.001, hi=5, unit="V", sna=0xFFFF),
        Sig("CellVoltageMinId", 48, 8, hi=191, sna=0xFF),
        Sig("CellVoltageMaxId", 56, 8, hi=191, sna=0xFF),
        Sig("TemperatureMin", 64, 16, 0.1, lo=-40, hi=200, unit="degC", signed=True, sna=0x7FFF),
        Sig("TemperatureMax", 80, 16, 0.1, lo=-40, hi=200, unit="degC", signed=True, sna=0x7FFF),
        Sig("TemperatureMinId", 96, 8, hi=47, sna=0xFF),
        Sig("TemperatureMaxId", 104, 8, hi=47, sna=0xFF),
    ),
    "Extremes of the last complete scan, and which cell and probe they are, from 0.",
)  # fmt: skip

ISOLATION_REQUEST = Msg(
    "TBOX_IsolationRequest", ISOLATION_REQUEST_ID, 8, 200, _SENDER_TBOX,
    (
        *_head(),
        Sig("IsolationRequest", 16, 8, hi=1, choices={0: "Withdrawn", 1: "OpenContactors"}),
        Sig("IsolationReason", 24, 8, hi=255),
        Sig("IsolationIndex", 32, 16, hi=65535),
    ),
    "The T-Box asks the BMS to open the contactors. The BMS checks CRC and counter and decides by its own "
    "rule. Sent only while a request stands or is being withdrawn. A classic frame.",
)  # fmt: skip

BMS_CELLS = tuple(_cells(module) for module in range(MODULES))
BMS_TEMPS = tuple(_temps(half) for half in range(PROBES // PROBES_PER_FRAME))

# --- the multiplexed variant --------------------------------------------------------------------------

MUX_CELL_OFFSET_V = 1.0  # 12 bits above 1 V, as VW's MEB packs them (FACTS, CAN layouts)


def _mux_module(module: int) -> tuple[Sig, ...]:
    cell, probe = module * CELLS_PER_MODULE, module * PROBES_PER_MODULE
    cells = tuple(
        Sig(cell_name(cell + i), 24 + 12 * i, 12, 0.001, MUX_CELL_OFFSET_V, 1, 5, "V", sna=0xFFF, mux=module)
        for i in range(CELLS_PER_MODULE)
    )
    probes = tuple(
        Sig(probe_name(probe + i), 312 + 8 * i, 8, 0.5, -40, -40, 85, "degC", sna=0xFF, mux=module)
        for i in range(PROBES_PER_MODULE)
    )
    return cells + probes


BMS_CELLS_MUX = Msg(
    "BMS_CellsMux", 0x118, 48, 12, _SENDER_BMS,
    (
        *_head(),
        Sig("Module", 16, 8, hi=MODULES - 1, selector=True),
        *(sig for module in range(MODULES) for sig in _mux_module(module)),
    ),
    "All cells and probes under one id: Module selects which 24 cells and 6 probes the frame carries.",
)  # fmt: skip

# --- the vehicle, Motorola byte order -----------------------------------------------------------------

VEH_MOTION = Msg(
    "VEH_Motion", 0x240, 8, 50, _SENDER_VEHICLE,
    (
        *_head(motorola=True),
        Sig("Gear", 14, 3, hi=3, sna=7, choices={0: "P", 1: "R", 2: "N", 3: "D"}),
        Sig("Speed", 23, 16, 0.01, hi=300, unit="km/h", sna=0xFFFF),
        Sig("MotorSpeed", 39, 16, lo=-20000, hi=20000, unit="rpm", signed=True, sna=0x7FFF),
        Sig("BrakePedal", 55, 8, 0.5, hi=100, unit="%", sna=0xFF),
        Sig("AcceleratorPedal", 63, 8, 0.5, hi=100, unit="%", sna=0xFF),
    ),
    "How the vehicle moves.", motorola=True,
)  # fmt: skip

VEH_POWER = Msg(
    "VEH_Power", 0x250, 8, 200, _SENDER_VEHICLE,
    (
        *_head(motorola=True),
        Sig("Ignition", 14, 3, hi=3, sna=7, choices={0: "Off", 1: "Accessory", 2: "On", 3: "Start"}),
        Sig("LowVoltage", 23, 16, 0.001, hi=36, unit="V", sna=0xFFFF),
        Sig("MotorTemperature", 39, 8, 1, -40, -40, 210, "degC", sna=0xFF),
        Sig("AmbientTemperature", 47, 8, 0.5, -40, -40, 85, "degC", sna=0xFF),
    ),
    "Ignition, the low-voltage supply and temperatures.", motorola=True,
)  # fmt: skip

VEH_CHARGING = Msg(
    "VEH_Charging", 0x260, 8, 500, _SENDER_VEHICLE,
    (
        *_head(motorola=True),
        Sig("ChargingState", 14, 3, hi=3, sna=7, choices={0: "Unplugged", 1: "Idle", 2: "AC", 3: "DC"}),
        Sig("ChargingPower", 23, 16, 0.01, hi=320, unit="kW", signed=True, sna=0x7FFF),
        Sig("ChargeTargetSoc", 39, 8, 0.5, hi=100, unit="%", sna=0xFF),
    ),
    "The charge session.", motorola=True,
)  # fmt: skip

VEH_ODOMETER = Msg(
    "VEH_Odometer", 0x270, 8, 1000, _SENDER_VEHICLE,
    (
        *_head(motorola=True),
        Sig("Odometer", 23, 32, 0.01, hi=10_000_000, unit="km", sna=0xFFFF_FFFF),
        Sig("Range", 55, 16, 0.1, hi=2000, unit="km", sna=0xFFFF),
    ),
    "Distance driven, and distance left at the present consumption.", motorola=True,
)  # fmt: skip

VEH_POSITION = Msg(
    "VEH_Position", 0x280, 20, 200, _SENDER_VEHICLE,
    (
        *_head(motorola=True),
        Sig("FixState", 14, 3, hi=3, sna=7, choices={0: "None", 1: "DeadReckoning", 2: "Fix2D", 3: "Fix3D"}),
        Sig("Latitude", 23, 32, 1e-7, lo=-90, hi=90, unit="deg", signed=True, sna=0x7FFF_FFFF),
        Sig("Longitude", 55, 32, 1e-7, lo=-180, hi=180, unit="deg", signed=True, sna=0x7FFF_FFFF),
        Sig("Heading", 87, 16, 0.01, hi=360, unit="deg", sna=0xFFFF),
        Sig("Hdop", 103, 8, 0.1, hi=25, sna=0xFF),
        Sig("Satellites", 111, 8, hi=64, sna=0xFF),
        Sig("Altitude", 119, 16, 0.5, lo=-500, hi=9000, unit="m", signed=True, sna=0x7FFF),
    ),
    "The GNSS receiver's fix (WGS 84); optional, a vehicle may not carry it on this bus.", motorola=True,
)  # fmt: skip

_BMS_COMMON = (BMS_PACK, BMS_STATUS, BMS_EXTREMES)
DATABASES: dict[str, tuple[Msg, ...]] = {
    "tbox_bms.dbc": (*_BMS_COMMON, *BMS_CELLS, *BMS_TEMPS, ISOLATION_REQUEST),
    "tbox_bms_mux.dbc": (*_BMS_COMMON, BMS_CELLS_MUX, ISOLATION_REQUEST),
    "tbox_vehicle.dbc": (VEH_MOTION, VEH_POWER, VEH_CHARGING, VEH_ODOMETER, VEH_POSITION),
}
_TITLES = {
    "tbox_bms.dbc": "The battery: 192 cells and 48 probes on CAN-FD. Written by tbox.sim.layout.",
    "tbox_bms_mux.dbc": "The battery, cells and probes multiplexed under one id. Written by tbox.sim.layout.",
    "tbox_vehicle.dbc": "The vehicle beside its battery. Written by tbox.sim.layout.",
}

# --- DBC text -----------------------------------------------------------------------------------------

_FRAME_FORMATS = ("StandardCAN", "ExtendedCAN", *("reserved",) * 12, "StandardCAN_FD", "ExtendedCAN_FD")


def dbc_text(name: str) -> str:
    """Return the DBC file `name` of DATABASES as text."""
    messages = DATABASES[name]
    lines = ['VERSION ""', "", "NS_ :", "", "BS_:", "", "BU_: BMS VCU TBOX", ""]
    for msg in messages:
        lines += [f"BO_ {msg.can_id} {msg.name}: {msg.length} {msg.sender}"]
        lines += [_signal_line(msg, sig) for sig in msg.signals] + [""]
    lines += [f'CM_ "{_TITLES[name]}";']
    lines += [f'CM_ BO_ {msg.can_id} "{msg.comment}";' for msg in messages]
    lines += [
        'BA_DEF_ BO_ "GenMsgCycleTime" INT 0 60000;',
        f'BA_DEF_ BO_ "VFrameFormat" ENUM {_quoted(_FRAME_FORMATS)};',
        'BA_DEF_ BO_ "E2EDataId" INT 0 255;',
        'BA_DEF_DEF_ "GenMsgCycleTime" 0;',
        'BA_DEF_DEF_ "VFrameFormat" "StandardCAN";',
        'BA_DEF_DEF_ "E2EDataId" 0;',
    ]
    for msg in messages:
        frame_format = _FRAME_FORMATS.index("StandardCAN_FD") if msg.fd else 0
        lines += [
            f'BA_ "GenMsgCycleTime" BO_ {msg.can_id} {msg.cycle_ms};',
            f'BA_ "VFrameFormat" BO_ {msg.can_id} {frame_format};',
            f'BA_ "E2EDataId" BO_ {msg.can_id} {msg.data_id};',
        ]
    lines += [line for msg in messages for sig in msg.signals for line in _value_lines(msg, sig)]
    return "\n".join(lines) + "\n"


def _quoted(texts: Iterable[str]) -> str:
    return ",".join(f'"{text}"' for text in texts)


def _signal_line(msg: Msg, sig: Sig) -> str:
    mux = " M" if sig.selector else f" m{sig.mux}" if sig.mux is not None else ""
    order = f"{0 if msg.motorola else 1}{'-' if sig.signed else '+'}"
    receiver = "BMS" if msg.sender == _SENDER_TBOX else "TBOX"
    return (
        f" SG_ {sig.name}{mux} : {sig.start}|{sig.bits}@{order} ({sig.scale:g},{sig.offset:g}) "
        f'[{sig.lo:.12g}|{sig.hi:.12g}] "{sig.unit}" {receiver}'
    )


def _value_lines(msg: Msg, sig: Sig) -> list[str]:
    values = dict(sig.choices) | ({sig.sna: "SNA"} if sig.sna is not None else {})
    if not values:
        return []
    texts = " ".join(f'{raw} "{text}"' for raw, text in sorted(values.items()))
    return [f"VAL_ {msg.can_id} {sig.name} {texts} ;"]


if __name__ == "__main__":
    for file_name in DATABASES:
        Path(sys.argv[1], file_name).write_text(dbc_text(file_name), encoding="ascii")
