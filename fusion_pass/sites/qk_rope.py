"""q and k, each an RMSNorm of each head and RoPE behind it, turned by the same rotation."""

from __future__ import annotations

from torch.fx import Node

from fusion_pass.dataflow import computed_alike, known_equal, readers
from fusion_pass.report import Refused
from fusion_pass.sites import norm, rope
from fusion_pass.sites.norm import Norm, eps_operand
from fusion_pass.sites.rope import Rotated
from fusion_pass.sites.site import Operands, Site, Survey, check_operands, choose_form

KIND = "qk_norm_rope"


def find(second: Norm, survey: Survey) -> Site | None:
    """The two-output site whose later norm this is, as far as its dataflow tells. Raises Refused.

    The other one is the nearest before it that is turned alike and is read by the same attention.
    """
    k = rope.grow(second)
    if k is None:
        return None
    q = _partner(k, survey)
    if q is None:
        return None
    if q.size()[2] < k.size()[2]:
        q, k = k, q
    operands: Operands = {
        "q": q.x(),
        "k": k.x(),
        "q_weight": q.norm.weight,
        "k_weight": k.norm.weight,
        **q.tables(),
        "q_eps": eps_operand(q.norm.eps),
        "k_eps": eps_operand(k.norm.eps),
    }
    check_operands(operands, KIND)
    form = choose_form(
        second.anchor,
        KIND,
        (*q.norm_dtypes(), *k.norm_dtypes()),
        lambda rounding, norm_dtype: q.fits(rounding, norm_dtype) and k.fits(rounding, norm_dtype),
    )
    return Site(
        kind=KIND,
        operands=operands,
        options={
            "interleaved": q.rotation.interleaved,
            "rounding": form.rounding,
            "norm_dtype": form.norm_dtype,
            "rope_dtype": q.steps.rotated,
        },
        outputs=(q.rotation.out, k.rotation.out),
        dtypes={"out_dtype": q.steps.out},
        interior=(*q.interior, *k.interior),
        anchor=q.norm.anchor,
        twins=tuple(table for table in (k.rotation.by, k.rotation.sin) if table is not None),
        swapped=q.swapped_results,
        swapped_norms=q.swapped_norm or k.swapped_norm,
        turned=(*q.turned("q"), *k.turned("k")),
    )


def _partner(k: Rotated, survey: Survey) -> Rotated | None:
    attention = set(readers(k.rotation.out[0]))
    for anchor in reversed(survey.rotated.values()):
        q = None if anchor._erased or not anchor < k.norm.anchor else _grown(anchor)
        if q is not None and _is_turned_alike(q, k) and not attention.isdisjoint(readers(q.rotation.out[0])):
            return q
    return None


def _grown(anchor: Node) -> Rotated | None:
    try:
        found = norm.find(anchor)
        return None if found is None else rope.grow(found)
    except Refused:  # told when the anchor is looked at for itself
        return None


def _is_turned_alike(q: Rotated, k: Rotated) -> bool:
    """The same tokens and width, the same rotation, computed once or twice, and the same dtypes of its steps."""
    sizes = list(zip(q.size(), k.size(), strict=True))
    heads = sizes.pop(2)
    if not all(known_equal(m, n) for m, n in sizes):
        return False
    if not known_equal(*heads) and not all(type(n) is int for n in heads):  # which are more? To ask would add a guard
        return False
    if (q.swapped, q.swapped_results) != (k.swapped, k.swapped_results):
        return False
    if isinstance(eps_operand(q.norm.eps), float) != isinstance(eps_operand(k.norm.eps), float):
        return False
    steps = (q.steps.product, q.steps.rotated, q.steps.out) == (k.steps.product, k.steps.rotated, k.steps.out)
    form = steps and (q.rotation.interleaved, q.rotation.halved) == (k.rotation.interleaved, k.rotation.halved)
    return form and computed_alike(q.rotation.by, k.rotation.by) and computed_alike(q.rotation.sin, k.rotation.sin)
