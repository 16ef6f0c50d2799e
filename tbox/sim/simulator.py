"""The simulated vehicle as one object: physics and ECUs in virtual time, frames out, a request in.

Pure and deterministic: the same seed, settings and faults give the same bytes, however the time is cut into
calls. It never reads a clock. `truth()` is for the judge; nothing that is judged may look at it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
import numpy as np

from tbox.errors import TboxError
from tbox.model import NS_PER_MS, NS_PER_S, CanSend, FrameBatch
from tbox.sim import layout
from tbox.sim.cell import CHEMISTRIES
from tbox.sim.ecus import Bms, BusFaults, Flags, SensorKind, Sensors, Stream, active_at
from tbox.sim.faults import Fault, known_messages
from tbox.sim.gnss import GnssFix, Place, Receiver, Route
from tbox.sim.pack import ISOLATION_HEALTHY_KOHM, Pack
from tbox.sim.packing import Floats, Ints, Packer
from tbox.sim.vehicle import CHARGING_AC, RANGE_KM_MAX, RANGE_WH_PER_KM, Vehicle, load_cycle

CHANNEL = 0
CHUNK_TICKS_MAX = 512  # physics steps recorded before they are turned into frames; bounds the memory
FRAME_SPACING_NS = 500_000  # between the frames of one scan: above the line time of 64 bytes at 500k/2M
RATE_HZ_MAX = 50_000
CURRENT_LIMIT_A = 600.0
CHARGE_TAPER_V = 0.05  # charging fades to nothing over the last of these volts below the maximum
CHARGE_FOLLOW_S = (
    10.0  # so slowly the charger follows; at once, a cold pack's own resistance would make it swing
)
ISOLATION_FILTER_S = 2.0  # the monitor measures slowly

Positive = Annotated[float, msgspec.Meta(gt=0)]


class SimSettingsError(TboxError):
    """Settings that cannot be met."""


class SimSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is simulated. The defaults are a healthy NMC pack on a city cycle, cells at 10 Hz."""

    chemistry: Literal["NMC", "LFP"] = "NMC"
    frames: Literal["plain", "mux"] = "plain"  # tbox_bms.dbc or tbox_bms_mux.dbc
    cycle: str = "mixed"
    loop: bool = True
    cells_hz: Annotated[float, msgspec.Meta(ge=0.1, le=5000)] = 10.0
    rate_hz: Annotated[float, msgspec.Meta(ge=1, le=RATE_HZ_MAX)] | None = None  # all frames together
    cycle_ms_min: Annotated[int, msgspec.Meta(ge=0, le=60_000)] = 0  # no message comes more often
    physics_ms: Annotated[int, msgspec.Meta(ge=5, le=2000)] = 100
    soc_percent: Annotated[float, msgspec.Meta(ge=0, le=100)] = 78.0
    soh_percent: Annotated[float, msgspec.Meta(ge=40, le=100)] = 96.0
    capacity_ah: Annotated[float, msgspec.Meta(ge=1, le=1000)] | None = None
    ambient_c: Annotated[float, msgspec.Meta(ge=-35, le=50)] = 21.0
    pack_c: Annotated[float, msgspec.Meta(ge=-35, le=60)] = 27.0
    cell_noise_mv: Annotated[float, msgspec.Meta(ge=0, le=50)] = 1.0
    probe_noise_c: Annotated[float, msgspec.Meta(ge=0, le=5)] = 0.1
    current_gain: Annotated[float, msgspec.Meta(ge=0.5, le=1.5)] = 1.0  # of the BMS's current sensor
    soc_error_percent: Annotated[float, msgspec.Meta(ge=-50, le=50)] = 0.0  # of the BMS at the start
    key_on_sentinels_ms: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 300
    odometer_km: Annotated[float, msgspec.Meta(ge=0, le=1_000_000)] = 12_345.0
    position: bool = True  # VEH_Position is sent
    no_fix_s: tuple[tuple[float, float], ...] = ()  # spans under cover, such as a tunnel

    @classmethod
    def idle_day(cls) -> SimSettings:
        """A pack that only rests and is noisy, at 1 Hz: cheap enough for a simulated day in a test."""
        return cls(cycle="ready", cells_hz=1.0, cycle_ms_min=1000, physics_ms=1000)


