"""Bad networks: a TCP proxy that cuts silently, and the same link as a model in virtual time. Test gear only.

A cut is silent: nothing is closed, nothing is read or written, as in a tunnel. A closed socket is the easy
case (`reset`).
"""

from __future__ import annotations

import contextlib
import heapq
import json
import selectors
import socket
import struct
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from tbox.model import NS_PER_MS, NS_PER_S
from tbox.sim.broker import VirtualBroker
from tbox.uplink.session import (
    Action,
    Announce,
    Connect,
    Drop,
    Leave,
    Send,
    Session,
    SessionSettings,
    SpoolPort,
)

HOST = "127.0.0.1"
CHUNK_BYTES = 16 * 1024
QUEUE_BYTES_MAX = 256 * 1024  # held per direction before reading stops, as a socket buffer would
RETRANSMIT_S = 0.2  # what a lost segment costs: Linux's minimal retransmission time-out
TCP_ESTABLISHED = 1  # tcpi_state, linux/tcp.h


# --- the proxy ----------------------------------------------------------------------------------------


class _Pipe:
    """One direction of a connection: bytes read from `source`, written to `target` when due."""

    def __init__(self, source: socket.socket, target: socket.socket, *, upward: bool) -> None:
        self.source, self.target, self.upward = source, target, upward
        self.chunks: deque[tuple[float, bytes]] = deque()
        self.queued_bytes = 0
        self.ended = False  # the source said it is done


