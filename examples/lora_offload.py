"""A diffusers pipeline with a LoRA and CPU offload, its transformer compiled block by block with backend="fusion_pass".

    python examples/lora_offload.py                                        random weights, on any machine
    python examples/lora_offload.py --pretrained PATH --lora LORA.safetensors --prompt "a lighthouse in the fog"

PATH is a local diffusers checkpoint of Z-Image; nothing is downloaded. Without it the pipeline has a small random
transformer, no text encoder (the prompt is random embeddings) and no decoder (the result is latents). Without --lora
the LoRA is random, too, and large enough to matter.

The order is that of a real program: load, add the LoRA, enable offload, compile. The LoRA stays unmerged, so that it
can be swapped or scaled: its matmuls are in the compiled blocks. On a GPU, pipe.enable_model_cpu_offload() moves each
model there for as long as it runs. diffusers refuses that without a GPU; there the same accelerate hook is put on the
transformer, with nothing to move: what is shown is that hooks and compiled blocks go together.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload_with_hook
from common import arguments, choose_backend, distance, explain, first_call, save, write_json
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
from peft import LoraConfig
from torch import Tensor
from zimage import CAPTION_TOKENS, PIXELS, build_inputs, build_model


def load(args: argparse.Namespace) -> tuple[ZImagePipeline, dict[str, Any]]:
    """The pipeline, on the CPU, and what to call it with."""
    if args.pretrained:
        pipe = ZImagePipeline.from_pretrained(args.pretrained, torch_dtype=torch.bfloat16, local_files_only=True)
        return pipe, {"prompt": args.prompt, "height": 1024, "width": 1024}
    transformer, pixels = build_model("small", "cpu"), PIXELS["small"]
    *_, (caption,) = build_inputs(transformer, pixels, pixels, CAPTION_TOKENS["small"], 1)
    # Where the transformer will run: the pipeline moves nothing that it is given.
    caption = caption.to("cuda" if torch.cuda.is_available() else "cpu")
    nothing: dict[str, Any] = {"vae": None, "text_encoder": None, "tokenizer": None}
    pipe = ZImagePipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, **nothing)
    return pipe, {"prompt_embeds": [caption], "height": pixels, "width": pixels}


def add_lora(pipe: ZImagePipeline, path: Path | None) -> None:
    if path:
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, local_files_only=True)
        return
    torch.manual_seed(2)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3"]
    # peft starts a LoRA at zero, as training wants it; a zero LoRA would show nothing.
    pipe.transformer.add_adapter(LoraConfig(r=8, target_modules=targets, init_lora_weights=False))
    pipe.transformer.eval()


def offload(pipe: ZImagePipeline) -> str:
    if torch.cuda.is_available():
        pipe.enable_model_cpu_offload()
        return "each model is on the GPU while it runs, and on the CPU otherwise"
    pipe.transformer, _ = cpu_offload_with_hook(pipe.transformer, "cpu")
    return "accelerate's hook is on the transformer; without a GPU it has nothing to move"


def main() -> None:
    parser = arguments(__doc__, output="out/lora.png", steps_help="denoising steps (9, or 2 without --pretrained)")
    parser.add_argument("--lora", type=Path, metavar="PATH", help="a LoRA for the checkpoint, one .safetensors file")
    args = parser.parse_args()
    args.steps = args.steps or (9 if args.pretrained else 2)
    result = "pt" if args.pretrained else "latent"
    backend = choose_backend()

    pipe, prompt = load(args)
    pipe.set_progress_bar_config(disable=True)
    add_lora(pipe, args.lora)
    print(f"offload: {offload(pipe)}")

    def image() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        given = {"num_inference_steps": args.steps, "guidance_scale": 0.0, "generator": generator}
        return pipe(**prompt, **given, output_type=result).images

    outputs: list[Tensor] = []
    # Eagerly: builds the model's RoPE table, and shows what the transformer is called with.
    positional, named = first_call(pipe.transformer, lambda: outputs.append(image()))
    pipe.transformer.compile_repeated_blocks(backend=backend)
    report = explain(pipe.transformer, backend, *positional, **named)
    pipe.maybe_free_model_hooks()  # explain called the transformer alone, which left it on the GPU
    compiled = image()
    far = distance(compiled, outputs[0])
    print(f"{report.summary()}; from eager, after {args.steps} steps: {far:.2e}")
    if args.pretrained:
        save(pipe.image_processor.numpy_to_pil(pipe.image_processor.pt_to_numpy(compiled)), args.output)
    write_json(args.json, {"fused": report.counts(), "graphs": report.graphs, "distance": far})


if __name__ == "__main__":
    main()
