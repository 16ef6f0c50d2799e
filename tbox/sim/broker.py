"""Brokers for the bench: mosquitto where it is on PATH, else amqtt in a thread, and a model in virtual time.

All listen on 127.0.0.1 only. None of them is ever used by a device.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from tbox.errors import TboxError

HOST = "127.0.0.1"
START_DEADLINE_S = 15.0
STOP_DEADLINE_S = 10.0
PORT_ATTEMPTS_MAX = 5
POLL_S = 0.02


class BrokerError(TboxError):
    """No broker could be started."""


@dataclass(frozen=True, slots=True)
class BrokerTls:
    """PEM files. ca: whom clients' certificates must come from; with it a client certificate is required."""

    cert: str
    key: str
    ca: str = ""


Mqtt = Literal["5", "3.1.1"]


class Broker(Protocol):
    """A broker one can point a client at."""

    name: str
    port: int
    mqtt: Mqtt  # the newest protocol it speaks

    def start(self) -> Self: ...
    def stop(self) -> None: ...


def free_port() -> int:
    """Return a TCP port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        port: int = sock.getsockname()[1]
        return port


def start_broker(directory: str, *, tls: BrokerTls | None = None, embedded: bool = False) -> Broker:
    """Start mosquitto, or the embedded broker where there is none (or `embedded`). Raises BrokerError."""
    if embedded or find_mosquitto() is None:
        if tls is not None:
            raise BrokerError("the embedded broker has no TLS here", mend="install mosquitto")
        return EmbeddedBroker().start()
    return MosquittoBroker(directory, tls=tls).start()


def find_mosquitto() -> str | None:
    """Return mosquitto's path. Debian puts it in /usr/sbin, which is not on everyone's PATH."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")


