"""The receiver's side sees everything: while it is away, and while the broker restarts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tbox.sim.broker import MosquittoBroker
from tbox.sim.network import LinkCutter
from tbox.uplink.mqtt import UplinkError
from tbox.uplink.receive import Receiver
from tests.io.uplink_bench import VEHICLE, Listener, an_uplink, needs_mosquitto, settings_for, wait_for
from tests.memory_spool import MemorySpool, a_start, minter

pytestmark = needs_mosquitto

N = 100


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[MosquittoBroker]:
    with MosquittoBroker(str(tmp_path / "broker")).start() as running:
        yield running


@pytest.mark.parametrize("mqtt", ["5", "3.1.1"])
def test_what_is_published_while_the_receivers_link_is_down_arrives_later(
    broker: MosquittoBroker, mqtt: str
) -> None:
    records = a_start(minter(), N)
    spool = MemorySpool(records[:10])
    with LinkCutter(broker.port) as cutter, Listener(settings_for(cutter.port, mqtt)) as listener:
        uplink = an_uplink(settings_for(broker.port, mqtt), spool)
        uplink.start()
        listener.wait_for_records(10)
        cutter.cut()
        cutter.reset()
        spool.waiting.extend(records[10:])
        wait_for("every PUBACK", lambda: spool.empty)
        assert listener.proof.received < len(records)
        cutter.restore()
        assert listener.wait_for_records(len(records)).ok
        uplink.stop(5.0)


def test_what_the_broker_owes_survives_its_restart(broker: MosquittoBroker) -> None:
    records = a_start(minter(), N)
    spool = MemorySpool(records[:10])
    with LinkCutter(broker.port) as cutter, Listener(settings_for(cutter.port)) as listener:
        uplink = an_uplink(settings_for(broker.port), spool)
        uplink.start()
        listener.wait_for_records(10)
        cutter.cut()
        cutter.reset()
        spool.waiting.extend(records[10:])
        wait_for("every PUBACK", lambda: spool.empty)
        broker.stop()
        broker.start()
        cutter.restore()
        assert listener.wait_for_records(len(records)).ok
        uplink.stop(5.0)


@pytest.mark.parametrize("mqtt", ["5", "3.1.1"])
def test_a_closed_receiver_leaves_nothing_behind_at_the_broker(broker: MosquittoBroker, mqtt: str) -> None:
    settings = settings_for(broker.port, mqtt, client_id="one-and-only")
    with Receiver(settings, VEHICLE, lambda *_: None).start():
        pass
    spool = MemorySpool(a_start(minter(), 3))
    uplink = an_uplink(settings_for(broker.port, mqtt), spool)
    uplink.start()
    wait_for("every PUBACK", lambda: spool.empty)
    uplink.stop(5.0)
    heard: list[str] = []
    with Receiver(settings, VEHICLE, lambda topic, *_: heard.append(topic)).start():
        wait_for("the retained state", lambda: heard)
        time.sleep(0.1)  # for what must not come; the proof is below
    assert heard == [f"tbox/1/{VEHICLE}/state"]


def test_a_broker_that_says_no_or_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    with MosquittoBroker(str(tmp_path), users={"car": "word"}).start() as broker:
        with pytest.raises(UplinkError, match="refused the connection"):
            Receiver(settings_for(broker.port), VEHICLE, lambda *_: None).start()
        port = broker.port
    with pytest.raises(UplinkError, match=f"127.0.0.1:{port}: no broker"):
        Receiver(settings_for(port), VEHICLE, lambda *_: None).start()
