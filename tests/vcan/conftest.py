"""What the tests on a real interface share: vcan0, a flood from another process, the interface's switch.

Run them with `scripts/vcan .venv/bin/python -m pytest -q tests/vcan`. Without SocketCAN they are skipped.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tbox.bus.socketcan import SocketCanReader
from tbox.bus.spec import BusSpec

INTERFACE = "vcan0"
DEADLINE_S = 60.0
HERE = Path(__file__).parent


def why_no_vcan() -> str | None:
    """Return why no test can run here on a real interface; None if it can."""
    try:
        with socket.socket(socket.AF_CAN, socket.SOCK_RAW, socket.CAN_RAW) as sock:
            sock.bind((INTERFACE,))
    except (OSError, AttributeError) as error:
        return f"no {INTERFACE} ({error}): run it with scripts/vcan"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything here `vcan`, and skip it in one line where there is no interface."""
    ours = [item for item in items if HERE in item.path.parents]
    reason = why_no_vcan() if ours else None
    for item in ours:
        item.add_marker(pytest.mark.vcan)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def needs() -> Callable[..., None]:
    """Skip the test, naming what it lacks: `needs("mosquitto", "root")`. Commands are looked for on PATH."""

    def need(*wanted: str) -> None:
        path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
        for name in wanted:
            there = os.geteuid() == 0 if name == "root" else shutil.which(name, path=path)
            if not there:
                pytest.skip(f"needs {name}")

    return need


@pytest.fixture
def wait_for() -> Callable[..., None]:
    """Poll until a condition holds; the deadline is generous, the test fails after it."""

    def wait(condition: Callable[[], object], what: str = "it") -> None:
        until_s = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < until_s, f"{what} never came true"
            time.sleep(0.005)

    return wait


@pytest.fixture
def reader() -> Iterator[Callable[..., SocketCanReader]]:
    """Open readers on vcan0 (or another interface); they are closed at the end."""
    opened = []

    def open_reader(interface: str = INTERFACE, **options: object) -> SocketCanReader:
        ids = options.pop("ids", None)
        spec = BusSpec(interface="socketcan", channel=interface, **options)  # type: ignore[arg-type]
        opened.append(SocketCanReader(spec, 0, ids=ids))  # type: ignore[arg-type]
        return opened[-1]

    yield open_reader
    for one in opened:
        one.close()


@pytest.fixture
def link(needs: Callable[..., None]) -> Iterator[Callable[[str], None]]:
    """Run `ip link ...`; vcan0 is up again afterwards, whatever the test did."""
    needs("ip", "root")

    def ip(command: str) -> None:
        env = {**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
        subprocess.run(["ip", "link", *command.split()], check=True, env=env, timeout=DEADLINE_S)

    yield ip
    if not Path(f"/sys/class/net/{INTERFACE}").exists():
        ip(f"add {INTERFACE} type vcan")
    ip(f"set {INTERFACE} mtu 72 up")


@pytest.fixture
def flood() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start another process that writes numbered frames at a rate; it prints how many when it is done."""
    started = []

    def start(frames: int, rate: int, fd: bool = True) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(HERE / "flood.py"), INTERFACE, str(frames), str(rate), str(int(fd))]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()
