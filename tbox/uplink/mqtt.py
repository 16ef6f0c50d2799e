"""The uplink's shell: carries out what session.py decides over paho and real sockets. Decides nothing itself.

Threads: `uplink` owns the session and the port; one `uplink-net` per connection attempt does paho's network
loop and ends with its connection. Each connection gets a fresh paho client, so that paho never carries a
queue of its own from one link to the next; it is handed at most the window.
"""

from __future__ import annotations

import contextlib
import random
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import paho.mqtt.client as paho
import structlog
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from tbox.errors import TboxError
from tbox.model import NS_PER_S
from tbox.uplink.session import (
    ANNOUNCE_RESERVE,
    Action,
    Announce,
    Connect,
    Drop,
    Leave,
    Send,
    Session,
    SpoolPort,
    UplinkSettings,
)

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

TOPIC_ROOT = "tbox/1"
# The device subscribes to nothing, so nothing large may come in.
INCOMING_PACKET_BYTES_MAX = 64 * 1024
# Attempts that still hang (a name look-up cannot be cancelled) before new ones are held back.
LINKS_ALIVE_MAX = 4
BEAT_S_MAX = 1.0
LOOP_S_MAX = 1.0
# The boot-time clock runs on in suspend and the monotonic one does not.
SUSPEND_NS_MIN = NS_PER_S
JOIN_S = 1.0

# MQTT 5 reason codes (paho translates 3.1.1's into them) that no retry will mend.
DENIED_CODES = frozenset(
    {
        0x84,  # unsupported protocol version
        0x85,  # client identifier not valid
        0x86,  # bad user name or password
        0x87,  # not authorized
        0x8A,  # banned
        0x8C,  # bad authentication method
        0x90,  # topic name invalid
        0x95,  # packet too large
        0x99,  # payload format invalid
    }
)

log = structlog.get_logger()


class UplinkError(TboxError):
    """The uplink's configuration cannot work."""


def tls_context(ca: str = "", cert: str = "", key: str = "") -> ssl.SSLContext:
    """Return a client context that speaks TLS 1.3 only. Raises UplinkError naming the file."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.sslsocket_class = _TellingSocket
    try:
        if ca:
            context.load_verify_locations(ca)
        else:
            context.load_default_certs()
    except (OSError, ssl.SSLError) as error:
        raise UplinkError(f"cannot load the authority: {error}", where=ca, mend="set tls_ca") from error
    if bool(cert) != bool(key):
        raise UplinkError("a client certificate needs its key", where=cert or key, mend="set both or none")
    try:
        if cert:
            context.load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        raise UplinkError(
            f"cannot load the client certificate: {error}", where=cert, mend=f"check it and {key}"
        ) from error
    return context


@dataclass(frozen=True, slots=True)
class Credentials:
    """What the files of the configuration hold; never logged."""

    tls: ssl.SSLContext | None
    password: str = field(repr=False)


def credentials(settings: UplinkSettings) -> Credentials:
    """Read certificates and password. Raises UplinkError naming the file."""
    tls = tls_context(settings.tls_ca, settings.tls_cert, settings.tls_key) if settings.tls else None
    return Credentials(tls, _password(settings))


def _password(settings: UplinkSettings) -> str:
    """Read the password from its file. Raises UplinkError."""
    if not settings.password_file:
        return ""
    try:
        return Path(settings.password_file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UplinkError(f"cannot read the password: {error}", where=settings.password_file) from error


class _TellingSocket(ssl.SSLSocket):
    """Remembers why TLS failed: paho turns every read error into 'connection lost'.

    In TLS 1.3 a refused client certificate is only heard of at the first read after the handshake.
    """

    failure: ssl.SSLError | None = None

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        try:
            return super().recv(buflen, flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            self.failure = error
            raise

    def send(self, data: ReadableBuffer, flags: int = 0) -> int:
        try:
            return super().send(data, flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except OSError:
            with contextlib.suppress(OSError):
                self.recv(1)  # the alert that came before the reset
            raise


def tls_refusal(error: BaseException | None) -> str:
    """Return what to tell a person when TLS failed for good, "" when it may pass by itself."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the broker's certificate does not verify: {error.verify_message}; check tls_ca and the host"
    if isinstance(error, ssl.SSLError) and "ALERT" in (error.reason or "").upper():
        return f"the broker refused TLS: {error.reason}; check tls_cert and tls_key"
    return ""


