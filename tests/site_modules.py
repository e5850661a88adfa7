"""Modules that hold one site each, in every spelling that the pass should read, and mutants that it must refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

EPS = 1e-5
Norm = Callable[..., Tensor]


# --- norms, as model codes write them -------------------------------------------------------------------------------


def diffusers_norm(x: Tensor, weight: Tensor | None, eps: float = EPS) -> Tensor:
    """diffusers' RMSNorm: the product in fp32, cast to the weight's dtype, then the weight."""
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    n = x * torch.rsqrt(variance + eps)
    if weight is None:
        return n.to(x.dtype)
    return (n.to(weight.dtype) if weight.dtype != torch.float32 else n) * weight


def llama_norm(x: Tensor, weight: Tensor | None, eps: float = EPS) -> Tensor:
    """Llama's: everything on the fp32 copy, the weight on the left, eps on the left."""
    wide = x.to(torch.float32)
    n = (wide * torch.rsqrt(eps + (wide * wide).mean(dim=x.ndim - 1, keepdim=True))).to(x.dtype)
    return n if weight is None else weight * n


def torch_norm(x: Tensor, weight: Tensor | None, eps: float = EPS) -> Tensor:
    """torch.nn.RMSNorm's function."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def native_norm(x: Tensor, weight: Tensor | None, eps: float = EPS) -> Tensor:
    """Z-Image's own repository: every step in the model's dtype."""
    n = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return n if weight is None else n * weight


def squeezed_norm(x: Tensor, weight: Tensor | None, eps: float = EPS) -> Tensor:
    """keepdim as a later unsqueeze; the root as a power."""
    wide = x.float()
    rstd = torch.pow(torch.square(wide).mean(-1) + eps, -0.5).unsqueeze(-1)
    n = (rstd * wide).to(x.dtype)
    return n if weight is None else n * weight


def reciprocal_norm(x: Tensor, weight: Tensor | None, eps: float = EPS) -> Tensor:
    """1 / sqrt, whose last bit is another than that of rsqrt; the mean as a sum over the width."""
    wide = x.float()
    n = (wide * (1 / torch.sqrt(wide.pow(2).sum(-1, keepdim=True) / x.shape[-1] + eps))).to(x.dtype)
    return n if weight is None else n * weight


def quotient_norm(x: Tensor, weight: Tensor | None, eps: float = EPS) -> Tensor:
    """x / sqrt; the root as a power, keepdim as a later unsqueeze."""
    n = (x / ((x.float() ** 2).mean(-1) + eps).pow(0.5).unsqueeze(-1)).to(x.dtype)
    return n if weight is None else n * weight


def native_reciprocal_norm(x: Tensor, weight: Tensor | None, eps: float = EPS) -> Tensor:
    n = x * torch.reciprocal(torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps))
    return n if weight is None else n * weight


def eps_of_torch(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight)


def layer_norm(x: Tensor, weight: Tensor | None, eps: float = EPS) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, None, eps)


def wide_layer_norm(x: Tensor, weight: Tensor | None, eps: float = EPS) -> Tensor:
    """diffusers' FP32LayerNorm, with a bias, here the weight again."""
    row = None if weight is None else weight.float()
    return F.layer_norm(x.float(), (x.shape[-1],), row, row, eps).to(x.dtype)


LAYER_NORMS: tuple[Norm, ...] = (layer_norm, wide_layer_norm)
ROOTS: tuple[Norm, ...] = (reciprocal_norm, quotient_norm, native_reciprocal_norm)
NORMS: tuple[Norm, ...] = (diffusers_norm, llama_norm, torch_norm, native_norm, squeezed_norm, *ROOTS, *LAYER_NORMS)
FORM_OF: dict[Norm, str] = {
    torch_norm: "weight_then_cast",
    wide_layer_norm: "weight_then_cast",
    native_norm: "native",
    native_reciprocal_norm: "native",
}


