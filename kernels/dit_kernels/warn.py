"""Warnings that a process gives only once."""

from __future__ import annotations

import warnings

_given: set[str] = set()


def warn_once(message: str, category: type[Warning] = UserWarning, subject: str = "") -> None:
    """Warns, unless the process has already warned about this subject, or given this message if no subject is named."""
    if (subject or message) not in _given:
        warnings.warn(message, category, stacklevel=3)
        _given.add(subject or message)


warn_once.cache_clear = _given.clear  # type: ignore[attr-defined]  # tests forget what was given, as with functools.cache
