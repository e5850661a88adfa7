"""Norms of heads that are rotated by 2×2 matrices, or with addcmul_: ops, the rewritten graph, what must not match."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_modules import completed_half_rope
from graph_backend import GraphBackend, addcmul_decomposed, needs_casts, run
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matrix_rotations import (
    SPELLINGS,
    columns_added,
    columns_completed,
    matrices,
    products_summed,
)
from site_modules import EPS, diffusers_norm, llama_norm, native_norm, torch_norm
from test_lowering import is_direct
from torch import Tensor
from torch._inductor.utils import fresh_cache, run_and_get_code

from fusion_pass import Backend

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
B, S, H, DH, TEXT = 2, 6, 3, 16, 2
ops = torch.ops.dit_kernels

# --- the ops ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (BF16, FP16, FP32), ids=str)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_ops_compute_what_models_do(spelling: Callable[..., Tensor], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, weight = (torch.randn(shape).to(dtype) for shape in ((B, S, H, DH), (B, S, 1, DH), (DH,)))
    m = matrices(B, S, DH // 2)
    expected = [spelling(diffusers_norm(x, weight), m[:, :, None]) for x in (q, k)]
    options = dict(addcmul=spelling is columns_completed, rope_dtype=FP32, out_dtype=dtype)
    got = ops.qk_norm_rope(q, k, weight, weight, m.flatten(2), None, EPS, EPS, **options)
    assert all(map(torch.equal, got, expected))
    joined = ops.qk_norm_cat_rope(
        q[:, 2:], k[:, 2:], q[:, :2], k[:, :2], *4 * [weight], m.flatten(2), None, *4 * [EPS], **options
    )
    assert all(map(torch.equal, joined, expected))


@pytest.mark.parametrize("addcmul", (False, True))
def test_dispatcher_and_gradients_know_matrices(addcmul: bool) -> None:
    torch.manual_seed(0)
    args = torch.randn(B, S, H, 4), torch.randn(4), matrices(S, 2).flatten(1), None, EPS
    torch.library.opcheck(ops.norm_rope.default, args, {"addcmul": addcmul})
    wide = [t.double().requires_grad_() if isinstance(t, Tensor) else t for t in args]
    assert torch.autograd.gradcheck(lambda *a: ops.norm_rope(*a, addcmul=addcmul), wide)


COMPLEX = torch.ones(S, DH // 2, dtype=torch.complex64)
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "as many numbers as cosines": (lambda: rope(torch.zeros(S, DH)), r"rotation.shape is \[6, 16\], expected .* of 32"),
    "matrices with sines": (lambda: rope(torch.zeros(S, 2 * DH), torch.zeros(S, 2 * DH)), "rotation.shape is"),
    "matrices of halves": (lambda: rope(torch.zeros(S, 2 * DH), interleaved=False), "interleaved is False"),
    "complex numbers with addcmul": (lambda: rope(COMPLEX, addcmul=True), "addcmul is True, expected False with"),
}


def rope(rotation: Tensor, sin: Tensor | None = None, **options: Any) -> Any:
    return ops.norm_rope(torch.zeros(B, S, H, DH), None, rotation, sin, EPS, **options)


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_a_bad_rotation_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# --- the pass ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """How q and k are normed and rotated. swapped: where tokens and heads are swapped, as in RopeSpec. joined: are the
    heads of two streams joined before the rotation?"""

    norm: Callable[..., Tensor] = torch_norm
    rotate: Callable[..., Tensor] = columns_added
    swapped: str = "before"
    joined: bool = False
    dtype: torch.dtype = BF16
    table: torch.dtype = FP32
    for_each: bool = False

    def model(self, q: Tensor, k: Tensor, weight: Tensor, *turning: Tensor) -> Tensor:
        q, k = self.rotated(q, weight, *turning), self.rotated(k, weight, *turning)
        return F.scaled_dot_product_attention(q, k, k)

    def rotated(self, x: Tensor, weight: Tensor, *turning: Tensor) -> Tensor:
        x = x.transpose(1, 2) if self.swapped == "before" else x
        streams = x.split((TEXT, S - TEXT), 2 if self.swapped == "before" else 1) if self.joined else (x,)
        normed = [self.norm(part, weight + i) for i, part in enumerate(streams)]
        normed = [n.transpose(1, 2) if self.swapped == "between" else n for n in normed]
        n = torch.cat(normed, 1 if self.swapped == "behind" else 2) if self.joined else normed[0]
        out = self.rotate(n, *(t.unsqueeze(2 if self.swapped == "behind" else 1) for t in turning))
        return out.transpose(1, 2) if self.swapped == "behind" else out

    def inputs(self) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        q, k = torch.randn(2, B, S, H, DH).to(self.dtype)
        m = matrices(B if self.for_each else 1, S, DH // 2, dtype=self.table)
        for t in (q, k):
            torch._dynamo.mark_static(t, 2)
            torch._dynamo.mark_static(t, 3)
        for dim in (2, 3, 4):
            torch._dynamo.mark_static(m, dim)
        return q, k, torch.randn(DH).to(self.dtype), m


def fused(spec: Spec, **options: Any) -> GraphBackend:
    """The backend after a run in which q and k were fused and the result was eager's."""
    args = spec.inputs()
    got, backend = run(spec.model, *args, strict=True, **options)
    assert torch.equal(got, spec.model(*args))
    assert backend.report.counts() == {"qk_norm_cat_rope" if spec.joined else "qk_norm_rope": 1}, backend.report
    assert not backend.report.missed
    return backend


