"""The shipped daemon on a bus that carries nonsense: it lives, and accounts for every frame of it."""

from __future__ import annotations

import base64
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import can
import numpy as np
import pytest

from tbox.bus.local import LocalBus
from tbox.record.codec import decode_payload
from tbox.sim.broker import free_port
from tbox.sim.layout import DATABASES
from tests.daemon import Daemon, tbox, wait_for

FRAMES = 6000
KNOWN = [(msg.can_id, msg.length) for messages in DATABASES.values() for msg in messages]
FD_LENGTHS = (0, 1, 7, 8, 12, 20, 24, 48, 64)


def nonsense(rng: np.random.Generator) -> can.Message:
    """Any id or a known one, any length, random, all ones or zeros; at times a remote or an error frame."""
    can_id, length = KNOWN[int(rng.integers(len(KNOWN)))]
    extended = bool(rng.random() < 0.1)
    if rng.random() < 0.2:
        can_id = int(rng.integers(0x2000_0000 if extended else 0x800))
    if rng.random() < 0.3:
        length = int(rng.choice(FD_LENGTHS))
    kind = rng.random()
    if kind < 0.05:
        return can.Message(arbitration_id=can_id, is_extended_id=extended, is_remote_frame=True, dlc=8)
    if kind < 0.1:
        return can.Message(arbitration_id=int(rng.integers(0x400)), is_error_frame=True, dlc=8, data=bytes(8))
    fill = rng.random()
    data = b"\xff" * length if fill < 0.1 else bytes(length) if fill < 0.2 else rng.bytes(length)
    return can.Message(
        arbitration_id=can_id, is_extended_id=extended, is_fd=length > 8, data=data, is_error_frame=False
    )


@pytest.mark.slow
def test_the_daemon_lives_through_nonsense_and_accounts_for_all_of_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(11)
    with ExitStack() as stack:
        daemon = Daemon(tmp_path, free_port())
        stack.callback(daemon.end)
        daemon.start()
        bus = stack.enter_context(LocalBus(str(tmp_path / "bus")))
        for _ in range(FRAMES):
            bus.send(nonsense(rng))
        wait_for("all frames", lambda: daemon.status()["ledger"]["bus"]["into"] == FRAMES)
        assert daemon.stop() == 0
    assert "Traceback" not in daemon.log and "died" not in daemon.log
    ledger = stop_ledger(tmp_path)
    assert ledger["bus"]["into"] == FRAMES
    assert {"error", "remote"} <= ledger["bus"]["dropped"].keys()
    assert ledger["decode"]["into"] == ledger["bus"]["out"] == ledger["blackbox"]["into"]
    assert {"unknown"} <= ledger["decode"]["dropped"].keys()
    assert "crc" in ledger["validity"]["dropped"]
    for name, account in ledger.items():
        spent = account["out"] + account["held"] + account["folded"] + sum(account["dropped"].values())
        assert account["into"] == spent, name
        assert account["held"] == 0 or account["unit"] == "records", name


def stop_ledger(directory: Path) -> dict[str, Any]:
    exported = tbox("spool", "export", str(directory / "state" / "spool")).stdout.splitlines()
    records = [decode_payload(base64.b64decode(json.loads(line)["payload"])) for line in exported]
    (stop,) = [r["body"] for r in records if r["kind"] == "event" and r["body"]["event"] == "stop"]
    ledger: dict[str, Any] = stop["ledger"]
    return ledger
