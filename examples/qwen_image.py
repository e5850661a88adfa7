"""Qwen-Image through diffusers, its transformer compiled with backend="fusion_pass".

    python examples/qwen_image.py                              small and random, on any machine
    python examples/qwen_image.py --pretrained PATH --prompt "a lighthouse in the fog"

PATH is a local diffusers checkpoint, of which the program makes an image.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import arguments, choose_backend, compare, compile_and_run, device, small_model, write_json
from diffusers import QwenImagePipeline


def make_image(args: argparse.Namespace, backend: Any) -> dict[str, Any]:
    pipe = QwenImagePipeline.from_pretrained(args.pretrained, torch_dtype=torch.bfloat16, local_files_only=True)
    pipe.to(device())

    def run(steps: int, output_type: str = "pil") -> Any:
        return pipe(
            args.prompt,
            negative_prompt=" ",  # with a negative prompt each step calls the transformer twice
            true_cfg_scale=4.0,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
            output_type=output_type,
        ).images

    return compile_and_run(pipe, backend, run, args.steps, args.output)


def main() -> None:
    args = arguments(__doc__, output="out/qwen_image.png", steps=50).parse_args()
    backend = choose_backend()
    results = make_image(args, backend) if args.pretrained else compare(*small_model("qwen-image"), backend)
    write_json(args.json, results)


if __name__ == "__main__":
    main()
