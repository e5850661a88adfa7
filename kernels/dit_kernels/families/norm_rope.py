"""The norm of query and key heads and their rotation (RoPE): rotate(norm(q)), for q and k together or for one of them.

q is [B, S, H, Dh], k is [B, S, Hk, Dh]. The norm is an rms norm or a layer norm. The weights of q and k are [Dh] or
None, and so are the biases of a layer norm. The rotation is the same for every head. It is complex, [S, Dh/2]. Or, with
`sin`, it holds the cosines, [S, Dh] or [S, Dh/2]. Or it holds the 2×2 matrices of the pairs, [S, 2 * Dh]: m00, m01, m10
and m11 of the first pair, and so on. A rotation may also have a dimension of size B or 1 before S, for batch items, and
one of size 1 after S, for heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

from torch import Tensor

from dit_kernels import reference
from dit_kernels.arguments import (
    COLUMN,
    COMPLEX,
    DTYPES,
    EPS,
    HEADS,
    KERNEL_DTYPES,
    TABLE,
    Argument,
    Option,
    Role,
    check_tensor,
    differ,
    dtype_option,
    known_equal,
    reject,
)
from dit_kernels.chain import RotatedChain
from dit_kernels.cute.heads import HeadTiling, head_tiling
from dit_kernels.families.family import Family, Named, Op, Shaped, step_dtypes
from dit_kernels.rounding import FORMS, NORMS, ROOTS, RotatedSteps, rotated_steps

HEAD_GRAIN, WIDEST_HEAD = 8, 512  # kernels take multiples of HEAD_GRAIN up to WIDEST_HEAD

_steps = lru_cache(maxsize=None)(rotated_steps)


class NormRope(Family):
    """Computes a RotatedChain over the heads of a token. For norm_rope, x is q, and k is absent.

    partly: does the rotation have rows for the last tokens only?
    """

    partly = False

    arguments: tuple[Argument, ...] = (
        Argument("q", HEADS),
        Argument("k", HEADS),
        Argument("q_weight", COLUMN, optional=True),
        Argument("k_weight", COLUMN, optional=True),
        Argument("rotation", TABLE),
        Argument("sin", TABLE, optional=True),
        Argument("q_eps", EPS),
        Argument("k_eps", EPS),
        Argument("q_bias", COLUMN, optional=True, defaulted=True),
        Argument("k_bias", COLUMN, optional=True, defaulted=True),
        Argument("q_out", HEADS, written=True, placed=True),
        Argument("k_out", HEADS, written=True, placed=True),
    )

    def check(self, op: Op, named: Named, options: Named) -> None:
        """Raises ValueError for a rotation of the wrong size, or if an option does not fit the rotation.

        A complex rotation has one number per pair. Cosines and sines have one per pair or one per element. Matrices
        have four numbers per pair.
        """
        q, rotation, sin = named["q"], named["rotation"], named["sin"]
        first = op.own_name("q")
        check_tensor(op.name, "rotation", rotation, first, q, (*COMPLEX, *DTYPES) if sin is None else DTYPES)
        d = q.shape[3]
        widths = (d, d // 2) if sin is not None else (d // 2,) if rotation.is_complex() else (2 * d,)
        _check_width(op.name, "rotation", rotation, widths)
        if sin is not None:
            check_tensor(op.name, "sin", sin, first, q, (rotation.dtype,))
            _check_width(op.name, "sin", sin, (rotation.shape[-1],))
        elif not options["interleaved"]:
            reject(op.name, "interleaved", False, "True without sin: the pairs are neighbouring elements")
        if rotation.is_complex() and options["addcmul"]:
            reject(op.name, "addcmul", True, "False with a complex rotation")
        _check_norm(op, named, options)

    def chain(self, op: Op, named: Named, options: Named) -> RotatedChain:
        rotation = named["rotation"]
        one_a_pair = rotation.shape[-1] == named["q"].shape[3] // 2
        matrices = named["sin"] is None and not rotation.is_complex()
        norm = options.get("norm", "rms")
        q = steps_of(named["q"], named["q_weight"], rotation, options, norm, named.get("q_bias"))
        k = None
        if named.get("k") is not None:
            k = steps_of(named["k"], named["k_weight"], rotation, options, norm, named.get("k_bias"))
        return RotatedChain(options["interleaved"], one_a_pair, q, k, matrices, options["addcmul"], norm)

    def results(self, chain: RotatedChain, named: Named) -> tuple[Shaped, ...]:
        q = named["q"].shape, chain.q.out
        return (q,) if chain.k is None else (q, (named["k"].shape, chain.k.out))

    def definition(self, chain: RotatedChain, named: Named) -> tuple[Tensor, ...]:
        rotation, sin = self.tables(named)
        return tuple(
            reference.rotated(
                named[x],
                named[f"{x}_weight"],
                named[f"{x}_bias"],
                rotation,
                sin,
                named[f"{x}_eps"],
                steps,
                chain,
                self.partly,
            )
            for x, steps in (("q", chain.q), ("k", chain.k))
            if steps is not None
        )

    def tables(self, named: Named) -> tuple[Tensor, Tensor | None]:
        """The rotation and `sin`, reshaped to [B|1, S, 1, n]."""
        rotation, sin = (
            None if named[name] is None else for_heads(named[name], self.named[name].role, named["q"])
            for name in ("rotation", "sin")
        )
        assert rotation is not None
        return rotation, sin

    def fits_kernel(self, chain: RotatedChain, named: Named) -> bool:
        """Only a complex rotation and its product may be fp64. Dh is a multiple of HEAD_GRAIN up to WIDEST_HEAD."""
        real = [t for argument in self.tensors if (t := named.get(argument.name)) is not None and not t.is_complex()]
        dtypes = {t.dtype for t in real}
        for steps in (chain.q, chain.k):
            if steps is not None:
                is_complex = named["rotation"].is_complex()
                dtypes |= step_dtypes(replace(steps, product=steps.rotated) if is_complex else steps)
        d = named["q"].shape[3]
        return dtypes <= set(KERNEL_DTYPES) and d % HEAD_GRAIN == 0 and d <= WIDEST_HEAD

    def kernel(self) -> Callable[..., Any]:
        from dit_kernels.cute.norm_rope import NormRopeKernel

        return NormRopeKernel

    def tiling(self, chain: RotatedChain, d: int, specs: Named, arch: str) -> HeadTiling:
        q, k = specs["q"], specs["k"]
        width = min(spec.dtype.itemsize for spec in (q, k) if spec is not None)
        return head_tiling(d, (q.heads, 0 if k is None else k.heads), width, 1 if chain.interleaved else 2)


def _check_norm(op: Op, named: Named, options: Named) -> None:
    """A layer norm has one spelling of its root, and an rms norm has no bias."""
    if options.get("norm", "rms") == "layer":
        if options["root"] != "rsqrt":
            reject(op.name, "root", repr(options["root"]), "'rsqrt' with norm='layer'")
        return
    for name in ("q_bias", "k_bias"):
        if named.get(name) is not None:
            reject(op.name, op.own_name(name), f"a tensor of shape {list(named[name].shape)}", "None with norm='rms'")


def _check_width(op: str, name: str, table: Tensor, widths: tuple[int, ...]) -> None:
    if all(differ(table.shape[-1], width) for width in widths):
        reject(op, f"{name}.shape", list(table.shape), f"a last dimension of {' or '.join(map(str, widths))}")


def for_heads(table: Tensor, role: Role, first: Tensor, heads: int = 1) -> Tensor:
    """A table reshaped to [B|1, S, heads, n]. first: the first argument of the op."""
    shaped = role.laid(table.shape, (1,) * table.ndim, first.shape, known_equal)
    assert shaped is not None
    batch, tokens, width = shaped[0]
    return table.reshape(batch, tokens, heads, width // heads)


def steps_of(
    x: Tensor,
    weight: Tensor | None,
    rotation: Tensor,
    options: Named,
    norm: str = "rms",
    bias: Tensor | None = None,
) -> RotatedSteps:
    """The steps of rotate(norm(x)) that the options of an op describe."""
    return _steps(
        options["rounding"],
        x.dtype,
        None if weight is None else weight.dtype,
        rotation.dtype,
        options["norm_dtype"],
        options["rope_dtype"],
        options["out_dtype"],
        options["root"],
        norm,
        None if bias is None else bias.dtype,
    )


# --- the ops --------------------------------------------------------------------------------------------------------

FAMILY = NormRope()
OPTIONS = (
    Option("interleaved", "bool", True),
    Option("addcmul", "bool", False),
    Option("rounding", "str", "cast_then_weight", FORMS),
    dtype_option("norm_dtype"),
    dtype_option("rope_dtype"),
    dtype_option("out_dtype"),
    Option("root", "str", "rsqrt", ROOTS),
)
OF_ANY_NORM = (Option("norm", "str", "rms", NORMS), *OPTIONS)
OPS = (
    Op(
        "norm_rope",
        FAMILY,
        ("q", "q_weight", "rotation", "sin", "q_eps", "q_bias", "q_out"),
        OF_ANY_NORM,
        {"q": "x", "q_weight": "weight", "q_eps": "eps", "q_bias": "bias"},
    ),
    Op("qk_norm_rope", FAMILY, tuple(FAMILY.named), OF_ANY_NORM),
)
