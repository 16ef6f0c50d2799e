"""The harness of scripts/bench: interleaved runs, medians, one JSON line a case. It judges nothing by itself.

A bench is a module `tests/bench/bench_<name>.py` with `cases() -> Iterator[Result]`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import msgspec


class Result(msgspec.Struct, kw_only=True):
    """One figure. ratio > 1 means ahead of the peer; ok None where no goal is set."""

    bench: str
    case: str
    value: float
    unit: str
    peer: str = ""
    peer_value: float | None = None
    ratio: float | None = None
    goal: str = ""
    ok: bool | None = None
    note: str = ""


def seconds(work: Callable[[], Any]) -> float:
    """Return the process CPU seconds (user + system, all threads) one call takes."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def interleaved(
    ours: Callable[[], float], peer: Callable[[], float], runs: int = 5
) -> tuple[float, float, float]:
    """Run both in turn; return the medians of ours, of the peer, and of peer/ours pair by pair."""
    pairs = [(ours(), peer()) for _ in range(runs)]
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(b / a for a, b in pairs),
    )
