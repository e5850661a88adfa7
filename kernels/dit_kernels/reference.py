"""Every op in plain PyTorch: the definition.

It performs the PyTorch operations that the models perform, in their order and dtypes, so that it is bit-equal to a
model's own eager code wherever that code is a chain of ATen operations. Ops run it on CPU and wherever autograd needs a
gradient; the CUDA kernels are tested against it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_kernels.chain import Chain
from dit_kernels.rounding import GatedSteps, NormSteps, RotatedSteps, ScaledSteps, SiluSteps, compute_dtype


def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | Tensor, kind: str, steps: NormSteps
) -> Tensor:
    """norm(x) over the last dimension, in dtype `steps.out`. x: [..., D]; weight, bias: [D] or None; eps may be 0-d."""
    if kind == "layer":
        return _layer_norm(x, weight, bias, eps, steps)
    wide = x.to(steps.stat)
    n = _over_root(wide, wide.pow(2).mean(-1, keepdim=True) + eps, steps.root).to(steps.normed)
    if weight is not None:
        n = n * weight
    if bias is not None:
        n = n + bias
    return n.to(steps.out)


def _over_root(x: Tensor, v: Tensor, root: str) -> Tensor:
    if root == "quotient":
        return x / v.sqrt()
    return x * (torch.rsqrt(v) if root == "rsqrt" else v.sqrt().reciprocal())


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | Tensor, steps: NormSteps) -> Tensor:
    """F.layer_norm itself where it takes these dtypes; else the same in the compute dtype, with the one cast after.

    On a CPU it takes a 16-bit x with an fp32 weight and bias, and computes that otherwise than the cast would.
    """
    rows = {p.dtype for p in (weight, bias) if p is not None}
    mixed = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and rows == {torch.float32}
    plain = steps.stat == steps.out == x.dtype and (mixed or rows <= {x.dtype})
    if not plain:
        wide = compute_dtype(x.dtype)
        x = x.to(wide)
        weight, bias = (p if p is None else p.to(wide) for p in (weight, bias))
    return F.layer_norm(x, x.shape[-1:], weight, bias, float(eps)).to(steps.out)


def gated(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor,
    eps: float | Tensor,
    chain: Chain,
) -> Tensor:
    """y = residual + tanh(gate) * norm(x). x, residual: [..., D]; gate broadcasts to x."""
    assert chain.gated is not None
    steps: GatedSteps = chain.gated
    p = norm(x, weight, bias, eps, chain.norm, steps.norm)
    if gate is not None:
        t = gate.to(steps.gate)
        p = (t.tanh() if chain.tanh else t) * p
    return (residual + p.to(steps.product)).to(steps.y)


def scaled(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, eps: float | Tensor, chain: Chain
) -> Tensor:
    """z = norm(x) * (1 + scale). x: [..., D]; scale broadcasts to x."""
    assert chain.scaled is not None
    steps: ScaledSteps = chain.scaled
    n = norm(x, weight, bias, eps, chain.norm, steps.norm)
    if scale is not None:
        s = scale.to(steps.scale)
        n = n * (1 + s if chain.add_one else s)
    return n.to(steps.product).to(steps.z)


def rotated(
    x: Tensor,
    weight: Tensor | None,
    rotation: Tensor,
    sin: Tensor | None,
    eps: float | Tensor,
    steps: RotatedSteps,
    interleaved: bool,
) -> Tensor:
    """rotate(norm(x)), the norm over the last dimension. x: [B, S, H, Dh].

    rotation: complex [B|1, S, 1, Dh / 2], which multiplies the neighbouring pairs as complex numbers, as in Z-Image and
    Lumina 2. Or, with `sin`, the cosines, both [B|1, S, 1, Dh] or [.., Dh / 2]: n * cos + turned(n) * sin, with the
    quarter turn of neighbouring pairs, or of the halves of a head, as in Llama and Ideogram 4.
    """
    n = norm(x, weight, None, eps, "rms", steps.norm)
    if sin is None:
        pairs = torch.view_as_complex(n.to(compute_dtype(x.dtype)).reshape(*n.shape[:-1], n.shape[-1] // 2, 2))
        turned = torch.view_as_real(pairs * rotation).flatten(3)
    else:
        n = n.to(steps.product)
        cos, sin = (_for_both_of_a_pair(t.to(steps.product), x.shape[-1], interleaved) for t in (rotation, sin))
        turned = (n * cos) + (_quarter_turn(n, interleaved) * sin)
    return turned.to(steps.rotated).to(steps.out)


def _for_both_of_a_pair(t: Tensor, d: int, interleaved: bool) -> Tensor:
    if t.shape[-1] == d:
        return t
    return t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1)


def _quarter_turn(n: Tensor, interleaved: bool) -> Tensor:
    """(a, b) -> (-b, a) of every pair."""
    if interleaved:
        a, b = n.reshape(*n.shape[:-1], n.shape[-1] // 2, 2).unbind(-1)
        return torch.stack((-b, a), -1).flatten(3)
    a, b = n.chunk(2, -1)
    return torch.cat((-b, a), -1)


def silu_mul(a: Tensor, b: Tensor, steps: SiluSteps) -> Tensor:
    """silu(a) * b."""
    s = F.silu(a.to(torch.promote_types(a.dtype, steps.silu))).to(steps.silu)
    return (s * b).to(steps.product).to(steps.out)