@needs_casts
@settings(max_examples=5)
@given(
    norm=st.sampled_from((torch_norm, diffusers_norm, llama_norm, native_norm)),
    rotate=st.sampled_from(SPELLINGS),
    swapped=st.sampled_from(("before", "between", "behind")),
    joined=st.booleans(),
    dtype=st.sampled_from((BF16, FP16, FP32)),
    own_dtype=st.booleans(),
    for_each=st.booleans(),
    dynamic=st.sampled_from((False, False, True)),
    decomposed=st.booleans(),
)
@example(torch_norm, columns_completed, "before", True, BF16, False, False, False, True)
def test_every_spelling_is_fused_and_the_result_is_eagers(
    norm, rotate, swapped, joined, dtype, own_dtype, for_each, dynamic, decomposed
) -> None:
    if norm is native_norm and swapped == "before":
        return  # a CPU sums rows that lie apart in another order, which a mean of 16 bits shows
    table = dtype if own_dtype else FP32
    # In 16 bits the decomposition casts to fp32 and back, which is not recognised.
    with addcmul_decomposed(decomposed and table is FP32):
        fused(Spec(norm, rotate, swapped, joined, dtype, table, for_each), dynamic=dynamic)


@needs_casts
@pytest.mark.parametrize("rotate", (columns_added, columns_completed))
def test_the_streams_of_official_flux_are_one_op_that_reads_the_matrices_in_place(rotate) -> None:
    backend = fused(Spec(rotate=rotate, joined=True))
    (graph,) = backend.graphs
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    kinds = ("split", "getitem", "add", "permute", "unsqueeze", "reshape", "qk_norm_cat_rope", "scaled_dot_product")
    assert all(any(kind in str(node.target) for kind in kinds) for node in calls), calls
    (call,) = (node for node in calls if "qk_norm_cat_rope" in str(node.target))
    assert call.kwargs["addcmul"] == (rotate is columns_completed)


def test_matrices_that_lie_apart_in_memory_are_copied_once() -> None:
    def model(q: Tensor, k: Tensor, weight: Tensor, apart: Tensor) -> Tensor:
        m = apart.permute(2, 3, 4, 0, 1).unsqueeze(2)
        q = products_summed(diffusers_norm(q, weight), m).transpose(1, 2)
        k = products_summed(diffusers_norm((q @ q.mT).mean() + k, weight), m).transpose(1, 2)
        return q @ k.mT

    *args, m = Spec().inputs()
    args.append(m.permute(3, 4, 0, 1, 2).contiguous())
    got, backend = run(model, *args)
    assert torch.equal(got, model(*args))
    assert backend.report.counts() == {"norm_rope": 2}
    clones = backend.graphs[0].graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default)
    assert [node.meta["val"].ndim for node in clones].count(6) == 1


