"""tbox.toml into frozen structs: what a daemon is told. It opens nothing but that file.

Every section is the settings struct of the room it is for; units stand in the names, bounds in the
annotations, and an unknown key is an error. Relative paths are relative to the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from tbox import toml
from tbox.bus.spec import BusSpec
from tbox.decode.database import DecodeSettings
from tbox.edge.stage import EdgeSettings
from tbox.model import CAN_EFF_FLAG, CAN_EFF_MASK, CAN_SFF_MASK
from tbox.ota.fetch import FetchSettings
from tbox.ota.policy import Bearer, OtaSettings
from tbox.ota.slots import TrybootSettings
from tbox.record.privacy import PrivacySettings
from tbox.spool.store import SpoolSettings
from tbox.uplink.session import UplinkSettings

BUSES_MAX = 8

Url = Annotated[str, msgspec.Meta(pattern="^(https?://[^ ]+)?$", max_length=1000)]


class VehicleConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who this is. Topics carry `id`, or a keyed hash of the VIN under the device's secret; never the VIN."""

    id: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_\-]{0,64}$")] = ""
    vin: Annotated[str, msgspec.Meta(pattern=r"^([A-HJ-NPR-Z0-9]{17})?$")] = ""
    secret_file: str = ""


class DeviceConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where this device keeps what must survive, and how it is watched."""

    state_directory: str = "/var/lib/tbox"
    control_socket: str = ""  # default: <state_directory>/control.sock
    spool_directory: str = ""  # default: <state_directory>/spool
    health_s: Annotated[int, msgspec.Meta(ge=1, le=86_400)] = 60
    drain_s: Annotated[int, msgspec.Meta(ge=0, le=600)] = 10  # how long a stop waits for PUBACKs
    log_level: Annotated[str, msgspec.Meta(pattern="^(debug|info|warning|error)$")] = "info"
    log_json: bool = False


class RulesConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The thresholds: the shipped ones of a chemistry, and files that change or add to them."""

    chemistry: Literal["nmc", "lfp"] = "nmc"
    files: list[str] = []


class BusConfig(BusSpec, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One bus with its DBC files, and the ids that may be sent on it (none: listen-only)."""

    dbc: Annotated[list[str], msgspec.Meta(min_length=1)]
    send: tuple[Annotated[int, msgspec.Meta(ge=0, le=CAN_EFF_MASK)], ...] = ()

    @property
    def allow(self) -> frozenset[int]:
        """The ids that may be sent, with the flag of 29-bit ids set where they need it."""
        return frozenset(i if i <= CAN_SFF_MASK else i | CAN_EFF_FLAG for i in self.send)


class OtaConfig(OtaSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where updates come from and what holds them. Without metadata_url none is looked for.

    targets_url "": beside the metadata, as published. bearer: what the link runs over, as far as is known.
    The slots and the first trusted root are where `tbox boot` says, or where rpi_tryboot does, on a Pi whose
    own firmware starts the slots.
    """

    metadata_url: Url = ""
    targets_url: Url = ""
    fetch: FetchSettings = FetchSettings()
    bearer: Bearer = "cellular"
    rpi_tryboot: TrybootSettings | None = None


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole of tbox.toml."""

    vehicle: VehicleConfig
    bus: Annotated[list[BusConfig], msgspec.Meta(min_length=1, max_length=BUSES_MAX)]
    uplink: UplinkSettings
    device: DeviceConfig = DeviceConfig()
    decode: DecodeSettings = DecodeSettings()
    rules: RulesConfig = RulesConfig()
    edge: EdgeSettings = EdgeSettings()
    privacy: PrivacySettings = PrivacySettings()
    spool: SpoolSettings = SpoolSettings()
    ota: OtaConfig = OtaConfig()

    @property
    def control_socket(self) -> str:
        return self.device.control_socket or f"{self.device.state_directory}/control.sock"

    @property
    def spool_directory(self) -> str:
        return self.device.spool_directory or f"{self.device.state_directory}/spool"


def load(path: str) -> Config:
    """Read tbox.toml. Raises TomlError naming file, line and mend."""
    text = toml.read(path)
    config = toml.parse(text, Config, path)
    _check_vehicle(config, text, path)
    return _resolve(config, Path(path).resolve().parent)


def _check_vehicle(config: Config, text: str, path: str) -> None:
    vehicle = config.vehicle
    if bool(vehicle.id) == bool(vehicle.vin):
        line = toml.line_of(text, ["vehicle"])
        raise toml.TomlError(
            "names either id or vin", where=f"{path}:{line}", mend="give exactly one of them"
        )
    if vehicle.vin and not vehicle.secret_file:
        line = toml.line_of(text, ["vehicle", "vin"])
        raise toml.TomlError(
            "a vin needs secret_file: a bare hash of 17 characters is guessed",
            where=f"{path}:{line}",
            mend="name a file of at least 16 random bytes",
        )


def _resolve(config: Config, base: Path) -> Config:
    """Return the configuration with every path taken relative to `base`, the directory of the file."""

    def at(path: str) -> str:
        return str(base / path) if path else ""

    replace = msgspec.structs.replace
    device, uplink = config.device, config.uplink
    return replace(
        config,
        vehicle=replace(config.vehicle, secret_file=at(config.vehicle.secret_file)),
        device=replace(
            device,
            state_directory=at(device.state_directory),
            control_socket=at(device.control_socket),
            spool_directory=at(device.spool_directory),
        ),
        bus=[replace(bus, dbc=[at(path) for path in bus.dbc]) for bus in config.bus],
        decode=replace(config.decode, mapping=[at(path) for path in config.decode.mapping]),
        rules=replace(config.rules, files=[at(path) for path in config.rules.files]),
        spool=replace(config.spool, key_file=at(config.spool.key_file)),
        uplink=replace(
            uplink,
            tls_ca=at(uplink.tls_ca),
            tls_cert=at(uplink.tls_cert),
            tls_key=at(uplink.tls_key),
            password_file=at(uplink.password_file),
        ),
    )
