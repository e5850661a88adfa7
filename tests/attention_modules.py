"""Modules that hold one rotated norm or one SwiGLU each, in the spellings that the pass should read, and mutants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from graph_backend import CASTS_ARE_KEPT
from hypothesis import strategies as st
from site_modules import EPS, diffusers_norm, llama_norm, native_norm, squeezed_norm, torch_norm
from torch import Tensor, nn

Norm = Callable[..., Tensor]
Rope = Callable[..., Tensor]
FORM_OF: dict[Norm, str] = {torch_norm: "weight_then_cast", native_norm: "native"}


# --- rotations, as model codes write them -----------------------------------------------------------------------------
# x [B, S, H, Dh]; the tables [1 or B, S, 1, Dh], of complex numbers [1 or B, S, 1, Dh / 2]. Or H before S.


def complex_rope(x: Tensor, freqs: Tensor, _: Tensor) -> Tensor:
    """diffusers' Lumina and Z-Image."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * freqs).flatten(3).type_as(x)


def reshaped_complex_rope(x: Tensor, freqs: Tensor, _: Tensor) -> Tensor:
    """The reshape before the cast."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2).float())
    return torch.view_as_real(pairs * freqs).reshape(x.shape).to(x.dtype)


def half_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Llama's and Ideogram 4's, in the model's dtype."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


def chunked_half_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """In fp32, the halves by chunk, operands the other way round."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (sin.float() * turned.float() + cos.float() * x.float()).to(x.dtype)


def unbound_half_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """diffusers' apply_rotary_emb(use_real_unbind_dim=-2)."""
    first, second = x.reshape(*x.shape[:-1], 2, -1).unbind(-2)
    turned = torch.cat([-second, first], dim=-1)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def neighbours_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """diffusers' apply_rotary_emb, as FLUX calls it."""
    first, second = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(3)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def wide_neighbours_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """JoyImage's: the pairs are taken from the fp32 copy."""
    first, second = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(3)
    return (x.float() * cos + turned * sin).type_as(x)


def strided_neighbours_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The pairs as slices with a step, in the model's dtype."""
    turned = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).reshape(x.shape)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


def pairwise_half_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """vLLM's and others': each half by itself, one cosine for a pair."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def pairwise_neighbours_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Mochi's, in fp32, both of a pair cast before they are put together."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    first, second = (even * cos - odd * sin).to(x.dtype), (even * sin + odd * cos).to(x.dtype)
    return torch.stack([first, second], dim=-1).flatten(-2)


def written_neighbours_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """diffusers' Wan: results are written into every second element, which casts them."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    out = torch.empty_like(x)
    out[..., 0::2] = first * cos - second * sin
    out[..., 1::2] = first * sin + second * cos
    return out.type_as(x)


def completed_half_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """diffusers' LTX-2: each half of the products is completed in place."""
    pairs = x.unflatten(-1, (2, -1)).float()
    first, second = pairs[..., :1, :], pairs[..., 1:, :]
    out = pairs * cos.unsqueeze(-2)
    out[..., :1, :].addcmul_(-sin.unsqueeze(-2), second)
    out[..., 1:, :].addcmul_(sin.unsqueeze(-2), first)
    return out.flatten(-2).to(x.dtype)


COMPLEX: tuple[Rope, ...] = (complex_rope, reshaped_complex_rope)
HALVES: tuple[Rope, ...] = (half_rope, chunked_half_rope, unbound_half_rope)
NEIGHBOURS: tuple[Rope, ...] = (neighbours_rope, wide_neighbours_rope, strided_neighbours_rope)
PAIRWISE: tuple[Rope, ...] = (pairwise_half_rope, pairwise_neighbours_rope, written_neighbours_rope)
ROPES = (*COMPLEX, *HALVES, *NEIGHBOURS, *PAIRWISE)


