"""A TOML mistake is named by file and line, with the mend."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbox.toml import TOML_BYTES_MAX, TomlError, line_of, load, parse


class Inner(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    tick_ms: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 10
    name: str = ""


class Outer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    spool: Inner = Inner()
    maybe: Inner | None = None
    bus: list[Inner] = []
    needed: int = 0


TEXT = """# a comment
needed = 1

[spool]
tick_ms = 5

[[bus]]
name = "a"
[[bus]]
name = "b"
tick_ms = 7
"""


def test_what_is_right_arrives() -> None:
    assert parse(TEXT, Outer).bus[1] == Inner(tick_ms=7, name="b")


@pytest.mark.parametrize(
    ("edit", "line", "said"),
    [
        (("tick_ms = 5", "tick_s = 5"), 5, "unknown key 'tick_s'; did you mean 'tick_ms'"),
        (("tick_ms = 7", "tick_ms = 7000"), 11, "<= 1000; correct 'tick_ms'"),
        (("tick_ms = 7", "tock = 1"), 11, "unknown key 'tock'; known here: name, tick_ms"),
        (("[spool]", "[spoon]"), 4, "did you mean 'spool'"),
        (("needed = 1", "needed = 'x'"), 2, "expected `int`, got `str`"),
        (("needed = 1", "needed = "), 2, "is not TOML"),
        (('name = "b"', "name = 3"), 10, "expected `str`"),
        (("[spool]", "[maybe]\nwrong = 1\n[spool]"), 5, "unknown key 'wrong'"),
    ],
)
def test_a_mistake_names_its_line_and_mend(edit: tuple[str, str], line: int, said: str) -> None:
    with pytest.raises(TomlError) as caught:
        parse(TEXT.replace(*edit), Outer, "tbox.toml")
    assert str(caught.value).startswith(f"tbox.toml:{line}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_text_or_not_there_are_said(tmp_path: Path) -> None:
    with pytest.raises(TomlError, match="cannot be read"):
        load(str(tmp_path / "none.toml"), Outer)
    (tmp_path / "bin.toml").write_bytes(b"a = 1\nb = '\xff'\n")
    with pytest.raises(TomlError, match=r"bin.toml:2: is not UTF-8"):
        load(str(tmp_path / "bin.toml"), Outer)
    (tmp_path / "big.toml").write_bytes(b"#" * (TOML_BYTES_MAX + 1))
    with pytest.raises(TomlError, match="larger than"):
        load(str(tmp_path / "big.toml"), Outer)


@given(st.text(max_size=200))
def test_no_text_raises_anything_else(text: str) -> None:
    try:
        parse(text, Outer)
    except TomlError as error:
        assert "\n" not in str(error)
    assert line_of(text, ["spool", "tick_ms"]) >= 1