# --- a site ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """One site: what it holds, how it is spelled, what its operands look like."""

    norm: Norm = diffusers_norm
    weight: bool = True
    add: bool = True  # is there a first norm, which is added to the residual?
    gate: str | None = "tanh"  # tanh, given or None
    gate_shape: str = "batch"
    second: bool = True  # is there a second norm, of y?
    scale: str | None = "one_plus"  # one_plus, given or None
    scale_shape: str = "batch"
    swapped: tuple[bool, bool, bool, bool] = (
        False,
        False,
        False,
        False,
    )  # operands of gate*n, residual+p, n*s, 1+scale
    batch: int = 2
    tokens: int = 6
    width: int = 32
    rank: int = 3
    layout: str = "contiguous"
    dtype: torch.dtype = torch.bfloat16
    expanded: bool = False  # gate and scale are expanded to the shape of x
    extra_user: str | None = None  # y, z or n: who else is read
    as_rows: tuple[bool, bool, bool] = (False, False, False)  # first norm, sum, second norm: on [rows, width]?

    def kind(self) -> str | None:
        """The op that the site becomes. If a first norm is read elsewhere, only its add is fused with the second."""
        if self.add and self.extra_user != "n":
            return "norm_tanh_mul_add_norm_scale" if self.second else "norm_tanh_mul_add"
        if self.add and self.second:
            return "mul_add_norm_scale"
        return "norm_scale" if self.second and self.scale is not None else None

    def form(self) -> str:
        """The rounding form that the report names."""
        if self.dtype == torch.float32 or (not self.weight and self.norm is torch_norm):
            return "cast_then_weight"
        return FORM_OF.get(self.norm, "cast_then_weight")

    def shape(self) -> tuple[int, ...]:
        return {
            2: (self.batch * self.tokens, self.width),
            3: (self.batch, self.tokens, self.width),
            4: (self.batch, 2, self.tokens, self.width),
        }[self.rank]