# --- a site -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RopeSpec:
    """q and k, or q alone, and how they are normed and turned."""

    norm: Norm = diffusers_norm
    weight: torch.dtype | None = torch.bfloat16
    rope: Rope = complex_rope
    pair: bool = True
    batch: int = 2
    tokens: int = 6
    heads: int = 3
    kv_heads: int = 3
    width: int = 16
    dtype: torch.dtype = torch.bfloat16
    table: torch.dtype = torch.complex64
    for_each: bool = False  # a table for each batch item?
    packed: bool = False  # are q and k views of one projection?
    swapped: str = "behind"  # where [B, S, H, Dh] becomes [B, H, S, Dh]: before the norm, between, or behind both
    shown: bool = False  # does the module also return what the attention reads of it?

    def kind(self) -> str:
        return "qk_norm_rope" if self.pair else "norm_rope"

    def form(self) -> str:
        """The rounding form that the report names."""
        if self.dtype == torch.float32 or (self.weight is None and self.norm is torch_norm):
            return "cast_then_weight"
        return FORM_OF.get(self.norm, "cast_then_weight")


class RopeModule(nn.Module):
    """q, k, two tables -> an attention of q and k, or q's part of it alone."""

    def __init__(self, spec: RopeSpec) -> None:
        super().__init__()
        self.spec = spec
        self.eps = EPS
        for name in ("q_weight", "k_weight"):
            weight = None if spec.weight is None else nn.Parameter(torch.randn(spec.width).to(spec.weight))
            self.register_parameter(name, weight)

    def forward(self, q: Tensor, k: Tensor, table: Tensor, sin: Tensor) -> Tensor | tuple[Tensor, ...]:
        spec = self.spec
        table, sin = (t.unsqueeze(2 if spec.swapped == "behind" else 1) for t in (table, sin))
        q = self.rotated(q, self.q_weight, table, sin)
        k = self.rotated(k, self.k_weight, table, sin) if spec.pair else k.transpose(1, 2).to(q.dtype)
        shown = (q, k) if spec.pair else (q,)
        if spec.kv_heads != spec.heads:
            k = k.repeat_interleave(spec.heads // spec.kv_heads, dim=1)
        attention = F.scaled_dot_product_attention(q, k, k)
        return (attention, *shown) if spec.shown else attention

    def rotated(self, x: Tensor, weight: Tensor | None, table: Tensor, sin: Tensor) -> Tensor:
        spec = self.spec
        x = x.transpose(1, 2) if spec.swapped == "before" else x
        n = spec.norm(x, weight, self.eps)
        n = n.transpose(1, 2) if spec.swapped == "between" else n
        out = spec.rope(n, table, sin)
        return out.transpose(1, 2) if spec.swapped == "behind" else out


def rope_inputs(spec: RopeSpec, seed: int = 0) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    heads = spec.heads + spec.kv_heads
    both = torch.randn(spec.batch, spec.tokens, heads, spec.width).to(spec.dtype)
    q, k = both.split((spec.heads, spec.kv_heads), dim=2)
    if not spec.packed:
        q, k = q.contiguous(), k.contiguous()
    angles = torch.randn(spec.batch if spec.for_each else 1, spec.tokens, spec.width // 2, dtype=torch.float64)
    if spec.rope in COMPLEX:
        table = torch.polar(torch.ones_like(angles), angles).to(spec.table)
        tables = (table, table.real)
    else:
        if spec.rope not in PAIRWISE:
            angles = torch.cat((angles, angles), -1) if spec.rope in HALVES else angles.repeat_interleave(2, -1)
        tables = (angles.cos().to(spec.table), angles.sin().to(spec.table))
    for t in (q, k, *tables):  # what a model's configuration fixes is static, whatever else is dynamic
        torch._dynamo.mark_static(t, t.ndim - 1)
    for t in (q, k):
        torch._dynamo.mark_static(t, 2)
    return q, k, *tables


@st.composite
def rope_specs(draw: st.DrawFn) -> RopeSpec:
    """norm form x spelling of the rotation x dtypes x heads x shapes x views of a packed projection."""
    dtype = draw(st.sampled_from((torch.bfloat16, torch.float16, torch.float32)))
    norm = draw(st.sampled_from((diffusers_norm, llama_norm, torch_norm, native_norm, squeezed_norm)))
    # A cast down that a cast up follows is gone in torch 2.11: then the graph is not the model's.
    cast_last = dtype != torch.float32 and not CASTS_ARE_KEPT
    if cast_last and norm is torch_norm:
        norm = native_norm
    wide_weight = norm in (diffusers_norm, torch_norm) and draw(st.booleans())
    rope = draw(st.sampled_from(ROPES))
    tables = (torch.complex64, torch.complex128) if rope in COMPLEX else (torch.float32, dtype)
    heads = draw(st.sampled_from((1, 2, 4)))
    # The results of F.rms_norm and of rstd * x are contiguous, and the layout shows in the last bit of a complex
    # product. A CPU sums rows that lie apart in another order, which a mean of 16 bits shows.
    in_place = norm is native_norm or (norm in (torch_norm, squeezed_norm) and rope in COMPLEX)
    swaps = ("behind", "between") if in_place else ("behind", "before", "between")
    return RopeSpec(
        norm=norm,
        weight=draw(st.sampled_from((torch.float32 if wide_weight else dtype, *([] if cast_last else [None])))),
        rope=rope,
        pair=draw(st.booleans()),
        batch=draw(st.integers(2, 3)),
        tokens=draw(st.integers(2, 7)),
        heads=heads,
        kv_heads=draw(st.sampled_from([n for n in (1, 2, 4) if n <= heads])),
        width=draw(st.sampled_from((4, 8, 64))),
        dtype=dtype,
        table=draw(st.sampled_from(tables)),
        for_each=draw(st.booleans()),
        packed=draw(st.booleans()),
        swapped=draw(st.sampled_from(swaps)),
    )


# --- mutants of q, k, cos, sin: near to a site, and none --------------------------------------------------------------


def _attend(q: Tensor, k: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, k)))


