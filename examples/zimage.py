"""Z-Image: eager, compiled by Inductor, and compiled with backend="fusion_pass".

    python examples/zimage.py                       random weights: what is fused, how far from eager, how fast
    python examples/zimage.py --json out/zimage.json
    python examples/zimage.py --pretrained PATH     a local diffusers checkpoint: makes an image

The model is diffusers' own ZImageTransformer2DModel, unmodified. Without --pretrained nothing is read or downloaded:
the weights are random. A GPU that the kernels run on gets the full-size model (6 billion parameters). Any other machine
gets a small one, with the ops run by their PyTorch definitions, which shows the numerics but not the speed.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fusion_pass

SIZES: dict[str, dict[str, Any]] = {
    "full": {},  # diffusers' defaults are the published model's: 30 + 2 layers of width 3840
    "small": {"dim": 256, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 64},
}
PIXELS = {"full": 1024, "small": 128}  # height and width where none is given
CAPTION_TOKENS = {"full": 128, "small": 32}
GRAPH_MODES = ("reduce-overhead", "max-autotune")  # those that record CUDA graphs

Inputs = tuple[list[Tensor], Tensor, list[Tensor]]  # latents, timesteps, captions

console = Console(width=max(112, Console().width))  # the tables need that much, also where there is no terminal


def why_no_kernels() -> str | None:
    """What keeps the CUDA kernels from running on this machine; None where they run."""
    if not torch.cuda.is_available():
        return "no CUDA GPU is available"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} has a compute capability below 8.0"
    if importlib.util.find_spec("cutlass") is None:
        return "CuTeDSL (the package nvidia-cutlass-dsl) is not installed"
    return None


def register_backend() -> None:
    """Makes the name "fusion_pass" known to torch.compile where the package is on the path but not installed by pip."""
    if "fusion_pass" not in torch._dynamo.list_backends(exclude_tags=None):
        from fusion_pass.backend import fusion_pass_backend

        torch._dynamo.register_backend(fusion_pass_backend, name="fusion_pass")


def build_model(size: str, device: str) -> ZImageTransformer2DModel:
    """The model with random weights, in bf16 from the start: float32 weights would take twice the room."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = ZImageTransformer2DModel(**SIZES[size])
    finally:
        torch.set_default_dtype(dtype)
    # A fresh model has norm weights of 1, pad tokens of 0 and gates near 0, which would hide most of the arithmetic.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.normal_(1.0, 0.2)
            elif "pad_token" in name or ("adaLN_modulation" in name and name.endswith("bias")):
                parameter.normal_()
    return model.eval().requires_grad_(False)


