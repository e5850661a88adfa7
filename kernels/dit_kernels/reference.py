"""The definition of every op, in plain PyTorch.

It runs the PyTorch operations that the models run, in their order and dtypes. So it is bit-equal to a model's own eager
code wherever that code is a chain of ATen operations. Ops run their definition on the CPU, and on any device if
autograd needs a gradient. The CUDA kernels are tested against it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_kernels.chain import RotatedChain, RotatedRowChain, Stage
from dit_kernels.rounding import (
    LARGEST,
    ActivationSteps,
    NormSteps,
    QuantSteps,
    RotatedSteps,
    StaticSteps,
    compute_dtype,
)


def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | Tensor, kind: str, steps: NormSteps
) -> Tensor:
    """norm(x) over the last dimension, in dtype `steps.out`.

    x: [..., D]; weight, bias: [D] or None; eps: a number or a 0-d tensor.
    """
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
    """F.layer_norm itself if it takes these dtypes. Otherwise F.layer_norm in the compute dtype, followed by one cast.

    On a CPU, F.layer_norm also takes a 16-bit x with an fp32 weight and bias. Its result then differs from that with
    casts.
    """
    rows = {p.dtype for p in (weight, bias) if p is not None}
    mixed = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and rows == {torch.float32}
    plain = steps.stat == steps.out == x.dtype and (mixed or rows <= {x.dtype})
    if not plain:
        wide = compute_dtype(x.dtype)
        x = x.to(wide)
        weight, bias = (p if p is None else p.to(wide) for p in (weight, bias))
    return F.layer_norm(x, x.shape[-1:], weight, bias, float(eps)).to(steps.out)


def stage(
    v: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    factor: Tensor | None,
    term: Tensor | None,
    eps: float | Tensor | None,
    stage: Stage,
) -> Tensor:
    """term + act(factor) * norm(v), or without a norm term + act(factor) * v. v: [..., D]; factor and term broadcast to
    v. eps: None without a norm."""
    steps = stage.steps
    if stage.norm is None or steps.norm is None or eps is None:
        n = v.to(steps.product)  # the dtype that the product promotes v to
    else:
        n = norm(v, weight, bias, eps, stage.norm, steps.norm)
    if factor is not None:
        f = factor.to(steps.factor)
        n = (f.tanh() if stage.activation == "tanh" else 1 + f if stage.activation == "one_plus" else f) * n
    n = n.to(steps.product)
    return (n if term is None else term + n).to(steps.out)


def rotated(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rotation: Tensor,
    sin: Tensor | None,
    eps: float | Tensor,
    steps: RotatedSteps,
    chain: RotatedChain,
    partly: bool = False,
) -> Tensor:
    """rotate(norm(x)), with the norm over the last dimension. x: [B, S, H, Dh]; the rest is as for `rotate`.

    partly: only the last tokens are rotated, as many as the rotation has rows.
    """
    n = norm(x, weight, bias, eps, chain.norm, steps.norm)
    first = n.shape[1] - rotation.shape[1] if partly else 0
    turned = rotate(n[:, first:] if partly else n, rotation, sin, steps, chain, compute_dtype(x.dtype))
    return torch.cat((n[:, :first].to(steps.out), turned), 1) if partly else turned


def rotate(
    n: Tensor, rotation: Tensor, sin: Tensor | None, steps: RotatedSteps, chain: RotatedChain, wide: torch.dtype
) -> Tensor:
    """The rotation of heads. n: [B, S, H, Dh]; wide: the dtype of the real and imaginary parts of complex products.

    A complex rotation is [B|1, S, 1, Dh / 2]. It multiplies pairs of neighbouring elements as complex numbers, as in
    Z-Image and Lumina 2.

    With `sin`, rotation holds the cosines; both are [B|1, S, 1, Dh] or [B|1, S, 1, Dh / 2]. The result is
    n * cos + turned(n) * sin, where turned(n) is a quarter turn of each pair. A pair is two neighbouring elements
    (`interleaved`), or one element from each half of a head, as in Llama and Ideogram 4.

    Matrices are [B|1, S, 1, 2 * Dh], four numbers for each pair of neighbours. A pair (a, b) becomes
    (m00 * a + m01 * b, m10 * a + m11 * b), as in the official FLUX and in ComfyUI.
    """
    if chain.matrices:
        turned = _by_matrices(n, rotation, steps.product, chain.addcmul)
    elif sin is None:
        pairs = torch.view_as_complex(n.to(wide).reshape(*n.shape[:-1], n.shape[-1] // 2, 2))
        turned = torch.view_as_real(pairs * rotation).flatten(3)
    else:
        turned = _by_real(n, rotation, sin, steps.product, chain.interleaved, chain.addcmul)
    return turned.to(steps.rotated).to(steps.out)


def rotated_row(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float | Tensor, chain: RotatedRowChain
) -> Tensor:
    """rotate(norm(x)) with one norm over all heads of a token.

    x: [B, S, D]; weight: [D] or None; cos and sin: [B|1, S, 1, n] for all heads or [B|1, S, H, n] for each head, where
    n is Dh or Dh / 2. The rotation of a head is that of `rotated`. With `addcmul`, the sum is torch.addcmul, as in
    LTX-2.
    """
    steps = chain.steps
    n = norm(x, weight, None, eps, "rms", steps.norm).unflatten(-1, (chain.heads, -1))
    turned = _by_real(n, cos, sin, steps.product, chain.interleaved, chain.addcmul)
    return turned.to(steps.rotated).to(steps.out).flatten(2)


def _by_real(
    n: Tensor, cos: Tensor, sin: Tensor, product: torch.dtype, interleaved: bool, addcmul: bool = False
) -> Tensor:
    """n * cos + turned(n) * sin, computed in the dtype `product`."""
    n = n.to(product)
    cos, sin = (_for_both_of_a_pair(t.to(product), n.shape[-1], interleaved) for t in (cos, sin))
    straight, turned = n * cos, _quarter_turn(n, interleaved)
    return torch.addcmul(straight, turned, sin) if addcmul else straight + turned * sin


def _by_matrices(n: Tensor, matrices: Tensor, product: torch.dtype, addcmul: bool) -> Tensor:
    """The products of 2×2 matrices with pairs of neighbours, computed in the dtype `product`."""
    first, second = matrices.to(product).unflatten(-1, (n.shape[-1] // 2, 2, 2)).unbind(-1)
    a, b = n.to(product).unflatten(-1, (n.shape[-1] // 2, 1, 2)).unbind(-1)
    straight = first * a
    return (torch.addcmul(straight, second, b) if addcmul else straight + second * b).flatten(-2)


def _for_both_of_a_pair(t: Tensor, d: int, interleaved: bool) -> Tensor:
    if t.shape[-1] == d:
        return t
    return t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1)


def _quarter_turn(n: Tensor, interleaved: bool) -> Tensor:
    """Turns every pair: (a, b) -> (-b, a)."""
    if interleaved:
        a, b = n.reshape(*n.shape[:-1], n.shape[-1] // 2, 2).unbind(-1)
        return torch.stack((-b, a), -1).flatten(3)
    a, b = n.chunk(2, -1)
    return torch.cat((-b, a), -1)


def activation(a: Tensor, b: Tensor | None, act: str, steps: ActivationSteps) -> Tensor:
    """act(a) * b; act(a) if b is None. a and b: [..., D]; act: one of rounding.ACTIVATIONS."""
    activated = _ACTIVATIONS[act](a.to(torch.promote_types(a.dtype, steps.activated))).to(steps.activated)
    return (activated if b is None else activated * b).to(steps.product).to(steps.out)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda a: a,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def quantised(z: Tensor, steps: QuantSteps | StaticSteps, static_scale: Tensor | None = None) -> tuple[Tensor, ...]:
    """The rows of z in FP8, [..., D], and with QuantSteps the scale of each row, [..., 1].

    static_scale: the one element that StaticSteps scale by; None: 1.
    """
    if isinstance(steps, StaticSteps):
        return (_in_fp8(z.float() if static_scale is None else _scaled(z, static_scale, steps), steps),)
    amax = z.abs().amax(-1, keepdim=True).float()
    if steps.smallest_amax is not None:
        amax = amax.clamp(min=steps.smallest_amax)
    s = (amax / steps.fmax).to(steps.scale).float()
    if steps.smallest_scale is not None:
        s = s.clamp(min=steps.smallest_scale)
    wide = z.float()
    return _in_fp8(wide * s.reciprocal() if steps.reciprocal else wide / s, steps), s


def _scaled(z: Tensor, static_scale: Tensor, steps: StaticSteps) -> Tensor:
    s = static_scale.float().reshape(())
    f = (s.reciprocal() if steps.scaling == "reciprocal" else s).to(steps.factor).float()
    return (z.float() / f if steps.scaling == "quotient" else z.float() * f).to(steps.scaled).float()


def _in_fp8(q: Tensor, steps: QuantSteps | StaticSteps) -> Tensor:
    return (q.clamp(-LARGEST, LARGEST) if steps.clamp else q).to(steps.out)
