"""The receiver's side of a broker: everything one vehicle publishes, with QoS 1. Publishes nothing.

The broker keeps the subscription while this receiver is away, so that neither its reconnects nor a
broker that restarts with persistence make a hole in what it sees.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from tbox.uplink.mqtt import DENIED_CODES, TOPIC_ROOT, UplinkError, credentials, tls_refusal
from tbox.uplink.session import UplinkSettings

RECONNECT_S_MIN = 1
RECONNECT_S_MAX = 4
SESSION_EXPIRY_S = 3600  # how long the broker keeps what we are owed
CONNECT_DEADLINE_S = 10.0
CLOSE_DEADLINE_S = 2.0
PACKETS_IN_FLIGHT_MAX = 1000

# topic, payload, monotonic ns of reception, retained
OnMessage = Callable[[str, bytes, int, bool], None]


class Receiver:
    """Subscribes to `tbox/1/<vehicle>/#` until closed. on_message is called in paho's thread.

    Raises UplinkError from `start` when the broker says no or does not answer in time; what goes wrong later
    stands in `trouble` while paho reconnects.
    """

    def __init__(self, settings: UplinkSettings, vehicle: str, on_message: OnMessage) -> None:
        self.trouble = ""
        self._settings = settings
        self._topic = f"{TOPIC_ROOT}/{vehicle}/#"
        self._on_message = on_message
        self._client_id = settings.client_id or f"tbox-receiver-{secrets.token_hex(6)}"
        self._subscribed = threading.Event()
        self._denied = threading.Event()
        self._access = credentials(settings)
        self._client = self._make_client(clean=False)

    def start(self, deadline_s: float = CONNECT_DEADLINE_S) -> Self:
        """Connect and return once the subscription stands."""
        where = f"{self._settings.host}:{self._settings.port_in_use}"
        try:
            self._connect(self._client)
        except (OSError, ValueError) as error:
            raise UplinkError(
                tls_refusal(error) or f"no broker: {error}", where=where, mend="check host, port and TLS"
            ) from error
        self._client.loop_start()
        deadline = time.monotonic() + deadline_s
        while not self._subscribed.wait(0.02):
            if self._denied.is_set() or time.monotonic() > deadline:
                self.close()
                why = self.trouble or "the broker does not answer"
                raise UplinkError(why, where=where, mend="check name, password and certificate")
        return self

    def close(self) -> None:
        """Leave, and give the subscription up, so that the broker keeps nothing for nobody."""
        if self._settings.mqtt == "5":
            properties = Properties(PacketTypes.DISCONNECT)  # type: ignore[no-untyped-call]
            properties.SessionExpiryInterval = 0
            self._client.disconnect(properties=properties)
        else:
            self._client.disconnect()
        self._client.loop_stop()
        if self._settings.mqtt != "5" and self._subscribed.is_set():
            self._forget_session()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _make_client(self, *, clean: bool) -> paho.Client:
        five = self._settings.mqtt == "5"
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._client_id,
            clean_session=None if five else clean,
            protocol=paho.MQTTv5 if five else paho.MQTTv311,
        )
        client.reconnect_delay_set(RECONNECT_S_MIN, RECONNECT_S_MAX)
        client.connect_timeout = CONNECT_DEADLINE_S
        if self._settings.username:
            client.username_pw_set(self._settings.username, self._access.password)
        if self._access.tls is not None:
            client.tls_set_context(self._access.tls)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_paho_message
        return client

    def _connect(self, client: paho.Client) -> None:
        settings = self._settings
        if settings.mqtt == "5":
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.SessionExpiryInterval = SESSION_EXPIRY_S
            properties.ReceiveMaximum = PACKETS_IN_FLIGHT_MAX
            client.connect(
                settings.host,
                settings.port_in_use,
                keepalive=settings.keepalive_s,
                clean_start=False,
                properties=properties,
            )
        else:
            client.connect(settings.host, settings.port_in_use, keepalive=settings.keepalive_s)

    def _forget_session(self) -> None:
        """In MQTT 3.1.1 only a clean connection ends a session that was kept."""
        client = self._make_client(clean=True)
        client.on_connect = lambda one, *_: one.disconnect()
        client.on_disconnect = None
        with contextlib.suppress(OSError):
            self._connect(client)
            deadline = time.monotonic() + CLOSE_DEADLINE_S
            while time.monotonic() < deadline and client.loop(0.1) == paho.MQTT_ERR_SUCCESS:
                pass

    # --- paho's callbacks -----------------------------------------------------------------------------

    def _on_connect(
        self, client: paho.Client, _data: object, _flags: object, code: ReasonCode, _props: object
    ) -> None:
        if code.is_failure:
            self.trouble = f"the broker refused the connection: {code}"
            if code.value in DENIED_CODES:
                self._denied.set()
            return
        self.trouble = ""
        client.subscribe(self._topic, qos=1)

    def _on_subscribe(
        self, _client: paho.Client, _data: object, _mid: int, codes: list[ReasonCode], _props: object
    ) -> None:
        if any(code.is_failure for code in codes):
            self.trouble = f"the broker refused the subscription: {codes[0]}"
            self._denied.set()
        else:
            self._subscribed.set()

    def _on_disconnect(
        self, client: paho.Client, _data: object, _flags: object, code: ReasonCode, _props: object
    ) -> None:
        if code.is_failure and not self._denied.is_set():
            self.trouble = self.trouble or f"the link to the broker ended: {code}"

    def _on_paho_message(self, _client: paho.Client, _data: object, message: Any) -> None:
        self._on_message(message.topic, message.payload, time.monotonic_ns(), message.retain)
