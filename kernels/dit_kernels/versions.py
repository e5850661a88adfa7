"""The newest versions of torch and CuTeDSL that this package was tried with, and a warning where they are newer."""

from __future__ import annotations

import re
import warnings
from functools import cache

NEWEST_TRIED = {"torch": (2, 15), "nvidia-cutlass-dsl": (4, 8)}


@cache
def warn_if_newer() -> None:
    """Warns, once in a process, if an installed package is newer than the newest version that was tried."""
    installed = {name: _installed(name) for name in NEWEST_TRIED}
    newer = [f"{name} {installed[name]}" for name in installed if _release(installed[name]) > NEWEST_TRIED[name]]
    if newer:
        tried = " and ".join(f"{name} {major}.{minor}" for name, (major, minor) in NEWEST_TRIED.items())
        warnings.warn(
            f"fusion_pass: not tried yet with {' and '.join(newer)}; the newest versions tried are {tried}. Results "
            "stay protected where something fails: if the pass fails, the graph is restored, and a kernel that does "
            "not compile is left to Inductor",
            stacklevel=2,
        )


def _installed(name: str) -> str:
    """The version of a package; empty if the package is not installed."""
    from importlib.metadata import PackageNotFoundError, version  # slow to import

    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version. A version that does not start with two numbers counts as old."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return tuple(map(int, numbers.groups())) if numbers else ()