@needs_casts
@pytest.mark.parametrize("swapped", ("behind", "before"))
@pytest.mark.parametrize("joined", (False, True))
def test_cosines_and_sines_with_addcmul_are_fused(swapped: str, joined: bool) -> None:
    """LTX-2's spelling, after a norm of each head."""
    spec = Spec(rotate=completed_half_rope, swapped=swapped, joined=joined)
    *operands, _ = spec.inputs()
    args = (*operands, *torch.randn(2, 1, S, DH // 2))
    got, backend = run(spec.model, *args, strict=True)
    assert torch.equal(got, spec.model(*args))
    assert backend.report.counts() == {"qk_norm_cat_rope" if joined else "qk_norm_rope": 1}


# --- what must not match ----------------------------------------------------------------------------------------------


def pairs_of(x: Tensor) -> Tensor:
    return x.float().reshape(*x.shape[:-1], -1, 1, 2)


def flat(pairs: Tensor, x: Tensor) -> Tensor:
    return pairs.reshape(*x.shape).type_as(x)


def swapped_columns(x: Tensor, m: Tensor) -> Tensor:
    p = pairs_of(x)
    return flat(m[..., 1] * p[..., 0] + m[..., 0] * p[..., 1], x)


def one_column_twice(x: Tensor, m: Tensor) -> Tensor:
    p = pairs_of(x)
    return flat(m[..., 0] * p[..., 0] + m[..., 0] * p[..., 0], x)


def transposed_matrices(x: Tensor, m: Tensor) -> Tensor:
    p = pairs_of(x)
    return flat(m[..., 0, :] * p[..., 0] + m[..., 1, :] * p[..., 1], x)


def a_sum_over_rows(x: Tensor, m: Tensor) -> Tensor:
    return flat((m * pairs_of(x)).sum(-2), x)


def columns_of_pairs(x: Tensor, m: Tensor) -> Tensor:
    return flat((m * pairs_of(x).mT).sum(-1), x)


def halves_for_neighbours(x: Tensor, m: Tensor) -> Tensor:
    p = x.float().unflatten(-1, (2, -1)).mT.unsqueeze(-2)
    return flat(m[..., 0] * p[..., 0] + m[..., 1] * p[..., 1], x)


def a_sum_with_a_factor(x: Tensor, m: Tensor) -> Tensor:
    p = pairs_of(x)
    return flat(torch.add(m[..., 0] * p[..., 0], m[..., 1] * p[..., 1], alpha=2), x)


def addcmul_with_a_factor(x: Tensor, m: Tensor) -> Tensor:
    p = pairs_of(x)
    return flat((m[..., 0] * p[..., 0]).addcmul_(m[..., 1], p[..., 1], value=2), x)


def a_half_of_another_tensor(x: Tensor, m: Tensor) -> Tensor:
    p, other = pairs_of(x), pairs_of(x.flip(2))
    return flat(m[..., 0] * p[..., 0] + m[..., 1] * other[..., 1], x)


def a_column_of_another_table(x: Tensor, m: Tensor) -> Tensor:
    p = pairs_of(x)
    return flat(m[..., 0] * p[..., 0] + (m * 2)[..., 1] * p[..., 1], x)


def results_that_are_not_put_together(x: Tensor, m: Tensor) -> Tensor:
    return flat((m * pairs_of(x)).sum(-1).mT.contiguous(), x)


def addcmul_that_rounds_the_other_product(x: Tensor, m: Tensor) -> Tensor:
    p = pairs_of(x)
    return flat((m[..., 1] * p[..., 1]).addcmul_(m[..., 0], p[..., 0]), x)


def a_product_that_is_rounded(x: Tensor, m: Tensor) -> Tensor:
    p, narrow = pairs_of(x), x.reshape(*x.shape[:-1], -1, 1, 2)
    return flat(m[..., 0] * p[..., 0] + m.to(x.dtype)[..., 1] * narrow[..., 1], x)


def a_sum_in_fp64(x: Tensor, m: Tensor) -> Tensor:
    return flat((m * pairs_of(x)).sum(-1, dtype=torch.float64), x)


def matrices_of_fp64(x: Tensor, m: Tensor) -> Tensor:
    return products_summed(x, m.double())


def matrices_of_each_head(x: Tensor, m: Tensor) -> Tensor:
    return products_summed(x, m * torch.arange(1.0, H + 1)[:, None, None, None])


def matrices_of_the_first_token(x: Tensor, m: Tensor) -> Tensor:
    return products_summed(x, m[:, :1])


def matrices_of_no_token(x: Tensor, m: Tensor) -> Tensor:
    return products_summed(x, m[0, 0, 0])


NOT_READ = (
    swapped_columns,
    one_column_twice,
    transposed_matrices,
    a_sum_over_rows,
    columns_of_pairs,
    halves_for_neighbours,
    a_sum_with_a_factor,
    addcmul_with_a_factor,
    a_half_of_another_tensor,
    a_column_of_another_table,
    results_that_are_not_put_together,
    a_sum_in_fp64,
    a_product_that_is_rounded,
)
REFUSED = {
    addcmul_that_rounds_the_other_product: "ROUNDING",
    matrices_of_fp64: "DTYPE",
    matrices_of_each_head: "HEADS",
    matrices_of_the_first_token: "HEADS",
    matrices_of_no_token: "HEADS",
}


@needs_casts
@pytest.mark.parametrize("rotate", (*NOT_READ, *REFUSED), ids=lambda f: f.__name__)
def test_what_no_op_computes_is_not_fused(rotate: Callable[..., Tensor]) -> None:
    (q, _, weight, m) = Spec().inputs()

    def model(q: Tensor, weight: Tensor, m: Tensor) -> Tensor:
        out = rotate(diffusers_norm(q, weight), m[:, :, None]).transpose(1, 2)
        return out @ out.mT

    got, backend = run(model, q, weight, m)
    assert torch.equal(got, model(q, weight, m))
    assert not backend.report.fused
    (row,) = backend.report.missed
    expected = ("norm_rope", REFUSED[rotate]) if rotate in REFUSED else ("norm", "ALONE")
    assert (row.kind, row.reason_name) == expected


def read_elsewhere(x: Tensor, weight: Tensor, m: Tensor) -> Any:
    n = diffusers_norm(x, weight)
    return products_summed(n, m), n


def pairs_that_are_read_elsewhere(x: Tensor, weight: Tensor, m: Tensor) -> Any:
    n = diffusers_norm(x, weight)
    p = pairs_of(n)
    return flat(m[..., 0] * p[..., 0] + m[..., 1] * p[..., 1], n), p[..., 0]


def a_product_that_is_read_elsewhere(x: Tensor, weight: Tensor, m: Tensor) -> Any:
    n = diffusers_norm(x, weight)
    product = m * pairs_of(n)
    return flat(product.sum(-1), n), product


ELSEWHERE = (read_elsewhere, pairs_that_are_read_elsewhere, a_product_that_is_read_elsewhere)


@pytest.mark.parametrize("rotate", ELSEWHERE, ids=lambda f: f.__name__)
def test_values_that_are_read_elsewhere_stay(rotate: Callable[..., Any]) -> None:
    (q, _, weight, m) = Spec().inputs()

    def model(q: Tensor, weight: Tensor, m: Tensor) -> Any:
        out, shown = rotate(q, weight, m[:, :, None])
        return out.transpose(1, 2) @ out.transpose(1, 2).mT, shown

    got, backend = run(model, q, weight, m)
    assert all(map(torch.equal, got, model(q, weight, m)))
    assert [site.reason_name for site in backend.report.missed] == ["ESCAPES"]


def test_matrices_that_change_between_q_and_k_are_two_rotations() -> None:
    def model(q: Tensor, k: Tensor, weight: Tensor, m: Tensor) -> Tensor:
        q = products_summed(diffusers_norm(q, weight), m[:, :, None])
        m.mul_(-1)
        k = products_summed(diffusers_norm(k, weight), m[:, :, None])
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, k)))

    *args, m = Spec().inputs()
    expected = model(*args, m.clone())
    got, backend = run(model, *args, m.clone())
    assert torch.equal(got, expected)
    assert "qk_norm_rope" not in backend.report.counts()


