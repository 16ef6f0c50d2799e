"""Flash rots: whatever became of the files of trust, nothing but a typed error comes, and never a replay."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tbox.durable import frame
from tbox.errors import Refused, TboxError
from tbox.ota.truststore import FLOORS_STEM, GENERATION_STEM, TrustStore
from tests.crash.flash import Flash, Image
from tests.crash.test_trust_cuts import CACHE, FLOORS, MOMENTS, client, image_of, refreshed
from tests.tuf_repository import START

NEWEST = "everything"
OLDER = list(MOMENTS)[: list(MOMENTS).index(NEWEST)]


def device() -> Image:
    """What a device holds that saw the repository grow."""
    image: Image = {}
    for name in (*OLDER, NEWEST):
        image = image_of(refreshed(image, MOMENTS[name]))
    return image


DEVICE = device()
PATHS = sorted(DEVICE)
FLOORS_PATHS = [path for path in PATHS if path.startswith(FLOORS)]


@st.composite
def rotten(draw: st.DrawFn) -> Image:
    """The device's files, some of them damaged; the names of synced floors are not lost by rot."""
    image = dict(DEVICE)
    for _ in range(draw(st.integers(1, 8))):
        path = draw(st.sampled_from(PATHS))
        data = image.get(path, b"")
        match draw(st.sampled_from(["flip", "cut", "zeros", "noise", "another", "longer", "gone"])):
            case "flip" if data:
                at, bit = draw(st.integers(0, len(data) - 1)), draw(st.integers(0, 7))
                data = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
            case "cut":
                data = data[: draw(st.integers(0, len(data)))]
            case "zeros":
                data = bytes(len(data))
            case "noise":
                data = draw(st.binary(max_size=400))
            case "another":
                data = image.get(draw(st.sampled_from(PATHS)), b"")
            case "longer":
                data += draw(st.binary(min_size=1, max_size=40))
            case "gone" if path not in FLOORS_PATHS:
                image.pop(path, None)
                continue
        image[path] = data
    return image


def flipped(*paths: str) -> Image:
    return DEVICE | {path: DEVICE[path][:-1] + bytes([DEVICE[path][-1] ^ 1]) for path in paths}


ROTTEN_CACHE = [path for path in PATHS if path.startswith(CACHE)]


@given(rotten(), st.sampled_from(OLDER))
@example(flipped(FLOORS_PATHS[0], *ROTTEN_CACHE), OLDER[-1])
@example(flipped(FLOORS_PATHS[1], *ROTTEN_CACHE), OLDER[-1])
@example(flipped(*FLOORS_PATHS, *ROTTEN_CACHE), OLDER[0])
@settings(deadline=None, max_examples=400)
def test_no_rot_lets_a_replay_in_or_another_error_out(image: Image, older: str) -> None:
    with pytest.raises(TboxError):
        refreshed(image, MOMENTS[older])


@given(rotten())
@settings(deadline=None, max_examples=200)
def test_what_is_left_either_heals_or_is_refused_in_words(image: Image) -> None:
    try:
        healed = image_of(refreshed(image, MOMENTS[NEWEST]))
    except Refused as refused:
        assert refused.mend == "provision the device anew"
        return
    for older in OLDER:
        with pytest.raises(TboxError, match="older than"):
            refreshed(healed, MOMENTS[older])
    assert refreshed(healed, MOMENTS[NEWEST]).log == []


# Not rot but malice or a later release: the checksum is right, and the value is not what it should be.
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.text(max_size=70) | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=70), inner, max_size=4),
    max_leaves=12,
)
NAMED = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("format", "root", "roles", "roots", "version", "sha256", "signers"), VALUES),
)


@given(st.binary(max_size=300) | (VALUES | NAMED).map(msgspec.msgpack.encode), st.sampled_from([0, 1, 2]))
@settings(deadline=None, max_examples=400)
def test_no_value_with_a_right_checksum_gets_out_as_another_error(payload: bytes, which: int) -> None:
    raw = frame(1 << 40, payload)
    places = [(FLOORS, FLOORS_STEM), (CACHE, GENERATION_STEM)]
    chosen = places if which == 2 else [places[which]]
    image = DEVICE | {f"{where}/{stem}.{n}": raw for where, stem in chosen for n in (0, 1)}
    try:
        stored = TrustStore(Flash(image), CACHE, FLOORS).load()
    except Refused:
        return
    assert isinstance(stored.roles, dict)
    with contextlib.suppress(TboxError):
        client(Flash(image), MOMENTS[NEWEST]).refresh(START)
