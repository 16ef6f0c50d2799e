"""A real recording through the shipped daemon to a real broker: all frames and records, no false alarm."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest

from tbox.sim.broker import MosquittoBroker, find_mosquitto
from tests.daemon import Daemon, Judge, tbox, wait_for
from tests.data import data_file

FRAMES = 24_263  # of channel 0


@pytest.mark.slow
@pytest.mark.mosquitto
@pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
def test_the_kona_recording_is_accounted_for_and_its_sentinels_raise_no_alarm(tmp_path: Path) -> None:
    log = data_file("can", "kona-pcan-ccan-power-on-ready-off.gvret.csv")
    dbc = data_file("dbc", "kona-pcan.dbc")
    with ExitStack() as stack:
        broker = stack.enter_context(MosquittoBroker(str(tmp_path / "broker")).start())
        judge = Judge(broker.port)
        stack.callback(judge.close)
        daemon = Daemon(tmp_path, broker.port, bus=f'dbc = ["{dbc}"]')
        stack.callback(daemon.end)
        daemon.start()
        replay = tbox("replay", str(log), "--bus", daemon.bus_url, "--channel", "0", "--speed", "4")
        assert json.loads(replay.stdout)["frames"] == FRAMES
        wait_for("all frames", lambda: daemon.status()["ledger"]["decode"]["into"] == FRAMES)
        soc = daemon.status()["edge"]["soc_percent"]
        assert daemon.stop() == 0
        wait_for("all records at the broker", judge.complete)
        ledger = judge.bodies("event", event="stop")[0]["ledger"]
    assert "dbc_mended" in daemon.log and "BS_" in daemon.log
    assert ledger["decode"]["out"] + sum(ledger["decode"]["dropped"].values()) == FRAMES
    assert ledger["bus"]["dropped"] == {}
    assert judge.result().missing_explained == 0
    assert judge.bodies("telemetry")
    assert not judge.bodies("alarm")
    assert soc is None or soc <= 100
