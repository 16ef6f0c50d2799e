"""CAN buses and recordings: frames in, allow-listed frames out. Knows no DBC and no signal."""

from __future__ import annotations

import importlib
import sys
from typing import Any

MF4_LIBRARY = "asammdf"


def import_can_without_mf4() -> None:
    """Import python-can; it would load asammdf, and pandas with it, for MF4 files a daemon never reads.

    That is half a second and 65 MB. Whoever reads one calls `load_mf4`.
    """
    if "can" in sys.modules or MF4_LIBRARY in sys.modules:
        return
    sys.modules[MF4_LIBRARY] = None  # type: ignore[assignment]  # what says "not installed" to an import
    try:
        importlib.import_module("can")
    finally:
        del sys.modules[MF4_LIBRARY]


def load_mf4() -> Any:
    """Return can.io.mf4 once it has looked for asammdf; without it its reader raises NotImplementedError."""
    mf4: Any = importlib.import_module("can.io.mf4")
    return importlib.reload(mf4) if mf4.asammdf is None else mf4


import_can_without_mf4()