def build_inputs(model: ZImageTransformer2DModel, height: int, width: int, caption: int, batch: int) -> Inputs:
    """Arguments of a forward pass: latents, a list of [16, 1, H/8, W/8]; timesteps [B]; captions, a list of [L, C]."""
    generator = torch.Generator(model.device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=model.device, dtype=model.dtype)

    latents = [normal(model.in_channels, 1, height // 8, width // 8) for _ in range(batch)]
    captions = [normal(caption, model.config.cap_feat_dim) for _ in range(batch)]
    return latents, torch.linspace(0.3, 0.7, batch, device=model.device), captions


@dataclass
class Result:
    """One way of running the model. Times in milliseconds, memory in bytes; distance and equal are against eager."""

    first_call_s: float
    step_ms: list[float]
    median_ms: float = math.nan
    interval_ms: tuple[float, float] = (math.nan, math.nan)
    peak_bytes: int | None = None
    distance: float | None = None
    equal: float | None = None


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95% confidence interval of the median, from order statistics (from 6 values on): it assumes no distribution."""
    ordered, n = sorted(values), len(values)
    rank = max(1, math.floor(n / 2 - 0.98 * math.sqrt(n)))
    return ordered[rank - 1], ordered[n - rank]


def distance(output: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    return float((output - reference).norm() / reference.norm())


def speedup(plain: Sequence[float], fused: Sequence[float]) -> dict[str, Any]:
    """How many times as fast the fused steps are, pair by pair."""
    ratios = [before / after for before, after in zip(plain, fused, strict=True)]
    return {"median": statistics.median(ratios), "interval": median_interval(ratios)}


def run_step(step: Callable[..., Any], inputs: Inputs) -> Tensor:
    """One forward pass, its images flattened into one tensor."""
    torch.compiler.cudagraph_mark_step_begin()
    return torch.cat([image.flatten() for image in step(*inputs, return_dict=False)[0]])


def time_step(step: Callable[..., Any], inputs: Inputs, cuda: bool) -> float:
    """Milliseconds of one forward pass."""
    if not cuda:
        start = time.perf_counter()
        run_step(step, inputs)
        return (time.perf_counter() - start) * 1e3
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    before.record()
    run_step(step, inputs)
    after.record()
    after.synchronize()
    return before.elapsed_time(after)


def first_look(name: str, step: Callable[..., Any], inputs: Inputs, mode: str) -> tuple[Result, Tensor]:
    """Runs a variant for the first times: what its first call costs, its peak memory, and its output."""
    console.print(f"running {name} ...")
    cuda = inputs[1].is_cuda
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    output = run_step(step, inputs)
    if cuda:
        torch.cuda.synchronize()
    result = Result(first_call_s=time.perf_counter() - start, step_ms=[])
    if cuda and mode not in GRAPH_MODES:
        # Compiling takes memory of its own. A replayed CUDA graph allocates nothing: there the capture counts.
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3 if cuda else 1):
        output = run_step(step, inputs).float()
    if cuda:
        result.peak_bytes = torch.cuda.max_memory_allocated()
    return result, output


def alternate(
    first: Callable[..., Any], second: Callable[..., Any], inputs: Inputs, pairs: int, lead: int = 0
) -> list[list[float]]:
    """Milliseconds of each of the two, in turns: first, second, second, first, and so on.

    A GPU at its power limit gives a step the clocks that the steps before it have left, which differ by more than
    what is looked for. So the two take turns, nothing else runs between them, and each follows each equally often.
    lead: steps that run before each one that counts, of the same variant, for the clocks that it gives itself.
    """
    cuda = inputs[1].is_cuda
    times: list[list[float]] = [[], []]
    for step in (first, second) * (3 if cuda else 0):  # to the clocks of the long run
        run_step(step, inputs)
    for pair in range(pairs):
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            step = (first, second)[which]
            for _ in range(lead):
                run_step(step, inputs)
            times[which].append(time_step(step, inputs, cuda))
    return times


def measure(variants: dict[str, Callable[..., Any]], inputs: Inputs, steps: int, mode: str) -> dict[str, Result]:
    """First outputs and peak memory of eager, plain and fused, then eager's times, then those of the other two."""
    results: dict[str, Result] = {}
    outputs: list[Tensor] = []
    for name, step in variants.items():
        result, output = first_look(name, step, inputs, mode)
        results[name] = result
        outputs.append(output)
        if len(outputs) > 1:
            result.distance = distance(output, outputs[0])
            result.equal = float((output == outputs[0]).float().mean())
    eager, *compiled = variants.values()
    console.print(f"timing {steps} steps of each ...")
    cuda = inputs[1].is_cuda
    times = [[time_step(eager, inputs, cuda) for _ in range(min(steps, 10))]]
    times += alternate(compiled[0], compiled[1], inputs, steps)
    for result, result.step_ms in zip(results.values(), times, strict=True):
        result.median_ms = statistics.median(result.step_ms)
        result.interval_ms = median_interval(result.step_ms)
    return results


def print_results(results: dict[str, Result], cuda: bool) -> None:
    table = Table(title="one forward pass")
    for column in ("", "ms", "95% interval", "peak memory", "from eager", "equal", "first call"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, result in results.items():
        low, high = result.interval_ms
        table.add_row(
            name,
            f"{result.median_ms:.2f}",
            f"{low:.2f} to {high:.2f}",
            "–" if result.peak_bytes is None else f"{result.peak_bytes / 2**30:.2f} GiB",
            "–" if result.distance is None else f"{result.distance:.2e}",
            "–" if result.equal is None else f"{result.equal:.2%}",
            f"{result.first_call_s:.1f} s",
        )
    console.print(table)
    console.print(
        "ms: median. From eager: norm of the difference over norm of eager's output. Equal: elements bit-equal to "
        "eager's. A first call compiles, or loads what an earlier run has compiled."
    )
    if not cuda:
        console.print("[yellow]Times on a CPU say nothing about the product: the kernels are for GPUs.[/yellow]")


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of this checkout, with -dirty where it is changed."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment(device: str) -> dict[str, Any]:
    names = ("nvidia-cutlass-dsl", "apache-tvm-ffi", "triton", "diffusers", "fusion-pass")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, **{name: version(name) for name in names}},
    }


def compare(args: argparse.Namespace, device: str, backend: Any) -> dict[str, Any]:
    """The demo: random weights, the report, the numerics and the times."""
    size = args.size
    height, width = args.height or PIXELS[size], args.width or PIXELS[size]
    caption = CAPTION_TOKENS[size]
    model = build_model(size, device)
    inputs = build_inputs(model, height, width, caption, args.batch)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"Z-Image, {size} size: {parameters / 1e6:,.0f} million random bf16 weights, "
        f"{height}×{width} pixels, {caption} caption tokens, batch {args.batch}, on {device}"
    )
    # The first pass builds the model's RoPE table; before that, a compiled model breaks into two graphs.
    run_step(model, inputs)
    console.print("explaining: compiling once with caches off ...")
    explained = fusion_pass.Backend(kernels="reference") if backend != "fusion_pass" else None
    report = fusion_pass.explain(model, *inputs, backend=explained, return_dict=False)
    print(report)
    variants = {
        "eager": model,
        "torch.compile": torch.compile(model, mode=args.mode),
        'backend="fusion_pass"': torch.compile(model, backend=backend, mode=args.mode),
    }
    results = measure(variants, inputs, args.steps, args.mode)
    print_results(results, device == "cuda")
    _, plain, fused = results.values()
    faster = speedup(plain.step_ms, fused.step_ms)
    low, high = faster["interval"]
    if device == "cuda":
        console.print(
            f"fusion_pass against torch.compile, step by step: {faster['median']:.3f} times as fast "
            f"(95% interval {low:.3f} to {high:.3f})"
        )
    return {
        "model": {"size": size, "parameters": parameters, "height": height, "width": width}
        | {"caption_tokens": caption, "batch": args.batch, "mode": args.mode},
        "results": {name: asdict(result) for name, result in results.items()},
        "speedup_over_torch_compile": faster,
        "report": json.loads(report.to_json()),
    }


