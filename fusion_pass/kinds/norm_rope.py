"""out = rotate(norm(x)): an RMSNorm or a LayerNorm of each head, then RoPE."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.fx import Graph, Node

from dit_kernels.arguments import KERNEL_DTYPES, known_equal
from dit_kernels.families import OPS
from dit_kernels.rounding import RotatedSteps, rotated_steps
from fusion_pass.dataflow import (
    TO_SHAPE,
    VIEWS,
    aten,
    dtype,
    in_memory,
    is_call,
    is_joined,
    is_read_from_memory,
    is_swap,
    past_views,
    value,
)
from fusion_pass.kinds import rotation
from fusion_pass.kinds.kind import Kind, Survey
from fusion_pass.kinds.norm import Norm, eps_operand
from fusion_pass.kinds.rotation import Rotation
from fusion_pass.kinds.table import dense, flat
from fusion_pass.refusal import Reason, Refused
from fusion_pass.site import (
    MODEL_FORMS,
    Form,
    Operand,
    Operands,
    Output,
    Site,
    View,
    check_operands,
    operand_dtype,
)

KIND = rotation.ROTATED_NORMS
SWAP = View(aten.permute.default, ([0, 2, 1, 3],))  # from [B, S, H, Dh] to [B, H, S, Dh], and back
ONE_FOR_ALL = View(aten.unsqueeze.default, (0,))  # from [S', 1, n] to [1, S', 1, n]
VECTOR = 16  # real numbers: a CPU's vectors cover a head of a multiple of this size without a remainder


@dataclass(frozen=True)
class Written:
    """Tokens that are written into a slice of a tensor, up to its last token.

    into: the node that writes. interior: the nodes that it needs: the slices, and a copy.
    """

    into: Node
    interior: tuple[Node, ...]


@dataclass(frozen=True)
class Rotated:
    """A norm and its rotation.

    part: the tensor that is rotated or, if it is joined from two streams by `cat`, the part of this norm. swapped: the
    rotated tensor is [B, H, S, Dh]; the op takes [B, S, H, Dh]. heads: the view that reshapes the norm's input to one
    of these shapes, if the norm is computed on another shape. written: how the rotation of the last tokens is written
    into `part`, of which only these are rotated; None if all tokens are rotated.
    """

    norm: Norm
    rotation: Rotation
    part: Node
    cat: Node | None
    swapped: bool
    heads: View | None
    steps: RotatedSteps
    written: Written | None = None

    @property
    def outs(self) -> tuple[Node, ...]:
        """Nodes of one value: the result."""
        return self.rotation.outs if self.written is None else (self.written.into,)

    def fits(self, form: str, norm_dtype: torch.dtype | None) -> bool:
        """Are the steps of this form the steps of the graph?"""
        x, by = operand_dtype(self.norm.x), dtype(self.rotation.by)
        assert x is not None and by is not None
        by = by.to_complex() if self.rotation.is_complex else by
        weight, bias = operand_dtype(self.norm.weight), operand_dtype(self.norm.bias)
        rotated, out, root = self.steps.rotated, self.steps.out, self.norm.steps.root
        kind = self.norm.kind
        return self.steps == rotated_steps(form, x, weight, by, norm_dtype, rotated, out, root, kind, bias)

    @property
    def swapped_results(self) -> bool:
        return self.swapped != self.rotation.swapped_after

    @property
    def swapped_norm(self) -> bool:
        """Is the norm computed on [B, H, S, Dh]?"""
        return self.swapped != _are_swapped(self.norm.out, self.part)

    def check_sums(self, site: Site, name: str) -> None:
        """Raises Refused where a CPU's rounding depends on an order of heads and tokens that the op does not keep.

        name: the name of the operand that is normed.
        """
        if self.swapped_norm and site.form.name == "native":
            raise Refused(Reason.LAYOUT, site.anchor, "means in 16 bits, with heads before tokens", site.kind)
        if self.rotation.is_complex:
            # A CPU rounds a complex product differently in its vectors than in the remainder after them. The memory
            # layout decides how many rows the CPU treats as one, and so which numbers are in the remainder.
            x = self.rotation.x
            val = x.meta["val"].transpose(1, 2) if self.swapped else x.meta["val"]
            expected = in_memory(site.read(name)) if self.cat is None else sorted(in_memory(val))
            if val.shape[-1] % VECTOR and in_memory(val) != expected:
                raise Refused(Reason.LAYOUT, x, "how a CPU rounds a complex product depends on the layout", site.kind)

    @property
    def interior(self) -> tuple[Node, ...]:
        nodes = (*self.norm.interior, *(rotation.between(self.norm.out, self.part) or ()), *self.rotation.interior)
        if self.written is not None:
            return (*nodes, *self.rotation.outs, *self.written.interior)
        if self.cat is None:
            return nodes
        return (*nodes, self.cat, *(rotation.between(self.cat, self.rotation.x) or ()))

    def x(self) -> Node | Operand:
        """The input of the norm, as the op reads it. Heads and tokens may be swapped between the norm and its
        rotation."""
        swap = (SWAP,) if self.swapped_norm else ()
        if self.heads is not None:
            return Operand(self.norm.x, (self.heads, *swap))
        if not swap:
            return self.norm.x
        return self.norm.x.args[0] if is_swap(self.norm.x) else Operand(self.norm.x, swap)

    def tables(self) -> dict[str, Node | Operand | None]:
        """The operands of the rotation, as the op reads them."""
        by, sin = self.rotation.by, self.rotation.sin
        if self.rotation.is_complex and sin is not None:
            return {"rotation": self._swapped(_complex_table(by, sin)), "sin": None}
        if self.rotation.matrices:
            return {"rotation": self._swapped(flat(by)), "sin": None}
        return {"rotation": self._swapped(dense(by)), "sin": None if sin is None else self._swapped(dense(sin))}

    def _swapped(self, table: Operand) -> Operand:
        val = table.value()
        four = val is not None and val.ndim == 4
        if self.written is not None and val is not None and val.ndim == 3 and not self.swapped:
            return replace(table, views=(*table.views, ONE_FOR_ALL))
        return replace(table, views=(*table.views, SWAP)) if four and self.swapped else table

    def size(self) -> tuple[int | torch.SymInt, ...]:
        """B, S, H, Dh of the part."""
        x = value(self.part)
        assert x is not None
        batch, tokens, heads, width = x.shape
        return (batch, heads, tokens, width) if self.swapped else (batch, tokens, heads, width)


class NormRope(Kind[Norm]):
    """out = rotate(norm(x))."""

    name = KIND
    is_modulated = False

    def note(self, value: Norm, survey: Survey) -> None:
        """Notes which norms are rotated, so that q and k can find each other, and a rotation can find its norm."""
        found = rotation_of(value) or rotation_of_a_part(value)
        if found is not None:
            survey.notes(self.name)[found[1].x] = value.anchor

    def find(self, value: Norm, survey: Survey) -> Site | None:
        """Finds the rotation of a norm of heads.

        The user's code, then its graph in bf16:

            q = apply_rotary_emb(self.norm_q(q), freqs)

            n = mul(convert(mul(q, rsqrt)), w); c = view_as_complex(reshape(convert(n, f32), [B, S, H, Dh / 2, 2]));
            out = convert(reshape(view_as_real(mul(c, freqs)), [B, S, H, Dh]), bf16)
        """
        rotated = grow(value)
        return None if rotated is None else site_of(self.name, rotated.norm.anchor, {"x": rotated})


def site_of(kind: str, refused_at: Node, heads: dict[str, Rotated]) -> Site:
    """The site of one rotated norm, or of q and k with the same rotation. Raises Refused if operands or casts do not
    fit.

    heads: the rotated norms, by the names of the op's arguments; first those that the op returns.
    """
    first = next(iter(heads.values()))
    alone, op = len(heads) == 1, OPS[kind]
    operands: Operands = {}
    for name, rotated in heads.items():
        prefix = "" if alone else f"{name}_"
        norm = rotated.norm
        operands |= {name: rotated.x(), f"{prefix}weight": norm.weight, f"{prefix}eps": eps_operand(norm.eps)}
        if f"{prefix}bias" in op.roles:
            operands[f"{prefix}bias"] = norm.bias
    operands |= first.tables()
    check_operands(operands, kind)
    others = list(heads.values())[1:]
    returned = list(heads.values())[: len(op.results)]

    def check_sums(site: Site) -> None:
        for name, rotated in heads.items():
            rotated.check_sums(site, name)

    return Site(
        kind=kind,
        operands=operands,
        options={
            **({"norm": first.norm.kind} if first.norm.kind != "rms" else {}),
            "interleaved": first.rotation.interleaved,
            "addcmul": first.rotation.addcmul,
            "rope_dtype": first.steps.rotated,
            "out_dtype": first.steps.out,
        },
        form=form_of(kind, refused_at, list(heads.values())),
        outputs=tuple(Output(rotated.outs, SWAP if rotated.swapped_results else None) for rotated in returned),
        interior=tuple(node for rotated in heads.values() for node in rotated.interior),
        anchor=first.norm.anchor,
        twins=tuple(t for other in others for t in (other.rotation.by, other.rotation.sin) if t is not None),
        summed=tuple(heads),
        check_sums=check_sums,
        remark=max(rotated.norm.remark for rotated in heads.values()),
    )


def form_of(kind: str, refused_at: Node, heads: list[Rotated]) -> Form:
    """The first form whose steps are those of all heads. Raises Refused if there is none."""
    normed = (dtype for rotated in heads for dtype in (rotated.norm.steps.normed, rotated.norm.steps.out))
    candidates = (None, *dict.fromkeys(normed))
    for form in MODEL_FORMS:
        for norm_dtype in candidates:
            if all(rotated.fits(form, norm_dtype) for rotated in heads):
                return Form(form, {"norm_dtype": norm_dtype})
    raise Refused(Reason.ROUNDING, refused_at, kind=kind)


def rotation_of(norm: Norm) -> tuple[Norm, Rotation] | None:
    """A rotation that reads a norm, and that norm. A computed [D] that multiplies the norm before the rotation is its
    weight. A norm over all heads is followed through the view that makes the heads."""
    for read in filter(None, (norm, norm.with_computed_weight)):
        found = next(filter(None, map(rotation.of, (read.out, *heads_of(read.out)))), None)
        if found is not None:
            return read, found
    return None


def rotation_of_a_part(norm: Norm) -> tuple[Norm, Rotation, str] | None:
    """A rotation that reads a part of a norm, that norm, as in `rotation_of`, and what is rotated of it, in words."""
    for read in filter(None, (norm, norm.with_computed_weight)):
        found = rotation.of_a_part(read.out)
        if found is not None:
            return read, found[1], found[0]
    return None


def heads_of(out: Node) -> Iterator[Node]:
    """The views of a norm over all heads that split the last dimension into heads."""
    for user in past_views(out)[-1].users:
        rows, heads = value(user.args[0]) if is_call(user, *TO_SHAPE) else None, value(user)
        if rows is None or heads is None or heads.ndim != rows.ndim + 1:
            continue
        if all(known_equal(m, n) for m, n in zip(rows.shape[:-1], heads.shape[:-2], strict=True)):
            yield user


def grow(norm: Norm) -> Rotated | None:
    """A norm and the rotation that reads it, or None if there is no rotation. Raises Refused."""
    pair = rotation_of(norm)
    if pair is None:
        partly = rotation_of_a_part(norm)
        if partly is not None:
            check_norm(norm)
            raise Refused(Reason.HEADS, partly[1].x, partly[2], KIND)
        return None
    return of_part(*pair, pair[1].x)


def check_norm(norm: Norm, kinds: tuple[str, ...] = ("rms", "layer")) -> None:
    """Raises Refused for a norm that no op with a rotation computes. kinds: those that the op at hand computes."""
    if norm.kind not in kinds:
        raise Refused(Reason.UNNORMED, norm.anchor, "the norm is a LayerNorm", KIND)
    if norm.kind == "rms" and norm.bias is not None:
        raise Refused(Reason.UNNORMED, norm.anchor, "the norm has a bias", KIND)
    if norm.steps.root != "rsqrt":
        raise Refused(Reason.UNNORMED, norm.anchor, "its root is not written as rsqrt", KIND)


def of_part(
    norm: Norm, found: Rotation, part: Node, cat: Node | None = None, written: Written | None = None
) -> Rotated:
    """A norm and its rotation, which reads `part`, or the part together with another one in `cat`. Raises Refused.

    written: as in Rotated; the rotation then reads a slice of `part`.
    """
    check_norm(norm, ("rms", "layer") if cat is None else ("rms",))
    if rotation.between(norm.out, part) is None:
        raise Refused(Reason.UNNORMED, norm.anchor, "the norm is one over all heads", KIND)
    x = value(found.x)
    if x is None or x.ndim != 4:
        raise Refused(Reason.HEADS, norm.x, kind=KIND)
    heads = None
    if not _has_shape_of(norm.x, part, _are_swapped(norm.out, part)):
        heads = _heads(norm, part)
        if heads is None:
            raise Refused(Reason.HEADS, norm.x, kind=KIND)
    swapped = not _is_table(found.by, found, False)
    for table in (found.by, found.sin):
        if table is not None and not _is_table(table, found, swapped):
            raise Refused(Reason.HEADS, table, kind=KIND)
    if found.sin is not None and dtype(found.sin) != dtype(found.by):
        raise Refused(Reason.DTYPE, found.sin, "cosines and sines have different dtypes", KIND)
    rotated = Rotated(norm, found, part, cat, swapped, heads, steps_of(norm, found), written)
    if not found.is_complex and not any(is_read_from_memory(node) or is_joined(node) for node in rotated.outs):
        raise Refused(Reason.INLINE, rotated.outs[0], kind=KIND)
    return rotated


class ComplexWith(View):
    """The complex tensor whose real part is the first argument. One node serves all sites that read the same parts."""

    def __init__(self, imaginary: Node) -> None:
        super().__init__(aten.complex.default, (imaginary,))

    def insert(self, node: Node, graph: Graph) -> Node:
        """Inserts the node after both of its parts."""
        arguments = (node, *self.args)
        same = next((user for user in node.users if is_call(user, self.target) and user.args == arguments), None)
        if same is not None:
            return same
        inputs = graph.find_nodes(op="placeholder")
        with graph.inserting_after(max(*arguments, *inputs[-1:])):
            return self._made(node, graph)


def _complex_table(cos: Node, sin: Node) -> Operand:
    """The complex rotation whose real and imaginary parts are two nodes, made before the views that both have."""
    views: list[View] = []
    while is_call(cos, *VIEWS) and is_call(sin, cos.target) and cos.args[1:] == sin.args[1:]:
        views.insert(0, View(cos.target, cos.args[1:]))
        cos, sin = cos.args[0], sin.args[0]
    return Operand(cos, (ComplexWith(sin), *views))


def _are_swapped(out: Node, rotated: Node) -> bool:
    """Are heads and tokens swapped between a norm and its rotation?"""
    return sum(map(is_swap, rotation.between(out, rotated) or ())) % 2 == 1


def _heads(norm: Norm, part: Node) -> View | None:
    """The view after a norm that reshapes its rows to [B, S, H, Dh] or [B, H, S, Dh]; None if there is none."""
    for node in rotation.between(norm.out, part) or ():
        val = value(node)
        if is_call(node, *TO_SHAPE) and val is not None and val.ndim == 4:
            return View(node.target, node.args[1:])
        if not is_swap(node) and not is_call(node, aten.clone.default):
            return None
    return None


def _has_shape_of(x: Node, rotated: Node, swapped: bool) -> bool:
    """Is x of the shape of the rotated tensor? A norm may be computed on another shape of the same rows."""
    before, after = value(x), value(rotated)
    if before is None or after is None or before.ndim != 4:
        return False
    order = (0, 2, 1, 3) if swapped else (0, 1, 2, 3)
    return all(known_equal(before.shape[dim], size) for dim, size in zip(order, after.shape, strict=True))


def steps_of(norm: Norm, turn: Rotation, kind: str = KIND) -> RotatedSteps:
    """The steps of a norm and its rotation. A complex product is cast once. A real sum is rounded to the dtype of its
    terms and then cast."""
    product, out = turn.product, dtype(turn.out)
    if product is None or out is None:
        raise Refused(Reason.ROUNDING, turn.out, kind=kind)
    if out not in KERNEL_DTYPES:
        raise Refused(Reason.DTYPE, turn.out, str(out), kind)
    return RotatedSteps(norm.steps, product, out if turn.is_complex else product, out)


def _is_table(table: Node, turn: Rotation, swapped: bool) -> bool:
    """Does the table have one row for each token, either for all batch items or for each?

    The rotated tensor is [B, S, H, Dh], or swapped [B, H, S, Dh]; the table broadcasts to it along the heads.
    """
    val, x = value(table), value(turn.x)
    if val is None or x is None or val.is_conj() or val.is_neg():
        return False
    numbers = 3 if turn.matrices else 1  # dimensions of a row
    shape = (*val.shape[:-numbers], val.shape[-numbers])
    if not 2 <= len(shape) <= 4:
        return False
    columns = x.shape[3] // 2 if turn.halved or turn.matrices else x.shape[3]
    batch, *middle, width = (1, 1, *shape)[-4:]
    heads, tokens = middle if swapped else reversed(middle)
    of_batch = known_equal(batch, 1) or known_equal(batch, x.shape[0])
    of_tokens = known_equal(tokens, x.shape[2 if swapped else 1]) and known_equal(heads, 1)
    return of_batch and of_tokens and known_equal(width, columns)
