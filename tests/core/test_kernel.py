"""The compiled loops equal their twins in numpy to the last bit; no array or table leads them astray."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tbox import kernel
from tbox.decode.batch import Decoder
from tbox.decode.guard import FrameGuard
from tbox.model import NS_PER_S, Now
from tbox.sim.simulator import SimSettings, Simulator
from tests import dbcs
from tests.core.test_pipeline import KINDS, ONE_BYTE, Step, Way, walk
from tests.dbcs import Msg

pytestmark = pytest.mark.skipif(
    kernel.compiled is None, reason="no kernel: tbox was installed without a C compiler"
)
KERNEL: Any = kernel.compiled  # itself, whatever a test puts in its place
Steps = list[tuple[str, int, int, int, bool]]


POWER_ID, AMBIENT_BYTE = 592, 5  # tbox_vehicle.dbc


def told(vehicle: Callable[[], Way], compiled: Any) -> tuple[Any, ...]:
    """Return what a vehicle tells: records, accounts, frames lost by message; and the pack at the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "compiled", compiled)
        way = vehicle()
    pack = way.flow.edge._engine.pack
    picture = pack.value.tobytes(), pack.t_ns.tobytes(), pack._heard.tobytes()
    return way.payloads, way.ledger.snapshot(), way.flow.decode.judge.guard.lost, picture


def busy() -> Way:
    """Every kind of traffic and nonsense, often: alarms stand, hardly anything is usual."""
    rng = np.random.default_rng(5)
    kinds = [*KINDS, *["traffic"] * 12] * 4
    return walk(ONE_BYTE, [(kind, int(rng.integers(2**32)), 100, 0, False) for kind in kinds])


def healthy() -> Way:
    """A fast bus on which all is well, but for one spike: batches are taken at once, with no second look."""
    simulator = Simulator(4, SimSettings(rate_hz=2_000.0))
    way, parts = Way(ONE_BYTE), list(simulator.frames_until(6 * NS_PER_S))
    frames, t_ns = np.concatenate([p.frames for p in parts]), np.concatenate([p.t_ns for p in parts])
    spiked = frames["data"][np.flatnonzero(frames["id"] == POWER_ID)[9]]
    spiked[AMBIENT_BYTE] ^= np.uint8(0x40)  # 32 degC
    guard = way.flow.decode.judge.guard
    message = np.array([guard._names.index("VEH_Power")])
    spiked[0] = guard._crc_table.crcs(message, spiked[None])[0]
    for part in np.array_split(np.arange(len(frames)), 75):
        way.take(Now(int(t_ns[part[-1]])), 0, frames[part], t_ns[part])
    way.stop(Now(int(t_ns[-1])))
    return way


VEHICLES = busy, healthy


@pytest.mark.slow
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(generated=dbcs.databases(), steps=st.lists(Step, max_size=40))
def test_both_twins_tell_the_same_of_anything_a_bus_can_carry(generated: list[Msg], steps: Steps) -> None:
    assert told(lambda: walk(generated, steps), KERNEL) == told(lambda: walk(generated, steps), None)


@pytest.mark.parametrize("vehicle", VEHICLES)
def test_both_twins_tell_the_same_of_a_vehicle(vehicle: Callable[[], Way]) -> None:
    assert told(vehicle, KERNEL) == told(vehicle, None)


