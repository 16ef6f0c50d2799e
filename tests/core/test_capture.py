"""The capture format: what was saved is read back, and a torn file is read as far as it goes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tbox.record.capture import CaptureReader, Received, to_line

MESSAGES = st.lists(
    st.builds(
        Received,
        st.text(max_size=9),
        st.binary(max_size=99),
        st.integers(0, 2**62),
        st.just(0),
        st.booleans(),
    )
)


@given(MESSAGES)
def test_reading_undoes_writing(messages: list[Received]) -> None:
    reader = CaptureReader(b"".join(map(to_line, messages)).splitlines())
    assert list(reader) == messages and reader.torn == 0


@given(MESSAGES.filter(bool), st.data())
def test_a_torn_tail_costs_one_line_and_is_counted(messages: list[Received], data: st.DataObject) -> None:
    whole = b"".join(map(to_line, messages))
    cut = data.draw(st.integers(2, len(to_line(messages[-1]))))
    reader = CaptureReader(whole[:-cut].splitlines())
    assert list(reader) == messages[:-1]
    assert reader.torn == (cut < len(to_line(messages[-1])))


def test_damage_in_the_middle_costs_its_line_only() -> None:
    lines = [
        to_line(Received("a", b"x", 1)),
        b"\xff\xfe{{{\n",
        b'{"t": 1}\n',
        b'{"t":1,"topic":"a","payload":"?"}\n',
    ]
    reader = CaptureReader([*lines, b"\n", to_line(Received("b", b"y", 2))])
    assert [message.topic for message in reader] == ["a", "b"] and reader.torn == 3
