"""Wan through diffusers, its transformers compiled with backend="fusion_pass".

    python examples/wan.py                              small and random, on any machine
    python examples/wan.py --pretrained PATH --prompt "a lighthouse in the fog"

PATH is a local diffusers checkpoint, of which the program makes a video.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import arguments, choose_backend, compare, compile_and_run, device, small_model, write_json
from diffusers import WanPipeline


def make_video(args: argparse.Namespace, backend: Any) -> dict[str, Any]:
    pipe = WanPipeline.from_pretrained(args.pretrained, torch_dtype=torch.bfloat16, local_files_only=True).to(device())

    def run(steps: int, output_type: str = "pil") -> Any:
        return pipe(
            args.prompt,
            height=480,
            width=832,
            num_frames=args.frames,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
            output_type=output_type,
        ).frames[0]

    return compile_and_run(pipe, backend, run, args.steps, args.output)


def main() -> None:
    parser = arguments(__doc__, output="out/wan.gif", steps=50)
    parser.add_argument("--frames", type=int, default=81, help="1 more than a multiple of 4 (%(default)s)")
    args = parser.parse_args()
    backend = choose_backend()
    results = make_video(args, backend) if args.pretrained else compare(*small_model("wan2.1"), backend)
    write_json(args.json, results)


if __name__ == "__main__":
    main()
