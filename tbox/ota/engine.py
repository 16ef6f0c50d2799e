"""The update engine as a table: decides what happens next. A core: no IO; actions go out, results come in.

Nothing about an update's progress is believed across a restart: `resume_state` derives the state from boot
control and the slot that runs, and an offer is asked for and verified anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from tbox.errors import Refused
from tbox.model import NS_PER_S, Draft, Level, Now
from tbox.ota import boot, policy
from tbox.ota.boot import BootControl, SlotName, SlotState, other_slot
from tbox.ota.model import Delta, Full, ImageKind, Offer, RollbackOrder, Sha256, VerifiedTarget
from tbox.ota.policy import OtaSettings, Vitals
from tbox.ota.trial import Proof, TrialJudge, Verdict

REMEMBERED_MAX = 16
STEP_S = 1.0  # how often the engine wants to look while something may change


class State(Enum):
    IDLE = "idle"
    CHECKING = "checking"
    WAITING = "waiting"  # an image was offered; a condition or the window holds the download
    DOWNLOADING = "downloading"
    INSTALLING = "installing"
    READY = "ready"  # sealed in the other slot; a precondition holds the switch
    PENDING_REBOOT = "pending-reboot"
    TRIAL = "trial"
    LEAVING = "leaving"  # given up; the other slot starts next
    GOOD = "good"
    ROLLED_BACK = "rolled-back"


class Event(Enum):
    CHECK = "check"
    NOTHING = "nothing"
    REFUSED = "refused"
    OFFERED = "offered"
    ALREADY_SEALED = "already-sealed"
    GO = "go"
    HOLD = "hold"
    FETCHED = "fetched"
    FETCH_FAILED = "fetch-failed"
    INSTALLED = "installed"
    INSTALL_FAILED = "install-failed"
    GIVE_UP = "give-up"
    SWITCH = "switch"
    PASSED = "passed"
    FAILED = "failed"
    ORDERED = "ordered"
    NEW_STARTED = "new-started"  # these two are the boot loader's doing; `resume_state` tells which it was
    OLD_STARTED = "old-started"


_RESTING = {Event.CHECK: State.CHECKING}
TABLE: dict[State, dict[Event, State]] = {
    State.IDLE: _RESTING,
    State.GOOD: _RESTING,
    State.ROLLED_BACK: _RESTING,
    State.CHECKING: {
        Event.NOTHING: State.IDLE,
        Event.REFUSED: State.IDLE,
        Event.OFFERED: State.WAITING,
        Event.ALREADY_SEALED: State.READY,
        Event.ORDERED: State.LEAVING,
    },
    State.WAITING: {Event.CHECK: State.CHECKING, Event.GO: State.DOWNLOADING},
    State.DOWNLOADING: {
        Event.HOLD: State.WAITING,
        Event.FETCHED: State.INSTALLING,
        Event.FETCH_FAILED: State.WAITING,
        Event.GIVE_UP: State.IDLE,
    },
    State.INSTALLING: {
        Event.INSTALLED: State.READY,
        Event.INSTALL_FAILED: State.WAITING,
        Event.GIVE_UP: State.IDLE,
    },
    State.READY: {Event.CHECK: State.CHECKING, Event.SWITCH: State.PENDING_REBOOT},
    State.PENDING_REBOOT: {Event.NEW_STARTED: State.TRIAL, Event.OLD_STARTED: State.ROLLED_BACK},
    State.TRIAL: {Event.PASSED: State.GOOD, Event.FAILED: State.LEAVING},
    State.LEAVING: {Event.OLD_STARTED: State.ROLLED_BACK},
}


def transition(state: State, event: Event) -> State:
    """Return the next state. Raises boot.IllegalTransition."""
    try:
        return TABLE[state][event]
    except KeyError:
        raise boot.IllegalTransition(f"engine is {state.value}: no {event.value}") from None


# --- what is kept across restarts ----------------------------------------------------------------------


class Attempts(msgspec.Struct, frozen=True, kw_only=True):
    """How often an image was begun, so that an endless loop of installations ends."""

    sha256: Sha256
    count: Annotated[int, Meta(ge=0, le=100)] = 0
    full_only: bool = False  # a delta has failed before


class Journal(msgspec.Struct, frozen=True, kw_only=True):
    """All the engine remembers by itself: counts, approvals and the switch whose end is still to be told.

    What a later release adds is passed over: the previous release reads the journal of an image on trial.
    """

    format: Annotated[int, Meta(ge=1, le=1)] = 1
    attempts: Annotated[tuple[Attempts, ...], Meta(max_length=REMEMBERED_MAX)] = ()
    approved: Annotated[tuple[Sha256, ...], Meta(max_length=REMEMBERED_MAX)] = ()
    switched_to: str = ""  # digest of the image last switched to, "" once its end was told
    left: str = ""  # digest of an image left on a signed order
    trial_boot_id: Annotated[str, Meta(max_length=100)] = ""  # the machine's boot a trial last began in

    def attempt(self, sha256: str) -> Attempts:
        return next((a for a in self.attempts if a.sha256 == sha256), Attempts(sha256=sha256))

    def with_attempt(self, attempt: Attempts) -> Journal:
        kept = tuple(a for a in self.attempts if a.sha256 != attempt.sha256)
        return replace(self, attempts=(*kept, attempt)[-REMEMBERED_MAX:])


# --- actions out, results in ---------------------------------------------------------------------------


class Check(NamedTuple):
    """Refresh the metadata and answer with CheckDone."""


class Fetch(NamedTuple):
    """Download this file, resuming what is there, and answer with FetchDone."""

    target: VerifiedTarget
    artifact: Full | Delta


class Install(NamedTuple):
    """Bring the fetched file into the slot and answer with InstallDone."""

    slot: SlotName
    target: VerifiedTarget
    artifact: Full | Delta
    manifest: bytes


class Commit(NamedTuple):
    """Write boot control; nothing after it is carried out unless that succeeded."""

    control: BootControl


class Save(NamedTuple):
    """Write the journal."""

    journal: Journal


class Settle(NamedTuple):
    """Tell the boot loader that this slot is the default from now on."""

    slot: SlotName


class Restart(NamedTuple):
    """Stop the agent in order and start from this slot; once, if its image is on trial."""

    slot: SlotName
    trial: bool


Action = Check | Fetch | Install | Commit | Save | Settle | Restart


class CheckDone(NamedTuple):
    offer: Offer | None
    error: str = ""


class FetchDone(NamedTuple):
    error: str = ""
    held: str = ""  # stopped because a condition came up


class InstallDone(NamedTuple):
    control: BootControl
    error: str = ""


class Look(NamedTuple):
    """A person wants the repository looked at now."""


class Approve(NamedTuple):
    """A person approves what is offered, and wants it looked for now."""


class ConfirmByHand(NamedTuple):
    """A technician ends the trial in favour of the image."""


class RollBackByHand(NamedTuple):
    """A person ends the trial against the image."""


Input = CheckDone | FetchDone | InstallDone | Look | Approve | ConfirmByHand | RollBackByHand


class Step(NamedTuple):
    """actions are carried out in order; next_wake_ns: monotonic, at the latest."""

    actions: list[Action]
    drafts: list[Draft]
    next_wake_ns: int


class Device(NamedTuple):
    """Who this device is.

    loader_decides: the boot loader reads boot control and counts tries itself, as `tbox boot` does.
    boot_note: why it did not start the slot that boot control prefers, "" if it did.
    boot_id: the machine's boot, where one may see several starts of the agent; "" where it cannot.
    kind: of images that the boot loader starts.
    """

    vehicle: str
    cohort_key: bytes
    running: SlotName
    missing: Callable[[Iterable[str]], str]  # what of `requires` is lacking, "" for nothing
    loader_decides: bool = True
    boot_note: str = ""
    boot_id: str = ""
    kind: ImageKind = "app"


def resume_state(
    control: BootControl, running: SlotName, journal: Journal, *, loader_decides: bool = True
) -> State:
    """Return the state that boot control and the running slot prove, in the order of these lines."""
    entry, beside = control.slot(running), control.slot(other_slot(running))
    if entry.state in (SlotState.TRIAL, SlotState.LAST_TRY):
        return State.TRIAL
    if beside.state in (SlotState.TRIAL, SlotState.LAST_TRY):
        return State.PENDING_REBOOT
    if entry.state is not SlotState.GOOD or (beside.priority > entry.priority and not loader_decides):
        return State.LEAVING
    if control.failure(journal.switched_to) or control.failure(journal.left):
        return State.ROLLED_BACK
    if journal.switched_to and journal.switched_to == entry.sha256 and entry.state is SlotState.GOOD:
        return State.GOOD
    return State.IDLE


class Engine:
    """Steps through the table. `control` must be as read from the medium when the process started."""

    def __init__(self, settings: OtaSettings, device: Device, control: BootControl, journal: Journal) -> None:
        self._settings = settings
        self._device = device
        self.control = control
        self.journal = journal
        self.state = resume_state(control, device.running, journal, loader_decides=device.loader_decides)
        self.reason = ""
        self._offer: Offer | None = None
        self._judge = TrialJudge(settings)
        self._check_at_ns = 0
        self._retry_at_ns = 0
        self._actions: list[Action] = []
        self._drafts: list[Draft] = []
        self._now = Now(0)
        self._started = False

    @property
    def target(self) -> VerifiedTarget | None:
        """The image now under way, None when there is none."""
        return self._offer.target if self._offer else None

    def step(self, now: Now, vitals: Vitals, proof: Proof, inputs: Iterable[Input] = ()) -> Step:
        """Take results and the world's values; return what to do. Raises Refused for a person's command
        that does not fit the state, before anything was changed by it."""
        self._now, self._actions, self._drafts = now, [], []
        if not self._started:
            self._started = True
            self._resume()
        for item in inputs:
            self._take(item)
        if not any(isinstance(action, Restart) for action in self._actions):
            self._advance(vitals, proof)
        return Step(self._actions, self._drafts, now.mono_ns + int(STEP_S * NS_PER_S))

    def status(self) -> dict[str, Any]:
        """Return plain values for people."""
        target, running = self.target, self.control.slot(self._device.running)
        return {
            "state": self.state.value,
            "reason": self.reason,
            "running": {"slot": self._device.running, "version": running.version, "sha256": running.sha256},
            "slots": {name: self._slot_status(name) for name in boot.SLOT_NAMES},
            "floor": self.control.floor,
            "fallback_floor": self.control.fallback_floor,
            "offered": {"version": target.version, "notes": target.notes} if target else None,
            "trial_s": self._judge.counted_s if self.state is State.TRIAL else None,
            "failed": [{"version": f.version, "reason": f.reason} for f in self.control.failed],
        }

    def _slot_status(self, name: SlotName) -> dict[str, Any]:
        entry = self.control.slot(name)
        return {"state": entry.state.value, "version": entry.version, "tries_left": entry.tries_left}

    def hold_download(self, vitals: Vitals) -> str:
        """Return why the download under way must stop now, "" to go on; asked while it runs."""
        target = self.target
        assert target is not None
        point = policy.cohort_point(self._device.cohort_key, self._device.vehicle, target.sha256)
        approved = target.sha256 in self.journal.approved
        return policy.hold_download(target, self._settings, vitals, point, approved)

    # --- moving ------------------------------------------------------------------------------------

    def _move(self, event: Event, reason: str = "", level: Level = Level.INFO) -> None:
        self.state, self.reason = transition(self.state, event), reason
        self._tell(event.value, reason, level)

    def _tell(self, event: str, reason: str, level: Level = Level.INFO) -> None:
        target = self.target
        running = self.control.slot(self._device.running)
        body: dict[str, Any] = {
            "event": event,
            "state": self.state.value,
            "reason": reason,
            "running": {"slot": self._device.running, "version": running.version, "sha256": running.sha256},
            "floor": self.control.floor,
        }
        if target is not None:
            body["target"] = {
                "version": target.version,
                "sha256": target.sha256,
                "counter": target.security_counter,
                "rxswin": target.rxswin,
            }
        self._drafts.append(Draft("ota", level, self._now.mono_ns, body))

    def _commit(self, control: BootControl) -> None:
        self.control = control
        self._actions.append(Commit(control))

    def _save(self, journal: Journal) -> None:
        if journal != self.journal:
            self.journal = journal
            self._actions.append(Save(journal))

    def _resume(self) -> None:
        """Say where the last start left off, and finish what only the boot loader could interrupt."""
        running = self._device.running
        if self.state is State.ROLLED_BACK:
            failure = self.control.failure(self.journal.switched_to or self.journal.left)
            self.reason = failure.reason if failure else ""
            self._tell("rolled-back", self.reason, Level.WARNING)
            self._save(replace(self.journal, switched_to="", left=""))
        elif self.state is State.GOOD:
            self._tell("good", "")
            self._save(replace(self.journal, switched_to=""))
        elif self.state is State.TRIAL:
            self._resume_trial()
        if self._device.boot_note:
            self._tell("fallback", self._device.boot_note, Level.WARNING)
        if self.control.slot(running).state is SlotState.GOOD and self.state is not State.LEAVING:
            self._actions.append(Settle(running))
        if self.state is State.PENDING_REBOOT:
            self._retry_reboot()
        elif self.state is State.LEAVING:
            self._restart_into_good(other_slot(running))

    def _resume_trial(self) -> None:
        """Say that the trial begins. A second start in one boot of the machine means that the first crashed:
        this try is over, and a plain reboot lets the previous image decide about the next."""
        boot_id = self._device.boot_id
        if boot_id and boot_id == self.journal.trial_boot_id:
            self._tell("trial", "started again in the same boot: this try is over", Level.WARNING)
            self._actions.append(Restart(other_slot(self._device.running), trial=False))
            return
        self._save(replace(self.journal, trial_boot_id=boot_id))
        self._tell("trial", "")

    def _retry_reboot(self) -> None:
        """The old image runs though a new one is due: start that again, or give it up when out of tries."""
        name = other_slot(self._device.running)
        if self.control.slot(name).state is SlotState.LAST_TRY:
            self._commit(boot.fail(self.control, name, "did not start in any of its tries"))
            self.state = transition(self.state, Event.OLD_STARTED)
            self._tell("rolled-back", "did not start in any of its tries", Level.WARNING)
            self._save(replace(self.journal, switched_to=""))
            return
        self._restart_into(name)

    def _restart_into(self, name: SlotName) -> None:
        if not self._device.loader_decides:
            self._commit(boot.count_try(self.control, name))
        self._actions.append(Restart(name, trial=True))

    # --- results and commands ----------------------------------------------------------------------

    def _take(self, item: Input) -> None:
        match item:
            case CheckDone():
                self._checked(item)
            case FetchDone():
                self._fetched(item)
            case InstallDone():
                self._installed(item)
            case Look():
                self._check_at_ns = self._retry_at_ns = 0
            case Approve():
                self._approve()
            case ConfirmByHand():
                self._need_trial("confirm")
                self._pass("confirmed by hand")
            case RollBackByHand():
                self._need_trial("roll back")
                self._give_up_trial("rolled back by hand")

    def _need_trial(self, what: str) -> None:
        if self.state is not State.TRIAL:
            raise Refused(
                f"nothing to {what}: no image is on trial (the engine is {self.state.value})",
                mend="a good image is left only on a signed order",
            )

    def _approve(self) -> None:
        target = self.target
        if target is not None and target.sha256 not in self.journal.approved:
            self._save(
                replace(self.journal, approved=(*self.journal.approved, target.sha256)[-REMEMBERED_MAX:])
            )
        self._check_at_ns = self._retry_at_ns = 0

    def _checked(self, done: CheckDone) -> None:
        self._check_at_ns = self._now.mono_ns + self._settings.check_period_s * NS_PER_S
        offer = done.offer
        if offer is None:
            self._offer = None
            return self._move(Event.REFUSED, done.error, Level.WARNING)
        order = self._order(offer)
        if order is not None:
            return self._leave(order)
        self._offer = offer
        if offer.target is None:
            return self._move(Event.NOTHING)
        return self._consider(offer.target)

    def _consider(self, target: VerifiedTarget) -> None:
        device, running = self._device, self._device.running
        if target.sha256 == self.control.slot(running).sha256:
            self._move(Event.NOTHING, f"{target.version} runs already")
            self._offer = None
            return
        reason = policy.not_admitted(
            target, self.control, running, self._settings, device.missing, device.kind
        )
        attempts = self.journal.attempt(target.sha256).count
        if not reason and attempts >= self._settings.attempts_max:
            reason = f"given up after {attempts} attempts"
        if reason:
            self._move(Event.REFUSED, reason, Level.WARNING)
            self._offer = None
        elif boot.holds(self.control, other_slot(running), target):
            self._move(Event.ALREADY_SEALED)
        else:
            self._move(Event.OFFERED)
        return

    def _order(self, offer: Offer) -> RollbackOrder | None:
        """Return a signed order to leave the running image, if the other slot can be gone back to."""
        running = self._device.running
        back = other_slot(running)
        if self.control.slot(back).state is not SlotState.GOOD or boot.unfit(self.control, back):
            return None
        sha256 = self.control.slot(running).sha256
        return next((order for order in offer.orders if order.leave_sha256 == sha256), None)

    def _leave(self, order: RollbackOrder) -> None:
        running = self._device.running
        self._save(replace(self.journal, left=order.leave_sha256))
        self._commit(
            boot.fail(boot.activate(self.control, other_slot(running)), running, f"ordered: {order.reason}")
        )
        self._move(Event.ORDERED, order.reason, Level.WARNING)
        self._restart_into_good(other_slot(running))

    def _restart_into_good(self, name: SlotName) -> None:
        self._actions += [Settle(name), Restart(name, trial=False)]

    def _fetched(self, done: FetchDone) -> None:
        if done.held:
            return self._move(Event.HOLD, done.held)
        if done.error:
            return self._attempt_failed(Event.FETCH_FAILED, done.error)
        target, artifact = self._chosen()
        self._move(Event.FETCHED)
        assert self._offer is not None
        slot = other_slot(self._device.running)
        self._actions.append(Install(slot, target, artifact, self._offer.manifest))
        return None

    def _installed(self, done: InstallDone) -> None:
        self.control = done.control
        if done.error:
            return self._attempt_failed(Event.INSTALL_FAILED, done.error)
        return self._move(Event.INSTALLED)

    def _attempt_failed(self, event: Event, error: str) -> None:
        target, artifact = self._chosen()
        attempt = self.journal.attempt(target.sha256)
        attempt = replace(
            attempt,
            count=attempt.count + 1,
            full_only=attempt.full_only or (event is Event.INSTALL_FAILED and isinstance(artifact, Delta)),
        )
        self._save(self.journal.with_attempt(attempt))
        self._retry_at_ns = self._now.mono_ns + self._settings.retry_s * NS_PER_S
        if attempt.count >= self._settings.attempts_max:
            self._move(Event.GIVE_UP, error, Level.WARNING)
            self._offer = None
        else:
            self._move(event, error, Level.WARNING)

    def _chosen(self) -> tuple[VerifiedTarget, Full | Delta]:
        """Return the image and the smaller file that leads to it from the running one."""
        target = self.target
        assert target is not None
        base = self.control.slot(self._device.running).sha256
        fitting = [delta for delta in target.deltas if delta.base_sha256 == base]
        if not fitting or self.journal.attempt(target.sha256).full_only:
            return target, target.full
        best = min(fitting, key=lambda delta: delta.length)
        return target, best if best.length < target.full.length else target.full

    # --- time and conditions -----------------------------------------------------------------------

    def _advance(self, vitals: Vitals, proof: Proof) -> None:
        match self.state:
            case State.IDLE | State.GOOD | State.ROLLED_BACK:
                self._check_when_due()
            case State.WAITING:
                self._wait(vitals)
            case State.READY:
                self._switch(vitals)
            case State.TRIAL:
                self._try_out(proof)
            case _:
                pass  # an action is under way, or the restart is

    def _check_when_due(self) -> bool:
        if self._now.mono_ns < self._check_at_ns:
            return False
        self._move(Event.CHECK)
        self._actions.append(Check())
        return True

    def _wait(self, vitals: Vitals) -> None:
        if self._check_when_due():
            return
        hold = self.hold_download(vitals)
        if hold:
            self._held(hold)
        elif self._now.mono_ns >= self._retry_at_ns:
            target, artifact = self._chosen()
            self._move(Event.GO, artifact.name)
            self._actions.append(Fetch(target, artifact))

    def _switch(self, vitals: Vitals) -> None:
        if self._check_when_due():
            return
        target = self.target
        assert target is not None
        hold = policy.hold_switch(target, self._settings, vitals, target.sha256 in self.journal.approved)
        if hold:
            self._held(hold)
            return
        slot = other_slot(self._device.running)
        self._save(replace(self.journal, switched_to=target.sha256))
        self._commit(boot.activate(self.control, slot))
        self._move(Event.SWITCH)
        self._restart_into(slot)

    def _held(self, reason: str) -> None:
        """Tell a person once why nothing happens, and again when that changes."""
        if reason != self.reason:
            self.reason = reason
            self._tell("held", reason)

    def _try_out(self, proof: Proof) -> None:
        verdict = self._judge.step(self._now.mono_ns, proof)
        if verdict is Verdict.PASSED:
            self._pass("")
        elif verdict is Verdict.FAILED:
            self._give_up_trial(self._judge.reason)
        else:
            self._held(self._judge.reason)

    def _pass(self, reason: str) -> None:
        running = self._device.running
        self._commit(boot.confirm(self.control, running))
        self._save(replace(self.journal, switched_to=""))
        self._move(Event.PASSED, reason)
        self._actions.append(Settle(running))
        self._check_at_ns = self._now.mono_ns + self._settings.retry_s * NS_PER_S

    def _give_up_trial(self, reason: str) -> None:
        running = self._device.running
        self._commit(boot.fail(self.control, running, reason))
        self._move(Event.FAILED, reason, Level.WARNING)
        self._restart_into_good(other_slot(running))
