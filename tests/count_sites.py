"""Counts what is fused in each model of the tests, compiled in every way, and compares each result with eager's.

    python tests/count_sites.py --json out/site_counts.json [--models "FLUX.1,Wan 2.1"] [--ways dynamic]

`make test` runs a sample of these; all of them take an hour of one core. kernels/benchmarks/results/site_counts.json
has rows of earlier runs. Rows that a file has of other models and ways stay. A row: the model and its layers, how it
was compiled, how often each op stands in the graphs, and whether the output is bit-equal to eager's, or else to that of
the same graphs without the pass.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import diffusers
import test_adaln_models
import test_models
import torch
import torch._functorch.config as functorch_config
import zimage
from graph_backend import GraphBackend
from test_all_heads_sites import ltx2
from test_models import WRAPPER, Arguments, compiled, run
from test_models_like_flux import bria_fibo
from test_part_sites import hunyuan_dit
from test_partly_rotated import rotated_cogvideox
from torch import Tensor, nn

Make = Callable[[int], tuple[nn.Module, Arguments]]


def z_image(layers: int) -> tuple[nn.Module, Arguments]:
    arguments = dict(zip(("x", "t", "cap_feats"), zimage.inputs((12, 20)), strict=True))
    return zimage.model(layers=layers, refiners=1), arguments


MODELS: dict[str, Make] = {
    "Z-Image": z_image,
    **{name: make for name, (make, _) in test_models.FUSED.items()},
    **{name: make for name, (make, _) in test_adaln_models.MODELS.items()},
    "CogVideoX 5B": rotated_cogvideox,
    "HunyuanDiT": hunyuan_dit,
    "Bria FIBO": lambda layers: bria_fibo(layers, 1),
    "LTX-2 split": lambda layers: ltx2(layers, "split"),
    "LTX-2 interleaved": lambda layers: ltx2(layers, "interleaved"),
}
BLOCKS = {  # where diffusers names none
    "Lumina2Transformer2DModel": ["Lumina2TransformerBlock"],
    "CogVideoXTransformer3DModel": ["CogVideoXBlock"],
    "CogView4Transformer2DModel": ["CogView4TransformerBlock"],
    "HunyuanDiT2DModel": ["HunyuanDiTBlock"],
}
# The layers; is the model compiled block by block; for dynamic sizes; with torch's complex wrapper?
WAYS = {
    "whole": (1, False, None, False),
    "whole, 2 layers": (2, False, None, False),
    "whole, dynamic": (1, False, True, False),
    "whole, complex wrapper": (1, False, None, True),
    "block by block": (2, True, None, False),
    "block by block, dynamic": (2, True, True, False),
}


def output(
    model: nn.Module, arguments: Arguments, blocks: bool, dynamic: bool | None, fuse: bool = True
) -> tuple[Tensor, GraphBackend]:
    if not blocks:
        return compiled(model, arguments, dynamic=dynamic, fuse=fuse)
    torch._dynamo.reset()
    backend = GraphBackend(fuse=fuse)
    model._repeated_blocks = model._repeated_blocks or BLOCKS[type(model).__name__]
    model.compile_repeated_blocks(backend=backend, dynamic=dynamic)
    return run(model, arguments), backend


def count(make: Make, layers: int, blocks: bool, dynamic: bool | None, wrapped: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model, arguments = make(layers)
    eager = run(model, arguments)
    with functorch_config.patch(**{WRAPPER: True}) if wrapped else nullcontext():
        got, backend = output(model, arguments, blocks, dynamic)
        equal = "eager" if torch.equal(got, eager) else None
        if equal is None and torch.equal(got, output(model, arguments, blocks, dynamic, fuse=False)[0]):
            equal = "the graphs without the pass"
    return {"counts": backend.report.counts(), "graphs": len(backend.graphs), "equal": equal}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", help="separated by commas (all)")
    parser.add_argument("--ways", default="", help="those whose name holds this")
    parser.add_argument("--json", type=Path, required=True, help="write the rows there, after each one")
    args = parser.parse_args()
    args.json.parent.mkdir(parents=True, exist_ok=True)
    names = args.models.split(",") if args.models else list(MODELS)
    ways = {way: how for way, how in WAYS.items() if args.ways in way}
    rows: list[dict[str, Any]] = json.loads(args.json.read_text())["rows"] if args.json.exists() else []
    rows = [row for row in rows if row["model"] not in names or row["compiled"] not in ways]
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    header = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "versions": versions}
    for name in names:
        for way, how in ways.items():
            start = time.perf_counter()
            try:
                found: dict[str, Any] = count(MODELS[name], *how)
            except Exception as error:
                found = {"error": f"{type(error).__name__}: {error}"[:500]}
            rows.append({"model": name, "compiled": way, "layers": how[0], **found})
            print(f"{name}, {way}: {found} in {time.perf_counter() - start:.0f} s", flush=True)
            args.json.write_text(json.dumps({**header, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
