"""The norm of query and key heads with their rotation. Each head is read and written once.

A group of lanes works on one head at a time (`heads.py`). It keeps the token's rotation and its part of the weights in
registers for all its heads, and loads several heads before it works on the first. Groups do not wait for each other: a
sum over a head is computed by shuffles within the group.

All arithmetic is fp32. With a complex128 rotation, the arithmetic after the norm is fp64. `rounding.py` gives the dtype
that each step is rounded to.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Boolean, Float32, Float64, Int32, Int64, const_expr

from dit_kernels.chain import RotatedChain
from dit_kernels.cute.arith import elements_of, rounded, widen
from dit_kernels.cute.fma import fma32, fma64
from dit_kernels.cute.heads import HeadTiling
from dit_kernels.cute.kernel import Kernel
from dit_kernels.cute.norm import normed, rstd_of, square, sum_of
from dit_kernels.cute.pairs import (
    Vectors,
    column,
    doubled,
    neighbours_swapped,
    of_pairs,
    signed,
    sums_of_products,
)
from dit_kernels.cute.reduce import warp_sum
from dit_kernels.cute.spec import TensorSpec
from dit_kernels.cute.tiling import MAX_GRID_Y
from dit_kernels.cute.vectors import load, store, vector_at
from dit_kernels.rounding import NormSteps, RotatedSteps

# --- one head: the vectors of a thread, ordered by part, then by vector ---------------------------------------------
# Plain Python: these functions run while a kernel is traced.


def _normed(values: Vectors, weights: Vectors | None, eps: Float32, steps: NormSteps, d: int, lanes: int) -> Vectors:
    """The rms norm of a head."""
    squares = [sum_of(square(x, None, steps.stat)) for x in values]
    mean_square = warp_sum(sum(squares[1:], squares[0]), lanes) * Float32(1.0 / d)
    rstd = rstd_of(mean_square, eps, steps.root, steps.stat)
    return [normed(x, None, rstd, w, None, steps) for x, w in zip(values, weights or len(values) * [None], strict=True)]


def _layer_normed(
    values: Vectors, weights: Vectors | None, biases: Vectors | None, eps: Float32, steps: NormSteps, place: HeadPlace
) -> Vectors:
    """The layer norm of a head, in two passes, as in `stage.Norm`."""
    share = Float32(1.0 / place.d)
    shares = [sum_of(widen(x) * share) for x in values]
    mean = warp_sum(sum(shares[1:], shares[0]), place.tiling.lanes)
    inside = [inside for _, inside in place.vectors()]
    squares = [_counted(i, sum_of(square(x, mean, torch.float32))) for x, i in zip(values, inside, strict=True)]
    rstd = rstd_of(warp_sum(sum(squares[1:], squares[0]), place.tiling.lanes) * share, eps, steps.root, torch.float32)
    absent = len(values) * [None]
    columns = zip(values, weights or absent, biases or absent, strict=True)
    return [normed(x, mean, rstd, weight, bias, steps) for x, weight, bias in columns]


def _counted(inside: Boolean | bool, value: Float32) -> Float32:
    """What a vector adds to a sum: 0 from outside the head, where zeros differ from the mean."""
    return value if inside is True else Float32(cutlass.select_(inside, value, Float32(0.0)))


def _complex_product(n, rotation: cute.Tensor):
    """(a + ib)(c + is) of each pair, contracted as CUDA's compiler contracts eager's kernel."""
    wide, fma = (Float64, fma64) if rotation.element_type is Float64 else (Float32, fma32)
    pairs, turned = elements_of(widen(n)), cute.make_rmem_tensor(n.shape, Float32)
    for i in range(0, cute.size(n.shape), 2):
        a, b, c, s = wide(pairs[i]), wide(pairs[i + 1]), rotation[i], rotation[i + 1]
        turned[i] = Float32(fma(a, c, -(b * s)))
        turned[i + 1] = Float32(fma(b, c, a * s))
    return turned.load()


@dataclass(frozen=True)
class HeadPlace:
    """Where a thread is: its token, its group, and its vectors of a head."""

    tiling: HeadTiling
    d: int
    batch: Int64
    token: Int64
    tokens: Int32
    group: Int32  # of the token
    lane: Int32

    def vectors(self) -> list[tuple[Int32, Boolean | bool]]:
        """For each vector: the index of its first element, and whether it is in the head."""
        t, part = self.tiling, self.d // self.tiling.parts
        within = [(self.lane + i * t.lanes) * t.vector for i in range(t.vectors)]
        tail = t.lanes * t.vectors * t.vector != part
        return [(p * part + at, at < part if tail else True) for p in range(t.parts) for at in within]

    def has_token(self) -> Boolean | bool:
        return self.token < self.tokens if self.tiling.tokens > 1 else True


def _both(a: Boolean | bool, b: Boolean | bool) -> Boolean | bool:
    return b if a is True else a if b is True else a & b


class Global(NamedTuple):
    """A tensor in global memory."""

    pointer: Any
    spec: TensorSpec
    strides: tuple[Any, ...] = ()

    def load(self, place: HeadPlace, offset, vector: int, inside: Boolean | bool) -> cute.Tensor:
        """Loads the vector that starts at an offset in elements."""
        return load(
            partial(vector_at, self.pointer, offset, vector, self.spec.access), vector, self.pointer.dtype, inside
        )

    def load_all(self, place: HeadPlace, offset, inside: Boolean | bool = True) -> list[cute.Tensor]:
        """Loads this thread's vectors of the head that starts at an offset in elements."""
        vector = place.tiling.vector
        return [self.load(place, offset + at, vector, _both(i, inside)) for at, i in place.vectors()]