class LinkCutter:
    """A TCP proxy in front of a broker. `cut` makes both directions (or one) fall silent, `restore` ends it.

    latency_s is one way; loss is the share of chunks that arrive one retransmission later (TCP loses
    nothing). random: for the loss, floats in [0, 1).
    """

    def __init__(
        self,
        port: int,
        *,
        latency_s: float = 0.0,
        loss: float = 0.0,
        random: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self.target_port = port
        self.latency_s = latency_s
        self.loss = loss
        self._random = random
        self._up_cut = self._down_cut = False
        self._lock = threading.Lock()
        self._pipes: list[_Pipe] = []
        self._closing = False
        self._listener = socket.create_server((HOST, 0))
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_out.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="link-cutter", daemon=True)
        self._thread.start()

    def cut(self, *, up: bool = True, down: bool = True) -> None:
        """Fall silent. up: from the device to the broker; down: the way back, where PUBACKs travel."""
        with self._lock:
            self._up_cut, self._down_cut = up, down
        self._wake()

    def restore(self) -> None:
        """End the silence: what TCP still holds flows on."""
        self.cut(up=False, down=False)

    def reset(self) -> None:
        """Close every connection with a reset: the easy kind of loss."""
        with self._lock:
            pipes, self._pipes = self._pipes, []
        for pipe in pipes:
            linger = struct.pack("ii", 1, 0)
            with contextlib.suppress(OSError):
                pipe.source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            pipe.source.close()
        self._wake()

    def close(self) -> None:
        self._closing = True
        self._wake()
        self._thread.join(5.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._wake_in.send(b"\0")

    def _run(self) -> None:
        while not self._closing:
            with self._lock:
                self._turn()
        with self._lock:
            for pipe in self._pipes:
                pipe.source.close()
        for sock in (self._listener, self._wake_in, self._wake_out):
            sock.close()

    def _turn(self) -> None:
        """Wait for what may move now, without holding the lock, then move it."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_out, selectors.EVENT_READ, "wake")
            if not (self._up_cut or self._down_cut):
                selector.register(self._listener, selectors.EVENT_READ, "accept")
            wait_s = self._register(selector)
            self._lock.release()
            try:
                ready = selector.select(wait_s)
            finally:
                self._lock.acquire()
            live = {id(pipe) for pipe in self._pipes}
            for key, events in ready:
                if key.data == "wake":
                    with contextlib.suppress(BlockingIOError):
                        self._wake_out.recv(4096)
                elif key.data == "accept":
                    if not (self._up_cut or self._down_cut):
                        self._accept()
                else:
                    self._move(key.data, events, live)

    def _register(self, selector: selectors.BaseSelector) -> float:
        """Ask for the events each socket may have; return how long to wait for the next due chunk."""
        now = time.monotonic()
        wait_s = 1.0
        wanted: dict[socket.socket, tuple[int, list[_Pipe]]] = {}
        for pipe in self._pipes:
            if self._is_cut(pipe):
                continue
            if pipe.queued_bytes < QUEUE_BYTES_MAX and not pipe.ended:
                self._want(wanted, pipe.source, selectors.EVENT_READ, pipe)
            if pipe.chunks:
                wait_s = min(wait_s, max(0.0, pipe.chunks[0][0] - now))
                if pipe.chunks[0][0] <= now:
                    self._want(wanted, pipe.target, selectors.EVENT_WRITE, pipe)
        for sock, (events, pipes) in wanted.items():
            selector.register(sock, events, pipes)
        return wait_s

    def _is_cut(self, pipe: _Pipe) -> bool:
        return self._up_cut if pipe.upward else self._down_cut

    @staticmethod
    def _want(
        wanted: dict[socket.socket, tuple[int, list[_Pipe]]], sock: socket.socket, event: int, pipe: _Pipe
    ) -> None:
        events, pipes = wanted.setdefault(sock, (0, []))
        pipes.append(pipe)
        wanted[sock] = (events | event, pipes)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            device, _ = self._listener.accept()
            if device.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != TCP_ESTABLISHED:
                device.close()  # tried in the silence and given up: in a tunnel it would never have come
                return
            try:
                broker = socket.create_connection((HOST, self.target_port), 2.0)
            except OSError:
                device.close()
                return
            for sock in (device, broker):
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._pipes += [_Pipe(device, broker, upward=True), _Pipe(broker, device, upward=False)]

    def _move(self, pipes: Any, events: int, live: set[int]) -> None:
        for pipe in pipes:
            if id(pipe) not in live or self._is_cut(pipe):  # it was cut while we waited
                continue
            try:
                if events & selectors.EVENT_READ:
                    self._read(pipe)
                if events & selectors.EVENT_WRITE:
                    self._write(pipe)
            except BlockingIOError:
                continue
            except OSError:
                self._end(pipe)
            if pipe.ended and not pipe.chunks:
                self._end(pipe)

    def _read(self, pipe: _Pipe) -> None:
        with contextlib.suppress(BlockingIOError):
            data = pipe.source.recv(CHUNK_BYTES)
            if not data:
                pipe.ended = True
                return
            late_s = RETRANSMIT_S if self._random() < self.loss else 0.0
            due = time.monotonic() + self.latency_s + late_s
            if pipe.chunks:
                due = max(due, pipe.chunks[-1][0])  # a byte stream keeps its order
            pipe.chunks.append((due, data))
            pipe.queued_bytes += len(data)

    def _write(self, pipe: _Pipe) -> None:
        if not pipe.chunks or pipe.chunks[0][0] > time.monotonic():
            return
        due, data = pipe.chunks[0]
        sent = pipe.target.send(data)
        pipe.queued_bytes -= sent
        if sent == len(data):
            pipe.chunks.popleft()
        else:
            pipe.chunks[0] = (due, data[sent:])

    def _end(self, pipe: _Pipe) -> None:
        """Close both sides of the connection a pipe belongs to."""
        self._pipes = [p for p in self._pipes if p.source not in (pipe.source, pipe.target)]
        pipe.source.close()
        pipe.target.close()


# --- in virtual time ----------------------------------------------------------------------------------


class Coverage:
    """When there is a radio link: always, but for the gaps [begin_ns, end_ns)."""

    def __init__(self, gaps: Sequence[tuple[int, int]] = ()) -> None:
        self._gaps: list[tuple[int, int]] = []
        for begin, end in sorted(gaps):
            if self._gaps and begin <= self._gaps[-1][1]:
                begin, end = self._gaps[-1][0], max(end, self._gaps.pop()[1])
            self._gaps.append((begin, end))
        self._begins = [begin for begin, _ in self._gaps]

    def up_from(self, t_ns: int) -> int:
        """Return t_ns when covered, else the instant the gap ends."""
        i = bisect_right(self._begins, t_ns)
        return max(t_ns, self._gaps[i - 1][1]) if i else t_ns


@dataclass(frozen=True, slots=True)
class LinkModel:
    """A link's nature. loss: share of segments that come one retransmission later."""

    latency_ms: int = 40
    jitter_ms: int = 10
    loss: float = 0.0
    bytes_per_s: int = 125_000
    keepalive_s: int = 30


class VirtualUplink:
    """The uplink's session over a modelled link to a VirtualBroker: one thread, no sockets, virtual time.

    Call `step(mono_ns)` with rising times, at the latest when it asked for. Bytes keep their order; in a
    gap they wait, as TCP's do, and are lost for good when the session gives the link up.
    """

    def __init__(
        self,
        settings: SessionSettings,
        port: SpoolPort,
        broker: VirtualBroker,
        *,
        vehicle: str,
        start: int,
        last_id: Callable[[], int | None],
        random: Callable[[], float],
        model: LinkModel | None = None,
        coverage: Coverage | None = None,
    ) -> None:
        self.session = Session(settings, port, random)
        self._broker = broker
        self._topic = f"tbox/1/{vehicle}"
        self._client_id = f"tbox-{vehicle}"
        self._start = start
        self._last_id = last_id
        self._random = random
        self._model = model or LinkModel()
        self._coverage = coverage or Coverage()
        self._events: list[tuple[int, int, int, Callable[[int], None]]] = []  # due, order, link, what
        self._order = 0
        self._free_ns = {True: 0, False: 0}  # when each direction has sent what it was given
        self._last_due_ns = {True: 0, False: 0}
        self._known_to_broker = False
        self._will_due_ns: int | None = None

    def start(self, mono_ns: int) -> None:
        self.session.start(mono_ns)

    def stop(self, mono_ns: int) -> None:
        self.session.stop(mono_ns)

    def step(self, mono_ns: int) -> int | None:
        """Let everything happen that is due; return when to be called next, None when stopped and quiet."""
        while True:
            self._run_due(mono_ns)
            self.session.look()  # nobody tells of new records here
            actions, wake_ns = self.session.step(mono_ns)
            for action in actions:
                self._carry_out(action, mono_ns)
            if not (self._events and self._events[0][0] <= mono_ns):
                break
        if self._will_due_ns is not None and mono_ns >= self._will_due_ns:
            self._will_due_ns = None
            self._broker.vanished(self._client_id, mono_ns)
        due = [t for t in (wake_ns, self._will_due_ns) if t is not None] + [e[0] for e in self._events[:1]]
        return min(due, default=None)

    def _run_due(self, mono_ns: int) -> None:
        while self._events and self._events[0][0] <= mono_ns:
            due, _, link, what = heapq.heappop(self._events)
            if link == self.session.link:
                what(due)

    def _carry_out(self, action: Action, mono_ns: int) -> None:
        link = action.link
        match action:
            case Connect():
                self._send(link, 100, True, mono_ns, lambda t: self._on_connect(link, t))
            case Send(_, token, record):
                topic = f"{self._topic}/{record.kind}"
                self._publish(link, token, topic, record.payload, mono_ns, retain=False)
            case Announce(_, token, state):
                message = self._state(state, self._last_id())
                self._publish(link, token, f"{self._topic}/state", message, mono_ns, retain=True)
            case Leave():
                self._broker.goodbye(self._client_id)
                self._forget(link)
            case Drop():
                self._forget(link)
                if self._known_to_broker:  # it hears nothing of the end: only silence tells it
                    self._known_to_broker = False
                    self._will_due_ns = mono_ns + self._model.keepalive_s * NS_PER_S * 3 // 2

    def _on_connect(self, link: int, t_ns: int) -> None:
        self._will_due_ns = None
        self._known_to_broker = True
        self._broker.connect(self._client_id, f"{self._topic}/state", self._state("lost", None))
        self._send(link, 10, False, t_ns, lambda t: self.session.connected(link, t))

    def _publish(
        self, link: int, token: int, topic: str, payload: bytes, mono_ns: int, *, retain: bool
    ) -> None:
        def arrive(t_ns: int) -> None:
            self._broker.publish(topic, payload, t_ns, retain=retain)
            self._send(link, 8, False, t_ns, lambda t: self.session.acked(link, [token], t))

        self._send(link, len(payload) + len(topic), True, mono_ns, arrive)

    def _send(
        self, link: int, size_bytes: int, up: bool, mono_ns: int, arrive: Callable[[int], None]
    ) -> None:
        """Queue bytes on one direction; `arrive` is called when they come out at the other end, in order."""
        model = self._model
        begin = self._coverage.up_from(max(mono_ns, self._free_ns[up]))
        self._free_ns[up] = begin + size_bytes * NS_PER_S // model.bytes_per_s
        late_ns = int(model.jitter_ms * NS_PER_MS * self._random())
        if self._random() < model.loss:
            late_ns += int(RETRANSMIT_S * NS_PER_S)
        due = self._coverage.up_from(self._free_ns[up] + model.latency_ms * NS_PER_MS + late_ns)
        due = self._last_due_ns[up] = max(due, self._last_due_ns[up])
        self._order += 1
        heapq.heappush(self._events, (due, self._order, link, arrive))

    def _forget(self, link: int) -> None:
        self._events = [event for event in self._events if event[2] != link]
        heapq.heapify(self._events)
        self._free_ns = {True: 0, False: 0}
        self._last_due_ns = {True: 0, False: 0}

    def _state(self, state: str, last_id: int | None) -> bytes:
        return json.dumps({"state": state, "start": self._start, "last_id": last_id}).encode()
