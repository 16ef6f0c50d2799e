"""Kills a real process at system calls by strace's fault injection. What it does there is the tests' own."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Reading changes nothing, so a kill there is a kill before the next of these.
CALLS = ("openat", "pwrite64", "fsync", "truncate", "rename", "unlink")
ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "PATH": "/usr/bin:/bin"}
LIMIT_S = 120

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
Point = tuple[str, int]  # a call, and its number among the calls of that name


def run(child: str, top: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run this Python text with `top` as its argument, under strace."""
    trace = ["strace", "-f", "-y", "-e", "signal=none", "-e", f"trace={','.join(CALLS)}"]
    return subprocess.run(
        [*trace, *options, sys.executable, "-c", child, str(top)],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=LIMIT_S,
    )  # fmt: skip


def killed(child: str, top: Path, point: Point) -> bool:
    """Run it and kill it as it enters this call; return whether that came about."""
    call, number = point
    return run(child, top, "-e", f"inject={call}:signal=KILL:when={number}").returncode != 0


def points(child: str, top: Path, paths: Sequence[str]) -> list[Point]:
    """Run it whole; return the calls that change something under these directories of `top`."""
    traced = run(child, top)
    assert traced.returncode == 0, traced.stderr[-2000:]
    count: dict[str, int] = {}
    found = []
    for line in traced.stderr.splitlines():
        match = re.match(r"(?:\[pid +\d+\] )?(\w+)\(", line)
        if match is None or match[1] not in CALLS:
            continue
        count[match[1]] = count.get(match[1], 0) + 1
        ours = any(f"{top}{path}" in line for path in paths)
        if ours and (match[1] != "openat" or "O_WRONLY" in line):
            found.append((match[1], count[match[1]]))
    return found
