"""Where recordings and public DBCs for tests are: $TBOX_DATA, else ../shared/data beside the checkout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("TBOX_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


def data_file(*parts: str) -> Path:
    """Return a data file, or skip the test with one line."""
    path = DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no {'/'.join(parts)} in {DATA} (set TBOX_DATA)")
    return path