class Broken:
    """The kernel with one of its functions replaced."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._name, self._function = name, function

    def __getattr__(self, name: str) -> Any:
        return self._function if name == self._name else getattr(KERNEL, name)


def off_by_one(*arguments: Any) -> tuple[int, bool]:
    found: tuple[int, bool] = KERNEL.decode(*arguments)
    arguments[5][:] = np.nextafter(arguments[5], np.inf)  # the last bit of every value
    return found


def counters_forgotten(*arguments: Any) -> tuple[int, int]:
    arguments[16][:] = -(1 << 62)  # last_ns: every frame is a message's first
    guarded: tuple[int, int] = KERNEL.guard(*arguments)
    return guarded


def half_folded(*arguments: Any) -> int:
    states: int = KERNEL.fold(*(a[: len(a) // 2] if n < 4 else a for n, a in enumerate(arguments)))
    return states


def last_kept_first(*arguments: Any) -> int:
    """Of several values of a signal, the pack keeps the first."""
    turned = [a[::-1].copy() if n < 4 else a for n, a in enumerate(arguments)]
    believed: int = KERNEL.settle(*turned)
    return believed


def never_out_of_range(*arguments: Any) -> tuple[int, bool]:
    return KERNEL.decode(*arguments)[0], True


def rows_one_on(*arguments: Any) -> int:
    found: int = KERNEL.details(*arguments)
    arguments[5][:-1] = arguments[5][1:].copy()
    return found


def never_a_spike(*_: Any) -> bool:
    return True


PLANTS: dict[Callable[..., Any], str] = {
    off_by_one: "decode",
    never_out_of_range: "decode",
    rows_one_on: "details",
    never_a_spike: "calm",
    counters_forgotten: "guard",
    last_kept_first: "settle",
    half_folded: "fold",
}
FUNCTIONS = ["plans", "decode", "details", "calm", "guard", "settle", "fold"]


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_a_twin_that_differs_is_noticed(plant: Callable[..., Any]) -> None:
    def differs(vehicle: Callable[[], Way]) -> bool:
        try:
            return told(vehicle, Broken(PLANTS[plant], plant)) != told(vehicle, None)
        except AssertionError:  # the way itself noticed
            return True

    assert any(differs(vehicle) for vehicle in VEHICLES)


# --- arrays that do not fit, tables that lead out -----------------------------------------------------------


class Recorder:
    """The kernel, keeping the first arguments each of its functions was given."""

    def __init__(self) -> None:
        self.calls: dict[str, tuple[Any, ...]] = {}

    def __getattr__(self, name: str) -> Any:
        function = getattr(KERNEL, name)

        def call(*arguments: Any) -> Any:
            if any(isinstance(a, np.ndarray) and a.size for a in arguments):
                self.calls.setdefault(name, tuple(_copied(a) for a in arguments))
            return function(*arguments)

        return call


def _copied(argument: Any) -> Any:
    return argument.copy() if isinstance(argument, np.ndarray) else argument


@pytest.fixture(scope="module")
def calls() -> dict[str, tuple[Any, ...]]:
    recorder = Recorder()
    told(healthy, recorder)
    assert sorted(recorder.calls) == sorted(FUNCTIONS)
    return recorder.calls


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_array_cut_short_is_refused_or_harmless(name: str, calls: dict[str, tuple[Any, ...]]) -> None:
    function, arguments = getattr(KERNEL, name), calls[name]
    refused = 0
    for n, argument in enumerate(arguments):
        if not isinstance(argument, np.ndarray) or not argument.size:
            continue
        for size in (0, argument.size - 1):
            given_ = [_copied(a) for a in arguments]
            given_[n] = argument.ravel()[:size].copy()
            try:
                function(*given_)
            except (ValueError, IndexError):
                refused += 1
    assert refused >= 2


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32 - 1), name=st.sampled_from(FUNCTIONS))
def test_tables_of_garbage_lead_to_an_error_and_never_out_of_memory(
    seed: int, name: str, calls: dict[str, tuple[Any, ...]]
) -> None:
    rng = np.random.default_rng(seed)
    given_ = [_copied(a) for a in calls[name]]
    for n, argument in enumerate(given_):
        if isinstance(argument, np.ndarray) and argument.size and rng.random() < 0.2:
            flat = argument.reshape(-1).view(np.uint8)
            places = rng.integers(0, flat.size, max(1, flat.size // 50))
            flat[places] = rng.integers(0, 256, len(places))
            given_[n] = argument
    with contextlib.suppress(ValueError, IndexError):
        getattr(KERNEL, name)(*given_)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_arguments_are_refused(name: str, calls: dict[str, tuple[Any, ...]]) -> None:
    function = getattr(KERNEL, name)
    with pytest.raises(TypeError, match=r"^2 arguments"):
        function(b"", b"")
    with pytest.raises(TypeError):
        function(*[None] * len(calls[name]))
    first = calls[name][0]
    apart = np.zeros((len(first), 2), first.dtype)[:, 0]
    with pytest.raises((ValueError, BufferError)):
        function(apart, *calls[name][1:])


def test_the_classes_run_the_kernel_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were it passed by in silence, every test here would still be green."""
    for owner, method in ((Decoder, "_raw"), (FrameGuard, "_check_crc")):
        monkeypatch.setattr(owner, method, None)
    healthy()
