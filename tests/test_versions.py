"""The warning about versions of torch and CuTeDSL that are newer than those tried."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError

import pytest

from dit_kernels import versions


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    versions.warn_if_newer.cache_clear()
    yield
    versions.warn_if_newer.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, torch: str | None, cutedsl: str | None) -> None:
    """Patches the versions that are installed; None: not installed."""
    installed = {"torch": torch, "nvidia-cutlass-dsl": cutedsl}

    def version(name: str) -> str:
        if installed[name] is None:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr("importlib.metadata.version", version)


@pytest.mark.parametrize(
    ("torch", "cutedsl", "named"),
    [
        ("2.16.0", "4.8.1", "torch 2.16.0;"),
        ("2.16.0.dev20261120+cu130", "4.8.1", "torch 2.16.0.dev20261120+cu130;"),
        ("3.0.0", None, "torch 3.0.0;"),
        ("2.15.0", "4.9.0", "nvidia-cutlass-dsl 4.9.0;"),
        ("2.15.0", "4.10.0", "nvidia-cutlass-dsl 4.10.0;"),
        ("2.16.1", "4.9.0", "torch 2.16.1 and nvidia-cutlass-dsl 4.9.0;"),
    ],
)
def test_a_newer_version_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, torch: str, cutedsl: str | None, named: str
) -> None:
    install(monkeypatch, torch, cutedsl)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        versions.warn_if_newer()
        versions.warn_if_newer()
    (text,) = (str(warning.message) for warning in given)
    assert f"not tried yet with {named}" in text
    assert "newest versions tried are torch 2.15 and nvidia-cutlass-dsl 4.8" in text
    assert "the graph is restored" in text and "left to Inductor" in text
    assert given[0].filename == __file__


@pytest.mark.parametrize(
    ("torch", "cutedsl"),
    [
        ("2.15.0", "4.8.1"),
        ("2.15.9+cu130", "4.8.99"),
        ("2.11.0", "4.8.0"),
        ("2.9.1", None),
        (None, None),
        ("unknown", "4"),
    ],
)
def test_versions_that_were_tried_or_are_older_or_unreadable_are_not(
    monkeypatch: pytest.MonkeyPatch, torch: str | None, cutedsl: str | None
) -> None:
    install(monkeypatch, torch, cutedsl)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.warn_if_newer()
