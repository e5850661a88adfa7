"""Does it pay to fuse a site whose gate and scale Inductor would compute inside its own kernel?

    python kernels/benchmarks/bench_per_token.py [--json FILE]        (one minute)

Z-Image's blocks with two kinds of tokens pick gate and scale for each token, where(mask, tanh(a), tanh(b)). Inductor
computes that where it reads them. The op reads them from memory, so fusing costs Inductor's kernels that write
[B, S, D] of each. Per row of the table, in microseconds: a copy of as many bytes as Inductor's one kernel moves,
Inductor on the whole expression, Inductor's kernels for gate and scale and then the op, and the op alone. The rule that
this decides is fusion_pass/eligibility.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_kernels import BF16, Case, environment, graph_of, interleaved, norm, operand_sets
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from fusion_pass import Backend

D = 3840
SIZES = (1056, 4128)
CASES = [
    *(Case(op, D, tokens) for op in ("dual", "gated", "scaled") for tokens in SIZES),
    *(Case("dual", D, tokens, batch=2) for tokens in SIZES),
]


def modulation(g: Tensor, s: Tensor, g2: Tensor, s2: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and scale for each token, [B, S, D], activated."""
    return torch.where(mask, g.tanh(), g2.tanh()), torch.where(mask, 1 + s, 1 + s2)


def whole(op: str) -> Callable[..., Any]:
    def site(x: Tensor, r: Tensor, g: Tensor, s: Tensor, w: Tensor, w2: Tensor, *others: Tensor) -> Any:
        gate, scale = modulation(g, s, *others)
        if op == "scaled":
            return norm(x, w, 1e-5) * scale
        y = r + gate * norm(x, w, 1e-5)
        return y if op == "gated" else (y, norm(y, w2, 1e-6) * scale)

    return site


def on_op(op: str, gate: Tensor, scale: Tensor, x: Tensor, r: Tensor, w: Tensor, w2: Tensor) -> Any:
    ops = torch.ops.dit_kernels
    if op == "scaled":
        return ops.norm_scale(x, w, None, scale, 1e-5, add_one=False)
    if op == "gated":
        return ops.norm_tanh_mul_add(x, w, None, gate, r, 1e-5, tanh=False)
    return ops.norm_tanh_mul_add_norm_scale(x, w, None, gate, r, 1e-5, w2, None, scale, 1e-6, tanh=False, add_one=False)


def split(op: str) -> Callable[..., Any]:
    def site(x: Tensor, r: Tensor, g: Tensor, s: Tensor, w: Tensor, w2: Tensor, *others: Tensor) -> Any:
        return on_op(op, *modulation(g, s, *others), x, r, w, w2)

    return site


def measure(case: Case) -> dict[str, float]:
    b, s, d = case.batch, case.tokens, case.d
    others = [torch.randn(b, 1, d, device="cuda").to(BF16) for _ in range(2)]
    mask = (torch.arange(s, device="cuda") < s * 7 // 8)[None, :, None].expand(b, s, 1).contiguous()
    sets = [(*operands, *others, mask) for operands in operand_sets(case)]
    copied = [torch.randn(case.bytes // 4, device="cuda").to(BF16) for _ in sets]
    graphs = {"copy": graph_of([lambda t=t: t.clone() for t in copied])}
    with torch.no_grad():
        for name, site, backend in (("Inductor", whole, "inductor"), ("where + op", split, Backend())):
            torch._dynamo.reset()
            compiled = torch.compile(site(case.op), backend=backend, dynamic=False)
            graphs[name] = graph_of([lambda t=t, f=compiled: f(*t) for t in sets])
        ready = [(*modulation(*t[2:4], *others, mask), t[0], t[1], t[4], t[5]) for t in sets]
        graphs["op alone"] = graph_of([lambda t=t: on_op(case.op, *t) for t in ready])
    return interleaved(graphs)


def table(rows: list[dict[str, Any]]) -> Table:
    names = list(rows[0]["us"])
    result = Table("case", *names, "Inductor / (where + op)")
    for row in rows:
        us = row["us"]
        result.add_row(row["case"], *(f"{us[name]:.2f}" for name in names), f"{us['Inductor'] / us['where + op']:.2f}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the results")
    arguments = parser.parse_args()
    console, rows = Console(width=140), []
    for case in track(CASES, description="timing", console=console):
        rows.append({"case": case.name, "us": measure(case)})
        torch.cuda.empty_cache()
    console.print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps({**environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
