"""TOML into frozen structs, strictly: what does not fit names file, line and mend. Holds no defaults.

Structs are msgspec Structs with `forbid_unknown_fields`; the bounds stand in their annotations.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from tbox.errors import TboxError

T = TypeVar("T")

TOML_BYTES_MAX = 1 << 20

_HEADER = re.compile(r"\s*(\[\[?)\s*([^\]]+?)\s*\]\]?")
_KEY = re.compile(r"""\s*(?:"([^"]+)"|'([^']+)'|([A-Za-z0-9_\-]+(?:\s*\.\s*[A-Za-z0-9_\-]+)*))\s*=""")
_AT = re.compile(r" - at `\$?(.*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`")
_MISSING = re.compile(r"Object missing required field `(.*)`")


class TomlError(TboxError):
    """A TOML file that cannot be taken as it is; `where` is file:line."""


def load(path: str, into: type[T]) -> T:
    """Read a TOML file into a struct. Raises TomlError naming file, line and mend."""
    return parse(read(path), into, path)


def read(path: str) -> str:
    """Return the text of a TOML file. Raises TomlError."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise TomlError(
            f"cannot be read: {error.strerror}", where=path, mend="name a file that exists and is readable"
        ) from error
    if len(raw) > TOML_BYTES_MAX:
        raise TomlError(f"is larger than {TOML_BYTES_MAX} bytes", where=path, mend="name a TOML file")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise TomlError("is not UTF-8", where=f"{path}:{line}", mend="save the file as UTF-8") from error


def parse(text: str, into: type[T], path: str = "<text>") -> T:
    """Turn TOML text into a struct. Raises TomlError naming file, line and mend."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"\(at line (\d+), column \d+\)", str(error))
        line = int(found[1]) if found else len(text.splitlines())
        what = re.sub(r" \(at .*\)$", "", str(error))
        raise TomlError(f"is not TOML: {what}", where=f"{path}:{line}", mend="correct the line") from error
    try:
        return msgspec.convert(tree, into)
    except msgspec.ValidationError as error:
        raise _explain(text, path, into, str(error)) from None


def line_of(text: str, keys: list[str | int]) -> int:
    """Return the 1-based line on which the value at `keys` stands; the nearest table above it otherwise."""
    best, best_depth = 1, 0
    table: list[str | int] = []
    seen: dict[tuple[str, ...], int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            names = tuple(part.strip().strip("\"'") for part in header[2].split("."))
            if header[1] == "[[":
                seen[names] = seen.get(names, -1) + 1
            table = _with_indices(names, seen)
            here = table
        elif key := _KEY.match(line):
            here = [*table, *(part.strip() for part in (key[1] or key[2] or key[3]).split("."))]
        else:
            continue
        depth = len(here)
        if here == keys[:depth] and depth > best_depth:
            best, best_depth = number, depth
    return best


def _with_indices(names: tuple[str, ...], seen: dict[tuple[str, ...], int]) -> list[str | int]:
    path: list[str | int] = []
    for end in range(1, len(names) + 1):
        path.append(names[end - 1])
        if names[:end] in seen:
            path.append(seen[names[:end]])
    return path


def _explain(text: str, path: str, into: type[Any], message: str) -> TomlError:
    at = _AT.search(message)
    what = _AT.sub("", message)
    keys: list[str | int] = [
        int(part) if part.isdigit() else part for part in re.findall(r"[^.\[\]]+", at[1] if at else "")
    ]
    if unknown := _UNKNOWN.match(what):
        keys.append(unknown[1])
        what, mend = f"unknown key {unknown[1]!r}", _did_you_mean(unknown[1], _fields(into, keys[:-1]))
    elif missing := _MISSING.match(what):
        what, mend = f"{missing[1]!r} is missing", "add it"
    else:
        mend = f"correct {keys[-1]!r}" if keys else "correct the file"
        what = what[:1].lower() + what[1:]
    return TomlError(what, where=f"{path}:{line_of(text, keys)}", mend=mend)


def _did_you_mean(name: str, known: list[str]) -> str:
    stem = re.sub(r"_[a-z]+$", "", name)
    close = difflib.get_close_matches(name, known, 1) or [k for k in known if k.startswith(stem)]
    return f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(sorted(known))}"


def _fields(struct: Any, keys: list[str | int]) -> list[str]:
    """Return the field names of the struct found by following `keys` from `struct`."""
    for key in keys:
        if isinstance(key, int) or get_origin(struct) is dict:
            struct = get_args(struct)[-1]
        else:
            struct = get_type_hints(struct).get(key)
        options = [struct] if get_origin(struct) else [*get_args(struct), struct]
        struct = next((s for s in options if s is not type(None) and s is not None), struct)
    return list(struct.__struct_fields__) if hasattr(struct, "__struct_fields__") else []