# --- what a link tells the pump -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Connected:
    link: int
    receive_maximum: int | None


@dataclass(frozen=True, slots=True)
class _Published:
    link: int
    mid: int


@dataclass(frozen=True, slots=True)
class _Ended:
    """The link could not be made, or ended; denied: a person must act."""

    link: int
    why: str
    denied: bool


@dataclass(frozen=True, slots=True)
class _Call:
    """Something another thread asks for."""

    what: Literal["stop", "nudge", "look"]


_Report = _Connected | _Published | _Ended | _Call


class _Link:
    """One connection: a paho client and the thread that runs its sockets. Reports once how it ended."""

    def __init__(
        self,
        number: int,
        settings: UplinkSettings,
        vehicle: str,
        will: bytes,
        access: Credentials,
        report: Callable[[_Report], None],
    ) -> None:
        self.number = number
        self.tokens: dict[int, int] = {}  # mid -> token of the session
        self._settings = settings
        self._report = report
        self._why = ""
        self._denied = False
        self._socket: socket.socket | None = None
        self._aborted = False
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._client = self._make_client(vehicle, will, access)
        self.thread = threading.Thread(target=self._run, name="uplink-net", daemon=True)
        self.thread.start()

    def publish(self, token: int, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Hand one message to paho with QoS 1. Call `wake` after the last one."""
        info = self._client.publish(topic, payload, qos=1, retain=retain)
        self.tokens[info.mid] = token

    def leave(self) -> None:
        self._client.disconnect()
        self.wake()

    def abort(self) -> None:
        """Close at once. The socket is only shut down here: the network thread owns and closes it."""
        self._aborted = True
        sock = self._socket
        if sock is not None:
            with contextlib.suppress(OSError):
                # The plain method: SSLSocket's would drop the TLS layer under the other thread's feet.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        self.wake()

    def wake(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            self._wake_in.send(b"\0")

    def _make_client(self, vehicle: str, will: bytes, access: Credentials) -> paho.Client:
        settings = self._settings
        five = settings.mqtt == "5"
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=settings.client_id or f"tbox-{vehicle}",
            clean_session=None if five else True,
            protocol=paho.MQTTv5 if five else paho.MQTTv311,
            reconnect_on_failure=False,
        )
        # Limits first: paho refuses to change them once connected.
        places = settings.session.window + ANNOUNCE_RESERVE + 1
        client.max_inflight_messages_set(places)
        client.max_queued_messages_set(places)
        client.connect_timeout = settings.session.connect_deadline_ms / 1000
        client.will_set(f"{TOPIC_ROOT}/{vehicle}/state", will, qos=1, retain=True)
        if settings.username:
            client.username_pw_set(settings.username, access.password)
        if access.tls is not None:
            client.tls_set_context(access.tls)
        client.on_connect = self._on_connect
        client.on_publish = self._on_publish
        client.on_disconnect = self._on_disconnect
        client.on_socket_open = self._on_socket_open
        # Set, so that publish() never writes from the pump's thread: two writers would mix packets.
        client.on_socket_register_write = lambda *_: None
        return client

    def _run(self) -> None:
        try:
            self._connect()
            self._loop()
        except Exception as error:  # whatever a broker makes paho trip over ends this link, not the daemon
            refusal = tls_refusal(error)
            self._denied |= bool(refusal)
            self._why = self._why or refusal or f"{type(error).__name__}: {error}"
        finally:
            telling = getattr(self._socket, "failure", None)
            if refusal := tls_refusal(telling):
                self._why, self._denied = refusal, True
            self._close_sockets()
            self._report(_Ended(self.number, self._why or "the connection ended", self._denied))

    def _close_sockets(self) -> None:
        for sock in (self._wake_in, self._wake_out, self._socket):
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.close()

    def _connect(self) -> None:
        settings = self._settings
        properties = None
        if settings.mqtt == "5":
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.MaximumPacketSize = INCOMING_PACKET_BYTES_MAX
        self._client.connect(
            settings.host, settings.port_in_use, keepalive=settings.keepalive_s, properties=properties
        )

    def _loop(self) -> None:
        """Run paho's network work as its documentation describes for an event loop of one's own."""
        client = self._client
        wake_fd = self._wake_out.fileno()
        while (sock := client.socket()) is not None and not self._aborted:
            poll = select.poll()
            poll.register(wake_fd, select.POLLIN)
            fd = sock.fileno()
            poll.register(fd, select.POLLIN | (select.POLLOUT if client.want_write() else 0))
            for ready, events in poll.poll(LOOP_S_MAX * 1000):
                if ready == wake_fd:
                    with contextlib.suppress(BlockingIOError):
                        self._wake_out.recv(4096)
                    continue
                if events & ~select.POLLOUT:  # first: a refusal may lie there to be read
                    self._read(sock)
                if events & select.POLLOUT:
                    client.loop_write()
            client.loop_misc()

    def _read(self, sock: Any) -> None:
        """Read until neither the kernel nor the TLS layer (of which poll knows nothing) holds more."""
        while True:
            self._client.loop_read()
            if self._client.socket() is None or not (isinstance(sock, ssl.SSLSocket) and sock.pending()):
                return

    # --- paho's callbacks, all in the network thread --------------------------------------------------

    def _on_socket_open(self, _client: paho.Client, _data: object, sock: Any) -> None:
        self._socket = sock
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _on_connect(
        self, _client: paho.Client, _data: object, _flags: object, code: ReasonCode, props: Properties | None
    ) -> None:
        if code.is_failure:
            self._note(code, "the broker refused the connection")
            return
        self._report(_Connected(self.number, getattr(props, "ReceiveMaximum", None)))

    def _on_publish(
        self, _client: paho.Client, _data: object, mid: int, code: ReasonCode, _props: Properties
    ) -> None:
        if code.is_failure:
            # Not an acknowledgement: the record stays ours. End the link, so that all is offered again.
            self._note(code, "the broker refused a message")
            self._aborted = True
            return
        self._report(_Published(self.number, mid))

    def _on_disconnect(
        self, _client: paho.Client, _data: object, flags: Any, code: ReasonCode, _props: Properties | None
    ) -> None:
        if not self._why:
            by = "the broker closed the link" if flags.is_disconnect_packet_from_server else "the link ended"
            self._note(code, by)

    def _note(self, code: ReasonCode, what: str) -> None:
        self._why = f"{what}: {code}"
        self._denied = code.value in DENIED_CODES


# --- the pump -----------------------------------------------------------------------------------------


class MqttUplink:
    """Moves records from the port to the broker and acknowledgements back, until stopped.

    port: called from the thread `uplink` only. last_id: the id minted last, for the state message; called
    from that thread. beat advances with every turn of the pump, for the watchdog.
    """

    def __init__(
        self,
        settings: UplinkSettings,
        vehicle: str,
        port: SpoolPort,
        *,
        start: int,
        last_id: Callable[[], int | None],
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.beat = 0
        self._settings = settings
        self._vehicle = vehicle
        self._start_number = start
        self._last_id = last_id
        credentials(settings)  # a file that cannot be read is a mistake of the start-up
        self._session = Session(settings.session, port, jitter)
        self._reports: SimpleQueue[_Report] = SimpleQueue()
        self._link: _Link | None = None
        self._links: list[_Link] = []
        self._hurry = threading.Event()
        self._suspended_ns = _suspended_ns()
        self._logged = self._session.state
        self._status = self._session.status()
        self._thread = threading.Thread(target=self._pump, name="uplink", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, deadline_s: float) -> bool:
        """Send what the port still offers, publish `offline`, close. Returns whether all was acknowledged.

        After deadline_s what is in flight is left to the next start; returns at most about 3 s later.
        """
        if not self._thread.is_alive():
            return self._session.drained
        self._reports.put(_Call("stop"))
        self._thread.join(deadline_s)
        if self._thread.is_alive():
            self._hurry.set()
            self.wake()
            self._thread.join(self._settings.session.leave_deadline_ms / 1000 + JOIN_S)
        return not self._thread.is_alive() and self._session.drained

    def wake(self) -> None:
        """There is something new to send: look now instead of at the next poll."""
        self._reports.put(_Call("look"))

    def nudge(self) -> None:
        """The bearer changed: find out now whether the link still stands."""
        self._reports.put(_Call("nudge"))

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def status(self) -> dict[str, Any]:
        """The session's state, counters and last complaint, as of the last turn; from any thread."""
        return {**self._status, "broker": f"{self._settings.host}:{self._settings.port_in_use}"}

    # --- the thread `uplink` --------------------------------------------------------------------------

    def _pump(self) -> None:
        session = self._session
        session.start(time.monotonic_ns())
        while True:
            self.beat += 1
            now_ns = time.monotonic_ns()
            self._look_at_suspend(now_ns)
            if self._hurry.is_set():
                session.hurry(now_ns)
            actions, wake_ns = session.step(now_ns)
            self._carry_out(actions)
            self._publish_status()
            if wake_ns is None:
                break
            self._take_reports(min(BEAT_S_MAX, max(0.0, (wake_ns - time.monotonic_ns()) / NS_PER_S)))
        for link in self._links:
            link.thread.join(JOIN_S)

    def _take_reports(self, timeout_s: float) -> None:
        """Wait for a report and take all there are; PUBACKs in a row are told to the session at once."""
        acked: list[_Published] = []
        try:
            report = self._reports.get(timeout=timeout_s) if timeout_s else self._reports.get_nowait()
            while True:
                if isinstance(report, _Published):
                    acked.append(report)
                else:
                    self._tell_acks(acked)
                    self._tell(report)
                report = self._reports.get_nowait()
        except Empty:
            self._tell_acks(acked)

    def _tell_acks(self, acked: list[_Published]) -> None:
        link = self._link
        if acked and link is not None:
            tokens = [
                link.tokens.pop(report.mid)
                for report in acked
                if report.link == link.number and report.mid in link.tokens
            ]
            self._session.acked(link.number, tokens, time.monotonic_ns())
        acked.clear()

    def _tell(self, report: _Connected | _Ended | _Call) -> None:
        now_ns = time.monotonic_ns()
        match report:
            case _Connected(link, receive_maximum):
                self._session.connected(link, now_ns, receive_maximum)
            case _Ended(link, why, denied):
                self._links = [one for one in self._links if one.number != link]
                if denied:
                    self._session.denied(link, now_ns, why)
                else:
                    self._session.lost(link, now_ns, why)
            case _Call("look"):
                self._session.look()
            case _Call("stop"):
                self._session.stop(now_ns)
            case _Call("nudge"):
                self._session.nudge(now_ns)

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Connect(number):
                    self._open(number)
                case Drop(number):
                    self._close(number, politely=False)
                case Leave(number):
                    self._close(number, politely=True)
                case Send(_, token, record):
                    topic = f"{TOPIC_ROOT}/{self._vehicle}/{record.kind}"
                    self._publish(token, topic, record.payload)
                case Announce(_, token, state):
                    topic = f"{TOPIC_ROOT}/{self._vehicle}/state"
                    self._publish(token, topic, self._state_message(state, self._last_id()), retain=True)
        if actions and self._link is not None:
            self._link.wake()

    def _publish(self, token: int, topic: str, payload: bytes, *, retain: bool = False) -> None:
        assert self._link is not None, "the session sends on a link it did not open"
        self._link.publish(token, topic, payload, retain=retain)

    def _open(self, number: int) -> None:
        if len(self._links) >= LINKS_ALIVE_MAX:
            self._reports.put(_Ended(number, "earlier connection attempts still hang (name look-up?)", False))
            return
        try:
            access = credentials(self._settings)  # anew for each link: certificates are renewed
        except UplinkError as error:
            self._reports.put(_Ended(number, str(error), True))
            return
        will = self._state_message("lost", None)
        self._link = _Link(number, self._settings, self._vehicle, will, access, self._reports.put)
        self._links.append(self._link)

    def _close(self, number: int, *, politely: bool) -> None:
        for link in self._links:
            if link.number == number:
                if politely:
                    link.leave()
                else:
                    link.abort()
        self._link = None

    def _state_message(self, state: str, last_id: int | None) -> bytes:
        return msgspec.json.encode({"state": state, "start": self._start_number, "last_id": last_id})

    def _look_at_suspend(self, now_ns: int) -> None:
        suspended_ns = _suspended_ns()
        if suspended_ns - self._suspended_ns >= SUSPEND_NS_MIN:
            log.info("uplink_resumed", suspended_s=(suspended_ns - self._suspended_ns) // NS_PER_S)
            self._session.nudge(now_ns)
        self._suspended_ns = suspended_ns

    def _publish_status(self) -> None:
        session = self._session
        self._status = session.status()
        if session.state is not self._logged:
            self._logged = session.state
            log.info("uplink_state", state=str(session.state), why=session.why)


def _suspended_ns() -> int:
    """How long the machine has slept since it booted, plus a constant."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.monotonic_ns()