def generate(args: argparse.Namespace, device: str, backend: Any) -> dict[str, Any]:
    """An image through the real pipeline, its transformer compiled in place."""
    from diffusers import ZImagePipeline

    pipe = ZImagePipeline.from_pretrained(args.pretrained, torch_dtype=torch.bfloat16, local_files_only=True).to(device)
    transformer = pipe.transformer
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = transformer.register_forward_pre_hook(
        lambda module, positional, named: seen.append((positional, named)), with_kwargs=True
    )

    def image(steps: int, output_type: str = "pil") -> Any:
        return pipe(
            args.prompt,
            height=args.height or 1024,
            width=args.width or 1024,
            num_inference_steps=steps,
            guidance_scale=args.guidance,
            generator=torch.Generator(device).manual_seed(0),
            output_type=output_type,
        ).images[0]

    image(1, "latent")  # eagerly: builds the model's RoPE table, and shows what the transformer is called with
    hook.remove()
    positional, named = seen[0]
    explained = fusion_pass.Backend(kernels="reference") if backend != "fusion_pass" else None
    report = fusion_pass.explain(transformer, *positional, backend=explained, **named)
    print(report)
    transformer.compile(backend=backend, mode=args.mode)
    console.print("compiling ...")
    image(1, "latent")
    start = time.perf_counter()
    picture = image(args.steps)
    seconds = time.perf_counter() - start
    args.output.parent.mkdir(parents=True, exist_ok=True)
    picture.save(args.output)
    console.print(f"{args.output}: {args.steps} steps in {seconds:.2f} s, the text encoder and the decoder included")
    return {
        "pretrained": str(args.pretrained),
        "steps": args.steps,
        "seconds": seconds,
        "report": json.loads(report.to_json()),
    }


def parse_arguments(kernels: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, help="default: full where the kernels run, else small")
    parser.add_argument("--pretrained", type=Path, metavar="PATH", help="folder of a diffusers Z-Image checkpoint")
    parser.add_argument("--prompt", default="a lighthouse in the fog, oil painting", help="with --pretrained")
    parser.add_argument("--guidance", type=float, default=0.0, help="with --pretrained: 0 for Z-Image-Turbo (default)")
    parser.add_argument("--output", type=Path, default=Path("out/zimage.png"), help="with --pretrained (%(default)s)")
    parser.add_argument("--steps", type=int, help="denoising steps (default 9) or, without --pretrained, steps to time")
    parser.add_argument("--height", type=int, help="in pixels, a multiple of 16")
    parser.add_argument("--width", type=int, help="in pixels, a multiple of 16")
    parser.add_argument("--batch", type=int, default=1, help="images at once, without --pretrained")
    parser.add_argument(
        "--mode",
        default="default",
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
        help="torch.compile's mode, for both compiled variants",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results there")
    args = parser.parse_args()
    args.size = args.size or ("full" if kernels else "small")
    if args.size == "full" and not args.pretrained and not torch.cuda.is_available():
        parser.error("--size full needs a GPU")
    args.steps = args.steps or (9 if args.pretrained else 50 if torch.cuda.is_available() else 6)
    for name in ("steps", "batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    for name in ("height", "width"):
        value = getattr(args, name)
        if value is not None and (value < 16 or value % 16):
            parser.error(f"--{name} must be a positive multiple of 16")
    return args


def main() -> None:
    missing = why_no_kernels()
    args = parse_arguments(kernels=missing is None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    register_backend()
    backend: Any = "fusion_pass"
    if missing is not None:
        backend = fusion_pass.Backend(kernels="reference")
        console.print(
            f"[yellow]The CUDA kernels cannot run here: {missing}.[/yellow] This run uses "
            'fusion_pass.Backend(kernels="reference"): the same fusions, run by the PyTorch definitions of the ops.'
        )
    with torch.no_grad():
        outcome = generate(args, device, backend) if args.pretrained else compare(args, device, backend)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        kernels = "cuda" if missing is None else f"reference: {missing}"
        record = environment(device) | {"kernels": kernels} | outcome
        args.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        console.print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
