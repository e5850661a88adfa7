"""The models of tests/test_models.py on the GPU, where the attention, and so the graph around it, is another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zimage
from graph_backend import GraphBackend
from test_models import FUSED
from test_models import run as run_by_name
from torch import Tensor, nn

LAYERS = 2


def z_image(layers: int, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    return zimage.model(dtype, layers), zimage.inputs((12, 20), dtype=dtype)


def fibo2_counts(layers: int) -> dict[str, int]:
    """The modulation of each token is picked from those of two timesteps, which Inductor does in its own kernel. Left
    are the first layer's gate of one element, and the LayerNorm at the end."""
    return {"norm_scale": 1, "norm_tanh_mul_add": 1, "qk_norm_rope": layers + 1, "silu_mul": layers + 2}


MODELS = {"Z-Image": (z_image, zimage.expected_counts), **FUSED}
MODELS["FIBO 2"] = FUSED["FIBO 2"][0], fibo2_counts


@pytest.fixture(autouse=True)
def _one_graph():
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        yield


def on_gpu(arguments: Any) -> Any:
    if isinstance(arguments, dict):
        return {name: on_gpu(argument) for name, argument in arguments.items()}
    if isinstance(arguments, list | tuple):
        return type(arguments)(on_gpu(argument) for argument in arguments)
    return arguments.cuda() if isinstance(arguments, Tensor) else arguments


def run(model: nn.Module, arguments: Any) -> Tensor:
    return run_by_name(model, arguments) if isinstance(arguments, dict) else zimage.run(model, arguments)


def compiled(model: nn.Module, arguments: Any, dynamic: bool, **options: Any) -> tuple[Tensor, GraphBackend]:
    torch._dynamo.reset()
    backend = GraphBackend(**options)
    return run(torch.compile(model, backend=backend, dynamic=dynamic or None), arguments), backend


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.mark.parametrize(
    ("dtype", "dynamic"),
    ((torch.bfloat16, False), (torch.float16, False), (torch.float32, False), (torch.bfloat16, True)),
    ids=("bf16", "fp16", "fp32", "dynamic"),
)
@pytest.mark.parametrize(("make", "counts"), MODELS.values(), ids=MODELS)
def test_a_model_is_fused_whole_on_a_gpu_and_its_result_is_as_near_to_eager_as_unfused(
    make, counts, dynamic, dtype
) -> None:
    model, arguments = make(LAYERS, dtype)
    model, arguments = model.cuda(), on_gpu(arguments)
    eager = run(model, arguments)
    got, backend = compiled(model, arguments, dynamic, kernels="auto")
    plain, _ = compiled(model, arguments, dynamic, fuse=False)
    assert backend.report.counts() == counts(LAYERS), backend.report
    last_bits = 1e-6 if dtype == torch.float32 else 2e-3
    assert distance(got, eager) <= 1.5 * distance(plain, eager) + last_bits
