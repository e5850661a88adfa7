"""Regional compilation: the blocks of a model are compiled one by one, so that equal blocks are compiled only once.

    python examples/regional_compile.py        a small random Qwen-Image of three layers, on any machine

The first call is faster than with the whole model compiled. diffusers' compile_repeated_blocks does this for diffusers'
own models. For any other model, call `block.compile(backend="fusion_pass")` for each block. A site that lies in two
blocks, such as Z-Image's `norm_tanh_mul_add_norm_scale` from one layer to the next, then becomes two sites.
"""

from __future__ import annotations

from typing import Any

from common import arguments, choose_backend, compare, small_model, write_json
from torch import nn


def compile_blocks(model: nn.Module, backend: Any) -> nn.Module:
    model.compile_repeated_blocks(backend=backend, fullgraph=True)
    return model


def main() -> None:
    args = arguments(__doc__).parse_args()
    model, inputs = small_model("qwen-image", layers="3")
    write_json(args.json, compare(model, inputs, choose_backend(), compile=compile_blocks))


if __name__ == "__main__":
    main()