@dataclass(frozen=True)
class Truth:
    """What is really so at t_ns. Arrays: cells (192,), probes (48,). For the judge alone."""

    t_ns: int
    cell_v: Floats
    cell_soc: Floats
    cell_c: Floats
    probe_c: Floats
    pack_voltage_v: float
    pack_current_a: float
    soc: float
    isolation_kohm: float
    coolant_c: float
    speed_kmh: float
    distance_m: float
    odometer_km: float
    place: Place
    ignition: int
    charging: int
    contactor_state: int
    bms_state: int
    requests_accepted: int
    requests_refused: int
    opened_on_request_ns: tuple[int, ...]
    key_on_ns: tuple[int, ...]
    active_faults: tuple[str, ...]
    frames: int  # given out so far
    frames_lost: int  # kept from the bus by a fault
    frames_damaged: int


# Noise (standard deviations) of the readings that are no cells or probes; wheel and motor encoders count.
_NOISE = {
    "PackVoltage": 0.1, "LinkVoltage": 0.1, "PackCurrent": 0.15, "IsolationResistance": 15.0,
    "CoolantTemperature": 0.1, "LowVoltage": 0.01, "MotorTemperature": 0.3, "AmbientTemperature": 0.1,
}  # fmt: skip
_SCALAR_MESSAGES = (
    layout.BMS_PACK, layout.BMS_STATUS, layout.VEH_MOTION, layout.VEH_POWER, layout.VEH_CHARGING,
    layout.VEH_ODOMETER,
)  # fmt: skip
_PHASE_MS = {
    "VEH_Motion": 2, "BMS_Pack": 3, "BMS_Temps": 4, "BMS_Status": 6, "BMS_Cells": 8, "BMS_Extremes": 20,
    "VEH_Power": 24, "VEH_Position": 31, "VEH_Charging": 37, "VEH_Odometer": 43,
}  # fmt: skip


class _History:
    """The physics of one chunk, a row a tick; row 0 is the last tick of the chunk before."""

    def __init__(self, scalars: int) -> None:
        self.base_tick = 0
        self.rows = 0
        self.cell_v = np.zeros((CHUNK_TICKS_MAX + 1, layout.CELLS))
        self.probe_c = np.zeros((CHUNK_TICKS_MAX + 1, layout.PROBES))
        self.scalar = np.zeros((CHUNK_TICKS_MAX + 1, scalars))
        self.distance_m = np.zeros(CHUNK_TICKS_MAX + 1)

    def add(self, cell_v: Floats, probe_c: Floats, scalars: list[float], distance_m: float) -> None:
        row = self.rows
        self.cell_v[row], self.probe_c[row], self.scalar[row] = cell_v, probe_c, scalars
        self.distance_m[row] = distance_m
        self.rows += 1

    def restart(self) -> None:
        last = self.rows - 1
        for column in (self.cell_v, self.probe_c, self.scalar, self.distance_m):
            column[0] = column[last]
        self.base_tick += last
        self.rows = 1


