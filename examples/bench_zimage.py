"""Times the full-size Z-Image: eager, torch.compile, and backend="fusion_pass", over resolutions, batches and modes.

    python examples/bench_zimage.py --json out/zimage_bench.json
    python examples/bench_zimage.py --pairs 200 --case 1024 1 whole default --case 512 1 whole reduce-overhead

Needs a GPU that the kernels run on. `whole` compiles the model, `block` its repeated blocks (diffusers'
compile_repeated_blocks). The steps of the two compiled variants alternate, so that both see the same clocks. Where the
GPU is at its power limit, --lead 6 lets each see its own, as it does where only one of them runs.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import distance, register_backend
from rich.console import Console
from rich.table import Table
from timing import Inputs, alternate, environment, first_look, progress, run_step, speedup, time_step
from torch.autograd import DeviceType
from zimage import CAPTION_TOKENS, SIZES, build_inputs, build_model

from fusion_pass.environment import why_no_kernels

DIMENSIONS = (("512", "1024", "1536"), ("1", "2"), ("whole", "block"), ("default", "reduce-overhead"))
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
BACKENDS = {"torch.compile": "inductor", "fusion_pass": "fusion_pass"}
# Names of the kernels at the gated sites: ours, and Inductor's, which hold the only tanh of the model.
SITE_KERNELS = {"torch.compile": ("triton_", "tanh"), "fusion_pass": ("ModulatedNorm",)}

wide = Console(width=170)  # what the table needs, also where there is no terminal


def sharing_weights(model: torch.nn.Module) -> Any:
    """A copy with the same weights, to be compiled in another way."""
    return copy.deepcopy(model, {id(t): t for t in itertools.chain(model.parameters(), model.buffers())})


def compiled(model: torch.nn.Module, backend: str, scope: str, mode: str) -> Callable[..., Any]:
    if scope == "whole":
        return torch.compile(model, backend=backend, mode=mode)
    ours = sharing_weights(model)
    ours.compile_repeated_blocks(backend=backend, mode=mode)
    return ours


def kernel_ms(step: Callable[..., Any], inputs: Inputs) -> dict[str, float]:
    """Milliseconds of each kernel of one forward pass, by name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run_step(step, inputs)
        torch.cuda.synchronize()
    total: dict[str, float] = {}
    for event in profile.events():
        if event.device_type == DeviceType.CUDA:
            total[event.name] = total.get(event.name, 0.0) + event.time_range.elapsed_us() / 1e3
    return total


def measure(
    model: Any, inputs: Inputs, eager: dict[str, Any], scope: str, mode: str, pairs: int, lead: int
) -> dict[str, Any]:
    """One case: step times, kernel times, peak memory, and distance from eager of plain and fused."""
    torch._dynamo.reset()
    row: dict[str, Any] = {"eager_ms": eager["ms"], "eager_peak_bytes": eager["peak_bytes"]}
    steps = {name: compiled(model, backend, scope, mode) for name, backend in BACKENDS.items()}
    for name, step in steps.items():
        result, output = first_look(step, inputs, mode)
        kernels = kernel_ms(step, inputs)
        at_sites = {k: ms for k, ms in kernels.items() if all(part in k for part in SITE_KERNELS[name])}
        row[name] = {"peak_bytes": result.peak_bytes, "first_call_s": result.first_call_s}
        row[name]["distance"] = distance(output, eager["output"])
        row[name] |= {"kernels_ms": sum(kernels.values()), "site_kernels_ms": sum(at_sites.values())}
        row[name]["kernels"] = dict(sorted(kernels.items(), key=lambda item: -item[1])[:25])
    plain, fused = alternate(*steps.values(), inputs, pairs, lead)
    for name, times in zip(steps, (plain, fused), strict=True):
        row[name]["ms"] = statistics.median(times)
        row[name]["step_ms"] = [round(ms, 3) for ms in times]
    row["speedup"] = speedup(plain, fused)
    return row


