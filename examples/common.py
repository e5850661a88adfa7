"""What the examples share: their arguments, the backend for this machine, and a comparison with eager."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fusion_pass
from fusion_pass.environment import why_no_kernels

# diffusers imports torchao where it is installed, and all three then warn of parts that the examples do not use.
for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao"):
    logging.getLogger(name).setLevel(logging.ERROR)

PROMPT = "a lighthouse in the fog, oil painting"


def arguments(
    doc: str | None,
    output: str = "",
    steps: int | None = None,
    steps_help: str = "denoising steps, with --pretrained (%(default)s)",
) -> argparse.ArgumentParser:
    """A parser of the arguments that most examples have. With `output`, also those that make an image or a video."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results there")
    if output:
        parser.add_argument("--pretrained", type=Path, metavar="PATH", help="folder of a diffusers checkpoint")
        parser.add_argument("--prompt", default=PROMPT, help="with --pretrained")
        parser.add_argument("--output", type=Path, default=Path(output), help="with --pretrained (%(default)s)")
        parser.add_argument("--steps", type=int, default=steps, help=steps_help)
    return parser


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_backend(tell: Callable[[str], None] = print) -> Any:
    """The backend: "fusion_pass". Where the kernels cannot run, one that runs the ops by their PyTorch definitions."""
    register_backend()
    missing = why_no_kernels()
    if missing is None:
        return "fusion_pass"
    tell(
        f'The CUDA kernels cannot run here: {missing}. This run uses fusion_pass.Backend(kernels="reference"): the '
        "same fusions, run by the PyTorch definitions of the ops."
    )
    return fusion_pass.Backend(kernels="reference")


def register_backend() -> None:
    """Makes the name "fusion_pass" known to torch.compile where the package is on the path but not installed by pip."""
    if "fusion_pass" not in torch._dynamo.list_backends(exclude_tags=None):
        from fusion_pass.backend import fusion_pass_backend

        torch._dynamo.register_backend(fusion_pass_backend, name="fusion_pass")


def explain(model: nn.Module, backend: Any, *args: Any, **kwargs: Any) -> fusion_pass.FusionReport:
    """Prints what `backend` fuses in a model, and what it does not fuse and why."""
    settings = backend if isinstance(backend, fusion_pass.Backend) else None
    with torch.no_grad():
        report = fusion_pass.explain(model, *args, backend=settings, **kwargs)
    print(report)
    return report


def first_call(module: nn.Module, run: Callable[[], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with which `run()` calls the module for the first time."""
    seen: list[Any] = []
    hook = module.register_forward_pre_hook(lambda _, *inputs: seen.append(inputs), with_kwargs=True)
    try:
        run()
    finally:
        hook.remove()
    return seen[0]


def compile_and_run(pipe: Any, backend: Any, run: Callable[..., list[Any]], steps: int, output: Path) -> dict[str, Any]:
    """Compiles the transformers of a pipeline, prints what is fused, and saves what the pipeline makes.

    run: called with the number of steps and, for a trial run, the output type "latent"; returns images or frames.
    """
    # A trial run gives the report the arguments of a call, and lets Z-Image build its RoPE table, which would break the
    # compiled graph.
    positional, named = first_call(pipe.transformer, lambda: run(1, "latent"))
    for transformer in (pipe.transformer, getattr(pipe, "transformer_2", None)):  # Wan 2.2 has two
        if transformer is not None:
            transformer.compile(backend=backend)  # all that your own program needs
    report = explain(pipe.transformer, backend, *positional, **named)
    save(run(steps), output)
    return {"fused": report.counts()}


def small_model(name: str, layers: str = "1") -> tuple[nn.Module, dict[str, Any]]:
    """A small random model of zoo_models.py, and the arguments of a forward pass."""
    from zoo_models import MODELS

    spec = MODELS[name]
    model = spec.build(spec.with_layers(layers), small=True, device=device())
    return model, spec.inputs(model, spec.small_sizes, batch=1, device=device())


@torch.no_grad()
def compare(model: nn.Module, inputs: dict[str, Any], backend: Any, compile: Callable[..., Any] = torch.compile) -> Any:
    """Runs a model eagerly, prints the report, runs it compiled, and prints how far the result is from eager's.

    compile: called with the model and the backend, returns the compiled model.
    """
    eager = flat(model(**inputs, return_dict=False))  # some models build tables in their first pass
    compiled = compile(model, backend=backend)
    report = explain(compiled, backend, **inputs, return_dict=False)
    far = distance(flat(compiled(**inputs, return_dict=False)), eager)
    print(f"\n{report.summary()}\nfrom eager: {far:.2e}")
    return {"fused": report.counts(), "graphs": report.graphs, "calls": report.calls, "distance": far}


def flat(outputs: Any) -> Tensor:
    """The outputs of a model as one tensor."""
    if isinstance(outputs, Tensor):
        return outputs.flatten()
    return torch.cat([flat(output) for output in outputs])


def distance(output: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    return float((output.float() - reference.float()).norm() / reference.float().norm())


def save(images: list[Any], path: Path, frames_per_second: int = 16) -> None:
    """Writes an image, or the frames of a video as an animation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *others = images
    animation = {"save_all": True, "append_images": others, "duration": 1000 / frames_per_second, "loop": 0}
    first.save(path, **(animation if others else {}))
    print(f"wrote {path}")


def write_json(path: Path | None, results: dict[str, Any]) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        print(f"wrote {path}")