class Simulator:
    """The vehicle, its ECUs and the faults of one run. Time starts at 0 ns."""

    def __init__(self, seed: int, settings: SimSettings | None = None, faults: Sequence[Fault] = ()) -> None:
        self.settings = settings = settings or SimSettings()
        self.faults = tuple(faults)
        _check_messages(self.faults)
        seeds = np.random.SeedSequence(seed).spawn(7)
        pack_rng, cell_rng, probe_rng, scalar_rng, gnss_rng, bus_rng, module_rng = map(
            np.random.default_rng, seeds
        )
        self._tick_ns = settings.physics_ms * NS_PER_MS
        self._pack = Pack(
            settings.chemistry, soc=settings.soc_percent / 100, soh=settings.soh_percent / 100,
            temperature_c=settings.pack_c, capacity_ah=settings.capacity_ah, faults=self.faults, rng=pack_rng,
        )  # fmt: skip
        cycle = load_cycle(settings.cycle, loop=settings.loop)
        self._vehicle = Vehicle(cycle, ambient_c=settings.ambient_c, odometer_km=settings.odometer_km)
        self._bms = Bms(stuck_closed=self._named("contactor-failed"))
        self._bus_faults = BusFaults(self.faults, bus_rng)
        self._route, self._receiver = Route(), Receiver(gnss_rng)
        self._fix_ns = 0
        cell_kind = SensorKind("cell", settings.cell_noise_mv / 1000, 0.05, 0.0, 5.0, 0.3)
        probe_kind = SensorKind("probe", settings.probe_noise_c, -50.0, -50.0, 200.0, 1.0)
        self._cell_sensors = Sensors(cell_kind, self.faults, cell_rng)
        self._probe_sensors = Sensors(probe_kind, self.faults, probe_rng)
        self._module_rng = module_rng
        self._scalar_rngs = iter(scalar_rng.spawn(len(_SCALAR_MESSAGES)))
        self._soc_counted = self._pack.soc + settings.soc_error_percent / 100
        self._isolation_kohm = ISOLATION_HEALTHY_KOHM
        self._charge_share = 0.0
        self._awake = False
        self._key_on_ns: list[int] = []
        self._tick = 0
        self._emitted = 0
        self._scalar_column = _scalar_columns()
        self._history = _History(len(self._scalar_column))
        self._cell_extremes = _Latest()
        self._probe_extremes = _Latest()
        self._streams = self._make_streams()
        self._wake(0)
        self._record()

    # --- time -----------------------------------------------------------------------------------------

    def frames_until(self, t_ns: int) -> list[FrameBatch]:
        """Advance to t_ns and return all frames due since the last call, in order of time.

        At most one batch a chunk of physics; none when nothing was due. Time never runs backwards: an
        earlier t_ns gives nothing.
        """
        batches: list[FrameBatch] = []
        target = t_ns // self._tick_ns
        while True:
            end = min(target, self._history.base_tick + CHUNK_TICKS_MAX)
            while self._tick < end:
                self._step()
            last = self._tick >= target
            batch = self._emit(t_ns if last else (self._tick + 1) * self._tick_ns - 1)
            if batch is not None:
                batches.append(batch)
            self._history.restart()
            if last:
                return batches

    def receive(self, frame: CanSend, t_ns: int) -> None:
        """Let the ECUs hear a frame somebody else put on the bus at t_ns."""
        self._bms.receive(frame, t_ns)

    def truth(self) -> Truth:
        """Return what is really so at the last physics step."""
        pack, vehicle, bms = self._pack, self._vehicle, self._bms
        t_ns = self._tick * self._tick_ns
        return Truth(
            t_ns=t_ns,
            cell_v=pack.cell_v.copy(),
            cell_soc=pack.cells.soc.copy(),
            cell_c=pack.core_c.copy(),
            probe_c=pack.bar_c.copy(),
            pack_voltage_v=pack.voltage_v,
            pack_current_a=pack.current_a,
            soc=pack.soc,
            isolation_kohm=pack.isolation_kohm,
            coolant_c=pack.coolant_c,
            speed_kmh=vehicle.speed_mps * 3.6,
            distance_m=vehicle.distance_m,
            odometer_km=vehicle.odometer_start_km + vehicle.distance_m / 1000,
            place=self._route.at(vehicle.distance_m),
            ignition=vehicle.wish.ignition,
            charging=vehicle.wish.charging,
            contactor_state=bms.contactor_state,
            bms_state=int(bms.state),
            requests_accepted=bms.accepted,
            requests_refused=bms.refused,
            opened_on_request_ns=tuple(bms.opened_ns),
            key_on_ns=tuple(self._key_on_ns),
            active_faults=tuple(fault.name for fault in self.faults if fault.active(t_ns)),
            frames=self._emitted,
            frames_lost=self._bus_faults.lost,
            frames_damaged=self._bus_faults.damaged,
        )

    # --- physics --------------------------------------------------------------------------------------

    def _named(self, name: str) -> tuple[Fault, ...]:
        return tuple(fault for fault in self.faults if fault.name == name)

    def _active(self, name: str, t_ns: int) -> bool:
        return any(fault.name == name and fault.active(t_ns) for fault in self.faults)

    def _step(self) -> None:
        """Advance the physics by one tick and record it."""
        self._tick += 1
        t_ns, dt_s = self._tick * self._tick_ns, self._tick_ns / NS_PER_S
        pack, vehicle, bms = self._pack, self._vehicle, self._bms
        bms.control(t_ns, awake=vehicle.awake, standing=vehicle.standing, current_a=self._measured_a())
        power_w = vehicle.step(
            t_ns / NS_PER_S,
            dt_s,
            drive_share=bms.limit_share,
            closed=bms.closed,
            charge_share=min(self._follow_charge(dt_s), bms.limit_share),
            dcdc=not self._active("low-voltage-lost", t_ns),
        )
        if bms.limit_share <= 0.0 and bms.closed:
            power_w = 0.0  # the BMS allows nothing, and what draws obeys
        pack.step(t_ns, dt_s, power_w, vehicle.ambient_c, closed=bms.closed)
        self._count_soc(dt_s)
        follow = 1.0 - math.exp(-dt_s / ISOLATION_FILTER_S)
        self._isolation_kohm += follow * (pack.isolation_kohm - self._isolation_kohm)
        self._wake(t_ns)
        self._record()

    def _measured_a(self) -> float:
        return self._pack.current_a * self.settings.current_gain

    def _follow_charge(self, dt_s: float) -> float:
        """Advance the share of the charge power that flows; it begins at nothing with each charge."""
        if self._vehicle.wish.charging < CHARGING_AC:
            self._charge_share = 0.0
            return 0.0
        highest_v = float(self._pack.cell_v.max())
        limit_v = CHEMISTRIES[self.settings.chemistry].v_max - 0.05
        wanted = min(1.0, max(0.0, (limit_v - highest_v) / CHARGE_TAPER_V))
        self._charge_share += (wanted - self._charge_share) * (1.0 - math.exp(-dt_s / CHARGE_FOLLOW_S))
        return self._charge_share

    def _count_soc(self, dt_s: float) -> None:
        """Advance the BMS's own coulomb counter, which believes its current sensor."""
        capacity_ah = float(self._pack.cells.capacity_ah.mean())
        self._soc_counted += self._measured_a() * dt_s / 3600.0 / capacity_ah
        self._soc_counted = min(1.0, max(0.0, self._soc_counted))

    def _wake(self, t_ns: int) -> None:
        if self._vehicle.awake and not self._awake:
            self._key_on_ns.append(t_ns)
        self._awake = self._vehicle.awake

    def _record(self) -> None:
        values = self._scalars()
        row = [values[name] for name in self._scalar_column]
        self._history.add(self._pack.cell_v, self._pack.bar_c, row, self._vehicle.distance_m)

    def _scalars(self) -> dict[str, float]:
        """The value of every signal that is no cell, probe or fix, before noise, by its DBC name."""
        pack, vehicle, bms = self._pack, self._vehicle, self._bms
        voltage_v = pack.voltage_v
        energy_wh = pack.soc * float(pack.cells.capacity_ah.mean()) * voltage_v
        pedal = vehicle.acceleration * 25.0
        return {
            "PackVoltage": voltage_v,
            "PackCurrent": self._measured_a(),
            "Soc": 100.0 * self._soc_counted,
            "Soh": 100.0 * pack.soh,
            "LinkVoltage": voltage_v if bms.closed else 0.0,
            "DischargeCurrentLimit": CURRENT_LIMIT_A * bms.limit_share,
            "ChargeCurrentLimit": CURRENT_LIMIT_A / 2 * bms.limit_share,
            "ContactorState": bms.contactor_state,
            "ContactorCommand": bms.command,
            "Hvil": 0.0 if self._active("hvil-open", self._tick * self._tick_ns) else 1.0,
            "IsolationAck": float(bms.ack),
            "BmsState": float(bms.state),
            "IsolationResistance": self._isolation_kohm,
            "IsolationAckIndex": bms.ack_index,
            "CoolantTemperature": pack.coolant_c,
            "IsolationRequestsRefused": bms.refused & 0xFF,
            "Gear": vehicle.gear,
            "Speed": vehicle.speed_mps * 3.6,
            "MotorSpeed": vehicle.motor_rpm,
            "BrakePedal": min(100.0, max(0.0, -pedal)),
            "AcceleratorPedal": min(100.0, max(0.0, pedal + 100.0 * vehicle.speed_mps / 60.0)),
            "Ignition": vehicle.wish.ignition,
            "LowVoltage": vehicle.low_v,
            "MotorTemperature": vehicle.motor_c,
            "AmbientTemperature": vehicle.ambient_c,
            "ChargingState": vehicle.wish.charging,
            "ChargingPower": vehicle.charging_w / 1000.0,
            "ChargeTargetSoc": 100.0,
            "Odometer": vehicle.odometer_start_km + vehicle.distance_m / 1000.0,
            "Range": min(RANGE_KM_MAX, energy_wh / RANGE_WH_PER_KM),
        }

    # --- frames ---------------------------------------------------------------------------------------

    def _emit(self, t_ns: int) -> FrameBatch | None:
        """Turn the recorded history into the frames due up to t_ns."""
        stuck = self._bus_faults.stuck_counters
        made = [stream.until(t_ns, self._row_of, self._sentinel, stuck) for stream in self._streams]
        parts = [part for part in made if part is not None]
        if not parts:
            return None
        frames = np.concatenate([part[0] for part in parts])
        times = np.concatenate([part[1] for part in parts])
        order = np.argsort(times, kind="stable")
        frames, times = self._bus_faults.apply(frames[order], times[order])
        self._emitted += len(times)
        return FrameBatch(CHANNEL, frames, times) if len(times) else None

    def _row_of(self, t_ns: Ints) -> Ints:
        return t_ns // self._tick_ns - self._history.base_tick

    def _sentinel(self, t_ns: Ints) -> Flags:
        """Whether an ECU is still waking up at these times, so that no value is available."""
        hidden = np.zeros(len(t_ns), dtype=np.bool_)
        for begin_ns in self._key_on_ns[-2:]:
            end_ns = begin_ns + self.settings.key_on_sentinels_ms * NS_PER_MS
            hidden |= (t_ns >= begin_ns) & (t_ns < end_ns)
        for fault in self._named("sentinels"):
            hidden |= active_at(fault, t_ns)
        return hidden

    def _make_streams(self) -> list[Stream]:
        """Every message's schedule; the extremes come after the cells and probes they are taken from."""
        settings = self.settings
        scale, cells_hz = _rates(settings)

        def stream(
            name: str, msgs: Sequence[layout.Msg], packers: Sequence[Packer],
            measure: Callable[[Ints, Ints], Floats], hz: float,
        ) -> Stream:  # fmt: skip
            period_ns = max(round(scale * NS_PER_S / hz), settings.cycle_ms_min * NS_PER_MS)
            return Stream(
                packers, [msg.can_id for msg in msgs], measure, period_ns=period_ns,
                phase_ns=_PHASE_MS[name] * NS_PER_MS, spacing_ns=FRAME_SPACING_NS,
            )  # fmt: skip

        if settings.frames == "mux":
            mux = layout.BMS_CELLS_MUX
            packers = [Packer(mux, module) for module in range(layout.MODULES)]
            streams = [stream("BMS_Cells", [mux], packers, self._measure_mux, cells_hz)]
        else:
            cells, temps = layout.BMS_CELLS, layout.BMS_TEMPS
            streams = [
                stream("BMS_Cells", cells, [Packer(cells[0])], self._measure_cells, cells_hz),
                stream("BMS_Temps", temps, [Packer(temps[0])], self._measure_temps, _hz(temps[0])),
            ]
        extremes = layout.BMS_EXTREMES
        streams.append(
            stream("BMS_Extremes", [extremes], [Packer(extremes)], self._measure_extremes, _hz(extremes))
        )
        for msg in _SCALAR_MESSAGES:
            packer = Packer(msg)
            streams.append(stream(msg.name, [msg], [packer], self._measure_scalars(packer), _hz(msg)))
        if settings.position:
            position = layout.VEH_POSITION
            streams.append(
                stream("VEH_Position", [position], [Packer(position)], self._measure_fix, _hz(position))
            )
        return streams

    def _read_cells(self, t_ns: Ints, rows: Ints) -> Floats:
        readings = self._cell_sensors.read(t_ns, self._history.cell_v[rows])
        self._cell_extremes.update(t_ns, readings)
        return readings

    def _read_probes(self, t_ns: Ints, rows: Ints) -> Floats:
        readings = self._probe_sensors.read(t_ns, self._history.probe_c[rows])
        self._probe_extremes.update(t_ns, readings)
        return readings

    def _measure_cells(self, t_ns: Ints, rows: Ints) -> Floats:
        shape = (len(rows), layout.MODULES, layout.CELLS_PER_MODULE)
        readings = self._read_cells(t_ns, rows).reshape(shape)
        total_v = self._history.cell_v[rows].reshape(shape).sum(axis=2)
        total_v += 0.01 * self._module_rng.standard_normal(total_v.shape)
        return np.concatenate([readings, total_v[:, :, None]], axis=2)

    def _measure_temps(self, t_ns: Ints, rows: Ints) -> Floats:
        return self._read_probes(t_ns, rows).reshape(len(rows), -1, layout.PROBES_PER_FRAME)

    def _measure_mux(self, t_ns: Ints, rows: Ints) -> Floats:
        modules = np.broadcast_to(np.arange(layout.MODULES, dtype=np.float64), (len(rows), layout.MODULES))
        cells = self._read_cells(t_ns, rows).reshape(len(rows), layout.MODULES, -1)
        probes = self._read_probes(t_ns, rows).reshape(len(rows), layout.MODULES, -1)
        return np.concatenate([modules[:, :, None], cells, probes], axis=2)

    def _measure_extremes(self, t_ns: Ints, rows: Ints) -> Floats:
        cells, probes = self._cell_extremes.at(t_ns), self._probe_extremes.at(t_ns)
        return np.concatenate([cells, probes], axis=1)[:, None, :]

    def _measure_scalars(self, packer: Packer) -> Callable[[Ints, Ints], Floats]:
        columns = np.array([self._scalar_column[sig.name] for sig in packer.signals])
        sigma = np.array([_NOISE.get(sig.name, 0.0) for sig in packer.signals])
        noisy, rng = sigma > 0, next(self._scalar_rngs)

        def measure(t_ns: Ints, rows: Ints) -> Floats:
            values: Floats = self._history.scalar[rows[:, None], columns]
            values[:, noisy] += sigma[noisy] * rng.standard_normal((len(rows), int(noisy.sum())))
            return values[:, None, :]

        return measure

    def _measure_fix(self, t_ns: Ints, rows: Ints) -> Floats:
        fixes = [
            self._fix_at(int(at_ns), float(self._history.distance_m[row]))
            for at_ns, row in zip(t_ns, rows, strict=True)
        ]
        return np.array(fixes, dtype=np.float64)[:, None, :]

    def _fix_at(self, t_ns: int, distance_m: float) -> GnssFix:
        covered = any(begin <= t_ns / NS_PER_S < end for begin, end in self.settings.no_fix_s)
        dt_s, self._fix_ns = (t_ns - self._fix_ns) / NS_PER_S, t_ns
        return self._receiver.fix(self._route.at(distance_m), dt_s, covered=covered)


