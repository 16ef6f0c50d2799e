"""The uplink's session over bad links in virtual time, judged by the proof; and the bugs this must find."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tbox.model import NS_PER_S, Record
from tbox.record.codec import decode_payload
from tbox.record.proof import Proof, ProofResult
from tbox.sim.broker import VirtualBroker
from tbox.sim.network import Coverage, LinkModel, VirtualUplink
from tbox.uplink.session import SessionSettings, State
from tests.memory_spool import (
    AcksOnOffer,
    ForgetsInFlight,
    MemorySpool,
    NumbersAnew,
    a_start,
    minter,
)

SETTINGS = SessionSettings(window=8, ack_deadline_ms=4_000, backoff_max_ms=8_000, stable_ms=5_000)
RECORDS = 400
END_S = 600


class Ride:
    """One start's records, made evenly over the ride, sent over a link with gaps; then a stop."""

    def __init__(
        self,
        seed: int,
        gaps_s: list[tuple[float, float]],
        spool: MemorySpool | None = None,
        model: LinkModel | None = None,
        until_s: float = 60.0,
    ) -> None:
        source = random.Random(seed)
        self.records = a_start(minter(1), RECORDS)
        self.spool = spool or MemorySpool()
        self.broker = VirtualBroker()
        self.proof = Proof()
        self.digest = hashlib.sha256()
        self.online_again_s = 0.0
        self.stopped_s = 0.0
        self.broker.subscribe(self._receive)
        coverage = Coverage([(int(a * NS_PER_S), int(b * NS_PER_S)) for a, b in gaps_s])
        self.uplink = VirtualUplink(
            SETTINGS, self.spool, self.broker, vehicle="v", start=1,
            last_id=lambda: self.records[-1].id, random=source.random,
            model=model or LinkModel(latency_ms=40, jitter_ms=10), coverage=coverage,
        )  # fmt: skip
        self._run(int(until_s * NS_PER_S))

    def _receive(self, topic: str, payload: bytes, mono_ns: int) -> None:
        self.digest.update(topic.encode() + payload + mono_ns.to_bytes(8, "big"))
        self.proof.feed_message(topic, payload)
        if topic.endswith("state") and b"online" in payload:
            self.online_again_s = mono_ns / NS_PER_S

    def _run(self, until_ns: int) -> None:
        made = now = 0
        self.uplink.start(0)
        stopping = False
        while now < END_S * NS_PER_S:
            due = now * len(self.records) // until_ns + 1
            self.spool.waiting.extend(self.records[made : min(due, len(self.records))])
            made = max(made, min(due, len(self.records)))
            if made == len(self.records) and self.spool.empty and not stopping:
                stopping = True
                self.stopped_s = now / NS_PER_S
                self.uplink.stop(now)
            wake = self.uplink.step(now)
            if wake is None:
                break
            now = max(now + 1, min(wake, now + NS_PER_S // 10))

    @property
    def result(self) -> ProofResult:
        return self.proof.result()


GAPS = st.lists(
    st.tuples(st.floats(0, 60), st.floats(0.05, 40)).map(lambda gap: (gap[0], gap[0] + gap[1])), max_size=4
)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), GAPS, st.sampled_from([0.0, 0.05]))
@example(47, [(60.0, 62.0)], 0.0)
def test_whatever_the_gaps_every_record_arrives_and_only_flying_ones_twice(
    seed: int, gaps_s: list[tuple[float, float]], loss: float
) -> None:
    ride = Ride(seed, gaps_s, model=LinkModel(loss=loss))
    result = ride.result
    assert result.ok and result.received == RECORDS + 2
    assert result.duplicates <= ride.uplink.session.counters.requeued
    assert ride.spool.empty and ride.uplink.session.state is State.STOPPED
    # A goodbye into a gap is not heard: then the Will speaks, and says "lost".
    goodbye_s = (ride.stopped_s, ride.stopped_s + SETTINGS.leave_deadline_ms / 1000)
    unheard = any(begin <= goodbye_s[1] and goodbye_s[0] < end for begin, end in gaps_s)
    assert result.state is not None
    assert result.state["state"] == "offline" or (unheard and result.state["state"] == "lost")


def test_one_seed_gives_the_same_bytes_at_the_same_times() -> None:
    gaps = [(10.0, 35.0)]
    first, second, other = (Ride(seed, gaps).digest.hexdigest() for seed in (1, 1, 2))
    assert first == second != other


def test_a_link_without_gaps_sends_nothing_twice() -> None:
    ride = Ride(1, [])
    assert ride.result.ok and ride.result.duplicates == 0
    assert ride.uplink.session.counters.links == 1


def test_during_a_long_silence_the_broker_publishes_the_will_and_online_follows_it() -> None:
    states: list[bytes] = []
    ride = Ride(3, [])
    broker = VirtualBroker()
    broker.subscribe(lambda topic, payload, _: states.append(payload) if topic.endswith("state") else None)
    uplink = VirtualUplink(
        SETTINGS, ride.spool, broker, vehicle="v", start=1, last_id=lambda: None,
        random=random.Random(1).random, coverage=Coverage([(10 * NS_PER_S, 200 * NS_PER_S)]),
    )  # fmt: skip
    uplink.start(0)
    now = 0
    while now < 260 * NS_PER_S:
        wake = uplink.step(now)
        assert wake is not None
        now = max(now + 1, wake)
    said = [decoded.split(b'"')[3].decode() for decoded in states]
    assert said[0] == "online" and "lost" in said and said[-1] == "online"


def test_after_the_gap_a_vehicle_is_back_within_its_longest_backoff() -> None:
    back_s = []
    for seed in range(10):
        ride = Ride(seed, [(10.0, 40.0)])
        back_s.append(ride.online_again_s - 40.0)
    assert 0 < max(back_s) <= SETTINGS.backoff_max_ms / 1000 + 1


def renumbering() -> Callable[[Record], Record]:
    """What a sender does that gives a record a new id each time it is offered."""
    counter = RECORDS + 1000

    def renumber(record: Record) -> Record:
        nonlocal counter
        counter += 1
        plain = decode_payload(record.payload) | {"id": 1 << 32 | counter}
        return Record(1 << 32 | counter, record.kind, record.level, msgspec.msgpack.encode(plain))

    return renumber


PLANTED: dict[str, Callable[[], MemorySpool]] = {
    "deletes before the PUBACK": AcksOnOffer,
    "forgets what was in flight": ForgetsInFlight,
    "sends again under new ids": lambda: NumbersAnew([], renumbering()),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_turns_the_proof_red(bug: str) -> None:
    verdicts = [Ride(seed, [(5.0, 20.0), (30.0, 50.0)], spool=PLANTED[bug]()).result.ok for seed in range(3)]
    assert verdicts == [False, False, False]


def test_the_same_ride_without_a_bug_is_green() -> None:
    assert all(Ride(seed, [(5.0, 20.0), (30.0, 50.0)]).result.ok for seed in range(3))


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9)), max_size=5), st.integers(0, 80))
def test_coverage_ends_a_gap_at_its_last_end(spans: list[tuple[int, int]], t: int) -> None:
    gaps = [(begin, begin + length) for begin, length in spans]
    up = Coverage(gaps).up_from(t)
    assert up >= t
    covered = {n for begin, end in gaps for n in range(begin, end)}
    assert up == next(n for n in range(t, 200) if n not in covered)
