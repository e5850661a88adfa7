"""Linear layers with their activation: silu(x @ w_gate) * (x @ w_up), and gelu(x @ w). The kernels need quack.

x is [..., S, K]; the weights are [N, K], as nn.Linear stores them, and stay where they are. The kernel rounds the sum
of a matmul and its bias as eager does, and then applies the activation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from dit_kernels import reference
from dit_kernels.arguments import (
    ALIGNMENT,
    BIAS,
    MATRIX,
    TOKENS,
    Argument,
    Layout,
    Option,
    known,
    known_equal,
    reject,
)
from dit_kernels.chain import LinearChain
from dit_kernels.families.activation import GELU, SILU_MUL, ActivationOp, steps_of
from dit_kernels.families.family import Call, Family, KernelArguments, Named, Op, Shaped
from dit_kernels.families.rows import processors
from dit_kernels.rounding import compute_dtype
from dit_kernels.tuning import LIBRARY, NotMeasured
from dit_kernels.versions import installed_version

GRAIN = 8  # elements of 16 bits: sizes and strides are multiples of it, since a tensor map takes multiples of 16 bytes
TRIED = 3  # tilings, unless the user asks for more
FARTHEST = 1 << 40  # bytes between two weights that one tensor map can span


@dataclass(frozen=True)
class LinearTiling:
    """How the matmul is distributed.

    tile_m × tile_n: the part of the result that a CTA computes at once, before gate and up are multiplied. cluster_m ×
    cluster_n: the CTAs that share what they load. pingpong: two warp groups work on a tile each; otherwise on the same.
    """

    tile_m: int
    tile_n: int
    cluster_m: int = 1
    cluster_n: int = 1
    pingpong: bool = False

    def __str__(self) -> str:
        words = f"{self.tile_m}x{self.tile_n}/{self.cluster_m}x{self.cluster_n}"
        return f"{words}/pingpong" if self.pingpong else words


def tiling_of(configuration: str) -> LinearTiling:
    """The tiling that str(tiling) names. Raises ValueError for other words."""
    tile, cluster, *more = configuration.split("/")
    tile_m, tile_n, cluster_m, cluster_n = (int(size) for part in (tile, cluster) for size in part.split("x"))
    tiling = LinearTiling(tile_m, tile_n, cluster_m, cluster_n, pingpong=more == ["pingpong"])
    if str(tiling) != configuration or min(tile_m, tile_n, cluster_m, cluster_n) < 1:
        raise ValueError(f"{configuration} names no tiling")
    return tiling


# By the major number of the compute capability. The first one is the default.
# Hopper: the fastest of eight at the sizes of kernels/benchmarks/results/h100_linear.json.
TILINGS: Mapping[int, tuple[LinearTiling, ...]] = {
    9: (
        LinearTiling(128, 192, 2, 1, pingpong=True),
        LinearTiling(128, 160, 2, 1, pingpong=True),
        LinearTiling(128, 192, 1, 2, pingpong=True),
        LinearTiling(128, 256, 2, 1),
    ),
    10: (LinearTiling(256, 256, 2, 1),),
    12: (LinearTiling(128, 128, pingpong=True),),
}


# The share is that of kernels/benchmarks/results/h100_linear.json, where the fused kernel is chosen.
WITHOUT_QUACK = (
    "quack-kernels is not installed: pip install fusion-pass[gemm]. On an H100, the fused kernel takes 0.69 to 0.96 of "
    "the time"
)
RUN_ON = (9,)  # the major numbers whose kernels have run on a GPU; the others are only compiled, in the tests


class Linear(Family):
    """Computes a LinearChain."""

    grain = GRAIN
    arguments = (
        Argument("x", TOKENS),
        Argument("w", MATRIX),
        Argument("w_up", MATRIX),
        Argument("bias", BIAS, optional=True, defaulted=True),
        Argument("bias_up", BIAS, optional=True, defaulted=True),
        Argument("out", TOKENS, written=True, placed=True),
    )

    def __repr__(self) -> str:
        return f"Linear, quack {installed_version('quack-kernels')}"  # a part of the name of a kernel on disk

    def check(self, op: Op, named: Named, options: Named) -> None:
        """The weights have one shape, a bias is as long as its weight has rows, and all have x's dtype."""
        n = named["w"].shape[0]
        up = named.get("w_up")
        if up is not None and not known_equal(up.shape[0], n):
            reject(op.name, "w_up.shape", list(up.shape), f"{list(named['w'].shape)}, the shape of {op.own_name('w')}")
        for argument in op.inputs[1:]:
            given, name = named[argument.name], op.own_name(argument.name)
            if given is None:
                continue
            if given.dtype != named["x"].dtype:
                reject(op.name, f"{name}.dtype", given.dtype, f"{named['x'].dtype}, the dtype of x")
            if argument.role is BIAS and not known_equal(given.shape[0], n):
                reject(op.name, f"{name}.shape", list(given.shape), f"[{n}], the rows of {op.own_name('w')}")
        if options.get("configuration"):
            try:
                tiling_of(options["configuration"])
            except (TypeError, ValueError):
                reject(op.name, "configuration", repr(options["configuration"]), "'' or one like '128x192/2x1'")

    def chain(self, op: Op, named: Named, options: Named) -> LinearChain:
        assert isinstance(op, ActivationOp)
        dtype = named["x"].dtype
        steps = steps_of(options, dtype, dtype if "w_up" in op.arguments else None)
        rounded = compute_dtype(dtype) if options["rounding"] == "fp32" else dtype
        return LinearChain(op.act(options), rounded, steps, options["configuration"])

    def results(self, chain: LinearChain, named: Named) -> tuple[Shaped, ...]:
        return (((*named["x"].shape[:-1], named["w"].shape[0]), chain.steps.out),)

    def definition(self, chain: LinearChain, named: Named) -> tuple[Tensor, ...]:
        def layer(weight: str, bias: str) -> Tensor:
            b = named.get(bias)
            x, w = named["x"].to(chain.linear), named[weight].to(chain.linear)
            # In one matmul. Of an x that is not contiguous, F.linear makes several, and rounds before it adds the bias.
            result = linear(x.flatten(0, -2), w, None if b is None else b.to(chain.linear))
            return result.reshape(*x.shape[:-1], w.shape[0])

        up = None if named.get("w_up") is None else layer("w_up", "bias_up")
        return (reference.activation(layer("w", "bias"), up, chain.act, chain.steps),)

    def fits_kernel(self, chain: LinearChain, named: Named) -> bool:
        """16-bit operands of one dtype, aligned strides, weights whose rows are contiguous, and two tokens or more."""
        x, weights = named["x"], [named["w"], *([named["w_up"]] if named.get("w_up") is not None else [])]
        if x.dtype not in (torch.bfloat16, torch.float16) or chain.steps.out != x.dtype:
            return False
        if len(weights) > 1 and any(named.get(name) is not None for name in ("bias", "bias_up")):
            return False
        if not all(known(size % GRAIN == 0) for size in weights[0].shape) or not known(x.shape[:-1].numel() > 1):
            return False
        if not all(known_equal(w.stride(1), 1) and known(w.stride(0) % GRAIN == 0) for w in weights):
            return False
        if not known_equal(weights[0].stride(0), weights[-1].stride(0)):
            return False
        found = TOKENS.laid(x.shape, x.stride(), x.shape, known_equal)  # None: the kernel reads a copy
        if found is not None and not known(found[1][1] % GRAIN == 0):
            return False
        return self.missing(x.device) is None

    def missing(self, device: torch.device) -> str | None:
        major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
        if major not in RUN_ON:
            return f"its kernel has not run on compute capability {major}.x yet"
        return None if has_quack() else WITHOUT_QUACK

    def problem(self, call: Call, thorough: bool) -> LinearProblem:
        x, w, up, bias = (call.named.get(name) for name in ("x", "w", "w_up", "bias"))
        assert x is not None and w is not None
        tilings = TILINGS[torch.cuda.get_device_capability(x.device)[0]]
        return LinearProblem(
            call.op,
            call.chain,
            math.prod(map(hint, x.shape[:-1])),
            k=int(x.shape[-1]),
            n=int(w.shape[0]),
            dtype=x.dtype,
            biased=bias is not None,
            halves=up is not None and up.untyped_storage()._cdata == w.untyped_storage()._cdata,
            configurations=tuple(map(str, tilings if thorough else tilings[:TRIED])),
        )

    def can_launch(self, given: Sequence[Any]) -> bool:
        """Can one tensor map span both weights?"""
        _, gate, up, *_ = given
        return up is None or 0 < abs(up - gate) < FARTHEST

    def can_run(self, operands: KernelArguments) -> bool:
        """A tensor map takes addresses and strides that are multiples of 16 bytes."""
        layouts = [layout for layout in operands.values.values() if isinstance(layout, Layout)]
        strides = [by for layout in layouts for by in layout.strides[:-1]]
        aligned = not any(layout.address % ALIGNMENT for layout in layouts) and not any(by % GRAIN for by in strides)
        return aligned and super().can_run(operands)

    def kernel(self) -> Callable[..., Any]:
        from dit_kernels.cute.linear import LinearKernel

        return LinearKernel

    def tiling(self, chain: LinearChain, d: int, specs: Named, arch: str) -> tuple[int, LinearTiling]:
        major = int("".join(filter(str.isdigit, arch))) // 10
        return major, tiling_of(chain.configuration) if chain.configuration else TILINGS[major][0]

    def of_launch(self, device: int, stream: int, batches: int) -> tuple[int, ...]:
        """The number of multiprocessors."""
        return (processors(device),)


