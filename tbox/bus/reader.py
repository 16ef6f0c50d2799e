"""The door of this room: a BusSpec in, a BusReader out. It reads nothing itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from tbox.bus.playback import RecordingReader
from tbox.bus.python_can import PythonCanReader, open_bus
from tbox.bus.socketcan import SocketCanReader
from tbox.bus.spec import BusCounters, BusError, BusReader, BusSpec, parse_bus_url
from tbox.bus.writer import BusWriter, NotAllowed

__all__ = [
    "BusCounters",
    "BusError",
    "BusReader",
    "BusSpec",
    "BusWriter",
    "NotAllowed",
    "open_bus",
    "open_reader",
    "parse_bus_url",
]


def open_reader(
    spec: BusSpec,
    channel: int,
    *,
    ids: Collection[int] | None = None,
    mono_ns: Callable[[], int] = time.monotonic_ns,
) -> BusReader:
    """Return the reader for a bus; `channel` is its index in the configuration and marks its batches.

    ids: what the DBCs know, with CAN_EFF_FLAG; the kernel filters for them if spec.filter asks for it.
    Raises BusError for an interface that does not exist; a bus that is merely down is waited for.
    """
    if spec.interface == "recording":
        return RecordingReader(spec, channel)
    if spec.interface == "socketcan":
        return SocketCanReader(spec, channel, ids=ids, mono_ns=mono_ns)
    return PythonCanReader(spec, channel, mono_ns=mono_ns)
