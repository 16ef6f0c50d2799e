"""The only way onto a bus: frames whose id is on the list, counted. Listen-only unless ids are listed."""

from __future__ import annotations

from collections.abc import Iterable

import structlog

from tbox.bus.spec import BusError, BusReader
from tbox.errors import Refused
from tbox.model import CanSend

log = structlog.get_logger()


class NotAllowed(Refused):
    """The id is not on the bus's allow-list: it was not sent and never will be."""


class BusWriter:
    """Sends through a reader's bus what `allow` lists (ids with CAN_EFF_FLAG for 29-bit ones).

    sent, refused (not on the list) and failed (the bus would not take it) count every frame once.
    """

    def __init__(self, reader: BusReader, allow: Iterable[int] = ()) -> None:
        self._reader = reader
        self.allow: frozenset[int] = frozenset(allow)
        self.sent = 0
        self.refused = 0
        self.failed = 0

    def send(self, frame: CanSend) -> bool:
        """Put the frame on the bus. False: the bus is down or full (the caller repeats what matters).

        Raises NotAllowed for an id that is not listed.
        """
        if frame.can_id not in self.allow:
            self.refused += 1
            raise NotAllowed(
                f"frame {frame.can_id:X} may not be sent",
                where=self._reader.name,
                mend="list its id under send of the [[bus]] if it may",
            )
        try:
            self._reader.send(frame)
        except BusError as error:
            self.failed += 1
            log.warning("send_failed", bus=self._reader.name, reason=str(error))
            return False
        self.sent += 1
        return True
