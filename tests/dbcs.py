"""Hypothesis strategies for DBC files and frames: every kind of signal, multiplexers within multiplexers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from tbox.decode.database import Database, Definition, parse_text
from tbox.model import CAN_EFF_FLAG, FRAME_DTYPE

LENGTHS = (1, 2, 3, 5, 7, 8, 12, 16, 24, 48, 64)
SCALES = ("1", "1", "2", "-3", "0.1", "0.01", "-0.5", "0.390625", "1e-05", "1.0", "100", "0.00125")
OFFSETS = ("0", "0", "-40", "1000", "0.5", "-273.15", "-0.0", "1e6")
TEXTS = ("Off", "On", "SNA", "not available", "Invalid", "Init")


@dataclass
class Sig:
    """One SG_ line, and what else the DBC says of it."""

    name: str
    start: int
    bits: int
    big: bool
    signed: bool
    scale: str
    offset: str
    mark: str = ""  # M, m0, m1M
    float_type: int = 0  # SIG_VALTYPE_
    choices: dict[int, str] = field(default_factory=dict)
    parent: str = ""  # of an extended multiplexer
    pages: tuple[int, ...] = ()
    low: str = "0"
    high: str = "0"

    def line(self) -> str:
        order = f"{0 if self.big else 1}{'-' if self.signed else '+'}"
        mark = f" {self.mark}" if self.mark else ""
        return (
            f" SG_ {self.name}{mark} : {self.start}|{self.bits}@{order} ({self.scale},{self.offset}) "
            f'[{self.low}|{self.high}] "" Vector__XXX'
        )


@dataclass
class Msg:
    can_id: int  # as the DBC writes it
    name: str
    length: int
    signals: list[Sig]


def render(messages: Sequence[Msg]) -> str:
    """Return the DBC text."""
    lines = ['VERSION ""', "", "NS_ :", "", "BS_:", "", "BU_: ECU", ""]
    tail: list[str] = []
    for msg in messages:
        lines += [f"BO_ {msg.can_id} {msg.name}: {msg.length} ECU", *(s.line() for s in msg.signals), ""]
        for sig in msg.signals:
            if sig.choices:
                texts = " ".join(f'{raw} "{text}"' for raw, text in sig.choices.items())
                tail.append(f"VAL_ {msg.can_id} {sig.name} {texts} ;")
            if sig.float_type:
                tail.append(f"SIG_VALTYPE_ {msg.can_id} {sig.name} : {sig.float_type};")
            if sig.parent:
                pages = ", ".join(f"{p}-{p}" for p in sig.pages)
                tail.append(f"SG_MUL_VAL_ {msg.can_id} {sig.name} {sig.parent} {pages};")
    return "\n".join(lines + tail) + "\n"


def load(messages: Sequence[Msg], channel: int = 0) -> Database:
    """Load the text through the loader, as a file of that name would be."""
    parsed = parse_text("generated.dbc", render(messages))
    return Database([Definition(channel, m, "generated.dbc", 1) for m in parsed.database.messages])


def physical_bits(start: int, bits: int, big: bool) -> set[int]:
    """Return the bits a signal covers, as 8 * byte + bit."""
    if not big:
        return set(range(start, start + bits))
    first = 8 * (start // 8) + 7 - start % 8
    return {8 * (n // 8) + 7 - n % 8 for n in range(first, first + bits)}


@st.composite
def signals(draw: st.DrawFn, name: str, length: int, taken: set[int]) -> Sig | None:
    """A signal that lies in the message beside those that took their bits; None when it found no room."""
    kind = draw(st.sampled_from(["int", "int", "int", "int", "f32", "f64", "f16"]))
    bits = {"f16": 16, "f32": 32, "f64": 64}.get(kind) or draw(
        st.one_of(st.integers(1, 16), st.integers(1, min(64, 8 * length)))
    )
    if bits > 8 * length:
        return None
    big = draw(st.booleans())
    first = draw(st.integers(0, 8 * length - bits))
    start = 8 * (first // 8) + 7 - first % 8 if big else first
    covered = physical_bits(start, bits, big)
    if covered & taken or max(covered) >= 8 * length:
        return None
    taken |= covered
    signed = draw(st.booleans()) if kind == "int" else True
    choices: dict[int, str] = {}
    if kind == "int" and bits <= 8 and draw(st.booleans()):
        raws = draw(st.lists(st.integers(0, (1 << bits) - 1), max_size=3, unique=True))
        choices = {raw: draw(st.sampled_from(TEXTS)) for raw in raws}
    return Sig(
        name, start, bits, big, signed, draw(st.sampled_from(SCALES)), draw(st.sampled_from(OFFSETS)),
        float_type={"f32": 1, "f64": 2, "f16": 1}.get(kind, 0), choices=choices,
    )  # fmt: skip


def _selector(draw: st.DrawFn, name: str, length: int, taken: set[int]) -> Sig | None:
    bits = draw(st.integers(1, 8))
    first = draw(st.integers(0, max(0, 8 * length - bits)))
    big = draw(st.booleans())
    start = 8 * (first // 8) + 7 - first % 8 if big else first
    covered = physical_bits(start, bits, big)
    if covered & taken or max(covered) >= 8 * length:
        return None
    taken |= covered
    scale = draw(st.sampled_from(["1", "1", "1", "1", "2"]))
    return Sig(name, start, bits, big, draw(st.sampled_from([False] * 9 + [True])), scale, "0", mark="M")


def _pages(draw: st.DrawFn, prefix: str, length: int, taken: set[int], parent: Sig, depth: int) -> list[Sig]:
    """The signals of each page of a selector; a page may hold a selector of its own."""
    found: list[Sig] = []
    top = min((1 << parent.bits) - 1, 5)
    for page in draw(st.lists(st.integers(0, top), max_size=3, unique=True)):
        here = set(taken)
        for n in range(draw(st.integers(0, 3))):
            sig = draw(signals(f"{prefix}_{page}_{n}", length, here))
            if sig is not None:
                sig.mark, sig.parent, sig.pages = f"m{page}", parent.name, (page,)
                found.append(sig)
        inner = _selector(draw, f"{prefix}_{page}_M", length, here) if depth and draw(st.booleans()) else None
        if inner is not None:
            inner.mark, inner.parent, inner.pages = f"m{page}M", parent.name, (page,)
            found += [inner, *_pages(draw, f"{prefix}_{page}_M", length, here, inner, depth - 1)]
    return found


@st.composite
def messages(draw: st.DrawFn, number: int) -> Msg:
    """A message of any length with any signals, multiplexed or not, now and then overlapping."""
    length = draw(st.sampled_from(LENGTHS))
    taken: set[int] = set()
    sigs: list[Sig] = []
    for n in range(draw(st.integers(0, 6))):
        overlap = draw(st.integers(0, 19)) == 0
        sig = draw(signals(f"S{number}_{n}", length, set() if overlap else taken))
        if sig is not None:
            sigs.append(sig)
    if draw(st.booleans()):
        selector = _selector(draw, f"S{number}_M", length, taken)
        if selector is not None:
            pages = _pages(draw, f"S{number}_P", length, taken, selector, 2)
            if any(sig.mark.endswith("M") for sig in pages):
                sigs += [selector, *pages]
            else:  # plain multiplexing, without SG_MUL_VAL_
                for sig in pages:
                    sig.parent = ""
                sigs += [selector, *pages]
    extended = draw(st.booleans())
    can_id = number * 17 + 1
    return Msg(can_id | CAN_EFF_FLAG if extended else can_id, f"M{number}", length, sigs)


@st.composite
def databases(draw: st.DrawFn) -> list[Msg]:
    return [draw(messages(n)) for n in range(draw(st.integers(1, 5)))]


def frames_of(
    rng: np.random.Generator, definitions: Sequence[Definition], count: int, *, wild: bool = True
) -> npt.NDArray[np.void]:
    """Random payloads under known ids and, if wild, of any length and with some unknown ids."""
    frames = np.zeros(count, FRAME_DTYPE)
    for n in range(count):
        definition = definitions[int(rng.integers(len(definitions)))]
        length = min(64, definition.message.length)
        if wild and rng.random() < 0.4:
            length = int(rng.integers(0, 65))
        frames["id"][n] = definition.can_id
        if wild and rng.random() < 0.1:
            frames["id"][n] = int(rng.integers(0, 1 << 32))
        frames["len"][n] = length
        fill = rng.choice([0, 1, 2])
        data = rng.integers(0, 256, length) if fill else np.full(length, rng.choice([0, 255, 128, 127]))
        if fill == 2:  # small values, so that selectors hit their pages
            data = data % 8
        frames["data"][n, :length] = data
    return frames
