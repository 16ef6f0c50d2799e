"""Imports libraries without what they load only in case somebody wants it. Imports nothing by itself."""

from __future__ import annotations

import importlib
import sys


def import_without(module: str, optional: str) -> None:
    """Import `module` as if its optional library were not installed; afterwards that can be imported again.

    Nothing happens when either is loaded already.
    """
    if module in sys.modules or optional in sys.modules:
        return
    sys.modules[optional] = None  # type: ignore[assignment]  # what says "not installed" to an import
    try:
        importlib.import_module(module)
    finally:
        del sys.modules[optional]
