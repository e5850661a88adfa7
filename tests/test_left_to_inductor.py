"""Each of these has a row in the report, neither warns nor raises under strict, and stays Inductor's: rotations without
a norm, residual adds without a norm, and norms of a few rows."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_backend import GraphBackend, run
from graph_checks import assert_equal, tensors
from long import only_long
from matrix_rotations import SPELLINGS
from site_modules import diffusers_norm
from test_models import build, lumina_next
from test_models import compiled as compiled_model
from test_models import run as run_model
from torch import Tensor, nn

from fusion_pass.refusal import BY_DESIGN, Reason

BF16 = torch.bfloat16
B, S, H, D = 2, 6, 3, 16

Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]


def missed(report: Any) -> Counter[tuple[str, str]]:
    """How often each (kind, name of the reason) is missed."""
    return Counter((site.kind, site.reason_name) for site in report.missed)


def compiled(model: Callable[..., Any], *args: Any, **options: Any) -> GraphBackend:
    """The backend, after a run under strict that gives what eager gives and does not warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fusion_pass")
        got, backend = run(model, *args, strict=True, **options)
    with torch.no_grad():
        assert_equal(got, model(*args))
    return backend


# --- rotations --------------------------------------------------------------------------------------------------------


def matrices(cos: Tensor, sin: Tensor) -> Tensor:
    return torch.stack([cos, -sin, sin, cos], -1).unflatten(-1, (2, 2))


