"""Judges whole frames by their alive counter and CRC. Changes no frame and looks at no value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tbox import kernel
from tbox.decode.batch import Decoded, Decoder, where_, words_of
from tbox.decode.crc import (
    E2E_P1,
    E2E_P1_COUNTER_VALUES,
    E2E_P5,
    E2E_P5_COUNTER_VALUES,
    PAYLOAD_BYTES_MAX,
    CrcInput,
    CrcModel,
    CrcTable,
)
from tbox.decode.database import Definition
from tbox.decode.roles import MappingError, MessageRule, RoleMap
from tbox.decode.table import IntArray, NotInTable, SignalTable, first_bit, locate
from tbox.model import NS_PER_MS, FrameBatch, Validity

NEVER_NS = -(1 << 62)


@dataclass(frozen=True, slots=True)
class _Protection:
    """One protected message: where its CRC and counter are, and what the CRC runs over."""

    definition: int
    crc_signal: Any
    crc_input: CrcInput | None
    counter_signal: Any
    modulo: int


class FrameGuard:
    """Counters and CRCs of all protected messages, and the state they take.

    lost: how many frames must have been lost, by message name.
    """

    def __init__(self, decoder: Decoder, roles: RoleMap, gap_ms: int) -> None:
        """Raises MappingError where the mapping asks for what a message does not have."""
        table = decoder.table
        protections = _protections(table, roles)
        self._decoder = decoder
        self._gap_ns = gap_ms * NS_PER_MS
        self._names = [table.definitions[p.definition].message.name for p in protections]
        self._of_plan = _plan_index(table, [p.definition for p in protections])
        self._fields = _FieldReader(table, protections)
        self._crc_table = CrcTable([p.crc_input or _NO_CRC for p in protections])
        self._has_crc = np.array([p.crc_input is not None for p in protections], np.bool_)
        self._has_counter = np.array([p.counter_signal is not None for p in protections], np.bool_)
        self._modulo = np.array([max(1, p.modulo) for p in protections], np.int64)
        self._last = np.zeros(len(protections), np.int64)
        self._last_ns = np.full(len(protections), NEVER_NS, np.int64)
        self._last_payload = np.zeros((len(protections), PAYLOAD_BYTES_MAX), np.uint8)
        self._lost = np.zeros(len(protections), np.int64)  # room for what one batch shows
        self.lost: dict[str, int] = {}

    def judge(self, batch: FrameBatch, decoded: Decoded) -> npt.NDArray[np.uint8] | None:
        """Return the validity of each frame (0: nothing against it); None when nothing is against any."""
        if kernel.compiled is not None:
            return self._judge_compiled(kernel.compiled, batch, decoded)
        message = self._of_plan.take(decoded.plan)
        at = where_(message >= 0)
        if not len(at):
            return None
        message = message[at]
        payload = batch.frames["data"][at]
        code = np.zeros(len(at), np.uint8)
        whole = ~decoded.short[at]
        crc, counter = self._fields.read(message, payload)
        self._check_crc(message, payload, crc, whole, code)
        counted = self._has_counter.take(message) & whole & (code == 0)
        code[counted & (counter >= self._modulo.take(message))] = Validity.COUNTER
        good = where_(counted & (code == 0))
        if len(good):
            code[good] = self._check_counter(
                message[good], counter[good], payload[good], batch.t_ns[at[good]]
            )
        if not code.any():
            return None
        frames = np.zeros(len(batch), np.uint8)
        frames[at] = code
        return frames

    def _judge_compiled(
        self, work: kernel.Kernel, batch: FrameBatch, decoded: Decoded
    ) -> npt.NDArray[np.uint8] | None:
        code = np.empty(len(batch), np.uint8)
        fields, crc = self._fields, self._crc_table
        refused, lost = work.guard(
            batch.frames.view(np.uint8), batch.t_ns, decoded.plan, decoded.short, self._of_plan, fields.byte,
            fields.shift, fields.mask, fields.big, crc.base, crc.table, crc.constant, self._has_crc,
            self._has_counter, self._modulo, self._last, self._last_ns, self._last_payload, self._lost, code,
            self._gap_ns,
        )  # fmt: skip
        if lost:
            for message in where_(self._lost > 0).tolist():
                self._lose(message, int(self._lost[message]))
            self._lost[:] = 0
        return code if refused else None

    def _check_crc(
        self,
        message: IntArray,
        payload: npt.NDArray[np.uint8],
        crc: IntArray,
        whole: npt.NDArray[np.bool_],
        code: npt.NDArray[np.uint8],
    ) -> None:
        """A frame that is cut short cannot be proved: that is a wrong CRC too."""
        checked = self._has_crc.take(message)
        wrong = self._crc_table.crcs(message, payload) != crc
        code[checked & (wrong | ~whole)] = Validity.CRC

    def _check_counter(
        self, message: IntArray, counter: IntArray, payload: npt.NDArray[np.uint8], t_ns: IntArray
    ) -> npt.NDArray[np.uint8]:
        """Compare each counter with the one before it in its message, in this batch or an earlier one."""
        order = message.astype(np.uint16).argsort(kind="stable")  # 16 bits: by radix, in a fifth of the time
        message, counter, t_ns = message[order], counter[order], t_ns[order]
        first = _starts(message)
        last = np.empty_like(first)
        last[:-1], last[-1] = first[1:], True
        before, before_ns = self._last.take(message), self._last_ns.take(message)
        inner = where_(~first)
        before[inner], before_ns[inner] = counter[inner - 1], t_ns[inner - 1]
        fresh = (t_ns - before_ns > self._gap_ns) | (before_ns == NEVER_NS)
        step = (counter - before) % self._modulo.take(message)
        code = np.zeros(len(message), np.uint8)
        stuck = where_((step == 0) & ~fresh)
        if len(stuck):
            same = self._same_payload(stuck, message, payload, order, first)
            code[stuck] = np.where(same, Validity.DUPLICATE, Validity.COUNTER)
        jumped = where_((step > 1) & ~fresh)
        for n in jumped.tolist():
            self._lose(int(message[n]), int(step[n]) - 1)
        ends = message[last]
        self._last[ends], self._last_ns[ends] = counter[last], t_ns[last]
        self._last_payload[ends] = payload[order[last]]
        unsorted = np.empty_like(code)
        unsorted[order] = code
        return unsorted

    def _same_payload(
        self,
        stuck: IntArray,
        message: IntArray,
        payload: npt.NDArray[np.uint8],
        order: IntArray,
        first: npt.NDArray[np.bool_],
    ) -> npt.NDArray[np.bool_]:
        """Whether each of the frames (places in the sorted order) repeats the payload before it."""
        before = payload[order[stuck - 1]]
        head = first[stuck]
        before[head] = self._last_payload[message[stuck[head]]]
        same: npt.NDArray[np.bool_] = (payload[order[stuck]] == before).all(axis=1)
        return same

    def _lose(self, message: int, frames: int) -> None:
        name = self._names[message]
        self.lost[name] = self.lost.get(name, 0) + frames


def _starts(values: IntArray) -> npt.NDArray[np.bool_]:
    """Return where a sorted array begins a new value."""
    starts = np.empty(len(values), np.bool_)
    starts[0] = True
    np.not_equal(values[1:], values[:-1], out=starts[1:])
    return starts


_NO_CRC = CrcInput(CrcModel(8, 0, 0, 0), b"", 0, range(0), b"")


class _FieldReader:
    """Reads CRC and counter of protected messages from their payloads.

    byte, shift, mask, big: where they lie, the CRC of each message, then the counter of each.
    """

    def __init__(self, table: SignalTable, protections: Sequence[_Protection]) -> None:
        signals = [(p, p.crc_signal) for p in protections] + [(p, p.counter_signal) for p in protections]
        places = [
            locate(signal, table.definitions[p.definition].message.length) if signal is not None else None
            for p, signal in signals
        ]
        self._messages = len(protections)
        self.byte = np.array([b.byte if b else 0 for b in places], np.int64)
        self.shift = np.array([b.shift if b else 0 for b in places], np.uint64)
        self.mask = np.array([b.mask if b else 0 for b in places], np.uint64)
        self.big = np.array([bool(b and b.big) for b in places], np.bool_)
        self._any_big = bool(self.big.any())

    def read(self, message: IntArray, payload: npt.NDArray[np.uint8]) -> tuple[IntArray, IntArray]:
        """Return the CRC and the counter of each payload; 0 where a message has none."""
        field = np.concatenate((message, message + self._messages))
        frame = np.arange(len(message)) * PAYLOAD_BYTES_MAX
        word = words_of(payload)[np.concatenate((frame, frame)) + self.byte.take(field)]
        if self._any_big:
            big = where_(self.big.take(field))
            word[big] = word[big].byteswap()
        word >>= self.shift.take(field)
        word &= self.mask.take(field)
        found: IntArray = word.view(np.int64)
        return found[: len(message)], found[len(message) :]


def _plan_index(table: SignalTable, definitions: list[int]) -> IntArray:
    """Return for every plan which protected message it belongs to, -1 for none."""
    number = {definition: n for n, definition in enumerate(definitions)}
    return np.array([number.get(plan.definition, -1) for plan in table.plan_info], np.int64)


def _protections(table: SignalTable, roles: RoleMap) -> list[_Protection]:
    found = []
    for index, definition in enumerate(table.definitions):
        entry = roles.protection(definition.message.name, definition.channel)
        if entry is None:
            continue
        try:
            found.append(_protection(index, definition, entry.rule, entry.where))
        except MappingError:
            if not entry.shipped:
                raise
    return found


def _protection(index: int, definition: Definition, rule: MessageRule, where: str) -> _Protection:
    message = definition.message
    counter = _field(message, rule.counter, where) if rule.counter else None
    crc = _field(message, rule.crc, where) if rule.crc and rule.profile != "counter" else None
    modulo = rule.counter_modulo or (1 << counter.length if counter is not None else 1)
    if rule.counter_modulo is None and rule.profile == "e2e-p1":
        modulo = E2E_P1_COUNTER_VALUES
    if rule.counter_modulo is None and rule.profile == "e2e-p5":
        modulo = E2E_P5_COUNTER_VALUES
    crc_input = _crc_input(definition, rule, crc, where) if crc is not None else None
    return _Protection(index, crc, crc_input, counter, modulo)


def _field(message: Any, name: str, where: str) -> Any:
    try:
        signal = message.get_signal_by_name(name)
        locate(signal, message.length)
    except KeyError:
        raise MappingError(
            f"message {message.name} has no signal {name!r}", where=where, mend="correct crc or counter"
        ) from None
    except NotInTable as reason:
        raise MappingError(str(reason), where=where, mend="choose another signal") from None
    return signal


def _crc_input(definition: Definition, rule: MessageRule, crc: Any, where: str) -> CrcInput:
    message = definition.message
    model = {"e2e-p1": E2E_P1, "e2e-p5": E2E_P5}.get(
        rule.profile, CrcModel(8, rule.poly, rule.init, rule.xor_out, rule.reflect)
    )
    first = first_bit(crc)
    if first % 8 or crc.length != model.width:
        raise MappingError(
            f"{message.name}.{crc.name} does not fill {model.width // 8} whole bytes",
            where=where,
            mend=f"name a signal of {model.width} bits on a byte boundary",
        )
    at_start = rule.profile == "e2e-p1" or (rule.profile == "crc8" and rule.data_id_at == "start")
    width = 2 if rule.profile.startswith("e2e") else rule.data_id_bytes
    data_id = _data_id(definition, rule, width, where)
    can_id = definition.can_id.to_bytes(4, "little")[:2] if rule.include_can_id else b""
    return CrcInput(
        model=model,
        before=can_id + (data_id if at_start else b""),
        payload_bytes=int(message.length),
        left_out=range(first // 8, first // 8 + model.width // 8),
        after=b"" if at_start else data_id,
    )


def _data_id(definition: Definition, rule: MessageRule, width: int, where: str) -> bytes:
    """Return the data id, low byte first."""
    number = rule.data_id
    if number is None:
        return b""
    if number == "can_id":
        number = int(definition.message.frame_id)
    elif isinstance(number, str):
        attributes = definition.message.dbc.attributes or {} if definition.message.dbc else {}
        if number not in attributes:
            raise MappingError(
                f"message {definition.message.name} has no attribute {number!r}",
                where=where,
                mend="give data_id as a number or 'can_id'",
            )
        number = int(attributes[number].value)
    return (number & ((1 << 8 * width) - 1)).to_bytes(width, "little")
