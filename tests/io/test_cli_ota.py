"""`tbox ota` and `tbox boot` as people type them, against a real update thread and control socket."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tbox.control import ControlServer
from tbox.ota import boot
from tbox.ota.model import Offer
from tests.crash.ota_world import PARKED, manifest_of
from tests.io.test_ota_device import DELTA, DELTA_FILE, TARGET, Ports, Real, started, until


class Person:
    """Types `tbox` commands at an agent."""

    def __init__(self, socket: str) -> None:
        self._socket = socket

    def types(self, *words: str, agent: bool = True) -> tuple[int, str, str]:
        socket = ["--socket", self._socket] if agent else []
        done = subprocess.run(
            [sys.executable, "-m", "tbox", *words, *socket],
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr


@pytest.fixture
def real(tmp_path: Path) -> Real:
    return Real(tmp_path)


@pytest.fixture
def on_trial(real: Real, tmp_path: Path) -> Iterator[Person]:
    real.install(DELTA_FILE, DELTA)
    real.ctl.commit(boot.count_try(boot.activate(real.ctl.read(), "b"), "b"))
    thread = started(real, Ports(real), "b")
    socket = str(tmp_path / "control.sock")
    server = ControlServer(socket, {"ota": thread.handle})
    server.start()
    until(lambda: thread.status()["state"] == "trial")
    yield Person(socket)
    server.close()
    thread.stop(60)


@pytest.mark.slow
def test_a_person_sees_the_trial_and_confirms_it(on_trial: Person, real: Real) -> None:
    code, out, _ = on_trial.types("ota", "status")
    assert code == 0 and out.startswith("trial · slot b runs 2.0")
    code, out, _ = on_trial.types("ota", "status", "--json")
    assert json.loads(out)["slots"]["b"]["state"] == "trial"
    code, out, _ = on_trial.types("ota", "confirm")
    assert code == 0 and out.startswith("good")
    assert real.ctl.read().floor == 2
    code, _, err = on_trial.types("ota", "rollback")
    assert code == 1 and "no image is on trial" in err and len(err.splitlines()) == 1


def test_a_person_rolls_a_trial_back(on_trial: Person, real: Real) -> None:
    code, out, _ = on_trial.types("ota", "rollback")
    assert code == 0 and out.startswith("leaving")
    assert real.ctl.read().b.state is boot.SlotState.UNBOOTABLE


class Asking(Ports):
    """Offers an image that a person must approve; none until `offers`."""

    offers = True

    def check(self) -> Offer:
        asks = msgspec.structs.replace(TARGET.preconditions, consent=True)
        target = msgspec.structs.replace(TARGET, preconditions=asks, notes="five minutes, no data is lost")
        return Offer(target=target if self.offers else None, manifest=manifest_of(target))


@pytest.fixture
def idle(real: Real, tmp_path: Path) -> Iterator[tuple[Person, Asking]]:
    ports = Asking(real)
    ports.offers = False
    thread = started(real, ports)
    socket = str(tmp_path / "control.sock")
    server = ControlServer(socket, {"ota": thread.handle})
    server.start()
    until(lambda: thread.status()["state"] == "idle" and thread.status()["reason"] == "")
    yield Person(socket), ports
    server.close()
    thread.stop(60)


@pytest.mark.slow
def test_a_person_is_told_what_is_offered_approves_it_and_sees_it_to_the_restart(
    idle: tuple[Person, Asking], real: Real
) -> None:
    person, ports = idle
    code, out, err = person.types("ota", "check")
    assert (code, out) == (1, "") and "no update is offered: the engine is idle" in err
    ports.offers = True
    ports.now_vitals = msgspec.structs.replace(PARKED, parked=False)
    code, out, _ = person.types("ota", "check")
    assert code == 0 and out.startswith("waiting · slot a runs 1.0\nwhy: waiting for approval")
    assert "offered: 2.0 five minutes, no data is lost" in out
    code, out, _ = person.types("ota", "install")
    assert code == 0 and out.startswith("approved: 2.0 five minutes")
    assert "ready · slot a runs 1.0\nwhy: the vehicle is not parked" in out
    assert "slot b holds 2.0, sealed" in out
    ports.now_vitals = PARKED
    until(lambda: bool(ports.restarts))
    assert real.ctl.read().b.state is boot.SlotState.TRIAL


@pytest.mark.slow
def test_install_looks_for_an_update_by_itself(idle: tuple[Person, Asking]) -> None:
    person, ports = idle
    code, _, err = person.types("ota", "install")
    assert code == 1 and "no update is offered" in err and len(err.strip().splitlines()) == 1
    ports.offers = True
    code, out, _ = person.types("ota", "install")
    assert code == 0 and out.startswith("approved: 2.0") and "pending-reboot" in out
    assert ports.restarts == [[]]


def test_an_agent_that_leaves_to_start_the_new_image_is_no_error(tmp_path: Path) -> None:
    asked: list[object] = []

    def handle(message: Mapping[str, Any]) -> dict[str, Any]:
        asked.append(message["do"])
        return {"state": "installing", "offered": {"version": "2.0", "notes": ""}}

    socket = str(tmp_path / "control.sock")
    server = ControlServer(socket, {"ota": handle})
    server.start()
    with ThreadPoolExecutor() as pool:
        person = pool.submit(Person(socket).types, "ota", "install")
        until(lambda: len(asked) > 3)
        server.close()
        code, out, err = person.result()
    assert code == 0 and "restarting\nwhy: the new image runs next" in out, err
    assert asked[:3] == ["status", "install", "status"]


def test_boot_control_is_read_without_an_agent(real: Real) -> None:
    person = Person("/none")
    for words in (
        ("ota", "status", "--dir", str(real.fw)),
        ("boot", "--status", "--dir", str(real.fw)),
    ):
        code, out, _ = person.types(*words, agent=False)
        assert code == 0 and json.loads(out)["slots"]["a"]["state"] == "good"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("ota", "status"), 1, "no agent answers"),
        (("boot", "--dir", "{none}"), 2, "no such directory"),
        (("boot", "--dir", "{empty}", "--status"), 1, "no boot control here"),
        (("boot", "--dir", "{empty}"), 2, "no trusted root"),
    ],
)
def test_what_does_not_fit_is_one_line(words: tuple[str, ...], code: int, said: str, tmp_path: Path) -> None:
    places = {"none": str(tmp_path / "none"), "empty": str(tmp_path)}
    found, out, err = Person(str(tmp_path / "none.sock")).types(
        *(word.format(**places) for word in words), agent=words[0] == "ota"
    )
    assert (found, out) == (code, "") and said in err and len(err.splitlines()) == 1
