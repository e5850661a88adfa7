"""out = rotated(norm(x)): an RMSNorm of each head, and RoPE behind it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from dit_kernels.ops import KERNEL_DTYPES
from dit_kernels.rounding import RotatedSteps, rotated_steps
from fusion_pass.dataflow import dtype, is_only_joined, is_stored, known_equal, value
from fusion_pass.report import Reason, Refused
from fusion_pass.sites import rotation
from fusion_pass.sites.norm import Norm, eps_operand
from fusion_pass.sites.rotation import Rotation
from fusion_pass.sites.site import Site, Survey, choose_form, operand_dtype

KIND = "norm_rope"


@dataclass(frozen=True)
class Rotated:
    """A norm, and the rotation of it."""

    norm: Norm
    rotation: Rotation
    steps: RotatedSteps

    def fits(self, rounding: str, norm_dtype: torch.dtype | None) -> bool:
        """Are the steps of this form the steps of the graph?"""
        x, by = operand_dtype(self.norm.x), operand_dtype(self.rotation.by)
        assert x is not None and by is not None
        weight = operand_dtype(self.norm.weight)
        return self.steps == rotated_steps(rounding, x, weight, by, norm_dtype, self.steps.rotated, self.steps.out)

    @property
    def interior(self) -> tuple[Node, ...]:
        return (*self.norm.interior, *self.rotation.interior)

    def norm_dtypes(self) -> tuple[torch.dtype, ...]:
        """What the normalised value may have been cast to."""
        return (self.norm.steps.normed, self.norm.steps.out)


def note(norm: Norm, survey: Survey) -> None:
    """Notes which norms are rotated, so that q and k can find each other."""
    if rotation.of(norm.out) is not None:
        survey.rotated[norm.out] = norm.anchor


def find(norm: Norm, survey: Survey) -> Site | None:
    """The site whose norm this is, as far as its dataflow tells. Raises Refused."""
    rotated = grow(norm)
    if rotated is None:
        return None
    form = choose_form(norm.anchor, KIND, rotated.norm_dtypes(), rotated.fits)
    return Site(
        kind=KIND,
        operands={
            "x": norm.x,
            "weight": norm.weight,
            "rotation": rotated.rotation.by,
            "sin": rotated.rotation.sin,
            "eps": eps_operand(norm.eps),
        },
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
    )


def grow(norm: Norm) -> Rotated | None:
    """The rotation that reads a norm, or None where nothing of the kind stands there. Raises Refused."""
    found = rotation.of(norm.out)
    if found is None:
        return None
    if norm.kind != "rms" or norm.bias is not None:
        raise Refused(Reason.UNNORMED, norm.anchor, kind=KIND)
    x = value(norm.x)
    if x is None or x.ndim != 4:
        raise Refused(Reason.SHAPE, norm.x, "a head is not the last of four dimensions", KIND)
    _check_table(found.by, x)
    if found.sin is not None:
        _check_table(found.sin, x)
        if dtype(found.sin) != dtype(found.by):
            raise Refused(Reason.DTYPE, found.sin, "cosines and sines of different dtypes", KIND)
    if found.sin is not None and not any(is_stored(node) and not is_only_joined(node) for node in found.out):
        raise Refused(Reason.INLINE, found.out[0], kind=KIND)
    return Rotated(norm, found, _steps(norm, found))


def _steps(norm: Norm, turn: Rotation) -> RotatedSteps:
    """A complex product is cast once; a real sum is rounded as its terms are, and cast then."""
    product, out = turn.product, dtype(turn.out[0])
    if product is None or out is None:
        raise Refused(Reason.ROUNDING, turn.out[0], kind=KIND)
    if out not in KERNEL_DTYPES:
        raise Refused(Reason.DTYPE, turn.out[0], str(out), KIND)
    return RotatedSteps(norm.steps, product, out if turn.sin is None else product, out)


def _check_table(table: Node, x: torch.Tensor) -> None:
    """A table is [S, Dh], of complex numbers [S, Dh / 2], the same for all heads, for one batch item or for each."""
    val = value(table)
    if val is None or not 3 <= val.ndim <= 4:
        raise Refused(Reason.SHAPE, table, kind=KIND)
    batch, tokens, heads, width = (1, *val.shape)[-4:]
    of_tokens = known_equal(tokens, x.shape[1]) and known_equal(heads, 1)
    if not of_tokens or width != x.shape[3] // (2 if val.is_complex() else 1):
        raise Refused(Reason.SHAPE, table, "not one row for each token, the same for all heads", KIND)
    if not known_equal(batch, 1) and not known_equal(batch, x.shape[0]):
        raise Refused(Reason.SHAPE, table, "neither one table nor one for each batch item", KIND)
    if val.is_conj() or val.is_neg():
        raise Refused(Reason.DTYPE, table, "a conjugate or negative view", KIND)
