"""A static HTTP server with ranges for a published repository: for tests and benches, not for the world."""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
from collections.abc import Iterator
from functools import lru_cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

BLOCK_BYTES = 256 * 1024
PUBLIC = ("metadata", "targets")  # what else stands in a repository is nobody's business
_RANGE = re.compile(r"^bytes=(\d{1,18})-(\d{0,18})$")


@lru_cache(maxsize=256)
def _etag(path: Path, mtime_ns: int, size: int) -> str:
    return '"' + hashlib.sha256(f"{path}\0{mtime_ns}\0{size}".encode()).hexdigest()[:32] + '"'


class Handler(BaseHTTPRequestHandler):
    """Serves GET and HEAD of files below `directory`."""

    def __init__(self, *arguments: object, directory: Path) -> None:
        self._directory = directory.resolve()
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        path = self._find()
        if path is None:
            self.send_error(404)
            return
        stat = path.stat()
        etag = _etag(path, stat.st_mtime_ns, stat.st_size)
        begin, end = self._range(stat.st_size, etag)
        if begin >= stat.st_size > 0:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{stat.st_size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        whole = (begin, end) == (0, stat.st_size)
        self.send_response(200 if whole else 206)
        if not whole:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{stat.st_size}")
        self.send_header("Content-Length", str(end - begin))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", etag)
        self.end_headers()
        if self.command == "GET":
            self._send(path, begin, end)

    do_HEAD = do_GET  # noqa: N815

    def _find(self) -> Path | None:
        """Return the file asked for, None when it is none of the public ones."""
        relative = unquote(urlsplit(self.path).path).lstrip("/")
        if relative.partition("/")[0] not in PUBLIC:
            return None
        path = (self._directory / relative).resolve()
        inside = path.is_relative_to(self._directory)
        return path if inside and path.is_file() else None

    def _range(self, size: int, etag: str) -> tuple[int, int]:
        """Return (begin, end) to send: all of it unless one range is asked for, of this very file."""
        match = _RANGE.match(self.headers.get("Range", ""))
        if match is None or self.headers.get("If-Range", etag) != etag:
            return 0, size
        begin, end = int(match[1]), min(int(match[2]) + 1, size) if match[2] else size
        return (begin, end) if begin < end or begin >= size else (0, size)

    def _send(self, path: Path, begin: int, end: int) -> None:
        with path.open("rb") as file, contextlib.suppress(ConnectionError):
            file.seek(begin)
            while begin < end and (block := file.read(min(BLOCK_BYTES, end - begin))):
                self.wfile.write(block)
                begin += len(block)

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        """Say nothing: the command line tells where it serves, that is enough."""


def server(directory: Path, host: str, port: int) -> ThreadingHTTPServer:
    """Return a server of a repository that listens and does not run yet. Raises OSError."""
    return ThreadingHTTPServer((host, port), partial(Handler, directory=directory))


@contextlib.contextmanager
def running(directory: Path, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve a repository from a thread; yield its base URL."""
    http = server(directory, host, port)
    thread = threading.Thread(target=http.serve_forever, args=(0.05,), name="ota-serve")
    thread.start()
    try:
        yield f"http://{host}:{http.server_address[1]}"
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
