"""The peer of bench_agent: what one writes in an afternoon with python-can's Notifier, cantools and JSON.

Every frame is decoded by cantools in a listener; once a second the latest values go out as one JSON line.
No validity, no rules, no spool: it does less than the agent, not more.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import can
import cantools.database


def main(url: str, *dbc_files: str) -> None:
    database: Any = cantools.database.Database()
    for path in dbc_files:
        database.add_dbc_file(path)
    known = {message.frame_id: message for message in database.messages}
    latest: dict[str, Any] = {}

    def take(frame: can.Message) -> None:
        message = known.get(frame.arbitration_id)
        if message is not None:
            latest.update(message.decode(bytes(frame.data), decode_choices=False))

    interface, _, channel = url.partition(":")
    with can.Bus(interface=interface, channel=channel, fd=True) as bus, can.Notifier(bus, [take]):
        while True:
            time.sleep(1.0)
            print(json.dumps({"t": time.time(), **dict(latest)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
