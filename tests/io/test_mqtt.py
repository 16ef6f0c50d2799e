"""The uplink against a real mosquitto: TLS, restarts, silence and refusals; nothing is lost or hidden."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tbox.model import RECORD_PAYLOAD_BYTES_MAX, Draft, Level
from tbox.sim.broker import BrokerTls, MosquittoBroker
from tbox.sim.network import LinkCutter
from tbox.uplink.mqtt import MqttUplink, UplinkError, tls_context
from tbox.uplink.session import UplinkSettings
from tests.io.uplink_bench import (
    QUICK,
    VEHICLE,
    Listener,
    Pki,
    an_uplink,
    make_pki,
    needs_mosquitto,
    settings_for,
    wait_for,
)
from tests.memory_spool import NOW, AcksOnOffer, ForgetsInFlight, MemorySpool, a_start, minter

pytestmark = needs_mosquitto

N = 200


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[MosquittoBroker]:
    with MosquittoBroker(str(tmp_path / "broker")).start() as running:
        yield running


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return make_pki(tmp_path_factory.mktemp("pki"))


@pytest.mark.parametrize("mqtt", ["5", "3.1.1"])
def test_every_record_arrives_byte_for_byte_and_the_state_says_offline_at_the_end(
    broker: MosquittoBroker, mqtt: str
) -> None:
    records = a_start(minter(), N)
    spool = MemorySpool(records)
    with Listener(settings_for(broker.port, mqtt)) as listener:
        uplink = an_uplink(settings_for(broker.port, mqtt), spool)
        uplink.start()
        result = listener.wait_for_records(len(records))
        wait_for("every PUBACK", lambda: spool.empty)
        assert uplink.stop(5.0)
        wait_for("the state offline", lambda: listener.states[-1:] == ["offline"])
    assert result.ok and result.duplicates <= uplink.status()["requeued"]
    assert listener.payloads == {record.id: record.payload for record in records}
    assert listener.states[0] == "online" and uplink.beat > 0 and not uplink.alive


def test_the_largest_record_passes(broker: MosquittoBroker) -> None:
    import numpy as np

    noise = np.random.default_rng(1).bytes(RECORD_PAYLOAD_BYTES_MAX - 100)
    spool = MemorySpool([minter().mint(Draft("capture", Level.INFO, 0, {"noise": noise}), NOW)])
    with Listener(settings_for(broker.port)) as listener:
        uplink = an_uplink(settings_for(broker.port), spool)
        uplink.start()
        listener.wait_for_records(1)
        uplink.stop(5.0)


def test_a_new_record_is_sent_when_the_uplink_is_woken(broker: MosquittoBroker) -> None:
    spool = MemorySpool()
    with Listener(settings_for(broker.port)) as listener:
        uplink = an_uplink(settings_for(broker.port), spool)
        uplink.start()
        wait_for("online", lambda: uplink.status()["state"] == "online")
        spool.waiting.extend(a_start(minter(), 1))
        uplink.wake()
        assert listener.wait_for_records(3).ok
        uplink.stop(5.0)


def test_tls_1_3_with_a_client_certificate(tmp_path: Path, pki: Pki) -> None:
    tls = BrokerTls(pki.broker, pki.broker_key, pki.ca)
    with MosquittoBroker(str(tmp_path), tls=tls).start() as broker:
        settings = settings_for(
            broker.port, tls=True, tls_ca=pki.ca, tls_cert=pki.device, tls_key=pki.device_key
        )
        records = a_start(minter(), N)
        spool = MemorySpool(records)
        with Listener(settings) as listener:
            uplink = an_uplink(settings, spool)
            uplink.start()
            assert listener.wait_for_records(len(records)).ok
            assert uplink.stop(5.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tls_cert": "", "tls_key": ""}, "refused TLS"),
        ({"tls_cert": "stranger", "tls_key": "stranger_key"}, "refused TLS"),
        ({"tls_ca": "other_ca"}, "does not verify"),
    ],
)
def test_a_wrong_certificate_stops_the_uplink_which_says_so_and_keeps_the_records(
    tmp_path: Path, pki: Pki, changes: dict[str, str], words: str
) -> None:
    names = {"tls_ca": "ca", "tls_cert": "device", "tls_key": "device_key"} | changes
    files = {option: getattr(pki, name) if name else "" for option, name in names.items()}
    tls = BrokerTls(pki.broker, pki.broker_key, pki.ca)
    with MosquittoBroker(str(tmp_path), tls=tls).start() as broker:
        spool = MemorySpool(a_start(minter(), 3))
        uplink = an_uplink(settings_for(broker.port, tls=True, **files), spool)
        uplink.start()
        wait_for("refused", lambda: uplink.status()["state"] == "refused")
        status, beat = uplink.status(), uplink.beat
        wait_for("more turns of the pump", lambda: uplink.beat > beat + 1)
        assert uplink.status()["links"] == status["links"]
        uplink.stop(1.0)
    assert words in status["why"]
    assert spool.acked == []


@pytest.mark.slow
def test_a_wrong_password_stops_the_attempts_and_the_right_one_works(tmp_path: Path) -> None:
    word = tmp_path / "word"
    word.write_text("wrong")
    with MosquittoBroker(str(tmp_path / "broker"), users={"car": "right"}).start() as broker:
        settings = settings_for(broker.port, username="car", password_file=str(word))
        spool = MemorySpool(a_start(minter(), 3))
        wrong = an_uplink(settings, spool)
        wrong.start()
        wait_for("refused", lambda: wrong.status()["state"] == "refused")
        beat = wrong.beat
        links = wrong.status()["links"]
        wait_for("more turns of the pump", lambda: wrong.beat > beat + 3)
        assert wrong.status()["links"] == links and "refused" in wrong.status()["why"]
        wrong.stop(2.0)
        assert spool.acked == []
        word.write_text("right")
        right = an_uplink(settings, spool)
        right.start()
        wait_for("every PUBACK", lambda: spool.empty)
        right.stop(2.0)


@pytest.mark.slow
def test_a_message_the_broker_refuses_is_not_taken_for_acknowledged(tmp_path: Path) -> None:
    """MQTT 5 says so in the PUBACK; in 3.1.1 the broker can only lie (PITFALLS: PUBACKed, then dropped)."""
    acl = "topic readwrite tbox/1/vehicle/state\n"
    with MosquittoBroker(str(tmp_path), acl=acl).start() as broker:
        spool = MemorySpool(a_start(minter(), 3))
        uplink = an_uplink(settings_for(broker.port), spool)
        uplink.start()
        wait_for("refused", lambda: uplink.status()["state"] == "refused")
        why = uplink.status()["why"]
        uplink.stop(1.0)
    assert "refused a message" in why and "Not authorized" in why
    assert spool.acked == [] and len(spool.waiting) == 5


def test_a_broker_that_restarts_costs_nothing(broker: MosquittoBroker) -> None:
    records = a_start(minter(), N)
    spool = MemorySpool(records[:50])
    with Listener(settings_for(broker.port)) as listener:
        uplink = an_uplink(settings_for(broker.port), spool)
        uplink.start()
        listener.wait_for_records(10)
        broker.stop()
        spool.waiting.extend(records[50:])
        wait_for("the loss", lambda: uplink.status()["state"] != "online")
        broker.start()
        assert listener.wait_for_records(len(records)).ok  # the broker may repeat some to the receiver
        uplink.stop(5.0)


def test_a_frozen_broker_is_noticed_by_our_own_deadline(broker: MosquittoBroker) -> None:
    records = a_start(minter(), N)
    spool = MemorySpool(records[:20])
    with Listener(settings_for(broker.port)) as listener:
        uplink = an_uplink(settings_for(broker.port), spool)
        uplink.start()
        listener.wait_for_records(20)
        broker.freeze()
        spool.waiting.extend(records[20:])
        wait_for("the stall", lambda: uplink.status()["stalls"] >= 1)
        assert "stalled" in uplink.status()["why"] or uplink.status()["state"] != "online"
        broker.thaw()
        result = listener.wait_for_records(len(records))
        uplink.stop(5.0)
    assert result.ok and result.duplicates <= uplink.status()["requeued"]


@pytest.mark.slow
@pytest.mark.parametrize("up", [True, False], ids=["both ways", "only the way back"])
def test_a_silent_cut_loses_nothing_and_repeats_only_what_was_in_flight(
    broker: MosquittoBroker, up: bool
) -> None:
    records = a_start(minter(), N)
    spool = MemorySpool(records[:20])
    with LinkCutter(broker.port) as cutter, Listener(settings_for(broker.port)) as listener:
        uplink = an_uplink(settings_for(cutter.port), spool)
        uplink.start()
        listener.wait_for_records(20)
        wait_for("quiet", lambda: spool.empty)
        cutter.cut(up=up)
        spool.waiting.extend(records[20:])
        wait_for("the stall", lambda: uplink.status()["stalls"] >= 2)
        cutter.restore()
        result = listener.wait_for_records(len(records))
        wait_for("every PUBACK", lambda: spool.empty)
        uplink.stop(5.0)
    assert result.ok and result.duplicates <= uplink.status()["requeued"]
    if not up:
        assert listener.proof.result().duplicates > 0


def test_a_reset_link_publishes_the_will_and_comes_back(broker: MosquittoBroker) -> None:
    spool = MemorySpool(a_start(minter(), 5))
    with LinkCutter(broker.port) as cutter, Listener(settings_for(broker.port)) as listener:
        uplink = an_uplink(settings_for(cutter.port), spool)
        uplink.start()
        wait_for("online", lambda: "online" in listener.states)
        cutter.reset()
        wait_for("the Will", lambda: "lost" in listener.states)
        wait_for("online again", lambda: listener.states[-1] == "online")
        uplink.stop(5.0)


def test_latency_and_late_segments_only_make_it_slower(broker: MosquittoBroker) -> None:
    import random

    records = a_start(minter(), 60)
    spool = MemorySpool(records)
    with (
        LinkCutter(broker.port, latency_s=0.02, loss=0.05, random=random.Random(1).random) as cutter,
        Listener(settings_for(broker.port)) as listener,
    ):
        uplink = an_uplink(settings_for(cutter.port), spool)
        uplink.start()
        assert listener.wait_for_records(len(records)).ok
        uplink.stop(5.0)


@pytest.mark.slow
def test_an_idle_link_that_died_is_found_by_the_probe(broker: MosquittoBroker) -> None:
    with LinkCutter(broker.port) as cutter:
        uplink = an_uplink(settings_for(cutter.port), MemorySpool())
        uplink.start()
        wait_for("a first probe", lambda: uplink.status()["probes"] >= 1)
        cutter.cut()
        stalls, connects = uplink.status()["stalls"], uplink.status()["connects"]
        wait_for("the stall", lambda: uplink.status()["stalls"] > stalls)
        cutter.restore()
        wait_for("online again", lambda: uplink.status()["connects"] > connects)
        uplink.stop(5.0)


@pytest.mark.parametrize("bug", [AcksOnOffer, ForgetsInFlight])
def test_a_planted_bug_turns_the_proof_red(broker: MosquittoBroker, bug: type[MemorySpool]) -> None:
    records = a_start(minter(), N)
    spool = bug(records[:20])
    with LinkCutter(broker.port) as cutter, Listener(settings_for(broker.port)) as listener:
        uplink = an_uplink(settings_for(cutter.port), spool)
        uplink.start()
        listener.wait_for_records(20)
        cutter.cut()
        spool.waiting.extend(records[20:-1])
        wait_for("the stall", lambda: uplink.status()["stalls"] >= 1)
        cutter.reset()
        cutter.restore()
        wait_for("the spool to be empty", lambda: spool.empty)
        spool.waiting.append(records[-1])
        wait_for("the stop record", lambda: listener.proof.stopped)
        uplink.stop(5.0)
    assert not listener.proof.result().ok


def test_without_a_broker_it_waits_says_why_and_stops_at_once(tmp_path: Path) -> None:
    with MosquittoBroker(str(tmp_path)).start() as broker:
        port = broker.port
    uplink = an_uplink(settings_for(port), MemorySpool(a_start(minter(), 1)))
    uplink.start()
    wait_for("some attempts", lambda: uplink.status()["links"] >= 3)
    assert "refused" in uplink.status()["why"].lower()
    begin = time.monotonic()
    assert not uplink.stop(20.0)
    assert not uplink.alive and time.monotonic() - begin < 20.0


def test_a_nudge_ends_a_long_wait_at_once(tmp_path: Path) -> None:
    patient = msgspec.structs.replace(QUICK, backoff_base_ms=60_000, backoff_max_ms=3_600_000)
    broker = MosquittoBroker(str(tmp_path))
    with broker.start():
        port = broker.port
    uplink = MqttUplink(
        settings_for(port, session=patient), VEHICLE, MemorySpool(), start=1,
        last_id=lambda: None, jitter=lambda: 0.99,
    )  # fmt: skip
    uplink.start()
    wait_for("the wait", lambda: uplink.status()["state"] == "waiting")
    with broker.start():
        uplink.nudge()
        wait_for("online", lambda: uplink.status()["state"] == "online", deadline_s=50.0)
        uplink.stop(5.0)


def test_a_password_file_that_vanishes_stops_the_link_and_not_the_daemon(tmp_path: Path) -> None:
    word = tmp_path / "word"
    word.write_text("secret")
    with MosquittoBroker(str(tmp_path / "broker")).start() as broker:
        port = broker.port
        uplink = an_uplink(settings_for(port, username="car", password_file=str(word)), MemorySpool())
        uplink.start()
        wait_for("online", lambda: uplink.status()["state"] == "online")
        word.unlink()
    wait_for("refused", lambda: uplink.status()["state"] == "refused")
    assert str(word) in uplink.status()["why"] and uplink.alive
    uplink.stop(1.0)


def test_a_certificate_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UplinkError, match=r"missing\.pem"):
        tls_context(ca=str(tmp_path / "missing.pem"))
    with pytest.raises(UplinkError, match="needs its key"):
        tls_context(cert="device.pem")
    with pytest.raises(UplinkError, match=r"missing\.word"):
        an_uplink(UplinkSettings(password_file=str(tmp_path / "missing.word")), MemorySpool())
