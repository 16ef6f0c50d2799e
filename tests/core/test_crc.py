"""CRCs by table and gather equal the bit-by-bit definition, and the definition equals the catalogues."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbox.decode.crc import E2E_P1, E2E_P5, CrcInput, CrcModel, CrcTable, crc_of

CHECK = b"123456789"


@pytest.mark.parametrize(
    ("name", "model", "check"),
    [
        # Check values of the catalogue of parametrised CRC algorithms, and of the AUTOSAR CRC specification.
        ("CRC-8/SAE-J1850", CrcModel(8, 0x1D, 0xFF, 0xFF), 0x4B),
        ("CRC-8/AUTOSAR (0x2F)", CrcModel(8, 0x2F, 0xFF, 0xFF), 0xDF),
        ("CRC-8/SMBUS", CrcModel(8, 0x07, 0x00, 0x00), 0xF4),
        ("CRC-8/MAXIM-DOW", CrcModel(8, 0x31, 0x00, 0x00, reflect=True), 0xA1),
        ("CRC-16/IBM-3740 (CCITT-FALSE)", E2E_P5, 0x29B1),
        ("CRC-8/SAE-J1850 with zeros, of E2E profile 1", E2E_P1, 0x37),
    ],
)
def test_the_definition_gives_the_check_values_of_the_catalogues(
    name: str, model: CrcModel, check: int
) -> None:
    assert crc_of(model, CHECK) == check


def test_profile_5_gives_the_crc_of_autosars_example() -> None:
    # PRS E2E Protocol, profile 5: 8 bytes of zeros, data id 0x1234, counter 0: the frame begins 1C CA.
    assert crc_of(E2E_P5, bytes(6) + b"\x34\x12") == 0xCA1C


models = st.builds(
    CrcModel,
    width=st.just(8),
    poly=st.integers(0, 255),
    init=st.integers(0, 255),
    xor_out=st.integers(0, 255),
    reflect=st.booleans(),
) | st.sampled_from([E2E_P1, E2E_P5])


@st.composite
def inputs(draw: st.DrawFn) -> CrcInput:
    model = draw(models)
    length = draw(st.integers(3, 64))
    at = draw(st.integers(0, length - model.width // 8))
    before, after = draw(st.binary(max_size=3)), draw(st.binary(max_size=3))
    return CrcInput(model, before, length, range(at, at + model.width // 8), after)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(messages=st.lists(inputs(), min_size=1, max_size=5), seed=st.integers(0, 2**32 - 1))
def test_a_batch_of_any_messages_has_the_crcs_of_the_definition(messages: list[CrcInput], seed: int) -> None:
    rng = np.random.default_rng(seed)
    which = rng.integers(0, len(messages), 20)
    payload = rng.integers(0, 256, (20, 64), np.uint8)
    crcs = CrcTable(messages).crcs(which, payload)
    for n, message in enumerate(which.tolist()):
        one = messages[message]
        data = one.before + bytes(payload[n, one.covered()]) + one.after
        assert crcs[n] == crc_of(one.model, data)