class _Latest:
    """Extremes of the scans read so far, findable by time: min, max, and which they are."""

    def __init__(self) -> None:
        self._t_ns: Ints = np.zeros(0, dtype=np.int64)
        self._rows: Floats = np.zeros((0, 4))

    def update(self, t_ns: Ints, readings: Floats) -> None:
        usable_low = np.where(np.isnan(readings), np.inf, readings)
        usable_high = np.where(np.isnan(readings), -np.inf, readings)
        lowest, highest = usable_low.argmin(axis=1), usable_high.argmax(axis=1)
        scans = np.arange(len(readings))
        rows = np.stack([readings[scans, lowest], readings[scans, highest], lowest, highest], axis=1)
        self._t_ns = np.concatenate([self._t_ns[-1:], t_ns])
        self._rows = np.concatenate([self._rows[-1:], rows])

    def at(self, t_ns: Ints) -> Floats:
        """Return (n, 4) of the last scan before each time; NaN where there was none yet."""
        index = self._t_ns.searchsorted(t_ns, side="right") - 1
        rows = self._rows[np.maximum(index, 0)] if len(self._rows) else np.full((len(t_ns), 4), np.nan)
        known: Floats = np.where((index >= 0)[:, None], rows, np.nan)
        return known


def _scalar_columns() -> dict[str, int]:
    crc_and_counter = (layout.CRC_NAME, layout.COUNTER_NAME)
    names = [sig.name for msg in _SCALAR_MESSAGES for sig in msg.signals if sig.name not in crc_and_counter]
    assert len(set(names)) == len(names)
    return {name: i for i, name in enumerate(names)}


