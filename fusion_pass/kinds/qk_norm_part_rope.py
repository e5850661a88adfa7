"""q and k: a norm of each head, then RoPE of the last tokens, such as those of the image, with one rotation."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from dit_kernels.arguments import known_equal
from fusion_pass.dataflow import aten, dtype, have_same_shape, is_call, value
from fusion_pass.kinds import rotation
from fusion_pass.kinds.kind import Kind, Survey
from fusion_pass.kinds.norm import Norm
from fusion_pass.kinds.norm_rope import VECTOR, Rotated, Written, of_part, rotation_of_a_part, site_of
from fusion_pass.kinds.qk_norm_rope import partner
from fusion_pass.kinds.rotation import Rotation
from fusion_pass.refusal import Reason, Refused
from fusion_pass.site import Site

KIND = "qk_norm_part_rope"
TO_THE_END = 2**63 - 1


class QKNormPartRope(Kind[Norm]):
    """q, k = norm(q), norm(k), of which the last tokens are rotated, with one rotation."""

    name = KIND
    is_modulated = False

    def find(self, value: Norm, survey: Survey) -> Site | None:
        """Finds the site in which this norm is the later one.

        The user's code, then its graph in bf16, where norm is the graph of a LayerNorm or of an RMSNorm:

            q, k = self.norm_q(q), self.norm_k(k)
            q[:, :, text:] = apply_rotary_emb(q[:, :, text:], rope)
            k[:, :, text:] = apply_rotary_emb(k[:, :, text:], rope)

            n = norm(q); s = slice(n, 2, text, end); a, b = unbind(reshape(s, [B, H, S, Dh / 2, 2]), -1);
            t = reshape(cat([unsqueeze(neg(b), -1), unsqueeze(a, -1)], -1), [B, H, S, Dh]);
            r = convert(add(mul(convert(s, f32), cos), mul(convert(t, f32), sin)), bf16);
            q = slice_scatter(n, copy(slice(n, 2, text, end), r), 2, text, end); the same for k
        """
        k = _grow(value)
        if k is None:
            return None
        q = partner(k, survey, _grow)
        if q is None:
            raise Refused(Reason.ALONE, value.anchor, "q and k have no rotation in common", KIND)
        if q.size()[2] < k.size()[2]:
            q, k = k, q
        return site_of(KIND, value.anchor, {"q": q, "k": k})


def _grow(norm: Norm) -> Rotated | None:
    """A norm and the rotation of its last tokens, which are written into it; None if there is none. Raises Refused."""
    partly = rotation_of_a_part(norm)
    if partly is None or not is_call(partly[1].x, aten.slice.Tensor):
        return None
    norm, found, _ = partly
    part = found.x.args[0]
    written = _written(part, found)
    if written is None or rotation.between(norm.out, part) is None:
        return None
    rotated = of_part(norm, found, part, written=written)
    dim = found.x.args[1]
    if dim not in ((2, -2) if rotated.swapped else (1, -3)):
        raise Refused(Reason.HEADS, found.x, "the rotated part is not one of tokens", KIND)
    if not dtype(norm.out) == dtype(found.out) == dtype(written.into):
        raise Refused(Reason.ROUNDING, found.out, "the tokens that are not rotated have another dtype", KIND)
    if found.is_complex and rotated.size()[3] % VECTOR:
        raise Refused(Reason.LAYOUT, found.x, "how a CPU rounds a complex product depends on the layout", KIND)
    return rotated


def _written(part: Node, found: Rotation) -> Written | None:
    """How a rotated slice of `part` is written back, if it goes up to the end; None if it is not."""
    where = _where(found.x.args[1:])
    if len(found.outs) != 1 or found.swapped_after or not _reaches_the_end(part, where):
        return None
    for into in part.users:
        if not is_call(into, rotation.SCATTER) or into.args[0] is not part or _where(into.args[2:]) != where:
            continue
        turned, nodes = into.args[1], [found.x]
        if is_call(turned, aten.copy.default) and have_same_shape(turned, found.x):
            nodes += [turned, turned.args[0]]
            turned = turned.args[1]
        if turned is found.out:
            return Written(into, tuple(nodes))
    return None


def _where(slicing: tuple[Any, ...]) -> tuple[Any, ...]:
    """The dimension, start, end and step of a slice or of a scatter into one."""
    return (*slicing, *(0, None, None, 1)[len(slicing) :])


def _reaches_the_end(part: Node, where: tuple[Any, ...]) -> bool:
    dim, _, end, step = where
    val = value(part)
    size = end.meta.get("val") if isinstance(end, Node) else end
    to_the_end = size is None or known_equal(size, TO_THE_END)
    return step == 1 and val is not None and (to_the_end or known_equal(size, val.shape[dim]))
