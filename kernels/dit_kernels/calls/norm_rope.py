"""The norm of query and key heads with their rotation (RoPE): rotate(norm(q)), of q and k at once or of one of them.

q [B, S, H, Dh], k [B, S, Hk, Dh]; their norms' weights [Dh] or None. The rotation is the same for every head: complex
[S, Dh/2], or with `sin` the cosines [S, Dh] or [S, Dh/2]. In front may stand a dimension B or 1
for batch items, and behind S one of size 1 for heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dit_kernels import reference
from dit_kernels.calls.call import (
    DTYPES,
    KERNEL_DTYPES,
    Call,
    Family,
    Op,
    check_dtypes,
    check_eps,
    check_row,
    check_tensor,
    check_word,
    dense,
    dtype_of,
    launch_strides,
    number,
    reject,
    row,
    step_dtypes,
)
from dit_kernels.chain import RotatedChain
from dit_kernels.rounding import FORMS, ROOTS, rotated_steps

COMPLEX = (torch.complex64, torch.complex128)
HEAD_GRAIN, WIDEST_HEAD = 8, 512  # kernels take a Dh that is a multiple of the one, up to the other


@dataclass(slots=True)
class NormRopeCall(Call):
    """A call of an op of the family. Of norm_rope, x is q and there is no k."""

    chain: RotatedChain
    q: Tensor
    k: Tensor | None
    q_weight: Tensor | None
    k_weight: Tensor | None
    rotation: Tensor  # [B|1, S, 1, n], as is sin
    sin: Tensor | None
    q_eps: float | Tensor
    k_eps: float | Tensor

    def like(self) -> Tensor:
        return self.q

    def empty_results(self) -> tuple[Tensor, ...]:
        results = (self.q.new_empty(self.q.shape, dtype=self.chain.q.out),)
        if self.k is None or self.chain.k is None:
            return results
        return (*results, self.k.new_empty(self.k.shape, dtype=self.chain.k.out))

    def definition(self) -> tuple[Tensor, ...]:
        turning, interleaved = (self.rotation, self.sin), self.chain.interleaved
        q = reference.rotated(self.q, self.q_weight, *turning, self.q_eps, self.chain.q, interleaved)
        if self.k is None or self.chain.k is None:
            return (q.contiguous(),)
        k = reference.rotated(self.k, self.k_weight, *turning, self.k_eps, self.chain.k, interleaved)
        return q.contiguous(), k.contiguous()

    def fits_kernel(self) -> bool:
        d = self.q.shape[3]
        real = (self.q, self.k, self.q_weight, self.k_weight, self.sin)
        dtypes = {t.dtype for t in real if t is not None} | {self.rotation.dtype} - set(COMPLEX)
        for steps in (self.chain.q, self.chain.k):
            if steps is not None:  # a complex product may be fp64, other steps may not
                dtypes |= step_dtypes(replace(steps, product=steps.rotated) if self.sin is None else steps)
        return dtypes <= set(KERNEL_DTYPES) and d % HEAD_GRAIN == 0 and d <= WIDEST_HEAD

    def operands(self, results: tuple[Tensor, ...], read_eps: bool = True) -> tuple[Any, ...]:
        return (
            dense(self.q),
            None if self.k is None else dense(self.k),
            row(self.q_weight),
            row(self.k_weight),
            dense(self.rotation)[:, :, 0],
            None if self.sin is None else dense(self.sin)[:, :, 0],
            number(self.q_eps) if read_eps else 0.0,
            number(self.k_eps) if read_eps else 0.0,
            results[0],
            None if self.k is None else results[1],
        )


def launch_numbers(operands: Mapping[str, Any]) -> tuple[Any, ...]:
    """B, S, and strides in elements, 0 where an operand has one or is absent: of q and k by batch item, token and head;
    of rotation and sin (B|1, S, n) by batch item and token. Of tensors, or what else has a shape and stride()."""
    q, k, rotation, sin = (operands.get(name) for name in ("q", "k", "rotation", "sin"))
    strides = (*launch_strides(q, 3), *launch_strides(k, 3), *launch_strides(rotation), *launch_strides(sin))
    assert q is not None
    return (q.shape[0], q.shape[1], *strides)


FAMILY = Family(
    ("q", "k", "q_weight", "k_weight", "rotation", "sin", "q_eps", "k_eps", "q_out", "k_out"),
    {"q_out": "q", "k_out": "k"},
    launch_numbers,
)


# --- checking -------------------------------------------------------------------------------------------------------


def _check_heads(op: str, name: str, t: Tensor, like: Tensor, reference: str) -> None:
    if not isinstance(t, Tensor):
        reject(op, name, t, "a tensor [B, S, H, Dh]")
    check_tensor(op, name, t, like, reference)
    if t.ndim != 4 or t.shape[3] % 2:
        reject(op, f"{name}.shape", list(t.shape), "[B, S, H, Dh] with an even Dh")


def _check_same_tokens(op: str, q: Tensor, k: Tensor) -> None:
    b, s, _, d = q.shape
    if k.shape[0] != b or k.shape[1] != s or k.shape[3] != d:
        reject(op, "k.shape", list(k.shape), f"[{b}, {s}, Hk, {d}], as q")


def _rotation(op: str, x: Tensor, name: str, rotation: Tensor, sin: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """rotation and sin as [B|1, S, 1, n]; x is the argument `name`."""
    if not isinstance(rotation, Tensor):
        reject(op, "rotation", rotation, "a tensor: complex, or cosines")
    check_tensor(op, "rotation", rotation, x, name, COMPLEX if sin is None else DTYPES)
    d = x.shape[3]
    widths = (d // 2,) if sin is None else (d, d // 2)
    turning = _for_heads(op, "rotation", rotation, x, widths)
    if sin is None:
        return turning, None
    check_tensor(op, "sin", sin, x, name, (rotation.dtype,))
    return turning, _for_heads(op, "sin", sin, x, (turning.shape[3],))


def _for_heads(op: str, name: str, t: Tensor, x: Tensor, widths: tuple[int, ...]) -> Tensor:
    b, s = x.shape[:2]
    if t.ndim == 2:
        t = t[None, :, None]
    elif t.ndim == 3:
        t = t[:, :, None] if t.shape[1] == s else t[None]
    if t.ndim != 4 or t.shape[1] != s or t.shape[2] != 1 or t.shape[0] not in (1, b) or t.shape[3] not in widths:
        width = " or ".join(map(str, widths))
        reject(op, f"{name}.shape", list(t.shape), f"[{s}, {width}], [1 or {b}, {s}, {width}] or that with heads")
    return t


def _check_words(
    op: str, interleaved: bool, sin: Tensor | None, rounding: str, root: str, **dtypes: torch.dtype | None
) -> None:
    check_word(op, "rounding", rounding, FORMS)
    check_word(op, "root", root, ROOTS)
    check_dtypes(op, **dtypes)
    if sin is None and not interleaved:
        reject(op, "interleaved", interleaved, "True with a complex rotation, whose pairs are neighbours")


# --- arguments to a call --------------------------------------------------------------------------------------------


def _one_a_pair(turning: tuple[Tensor, Tensor | None], x: Tensor) -> bool:
    return bool(turning[0].shape[3] == x.shape[3] // 2)


_rotated_steps = lru_cache(maxsize=None)(rotated_steps)
_chain = lru_cache(maxsize=None)(RotatedChain)


def _norm_rope_call(
    x: Tensor,
    weight: Tensor | None,
    rotation: Tensor,
    sin: Tensor | None,
    eps: float | Tensor,
    *,
    interleaved: bool = True,
    rounding: str = "cast_then_weight",
    norm_dtype: torch.dtype | None = None,
    rope_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    root: str = "rsqrt",
) -> NormRopeCall:
    op = "norm_rope"
    dtypes = dict(norm_dtype=norm_dtype, rope_dtype=rope_dtype, out_dtype=out_dtype)
    _check_words(op, interleaved, sin, rounding, root, **dtypes)
    _check_heads(op, "x", x, x, "x")
    check_row(op, "weight", weight, x)
    turning = _rotation(op, x, "x", rotation, sin)
    check_eps(op, "eps", eps)
    steps = _rotated_steps(rounding, x.dtype, dtype_of(weight), rotation.dtype, root=root, **dtypes)
    return NormRopeCall(
        _chain(interleaved, _one_a_pair(turning, x), steps, None), x, None, weight, None, *turning, eps, 0.0
    )


def _qk_norm_rope_call(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rotation: Tensor,
    sin: Tensor | None,
    q_eps: float | Tensor,
    k_eps: float | Tensor,
    *,
    interleaved: bool = True,
    rounding: str = "cast_then_weight",
    norm_dtype: torch.dtype | None = None,
    rope_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    root: str = "rsqrt",
) -> NormRopeCall:
    op = "qk_norm_rope"
    dtypes = dict(norm_dtype=norm_dtype, rope_dtype=rope_dtype, out_dtype=out_dtype)
    _check_words(op, interleaved, sin, rounding, root, **dtypes)
    _check_heads(op, "q", q, q, "q")
    _check_heads(op, "k", k, q, "q")
    _check_same_tokens(op, q, k)
    check_row(op, "q_weight", q_weight, q, "q")
    check_row(op, "k_weight", k_weight, q, "q")
    turning = _rotation(op, q, "q", rotation, sin)
    check_eps(op, "q_eps", q_eps)
    check_eps(op, "k_eps", k_eps)
    of_q = _rotated_steps(rounding, q.dtype, dtype_of(q_weight), rotation.dtype, root=root, **dtypes)
    of_k = _rotated_steps(rounding, k.dtype, dtype_of(k_weight), rotation.dtype, root=root, **dtypes)
    return NormRopeCall(
        _chain(interleaved, _one_a_pair(turning, q), of_q, of_k), q, k, q_weight, k_weight, *turning, q_eps, k_eps
    )


# --- the ops --------------------------------------------------------------------------------------------------------

_KEYWORDS = (
    "bool interleaved=True, str rounding='cast_then_weight', ScalarType? norm_dtype=None, ScalarType? rope_dtype=None, "
    "ScalarType? out_dtype=None, str root='rsqrt'"
)

OPS = {
    "norm_rope": Op(
        FAMILY,
        f"(Tensor x, Tensor? weight, Tensor rotation, Tensor? sin, {{eps}} eps, *, {_KEYWORDS}) -> Tensor",
        _norm_rope_call,
        ("q", "q_weight", "rotation", "sin", "q_eps", "q_out"),
    ),
    "qk_norm_rope": Op(
        FAMILY,
        "(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor rotation, Tensor? sin, {eps} q_eps, "
        f"{{eps}} k_eps, *, {_KEYWORDS}) -> (Tensor, Tensor)",
        _qk_norm_rope_call,
        FAMILY.arguments,
    ),
}
