"""What may delay or refuse an update: signed and local conditions over values. It never authorises anything.

Every function returns why not, in words for people, or "" when nothing stands against it. What is unknown
counts against the update.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from tbox.ota.boot import BootControl, SlotName
from tbox.ota.model import IMAGE_BYTES_MAX, ImageKind, MinuteOfDay, Name, VerifiedTarget, Window

Bearer = Literal["wired", "wifi", "cellular", "ntn", "none"]
ALARM_LEVEL_BLOCKING = 3  # level 3 and above stop an update (R156)
DISK_RESERVE_BYTES = 16 << 20  # left free for the spool beside the download

Seconds = Annotated[int, Meta(ge=1, le=30 * 86_400)]


class OtaSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The device's own conditions; signed ones add to them. Local time means the vehicle's."""

    hardware_id: Name = "tbox-sim"
    check_period_s: Seconds = 4 * 3600
    window: Window = Window()
    bearers: tuple[Literal["wired", "wifi", "cellular"], ...] = ("wired", "wifi", "cellular")  # never NTN
    soc_percent_min: Annotated[int, Meta(ge=0, le=100)] = 20
    soc_recovery_percent: Annotated[int, Meta(ge=0, le=50)] = 5  # what rolling back would take on top
    low_voltage_mv_min: Annotated[int, Meta(ge=0, le=60_000)] = 11_800
    consent: bool = False  # a person must approve each release
    slot_bytes_max: Annotated[int, Meta(ge=1, le=IMAGE_BYTES_MAX)] = 1 << 30
    attempts_max: Annotated[int, Meta(ge=1, le=10)] = 3  # downloads or installations of one image
    tries: Annotated[int, Meta(ge=1, le=7)] = 3
    retry_s: Seconds = 300
    trial_crash_free_s: Seconds = 600
    trial_limit_s: Seconds = 1800
    trial_grace_s: Seconds = 60  # how long a part may be down before the trial fails


class Vitals(msgspec.Struct, frozen=True, kw_only=True):
    """The vehicle as the agent knows it, handed over as values; None is unknown."""

    parked: bool | None = None
    soc_percent: float | None = None
    low_voltage_mv: int | None = None
    alarm_level: int = 0  # the highest level now raised
    disk_free_bytes: int | None = None
    bearer: Bearer = "none"
    local_minute: MinuteOfDay | None = None


def in_window(window: Window, minute: int) -> bool:
    """Whether a minute of the day lies in a window, which may reach past midnight or be the whole day."""
    if window.whole_day:
        return True
    if window.begin_minute <= window.end_minute:
        return window.begin_minute <= minute < window.end_minute
    return minute >= window.begin_minute or minute < window.end_minute


def cohort_point(key: bytes, vehicle: str, release: str) -> float:
    """Return where in [0, 100) this vehicle stands for this release; the key keeps it from being chosen."""
    digest = hmac.new(key, f"{vehicle}\0{release}".encode(), hashlib.sha256).digest()
    return int.from_bytes(digest[:6], "big") / (1 << 48) * 100


def not_admitted(
    target: VerifiedTarget,
    control: BootControl,
    running: SlotName,
    settings: OtaSettings,
    missing: Callable[[Iterable[str]], str],
    kind: ImageKind,
) -> str:
    """Return why this image is refused on this device for good, "" when it may come.

    missing: what of the signed `requires` this device lacks, "" for nothing. kind: of images that the boot
    loader here starts.
    """
    entry = control.slot(running)
    if settings.hardware_id not in target.hardware_ids:
        return f"for hardware {', '.join(target.hardware_ids)}, and this is {settings.hardware_id}"
    if target.kind != kind:
        return f"of kind {target.kind}, and the boot loader here starts images of kind {kind}"
    if target.sha256 == entry.sha256:
        return "this image runs already"
    failure = control.failure(target.sha256)
    if failure is not None:
        return f"was given up before: {failure.reason}"
    if target.length == 0 or target.length > settings.slot_bytes_max:
        return f"{target.length} bytes do not fit a slot of {settings.slot_bytes_max}"
    highest = max(control.floor, entry.security_counter)
    if target.security_counter <= highest and not _emergency(target, control):
        return f"security counter {target.security_counter} is not above {highest}: a downgrade"
    return missing(target.requires)


