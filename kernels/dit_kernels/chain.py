"""What one call computes, apart from the sizes: the part of an op's arguments that a kernel is compiled for."""

from __future__ import annotations

from dataclasses import dataclass

from dit_kernels.rounding import GatedSteps, RotatedSteps, ScaledSteps, SiluSteps


@dataclass(frozen=True)
class Chain:
    """`y = residual + tanh(gate) * norm(x)`, `z = norm(x) * (1 + scale)`, or both, the second norm reading y.

    `gated` holds the dtypes of the steps of y and is None for norm_scale; `scaled` those of z and is None for
    norm_tanh_mul_add. With both, the chain is the dual.
    """

    norm: str  # "rms" or "layer"
    tanh: bool  # the gate is still to be activated
    add_one: bool  # the scale is still to get its 1
    gated: GatedSteps | None
    scaled: ScaledSteps | None

    @property
    def op(self) -> str:
        return "scaled" if self.gated is None else "gated" if self.scaled is None else "dual"


@dataclass(frozen=True)
class RotatedChain:
    """`rotate(norm(q))`, and the same of k with the same rotation; with one of them only, that is q."""

    interleaved: bool  # pairs are neighbours; else the halves of a head
    one_a_pair: bool  # there is one cosine and one sine for both of a pair; of a complex rotation always
    q: RotatedSteps
    k: RotatedSteps | None


@dataclass(frozen=True)
class SiluChain:
    """`silu(a) * b`."""

    steps: SiluSteps