def run_eager(model: Any, inputs: Inputs) -> dict[str, Any]:
    result, output = first_look(model, inputs, "default")
    times = [time_step(model, inputs, cuda=True) for _ in range(5)]
    return {"ms": statistics.median(times), "peak_bytes": result.peak_bytes, "output": output}


def table(rows: list[dict[str, Any]]) -> Table:
    result = Table(title="Z-Image, one forward pass: torch.compile → fusion_pass")
    columns = ("pixels", "batch", "scope", "mode", "eager ms", "ms", "times as fast", "at the sites, ms", "peak GiB")
    for column in (*columns, "from eager"):
        result.add_column(column, no_wrap=True)
    for row in rows:
        plain, fused, speed = row["torch.compile"], row["fusion_pass"], row["speedup"]
        low, high = speed["interval"]
        result.add_row(
            f"{row['pixels']}²",
            str(row["batch"]),
            row["scope"],
            row["mode"],
            f"{row['eager_ms']:.1f}",
            f"{plain['ms']:.2f} → {fused['ms']:.2f}",
            f"{speed['median']:.3f} ({low:.3f} to {high:.3f})",
            f"{plain['site_kernels_ms']:.2f} → {fused['site_kernels_ms']:.2f}",
            f"{plain['peak_bytes'] / 2**30:.2f} → {fused['peak_bytes'] / 2**30:.2f}",
            f"{plain['distance']:.2e} → {fused['distance']:.2e}",
        )
    return result


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full", help="of the model (%(default)s)")
    parser.add_argument(
        "--case",
        nargs=4,
        action="append",
        metavar=("PIXELS", "BATCH", "SCOPE", "MODE"),
        help=f"default: all of {' × '.join('|'.join(values) for values in DIMENSIONS)}",
    )
    parser.add_argument("--pairs", type=int, default=40, help="steps of each compiled variant (%(default)s)")
    parser.add_argument("--lead", type=int, default=0, help="steps of its own before each that counts (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results there, after each case")
    args = parser.parse_args()
    args.case = [tuple(case) for case in args.case or itertools.product(*DIMENSIONS)]
    for case in args.case:
        if not case[0].isdigit() or not case[1].isdigit() or case[2] not in DIMENSIONS[2] or case[3] not in MODES:
            parser.error(f"--case is {' '.join(case)}, expected such as 1024 1 whole default")
    return args


def main() -> None:
    args = parse_arguments()
    missing = why_no_kernels()
    if missing is not None:
        raise SystemExit(f"error: this benchmark needs the CUDA kernels: {missing}")
    register_backend()
    torch._dynamo.config.recompile_limit = 64  # one model, many shapes
    rows: list[dict[str, Any]] = []
    with torch.no_grad(), progress(total=len(args.case)) as display:
        display.tell("building the model")
        model = build_model(args.size, "cuda")
        for (pixels, batch), cases in itertools.groupby(args.case, key=lambda case: (int(case[0]), int(case[1]))):
            inputs = build_inputs(model, pixels, pixels, CAPTION_TOKENS[args.size], batch)
            display.tell(f"{pixels}², batch {batch}, eager")
            eager = run_eager(model, inputs)  # builds the RoPE table, too, which would break the compiled graph
            for _, _, scope, mode in cases:
                display.tell(f"{pixels}², batch {batch}, {scope}, {mode}")
                case = {"pixels": pixels, "batch": batch, "scope": scope, "mode": mode, "lead": args.lead}
                rows.append(case | measure(model, inputs, eager, scope, mode, args.pairs, args.lead))
                display.done()
                if args.json:
                    args.json.parent.mkdir(parents=True, exist_ok=True)
                    args.json.write_text(json.dumps(environment("cuda") | {"rows": rows}, indent=1) + "\n")
    wide.print(table(rows))


if __name__ == "__main__":
    main()
