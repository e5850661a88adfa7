"""One stage of a NormChain, over one row: term + act(factor) * norm(v).

All arithmetic is fp32. `rounding.py` decides where values are rounded: it gives the dtype of each step. A step converts
its result to that dtype and back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Boolean, Float32, Int32, Int64, const_expr

from dit_kernels.chain import Stage
from dit_kernels.cute.arith import elements_of, product, rounded, total, widen
from dit_kernels.cute.norm import normed, rstd_of, square, sum_of
from dit_kernels.cute.reduce import cta_sum
from dit_kernels.cute.spec import TensorSpec
from dit_kernels.cute.tiling import RowTiling
from dit_kernels.cute.vectors import load, load_into, store

# --- memory ---------------------------------------------------------------------------------------------------------


@cute.jit
def row_of(tensor: cute.Tensor, spec: cutlass.Constexpr, batch: Int32, token: Int32, vector: cutlass.Constexpr):
    """The row of a tensor for (batch, token), as (D / vector, vector)."""
    address = tensor.iterator.toint()
    if const_expr(spec.walk in ("token", "batch")):
        offset = Int64(batch) * tensor.stride[0]  # offsets can exceed 2^31
        if const_expr(spec.walk == "token"):
            offset += Int64(token) * tensor.stride[1]
        address += offset * (tensor.element_type.width // 8)
    pointer = cute.make_ptr(tensor.element_type, address, cute.AddressSpace.gmem, assumed_align=spec.access)
    d = tensor.shape[cute.rank(tensor) - 1]
    return cute.make_tensor(pointer, cute.make_layout((d // vector, vector), stride=(vector, 1)))


def _packed(value, dtype: torch.dtype) -> cute.Tensor:
    value = rounded(value, dtype)
    fragment = cute.make_rmem_tensor(value.shape, value.dtype)
    fragment.store(value)
    return fragment


@dataclass(frozen=True)
class RowPlace:
    """Where a thread works: its row, and its vectors of the row."""

    tiling: RowTiling
    d: int
    batch: Int32
    token: Int32
    thread: Int32

    def index(self, i):
        """The index in the row of this thread's vector i."""
        return self.thread + i * self.tiling.threads

    def inside(self, i):
        """Is vector i in the row? True while tracing if the tiling has no tail; otherwise a predicate."""
        return self.index(i) * self.tiling.vector < self.d if self.tiling.tail else True

    def over(self, d: int | None) -> RowPlace:
        """The place in another row of the token, of `d` elements; None: of as many as this one."""
        return self if d is None or d == self.d else replace(self, d=d, tiling=self.tiling.over(d))

    def counted(self, i, value: Float32) -> Float32:
        """What vector i adds to a sum over the row: 0 from outside the row, whatever its zeros have become."""
        inside = self.inside(i)
        return value if inside is True else Float32(cutlass.select_(inside, value, Float32(0.0)))


class Reader:
    """This thread's vectors of one operand. They are loaded ahead and kept, or loaded at each read."""

    def __init__(self, place: RowPlace, row: cute.Tensor | None, element: Float32 | None = None, ahead: bool = False):
        self.place, self.row, self.element = place, row, element
        self.fragments = [self._load(i) for i in range(place.tiling.vectors)] if ahead and row is not None else []

    @classmethod
    def of(cls, tensor: cute.Tensor | None, spec: TensorSpec | None, place: RowPlace, ahead: bool = False):
        """A reader of a tensor in global memory."""
        if spec is None:
            return cls(place, None)
        if spec.walk == "element":
            return cls(place, None, tensor[0, 0, 0].to(Float32))
        place = place.over(spec.width)
        return cls(place, row_of(tensor, spec, place.batch, place.token, place.tiling.vector), None, ahead)

    def in_memory(self, i) -> Callable[[], cute.Tensor]:
        return lambda: self.row[self.place.index(i), None]

    def _load(self, i) -> cute.Tensor:
        return load(self.in_memory(i), self.place.tiling.vector, self.row.element_type, self.place.inside(i))

    def __call__(self, i):
        """Vector i; a scalar for a single element; None for an absent operand."""
        if self.row is None:
            return self.element
        return (self.fragments[i] if self.fragments else self._load(i)).load()

    def taken(self, place: RowPlace) -> Reader:
        """A reader with a copy of the row that was loaded ahead. The registers of this one may be filled again."""
        reader = Reader(place, self.row)
        for fragment in self.fragments:
            copy = cute.make_rmem_tensor(fragment.shape, fragment.element_type)
            copy.store(fragment.load())
            reader.fragments.append(copy)
        return reader

    def refill(self, reader: Reader, wanted: Boolean) -> None:
        """Loads the row of another reader into the registers of this one, if `wanted`."""
        for i, fragment in enumerate(self.fragments):
            inside = reader.place.inside(i)
            load_into(fragment, reader.in_memory(i), wanted if inside is True else wanted & inside)


class Factor(Reader):
    """A factor as it enters the product. It is activated at each read, or once by `hold`."""

    activate: Callable[[Any], Any] = staticmethod(lambda value: value)

    def __call__(self, i):
        value = super().__call__(i)
        return None if value is None else self.activate(value)

    def hold(self, dtype: torch.dtype) -> None:
        """Activates the vectors that were loaded ahead, and keeps them packed in `dtype`, to which they are rounded."""
        if self.element is not None:
            self.element = self.activate(self.element)
        self.fragments = [_packed(self(i), dtype) for i in range(len(self.fragments))]
        self.activate = Factor.activate


