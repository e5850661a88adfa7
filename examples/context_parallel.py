"""One Z-Image over several processes: diffusers' context parallelism, each block compiled with backend="fusion_pass".

    torchrun --standalone --nproc-per-node 2 examples/context_parallel.py                     random weights
    torchrun --standalone --nproc-per-node 2 examples/context_parallel.py --pretrained PATH   a local checkpoint

Each process has all weights and its share of the tokens. Between matmul and matmul, where the fused sites are, nothing
is exchanged; Ulysses attention trades tokens for heads, so the number of heads must be divisible by the number of
processes. diffusers 0.42 has no plan of its own for Z-Image: `plan` says where the tokens are split and gathered.

With a GPU for each process they talk through NCCL, and the model has the full size. Without GPUs they run on the CPU,
talk through gloo, and the model is small. The latents and captions are random. Every process computes the whole model
first, unsplit and eagerly, and the split one is compared with that.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from common import arguments, choose_backend, distance, write_json
from diffusers import ContextParallelConfig, ZImageTransformer2DModel
from diffusers.models import _modeling_parallel as parallel
from timing import run_step
from zimage import CAPTION_TOKENS, PIXELS, SIZES, build_inputs, build_model

# A module has one entry in a plan, so the first block of a stack must not be its last.
SIZES["small"]["n_refiner_layers"] = 2


def plan(model: ZImageTransformer2DModel) -> dict[str, Any]:
    """Of each stack of blocks: the first one splits its tokens, each one its RoPE table, the last one gathers."""
    split = parallel.ContextParallelInput(split_dim=1, expected_dims=3)
    gather = parallel.ContextParallelOutput(gather_dim=1, expected_dims=3)
    places: dict[str, Any] = {}
    for stack in ("noise_refiner", "context_refiner", "layers"):
        last = len(getattr(model, stack)) - 1
        places |= {f"{stack}.0": {"x": split}, f"{stack}.*": {"freqs_cis": split}, f"{stack}.{last}": gather}
    return places


def split_over_processes(model: ZImageTransformer2DModel) -> None:
    # diffusers counts the accelerators to choose one for each process; without any it would divide by zero.
    on_cpu = mock.patch("torch.accelerator.device_count", return_value=1)
    with nullcontext() if torch.cuda.is_available() else on_cpu:
        config = ContextParallelConfig(ulysses_degree=dist.get_world_size())
        model.enable_parallelism(config=config, cp_plan=plan(model))


def load(pretrained: Path | None, device: str) -> tuple[ZImageTransformer2DModel, str]:
    if pretrained is None:
        size = "small" if device == "cpu" else "full"
        return build_model(size, device), size
    options = {"subfolder": "transformer", "torch_dtype": torch.bfloat16, "local_files_only": True}
    return ZImageTransformer2DModel.from_pretrained(pretrained, **options).to(device).eval(), "full"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--pretrained", type=Path, metavar="PATH", help="folder of a diffusers Z-Image checkpoint")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start this with torchrun, see --help")

    cuda = torch.cuda.is_available()
    if cuda and torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"]):
        parser.error("with GPUs, there must be one for each process; CUDA_VISIBLE_DEVICES= runs on the CPU")
    device = f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    first = dist.get_rank() == 0
    backend = choose_backend(print if first else lambda text: None)

    with torch.no_grad():
        model, size = load(args.pretrained, device)
        inputs = build_inputs(model, PIXELS[size], PIXELS[size], CAPTION_TOKENS[size], 1)
        whole = run_step(model, inputs)
        split_over_processes(model)
        split = run_step(model, inputs)
        # The three stacks differ in their number of tokens: without dynamic=False the second would be compiled for any.
        model.compile_repeated_blocks(backend=backend, dynamic=False)
        compiled = run_step(model, inputs)

    counts = torch._dynamo.utils.counters["fusion_pass"]
    fused = {kind: count for kind, count in sorted(counts.items()) if hasattr(torch.ops.dit_kernels, kind)}
    far = {"split": distance(split, whole), "split and compiled": distance(compiled, whole)}
    if first:
        print(f"{dist.get_world_size()} processes; fused in each, once for each kind of block: {fused}")
        print("from the whole model, eager: " + ", ".join(f"{name} {value:.2e}" for name, value in far.items()))
        write_json(args.json, {"processes": dist.get_world_size(), "fused": fused, "distance": far})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
