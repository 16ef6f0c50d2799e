"""One update repository as the device sees it: what it offers, and the files of that. Decides nothing itself.

`check` and `fetch` are what `device.Ports` asks for; policy and window come in as `hold` and `admits`.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Annotated

import msgspec
from msgspec import Meta

from tbox.durable import RangedStorage
from tbox.errors import Refused
from tbox.model import Now
from tbox.ota import releases
from tbox.ota.device import Held
from tbox.ota.fetch import Downloads, FetchError, FetchSettings, Http, Interrupted
from tbox.ota.model import Delta, Full, Offer, VerifiedTarget
from tbox.ota.trust import TrustClient, moment, target_url_path

CACHE_DIRECTORY, FLOORS_DIRECTORY, DOWNLOAD_DIRECTORY = "metadata", "floors", "download"

Url = Annotated[str, Meta(pattern="^(https?://[^ ]+)?$", max_length=1000)]


class SourceSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where updates come from; no URL, no updates. targets_url "": beside the metadata, as published."""

    metadata_url: Url = ""
    targets_url: Url = ""
    fetch: FetchSettings = FetchSettings()

    @property
    def targets(self) -> str:
        return (self.targets_url or f"{self.metadata_url.rstrip('/').rpartition('/')[0]}/targets").rstrip("/")


class UpdateSource:
    """A repository and what is kept of it under `directory`. Used by one thread.

    root: the first trusted root. admits: whether a release's cohort holds this vehicle.
    """

    def __init__(
        self,
        settings: SourceSettings,
        root: bytes,
        storage: RangedStorage,
        directory: str,
        hardware_id: str,
        admits: Callable[[VerifiedTarget], bool] = lambda release: True,
        *,
        tls: ssl.SSLContext | None = None,
        http: Http | None = None,
    ) -> None:
        storage.mkdir(directory)
        storage.fsync_dir(directory.rpartition("/")[0] or "/")
        for path in (CACHE_DIRECTORY, FLOORS_DIRECTORY, DOWNLOAD_DIRECTORY):
            storage.mkdir(f"{directory}/{path}")
        storage.fsync_dir(directory)  # floors whose directory is lost would be no floors
        self._settings, self._hardware_id, self._admits = settings, hardware_id, admits
        self._http = http or Http(settings.fetch, tls=tls)
        self._client = TrustClient(
            root,
            storage,
            f"{directory}/{CACHE_DIRECTORY}",
            f"{directory}/{FLOORS_DIRECTORY}",
            self._small,
        )
        self._downloads = Downloads(self._http, storage, f"{directory}/{DOWNLOAD_DIRECTORY}")

    def _small(self, path: str, length_max: int) -> bytes | None:
        return self._http.small(f"{self._settings.metadata_url.rstrip('/')}/{path}", length_max)

    def check(self, now: Now) -> Offer:
        """Refresh the metadata and return what it offers. Raises Refused, FetchError, OSError."""
        if not self._settings.metadata_url:
            raise Refused("no repository is configured", mend="set metadata_url in the [ota] section")
        at = moment(now)
        self._client.refresh(at)
        return self._client.run(releases.offer(self._client.trusted, at, self._hardware_id, self._admits))

    def fetch(
        self,
        artifact: Full | Delta,
        hold: Callable[[], str],
        progress: Callable[[int, int], None] = lambda here, all_: None,
    ) -> str:
        """Return the path of a signed file, downloaded as far as it is not here, its digest checked.

        Raises device.Held when `hold` gives a reason or the server cannot be reached: neither is the image's
        fault, and what came is kept. Raises Refused when what the server has is not the signed file, OSError.
        """
        consistent = bool(self._client.trusted.root.signed.consistent_snapshot)
        place = target_url_path(artifact.name, artifact.sha256, consistent=consistent)
        url = f"{self._settings.targets}/{place}"
        try:
            return self._downloads.fetch(url, artifact.length, artifact.sha256, hold, progress)
        except Interrupted as stopped:
            raise Held(stopped.reason) from None
        except FetchError as error:
            raise Held(str(error)) from None
