"""FLUX.1 through diffusers, its transformer compiled with backend="fusion_pass".

    python examples/flux.py                              small and random, on any machine
    python examples/flux.py --pretrained PATH --prompt "a lighthouse in the fog"

PATH is a local diffusers checkpoint, of which the program makes an image.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import arguments, choose_backend, compare, compile_and_run, device, small_model, write_json
from diffusers import FluxPipeline


def make_image(args: argparse.Namespace, backend: Any) -> dict[str, Any]:
    pipe = FluxPipeline.from_pretrained(args.pretrained, torch_dtype=torch.bfloat16, local_files_only=True).to(device())

    def run(steps: int, output_type: str = "pil") -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipe(args.prompt, num_inference_steps=steps, generator=generator, output_type=output_type).images

    return compile_and_run(pipe, backend, run, args.steps, args.output)


def main() -> None:
    args = arguments(__doc__, output="out/flux.png", steps=28).parse_args()
    backend = choose_backend()
    results = make_image(args, backend) if args.pretrained else compare(*small_model("flux1"), backend)
    write_json(args.json, results)


if __name__ == "__main__":
    main()
