"""q and k of two streams: an RMSNorm of each head, the heads of both streams joined, then RoPE with one rotation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from fusion_pass.dataflow import aten, dtype, is_call, is_swap, keeps_rows, readers, sole_user
from fusion_pass.kinds import rotation
from fusion_pass.kinds.kind import Kind, Survey
from fusion_pass.kinds.norm import NORM, Norm, eps_operand
from fusion_pass.kinds.norm_rope import Rotated, of_part, site_of
from fusion_pass.kinds.qk_norm_rope import are_turned_alike
from fusion_pass.kinds.rotation import Rotation
from fusion_pass.refusal import Reason, Refused
from fusion_pass.site import Site, operand_dtype

KIND = "qk_norm_cat_rope"


@dataclass(frozen=True)
class _Part:
    """A norm that `cat` joins with another tensor, and the rotation of the joined tensor."""

    norm: Norm
    node: Node
    cat: Node
    rotation: Rotation


@dataclass(frozen=True)
class _Joined:
    """q or k: the norms of both streams with their rotation. The tokens of `before` come first."""

    before: Rotated
    later: Rotated

    @property
    def streams(self) -> tuple[Rotated, Rotated]:
        return self.before, self.later

    @property
    def last_anchor(self) -> Node:
        return max(rotated.norm.anchor for rotated in self.streams)


class QKNormCatRope(Kind[Norm]):
    """q, k = rotate(cat(norm(q_before), norm(q))), rotate(cat(norm(k_before), norm(k))), with one rotation."""

    name = KIND
    is_modulated = False

    def note(self, value: Norm, survey: Survey) -> None:
        """Notes which tensors that are joined and rotated are which norm's, so that the norms can find each other."""
        part = _part_of(value)
        if part is not None:
            survey.notes(self.name)[part.node] = value.anchor
            survey.notes(rotation.ROTATED_NORMS)[part.rotation.x] = value.anchor

    def find(self, value: Norm, survey: Survey) -> Site | None:
        """Finds the site in which this norm is the last of four.

        The user's code, then its graph in bf16, where rms is the graph of an RMSNorm:

            query = torch.cat([self.norm_added_q(encoder_query), self.norm_q(query)], dim=1)
            key = torch.cat([self.norm_added_k(encoder_key), self.norm_k(key)], dim=1)
            query, key = apply_rotary_emb(query, rope), apply_rotary_emb(key, rope)

            q = cat([rms(encoder_query), rms(query)], 1); a, b = unbind(reshape(q, [B, S, H, Dh / 2, 2]), -1);
            t = reshape(cat([unsqueeze(neg(b), -1), unsqueeze(a, -1)], -1), [B, S, H, Dh]);
            query = convert(add(mul(convert(q, f32), cos), mul(convert(t, f32), sin)), bf16); the same for key
        """
        part = _part_of(value)
        if part is None:
            return None
        one = _joined(part, survey)
        other = _partner(one, part.cat, survey)
        if other is None:
            raise Refused(Reason.ALONE, value.anchor, "q and k have no rotation in common", KIND)
        if value.anchor is not max(one.last_anchor, other.last_anchor):
            return None
        q, k = sorted((one, other), key=lambda joined: joined.later.rotation.anchor)
        if q.later.size()[2] < k.later.size()[2]:
            q, k = k, q
        return site_of(KIND, value.anchor, {"q": q.later, "k": k.later, "q_before": q.before, "k_before": k.before})


def _part_of(norm: Norm) -> _Part | None:
    """The part that a norm has in a tensor that is joined from two parts and then rotated; None if it has none."""
    for read in filter(None, (norm, norm.with_computed_weight)):
        node = read.out
        while (user := sole_user(node)) is not None and (keeps_rows(user) or is_swap(user)):
            node = user
        if user is not None and is_call(user, aten.cat.default) and len(user.args[0]) == 2:
            found = rotation.of(user)
            if found is not None:
                return _Part(read, node, user, found)
    return None


def _joined(part: _Part, survey: Survey) -> _Joined:
    """Both streams of the tensor that a norm has a part in. Raises Refused."""
    both = [_noted(node, survey) for node in part.cat.args[0]]
    if None in both or both[0] == both[1]:
        raise Refused(Reason.UNNORMED, part.cat, "only one of two joined tensors is an RMSNorm of each head", KIND)
    before, later = (of_part(one.norm, one.rotation, one.node, one.cat) for one in both if one is not None)
    dim = part.cat.args[1] if len(part.cat.args) > 1 else 0
    if dim not in ((2, -2) if later.swapped else (1, -3)):
        raise Refused(Reason.HEADS, part.cat, "two tensors are joined along another dimension than the tokens", KIND)
    if not _are_rounded_alike(before, later):
        raise Refused(Reason.ROUNDING, part.cat, "the norms of the two streams differ in their dtypes", KIND)
    return _Joined(before, later)


def _noted(node: Node, survey: Survey) -> _Part | None:
    anchor = survey.notes(KIND).get(node)
    norm = None if anchor is None or anchor._erased else NORM.find(anchor)
    return None if norm is None else _part_of(norm)


def _are_rounded_alike(before: Rotated, later: Rotated) -> bool:
    """Do the norms of two streams have operands of the same dtypes, and the same dtypes of their steps?"""
    norms = before.norm, later.norm
    dtypes = [(operand_dtype(norm.x), operand_dtype(norm.weight)) for norm in norms]
    return dtypes[0] == dtypes[1] and before.steps == later.steps and dtype(before.part) == dtype(later.part)


def _partner(one: _Joined, cat: Node, survey: Survey) -> _Joined | None:
    """k for q, or q for k: it has the same rotation, and the same attention reads it."""
    attention = set(readers(one.later.rotation.out))
    for joined in _others(cat, survey):
        pairs = zip(one.streams, joined.streams, strict=True)
        alike = all(are_turned_alike(a, b) for a, b in pairs) and _have_eps_alike(*one.streams, *joined.streams)
        if alike and not attention.isdisjoint(readers(joined.later.rotation.out)):
            return joined
    return None


def _others(cat: Node, survey: Survey) -> Iterator[_Joined]:
    """What is joined by other nodes than `cat`."""
    cats = {sole_user(node): node for node in survey.notes(KIND) if not node._erased}
    for other, node in cats.items():
        part = None if other is None or other is cat else _noted(node, survey)
        if part is not None:
            try:
                yield _joined(part, survey)
            except Refused:  # reported when the pass visits its norms
                continue


def _have_eps_alike(*rotated: Rotated) -> bool:
    """Are all eps numbers, or all of them tensors?"""
    return len({isinstance(eps_operand(one.norm.eps), float) for one in rotated}) == 1