class Writer(Reader):
    """This thread's vectors of a result. If the row is resident, they are kept packed and can be read again."""

    def __init__(self, tensor: cute.Tensor, spec: TensorSpec, place: RowPlace):
        super().__init__(place, row_of(tensor, spec, place.batch, place.token, place.tiling.vector))

    def store(self, i, value) -> cute.Tensor:
        fragment = store(value, self.in_memory(i), self.place.inside(i))
        if self.place.tiling.resident:
            self.fragments.append(fragment)
        return fragment


class Kept(Reader):
    """This thread's vectors of a result that is not stored."""

    def __init__(self, place: RowPlace):
        super().__init__(place, None)

    def store(self, i, value) -> cute.Tensor:
        self.fragments.append(elements_of(value))
        return self.fragments[-1]

    def __call__(self, i):
        return self.fragments[i].load()


@cute.jit
def walk(tiling: cutlass.Constexpr, visit: cutlass.Constexpr) -> Float32:
    """The sum of visit(i) over this thread's vectors, in order."""
    total = Float32(0.0)
    if const_expr(tiling.resident):
        for i in cutlass.range_constexpr(tiling.vectors):
            total += visit(i)
    else:
        for i in cutlass.range(tiling.vectors):
            total += visit(i)
    return total


# --- the parameters of a stage --------------------------------------------------------------------------------------


def factor_of(stage: Stage, operands: dict[str, Any], specs, place: RowPlace, ahead: bool) -> Factor:
    """The factor of a stage, with its activation."""
    name, dtype = stage.names.factor, stage.steps.factor
    factor = Factor.of(operands[name], specs[name], place, ahead)
    if stage.activation == "tanh":
        factor.activate = lambda value: rounded(cute.math.tanh(widen(value)), dtype)
    elif stage.activation == "one_plus":
        factor.activate = lambda value: rounded(widen(value) + 1.0, dtype)
    return factor


# --- a norm over the row --------------------------------------------------------------------------------------------


class Norm:
    """The norm of a stage. Its statistics are known after `finish` has summed over the CTA.

    `moment` is what a vector of the row adds to the first sum. In an rms norm, this is the sum of its squares. In a
    layer norm, it is the vector's share of the mean, x / D: a sum of large elements would overflow, but eager's running
    mean does not.
    """

    def __init__(self, stage: Stage, weight: Reader, bias: Reader, place: RowPlace, partials):
        self.layer, self.steps, self.partials = stage.norm == "layer", stage.steps.norm, partials  # (warps, 2)
        # F.layer_norm computes in fp32, whatever the dtype of its input.
        self.stat = torch.float32 if self.layer else self.steps.stat
        self.weight, self.bias, self.place = weight, bias, place
        self.mean = self.rstd = None

    def moment(self, i, value) -> Float32:
        place = self.place
        part = widen(value) * Float32(1.0 / place.d) if self.layer else square(value, None, self.stat)
        return place.counted(i, sum_of(part))

    def moments(self, values: Reader) -> Float32:
        """Those of this thread. values: the row."""
        return walk(self.place.tiling, lambda i: self.moment(i, values(i)))

    def finish(self, moments: Float32, values: Reader, eps: Float32) -> None:
        """moments: those of this thread; values: the row. A mean is a product with 1/D, as in torch.mean."""
        place, stat = self.place, self.stat
        if self.layer:
            self.mean = mean = cta_sum(moments, self.partials[None, 0])
            moments = walk(place.tiling, lambda i: place.counted(i, sum_of(square(values(i), mean, stat))))
        mean_square = cta_sum(moments, self.partials[None, 1]) * Float32(1.0 / place.d)
        self.rstd = rstd_of(mean_square, eps, self.steps.root, stat)

    def __call__(self, i, value):
        """Vector i, normalised."""
        return normed(value, self.mean, self.rstd, self.weight(i), self.bias(i), self.steps)


class NoNorm:
    """In place of the norm of a stage that has none: the row as it is."""

    def moments(self, values: Reader) -> None:
        """There are none."""

    def finish(self, moments: None, values: Reader, eps: None) -> None:
        """There is no sum."""

    def __call__(self, i, value):
        return value


# --- the result of a stage ------------------------------------------------------------------------------------------


def write(
    stage: Stage,
    norm: Norm | NoNorm,
    values: Reader,
    factor: Factor,
    term: Reader | None,
    out: Writer,
    following: Norm | None,
) -> Float32:
    """Writes the result row of a stage. Returns this thread's moments of the stored row, for the next norm."""
    steps = stage.steps

    def visit(i) -> Float32:
        n, f, t = norm(i, values(i)), factor(i), None if term is None else term(i)
        v = rounded(n, steps.product) if f is None else product(n, f, steps.product)
        v = v if t is None else total(t, v, steps.sum)
        fragment = out.store(i, rounded(v, steps.out))
        return Float32(0.0) if following is None else following.moment(i, fragment.load())

    return walk(out.place.tiling, visit)
