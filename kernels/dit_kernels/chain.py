"""The chain of a call: what the call computes, apart from the sizes. A kernel is compiled for one chain."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dit_kernels.rounding import ActivationSteps, QuantSteps, RotatedSteps, StageSteps, StaticSteps


@dataclass(frozen=True)
class StageNames:
    """An op's names for the arguments of a stage, and for the options that change how the stage is computed.

    A stage without a norm has no weight, bias, eps and norm_dtype: their names are "". term: a residual, or a shift,
    which broadcasts.
    activation: what the op applies to the factor if the option `switch` is on: "tanh", or "one_plus" (1 + factor).
    activates: is the switch on by default?
    """

    weight: str
    bias: str
    factor: str
    term: str
    eps: str
    out: str
    activation: str
    switch: str
    norm_dtype: str
    activates: bool = True

    @property
    def has_norm(self) -> bool:
        return bool(self.eps)

    @property
    def out_dtype(self) -> str:
        return f"{self.out}_dtype"


# GATED: y = residual + tanh(gate) * norm(x). UNNORMED: y = residual + gate * x.
# SCALED: z = norm(x) * (1 + scale) + shift. SECOND: the same behind a stage that has a norm, too.
GATED = StageNames("weight", "bias", "gate", "residual", "eps", "y", "tanh", "tanh", "norm_dtype")
UNNORMED = StageNames("", "", "gate", "residual", "", "y", "tanh", "tanh", "", activates=False)
SCALED = StageNames("weight", "bias", "scale", "shift", "eps", "z", "one_plus", "add_one", "norm_dtype")
SECOND = StageNames("weight2", "bias2", "scale", "shift", "eps2", "z", "one_plus", "add_one", "norm_dtype2")


@dataclass(frozen=True)
class Stage:
    """out = term + act(factor) * norm(v). norm, factor and term may be absent."""

    norm: str | None  # "rms" or "layer"; None: v itself
    activation: str | None  # what is applied to the factor, as in StageNames; None: nothing
    steps: StageSteps
    names: StageNames

    def held_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which a kernel keeps a parameter for many rows. A factor is kept after its activation."""
        return self.steps.factor if name == self.names.factor and self.activation is not None else dtype


@dataclass(frozen=True)
class NormChain:
    """One or more stages. The first stage reads x; each later stage reads the result of the stage before it.

    quant: how the result of the last stage is quantised. q is then stored in its place, and with QuantSteps also s.
    None: the result is stored. keeps: the result is stored beside q, too.
    """

    stages: tuple[Stage, ...]
    quant: QuantSteps | StaticSteps | None = None
    keeps: bool = False


@dataclass(frozen=True)
class RotatedChain:
    """rotate(norm(q)), and rotate(norm(k)) with the same rotation. With only one of them, it is q, and k is None."""

    interleaved: bool  # True: a pair is two neighbouring elements; False: elements i and i + Dh / 2
    one_a_pair: bool  # both elements of a pair share one cosine and one sine, as with complex numbers
    q: RotatedSteps
    k: RotatedSteps | None
    matrices: bool = False  # each pair is multiplied by its own 2×2 matrix
    addcmul: bool = False  # the second of two real products is not rounded before the sum
    norm: str = "rms"  # or "layer"


@dataclass(frozen=True)
class RotatedRowChain:
    """rotate(norm(x)), with one norm over all heads of a token."""

    heads: int  # a pair is in one of them
    own: bool  # True: each head has its own rotation; False: all heads share one
    interleaved: bool  # as in RotatedChain
    one_a_pair: bool  # as in RotatedChain
    addcmul: bool  # as in RotatedChain
    steps: RotatedSteps


@dataclass(frozen=True)
class ActivationChain:
    """act(a) * b; act(a) if there is no b. act: one of rounding.ACTIVATIONS. quant and keeps: as for a NormChain."""

    act: str
    steps: ActivationSteps
    quant: QuantSteps | StaticSteps | None = None
    keeps: bool = False


@dataclass(frozen=True)
class LinearChain:
    """act(R(x @ w_gate)) * R(x @ w_up), or act(R(x @ w)) if there is no product. R rounds to `linear`.

    act: one of rounding.ACTIVATIONS. configuration: how the kernel is tiled, see families.linear; "" for the default.
    """

    act: str
    linear: torch.dtype
    steps: ActivationSteps
    configuration: str = ""
