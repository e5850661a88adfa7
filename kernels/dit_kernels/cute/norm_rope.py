"""The rms norm of query and key heads with their rotation, each read and written once.

A group of lanes works on one head at a time (`heads.py`); it keeps the token's rotation and its part of the weights in
registers for all its heads, and loads several heads before it works on the first. Nothing waits for other groups: a sum
over a head is shuffles within the group.

All arithmetic is fp32, or with a complex128 rotation fp64 behind the norm; `rounding.py` says what each step is rounded
to.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Boolean, Float32, Float64, Int32, Int64, const_expr

from dit_kernels.chain import RotatedChain
from dit_kernels.cute.arith import elements_of, product, rounded, total, widen
from dit_kernels.cute.fma import fma32, fma64
from dit_kernels.cute.heads import HeadTiling
from dit_kernels.cute.norm import normed, rstd_of, square, sum_of
from dit_kernels.cute.operand import Operand
from dit_kernels.cute.reduce import warp_sum
from dit_kernels.cute.tiling import MAX_GRID_Y
from dit_kernels.cute.vectors import load, store, vector_at
from dit_kernels.rounding import NormSteps, RotatedSteps


@dataclass(frozen=True)
class RopeOperands:
    """The tensors of one kernel, by the names of `NormRope.__call__`."""

    q: Operand
    k: Operand | None
    q_weight: Operand | None
    k_weight: Operand | None
    rotation: Operand
    sin: Operand | None
    q_out: Operand
    k_out: Operand | None


# --- one head: the vectors of it that a thread has, in order of parts and vectors -----------------------------------
# Plain Python: these run while a kernel is traced.

Vectors = list[Any]  # cute.TensorSSA, as those of `arith`


def _normed(values: Vectors, weights: Vectors | None, eps: Float32, steps: NormSteps, d: int, lanes: int) -> Vectors:
    """The rms norm of a head."""
    squares = [sum_of(square(x, None, steps.stat)) for x in values]
    mean_square = warp_sum(sum(squares[1:], squares[0]), lanes) * Float32(1.0 / d)
    rstd = rstd_of(mean_square, eps, steps.root, steps.stat)
    return [normed(x, None, rstd, w, None, steps) for x, w in zip(values, weights or len(values) * [None], strict=True)]


def _complex_product(n, rotation: cute.Tensor):
    """(a + ib)(c + is) of each pair, contracted as CUDA's compiler contracts it in eager's kernel."""
    wide, fma = (Float64, fma64) if rotation.element_type is Float64 else (Float32, fma32)
    pairs, turned = elements_of(widen(n)), cute.make_rmem_tensor(n.shape, Float32)
    for i in range(0, cute.size(n.shape), 2):
        a, b, c, s = wide(pairs[i]), wide(pairs[i + 1]), rotation[i], rotation[i + 1]
        turned[i] = Float32(fma(a, c, -(b * s)))
        turned[i + 1] = Float32(fma(b, c, a * s))
    return turned.load()


def _doubled(numbers: cute.Tensor):
    """a, a, b, b, ... of a, b, ..."""
    doubled = cute.make_rmem_tensor(2 * cute.size(numbers), numbers.element_type)
    for i in range(cute.size(doubled)):
        doubled[i] = numbers[i // 2]
    return doubled.load()


def _neighbours_swapped(n):
    elements, swapped = elements_of(n), cute.make_rmem_tensor(n.shape, n.dtype)
    for i in range(cute.size(n.shape)):
        swapped[i] = elements[i ^ 1]
    return swapped.load()


@dataclass(frozen=True)
class _Place:
    """Where a thread stands: its token, its group, and its vectors of a head."""

    tiling: HeadTiling
    d: int
    batch: Int64
    token: Int64
    tokens: Int32
    group: Int32  # of the token
    lane: Int32

    def vectors(self) -> list[tuple[Int32, Boolean | bool]]:
        """Of each vector: its first element, and whether it is in the head."""
        t, part = self.tiling, self.d // self.tiling.parts
        within = [(self.lane + i * t.lanes) * t.vector for i in range(t.vectors)]
        tail = t.lanes * t.vectors * t.vector != part
        return [(p * part + at, at < part if tail else True) for p in range(t.parts) for at in within]

    def has_token(self) -> Boolean | bool:
        return self.token < self.tokens if self.tiling.tokens > 1 else True


def _both(a: Boolean | bool, b: Boolean | bool) -> Boolean | bool:
    return b if a is True else a if b is True else a & b


class _Heads:
    """The heads of q or of k that a thread works on: passes over all groups of its token."""

    def __init__(
        self, place, source, operand: Operand, strides, result, stored: Operand, weight, weight_operand, eps, steps
    ):
        self.place, self.source, self.operand = place, source, operand
        by_batch, by_token, self.by_head = strides
        self.first = place.batch * by_batch + place.token * by_token + place.group * self.by_head
        self.result, self.stored = result, stored
        self.first_result = ((place.batch * place.tokens + place.token) * operand.heads + place.group) * place.d
        self.weight, self.weight_operand, self.eps, self.steps = weight, weight_operand, eps, steps
        self.weights: Vectors | None = None
        self.passes = -(-operand.heads // place.tiling.groups)

    def _inside(self, i: int) -> Boolean | bool:
        groups = self.place.tiling.groups
        whole = (i + 1) * groups <= self.operand.heads
        return _both(self.place.has_token(), True if whole else self.place.group + i * groups < self.operand.heads)

    def load(self, i: int) -> list[cute.Tensor]:
        head = self.first + i * self.place.tiling.groups * self.by_head
        return _load(self.place, self.source, self.operand, head, self._inside(i))

    def load_weight(self) -> None:
        if self.weight_operand is not None:
            self.weights = [w.load() for w in _load(self.place, self.weight, self.weight_operand, Int64(0))]

    def normed(self, values: Vectors) -> Vectors:
        return _normed(values, self.weights, self.eps, self.steps.norm, self.place.d, self.place.tiling.lanes)

    def store(self, i: int, values: Vectors) -> None:
        head = i * self.place.tiling.groups * self.place.d
        for value, (at, inside) in zip(values, self.place.vectors(), strict=True):
            both = _both(inside, self._inside(i))
            offset = self.first_result + at + head  # the constant last: an offset in the instruction
            store(value, partial(vector_at, self.result, offset, self.place.tiling.vector, self.stored.access), both)


def _load_vector(pointer, operand: Operand, offset, vector: int, inside: Boolean | bool) -> cute.Tensor:
    return load(partial(vector_at, pointer, offset, vector, operand.access), vector, pointer.dtype, inside)


def _load(place: _Place, pointer, operand: Operand, offset, inside: Boolean | bool = True) -> list[cute.Tensor]:
    vector = place.tiling.vector
    return [_load_vector(pointer, operand, offset + at, vector, _both(i, inside)) for at, i in place.vectors()]


class _Rotation:
    """This thread's part of a token's rotation, and the turn of a head by it."""

    def __init__(self, place: _Place, chain: RotatedChain, rotation, sin, o: RopeOperands, strides):
        self.place, self.chain = place, chain
        by_batch, by_token, sin_batch, sin_token = strides
        offset = place.batch * by_batch + place.token * by_token
        self.complex = o.sin is None
        if self.complex:
            self.numbers = _load(place, rotation, o.rotation, 2 * offset, place.has_token())
            return
        dtypes = {steps.product for steps in (chain.q, chain.k) if steps is not None}
        cos = self._load(rotation, o.rotation, offset)
        sin = self._load(sin, o.sin, place.batch * sin_batch + place.token * sin_token)
        sin = [self._turned(s, p) for p, s in enumerate(sin)]
        self.cos = {dtype: [rounded(c, dtype) for c in cos] for dtype in dtypes}
        self.sin = {dtype: [rounded(s, dtype) for s in sin] for dtype in dtypes}

    def _load(self, pointer, operand: Operand, offset) -> Vectors:
        """Cosines or sines, for each element of this thread's."""
        place, t = self.place, self.place.tiling

        def loaded(at, vector: int, inside: Boolean | bool) -> cute.Tensor:
            return _load_vector(pointer, operand, offset + at, vector, _both(inside, place.has_token()))

        if not self.chain.one_a_pair:
            return [c.load() for c in _load(place, pointer, operand, offset, place.has_token())]
        if not self.chain.interleaved:
            first = place.vectors()[: t.vectors]
            return 2 * [loaded(at, t.vector, inside).load() for at, inside in first]
        return [_doubled(loaded(at // 2, t.vector // 2, inside)) for at, inside in place.vectors()]

    def _turned(self, sin, i: int):
        """The sines with the minus of the turn, (a, b) -> (-b, a): a product has the same digits with it."""
        elements = elements_of(widen(sin))
        for e in range(cute.size(elements)):
            minus = e % 2 == 0 if self.chain.interleaved else i < self.place.tiling.vectors
            if minus:
                elements[e] = -elements[e]
        return elements.load()

    def __call__(self, head: Vectors, steps: RotatedSteps) -> Vectors:
        if self.complex:
            turned = [_complex_product(n, c) for n, c in zip(head, self.numbers, strict=True)]
        else:
            turned = self._by_real(head, steps.product)
        return [rounded(rounded(t, steps.rotated), steps.out) for t in turned]

    def _by_real(self, head: Vectors, dtype: torch.dtype) -> Vectors:
        """n * cos + turned(n) * sin."""
        head, many = [rounded(n, dtype) for n in head], self.place.tiling.vectors
        others = [_neighbours_swapped(n) for n in head] if self.chain.interleaved else head[many:] + head[:many]
        straight = [product(n, c, dtype) for n, c in zip(head, self.cos[dtype], strict=True)]
        across = [product(n, s, dtype) for n, s in zip(others, self.sin[dtype], strict=True)]
        return [total(a, b, dtype) for a, b in zip(straight, across, strict=True)]


# --- the kernel -----------------------------------------------------------------------------------------------------


class NormRope:
    """One member of the family: a chain for one Dh, one number of heads and one layout of the operands."""

    def __init__(self, chain: RotatedChain, d: int, operands: RopeOperands, tiling: HeadTiling):
        self.chain, self.d, self.operands, self.tiling = chain, d, operands, tiling

    @cute.jit
    def __call__(
        self,
        q: cute.Pointer,
        k: cute.Pointer | None,
        q_weight: cute.Pointer | None,
        k_weight: cute.Pointer | None,
        rotation: cute.Pointer,  # of real numbers, also where they are the parts of complex ones
        sin: cute.Pointer | None,
        q_eps: Float32,
        k_eps: Float32,
        q_out: cute.Pointer,
        k_out: cute.Pointer | None,
        batches: Int32,
        tokens: Int32,
        q_batch: Int64,  # strides in elements, 0 where there is one; the results are contiguous
        q_token: Int64,
        q_head: Int64,
        k_batch: Int64,
        k_token: Int64,
        k_head: Int64,
        rotation_batch: Int64,
        rotation_token: Int64,
        sin_batch: Int64,
        sin_token: Int64,
        stream,
    ):
        of_q, of_k = (q_batch, q_token, q_head), (k_batch, k_token, k_head)
        of_rotation = (rotation_batch, rotation_token, sin_batch, sin_token)
        ctas = cute.ceil_div(tokens, self.tiling.tokens)
        self.kernel(
            q,
            k,
            q_weight,
            k_weight,
            rotation,
            sin,
            q_eps,
            k_eps,
            q_out,
            k_out,
            batches,
            tokens,
            of_q,
            of_k,
            of_rotation,
        ).launch(
            grid=[ctas, cutlass.min(batches, MAX_GRID_Y), cute.ceil_div(batches, MAX_GRID_Y)],
            block=[self.tiling.threads, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        q: cute.Pointer,
        k: cute.Pointer | None,
        q_weight: cute.Pointer | None,
        k_weight: cute.Pointer | None,
        rotation: cute.Pointer,
        sin: cute.Pointer | None,
        q_eps: Float32,
        k_eps: Float32,
        q_out: cute.Pointer,
        k_out: cute.Pointer | None,
        batches: Int32,
        tokens: Int32,
        of_q: tuple[Int64, ...],
        of_k: tuple[Int64, ...],
        of_rotation: tuple[Int64, ...],
    ):
        """A CTA works on `tiling.tokens` tokens of one batch item."""
        tiling, o = self.tiling, self.operands
        cta, some, many = cute.arch.block_idx()
        batch = some + many * MAX_GRID_Y
        last = cutlass.min(batch, batches - 1)
        lane, group = cute.arch.thread_idx()[0] % tiling.lanes, cute.arch.thread_idx()[0] // tiling.lanes
        token = cta * tiling.tokens + group // tiling.groups
        place = _Place(tiling, self.d, Int64(last), Int64(token), tokens, group % tiling.groups, lane)
        heads = [_Heads(place, q, o.q, of_q, q_out, o.q_out, q_weight, o.q_weight, q_eps, self.chain.q)]
        if const_expr(o.k is not None):
            heads += [_Heads(place, k, o.k, of_k, k_out, o.k_out, k_weight, o.k_weight, k_eps, self.chain.k)]
        walk = [(of, i) for of in heads for i in range(of.passes)]
        ahead = [of.load(i) for of, i in walk[: tiling.ahead]]
        turn = _Rotation(place, self.chain, rotation, sin, o, of_rotation)
        for of in cutlass.range_constexpr(len(heads)):
            heads[of].load_weight()
        cute.arch.sync_warp()
        if batch < batches:
            self.run(walk, ahead, turn)

    def run(self, walk, ahead, turn: _Rotation) -> None:
        for start in range(0, len(walk), self.tiling.ahead):
            part = walk[start : start + self.tiling.ahead]
            loaded = [of.load(i) for of, i in part] if start else ahead
            for (of, i), fragments in zip(part, loaded, strict=True):
                of.store(i, turn(of.normed([fragment.load() for fragment in fragments]), of.steps))
