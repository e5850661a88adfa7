"""out = rotated(norm(x)): an RMSNorm of each head, and RoPE behind it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from dit_kernels.ops import KERNEL_DTYPES
from dit_kernels.rounding import RotatedSteps, rotated_steps
from fusion_pass.dataflow import aten, dtype, is_call, is_only_joined, is_stored, is_swap, known_equal, value
from fusion_pass.report import Reason, Refused
from fusion_pass.sites import rotation
from fusion_pass.sites.norm import Norm, eps_operand
from fusion_pass.sites.operand import SWAP, Operand, View
from fusion_pass.sites.rotation import Rotation
from fusion_pass.sites.site import Operands, Site, Survey, check_operands, choose_form, operand_dtype

KIND = "norm_rope"


@dataclass(frozen=True)
class Rotated:
    """A norm, and the rotation of it. The op takes [B, S, H, Dh]; swapped: the rotation has [B, H, S, Dh].

    heads: the view that parts the rows of a norm into these, where it is not computed of them.
    """

    norm: Norm
    rotation: Rotation
    swapped: bool
    heads: View | None
    steps: RotatedSteps

    def fits(self, rounding: str, norm_dtype: torch.dtype | None) -> bool:
        """Are the steps of this form the steps of the graph?"""
        x, by = operand_dtype(self.norm.x), operand_dtype(self.rotation.by)
        assert x is not None and by is not None
        weight = operand_dtype(self.norm.weight)
        return self.steps == rotated_steps(rounding, x, weight, by, norm_dtype, self.steps.rotated, self.steps.out)

    def norm_dtypes(self) -> tuple[torch.dtype, ...]:
        """What the normalised value may have been cast to."""
        return (self.norm.steps.normed, self.norm.steps.out)

    @property
    def swapped_results(self) -> bool:
        return self.swapped != self.rotation.swapped_behind

    @property
    def swapped_norm(self) -> bool:
        """Is the norm of [B, H, S, Dh]?"""
        return self.swapped != _are_swapped(self.norm.out, self.rotation.x)

    def turned(self, name: str) -> tuple[tuple[str, Node, bool], ...]:
        """What is multiplied by complex numbers, as Site.turned; `name` is the operand that is normed."""
        return ((name, self.rotation.x, self.swapped),) if self.rotation.sin is None else ()

    @property
    def interior(self) -> tuple[Node, ...]:
        between = rotation.between(self.norm.out, self.rotation.x) or ()
        return (*self.norm.interior, *between, *self.rotation.interior)

    def x(self) -> Node | Operand:
        """What is normed, as the op reads it; a norm may stand on the other side of the swap than its rotation."""
        swap = (SWAP,) if self.swapped_norm else ()
        if self.heads is not None:
            return Operand(self.norm.x, (self.heads, *swap), ())
        if not swap:
            return self.norm.x
        return self.norm.x.args[0] if is_swap(self.norm.x) else Operand(self.norm.x, swap, ())

    def tables(self) -> dict[str, Node | Operand | None]:
        """The rotation as the op reads it."""
        return {"rotation": self._table(self.rotation.by), "sin": self._table(self.rotation.sin)}

    def _table(self, table: Node | None) -> Node | Operand | None:
        val = None if table is None else value(table)
        four = val is not None and val.ndim == 4
        return Operand(table, (SWAP,), ()) if table is not None and four and self.swapped else table

    def size(self) -> tuple[int | torch.SymInt, ...]:
        """B, S, H, Dh."""
        x = value(self.rotation.x)
        assert x is not None
        batch, tokens, heads, width = x.shape
        return (batch, heads, tokens, width) if self.swapped else (batch, tokens, heads, width)


def note(norm: Norm, survey: Survey) -> None:
    """Notes which norms are rotated, so that q and k can find each other."""
    found = rotation.of(norm.out)
    if found is not None:
        survey.rotated[found.x] = norm.anchor


def find(norm: Norm, survey: Survey) -> Site | None:
    """The site whose norm this is, as far as its dataflow tells. Raises Refused."""
    rotated = grow(norm)
    if rotated is None:
        return None
    eps = eps_operand(norm.eps)
    operands: Operands = {"x": rotated.x(), "weight": norm.weight, **rotated.tables(), "eps": eps}
    check_operands(operands, KIND)
    form = choose_form(norm.anchor, KIND, rotated.norm_dtypes(), rotated.fits)
    return Site(
        kind=KIND,
        operands=operands,
        options={
            "interleaved": rotated.rotation.interleaved,
            "rounding": form.rounding,
            "norm_dtype": form.norm_dtype,
            "rope_dtype": rotated.steps.rotated,
        },
        outputs=(rotated.rotation.out,),
        dtypes={"out_dtype": rotated.steps.out},
        interior=rotated.interior,
        anchor=norm.anchor,
        swapped=rotated.swapped_results,
        swapped_norms=rotated.swapped_norm,
        turned=rotated.turned("x"),
    )


def grow(norm: Norm) -> Rotated | None:
    """The rotation that reads a norm, or None where nothing of the kind stands there. Raises Refused."""
    found = rotation.of(norm.out)
    if found is None:
        return None
    if norm.kind != "rms" or norm.bias is not None:
        raise Refused(Reason.UNNORMED, norm.anchor, kind=KIND)
    if norm.steps.root != "rsqrt":
        raise Refused(Reason.UNNORMED, norm.anchor, "its root is not written rsqrt", KIND)
    x = value(found.x)
    if x is None or x.ndim != 4:
        raise Refused(Reason.HEADS, norm.x, kind=KIND)
    heads = None
    if not _has_shape_of(norm.x, found.x, _are_swapped(norm.out, found.x)):
        heads = _heads(norm, found)
        if heads is None:
            raise Refused(Reason.HEADS, norm.x, kind=KIND)
    width = x.shape[3] // 2 if found.halved else x.shape[3]
    swapped = not _is_table(found.by, x, width, False)
    for table in (found.by, found.sin):
        if table is not None and not _is_table(table, x, width, swapped):
            raise Refused(Reason.HEADS, table, kind=KIND)
    if found.sin is not None and dtype(found.sin) != dtype(found.by):
        raise Refused(Reason.DTYPE, found.sin, "cosines and sines of different dtypes", KIND)
    if found.sin is not None and not any(is_stored(node) and not is_only_joined(node) for node in found.out):
        raise Refused(Reason.INLINE, found.out[0], kind=KIND)
    return Rotated(norm, found, swapped, heads, _steps(norm, found))


def _are_swapped(out: Node, rotated: Node) -> bool:
    """Are heads and tokens swapped between a norm and its rotation?"""
    return sum(map(is_swap, rotation.between(out, rotated) or ())) % 2 == 1


def _heads(norm: Norm, turn: Rotation) -> View | None:
    """The view that makes [B, S, H, Dh], or [B, H, S, Dh], of the rows of a norm, where one stands behind it."""
    for node in rotation.between(norm.out, turn.x) or ():
        val = value(node)
        if is_call(node, aten.reshape.default, aten.view.default) and val is not None and val.ndim == 4:
            return View(node.target, node.args[1:])
        if not is_swap(node) and not is_call(node, aten.clone.default):
            return None
    return None


def _has_shape_of(x: Node, rotated: Node, swapped: bool) -> bool:
    """A norm may have been computed of other shapes of the same rows."""
    before, after = value(x), value(rotated)
    if before is None or after is None or before.ndim != 4:
        return False
    order = (0, 2, 1, 3) if swapped else (0, 1, 2, 3)
    return all(known_equal(before.shape[dim], size) for dim, size in zip(order, after.shape, strict=True))


def _steps(norm: Norm, turn: Rotation) -> RotatedSteps:
    """A complex product is cast once; a real sum is rounded as its terms are, and cast then."""
    product, out = turn.product, dtype(turn.out[0])
    if product is None or out is None:
        raise Refused(Reason.ROUNDING, turn.out[0], kind=KIND)
    if out not in KERNEL_DTYPES:
        raise Refused(Reason.DTYPE, turn.out[0], str(out), KIND)
    return RotatedSteps(norm.steps, product, out if turn.sin is None else product, out)


def _is_table(table: Node, x: torch.Tensor, columns: int, swapped: bool) -> bool:
    """Is it one row of so many columns for each token, for one batch item or for each?

    x is [B, S, H, Dh], or swapped [B, H, S, Dh]; the table broadcasts to it along the heads.
    """
    val = value(table)
    if val is None or not 2 <= val.ndim <= 4 or val.is_conj() or val.is_neg():
        return False
    batch, *middle, width = (1, 1, *val.shape)[-4:]
    heads, tokens = middle if swapped else reversed(middle)
    of_batch = known_equal(batch, 1) or known_equal(batch, x.shape[0])
    of_tokens = known_equal(tokens, x.shape[2 if swapped else 1]) and known_equal(heads, 1)
    return of_batch and of_tokens and known_equal(width, columns)
