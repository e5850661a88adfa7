"""out = rotate(norm(x)): one RMSNorm over all heads of a token, then RoPE of each head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from dit_kernels.arguments import known_equal
from fusion_pass.dataflow import (
    TO_SHAPE,
    dtype,
    have_same_shape,
    is_call,
    is_read_from_memory,
    is_swap,
    past_views,
    same_shape,
    sole_user,
    stored_casts,
    value,
)
from fusion_pass.kinds import rotation
from fusion_pass.kinds.kind import Kind, Survey
from fusion_pass.kinds.norm import Norm, eps_operand
from fusion_pass.kinds.norm_rope import SWAP, Rotated, form_of, heads_of, rotation_of, steps_of
from fusion_pass.kinds.rotation import Rotation
from fusion_pass.kinds.table import joined_heads
from fusion_pass.refusal import Reason, Refused
from fusion_pass.site import Operand, Output, Site, check_operands

KIND = "norm_all_heads_rope"


@dataclass(frozen=True)
class _Heads:
    """How the heads of a norm are rotated.

    count: how many there are. swapped: is the rotated tensor [B, H, S, Dh] instead of [B, S, H, Dh]? between: the nodes
    from the norm to the rotated tensor.
    """

    count: int
    swapped: bool
    between: tuple[Node, ...]


class NormAllHeadsRope(Kind[Norm]):
    """out = rotate(norm(x)), the norm over all heads."""

    name = KIND
    is_modulated = False

    def find(self, value: Norm, survey: Survey) -> Site | None:
        """Finds the rotation of a norm over all heads.

        The user's code, then its graph in bf16:

            q = apply_rotary_emb(self.norm_q(q).unflatten(2, (heads, -1)), freqs_cos, freqs_sin)

            n = convert(mul(mul(convert(q, f32), rsqrt), w), bf16); a, b = unbind(reshape(n, [B, S, H, Dh / 2, 2]), -1);
            s = slice_scatter(empty, copy(slice(empty), sub(mul(a, cos), mul(b, sin))), 3, 0, end, 2);
            out = slice_scatter(s, copy(slice(s), add(mul(a, sin), mul(b, cos))), 3, 1, end, 2)
        """
        pair = rotation_of(value)
        if pair is None or pair[0].kind != "rms" or pair[0].bias is not None:
            return None
        heads = _heads(*pair)
        return None if heads is None else _site(*pair, heads)


def _heads(norm: Norm, turn: Rotation) -> _Heads | None:
    """The heads of a norm that runs over all of them; None if the norm is one of each head. Raises Refused."""
    rows, turned = value(norm.x), value(turn.x)
    if rows is None or turned is None or rows.ndim != 3:
        return None
    if turn.x is norm.out and same_shape(rows, turned):
        return _Heads(1, False, ())
    for view in heads_of(norm.out):
        inside = rotation.between(view, turn.x)
        if inside is not None and turned.ndim == 4:
            swapped = sum(map(is_swap, inside)) % 2 == 1
            tokens, count = turned.shape[1:3][:: -1 if swapped else 1]
            before = past_views(norm.out)[1:]
            same_rows = known_equal(turned.shape[0], rows.shape[0]) and known_equal(tokens, rows.shape[1])
            if not same_rows:
                return None
            if not isinstance(count, int):
                raise Refused(Reason.WIDTH, turn.x, "the number of heads is not a constant", KIND)
            return _Heads(count, swapped, (*before, view, *inside))
    return None


def _site(norm: Norm, turn: Rotation, heads: _Heads) -> Site:
    """The site of a norm and its rotation. Raises Refused if operands or casts do not fit the op."""
    if turn.sin is None or turn.is_complex:
        by = "2×2 matrices" if turn.matrices else "complex numbers"
        raise Refused(Reason.ROTATION, turn.out, f"by {by}, after a norm over all heads", KIND)
    turn = _tokens_first(norm, turn, heads)
    rotated = Rotated(norm, turn, turn.x, None, heads.swapped, None, steps_of(norm, turn, KIND))
    operands: dict[str, Any] = {"x": norm.x, "weight": norm.weight, "eps": eps_operand(norm.eps)}
    both = turn.by, turn.sin
    owns = [_own_rotations(table, turn, heads) for table in both]
    if None in owns or owns[0] != owns[1]:
        raise Refused(Reason.HEADS, turn.by, kind=KIND)
    if dtype(turn.by) != dtype(turn.sin):
        raise Refused(Reason.DTYPE, turn.sin, "cosines and sines have different dtypes", KIND)
    if not any(map(is_read_from_memory, turn.outs)):
        raise Refused(Reason.INLINE, turn.out, kind=KIND)
    own = bool(owns[0])
    tables = [_joined_table(table, heads) for table in both] if own else rotated.tables().values()
    operands |= dict(zip(("cos", "sin"), tables, strict=True))
    check_operands(operands, KIND)
    return Site(
        kind=KIND,
        operands=operands,
        options={
            "heads": heads.count,
            "own": own,
            "interleaved": turn.interleaved,
            "addcmul": turn.addcmul,
            "rope_dtype": rotated.steps.rotated,
            "out_dtype": rotated.steps.out,
            "root": norm.steps.root,
        },
        form=form_of(KIND, norm.anchor, [rotated]),
        outputs=(Output(turn.outs),),
        interior=(*norm.interior, *heads.between, *turn.interior),
        anchor=norm.anchor,
        like=norm.x,
        summed=("x",),
        remark=norm.remark,
    )


def _tokens_first(norm: Norm, turn: Rotation, heads: _Heads) -> Rotation:
    """The rotation up to its results as [B, S, H, Dh] or [B, S, D], and to the casts of these. Raises Refused if it has
    no such results."""
    if len(turn.outs) > 1 or turn.swapped_after:
        if heads.swapped == turn.swapped_after:
            return turn
        raise Refused(Reason.HEADS, turn.out, "heads and tokens are swapped", KIND)
    nodes = [turn.out]
    if heads.swapped:
        swap = sole_user(turn.out)
        if swap is None or not is_swap(swap):
            raise Refused(Reason.HEADS, turn.out, "heads and tokens are swapped", KIND)
        nodes.append(swap)
    joined = sole_user(nodes[-1])
    if joined is not None and is_call(joined, *TO_SHAPE) and have_same_shape(joined, norm.x):
        nodes.append(joined)
    outs = (nodes[-1],)
    if dtype(turn.out) == turn.product:  # otherwise the result is rounded already
        outs = stored_casts(nodes[-1])
    return replace(
        turn, outs=outs, interior=tuple(dict.fromkeys((*turn.interior, *(n for n in nodes if n not in outs))))
    )


def _own_rotations(table: Node, turn: Rotation, heads: _Heads) -> bool | None:
    """Has each head a row of the table for each token? None if the table is not one of tokens."""
    val, x = value(table), value(turn.x)
    if val is None or x is None or not 2 <= val.ndim <= x.ndim or val.is_conj() or val.is_neg():
        return None
    batch, *middle, width = (1, 1, *val.shape)[-x.ndim :]
    tokens, of_heads = reversed(middle) if heads.swapped else (*middle, 1)[:2]
    of_batch = known_equal(batch, 1) or known_equal(batch, x.shape[0])
    columns = x.shape[-1] // 2 if turn.halved else x.shape[-1]
    if not (of_batch and known_equal(tokens, x.shape[2 if heads.swapped else 1]) and known_equal(width, columns)):
        return None
    return False if known_equal(of_heads, 1) else True if known_equal(of_heads, heads.count) else None


def _joined_table(table: Node, heads: _Heads) -> Operand:
    """A table with rows for each head as the op reads it."""
    if not heads.swapped:
        return joined_heads(table)
    return joined_heads(table.args[0]) if is_swap(table) else joined_heads(table, SWAP)