def heads_and_tables() -> tuple[Tensor, Tensor, Tensor]:
    (x,) = tensors((B, S, H, D))
    angles = torch.rand(1, S, 1, D // 2) * 6
    return x, angles.cos(), angles.sin()


@pytest.mark.parametrize(("rotate", "dynamic"), zip(SPELLINGS, cycle((False, True))))
def test_each_rotation_by_matrices_without_a_norm_has_one_row(rotate: Callable[..., Tensor], dynamic: bool) -> None:
    """Also a rotation whose table is not of the graph's inputs, as Kandinsky's is not."""

    def model(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = rotate(x, matrices(cos, sin)).transpose(1, 2)
        return q @ q.mT

    backend = compiled(model, *heads_and_tables(), dynamic=dynamic)
    (row,) = (site for site in backend.report.missed if site.kind == "rope")
    assert row.reason_name == "UNNORMED"
    assert len(row.shape) == 4
    if not dynamic:
        assert row.shape == (B, S, H, D)
    assert not backend.report.fused


def turned_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = torch.empty_like(x)
    a, b = x[..., 0::2], x[..., 1::2]
    out[..., 0::2] = a * cos + b * sin
    out[..., 1::2] = b * cos - a * sin
    return out


@pytest.mark.parametrize("normed", (False, True))
def test_a_rotation_into_slices_that_no_op_computes_has_one_row(normed: bool) -> None:
    def model(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = turned_back(diffusers_norm(x, None) if normed else x, cos, sin).transpose(1, 2)
        return q @ q.mT

    backend = compiled(model, *heads_and_tables())
    (row,) = (site for site in backend.report.missed if site.kind == "rope")
    assert (row.reason_name, row.shape) == ("ROTATION", (B, S, H, D))
    assert not backend.report.fused


def other_slices(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * cos
    out[..., 1::2] = x[..., 1::2] * sin
    return out


def other_tensors_in_each_slice(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = torch.empty_like(x)
    a, b = x[..., 0::2], x[..., 1::2]
    out[..., 0::2] = a * cos - b * sin
    out[..., 1::2] = b * sin + a * sin
    return out


def a_sum_of_products(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (x.unflatten(-1, (-1, 2)) * cos[..., None]).sum(-1)


def the_same_column_twice(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    m, pairs = matrices(cos, sin), x.unflatten(-1, (-1, 1, 2))
    return (m[..., 0] * pairs[..., 0] + m[..., 0] * pairs[..., 0]).flatten(-2)


@pytest.mark.parametrize("model", (other_slices, other_tensors_in_each_slice, a_sum_of_products, the_same_column_twice))
def test_what_only_resembles_a_rotation_has_no_row(model: Rotate) -> None:
    def read_by_a_matmul(*args: Tensor) -> Tensor:
        out = model(*args)
        return out @ out.mT

    backend = compiled(read_by_a_matmul, *heads_and_tables())
    assert not backend.report.missed


# --- residual adds ----------------------------------------------------------------------------------------------------


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


LINEAR = torch.linspace(-1, 1, 256, dtype=BF16).reshape(16, 16)


def with_a_bias(x: Tensor) -> Tensor:
    """Inductor computes the sum with a bias in the kernel that reads the sum."""
    return layer_norm(x) @ LINEAR + 1


def gated(x: Tensor, gate: Tensor) -> Tensor:
    return layer_norm(x + gate * with_a_bias(x)) @ LINEAR


def without_gate(x: Tensor, gate: Tensor) -> Tensor:
    return layer_norm(with_a_bias(x) + x) @ LINEAR


def in_fp32(x: Tensor, gate: Tensor) -> Tensor:
    y = (x.float() + gate.float() * with_a_bias(x)).type_as(x)
    return layer_norm(y.float()).type_as(x) @ LINEAR


def returned(x: Tensor, gate: Tensor) -> Tensor:
    """A block that is compiled alone."""
    return x + gate * (layer_norm(x) @ LINEAR)


def behind_a_join(x: Tensor, gate: Tensor) -> Tensor:
    y = x + gate * (layer_norm(x) @ LINEAR)
    return layer_norm(torch.cat((y[:, :2], y[:, 2:] * 1), 1)) @ LINEAR


@pytest.mark.parametrize("model", (gated, without_gate, in_fp32, returned, behind_a_join))
def test_a_residual_add_of_something_that_is_not_a_norm_has_a_row(model: Callable[..., Tensor]) -> None:
    backend = compiled(model, *tensors((2, 4, 16), (2, 1, 16)))
    rows = [site for site in backend.report.missed if site.kind == "residual_add"]
    assert [(site.reason_name, site.shape) for site in rows] == [("ADDED", (2, 4, 16))]


def of_a_norm(x: Tensor, gate: Tensor) -> Tensor:
    return layer_norm(x + gate.tanh() * layer_norm(x @ LINEAR)) @ LINEAR


def a_shift(x: Tensor, gate: Tensor) -> Tensor:
    return layer_norm(layer_norm(x) * (1 + gate) + gate) @ LINEAR


def of_embeddings(x: Tensor, gate: Tensor) -> Tensor:
    """The sum of a tensor and positions: neither is computed from the other."""
    return layer_norm(x @ LINEAR + LINEAR[None, :4].expand(2, -1, -1)) @ LINEAR


def read_by_no_norm(x: Tensor, gate: Tensor) -> Tensor:
    return (x + x @ LINEAR) @ LINEAR


@pytest.mark.parametrize("model", (of_a_norm, a_shift, of_embeddings, read_by_no_norm))
def test_other_sums_have_no_row(model: Callable[..., Tensor]) -> None:
    backend = compiled(model, *tensors((2, 4, 16), (2, 1, 16)))
    assert "residual_add" not in [site.kind for site in backend.report.missed]


# --- few rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ((1, 16), (8, 16), (9, 16), (1, 3, 16)))
def test_a_norm_of_a_few_rows_without_tokens_is_left_to_inductor(shape: tuple[int, ...]) -> None:
    """An embedding of the prompt that is added to one of the time."""

    def model(pooled: Tensor, time: Tensor) -> Tensor:
        return (time + layer_norm(pooled)) @ LINEAR

    backend = compiled(model, *tensors(shape, shape))
    if shape in ((1, 16), (8, 16)):
        assert not backend.report.fused
        assert missed(backend.report) == {("norm_tanh_mul_add", "INLINE"): 1}
    else:
        assert [site.kind for site in backend.report.fused] == ["norm_tanh_mul_add"]


# --- models -----------------------------------------------------------------------------------------------------------


def kandinsky5(text: int, visual: int) -> tuple[nn.Module, dict[str, Any]]:
    config = dict(in_visual_dim=4, in_text_dim=16, in_text_dim2=16, time_dim=32, out_visual_dim=4, model_dim=48)
    blocks = dict(ff_dim=64, num_text_blocks=text, num_visual_blocks=visual, axes_dims=(8, 8, 8))
    model = build("Kandinsky5Transformer3DModel", BF16, **config, **blocks)
    for name, module in model.named_modules():  # as from_pretrained keeps them
        if name == "time_embeddings" or name.endswith("modulation"):
            module.float()
    return model, {
        "hidden_states": torch.randn(1, 2, 4, 4, 4, dtype=BF16),
        "encoder_hidden_states": torch.randn(1, 6, 16, dtype=BF16),
        "timestep": torch.tensor([500.0]),
        "pooled_projections": torch.randn(1, 16, dtype=BF16),
        "visual_rope_pos": [torch.arange(2)] * 3,
        "text_rope_pos": torch.arange(6),
    }


def wan21(layers: int) -> tuple[nn.Module, dict[str, Any]]:
    config = dict(num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16)
    model = build("WanTransformer3DModel", BF16, **config, freq_dim=16, ffn_dim=64, num_layers=layers)
    return model, {
        "hidden_states": torch.randn(1, 4, 2, 4, 6, dtype=BF16),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 6, 16, dtype=BF16),
    }


@pytest.mark.parametrize(("text", "visual"), ((1, 2), pytest.param(2, 1, marks=only_long)))
def test_kandinskys_sites_are_fused_and_its_last_residual_add_has_a_row(text: int, visual: int) -> None:
    """Its cross-attention rotates nothing. The norm behind the last add has a scale in another shape than the gate."""
    model, arguments = kandinsky5(text, visual)
    got, backend = compiled_model(model, arguments)
    assert torch.equal(got, run_model(model, arguments))
    adds = 2 * text - 1 + 3 * visual - 1  # no norm reads the text's last
    expected = {"qk_norm_rope": text + visual, "mul_add_norm_scale": adds, "norm_scale": 1}
    assert backend.report.counts() == expected | {"linear_gelu": text + visual}
    counts = missed(backend.report)
    assert counts["norm_tanh_mul_add", "INLINE"] == 1  # the embedding of the whole prompt
    assert counts["norm", "ALONE"] == 1 + 2 * visual
    assert not [kind for kind, _ in counts if kind.endswith("rope")]
    assert counts["residual_add", "ADDED"] == 1


def test_lumina_nexts_q_is_reported_and_its_k_of_one_head_is_fused() -> None:
    """Its norms are LayerNorms over all heads of q and, with a single head, of k."""
    layers = 2
    report = compiled_model(*lumina_next(layers))[1].report
    assert report.counts()["norm_rope"] == layers
    rows = [site for site in report.missed if ".attn1.norm_" in site.module or site.kind == "rope"]
    told = {(site.kind, site.reason_name, site.module.rpartition(".")[2]) for site in rows}
    assert told == {("norm_rope", "UNNORMED", "norm_q")}
    assert len(rows) == len({site.module for site in rows}) == layers  # one for each norm


def test_all_of_these_are_by_design() -> None:
    assert {Reason.ROTATION, Reason.ADDED, Reason.INLINE, Reason.UNNORMED} <= BY_DESIGN
