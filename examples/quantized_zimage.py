"""Z-Image with quantised linear layers (torchao), compiled with backend="fusion_pass".

    python examples/quantized_zimage.py                            small and random, on any machine
    python examples/quantized_zimage.py --pretrained PATH --prompt "a lighthouse in the fog"

PATH is a local diffusers checkpoint, of which the program makes an image. On a GPU with FP8 matmuls (compute capability
8.9 or newer) the weights and inputs of the linear layers become FP8. Elsewhere only the weights do. Without
--pretrained, the result is compared with that of the quantised model, run eagerly.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import arguments, choose_backend, compare, compile_and_run, device, small_model, write_json
from diffusers import ZImagePipeline
from torch import nn
from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Float8WeightOnlyConfig, PerRow, quantize_


def quantize(model: nn.Module) -> None:
    # By default quantize_ turns Inductor's coordinate descent tuning on, which makes a large model compile for minutes.
    # If you cannot pass set_inductor_config=False, set torch._inductor.config.coordinate_descent_tuning = False
    # afterwards.
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9):
        config: Any = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    else:
        config = Float8WeightOnlyConfig(set_inductor_config=False)
    quantize_(model, config)
    print(f"quantised with {type(config).__name__}")


def make_image(args: argparse.Namespace, backend: Any) -> dict[str, Any]:
    pipe = ZImagePipeline.from_pretrained(args.pretrained, torch_dtype=torch.bfloat16, local_files_only=True)
    pipe.to(device())
    quantize(pipe.transformer)

    def run(steps: int, output_type: str = "pil") -> Any:
        generator = torch.Generator().manual_seed(0)
        given = {"num_inference_steps": steps, "guidance_scale": 0.0, "generator": generator}  # 0 for Z-Image-Turbo
        return pipe(args.prompt, output_type=output_type, **given).images

    return compile_and_run(pipe, backend, run, args.steps, args.output)


def main() -> None:
    args = arguments(__doc__, output="out/quantized_zimage.png", steps=9).parse_args()
    backend = choose_backend()
    if args.pretrained:
        results = make_image(args, backend)
    else:
        model, inputs = small_model("z-image")
        quantize(model)
        results = compare(model, inputs, backend)
    write_json(args.json, results)


if __name__ == "__main__":
    main()
