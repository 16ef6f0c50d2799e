"""The engine: its table pair by pair, and what it asks for as offers, results, vitals and people come in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from tbox.errors import Refused
from tbox.model import NS_PER_S, Draft, Now
from tbox.ota import boot
from tbox.ota import engine as e
from tbox.ota.boot import BootControl, IllegalTransition, SlotState
from tbox.ota.engine import Engine, Event, Journal, State
from tbox.ota.model import Delta, Offer, RollbackOrder
from tbox.ota.policy import OtaSettings
from tests.core.test_ota_boot import DIGEST, FACTORY, GOOD, LAST_TRY, OLD, TRIAL
from tests.crash.ota_world import HEALTHY, PARKED, sha256, target_of
from tests.tables import check_pair, check_whole, every_pair

SETTINGS = OtaSettings(
    trial_crash_free_s=10, trial_limit_s=60, trial_grace_s=5, retry_s=5, check_period_s=100
)
NEW = target_of(b"new", 2, full=msgspec.structs.replace(target_of(b"new", 2).full, length=1000))
DELTA = Delta(base_sha256=OLD.sha256, name="patch", length=10, sha256=sha256(b"patch"))


class Rig:
    """An engine whose checks, downloads and installations answer as told."""

    def __init__(
        self,
        control: BootControl = FACTORY,
        journal: Journal | None = None,
        slot: boot.SlotName = "a",
        **device: Any,
    ) -> None:
        own = e.Device("vehicle", b"key", slot, lambda requires: "", kind="raw", **device)
        self.engine = Engine(SETTINGS, own, control, journal or Journal())
        self.offer: Offer | None = Offer(target=NEW, manifest=b"m")
        self.vitals, self.proof = PARKED, HEALTHY
        self.fetches: Iterator[e.FetchDone] = iter(())
        self.installs: Iterator[str] = iter(())
        self.now_s = 1
        self.actions: list[e.Action] = []
        self.drafts: list[Draft] = []

    @property
    def state(self) -> State:
        return self.engine.state

    def run(self, seconds: int = 1, *inputs: e.Input) -> State:
        for _ in range(seconds):
            pending: list[e.Input] = list(inputs)
            inputs = ()
            while True:
                step = self.engine.step(Now(self.now_s * NS_PER_S), self.vitals, self.proof, pending)
                self.actions += step.actions
                self.drafts += step.drafts
                pending = [answer for action in step.actions if (answer := self._answer(action)) is not None]
                if not pending:
                    break
            self.now_s += 1
        return self.state

    def _answer(self, action: e.Action) -> e.Input | None:
        match action:
            case e.Check():
                return e.CheckDone(self.offer, "" if self.offer else "no network")
            case e.Fetch():
                return next(self.fetches, e.FetchDone())
            case e.Install():
                erased = boot.erase(self.engine.control, action.slot, action.target)
                error = next(self.installs, "")
                return e.InstallDone(erased if error else boot.seal(erased, action.slot, DIGEST), error)
            case _:
                return None

    def of(self, kind: type[Any]) -> list[Any]:
        return [action for action in self.actions if isinstance(action, kind)]

    @property
    def told(self) -> list[str]:
        return [draft.body["event"] for draft in self.drafts]


@every_pair(State, Event)
def test_every_state_takes_the_events_of_the_table_and_no_other(state: State, event: Event) -> None:
    check_pair(e.TABLE, state, event, e.transition, IllegalTransition)


def test_every_state_can_be_reached_and_left() -> None:
    check_whole(e.TABLE, State, Event)


def test_what_the_boot_loader_did_is_resumed_as_the_table_says() -> None:
    switched = Journal(switched_to=NEW.sha256)
    started, given_up = boot.count_try(TRIAL, "b"), boot.fail(TRIAL, "b", "why")
    new, old = (e.TABLE[State.PENDING_REBOOT][event] for event in (Event.NEW_STARTED, Event.OLD_STARTED))
    assert e.resume_state(started, "b", switched) is new
    assert e.resume_state(given_up, "a", switched) is old is e.TABLE[State.LEAVING][Event.OLD_STARTED]


def test_an_offer_goes_all_the_way_to_the_restart() -> None:
    rig = Rig()
    assert rig.run(2) is State.PENDING_REBOOT
    assert [type(action).__name__ for action in rig.actions] == [
        "Settle", "Check", "Fetch", "Install", "Save", "Commit", "Restart",
    ]  # fmt: skip
    assert rig.engine.control.b.state is SlotState.TRIAL and rig.engine.control.floor == 1


def test_downloads_while_driving_and_switches_once_parked() -> None:
    rig = Rig()
    rig.vitals = msgspec.structs.replace(PARKED, parked=False)
    assert rig.run(20) is State.READY
    assert rig.told.count("held") == 1 and rig.engine.reason == "the vehicle is not parked"
    rig.vitals = PARKED
    assert rig.run() is State.PENDING_REBOOT


def test_waits_for_the_window_and_stops_a_download_that_outlasts_it() -> None:
    rig = Rig()
    rig.vitals = msgspec.structs.replace(PARKED, local_minute=720)
    assert rig.run(5) is State.WAITING
    assert rig.engine.reason == "waiting for 22:00 to 06:00"
    rig.vitals, rig.fetches = PARKED, iter([e.FetchDone(held="not over ntn")])
    rig.run()
    assert "hold" in rig.told and rig.run(5) is State.PENDING_REBOOT
    assert rig.engine.journal.attempts == ()


def test_the_smaller_file_from_the_running_base_is_fetched() -> None:
    rig = Rig()
    other = msgspec.structs.replace(DELTA, base_sha256=sha256(b"another"), length=1)
    rig.offer = Offer(target=msgspec.structs.replace(NEW, deltas=(other, DELTA)))
    rig.run(2)
    assert [fetch.artifact for fetch in rig.of(e.Fetch)] == [DELTA]
    rig = Rig()
    rig.offer = Offer(
        target=msgspec.structs.replace(NEW, deltas=(msgspec.structs.replace(DELTA, length=1001),))
    )
    rig.run(2)
    assert [fetch.artifact for fetch in rig.of(e.Fetch)] == [NEW.full]


def test_a_delta_that_does_not_install_is_followed_by_the_full_image() -> None:
    rig = Rig()
    rig.offer = Offer(target=msgspec.structs.replace(NEW, deltas=(DELTA,)))
    rig.installs = iter(["the patch is damaged"])
    assert rig.run(10) is State.PENDING_REBOOT
    assert [fetch.artifact for fetch in rig.of(e.Fetch)] == [DELTA, NEW.full]


def test_it_gives_up_after_its_attempts_and_does_not_begin_again_after_a_restart() -> None:
    rig = Rig()
    rig.fetches = iter([e.FetchDone("timed out")] * 99)
    assert rig.run(60) is State.IDLE
    assert len(rig.of(e.Fetch)) == SETTINGS.attempts_max and "give-up" in rig.told
    again = Rig(journal=rig.engine.journal)
    assert again.run(5) is State.IDLE
    assert again.of(e.Fetch) == [] and again.engine.reason == "given up after 3 attempts"


def test_a_release_that_is_withdrawn_while_it_waits_is_not_switched_to() -> None:
    rig = Rig()
    rig.vitals = msgspec.structs.replace(PARKED, parked=False)
    rig.run(5)
    rig.offer = Offer(target=None)
    assert rig.run(120) is State.IDLE
    rig.vitals = PARKED
    assert rig.run(5) is State.IDLE
    rig.offer = Offer(target=NEW, manifest=b"m")
    assert rig.run(120) is State.PENDING_REBOOT and len(rig.of(e.Install)) == 1


def test_a_newer_release_takes_the_place_of_one_that_waits() -> None:
    rig = Rig()
    rig.vitals = msgspec.structs.replace(PARKED, parked=False)
    rig.run(5)
    newer = target_of(b"newer", 3)
    rig.offer = Offer(target=newer, manifest=b"m")
    rig.run(120)
    rig.vitals = PARKED
    rig.run(2)
    assert rig.engine.control.b.sha256 == newer.sha256 and rig.state is State.PENDING_REBOOT


@pytest.mark.parametrize(
    "offer", [None, Offer(target=None), Offer(target=OLD), Offer(target=target_of(b"x", 1))]
)
def test_nothing_new_changes_nothing(offer: Offer | None) -> None:
    rig = Rig()
    rig.offer = offer
    assert rig.run(50) is State.IDLE
    assert rig.of(e.Commit) == [] and len(rig.of(e.Check)) == 1
    assert rig.engine.status()["offered"] is None


def test_a_refusal_is_told_with_its_reason() -> None:
    rig = Rig()
    rig.offer = Offer(target=target_of(b"x", 1))
    rig.run()
    assert rig.drafts[-1].body["event"] == "refused" and "downgrade" in rig.drafts[-1].body["reason"]
    assert rig.drafts[-1].kind == "ota"


def test_consent_is_waited_for_and_kept_over_a_restart() -> None:
    asking = msgspec.structs.replace(
        NEW, preconditions=msgspec.structs.replace(NEW.preconditions, consent=True)
    )
    rig = Rig()
    rig.offer = Offer(target=asking, manifest=b"m")
    assert rig.run(5) is State.WAITING
    rig.vitals = msgspec.structs.replace(PARKED, parked=False)
    assert rig.run(2, e.Approve()) is State.READY
    again = Rig(rig.engine.control, rig.engine.journal)
    again.offer = rig.offer
    assert again.run(2) is State.PENDING_REBOOT


def on_trial(**device: Any) -> Rig:
    journal = Journal(switched_to=NEW.sha256)
    return Rig(boot.count_try(TRIAL, "b"), journal, slot="b", **device)


def test_a_healthy_image_is_confirmed_and_only_then_the_floor_rises() -> None:
    rig = on_trial()
    assert rig.run(8) is State.TRIAL and rig.engine.control.floor == 1
    assert rig.run(6) is State.GOOD
    assert rig.engine.control.floor == 2 and "passed" in rig.told
    assert rig.of(e.Settle) == [e.Settle("b")]


def test_an_unhealthy_image_is_left_at_once_with_its_reason_told_by_the_old_one() -> None:
    rig = on_trial()
    rig.proof = msgspec.structs.replace(HEALTHY, ledger_clean=False)
    assert rig.run() is State.LEAVING
    assert rig.actions[-1] == e.Restart("a", trial=False)
    back = Rig(rig.engine.control, rig.engine.journal, slot="a")
    assert back.state is State.ROLLED_BACK
    back.run()
    assert back.drafts[0].body["reason"] == "the loss ledger does not balance"
    assert back.run(200) is State.IDLE and back.of(e.Fetch) == []
    assert Rig(back.engine.control, back.engine.journal).state is State.IDLE  # told once


def test_a_confirmed_image_says_so_after_a_cut_before_it_could() -> None:
    rig = Rig(GOOD, Journal(switched_to=NEW.sha256), slot="b")
    assert rig.state is State.GOOD
    rig.run()
    assert rig.told[0] == "good" and rig.engine.journal.switched_to == ""


def test_people_may_end_a_trial_either_way_and_nothing_else() -> None:
    assert on_trial().run(1, e.ConfirmByHand()) is State.GOOD
    assert on_trial().run(1, e.RollBackByHand()) is State.LEAVING
    for command in (e.ConfirmByHand(), e.RollBackByHand()):
        rig = Rig(GOOD, slot="b")
        with pytest.raises(Refused, match="no image is on trial"):
            rig.run(1, command)
        assert rig.of(e.Commit) == []


def test_a_signed_order_leaves_even_a_good_image_for_the_other_good_one() -> None:
    rig = Rig(GOOD, slot="b")
    rig.offer = Offer(target=NEW, orders=(RollbackOrder(leave_sha256=NEW.sha256, reason="2 % crash"),))
    assert rig.run() is State.LEAVING
    control = rig.engine.control
    assert boot.plan(control, {}) == boot.Start("a", trial=False) and control.floor == 2
    assert rig.actions[-2:] == [e.Settle("a"), e.Restart("a", trial=False)]
    back = Rig(control, rig.engine.journal)
    assert back.state is State.ROLLED_BACK
    back.run()
    assert back.drafts[0].body["reason"] == "ordered: 2 % crash"


def test_an_order_is_ignored_where_there_is_nothing_to_go_back_to() -> None:
    rig = Rig()
    rig.offer = Offer(target=OLD, orders=(RollbackOrder(leave_sha256=OLD.sha256, reason="x"),))
    assert rig.run(3) is State.IDLE


def test_where_the_firmware_does_not_count_tries_the_engine_does_before_each_restart() -> None:
    rig = Rig(loader_decides=False)
    assert rig.run(2) is State.PENDING_REBOOT
    control, journal = rig.engine.control, rig.engine.journal
    assert control.b.tries_left == boot.TRIES - 1
    for left in range(boot.TRIES - 2, -1, -1):  # the firmware came back with the old image
        again = Rig(control, journal, loader_decides=False)
        again.run()
        control, journal = again.engine.control, again.engine.journal
        assert control.b.tries_left == left and isinstance(again.actions[-1], e.Restart)
    last = Rig(control, journal, loader_decides=False)
    last.run()
    assert last.told[0] == "rolled-back" and last.engine.control.failure(NEW.sha256) is not None


def test_where_the_firmware_started_the_old_default_after_a_confirmation_it_is_set_right() -> None:
    rig = Rig(GOOD, slot="a", loader_decides=False)
    assert rig.state is State.LEAVING
    rig.run()
    assert rig.actions == [e.Settle("b"), e.Restart("b", trial=False)]


def test_a_second_start_in_one_boot_of_the_machine_ends_the_try() -> None:
    first = on_trial(loader_decides=False, boot_id="boot 1")
    assert first.run() is State.TRIAL and first.of(e.Restart) == []
    again = Rig(first.engine.control, first.engine.journal, slot="b", loader_decides=False, boot_id="boot 1")
    again.proof = msgspec.structs.replace(HEALTHY, ledger_clean=False)
    again.run()
    assert again.actions == [e.Restart("a", trial=False)], "the restart is all that happens"
    other = Rig(first.engine.control, first.engine.journal, slot="b", loader_decides=False, boot_id="boot 2")
    assert other.run() is State.TRIAL and other.of(e.Restart) == []


def test_the_journal_of_a_later_release_is_read_by_this_one() -> None:
    later = msgspec.to_builtins(Journal(left="x", attempts=(e.Attempts(sha256="0" * 64, count=2),)))
    later["attempts"][0]["added"] = later["added"] = 1
    read = msgspec.msgpack.decode(msgspec.msgpack.encode(later), type=Journal)
    assert read.left == "x" and read.attempt("0" * 64).count == 2


def test_a_fallback_that_the_boot_loader_chose_is_told_and_stays() -> None:
    rig = Rig(GOOD, slot="a", boot_note="slot b: crashed 5 times in a row")
    rig.offer = Offer(target=NEW)
    assert rig.run(5) is State.IDLE
    assert rig.drafts[0].body["event"] == "fallback" and rig.of(e.Restart) == []


def test_resuming_believes_boot_control_and_the_running_slot_only() -> None:
    lying = Journal(switched_to=NEW.sha256)
    assert e.resume_state(FACTORY, "a", lying) is State.IDLE
    assert e.resume_state(TRIAL, "a", Journal()) is State.PENDING_REBOOT
    assert e.resume_state(LAST_TRY, "b", Journal()) is State.TRIAL
    assert e.resume_state(boot.fail(TRIAL, "b", "why"), "b", Journal()) is State.LEAVING


def test_status_is_plain_values() -> None:
    rig = Rig()
    rig.vitals = msgspec.structs.replace(PARKED, parked=False)
    rig.run(3)
    assert msgspec.json.encode(rig.engine.status())
    assert rig.engine.status()["offered"]["version"] == "2.0"