@needs_casts
def test_q_and_k_that_round_differently_are_two_sites() -> None:
    def model(q: Tensor, k: Tensor, weight: Tensor, m: Tensor) -> Tensor:
        q = columns_added(diffusers_norm(q, weight), m[:, :, None])
        k = columns_completed(diffusers_norm(k, weight), m[:, :, None])
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, k)))

    args = Spec().inputs()
    got, backend = run(model, *args)
    assert torch.equal(got, model(*args))
    assert backend.report.counts() == {"norm_rope": 2}


def test_after_a_norm_over_all_heads_the_reason_is_named() -> None:
    """HiDream has such a norm. One row for each rotation."""

    def model(x: Tensor, m: Tensor) -> Tensor:
        q = columns_added(torch_norm(x, None).unflatten(-1, (H, -1)), m[:, :, None]).transpose(1, 2)
        return q @ q.mT

    *_, m = Spec().inputs()
    x = torch.randn(B, S, H * DH).bfloat16()
    got, backend = run(model, x, m)
    assert torch.equal(got, run(model, x, m, fuse=False)[0])
    assert not backend.report.fused
    assert [site.reason_name for site in backend.report.missed] == ["ROTATION"]
    assert "by 2×2 matrices, after a norm over all heads" in backend.report.missed[0].reason


