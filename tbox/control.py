"""The control socket: JSON lines by which commands and views reach a running agent. Decides nothing.

A request is one object with "cmd"; the answer is one object, or for a stream one object a line until either
side closes. An answer with "error" is the agent's refusal. The socket's mode is 0600: who opens it may ask.
"""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from tbox.errors import Refused, TboxError

LINE_BYTES_MAX = 1 << 20
CLIENTS_MAX = 16
IDLE_TIMEOUT_S = 30.0  # a client that connected and says nothing is let go
SUBSCRIBER_LINES_MAX = 1000
POLL_S = 0.2

Message = dict[str, Any]
Stream = Generator[Message, None, None]
Handler = Callable[[Message], "Message | Stream"]


class ControlError(TboxError):
    """The agent could not be asked."""

    exit_code = 1


def _line(message: Message) -> bytes:
    return json.dumps(message, separators=(",", ":"), default=str).encode() + b"\n"


def request(socket_path: str, message: Message, timeout_s: float = 5.0) -> Message:
    """Ask a running agent once and return its answer.

    Raises ControlError when no agent answers there, Refused when it says no.
    """
    with contextlib.closing(stream(socket_path, message, timeout_s)) as answers:
        for answer in answers:
            return answer
    raise ControlError(
        "the agent closed the connection without an answer", where=socket_path, mend="look at its log"
    )


def stream(socket_path: str, message: Message, timeout_s: float | None = None) -> Stream:
    """Ask a running agent and yield its answers until it closes. Raises as `request` does."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(timeout_s)
            sock.connect(socket_path)
            sock.sendall(_line(message))
            with sock.makefile("rb") as lines:
                for line in lines:
                    answer = json.loads(line)
                    if "error" in answer:
                        raise Refused(str(answer["error"]))
                    yield answer
    except (OSError, ValueError) as error:
        raise ControlError(
            f"no agent answers: {getattr(error, 'strerror', None) or error}",
            where=socket_path,
            mend="start `tbox run`, or name its socket with --socket",
        ) from error


class Feed:
    """Hands lines to any number of subscribers without ever waiting for one of them.

    A subscriber that is too slow misses lines and is told how many.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queues: list[queue.Queue[Message]] = []
        self._missed: dict[int, int] = {}

    @property
    def wanted(self) -> bool:
        """Whether anybody listens; producers skip the work when nobody does."""
        return bool(self._queues)

    def publish(self, message: Message) -> None:
        with self._lock:
            for lines in self._queues:
                try:
                    lines.put_nowait(message)
                except queue.Full:
                    self._missed[id(lines)] = self._missed.get(id(lines), 0) + 1

    def subscribe(self, stopped: threading.Event) -> Stream:
        """Yield messages from now on; an empty one now and then, so that a dead client is noticed."""
        lines: queue.Queue[Message] = queue.Queue(SUBSCRIBER_LINES_MAX)
        with self._lock:
            self._queues.append(lines)
        try:
            while not stopped.is_set():
                with contextlib.suppress(queue.Empty):
                    yield lines.get(timeout=POLL_S)
                    continue
                missed = self._missed.pop(id(lines), 0)
                yield {"missed": missed} if missed else {}
        finally:
            with self._lock:
                self._queues.remove(lines)
                self._missed.pop(id(lines), None)


class ControlServer:
    """Answers on a Unix socket from threads of its own. Handlers run there and must not block long."""

    def __init__(self, path: str, handlers: dict[str, Handler]) -> None:
        """Bind at `path`. Raises ControlError when another agent answers there or the path cannot be made."""
        self._path = path
        self._handlers = handlers
        self.stopped = threading.Event()
        self._slots = threading.BoundedSemaphore(CLIENTS_MAX)
        self._socket = self._bind()
        self._thread = threading.Thread(target=self._accept, name="control", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self.stopped.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits there
        self._socket.close()
        if self._thread.is_alive():
            self._thread.join()
        Path(self._path).unlink(missing_ok=True)

    def _bind(self) -> socket.socket:
        path = Path(self._path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_socket() and not self._answers():
                path.unlink()  # left behind by a killed agent
            sock.bind(str(path))
            path.chmod(0o600)
            sock.listen(CLIENTS_MAX)
        except OSError as error:
            sock.close()
            raise ControlError(
                f"cannot open the control socket: {error.strerror or error}",
                where=self._path,
                mend="stop the agent that runs there, or set [control] socket to another path",
            ) from error
        return sock

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            return probe.connect_ex(self._path) == 0

    def _accept(self) -> None:
        while not self.stopped.is_set():
            try:
                client, _ = self._socket.accept()
            except OSError:
                return  # closed
            if not self._slots.acquire(blocking=False):
                with client, contextlib.suppress(OSError):
                    client.sendall(_line({"error": f"more than {CLIENTS_MAX} clients; try again"}))
                continue
            threading.Thread(target=self._serve, args=(client,), name="control-client", daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            with client, client.makefile("rb") as lines, contextlib.suppress(OSError):
                client.settimeout(IDLE_TIMEOUT_S)
                while (line := lines.readline(LINE_BYTES_MAX)) and not self.stopped.is_set():
                    self._answer(client, line)
        finally:
            self._slots.release()

    def _answer(self, client: socket.socket, line: bytes) -> None:
        try:
            message = json.loads(line)
            handler = self._handlers.get(message["cmd"])
        except (ValueError, KeyError, TypeError):
            client.sendall(_line({"error": 'a request is one JSON object a line with "cmd"'}))
            return
        if handler is None:
            known = ", ".join(sorted(self._handlers))
            client.sendall(_line({"error": f"unknown command {message['cmd']!r}; there are: {known}"}))
            return
        try:
            answer = handler(message)
            if isinstance(answer, dict):
                client.sendall(_line(answer))
                return
            with contextlib.closing(answer):
                for part in answer:
                    client.sendall(_line(part))
        except TboxError as error:
            client.sendall(_line({"error": str(error)}))
