"""Warnings that a process gives only once."""

from __future__ import annotations

import warnings
from functools import cache


@cache
def warn_once(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns, unless the process has already given this message."""
    warnings.warn(message, category, stacklevel=3)
