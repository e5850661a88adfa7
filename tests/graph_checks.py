"""What the tests of single graphs share: operands, bit-equality, and the options of the op in a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from graph_backend import GraphBackend
from torch import Tensor

from fusion_pass import FusionReport

SINGLE, DUAL, SCALED = "norm_tanh_mul_add", "norm_tanh_mul_add_norm_scale", "norm_scale"
BF16, FP32 = torch.bfloat16, torch.float32
Model = Callable[..., Any]


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = BF16) -> list[Tensor]:
    torch.manual_seed(0)
    made = [torch.randn(shape).to(dtype) for shape in shapes]
    for t in made:
        torch._dynamo.mark_static(t, t.ndim - 1)
    return made


def assert_equal(got: Any, expected: Any) -> None:
    got, expected = (r if isinstance(r, tuple) else (r,) for r in (got, expected))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def but_adaln(report: FusionReport) -> dict[str, int]:
    """The counts of a report, but for residual adds and norms with a scale, which test_adaln_models.py counts, and for
    activations in their matmuls, which test_linear_models.py counts."""
    others = ("mul_add_norm_scale", SCALED, "linear_gelu", "linear_silu_mul")
    return {kind: count for kind, count in report.counts().items() if kind not in others}


def but_matmuls(counts: dict[str, int]) -> dict[str, int]:
    """Counts of sites, as if no matmul in front of an activation were a part of its site."""
    others = {kind: count for kind, count in counts.items() if kind not in ("linear_gelu", "linear_silu_mul")}
    products = counts.get("silu_mul", 0) + counts.get("linear_silu_mul", 0)
    return others | ({"silu_mul": products} if products else {})


def options_of(backend: GraphBackend) -> dict[str, Any]:
    """The keyword arguments of the one op in a graph."""
    calls = [n for gm in backend.graphs for n in gm.graph.nodes if "dit_kernels" in str(n.target)]
    (call,) = calls
    return dict(call.kwargs)
