"""A ComfyUI node that compiles the model with backend="fusion_pass", and what is fused in a model of ComfyUI's style.

    cp examples/comfyui.py ComfyUI/custom_nodes/fusion_pass_node.py     then the node is under "_for_testing"
    python examples/comfyui.py                                          without ComfyUI: what would be fused

ComfyUI's own node TorchCompileModel hands a backend's name to set_torch_compile_wrapper, which calls torch.compile on
the diffusion model, and puts the result in its place while it samples; but its list of backends is fixed. The node
below is the same with backend="fusion_pass". pip install fusion-pass into ComfyUI's Python first.

Run as a program, this compiles, with the same arguments, a small random model of its own, in which the arithmetic of a
block is written as ComfyUI writes it for Lumina 2 and Z-Image: torch's own RMSNorm, which rounds otherwise than that of
diffusers; gate and scale [B, D], unsqueezed where they are used; x * (1 + scale). RoPE and the caption are left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def without_options(guards: list[Any]) -> list[bool]:
    """ComfyUI passes a fresh dict of options at each step; guards on it would compile the model again each time."""
    return ["transformer_options" not in guard.name for guard in guards]


class FusionPassCompile:
    CATEGORY = "_for_testing"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def patch(self, model: Any) -> tuple[Any]:
        from comfy_api.torch_helpers import set_torch_compile_wrapper

        patched = model.clone()
        set_torch_compile_wrapper(patched, backend="fusion_pass", options={"guard_filter_fn": without_options})
        return (patched,)


NODE_CLASS_MAPPINGS = {"FusionPassCompile": FusionPassCompile}


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.q_norm, self.k_norm = (nn.RMSNorm(dim // heads, eps=1e-5) for _ in range(2))
        self.feed_forward = nn.Sequential(nn.Linear(dim, 3 * dim), nn.SiLU(), nn.Linear(3 * dim, dim))
        self.attention_norm1, self.attention_norm2 = (nn.RMSNorm(dim, eps=1e-5) for _ in range(2))
        self.ffn_norm1, self.ffn_norm2 = (nn.RMSNorm(dim, eps=1e-5) for _ in range(2))
        self.modulation = nn.Linear(dim, 4 * dim)

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.qkv(x).chunk(3, dim=-1))
        q, k, v = (part.movedim(1, 2) for part in (self.q_norm(q), self.k_norm(k), v))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).movedim(1, 2).flatten(2))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale_msa, gate_msa, scale_mlp, gate_mlp = self.modulation(condition).chunk(4, dim=1)
        attended = self.attention(self.attention_norm1(x) * (1 + scale_msa.unsqueeze(1)))
        x = x + gate_msa.unsqueeze(1).tanh() * self.attention_norm2(attended)
        fed = self.feed_forward(self.ffn_norm1(x) * (1 + scale_mlp.unsqueeze(1)))
        return x + gate_mlp.unsqueeze(1).tanh() * self.ffn_norm2(fed)


class DiffusionModel(nn.Module):
    def __init__(self, dim: int = 256, heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        for parameter in (p for p in self.parameters() if p.ndim == 1):
            nn.init.normal_(parameter, 1.0, 0.5)  # norm weights of 1 and gates near 0 would hide most of the arithmetic

    def forward(self, x: Tensor, condition: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        for layer in self.layers:
            x = layer(x, condition)
        return x


def main() -> None:
    from common import arguments, choose_backend, distance, explain, write_json  # ComfyUI has only this file

    args = arguments(__doc__).parse_args()
    backend = choose_backend()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = DiffusionModel().eval().to(device, torch.bfloat16)
    x, condition = (torch.randn(*shape, device=device, dtype=torch.bfloat16) for shape in ((2, 96, 256), (2, 256)))

    report = explain(model, backend, x, condition, {})
    compiled = torch.compile(model, backend=backend, options={"guard_filter_fn": without_options})
    with torch.no_grad():
        far = distance(compiled(x, condition, {}), model(x, condition, {}))
    print(f"{report.summary()}; from eager: {far:.2e}")
    write_json(args.json, {"fused": report.counts(), "graphs": report.graphs, "distance": far})


if __name__ == "__main__":
    main()
