"""The models of tests/test_models.py on the GPU, where the attention, and so the graph around it, is another."""

from __future__ import annotations

import pytest
import torch
import zimage
from graph_checks import but_matmuls
from test_models import FUSED, Arguments, compiled, fibo2, run
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

LAYERS = 2

pytestmark = pytest.mark.usefixtures("one_graph")


def z_image(layers: int, dtype: torch.dtype) -> tuple[nn.Module, Arguments]:
    inputs = zip(("x", "t", "cap_feats"), zimage.inputs((12, 20), dtype=dtype), strict=True)
    return zimage.model(dtype, layers), dict(inputs)


def fibo2_counts(layers: int) -> dict[str, int]:
    """The modulation of each token is picked from those of two timesteps, which Inductor does in its own kernel. Left
    are the first layer's gate of one element, and the LayerNorm at the end."""
    return {"norm_scale": 1, "norm_tanh_mul_add": 1, "qk_norm_rope": layers + 1, "silu_mul": layers + 2}


MODELS = {"Z-Image": (z_image, zimage.expected_counts), **FUSED, "FIBO 2": (fibo2, fibo2_counts)}


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.mark.parametrize(
    ("dtype", "dynamic"),
    ((torch.bfloat16, None), (torch.float16, None), (torch.float32, None), (torch.bfloat16, True)),
    ids=("bf16", "fp16", "fp32", "dynamic"),
)
@pytest.mark.parametrize(("make", "counts"), MODELS.values(), ids=MODELS)
def test_a_model_is_fused_whole_on_a_gpu_and_its_result_is_as_near_to_eager_as_unfused(
    make, counts, dynamic, dtype
) -> None:
    model, arguments = make(LAYERS, dtype)
    model, arguments = model.cuda(), tree_map_only(Tensor, Tensor.cuda, arguments)
    eager = run(model, arguments)
    got, backend = compiled(model, arguments, dynamic, kernels="auto")
    plain, _ = compiled(model, arguments, dynamic, fuse=False)
    # Which matmuls are a part of a site is measured on the spot.
    assert but_matmuls(backend.report.counts()) == but_matmuls(counts(LAYERS)), backend.report
    last_bits = 1e-6 if dtype == torch.float32 else 2e-3
    assert distance(got, eager) <= 1.5 * distance(plain, eager) + last_bits
