"""Everything in this folder is marked `gpu`, and skipped, with the reason, where the kernels cannot run.

Also here: fixtures about plans, which are what lets a call like one before skip its checks.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from dit_kernels.families.family import Call, Op
from dit_kernels.plans import Plans


def why_no_kernels() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA GPU is available"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0"
    if importlib.util.find_spec("cutlass") is None:
        return "CuTeDSL (nvidia-cutlass-dsl) is not installed"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    ours = [item for item in items if here in item.path.parents]
    reason = why_no_kernels() if ours else None
    for item in ours:
        item.add_marker(pytest.mark.gpu)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU that the kernels run on: {reason}"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, metavar="PATH", help="write what the GPU tests did, and where, as json")


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    path = config.getoption("--record")
    if path is None or not torch.cuda.is_available():
        return
    stats = terminalreporter.stats
    record = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "gpu": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda}
        | {name: _version(name) for name in ("nvidia-cutlass-dsl", "apache-tvm-ffi", "diffusers")},
        "exit_status": int(exitstatus),
        "tests": {outcome: len(stats.get(outcome, [])) for outcome in ("passed", "failed", "error", "skipped")},
        "skipped": sorted({f"{r.nodeid}: {r.longrepr[2]}" for r in stats.get("skipped", [])}),
        "failed": sorted(r.nodeid for r in stats.get("failed", [])),
        "seconds": {r.nodeid: round(r.duration, 2) for r in stats.get("passed", []) if r.duration > 5},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# --- plans ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def checked_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the ops whose arguments were checked, one for each check. A call that a plan runs adds none."""
    names: list[str] = []
    checked = Op.call

    def noted(op: Op, *args: Any, **options: Any) -> Call:
        names.append(op.name)
        return checked(op, *args, **options)

    monkeypatch.setattr(Op, "call", noted)
    return names


@pytest.fixture
def as_if_first() -> Callable[[], AbstractContextManager[Any]]:
    """A context in which each call is checked and keeps a plan, whatever plans there are already."""
    return lambda: mock.patch.multiple(Plans, run=lambda *_: None, knows=lambda *_: False)
