"""CAN buses and recordings: frames in, allow-listed frames out. Knows no DBC and no signal."""

from __future__ import annotations

import importlib
from typing import Any

from tbox.imports import import_without

# It would load asammdf and with it pandas for MF4 files, which a daemon never reads: 0.4 s and 47 MB.
import_without("can", "asammdf")


def load_mf4() -> Any:
    """Return can.io.mf4 once it has looked for asammdf; without it its reader raises NotImplementedError."""
    mf4: Any = importlib.import_module("can.io.mf4")
    return importlib.reload(mf4) if mf4.asammdf is None else mf4
