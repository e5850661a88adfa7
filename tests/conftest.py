"""Hypothesis profiles: `ci` has a fixed budget and prints how to reproduce a failure; `long` is for a night."""

from __future__ import annotations

import logging
import os
from functools import partial

# Inductor asks each new process to compile a program for each vector extension of the CPU. That takes 6 s, and what
# the CPU itself says is enough. Processes that tests start inherit this.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

_QUIET = (HealthCheck.too_slow, HealthCheck.data_too_large)
settings.register_profile(
    "ci", max_examples=30, deadline=None, derandomize=False, print_blob=True, suppress_health_check=_QUIET
)
settings.register_profile("long", max_examples=5000, deadline=None, print_blob=True, suppress_health_check=_QUIET)
pytest.register_assert_rewrite(
    "attention_kernel_bounds", "graph_checks", "kernel_bounds", "rotated_row_bounds"
)  # as asserts in tests are
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker compiles the kernels that the interpreter runs, which takes a second for each. Tests share them."""
    for item in items:
        if item.path.parent.name == "ptx":
            item.add_marker(pytest.mark.xdist_group("ptx"))


@pytest.fixture
def one_graph():
    """Mochi picks rows by a mask and NucleusMoE reads sizes, in each layer; without this, that breaks the graph."""
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        yield


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    """No test runs on code that another one compiled; torch's structured trace, which is long, is not captured."""
    logging.getLogger("torch.__trace").propagate = False
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True, scope="session")
def _guards_are_not_timed():
    """Dynamo times the guards of each graph for its log, with cold caches of the CPU. That takes 0.1 s a graph."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch._dynamo.guards.profile_guard_manager", lambda *arguments: 0.0, raising=False)
        yield


@pytest.fixture
def compiled_anew():
    """Inductor generates all code of a test anew, without gradients, for the same random numbers each time."""
    from torch._inductor.utils import fresh_cache  # slow, and few tests compile

    torch.manual_seed(0)
    with fresh_cache(), torch.no_grad():
        yield


@pytest.fixture
def without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor generates no code, to save time: it stops after its passes, and PyTorch runs the graph."""
    from graph_backend import GraphBackend  # imports Inductor
    from torch._inductor import compile_fx

    stopping = partial(compile_fx.compile_fx, inner_compile=GraphBackend()._stop_after_passes)
    monkeypatch.setattr(compile_fx, "compile_fx", stopping)
