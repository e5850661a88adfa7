"""What compiled code depends on: installed versions and our sources. Warns of versions newer than any version tried."""

from __future__ import annotations

import hashlib
import re
import warnings
from functools import cache
from pathlib import Path

GENERATED_BY = (
    "torch",
    "nvidia-cutlass-dsl",
    "quack-kernels",
)  # the packages that compiled code and its speed depend on
NEWEST_TRIED = {"torch": (2, 15), "nvidia-cutlass-dsl": (4, 8)}


@cache
def warn_if_newer() -> None:
    """Warns, once in a process, if an installed package is newer than the newest version that was tried."""
    installed = {name: installed_version(name) for name in NEWEST_TRIED}
    newer = [f"{name} {installed[name]}" for name in installed if _release(installed[name]) > NEWEST_TRIED[name]]
    if newer:
        tried = " and ".join(f"{name} {major}.{minor}" for name, (major, minor) in NEWEST_TRIED.items())
        warnings.warn(
            f"fusion_pass: not tried yet with {' and '.join(newer)}; the newest versions tried are {tried}. Results "
            "stay protected where something fails: if the pass fails, the graph is restored, and a kernel that does "
            "not compile is left to Inductor",
            stacklevel=2,
        )


def installed_version(name: str) -> str:
    """The version of a package; empty if the package is not installed."""
    from importlib.metadata import PackageNotFoundError, version  # slow to import

    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def generator_versions() -> tuple[str, ...]:
    """The names of GENERATED_BY, each with the version that is installed."""
    return tuple(f"{name} {installed_version(name)}" for name in GENERATED_BY)


def hash_of_sources(*packages: Path) -> str:
    """A hash of every source file in these folders, with its path in the folder."""
    digest = hashlib.sha256()
    for package in packages:
        for source in sorted(package.rglob("*.py")):
            digest.update(source.relative_to(package).as_posix().encode() + source.read_bytes())
    return digest.hexdigest()


def _release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version. A version that does not start with two numbers counts as old."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return tuple(map(int, numbers.groups())) if numbers else ()
