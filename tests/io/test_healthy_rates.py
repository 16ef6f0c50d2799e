"""A healthy, noisy pack on a busy bus, through the shipped daemon: frames are held, nothing is alarmed."""

from __future__ import annotations

import base64
import json
from contextlib import ExitStack
from pathlib import Path

import pytest

from tbox.record.codec import decode_payload
from tbox.sim.broker import free_port
from tests.daemon import DBC, Daemon, Vehicle, tbox, wait_for

RATE_HZ = "2500"
SECONDS = "12"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "more"), [("tbox_bms.dbc", ()), ("tbox_bms_mux.dbc", ("--mux",))])
def test_a_busy_bus_alarms_nothing_and_every_frame_is_accounted_for(
    tmp_path: Path, name: str, more: tuple[str, ...]
) -> None:
    with ExitStack() as stack:
        bus = f'dbc = ["{DBC}/{name}", "{DBC}/tbox_vehicle.dbc"]'
        daemon = Daemon(tmp_path, free_port(), bus=bus)  # nobody listens there: all records stay in the spool
        stack.callback(daemon.end)
        daemon.start()
        vehicle = Vehicle(daemon.bus_url, "--rate", RATE_HZ, "--seconds", SECONDS, *more)
        stack.callback(vehicle.end)
        frames = vehicle.wait()["frames"]
        wait_for("all frames", lambda: daemon.status()["ledger"]["decode"]["into"] == frames)
        assert daemon.stop() == 0
    exported = tbox("spool", "export", str(tmp_path / "state" / "spool")).stdout.splitlines()
    records = [decode_payload(base64.b64decode(json.loads(line)["payload"])) for line in exported]
    stop = next(r for r in records if r["kind"] == "event" and r["body"]["event"] == "stop")
    ledger = stop["body"]["ledger"]
    assert ledger["decode"]["out"] == frames > 20_000
    assert ledger["bus"]["dropped"] == {}
    assert [record["body"]["text"] for record in records if record["kind"] == "alarm"] == []
