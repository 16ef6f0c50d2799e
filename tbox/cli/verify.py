"""`tbox verify`: listens to a vehicle's records, or reads a capture, and says whether any is missing."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, BinaryIO, cast

import click
import msgspec

from tbox.errors import Refused, TboxError
from tbox.record.capture import CaptureReader, Received, to_line
from tbox.record.proof import Proof, ProofResult
from tbox.uplink.receive import Receiver
from tbox.uplink.session import UplinkSettings

GAPS_NAMED_MAX = 3


@click.command()
@click.option("--broker", metavar="HOST[:PORT]", help="Broker to listen at.")
@click.option("--vehicle", metavar="ID", help="The vehicle's id as it stands in the topics.")
@click.option("--mqtt", type=click.Choice(["5", "3.1.1"]), default="5", show_default=True)
@click.option("--tls-ca", type=click.Path(), default="", help="Authority of the broker; turns TLS on.")
@click.option("--cert", "--tls-cert", type=click.Path(), default="", help="Client certificate.")
@click.option("--key", "--tls-key", type=click.Path(), default="", help="Its key.")
@click.option("--username", default="")
@click.option("--password-file", type=click.Path(), default="")
@click.option(
    "--idle",
    metavar="SECONDS",
    type=click.FloatRange(min=0.1),
    default=5.0,
    show_default=True,
    help="End when nothing came for so long.",
)
@click.option("--until-stop", is_flag=True, help="Do not end before the vehicle said that it stopped.")
@click.option(
    "--timeout",
    metavar="SECONDS",
    type=click.FloatRange(min=0.1),
    default=None,
    help="End after so long in any case. Without it: wait for the first record for ever.",
)
@click.option(
    "--expect-start",
    metavar="N",
    type=click.IntRange(min=1),
    default=None,
    help="Start N must be complete, even if nothing of it arrived.",
)
@click.option("--late", is_flag=True, help="Do not ask for what was sent before listening began.")
@click.option("--capture", type=click.Path(), default=None, help="Read this file instead of a broker.")
@click.option("--save", type=click.Path(), default=None, help="Write what arrives to this file.")
def verify(
    broker: str | None,
    vehicle: str | None,
    capture: str | None,
    save: str | None,
    expect_start: int | None,
    late: bool,
    **options: Any,
) -> None:
    """Prove from the receiver's side that no record is missing.

    Prints one line of JSON. Exit 0: complete, every gap is explained. Exit 1: a gap nobody explains, or
    nothing came.
    """  # fmt: skip
    proof = Proof(first_start=expect_start, from_first_seen=late)
    torn = 0
    if capture is not None:
        torn = read_capture(capture, proof)
    elif broker and vehicle:
        with ExitStack() as stack:
            file = stack.enter_context(_open(save, "wb")) if save else None
            listen(_settings(broker, options), vehicle, proof, file, **_limits(options))
    else:
        raise click.UsageError("name --broker and --vehicle, or --capture FILE")
    result = proof.result()
    click.echo(msgspec.json.encode({**msgspec.structs.asdict(result), "torn_lines": torn}).decode())
    if not result.ok:
        raise Refused(verdict(result), where=capture or f"{broker}, vehicle {vehicle}")


def verdict(result: ProofResult) -> str:
    """Return one line for a person on why the proof does not hold."""
    if not result.received:
        return "nothing was received"
    if result.gaps_unexplained:
        gaps = result.gaps_unexplained
        named = ", ".join(f"start {gap.start} ids {gap.first}-{gap.last}" for gap in gaps[:GAPS_NAMED_MAX])
        more = ", …" if len(gaps) > GAPS_NAMED_MAX else ""
        return f"{result.missing_unexplained} records are missing and nothing explains it: {named}{more}"
    return "; ".join(result.problems)


def read_capture(path: str, proof: Proof) -> int:
    """Feed a saved capture; return how many of its lines could not be read."""
    with _open(path, "rb") as file:
        reader = CaptureReader(file)
        for message in reader:
            proof.feed_message(message.topic, message.payload)
    return reader.torn


def listen(
    settings: UplinkSettings,
    vehicle: str,
    proof: Proof,
    save: BinaryIO | None,
    *,
    idle_s: float,
    until_stop: bool,
    timeout_s: float | None,
) -> None:
    """Feed what arrives until it is idle (and the vehicle stopped, where asked), or the time is up."""
    arrived: SimpleQueue[Received] = SimpleQueue()

    def keep(topic: str, payload: bytes, mono_ns: int, retained: bool) -> None:
        arrived.put(Received(topic, payload, time.time_ns(), mono_ns, retained))

    begin = last = time.monotonic()
    with Receiver(settings, vehicle, keep).start():
        while timeout_s is None or time.monotonic() - begin < timeout_s:
            try:
                message = arrived.get(timeout=min(0.1, idle_s))
            except Empty:
                idle = proof.received > 0 and time.monotonic() - last >= idle_s
                if idle and (proof.stopped or not until_stop):
                    break
                continue
            last = time.monotonic()
            proof.feed_message(message.topic, message.payload)
            if save is not None:
                save.write(to_line(message))


def _settings(broker: str, options: dict[str, Any]) -> UplinkSettings:
    host, port = parse_broker(broker)
    return UplinkSettings(
        host=host,
        port=port,
        mqtt=options["mqtt"],
        username=options["username"],
        password_file=options["password_file"],
        tls=bool(options["tls_ca"] or options["cert"]),
        tls_ca=options["tls_ca"],
        tls_cert=options["cert"],
        tls_key=options["key"],
    )


def parse_broker(text: str) -> tuple[str, int]:
    """Split HOST[:PORT] or [IPV6]:PORT; port 0 where none is given. Raises click.UsageError."""
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, "0"
    if not host or not port.isdecimal() or int(port) > 65_535:
        raise click.UsageError(f"--broker {text}: not HOST[:PORT]")
    return host.strip("[]"), int(port)


def _limits(options: dict[str, Any]) -> dict[str, Any]:
    return {
        "idle_s": options["idle"],
        "until_stop": options["until_stop"],
        "timeout_s": options["timeout"],
    }


def _open(path: str, mode: str) -> BinaryIO:
    try:
        return cast(BinaryIO, Path(path).open(mode))
    except OSError as error:
        raise TboxError(f"cannot open it: {error.strerror}", where=path) from error
