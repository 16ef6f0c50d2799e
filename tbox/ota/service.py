"""The thread `ota`: turns the engine's crank, takes people's commands, answers for status. No decisions."""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib.metadata
import platform
import queue
import sysconfig
import threading
from collections.abc import Callable, Mapping
from typing import Any

import structlog

from tbox.errors import Refused, TboxError
from tbox.model import NS_PER_S, Draft, Now
from tbox.ota import engine as e
from tbox.ota.device import OtaDevice, broken
from tbox.ota.policy import normal_name

log = structlog.get_logger()

TURN_S_MAX = 1.0
COMMANDS_MAX = 8
ANSWER_S = 2.0  # how long a command waits for its answer; a download under way takes longer

COMMANDS: Mapping[str, e.Input] = {
    "check": e.Look(),
    "install": e.Approve(),
    "confirm": e.ConfirmByHand(),
    "rollback": e.RollBackByHand(),
}


def installed_versions() -> dict[str, str]:
    """Return what this device carries, for the signed `requires`: Python, its platform and every package."""
    found = {"python": platform.python_version(), "platform": sysconfig.get_platform()}
    for package in importlib.metadata.distributions():
        name = package.metadata["Name"]
        if name:
            found.setdefault(normal_name(name), package.version)
    return found


_Command = tuple[e.Input, "concurrent.futures.Future[None]"]


class OtaThread:
    """Owns one OtaDevice. Everything but `command`, `status`, `handle` and `stop` runs in its thread."""

    def __init__(self, device: OtaDevice, now: Callable[[], Now], emit: Callable[[Draft], None]) -> None:
        self._device, self._now, self._emit = device, now, emit
        self._commands: queue.Queue[tuple[e.Input, concurrent.futures.Future[None]]] = queue.Queue(
            COMMANDS_MAX
        )
        self._stopped = threading.Event()
        self._broken = ""
        self._thread = threading.Thread(target=self._run, name="ota", daemon=True)

    @property
    def beat(self) -> int:
        """Advances with every turn and every block written, for the watchdog."""
        return self._device.beat

    def start(self) -> None:
        self._thread.start()

    def stop(self, deadline_s: float) -> None:
        self._stopped.set()
        self._thread.join(deadline_s)

    @property
    def stopping(self) -> bool:
        """Whether work under way must end; `Ports.fetch` asks this between blocks."""
        return self._stopped.is_set()

    def status(self) -> dict[str, Any]:
        """Return plain values for people; may be called from any thread, in the middle of the work too."""
        if self._broken:
            return {"state": "broken", "reason": self._broken}
        progress = self._device.progress
        shown = {"done_bytes": progress.done_bytes, "total_bytes": progress.total_bytes}
        return self._device.engine.status() | {"progress": {"what": progress.what, **shown}}

    def handle(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Answer a request of the control socket, {"cmd": "ota", "do": "status" | a command}."""
        what = message.get("do", "status")
        if what == "status":
            return self.status()
        if what not in COMMANDS:
            raise Refused(f"unknown: {what}", mend=f"there are: status, {', '.join(COMMANDS)}")
        return {"done": self.command(COMMANDS[what])} | self.status()

    def command(self, command: e.Input) -> bool:
        """Hand a person's command over; True when it was taken, False when it waits for work under way.

        Raises Refused when it does not fit.
        """
        answer: concurrent.futures.Future[None] = concurrent.futures.Future()
        try:
            self._commands.put_nowait((command, answer))
        except queue.Full:
            raise Refused(
                "too many commands wait", mend="try again when the work under way is done"
            ) from None
        try:
            answer.result(ANSWER_S)
        except TimeoutError:
            return False
        return True

    def _run(self) -> None:
        """Turn until stopped. Without boot control the device drives on, without updates, and says so."""
        try:
            while not self._stopped.is_set() and not self._device.restarting:
                now = self._now()
                wake_ns = self._device.turn(now)
                self._wait(min(TURN_S_MAX, max(0.0, (wake_ns - now.mono_ns) / NS_PER_S)))
        except (OSError, TboxError) as error:
            log.error("ota_broken", error=str(error))
            self._emit(broken(error, self._now()))
            self._broken = str(error)
            self._idle()

    def _wait(self, seconds: float) -> None:
        """Wait for the next turn or a command; carry the command out in a turn of its own."""
        with contextlib.suppress(queue.Empty):
            command, answer = self._commands.get(timeout=seconds)
            try:
                self._device.turn(self._now(), [command])
            except Refused as refused:
                answer.set_exception(refused)
                return
            except OSError as error:
                answer.set_exception(Refused(f"boot control cannot be written: {error}"))
                raise
            answer.set_result(None)

    def _idle(self) -> None:
        """Keep the watchdog content; the rest of the agent is not to suffer."""
        while not self._stopped.wait(TURN_S_MAX):
            self._device.beat += 1
