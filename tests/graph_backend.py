"""A backend for tests: Inductor up to and with its post-grad passes, and then the FX graph itself, run by PyTorch.

What it runs is what the pass made of the model, one ATen operation after the other, so its results can be compared with
eager ones bit by bit, and a model takes a second instead of a minute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any
from unittest import mock

import pytest
import torch
from torch._decomp import get_decompositions
from torch._guards import detect_fake_mode
from torch._inductor import config
from torch._inductor.compile_fx import _recursive_post_grad_passes, compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import view_to_reshape
from torch._inductor.virtualized import V

from fusion_pass.graph_pass import FusionPass
from fusion_pass.hook import join
from fusion_pass.report import FusionReport

# Of x -> 16 bits -> fp32 it leaves x -> fp32, also where the rounding is lost: the graph is not the model's then.
CASTS_ARE_KEPT = torch.__version__ >= "2.12"
needs_casts = pytest.mark.skipif(not CASTS_ARE_KEPT, reason="torch 2.11's own passes drop a cast of this model")


@contextmanager
def addcmul_decomposed(also: bool = True) -> Iterator[None]:
    """torch 2.11 decomposes addcmul before any pass sees it; later versions do so inside this context."""
    table = select_decomp_table() | (get_decompositions([torch.ops.aten.addcmul]) if also else {})
    with mock.patch("torch._inductor.compile_fx.select_decomp_table", return_value=table):
        yield


class GraphBackend:
    """Compiles with the fusion pass, keeps each graph before and after it, and collects the reports."""

    def __init__(self, rounding: str = "model", kernels: str = "reference", strict: bool = False, fuse: bool = True):
        self.report = FusionReport()
        self.before: list[str] = []
        self.graphs: list[torch.fx.GraphModule] = []
        self.fuse = fuse
        self._pass = FusionPass(rounding, kernels, strict, collector=self.report)

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        patches: dict[str, Any] = {"fx_graph_cache": False}
        if self.fuse:
            patches["post_grad_custom_pre_pass"] = join(config.post_grad_custom_pre_pass, self._pass)
        return compile_fx(gm, example_inputs, inner_compile=self._stop_after_passes, config_patches=patches)

    def _stop_after_passes(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        from functorch.compile import make_boxed_func

        with V.set_fake_mode(detect_fake_mode(example_inputs)):
            view_to_reshape(gm)
            self.before.append(str(gm.graph))
            _recursive_post_grad_passes(gm, is_inference=kwargs.get("is_inference", False))
        gm.graph.lint()
        gm.recompile()
        self.graphs.append(gm)
        return make_boxed_func(gm.forward)

    def count(self, op: Any) -> int:
        """Calls of an op, over all graphs."""
        return sum(len(gm.graph.find_nodes(op="call_function", target=op)) for gm in self.graphs)


class BackendOfBoth(GraphBackend):
    """Makes of each graph two, with the fusion pass and without, in the time of one trace.

    `runs_fused` says which one a compiled model runs.
    """

    runs_fused = True

    def _stop_after_passes(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        copied = torch.fx.GraphModule(gm, deepcopy(gm.graph))
        with config.patch(post_grad_custom_pre_pass=None):
            plain = GraphBackend(fuse=False)._stop_after_passes(copied, example_inputs, **kwargs)
        fused = super()._stop_after_passes(gm, example_inputs, **kwargs)

        def run_one(args: list[Any]) -> Any:
            return fused(args) if self.runs_fused else plain(args)

        run_one._boxed_call = True  # it clears its list of arguments, as Inductor's code does
        return run_one


def run(
    model: Callable[..., Any], *args: Any, dynamic: bool | None = None, fuse: bool = True, **options: Any
) -> tuple[Any, GraphBackend]:
    """The result of `model(*args)` compiled with the test backend, and the backend."""
    torch._dynamo.reset()
    backend = GraphBackend(fuse=fuse, **options)
    with torch.no_grad():
        result = torch.compile(model, backend=backend, dynamic=dynamic)(*args)
    return result, backend
