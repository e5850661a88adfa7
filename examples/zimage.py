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
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from common import arguments, choose_backend, distance, explain, first_call, save, write_json
from diffusers import ZImageTransformer2DModel
from rich import box
from rich.table import Table
from timing import (
    Inputs,
    Result,
    Steps,
    alternate,
    console,
    environment,
    first_look,
    median_interval,
    progress,
    run_step,
    speedup,
    time_step,
)
from torch import Tensor

from fusion_pass.environment import why_no_kernels

SIZES: dict[str, dict[str, Any]] = {
    "full": {},  # diffusers' defaults are the published model's: 30 + 2 layers of width 3840
    "small": {"dim": 256, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 64},
}
PIXELS = {"full": 1024, "small": 128}  # height and width where none is given
CAPTION_TOKENS = {"full": 128, "small": 32}
NEXT = """\
In your program:  model = torch.compile(model, backend="fusion_pass")
What it fuses:    print(fusion_pass.explain(model, *inputs))
More:             examples/flux.py, qwen_image.py, wan.py, zimage.py --pretrained PATH; docs/"""


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


def build_inputs(
    model: ZImageTransformer2DModel,
    height: int,
    width: int,
    caption: int,
    batch: int,
    generator: torch.Generator | None = None,
) -> Inputs:
    """Arguments of a forward pass: latents, a list of [16, 1, H/8, W/8]; timesteps [B]; captions, a list of [L, C]."""
    generator = generator or torch.Generator(model.device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=model.device, dtype=model.dtype)

    latents = [normal(model.in_channels, 1, height // 8, width // 8) for _ in range(batch)]
    captions = [normal(caption, model.config.cap_feat_dim) for _ in range(batch)]
    return latents, torch.linspace(0.3, 0.7, batch, device=model.device), captions


def measure(
    variants: dict[str, Callable[..., Any]], inputs: Inputs, steps: int, mode: str, display: Steps
) -> dict[str, Result]:
    """First outputs and peak memory of eager, plain and fused, then eager's times, then those of the other two."""
    results: dict[str, Result] = {}
    outputs: list[Tensor] = []
    for name, step in variants.items():
        display.tell(f"running {name}")
        result, output = first_look(step, inputs, mode)
        display.done()
        results[name] = result
        outputs.append(output)
        if len(outputs) > 1:
            result.distance = distance(output, outputs[0])
            result.equal = float((output == outputs[0]).float().mean())
    eager, *compiled = variants.values()
    display.tell(f"timing {steps} steps of each")
    cuda = inputs[1].is_cuda
    times = [[time_step(eager, inputs, cuda) for _ in range(min(steps, 10))]]
    times += alternate(compiled[0], compiled[1], inputs, steps)
    display.done()
    for result, result.step_ms in zip(results.values(), times, strict=True):
        result.median_ms = statistics.median(result.step_ms)
        result.interval_ms = median_interval(result.step_ms)
    return results


def print_results(results: dict[str, Result], cuda: bool) -> None:
    table = Table(title="one forward pass", box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for column in ("variant", "ms", "95% interval", "peak GiB", "from eager", "equal", "first call"):
        table.add_column(column, justify="left" if column == "variant" else "right", no_wrap=True)
    for name, result in results.items():
        low, high = result.interval_ms
        table.add_row(
            name,
            f"{result.median_ms:.2f}",
            f"{low:.2f} to {high:.2f}",
            "–" if result.peak_bytes is None else f"{result.peak_bytes / 2**30:.2f}",
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
    with progress(total=5) as display:
        display.tell("compiling for the report, with caches off")
        # The first pass builds the model's RoPE table; before that, a compiled model breaks into two graphs.
        run_step(model, inputs)
        report = explain(model, backend, *inputs, return_dict=False)
        display.done()
        variants = {
            "eager": model,
            "torch.compile": torch.compile(model, mode=args.mode),
            'backend="fusion_pass"': torch.compile(model, backend=backend, mode=args.mode),
        }
        results = measure(variants, inputs, args.steps, args.mode, display)
    print_results(results, device == "cuda")
    _, plain, fused = results.values()
    faster = speedup(plain.step_ms, fused.step_ms)
    low, high = faster["interval"]
    if device == "cuda":
        console.print(
            f"fusion_pass against torch.compile, step by step: {faster['median']:.3f} times as fast "
            f"(95% interval {low:.3f} to {high:.3f})"
        )
    console.print("\n" + NEXT, highlight=False, soft_wrap=True)
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

    def image(steps: int, output_type: str = "pil") -> Any:
        return pipe(
            args.prompt,
            height=args.height or 1024,
            width=args.width or 1024,
            num_inference_steps=steps,
            guidance_scale=args.guidance,
            generator=torch.Generator(device).manual_seed(0),
            output_type=output_type,
        ).images

    # Eagerly: builds the model's RoPE table, and shows what the transformer is called with.
    positional, named = first_call(pipe.transformer, lambda: image(1, "latent"))
    pipe.transformer.compile(backend=backend, mode=args.mode)
    report = explain(pipe.transformer, backend, *positional, **named)
    console.print("compiling ...")
    image(1, "latent")
    start = time.perf_counter()
    pictures = image(args.steps)
    seconds = time.perf_counter() - start
    save(pictures, args.output)
    console.print(f"{args.steps} steps in {seconds:.2f} s, the text encoder and the decoder included")
    return {
        "pretrained": str(args.pretrained),
        "steps": args.steps,
        "seconds": seconds,
        "report": json.loads(report.to_json()),
    }


def parse_arguments(kernels: bool) -> argparse.Namespace:
    steps = "denoising steps (default 9) or, without --pretrained, steps to time"
    parser = arguments(__doc__, output="out/zimage.png", steps_help=steps)
    parser.add_argument("--size", choices=SIZES, help="default: full where the kernels run, else small")
    parser.add_argument("--guidance", type=float, default=0.0, help="with --pretrained: 0 for Z-Image-Turbo (default)")
    parser.add_argument("--height", type=int, help="in pixels, a multiple of 16")
    parser.add_argument("--width", type=int, help="in pixels, a multiple of 16")
    parser.add_argument("--batch", type=int, default=1, help="images at once, without --pretrained")
    parser.add_argument(
        "--mode",
        default="default",
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
        help="torch.compile's mode, for both compiled variants",
    )
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
    backend = choose_backend(lambda text: console.print(f"[yellow]{text}[/yellow]"))
    with torch.no_grad():
        outcome = generate(args, device, backend) if args.pretrained else compare(args, device, backend)
    kernels = "cuda" if missing is None else f"reference: {missing}"
    write_json(args.json, environment(device) | {"kernels": kernels} | outcome)


if __name__ == "__main__":
    main()