def _emergency(target: VerifiedTarget, control: BootControl) -> bool:
    return target.emergency is not None and control.floor <= target.emergency.floor_max


def hold_download(
    target: VerifiedTarget, settings: OtaSettings, vitals: Vitals, cohort: float, approved: bool
) -> str:
    """Return why the download must wait, "" when it may run now. cohort: of `cohort_point`."""
    if cohort >= target.cohort_percent:
        return f"not in the cohort of {target.cohort_percent:g} % yet"
    if (settings.consent or target.preconditions.consent) and not approved:
        return "waiting for approval (tbox ota install)"
    if vitals.bearer not in settings.bearers:
        return "no bearer that updates may use" if vitals.bearer == "none" else f"not over {vitals.bearer}"
    room = max([target.full.length, *(delta.length for delta in target.deltas)]) + DISK_RESERVE_BYTES
    if vitals.disk_free_bytes is None or vitals.disk_free_bytes < room:
        return f"needs {room} bytes of free disk"
    if target.critical:
        return ""
    for window in filter(None, (settings.window, target.window)):
        if window.whole_day:
            continue
        if vitals.local_minute is None:
            return "local time is unknown"
        if not in_window(window, vitals.local_minute):
            return f"waiting for {_clock(window.begin_minute)} to {_clock(window.end_minute)}"
    return ""


def hold_switch(target: VerifiedTarget, settings: OtaSettings, vitals: Vitals, approved: bool) -> str:
    """Return why the switch to the new image must wait, "" when it may happen now (R156)."""
    signed = target.preconditions
    if (settings.consent or signed.consent) and not approved:
        return "waiting for approval (tbox ota install)"
    if signed.parked and vitals.parked is not True:
        return "the vehicle is not parked" if vitals.parked is False else "unknown whether parked"
    soc_min = max(signed.soc_percent_min, settings.soc_percent_min) + settings.soc_recovery_percent
    if vitals.soc_percent is None or not vitals.soc_percent >= soc_min:
        return f"charge below {soc_min} %, recovery included"
    low_voltage_min = max(signed.low_voltage_mv_min, settings.low_voltage_mv_min)
    if vitals.low_voltage_mv is None or vitals.low_voltage_mv < low_voltage_min:
        return f"12 V supply below {low_voltage_min} mV"
    if vitals.alarm_level >= ALARM_LEVEL_BLOCKING:
        return f"an alarm of level {vitals.alarm_level} is raised"
    return ""


def _clock(minute: int) -> str:
    return f"{minute // 60:02d}:{minute % 60:02d}"


# --- requires ------------------------------------------------------------------------------------------

_REQUIREMENT = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)((?:(?:==|!=|>=|<=|>|<)[A-Za-z0-9._-]+,?)*)$")
_CLAUSE = re.compile(r"(==|!=|>=|<=|>|<)([A-Za-z0-9._-]+)")


def missing_requirement(requires: Iterable[str], installed: Mapping[str, str]) -> str:
    """Return the first signed requirement this device does not meet, "" when all are met.

    installed: name -> version; names compare without case and with "-" for "_" and ".". A requirement that
    cannot be read is not met.
    """
    for text in requires:
        match = _REQUIREMENT.match(text.replace(" ", ""))
        if match is None:
            return f"requires {text!r}, which cannot be read"
        version = installed.get(normal_name(match[1]))
        if version is None:
            return f"requires {text}, which is not installed"
        if not all(_holds(version, op, wanted) for op, wanted in _CLAUSE.findall(match[2])):
            return f"requires {text}, and {version} is installed"
    return ""


def normal_name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _holds(version: str, op: str, wanted: str) -> bool:
    if op in ("==", "!="):
        return (version == wanted) is (op == "==")
    have, want = _release(version), _release(wanted)
    if have is None or want is None:
        return False
    width = max(len(have), len(want))
    have, want = have + (0,) * (width - len(have)), want + (0,) * (width - len(want))
    return {">=": have >= want, "<=": have <= want, ">": have > want, "<": have < want}[op]


def _release(version: str) -> tuple[int, ...] | None:
    """Return the dotted numbers a version begins with; "2.1rc1" counts as 2.1, None without a number."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")[:8]) if match and len(match[0]) < 64 else None
