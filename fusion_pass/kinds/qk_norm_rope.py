"""q and k: an RMSNorm or a LayerNorm of each head, then RoPE, with the same rotation for q and k."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from dit_kernels.arguments import known_equal
from fusion_pass.dataflow import computed_alike, readers
from fusion_pass.kinds.kind import Kind, Survey
from fusion_pass.kinds.norm import NORM, Norm, eps_operand
from fusion_pass.kinds.norm_rope import KIND as NORM_ROPE
from fusion_pass.kinds.norm_rope import Rotated, grow, site_of
from fusion_pass.refusal import Refused
from fusion_pass.site import Site


class QKNormRope(Kind[Norm]):
    """q, k = rotate(norm(q)), rotate(norm(k)), with one rotation."""

    name = "qk_norm_rope"
    is_modulated = False

    def find(self, value: Norm, survey: Survey) -> Site | None:
        """Finds the site in which this norm is the later one.

        The user's code, then its graph in bf16:

            q, k = rotate(self.norm_q(q), freqs), rotate(self.norm_k(k), freqs)
            out = attention(q, k, v)

            n = mul(convert(mul(q, rsqrt)), w); ...; q = convert(reshape(view_as_real(mul(c, freqs)), [B, S, H, Dh]))
            m = mul(convert(mul(k, rsqrt)), u); ...; k = convert(reshape(view_as_real(mul(d, freqs)), [B, S, H, Dh]))

        The other norm is the nearest one before this norm that has the same rotation and that the same attention reads.
        """
        k = grow(value)
        q = None if k is None else partner(k, survey, grow)
        if k is None or q is None:
            return None
        if q.size()[2] < k.size()[2]:
            q, k = k, q
        return site_of(self.name, value.anchor, {"q": q, "k": k})


def partner(k: Rotated, survey: Survey, grow: Callable[[Norm], Rotated | None]) -> Rotated | None:
    """The nearest norm before k with the same rotation, which the same attention reads. grow: finds its rotation."""
    attention = set(readers(k.outs[0]))
    for anchor in reversed(survey.notes(NORM_ROPE).values()):
        q = None if anchor._erased or not anchor < k.norm.anchor else _grown(anchor, grow)
        if q is not None and are_turned_alike(q, k) and not attention.isdisjoint(readers(q.outs[0])):
            return q
    return None


def _grown(anchor: Node, grow: Callable[[Norm], Rotated | None]) -> Rotated | None:
    try:
        found = NORM.find(anchor)
        return None if found is None else grow(found)
    except Refused:  # reported when the pass visits this anchor
        return None


def are_turned_alike(q: Rotated, k: Rotated) -> bool:
    """Do q and k have the same tokens and width, the same kind of norm, the same rotation, computed once or twice, and
    the same dtypes of its steps?"""
    if q.norm.kind != k.norm.kind:
        return False
    sizes = list(zip(q.size(), k.size(), strict=True))
    heads = sizes.pop(2)
    if not all(known_equal(m, n) for m, n in sizes):
        return False
    if not known_equal(*heads) and not all(type(n) is int for n in heads):  # to ask which is larger would add a guard
        return False
    if (q.swapped, q.swapped_results) != (k.swapped, k.swapped_results):
        return False
    if isinstance(eps_operand(q.norm.eps), float) != isinstance(eps_operand(k.norm.eps), float):
        return False
    steps = (q.steps.product, q.steps.rotated, q.steps.out) == (k.steps.product, k.steps.rotated, k.steps.out)
    ways = [(r.interleaved, r.halved, r.is_complex, r.matrices, r.addcmul) for r in (q.rotation, k.rotation)]
    form = steps and ways[0] == ways[1]
    return form and computed_alike(q.rotation.by, k.rotation.by) and computed_alike(q.rotation.sin, k.rotation.sin)
