"""The brokers of the bench: mosquitto keeps what it owes over a restart, amqtt stands in for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tbox.sim import broker as brokers
from tbox.sim.broker import (
    BrokerError,
    BrokerTls,
    EmbeddedBroker,
    MosquittoBroker,
    VirtualBroker,
    start_broker,
)
from tests.io.uplink_bench import Listener, an_uplink, settings_for, wait_for
from tests.memory_spool import MemorySpool, a_start, minter


def test_the_embedded_broker_carries_a_whole_start() -> None:
    pytest.importorskip("amqtt", reason="amqtt is not installed")
    records = a_start(minter(), 100)
    spool = MemorySpool(records)
    with EmbeddedBroker().start() as broker, Listener(settings_for(broker.port, "3.1.1")) as listener:
        uplink = an_uplink(settings_for(broker.port, "3.1.1"), spool)
        uplink.start()
        listener.wait_for_records(len(records))
        assert uplink.stop(5.0)
        wait_for("the state offline", lambda: listener.states[-1:] == ["offline"])
        assert listener.proof.result().ok


def test_without_mosquitto_the_embedded_broker_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("amqtt", reason="amqtt is not installed")
    monkeypatch.setattr(brokers, "find_mosquitto", lambda: None)
    broker = start_broker(str(tmp_path))
    assert (broker.name, broker.mqtt) == ("amqtt", "3.1.1")
    broker.stop()
    with pytest.raises(BrokerError, match="install mosquitto"):
        start_broker(str(tmp_path), tls=BrokerTls("cert", "key"))
    with pytest.raises(BrokerError, match="apt-get install mosquitto"):
        MosquittoBroker(str(tmp_path)).start()


@pytest.mark.mosquitto
@pytest.mark.skipif(brokers.find_mosquitto() is None, reason="mosquitto is not installed")
def test_mosquitto_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(BrokerError, match="does not start"):
        MosquittoBroker(str(tmp_path), tls=BrokerTls("/no/cert", "/no/key")).start()


def test_the_virtual_broker_retains_delivers_and_keeps_wills() -> None:
    broker = VirtualBroker()
    broker.connect("car", "car/state", b"lost")
    broker.publish("car/state", b"online", 1, retain=True)
    heard: list[tuple[str, bytes, int]] = []
    broker.subscribe(lambda topic, payload, mono_ns: heard.append((topic, payload, mono_ns)), 5)
    broker.publish("car/alarm", b"hot", 6)
    broker.vanished("car", 9)
    broker.vanished("car", 10)
    assert heard == [("car/state", b"online", 5), ("car/alarm", b"hot", 6), ("car/state", b"lost", 9)]
    broker.connect("car", "car/state", b"lost")
    broker.goodbye("car")
    broker.vanished("car", 11)
    assert len(heard) == 3