@cache
def has_quack() -> bool:
    """Is quack installed, with all that it imports?"""
    return all(find_spec(name) is not None for name in ("quack", "triton"))


def hint(size: Any) -> int:
    """The size as a number. A symbol has the size of the example inputs. Raises NotMeasured if a symbol has none."""
    if isinstance(size, int):
        return size
    if not size.node.has_hint():
        raise NotMeasured("the number of tokens is not known")
    return int(size.node.hint)


@dataclass(frozen=True)
class LinearProblem:
    """A linear layer with its activation, against PyTorch's matmuls with the activation behind them.

    halves: both weights are parts of one tensor, so that PyTorch multiplies by both at once.
    """

    op: Op = field(repr=False)
    chain: LinearChain
    tokens: int
    k: int
    n: int
    dtype: torch.dtype
    biased: bool
    halves: bool
    configurations: tuple[str, ...]

    @property
    def weights(self) -> int:
        return 2 if self.chain.act == "silu" else 1

    @property
    def bytes(self) -> int:
        """Of the operands, of what each CUDA graph holds, and of two results that are compared."""
        results = 1 + self.weights + len(self.configurations) + 2
        numbers = self.tokens * self.k + self.weights * self.n * self.k + results * self.tokens * self.n
        return numbers * self.dtype.itemsize

    def candidates(
        self, device: torch.device, run: Callable[[Call], tuple[Tensor, ...]]
    ) -> dict[str, Callable[[], Tensor]]:
        generator = torch.Generator(device).manual_seed(0)  # of our own, so that the model draws the same numbers

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=self.dtype, generator=generator)

        x, weights = random(self.tokens, self.k), random(self.weights * self.n, self.k).div_(self.k**0.5)
        bias = random(self.n) if self.biased else None
        parts = weights.chunk(self.weights)

        def library() -> Tensor:
            if self.weights == 1:  # in one kernel, as Inductor's, whatever the rounding
                return gelu(linear(x, weights, bias), approximate="tanh" if self.chain.act == "gelu_tanh" else "none")
            a, b = linear(x, weights).chunk(2, -1) if self.halves else (linear(x, part) for part in parts)
            result: Tensor = torch.ops.dit_kernels.silu_mul(a, b)
            return result

        def fused(configuration: str) -> Tensor:
            named = {"x": x, "w": parts[0], "w_up": parts[1] if self.weights == 2 else None, "bias": bias}
            (result,) = run(Call(self.op, replace(self.chain, configuration=configuration), named))
            return result

        return {LIBRARY: library} | {name: partial(fused, name) for name in self.configurations}


# --- the ops --------------------------------------------------------------------------------------------------------

_CONFIGURATION = Option("configuration", "str", "")
_LINEAR = Linear()
LINEAR_SILU_MUL = ActivationOp(
    "linear_silu_mul",
    _LINEAR,
    ("x", "w", "w_up", "bias", "bias_up", "out"),
    (*SILU_MUL.options, _CONFIGURATION),
    {"w": "w_gate", "bias": "bias_gate"},
    activation="silu",
)
LINEAR_GELU = ActivationOp(
    "linear_gelu",
    _LINEAR,
    ("x", "w", "bias", "out"),
    (*GELU.options, _CONFIGURATION),
    activation="gelu",
)
OPS = (LINEAR_SILU_MUL, LINEAR_GELU)