def _turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _rotate(x: Tensor, turned: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos[:, :, None] + turned * sin[:, :, None]


def the_halves_are_in_the_other_order(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    n = diffusers_norm(q, None)
    half = n.shape[-1] // 2
    return _attend(_rotate(n, torch.cat((n[..., :half], -n[..., half:]), dim=-1), cos, sin), k)


def the_other_half_is_negative(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    n = diffusers_norm(q, None)
    half = n.shape[-1] // 2
    return _attend(_rotate(n, torch.cat((n[..., half:], -n[..., :half]), dim=-1), cos, sin), k)


def the_parts_are_no_halves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    n = diffusers_norm(q, None)
    return _attend(_rotate(n, torch.cat((-n[..., 6:], n[..., :6]), dim=-1), cos, sin), k)


def the_parts_overlap(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    n = diffusers_norm(q, None)
    half = n.shape[-1] // 2
    return _attend(_rotate(n, torch.cat((-n[..., half - 1 : -1], n[..., :half]), dim=-1), cos, sin), k)


def neighbours_are_put_together_as_halves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    n = diffusers_norm(q, None)
    return _attend(_rotate(n, torch.cat((-n[..., 1::2], n[..., 0::2]), dim=-1), cos, sin), k)


def halves_are_put_together_as_neighbours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    n = diffusers_norm(q, None)
    first, second = n.chunk(2, dim=-1)
    return _attend(_rotate(n, torch.stack((-second, first), dim=-1).flatten(3), cos, sin), k)


def the_pairs_are_turned_back_by_one_of_two(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = diffusers_norm(q, None).chunk(2, dim=-1)
    cos, sin = cos[:, :, None, :8], sin[:, :, None, :8]
    return _attend(torch.cat((first * cos - second * sin, first * sin - second * cos), dim=-1), k)


def the_halves_of_a_pair_have_other_tables(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = diffusers_norm(q, None).chunk(2, dim=-1)
    cos, sin = cos[:, :, None, :8], sin[:, :, None, :8]
    return _attend(torch.cat((first * cos - second * sin, first * cos + second * sin), dim=-1), k)


def the_halves_of_a_pair_are_put_the_other_way_round(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = diffusers_norm(q, None).chunk(2, dim=-1)
    cos, sin = cos[:, :, None, :8], sin[:, :, None, :8]
    return _attend(torch.cat((first * sin + second * cos, first * cos - second * sin), dim=-1), k)


def the_heads_are_turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    n = diffusers_norm(q, None)
    half = n.shape[2] // 2
    return _attend(_rotate(n, torch.cat((-n[:, :, half:], n[:, :, :half]), dim=2), cos, sin), k)


def what_is_turned_is_not_what_is_added(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _attend(_rotate(q, _turned(diffusers_norm(k, None)), cos, sin), k)


def the_terms_are_subtracted(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    n = diffusers_norm(q, None)
    return _attend(n * cos[:, :, None] - _turned(n) * sin[:, :, None], k)


def a_term_has_a_factor(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    n = diffusers_norm(q, None)
    return _attend(torch.add(n * cos[:, :, None], _turned(n) * sin[:, :, None], alpha=2), k)


def a_table_for_the_other_axis(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    n = diffusers_norm(q, None)
    return _attend(n * cos[:, None] + _turned(n) * sin[:, None], k)


def a_table_for_each_head(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    n = diffusers_norm(q, None)
    cos, sin = (t[:, :, None] * torch.arange(1, 5).to(t.dtype)[:, None] for t in (cos, sin))
    return _attend(n * cos + _turned(n) * sin, k)


def one_row_for_all_tokens(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    n = diffusers_norm(q, None)
    return _attend(_rotate(n, _turned(n), cos[:, :1], sin[:, :1]), k)


def the_tables_differ_in_dtype(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    n = diffusers_norm(q, None).float()
    return _attend(_rotate(n, _turned(n), cos.float(), sin.half()), k.float())


def the_terms_are_rounded_otherwise_than_the_sum(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    n = diffusers_norm(q, None)
    return _attend((n.float() * cos[:, :, None] + _turned(n) * sin[:, :, None]).to(q.dtype), k)


def the_norm_is_read_elsewhere(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    n = diffusers_norm(q, None)
    return _attend(_rotate(n, _turned(n), cos, sin), k), n


def the_turned_pairs_are_read_elsewhere(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    n = diffusers_norm(q, None)
    turned = _turned(n)
    return _attend(_rotate(n, turned, cos, sin), k), turned


def the_table_is_computed_from_the_norm(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    n = diffusers_norm(q, None)
    cos = cos + n.mean((0, 2))
    return _attend(_rotate(n, _turned(n), cos, sin), k)


def the_mean_runs_over_two_dimensions(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = q.float()
    n = (wide * torch.rsqrt(wide.pow(2).mean((-2, -1), keepdim=True) + EPS)).to(q.dtype)
    return _attend(_rotate(n, _turned(n), cos, sin), k)


def a_layer_norm_is_turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = q.float()
    n = (wide - wide.mean(-1, keepdim=True)).to(q.dtype)
    return _attend(_rotate(n, _turned(n), cos, sin), k)


def nothing_is_normed(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _attend(_rotate(q, _turned(q), cos, sin), k)


def nothing_is_turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _attend(diffusers_norm(q, None), k)


def the_result_is_computed_on(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Nothing reads it from memory, so Inductor keeps it inside its kernel."""
    n = diffusers_norm(q, None)
    return _attend(_rotate(n, _turned(n), cos, sin).exp() + k, k)


def the_result_is_put_into_another_tensor(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Inductor writes it there itself; the op would write it twice, since it returns another shape."""
    n = diffusers_norm(q, None)
    both = torch.cat((_rotate(n, _turned(n), cos, sin).flatten(2), k.flatten(2)), dim=1)
    return both @ both.mT


def complex_numbers_are_divided(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    n = diffusers_norm(q, None)
    pairs = torch.view_as_complex(n.float().reshape(*n.shape[:-1], -1, 2))
    return _attend(torch.view_as_real(pairs / (cos[:, :, None, ::2].float() * 1j)).flatten(3).to(q.dtype), k)


def the_rotation_is_on_the_left(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """In the last bit, PyTorch's product of complex numbers does not commute."""
    n = diffusers_norm(q, None)
    pairs = torch.view_as_complex(n.float().reshape(*n.shape[:-1], -1, 2))
    table = torch.polar(cos[:, :, None, ::2].float().abs(), sin[:, :, None, ::2].float())
    return _attend(torch.view_as_real(table * pairs).flatten(3).to(q.dtype), k)


def complex_halves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    n = diffusers_norm(q, None)
    pairs = torch.view_as_complex(n.float().reshape(*n.shape[:-1], 2, -1).transpose(-1, -2).contiguous())
    table = torch.polar(cos[:, :, None, ::2].float().abs(), sin[:, :, None, ::2].float())
    return _attend(torch.view_as_real(pairs * table).flatten(3).to(q.dtype), k)


def a_complex_table_for_the_other_axis(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    n = diffusers_norm(q, None)
    pairs = torch.view_as_complex(n.float().reshape(*n.shape[:-1], -1, 2))
    table = torch.polar(cos[:, None, :, ::2].float().abs(), sin[:, None, :, ::2].float())
    return _attend(torch.view_as_real(pairs * table).flatten(3).to(q.dtype), k)


def a_table_that_is_reshaped_for_the_other_axis(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor):
    n = diffusers_norm(q, None)
    cos, sin = (t[0].unsqueeze(1).float().reshape(1, 1, *t.shape[1:]) for t in (cos, sin))
    return _attend((n.float() * cos + _turned(n).float() * sin).to(q.dtype), k)


OTHER_AXIS = (
    a_table_for_the_other_axis,
    a_complex_table_for_the_other_axis,
    a_table_that_is_reshaped_for_the_other_axis,
)
NEVER_TURNED = (
    the_halves_are_in_the_other_order,
    the_other_half_is_negative,
    the_parts_are_no_halves,
    the_parts_overlap,
    neighbours_are_put_together_as_halves,
    halves_are_put_together_as_neighbours,
    the_pairs_are_turned_back_by_one_of_two,
    the_halves_of_a_pair_have_other_tables,
    the_halves_of_a_pair_are_put_the_other_way_round,
    the_heads_are_turned,
    what_is_turned_is_not_what_is_added,
    the_terms_are_subtracted,
    a_term_has_a_factor,
    a_table_for_each_head,
    one_row_for_all_tokens,
    the_tables_differ_in_dtype,
    the_terms_are_rounded_otherwise_than_the_sum,
    the_norm_is_read_elsewhere,
    the_turned_pairs_are_read_elsewhere,
    the_table_is_computed_from_the_norm,
    the_mean_runs_over_two_dimensions,
    a_layer_norm_is_turned,
    nothing_is_normed,
    nothing_is_turned,
    the_result_is_computed_on,
    the_result_is_put_into_another_tensor,
    complex_numbers_are_divided,
    complex_halves,
    the_rotation_is_on_the_left,
)


def _roped(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    n = diffusers_norm(x, None)
    return _rotate(n, _turned(n), cos, sin)


def k_has_another_table(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _attend(_roped(q, cos, sin), _roped(k, cos, sin + 1))


def k_has_a_table_that_was_changed(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated = _roped(q, cos, sin)
    return _attend(rotated, _roped(k, cos, sin.cos()))


def k_is_turned_as_neighbours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    n = diffusers_norm(k, None)
    turned = torch.stack((-n[..., 1::2], n[..., 0::2]), dim=-1).flatten(3)
    return _attend(_roped(q, cos, sin), _rotate(n, turned, cos, sin))


def k_is_normed_in_another_form(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    n = native_norm(k, cos[0, 0])
    return _attend(_roped(q, cos, sin), _rotate(n, _turned(n), cos, sin))


def k_is_made_of_the_rotated_q(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    q = _roped(q, cos, sin)
    return _attend(q, _roped(q.mean(1, keepdim=True) + k, cos, sin))


def k_belongs_to_another_attention(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _attend(_roped(q, cos, sin), q) + _attend(k, _roped(k, cos, sin))


TWO_ALONE = (
    k_has_another_table,
    k_has_a_table_that_was_changed,
    k_is_turned_as_neighbours,
    k_is_made_of_the_rotated_q,
    k_belongs_to_another_attention,
)


# --- SwiGLU -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SiluSpec:
    swapped: bool = False  # b on the left
    packed: bool = False  # are a and b halves of one tensor?
    wide: bool = False  # is the silu cast up first, as where the model computes it in fp32?
    dtype: torch.dtype = torch.bfloat16
    b_dtype: torch.dtype = torch.bfloat16
    rank: int = 3
    tokens: int = 5
    width: int = 16


class SiluModule(nn.Module):
    """a, b -> silu(a) * b, read by a matmul."""

    def __init__(self, spec: SiluSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        s = F.silu(a.float() if self.spec.wide else a)
        product = b * s if self.spec.swapped else s * b
        return product.to(a.dtype) @ a.new_ones(self.spec.width, 2)


def silu_inputs(spec: SiluSpec, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    shape = (2, 3, spec.tokens, spec.width)[-spec.rank :]
    if spec.packed and spec.dtype == spec.b_dtype:
        a, b = torch.randn(*shape[:-1], 2 * spec.width).to(spec.dtype).chunk(2, dim=-1)
    else:
        a, b = torch.randn(shape).to(spec.dtype), torch.randn(shape).to(spec.b_dtype)
    return 4 * a, b


@st.composite
def silu_specs(draw: st.DrawFn) -> SiluSpec:
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    dtype = draw(st.sampled_from(dtypes))
    return SiluSpec(
        swapped=draw(st.booleans()),
        packed=draw(st.booleans()),
        wide=draw(st.booleans()),
        dtype=dtype,
        b_dtype=draw(st.sampled_from((dtype, dtype, torch.float32))),
        rank=draw(st.sampled_from((2, 3, 4))),
        tokens=draw(st.integers(2, 7)),
        width=draw(st.sampled_from((8, 30, 129))),
    )


def a_silu_of_something_else(a: Tensor, b: Tensor) -> Tensor:
    return (a / (1 + torch.exp(-b)) * b) @ a.mT


def the_exponential_is_not_negative(a: Tensor, b: Tensor) -> Tensor:
    return (a / (1 + torch.exp(a)) * b) @ a.mT


def two_for_one(a: Tensor, b: Tensor) -> Tensor:
    return (a / (2 + torch.exp(-a)) * b) @ a.mT


def a_gate_that_broadcasts(a: Tensor, b: Tensor) -> Tensor:
    return (F.silu(a) * b[:, :1]) @ a.mT


def a_silu_by_a_sigmoid(a: Tensor, b: Tensor) -> Tensor:
    return (a * torch.sigmoid(a) * b) @ a.mT


def a_silu_by_an_exponential(a: Tensor, b: Tensor) -> Tensor:
    return (a / (1 + torch.exp(-a)) * b) @ a.mT


def the_silu_is_viewed(a: Tensor, b: Tensor) -> Tensor:
    return ((F.silu(a).flatten(0, 1) * b.flatten(0, 1)) @ a[0].mT).unflatten(0, a.shape[:2])


def the_silu_is_read_elsewhere(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    s = F.silu(a)
    return (s * b) @ a.mT, s


def the_product_is_computed_on(a: Tensor, b: Tensor) -> Tensor:
    return (F.silu(a) * b + a).sin()


def a_silu_alone(a: Tensor, b: Tensor) -> Tensor:
    return F.silu(a) @ b.mT


NO_SWIGLU = {
    a_silu_of_something_else: [],
    the_exponential_is_not_negative: [],
    two_for_one: [],
    a_gate_that_broadcasts: [],
    a_silu_by_a_sigmoid: ["SILU"],
    a_silu_by_an_exponential: ["SILU"],
    the_silu_is_viewed: ["SHAPE"],
    the_silu_is_read_elsewhere: ["ESCAPES"],
    the_product_is_computed_on: ["INLINE"],
    a_silu_alone: [],
}