class SiteModule(nn.Module):
    """x, residual, gate, scale -> the results of the site."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.eps = EPS
        shape, dtype = (spec.width,), spec.dtype
        self.weight = nn.Parameter(torch.randn(shape).to(dtype)) if spec.weight else None
        self.weight2 = nn.Parameter(torch.randn(shape).to(dtype)) if spec.weight else None

    def forward(self, x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        spec = self.spec
        results = []
        y = x
        if spec.add:
            p = n = spec.norm(_rows(x, spec.as_rows[0]), self.weight, self.eps).view(x.shape)
            if spec.gate is not None:
                t = gate.tanh() if spec.gate == "tanh" else gate
                t = t.expand_as(x) if spec.expanded else t
                p = n * t if spec.swapped[0] else t * n
            p, residual = _rows(p, spec.as_rows[1]), _rows(residual, spec.as_rows[1])
            y = (p + residual if spec.swapped[1] else residual + p).view(x.shape)
            results.append(y)
            if spec.extra_user == "n":
                results.append(n * 2)
            if spec.extra_user == "y":
                results.append(y * 2)
        if spec.second:
            weight = self.weight2 if spec.add else self.weight
            z = n2 = spec.norm(_rows(y, spec.as_rows[2]), weight, self.eps).view(x.shape)
            if spec.scale is not None:
                s = scale
                if spec.scale == "one_plus":
                    s = 1 + scale if spec.swapped[3] else scale + 1.0
                s = s.expand_as(x) if spec.expanded else s
                z = s * n2 if spec.swapped[2] else n2 * s
            results.append(z)
            if spec.extra_user == "z":
                results.append(z * 2)
        return tuple(results)


def _rows(t: Tensor, wanted: bool) -> Tensor:
    return t.reshape(-1, t.shape[-1]) if wanted else t


def _operand(shape: tuple[int, ...], like: str, dtype: torch.dtype) -> Tensor:
    """A gate or scale that broadcasts to `shape`."""
    width = shape[-1]
    lead = (*(shape[:1] if len(shape) > 2 else ()), *(1,) * (len(shape) - 1 - (len(shape) > 2)))
    if like == "chunk":  # the second of four chunks: batch stride 4 * D, as Z-Image's
        return torch.randn(*lead, 4 * width).to(dtype).chunk(4, dim=-1)[1]
    shapes = {
        "row": (width,),
        "ones": (1,) * (len(shape) - 1) + (width,),
        "batch": (*lead, width),
        "token": shape,
        "element": (1,),
        "0-d": (),
    }
    return torch.randn(shapes[like]).to(dtype)


def inputs(spec: Spec, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    shape, dtype = spec.shape(), spec.dtype
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    if spec.layout == "transposed" and len(shape) > 2:
        x = x.transpose(0, -2).contiguous().transpose(0, -2)
    if spec.layout == "sliced":
        x = torch.randn(*shape[:-1], shape[-1] + 8).to(dtype)[..., 8:]
    if spec.layout == "strided":
        x = torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2]
    operands = (x, residual, _operand(shape, spec.gate_shape, dtype), _operand(shape, spec.scale_shape, dtype))
    for operand in operands:  # the model's width is static, whatever else is dynamic
        if operand.ndim:
            torch._dynamo.mark_static(operand, operand.ndim - 1)
    return operands


SHAPES = ("row", "ones", "batch", "token", "element", "0-d", "chunk")


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """norm form x gate form x scale form x operand order x dtype x shapes x broadcast x strides x extra users."""
    spec = Spec(
        norm=draw(st.sampled_from(NORMS)),
        weight=draw(st.booleans()),
        add=draw(st.sampled_from((True, True, False))),
        gate=draw(st.sampled_from(("tanh", "given", None))),
        gate_shape=draw(st.sampled_from(SHAPES)),
        second=draw(st.sampled_from((True, True, False))),
        scale=draw(st.sampled_from(("one_plus", "given", None))),
        scale_shape=draw(st.sampled_from(SHAPES)),
        swapped=draw(st.tuples(*[st.booleans()] * 4)),
        batch=draw(st.integers(2, 3)),
        tokens=draw(st.integers(5, 7)),  # as [rows, width], more rows than those that are left to Inductor
        width=draw(st.sampled_from((8, 30, 64, 129))),
        rank=draw(st.sampled_from((2, 3, 3, 3, 4))),
        layout=draw(st.sampled_from(("contiguous", "transposed", "sliced", "strided"))),
        dtype=draw(st.sampled_from((torch.bfloat16, torch.float16, torch.float32))),
        expanded=draw(st.booleans()),
        extra_user=draw(st.sampled_from((None, None, "y", "z", "n"))),
        as_rows=draw(st.sampled_from(((False,) * 3,) * 3) | st.tuples(*[st.booleans()] * 3)),
    )
    # What PyTorch decomposes F.layer_norm into is not bit-equal to it, nor is the rsqrt that torch 2.14 makes of other
    # roots: every such norm must be part of a fused site.
    if spec.norm in (*LAYER_NORMS, *ROOTS):
        scale = "one_plus" if spec.scale is None and not spec.add else spec.scale
        spec = replace(spec, extra_user=None if spec.extra_user == "n" else spec.extra_user, scale=scale)
        spec = replace(spec, second=spec.second or not spec.add)
    # A [D] operand that multiplies a norm without a weight is its weight.
    if not spec.weight and spec.gate == "given" and spec.gate_shape == "row":
        spec = replace(spec, gate="tanh")
    if not spec.weight and spec.scale == "given" and spec.scale_shape == "row":
        spec = replace(spec, scale="one_plus")
    return spec


# --- mutants: near to a site, and none ------------------------------------------------------------------------------


def _gated(n: Tensor, residual: Tensor, gate: Tensor) -> Tensor:
    return residual + gate.tanh() * n


def mean_over_another_dimension(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    wide = x.float()
    return _gated((wide * torch.rsqrt(wide.pow(2).mean(-2, keepdim=True) + EPS)).to(x.dtype), residual, gate)


def mean_over_two_dimensions(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    wide = x.float()
    return _gated((wide * torch.rsqrt(wide.pow(2).mean((-2, -1), keepdim=True) + EPS)).to(x.dtype), residual, gate)


def sum_for_mean(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    wide = x.float()
    return _gated((wide * torch.rsqrt(wide.pow(2).sum(-1, keepdim=True) + EPS)).to(x.dtype), residual, gate)


def a_root_that_broadcasts_over_the_columns(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    square = x[0, :, : x.shape[1]].float()  # as many rows as columns: without keepdim, the shapes still fit
    n = square * torch.rsqrt(square.pow(2).mean(-1) + EPS)
    return _gated(n, residual[0, :, : x.shape[1]].float(), gate[0, :, : x.shape[1]].float())


def a_root_of_one_dimension_more(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    wide = x[:1, :1].float()
    n = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS).unsqueeze(-1)
    return _gated(n, residual[:1, :1].float(), gate[:1].float())


def the_root_is_rounded(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    rstd = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    return _gated(x * rstd.to(torch.float16).to(x.dtype), residual, gate)


def half_the_mean(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    wide = x.float()
    return _gated((wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) / 2 + EPS)).to(x.dtype), residual, gate)


def a_sum_over_another_number(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    wide = x.float()
    mean = wide.pow(2).sum(-1, keepdim=True) / (x.shape[-1] - 1)
    return _gated((wide * torch.rsqrt(mean + EPS)).to(x.dtype), residual, gate)


def a_root_that_is_divided_by_x(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    wide = x.float()
    return _gated((torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) / wide).to(x.dtype), residual, gate)


def another_tensor_is_divided_by_the_root(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    wide = x.float()
    n = (residual / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)
    return _gated(n, residual, gate)


def two_over_the_root(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    wide = x.float()
    return _gated((wide * (2 / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + EPS))).to(x.dtype), residual, gate)


def the_sum_is_an_addcmul(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(residual, gate.tanh(), diffusers_norm(x, None))


def a_0d_gate_of_another_dtype(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    return residual + gate[0, 0, 0].double().tanh() * diffusers_norm(x, None)


def all_of_x_is_measured(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x.float(), correction=0)
    return _gated(((x.float() - mean) * torch.rsqrt(variance + EPS)).to(x.dtype), residual, gate)


def a_vector_is_normalised(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    scalar = x[0, 0, 0].float()
    return residual + (scalar * torch.rsqrt(scalar.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype) * gate


def an_ungated_residual_is_subtracted(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    return residual - diffusers_norm(x, None)


def an_ungated_norm_with_a_factor(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    return torch.add(residual, diffusers_norm(x, None), alpha=2)


def an_ungated_residual_that_broadcasts(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    return residual[:, :1] + diffusers_norm(x, None)


def an_ungated_residual_that_broadcasts_x(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    return residual + diffusers_norm(x[:, :1], None)


def the_norm_is_added_to_itself(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    n = diffusers_norm(x, None)
    return n + n


def an_ungated_norm_is_used_elsewhere(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    n = diffusers_norm(x, None)
    return residual + n, n.sin()


def an_ungated_residual_depends_on_the_root(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    wide = x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return residual * rstd + (wide * rstd).to(x.dtype)


def _centred(x: Tensor, variance: Tensor, mean: Tensor) -> Tensor:
    return (x - mean) * torch.rsqrt(variance + EPS)


def a_layer_norm_by_hand(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    wide = x.float()
    return _gated(_centred(wide, *torch.var_mean(wide, -1, correction=0, keepdim=True)).to(x.dtype), residual, gate)


def a_layer_norm_of_the_sample_variance(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    wide = x.float()
    return _gated(_centred(wide, *torch.var_mean(wide, -1, keepdim=True)).to(x.dtype), residual, gate)


def a_layer_norm_that_does_not_subtract_the_mean(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    wide = x.float()
    variance, mean = torch.var_mean(wide, -1, correction=0, keepdim=True)
    return _gated((wide * torch.rsqrt(variance + EPS)).to(x.dtype), residual, gate + mean.to(x.dtype))


def a_layer_norm_over_two_dimensions(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    return _gated(F.layer_norm(x, x.shape[-2:]), residual, gate)


def cube_for_square(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    wide = x.float()
    return _gated((wide * torch.rsqrt(wide.pow(3).mean(-1, keepdim=True).abs() + EPS)).to(x.dtype), residual, gate)


def eps_outside_the_root(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    wide = x.float()
    return _gated((wide * (torch.rsqrt(wide.pow(2).mean(-1, keepdim=True)) + EPS)).to(x.dtype), residual, gate)


def eps_scaled(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    wide = x.float()
    mean = wide.pow(2).mean(-1, keepdim=True)
    return _gated((wide * torch.rsqrt(torch.add(mean, mean, alpha=2))).to(x.dtype), residual, gate)


def another_tensor_is_squared(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    rstd = torch.rsqrt(residual.float().pow(2).mean(-1, keepdim=True) + EPS)
    return _gated((x.float() * rstd).to(x.dtype), residual, gate)


def a_rounded_copy_is_squared(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    wide = x.float() * 1.37
    squared = wide.to(torch.bfloat16).float()
    return _gated((wide * torch.rsqrt(squared.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype), residual, gate)


def the_root_is_not_reciprocal(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    wide = x.float()
    return _gated((wide * torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype), residual, gate)


def the_root_is_added(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    wide = x.float()
    return _gated((wide + torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype), residual, gate)


def residual_of_another_shape(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    return _gated(diffusers_norm(x, None), residual[:1, :1], gate)


def residual_that_broadcasts_x(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    return _gated(diffusers_norm(x[:, :1], None), residual, gate)


def residual_is_subtracted(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    return residual - gate.tanh() * diffusers_norm(x, None)


def residual_with_a_factor(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    return torch.add(residual, gate.tanh() * diffusers_norm(x, None), alpha=2)


def the_norm_is_used_elsewhere(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    n = diffusers_norm(x, None)
    return _gated(n, residual, gate), n + 1


def the_root_is_used_elsewhere(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    rstd = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    return _gated((x * rstd).to(x.dtype), residual, gate), rstd


def the_product_is_used_elsewhere(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    p = gate.tanh() * diffusers_norm(x, None)
    return residual + p, p * 3


def the_gate_depends_on_the_norm(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    n = diffusers_norm(x, None)
    return residual + (gate * n.mean(-1, keepdim=True)).tanh() * n


def the_product_is_added_to_itself(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    p = gate.tanh() * diffusers_norm(x, None)
    return p + p


def a_sine_follows_the_scale(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    return (diffusers_norm(x, None) * (1 + scale)).sin()


def an_fp8_step(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    wide = x.float()
    n = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(torch.float8_e5m2).to(x.dtype)
    return _gated(n, residual, gate)


def a_double_precision_norm(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    wide = x.double()
    return _gated((wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype), residual, gate)


NEVER_FUSED = (
    mean_over_another_dimension,
    mean_over_two_dimensions,
    sum_for_mean,
    a_root_that_broadcasts_over_the_columns,
    a_root_of_one_dimension_more,
    the_root_is_rounded,
    half_the_mean,
    a_sum_over_another_number,
    a_root_that_is_divided_by_x,
    another_tensor_is_divided_by_the_root,
    two_over_the_root,
    the_sum_is_an_addcmul,
    a_0d_gate_of_another_dtype,
    all_of_x_is_measured,
    a_vector_is_normalised,
    an_ungated_residual_is_subtracted,
    an_ungated_norm_with_a_factor,
    an_ungated_residual_that_broadcasts,
    an_ungated_residual_that_broadcasts_x,
    the_norm_is_added_to_itself,
    an_ungated_norm_is_used_elsewhere,
    an_ungated_residual_depends_on_the_root,
    a_layer_norm_by_hand,
    a_layer_norm_of_the_sample_variance,
    a_layer_norm_that_does_not_subtract_the_mean,
    a_layer_norm_over_two_dimensions,
    cube_for_square,
    eps_outside_the_root,
    eps_scaled,
    another_tensor_is_squared,
    a_rounded_copy_is_squared,
    the_root_is_not_reciprocal,
    the_root_is_added,
    residual_of_another_shape,
    residual_that_broadcasts_x,
    residual_is_subtracted,
    the_norm_is_used_elsewhere,
    the_root_is_used_elsewhere,
    the_product_is_used_elsewhere,
    the_gate_depends_on_the_norm,
    the_product_is_added_to_itself,
    a_sine_follows_the_scale,
    an_fp8_step,
    a_double_precision_norm,
    residual_with_a_factor,
)

MUTANTS_BY_A_ROOT = (another_tensor_is_divided_by_the_root, two_over_the_root)
MUTANTS_BY_A_CAST = (a_rounded_copy_is_squared, the_root_is_rounded)


def the_scale_depends_on_y(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    y = _gated(diffusers_norm(x, None), residual, gate)
    return y, diffusers_norm(y, None) * (1 + y.mean(-2, keepdim=True))


def y_is_changed_before_the_second_norm(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    y = _gated(diffusers_norm(x, None), residual, gate) + 0.5
    return y, diffusers_norm(y, None) * (1 + scale)


def one_norm_is_a_layer_norm(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    y = _gated(layer_norm(x, None), residual, gate)
    return y, diffusers_norm(y, None) * (1 + scale)


def the_norms_differ_in_form(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    y = _gated(diffusers_norm(x, None), residual, gate)
    return y, native_norm(y, None) * (1 + scale)


def the_second_norm_is_computed_on(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """Nothing reads the second norm from memory, so Inductor keeps it inside its kernel."""
    y = _gated(diffusers_norm(x, None), residual, gate)
    return y, diffusers_norm(y, None).sin().exp()


def the_second_norm_is_shifted(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    y = residual + diffusers_norm(x, None)
    return y, diffusers_norm(y, None) + scale


def the_norms_differ_in_their_roots(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    y = _gated(reciprocal_norm(x, None), residual, gate)
    return y, diffusers_norm(y, None) * (1 + scale)


def gate_and_scale_are_met_in_other_shapes(
    x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor
) -> tuple[Tensor, ...]:
    y = _gated(diffusers_norm(x, None), residual, gate)
    return y, diffusers_norm(y, None).unflatten(1, (2, -1)) * (1 + scale[:, None])


TWO_SINGLES = (
    one_norm_is_a_layer_norm,
    the_scale_depends_on_y,
    y_is_changed_before_the_second_norm,
    the_norms_differ_in_form,
    the_norms_differ_in_their_roots,
    gate_and_scale_are_met_in_other_shapes,
)
