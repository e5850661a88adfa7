"""Does it pay to fuse a norm of q and k that no rotation follows, or a LayerNorm of each head?

    python kernels/benchmarks/bench_head_norms.py [--json FILE]        (one minute)

The pass leaves these to Inductor. Per row of the table, in microseconds: a copy of as many bytes as q and k take, read
and written once; Inductor's kernels for both norms, as the model writes them; and the ratio of the two, which bounds
what an op could win. SD3.5 joins the image's q and k with the text's, CogVideoX rotates the image's part.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_kernels import BF16, environment, graph_of, interleaved, operand_sets, random
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def of_heads(x: Tensor, heads: int) -> Tensor:
    """[B, S, H * Dh] as [B, H, S, Dh]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    """diffusers' RMSNorm."""
    variance = x.float().pow(2).mean(-1, keepdim=True)
    return (x * torch.rsqrt(variance + 1e-6)).to(weight.dtype) * weight


def layer(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, weight, 1e-6)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """diffusers' apply_rotary_emb: neighbours in pairs, in fp32."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-imaginary, real), -1).flatten(3)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def alone(case: Case, q: Tensor, k: Tensor, weight: Tensor) -> Pair:
    return case.norm(of_heads(q, case.heads), weight), case.norm(of_heads(k, case.heads), weight)


def joined(case: Case, q: Tensor, k: Tensor, weight: Tensor, q2: Tensor, k2: Tensor) -> Pair:
    """SD3.5: the tokens of the image, then those of the text."""
    (q, k), (q2, k2) = alone(case, q, k, weight), alone(case, q2, k2, weight)
    return torch.cat((q, q2), 2), torch.cat((k, k2), 2)


def partly_rotated(case: Case, q: Tensor, k: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Pair:
    """CogVideoX: the tokens of the text, then those of the image, which are rotated."""
    q, k = alone(case, q, k, weight)
    q[:, :, case.text :] = rotated(q[:, :, case.text :], cos, sin)
    k[:, :, case.text :] = rotated(k[:, :, case.text :], cos, sin)
    return q, k


def over_all_heads(case: Case, q: Tensor, k: Tensor, weight: Tensor) -> Pair:
    """Wan's cross-attention: k is the text's."""
    q = torch.nn.functional.rms_norm(q, q.shape[-1:], weight, 1e-6)
    k = torch.nn.functional.rms_norm(k, k.shape[-1:], weight, 1e-6)
    return q.unflatten(2, (case.heads, -1)), k.unflatten(2, (case.heads, -1))


@dataclass(frozen=True)
class Case:
    """q and k: tokens of the image, and of the text in a second pair of tensors or at the start of the same."""

    name: str
    run: Callable[..., Pair]
    norm: Callable[[Tensor, Tensor], Tensor]
    heads: int
    d: int
    tokens: int
    text: int = 0

    @property
    def bytes(self) -> int:
        rows = {alone: 2 * self.tokens, partly_rotated: 2 * self.tokens}.get(self.run, self.tokens + self.text)
        rows *= 2 if self.run is joined else 1
        tables = 2 * (self.tokens - self.text) * self.d * 4 if self.run is partly_rotated else 0
        return 2 * rows * self.heads * self.d * BF16.itemsize + tables

    def operand_sets(self, count: int) -> list[tuple[Tensor, ...]]:
        width = self.heads * self.d
        weight = random(width if self.run is over_all_heads else self.d)
        tables = [torch.randn(self.tokens - self.text, self.d, device="cuda") for _ in range(2)]

        def more() -> list[Tensor]:
            if self.run is joined:
                return [random(1, self.text, width) for _ in range(2)]
            return tables if self.run is partly_rotated else []

        def pair() -> list[Tensor]:
            of_k = self.text if self.run is over_all_heads else self.tokens
            return [random(1, self.tokens, width), random(1, of_k, width)]

        return [(*pair(), weight, *more()) for _ in range(count)]


CASES = [
    Case("RMSNorm of a head", alone, rms, 24, 128, 4096),
    Case("RMSNorm of a head", alone, rms, 38, 64, 4096),
    Case("RMSNorm of a head, image and text joined (SD3.5)", joined, rms, 38, 64, 4096, 333),
    Case("RMSNorm over all heads (Wan's cross-attention)", over_all_heads, rms, 40, 128, 32760, 512),
    Case("LayerNorm of a head", alone, layer, 24, 128, 4096),
    Case("LayerNorm of a head (CogVideoX)", alone, layer, 48, 64, 17776),
    Case("LayerNorm of a head, the image rotated (CogVideoX)", partly_rotated, layer, 48, 64, 17776, 226),
]


def measure(case: Case) -> dict[str, float]:
    sets = operand_sets(case)
    half = case.bytes // BF16.itemsize // 2
    copied = [random(half) for _ in sets]
    graphs = {"copy": graph_of([lambda t=t: t.clone() for t in copied])}
    torch._dynamo.reset()
    compiled = torch.compile(lambda *operands: case.run(case, *operands), dynamic=False)
    with torch.no_grad():
        graphs["inductor"] = graph_of([lambda t=t: compiled(*t) for t in sets])
    return interleaved(graphs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the results")
    arguments = parser.parse_args()
    console = Console(width=140)
    table = Table("case", "heads", "of", "tokens", "copy", "inductor", "inductor / copy")
    rows: list[dict[str, Any]] = []
    for case in track(CASES, description="timing", console=console):
        sizes = {"heads": case.heads, "d": case.d, "tokens": case.tokens, "text": case.text}
        us = measure(case)
        rows.append({"case": case.name, **sizes, "bytes": case.bytes, "us": us})
        numbers = (case.heads, case.d, case.tokens)
        ratio = us["inductor"] / us["copy"]
        table.add_row(case.name, *map(str, numbers), f"{us['copy']:.2f}", f"{us['inductor']:.2f}", f"{ratio:.3f}")
        torch.cuda.empty_cache()
        if arguments.json:
            arguments.json.write_text(json.dumps({**environment(), "rows": rows}, indent=1) + "\n")
    console.print(table)


if __name__ == "__main__":
    main()