class _Heads:
    """The heads of q or of k that a thread works on. In one pass, each group of the token takes one head."""

    def __init__(
        self,
        place: HeadPlace,
        bundle: dict[str, Global | None],
        x: str,
        eps: Float32,
        steps: RotatedSteps,
        norm: str,
    ):
        self.place, self.source, self.result, self.weight = place, bundle[x], bundle[f"{x}_out"], bundle[f"{x}_weight"]
        self.eps, self.steps, self.heads, self.norm = eps, steps, self.source.spec.heads, norm
        self.bias = bundle.get(f"{x}_bias")
        self.first, self.first_result = self._first(self.source), self._first(self.result)
        self.weights: Vectors | None = None
        self.biases: Vectors | None = None
        self.passes = -(-self.heads // place.tiling.groups)

    def _first(self, heads: Global) -> Int64:
        """The offset, in elements, of the first head of this group."""
        by_batch, by_token, by_head = heads.strides
        return self.place.batch * by_batch + self.place.token * by_token + self.place.group * by_head

    def _further(self, heads: Global, i: int) -> Int64:
        """How far, in elements, the head of pass i is behind the first."""
        return i * self.place.tiling.groups * heads.strides[2]

    def _inside(self, i: int) -> Boolean | bool:
        groups = self.place.tiling.groups
        whole = (i + 1) * groups <= self.heads
        return _both(self.place.has_token(), True if whole else self.place.group + i * groups < self.heads)

    def load(self, i: int) -> list[cute.Tensor]:
        head = self.first + self._further(self.source, i)
        return self.source.load_all(self.place, head, self._inside(i))

    def load_weight(self) -> None:
        if self.weight is not None:
            self.weights = [w.load() for w in self.weight.load_all(self.place, Int64(0))]
        if self.bias is not None:
            self.biases = [b.load() for b in self.bias.load_all(self.place, Int64(0))]

    def normed(self, values: Vectors) -> Vectors:
        if self.norm == "layer":
            return _layer_normed(values, self.weights, self.biases, self.eps, self.steps.norm, self.place)
        return _normed(values, self.weights, self.eps, self.steps.norm, self.place.d, self.place.tiling.lanes)

    def store(self, i: int, values: Vectors) -> None:
        head, vector = self.first_result + self._further(self.result, i), self.place.tiling.vector
        for value, (at, inside) in zip(values, self.place.vectors(), strict=True):
            both, offset = _both(inside, self._inside(i)), head + at
            store(value, partial(vector_at, self.result.pointer, offset, vector, self.result.spec.access), both)


class Rotation:
    """This thread's part of a token's rotation. A call rotates a head."""

    def __init__(self, place: HeadPlace, chain: RotatedChain, bundle: dict[str, Global | None]):
        self.place, self.chain = place, chain
        rotation, sin = bundle["rotation"], bundle["sin"]
        by_batch, by_token = rotation.strides
        offset = place.batch * by_batch + place.token * by_token
        self.complex = sin is None and not chain.matrices
        if self.complex:
            self.numbers = rotation.load_all(place, 2 * offset, place.has_token())
            return
        dtypes = {steps.product for steps in (chain.q, chain.k) if steps is not None}
        if chain.matrices:
            first, second = self._load_columns(rotation, offset)
        else:
            sin_batch, sin_token = sin.strides
            first = self._load(rotation, offset)
            second = self._load(sin, place.batch * sin_batch + place.token * sin_token)
            second = [signed(s, chain.interleaved, i < place.tiling.vectors) for i, s in enumerate(second)]
        self.first = {dtype: [rounded(c, dtype) for c in first] for dtype in dtypes}
        self.second = {dtype: [rounded(s, dtype) for s in second] for dtype in dtypes}

    def _load(self, table: Global, offset) -> Vectors:
        """Cosines or sines, one for each element of this thread."""
        place, t = self.place, self.place.tiling

        def loaded(at, vector: int, inside: Boolean | bool) -> cute.Tensor:
            return table.load(place, offset + at, vector, _both(inside, place.has_token()))

        if not self.chain.one_a_pair:
            return [c.load() for c in table.load_all(place, offset, place.has_token())]
        if not self.chain.interleaved:
            first = place.vectors()[: t.vectors]
            return 2 * [loaded(at, t.vector, inside).load() for at, inside in first]
        return [doubled(loaded(at // 2, t.vector // 2, inside)) for at, inside in place.vectors()]

    def _load_columns(self, matrices: Global, offset) -> tuple[Vectors, Vectors]:
        """The first and second columns of 2×2 matrices, of each a number for each element of this thread."""
        place, vector = self.place, self.place.tiling.vector
        loaded = [
            matrices.load(place, offset + 2 * at, 2 * vector, _both(inside, place.has_token()))
            for at, inside in place.vectors()
        ]
        return [column(m, 0) for m in loaded], [column(m, 1) for m in loaded]

    def __call__(self, head: Vectors, steps: RotatedSteps) -> Vectors:
        if self.complex:
            turned = [_complex_product(n, c) for n, c in zip(head, self.numbers, strict=True)]
        else:
            turned = self._by_real(head, steps.product)
        return [rounded(rounded(t, steps.rotated), steps.out) for t in turned]

    def _by_real(self, head: Vectors, dtype: torch.dtype) -> Vectors:
        """n * cos + turned(n) * sin, or the products with matrices."""
        head, many = [rounded(n, dtype) for n in head], self.place.tiling.vectors
        if self.chain.matrices:
            head, others = [of_pairs(n, 0) for n in head], [of_pairs(n, 1) for n in head]
        else:
            others = [neighbours_swapped(n) for n in head] if self.chain.interleaved else head[many:] + head[:many]
        return sums_of_products(head, self.first[dtype], others, self.second[dtype], dtype, self.chain.addcmul)


# --- the kernel -----------------------------------------------------------------------------------------------------


class NormRopeKernel(Kernel):
    """The kernel of a RotatedChain. A complex tensor is passed as a pointer to real numbers."""

    def launch(self, operands, batches, tokens, strides, of_launch, stream) -> None:
        ctas = cute.ceil_div(self.all_tokens(tokens, strides), self.tiling.tokens)
        self.kernel(operands, batches, tokens, strides).launch(
            grid=[ctas, cutlass.min(batches, MAX_GRID_Y), cute.ceil_div(batches, MAX_GRID_Y)],
            block=[self.tiling.threads, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(self, operands: dict[str, Any], batches: Int32, tokens: Int32, strides: dict[str, Any]):
        """A CTA works on `tiling.tokens` tokens of one batch item."""
        tiling, chain = self.tiling, self.chain
        cta, some, many = cute.arch.block_idx()
        batch = some + many * MAX_GRID_Y
        last = cutlass.min(batch, batches - 1)
        lane, group = cute.arch.thread_idx()[0] % tiling.lanes, cute.arch.thread_idx()[0] // tiling.lanes
        token = cta * tiling.tokens + group // tiling.groups
        every = self.all_tokens(tokens, strides)
        place = HeadPlace(tiling, self.d, Int64(last), Int64(token), every, group % tiling.groups, lane)
        bundle, eps = self.bundle(operands, strides, place), self.eps(operands, strides, place)
        heads = [_Heads(place, bundle, "q", eps["q"], chain.q, chain.norm)]
        if const_expr(chain.k is not None):
            heads += [_Heads(place, bundle, "k", eps["k"], chain.k, chain.norm)]
        walk = [(of, i) for of in heads for i in range(of.passes)]
        ahead = [of.load(i) for of, i in walk[: tiling.ahead]]
        turn = self.rotation(place, bundle, tokens, strides)
        for of in cutlass.range_constexpr(len(heads)):
            heads[of].load_weight()
        cute.arch.sync_warp()
        if batch < batches:
            self.run(walk, ahead, turn)

    def all_tokens(self, tokens: Int32, strides: dict[str, Any]) -> Int32:
        """How many tokens a batch item has."""
        return tokens

    def rotation(
        self, place: HeadPlace, bundle: dict[str, Global | None], tokens: Int32, strides: dict[str, Any]
    ) -> Rotation:
        """The rotation of the token of this thread."""
        return Rotation(place, self.chain, bundle)

    def eps(self, operands: dict[str, Any], strides: dict[str, Any], place: HeadPlace) -> dict[str, Float32]:
        """The eps of q and of k, for the token of this thread."""
        return {x: operands[f"{x}_eps"] for x in "qk"}

    def bundle(self, operands: dict[str, Any], strides: dict[str, Any], place: HeadPlace) -> dict[str, Global | None]:
        """The tensors in global memory, for the token of this thread."""
        return {
            name: None if spec is None else Global(operands[name], spec, strides.get(name, ()))
            for name, spec in self.specs.items()
        }

    def run(self, walk, ahead, turn: Rotation) -> None:
        for start in range(0, len(walk), self.tiling.ahead):
            part = walk[start : start + self.tiling.ahead]
            loaded = [of.load(i) for of, i in part] if start else ahead
            for (of, i), fragments in zip(part, loaded, strict=True):
                of.store(i, turn(of.normed([fragment.load() for fragment in fragments]), of.steps))