def _hz(msg: layout.Msg) -> float:
    return 1000.0 / msg.cycle_ms


def frames_per_s(settings: SimSettings) -> float:
    """Return how many frames a second the settings make when nothing stretches the cycles."""
    return _other_hz(settings) + layout.MODULES * settings.cells_hz


def _other_hz(settings: SimSettings) -> float:
    messages = [*_SCALAR_MESSAGES, layout.BMS_EXTREMES]
    messages += [layout.VEH_POSITION] if settings.position else []
    messages += layout.BMS_TEMPS if settings.frames == "plain" else ()
    return sum(_hz(msg) for msg in messages)


def _rates(settings: SimSettings) -> tuple[float, float]:
    """Return (stretch of all cycles, scans of all cells a second) that give settings.rate_hz frames.

    A rate above the usual raises the scans of the cells; one below it stretches every cycle alike.
    """
    usual = frames_per_s(settings)
    if settings.rate_hz is None:
        return 1.0, settings.cells_hz
    if settings.rate_hz < usual:
        return usual / settings.rate_hz, settings.cells_hz
    return 1.0, (settings.rate_hz - _other_hz(settings)) / layout.MODULES


def _check_messages(faults: Sequence[Fault]) -> None:
    known = known_messages()
    for fault in faults:
        message = int(fault.params.get("message", -1))
        if message >= 0 and message not in known:
            raise SimSettingsError(
                f"{fault.name}: no message has the id {message:#x}",
                where="fault",
                mend="take an id from the files in dbc/, or -1 for all",
            )