def test_after_a_layer_norm_of_each_head_the_rotation_is_fused() -> None:
    def model(x: Tensor, m: Tensor) -> Tensor:
        n = F.layer_norm(x.unflatten(-1, (H, -1)), (DH,))
        q = columns_added(n, m[:, :, None]).transpose(1, 2)
        return q @ q.mT

    *_, m = Spec().inputs()
    x = torch.randn(B, S, H * DH).bfloat16()
    got, backend = run(model, x, m)
    assert torch.equal(got, model(x, m))
    assert backend.report.counts() == {"norm_rope": 1}


# --- models -----------------------------------------------------------------------------------------------------------


def table_of(positions: Tensor, *dims: int) -> Tensor:
    """The official FLUX's rope and EmbedND: [1, 1, S, Dh / 2, 2, 2]."""
    axes = []
    for axis, dim in zip(positions.unbind(-1), dims, strict=True):
        omega = 1.0 / 10_000 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        out = axis[..., None] * omega
        out = torch.stack([torch.cos(out), -torch.sin(out), torch.sin(out), torch.cos(out)], dim=-1)
        axes.append(out.unflatten(-1, (2, 2)).float())
    return torch.cat(axes, dim=-3)[None, None]


def official_norm(x: Tensor, scale: Tensor) -> Tensor:
    wide = x.float()
    rrms = torch.rsqrt(torch.mean(wide**2, dim=-1, keepdim=True) + 1e-6)
    return (wide * rrms).to(dtype=x.dtype) * scale


def flux(image: Tensor, text: Tensor, ids: Tensor, weights: Tensor, rotate: Callable[..., Tensor]) -> Tensor:
    """The attention of a double block and of a single block, [B, H, S, Dh] throughout. weights: three [D, 3 * D] of the
    projections, whose first rows hold the scales of the norms."""
    pe = table_of(ids, 4, 6, 6)

    def projected(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (x @ weight).unflatten(-1, (3, H, DH)).permute(2, 0, 3, 1, 4)
        return official_norm(q, weight[0, :DH]).to(v), official_norm(k, weight[1, :DH]).to(v), v

    streams = projected(text, weights[0]), projected(image, weights[1])
    q, k, v = (torch.cat(parts, dim=2) for parts in zip(*streams, strict=True))
    x = F.scaled_dot_product_attention(rotate(q, pe), rotate(k, pe), v).transpose(1, 2).flatten(2)
    q, k, v = projected(x, weights[2])
    return F.scaled_dot_product_attention(rotate(q, pe), rotate(k, pe), v)


def flux_inputs() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    d = H * DH
    image, text, weights = torch.randn(B, S, d), torch.randn(B, TEXT, d), torch.randn(3, d, 3 * d)
    ids = torch.randint(9, (TEXT + S, 3)).double()
    return image.to(BF16), text.to(BF16), ids, (weights / 4).to(BF16)


@needs_casts
@pytest.mark.parametrize("rotate", (columns_added, columns_completed))
def test_official_fluxs_blocks_are_fused_whoever_rotates(rotate: Callable[..., Tensor]) -> None:
    """Also ComfyUI's. The matrices are computed in the graph, once for both blocks."""
    args = flux_inputs()
    got, backend = run(flux, *args, rotate, strict=True)
    assert torch.equal(got, flux(*args, rotate))
    assert backend.report.counts() == {"qk_norm_cat_rope": 1, "qk_norm_rope": 1}


@needs_casts
def test_compiled_code_calls_the_kernel_directly() -> None:
    spec = Spec(rotate=columns_completed, joined=True)
    args = spec.inputs()
    with fresh_cache(), torch.no_grad():
        got, codes = run_and_get_code(torch.compile(spec.model, backend=Backend(kernels="reference")), *args)
    assert is_direct("\n".join(codes)) and "qk_norm_cat_rope" in "\n".join(codes)
    assert torch.equal(got, spec.model(*args))
