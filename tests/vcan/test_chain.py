"""tbox sim → vcan0 → tbox run → mosquitto → tbox verify on real SocketCAN: every frame, every record."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tbox.sim.broker import MosquittoBroker
from tests.daemon import TBOX, Daemon, Vehicle, wait_for
from tests.vcan.conftest import INTERFACE

DBC = Path(__file__).parents[2] / "dbc"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_the_whole_chain_on_vcan0_is_complete(
    tmp_path: Path, stack: ExitStack, needs: Callable[..., None], link: Callable[[str], None]
) -> None:
    needs("mosquitto")
    broker = stack.enter_context(MosquittoBroker(str(tmp_path / "broker")).start())
    daemon = Daemon(tmp_path, broker.port, bus_url=f"socketcan:{INTERFACE}")
    stack.callback(daemon.end)
    verify = subprocess.Popen(
        [*TBOX, "verify", "--broker", f"127.0.0.1:{broker.port}", "--vehicle", "car", "--until-stop"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    stack.callback(verify.kill)
    daemon.start()
    sim = f"socketcan:{INTERFACE}"
    first = Vehicle(sim, "--seconds", "4").wait()
    link(f"set {INTERFACE} down")
    wait_for("the bus is down", lambda: _bus(daemon)["state"] == "DOWN")
    link(f"set {INTERFACE} mtu 72 up")
    wait_for("the bus is back", lambda: _bus(daemon)["state"] == "UP")
    second = Vehicle(sim, "--seconds", "4", "--fault", "hvil-open@1s").wait()
    written = first["frames"] + second["frames"]
    wait_for("all frames decoded", lambda: daemon.status()["ledger"]["decode"]["out"] == written)
    assert daemon.status()["ledger"]["bus"]["dropped"].get("kernel", 0) == 0
    assert daemon.stop() == 0
    out, _ = verify.communicate(timeout=60)
    proof = json.loads(out)
    assert verify.returncode == 0
    assert proof["ok"] and proof["missing_explained"] == 0 and proof["starts"][0]["end"] == "stop record"


def _bus(daemon: Daemon) -> dict[str, object]:
    counters: dict[str, object] = daemon.status()["bus"][f"socketcan:{INTERFACE}"]
    return counters