class _Managed:
    """`with broker:` stops it at the end."""

    def start(self) -> Self:
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class MosquittoBroker(_Managed):
    """A real mosquitto with its files in `directory`; what subscribers are owed survives a stop and start.

    users: name -> password; empty lets anyone in. acl: lines of an ACL file; None allows everything.
    """

    name = "mosquitto"
    mqtt: Mqtt = "5"

    def __init__(
        self,
        directory: str,
        *,
        port: int = 0,
        tls: BrokerTls | None = None,
        users: Mapping[str, str] | None = None,
        acl: str | None = None,
    ) -> None:
        self.port = port
        self._fixed_port = port != 0
        self._directory = Path(directory)
        self._tls = tls
        self._users = dict(users or {})
        self._acl = acl
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Start and wait until it listens. Raises BrokerError with the broker's own last words."""
        binary = find_mosquitto()
        if binary is None:
            raise BrokerError("mosquitto is not installed", mend="apt-get install mosquitto")
        self._directory.mkdir(parents=True, exist_ok=True)
        for _ in range(PORT_ATTEMPTS_MAX):
            if not self._fixed_port:
                self.port = free_port()
            if self._start_once(binary):
                self._fixed_port = True  # a restart keeps the port: clients know it
                return self
        raise BrokerError(f"mosquitto does not start: {self._last_words()}", where=str(self._log))

    def stop(self) -> None:
        """End it in order (it saves what it holds)."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a crash would."""
        self._end(signal.SIGKILL)

    def freeze(self) -> None:
        """Keep every connection open and do nothing more: connected, but stalled."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    @property
    def _log(self) -> Path:
        return self._directory / "mosquitto.log"

    def _start_once(self, binary: str) -> bool:
        config = self._directory / "mosquitto.conf"
        config.write_text(self._config(), encoding="utf-8")
        with self._log.open("ab") as log:
            said = log.tell()
            self._process = subprocess.Popen(
                [binary, "-c", str(config)], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        deadline = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < deadline and self._process.poll() is None:
            # It listens before it has read its certificates, so a connection alone proves nothing.
            if b" running" in self._log.read_bytes()[said:] and self._listens():
                return True
            time.sleep(POLL_S)
        self._end(signal.SIGKILL)
        return False

    def _listens(self) -> bool:
        try:
            with socket.create_connection((HOST, self.port), 1.0):
                return True
        except OSError:
            return False

    def _config(self) -> str:
        """No limit on what is kept for a subscriber: by default mosquitto drops beyond 1,000 messages."""
        here = self._directory
        lines = [
            f"listener {self.port} {HOST}",
            "persistence true",
            f"persistence_location {here}/",
            "max_queued_messages 0",
            "max_inflight_messages 100",
            "log_type error",
            "log_type warning",
            "log_type notice",
            "log_type information",
            "log_type subscribe",
        ]
        if os.geteuid() == 0:
            lines.append("user root")  # else it gives up root, and with it the way into `directory`
        if self._tls is not None:
            lines += ["tls_version tlsv1.3", f"certfile {self._tls.cert}", f"keyfile {self._tls.key}"]
            if self._tls.ca:
                lines += [f"cafile {self._tls.ca}", "require_certificate true"]
        if self._users:
            lines += ["allow_anonymous false", f"password_file {self._password_file()}"]
        else:
            lines.append("allow_anonymous true")
        if self._acl is not None:
            (here / "acl").write_text(self._acl, encoding="utf-8")
            (here / "acl").chmod(0o600)
            lines.append(f"acl_file {here / 'acl'}")
        return "\n".join([*lines, ""])

    def _password_file(self) -> Path:
        path = self._directory / "passwords"
        path.write_text("".join(f"{name}:{word}\n" for name, word in self._users.items()), encoding="utf-8")
        path.chmod(0o600)
        tool = shutil.which("mosquitto_passwd") or "/usr/bin/mosquitto_passwd"
        subprocess.run([tool, "-U", str(path)], check=True, stdin=subprocess.DEVNULL)
        return path

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGCONT)
        process.send_signal(how)
        try:
            process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            return " / ".join(self._log.read_text(errors="replace").splitlines()[-3:])
        return "it said nothing"


class EmbeddedBroker(_Managed):
    """amqtt in a thread of this process: MQTT 3.1.1, for machines without mosquitto."""

    name = "amqtt"
    mqtt: Mqtt = "3.1.1"

    def __init__(self) -> None:
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._broker: Any = None
        self._thread: threading.Thread | None = None

    def start(self) -> Self:
        """Start and wait until it listens. Raises BrokerError."""
        try:
            from amqtt.broker import Broker as AmqttBroker
        except ImportError as error:
            raise BrokerError(
                "there is no MQTT broker", mend="apt-get install mosquitto, or pip install 'tbox[demo]'"
            ) from error
        self.port = free_port()
        config = {
            "listeners": {"default": {"type": "tcp", "bind": f"{HOST}:{self.port}"}},
            "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        }
        self._thread = threading.Thread(target=self._loop.run_forever, name="amqtt", daemon=True)
        self._thread.start()
        try:
            self._broker = self._call(self._make(AmqttBroker, config))
            self._call(self._broker.start())
        except Exception as error:
            self.stop()
            raise BrokerError(f"the embedded broker does not start: {error}") from error
        return self

    def stop(self) -> None:
        if self._thread is None:
            return
        if self._broker is not None:
            with contextlib.suppress(Exception):
                self._call(self._broker.shutdown())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STOP_DEADLINE_S)
        self._thread = None

    @staticmethod
    async def _make(broker: Callable[..., Any], config: dict[str, Any]) -> Any:
        return broker(config)

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(START_DEADLINE_S)


# --- in virtual time ----------------------------------------------------------------------------------

Deliver = Callable[[str, bytes, int], None]


@dataclass(slots=True)
class VirtualBroker:
    """What a broker does to messages, without sockets or time of its own: retain, deliver, keep Wills.

    Subscribers are called with (topic, payload, mono_ns) in order of publishing.
    """

    retained: dict[str, bytes] = field(default_factory=dict)
    published: int = 0
    _subscribers: list[Deliver] = field(default_factory=list)
    _wills: dict[str, tuple[str, bytes]] = field(default_factory=dict)

    def subscribe(self, deliver: Deliver, mono_ns: int = 0) -> None:
        self._subscribers.append(deliver)
        for topic, payload in self.retained.items():
            deliver(topic, payload, mono_ns)

    def connect(self, client_id: str, will_topic: str, will: bytes) -> None:
        self._wills[client_id] = (will_topic, will)

    def publish(self, topic: str, payload: bytes, mono_ns: int, *, retain: bool = False) -> None:
        self.published += 1
        if retain:
            self.retained[topic] = payload
        for deliver in self._subscribers:
            deliver(topic, payload, mono_ns)

    def goodbye(self, client_id: str) -> None:
        """The client left in order: its Will is void."""
        self._wills.pop(client_id, None)

    def vanished(self, client_id: str, mono_ns: int) -> None:
        """Nothing was heard of the client for too long: its Will is published, retained."""
        will = self._wills.pop(client_id, None)
        if will is not None:
            self.publish(will[0], will[1], mono_ns, retain=True)
