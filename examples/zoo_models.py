"""The models of bench_zoo.py: diffusers' classes at their published widths, with few layers and random weights.

Each entry of MODELS says how wide the model is, how many layers of it are run, and what it is called with. The layers
are few so that it compiles in seconds, and mixed so that each sort of block has its part, as in the whole model.
Nothing is read or downloaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from zimage import SIZES, build_inputs

Config = dict[str, Any]
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Draw:
    """Makes the inputs of a model: random, on one device, of one dtype."""

    device: str
    dtype: torch.dtype
    batch: int
    generator: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        """[batch, *shape], of the order of 1."""
        size = (self.batch, *shape)
        return torch.randn(size, generator=self.generator, device=self.device, dtype=self.dtype)

    def filled(self, value: float, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """[batch, *shape], each element the same."""
        return torch.full((self.batch, *shape), value, device=self.device, dtype=dtype or self.dtype)

    def mask(self, length: int, valid: int, dtype: torch.dtype = torch.bool) -> Tensor:
        """[batch, length]: 1 for the first `valid` tokens, 0 for the padding behind them."""
        return (torch.arange(length, device=self.device) < valid).to(dtype).repeat(self.batch, 1)

    def grid(self, *sizes: int) -> Tensor:
        """[product of sizes, len(sizes)]: the position of each token along each axis."""
        return torch.cartesian_prod(*(torch.arange(size, device=self.device).float() for size in sizes))


@dataclass(frozen=True)
class ZooModel:
    """A model of the zoo.

    title: its name in tables. class_name: its class in diffusers. layers: the arguments of the class that are numbers
    of layers, and how many are run; published: how many the published model has. full, small: the class's other
    arguments, of the published model and of a tiny one. sizes, small_sizes: numbers that say how long the inputs are.
    make_inputs: the arguments of a forward pass. blocks: the classes of the blocks that are compiled one by one, where
    diffusers does not name them itself.
    """

    title: str
    class_name: str
    layers: Mapping[str, int]
    published: Mapping[str, int]
    full: Config
    small: Config
    sizes: Mapping[str, int]
    small_sizes: Mapping[str, int]
    make_inputs: Callable[[Draw, nn.Module, Mapping[str, int]], Arguments]
    blocks: tuple[str, ...] = field(default=())

    def build(self, layers: Mapping[str, int], small: bool, device: str) -> nn.Module:
        """The model in bf16, on the device from the start: no second copy, in fp32 or on the host, is ever made."""
        make = getattr(diffusers, self.class_name)
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(device):
                model = make(**(self.small if small else self.full), **layers)
        finally:
            torch.set_default_dtype(before)
        keep_in_fp32(model)
        if device != "meta":
            randomize(model)
        if self.blocks:
            model._repeated_blocks = list(self.blocks)
        return model.eval().requires_grad_(False)

    def inputs(self, model: nn.Module, sizes: Mapping[str, int], batch: int, device: str, seed: int = 1) -> Arguments:
        """The arguments of a forward pass, by name."""
        draw = Draw(device, torch.bfloat16, batch, torch.Generator(device).manual_seed(seed))
        return self.make_inputs(draw, model, sizes)

    def with_sizes(self, given: Sequence[tuple[str, int]], small: bool) -> dict[str, int]:
        """The usual sizes, apart from the given ones."""
        sizes = dict(self.small_sizes if small else self.sizes)
        unknown = [name for name, _ in given if name not in sizes]
        if unknown:
            raise ValueError(f"{self.title} has the sizes {', '.join(sizes)}, and got {', '.join(unknown)}")
        return sizes | dict(given)

    def with_layers(self, text: str | None) -> dict[str, int]:
        """The numbers of layers: `text` is "N", for each sort of layer, or "N+M"; None for the usual ones."""
        if text is None:
            return dict(self.layers)
        numbers = [int(number) for number in text.split("+")]
        if len(numbers) == 1:
            numbers *= len(self.layers)
        if len(numbers) != len(self.layers) or numbers[0] < 1 or min(numbers) < 0:
            raise ValueError(f"{self.title} has the layers {', '.join(self.layers)}, and got {text}")
        return dict(zip(self.layers, numbers, strict=True))


def keep_in_fp32(model: nn.Module) -> None:
    """Puts into fp32 what diffusers keeps in fp32 when it loads a bf16 model."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, parameter in model.named_parameters():
        if any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.float()


def randomize(model: nn.Module) -> None:
    """Weights as in a trained model: each layer keeps the order of magnitude, and no gate or scale is near zero.

    A fresh model has norm weights of 1, and pad tokens, biases and gates of 0, which would hide most of the arithmetic.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and name.endswith("weight"):  # of a norm
                parameter.normal_(1.0, 0.2)
            elif parameter.ndim == 1 or "table" in name or "token" in name:  # a bias; Wan's and LTX's modulations
                parameter.normal_(0.0, 0.3)
            else:
                parameter.normal_(0.0, math.prod(parameter.shape[1:]) ** -0.5)


# --- what each is called with -----------------------------------------------------------------------------------------


def zimage_inputs(draw: Draw, model: Any, sizes: Mapping[str, int]) -> Arguments:
    pixels = sizes["pixels"]
    latents, timesteps, captions = build_inputs(model, pixels, pixels, sizes["text"], draw.batch, draw.generator)
    return {"x": latents, "t": timesteps, "cap_feats": captions}


def flux_inputs(draw: Draw, model: Any, sizes: Mapping[str, int]) -> Arguments:
    side, text = sizes["side"], sizes["text"]
    return {
        "hidden_states": draw.normal(side * side, model.config.in_channels),
        "encoder_hidden_states": draw.normal(text, model.config.joint_attention_dim),
        "pooled_projections": draw.normal(model.config.pooled_projection_dim),
        "timestep": draw.filled(0.5),
        # The model makes it 4000 in bf16, exactly. 3500 is 3504 there, or 3500 where Inductor leaves out the rounding.
        "guidance": draw.filled(4.0, dtype=torch.float32),
        "img_ids": draw.grid(1, side, side),
        "txt_ids": torch.zeros(text, 3, device=draw.device),
    }


def flux2_inputs(draw: Draw, model: Any, sizes: Mapping[str, int]) -> Arguments:
    side, text = sizes["side"], sizes["text"]
    return {
        "hidden_states": draw.normal(side * side, model.config.in_channels),
        "encoder_hidden_states": draw.normal(text, model.config.joint_attention_dim),
        "timestep": draw.filled(0.5),
        "guidance": draw.filled(4.0, dtype=torch.float32),
        "img_ids": draw.grid(1, side, side, 1),
        "txt_ids": draw.grid(1, 1, 1, text),
    }


def qwen_inputs(draw: Draw, model: Any, sizes: Mapping[str, int]) -> Arguments:
    side = sizes["side"]
    return {
        "hidden_states": draw.normal(side * side, model.config.in_channels),
        "encoder_hidden_states": draw.normal(sizes["text"], model.config.joint_attention_dim),
        "timestep": draw.filled(0.5),
        "img_shapes": [[(1, side, side)]] * draw.batch,
    }


def wan_inputs(draw: Draw, model: Any, sizes: Mapping[str, int]) -> Arguments:
    return {
        "hidden_states": draw.normal(model.config.in_channels, sizes["frames"], sizes["height"], sizes["width"]),
        "timestep": draw.filled(500.0, dtype=torch.float32),
        "encoder_hidden_states": draw.normal(sizes["text"], model.config.text_dim),
    }


def sd3_inputs(draw: Draw, model: Any, sizes: Mapping[str, int]) -> Arguments:
    return {
        "hidden_states": draw.normal(model.config.in_channels, sizes["latent"], sizes["latent"]),
        "encoder_hidden_states": draw.normal(sizes["text"], model.config.joint_attention_dim),
        "pooled_projections": draw.normal(model.config.pooled_projection_dim),
        "timestep": draw.filled(500.0, dtype=torch.float32),
    }


def hunyuan_inputs(draw: Draw, model: Any, sizes: Mapping[str, int]) -> Arguments:
    """Text to video: the tokens of an image are zeros, those of written signs are padding."""
    return {
        "hidden_states": draw.normal(model.config.in_channels, sizes["frames"], sizes["height"], sizes["width"]),
        "timestep": draw.filled(500.0),
        "encoder_hidden_states": draw.normal(sizes["text"], model.config.text_embed_dim),
        "encoder_attention_mask": draw.mask(sizes["text"], sizes["prompt"], torch.int64),
        "encoder_hidden_states_2": draw.filled(0.0, sizes["glyphs"], model.config.text_embed_2_dim),
        "encoder_attention_mask_2": draw.mask(sizes["glyphs"], 0, torch.int64),
        "image_embeds": draw.filled(0.0, sizes["image"], model.config.image_embed_dim),
    }


def ltx2_inputs(draw: Draw, model: Any, sizes: Mapping[str, int]) -> Arguments:
    tokens = sizes["frames"] * sizes["height"] * sizes["width"]
    return {
        "hidden_states": draw.normal(tokens, model.config.in_channels),
        "audio_hidden_states": draw.normal(sizes["audio"], model.config.audio_in_channels),
        "encoder_hidden_states": draw.normal(sizes["text"], model.config.caption_channels),
        "audio_encoder_hidden_states": draw.normal(sizes["text"], model.config.caption_channels),
        "timestep": draw.filled(500.0, dtype=torch.float32),
        "encoder_attention_mask": draw.mask(sizes["text"], sizes["text"], torch.int64),
        "audio_encoder_attention_mask": draw.mask(sizes["text"], sizes["text"], torch.int64),
        "num_frames": sizes["frames"],
        "height": sizes["height"],
        "width": sizes["width"],
        "audio_num_frames": sizes["audio"],
    }


def lumina2_inputs(draw: Draw, model: Any, sizes: Mapping[str, int]) -> Arguments:
    return {
        "hidden_states": draw.normal(model.config.in_channels, sizes["latent"], sizes["latent"]),
        "timestep": draw.filled(0.5, dtype=torch.float32),
        "encoder_hidden_states": draw.normal(sizes["text"], model.config.cap_feat_dim),
        "encoder_attention_mask": draw.mask(sizes["text"], sizes["text"]),
    }


# --- the models -------------------------------------------------------------------------------------------------------

MODELS: dict[str, ZooModel] = {
    "z-image": ZooModel(
        title="Z-Image",
        class_name="ZImageTransformer2DModel",
        layers={"n_layers": 6, "n_refiner_layers": 2},
        published={"n_layers": 30, "n_refiner_layers": 2},
        full=SIZES["full"],
        small={name: value for name, value in SIZES["small"].items() if "layers" not in name},
        sizes={"pixels": 1024, "text": 32},
        small_sizes={"pixels": 64, "text": 32},
        make_inputs=zimage_inputs,
    ),
    "flux1": ZooModel(
        title="FLUX.1",
        class_name="FluxTransformer2DModel",
        layers={"num_layers": 2, "num_single_layers": 4},
        published={"num_layers": 19, "num_single_layers": 38},
        full={"guidance_embeds": True},
        small={
            "in_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 16,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 6, 6),
        },
        sizes={"side": 64, "text": 512},
        small_sizes={"side": 4, "text": 6},
        make_inputs=flux_inputs,
    ),
    "flux2": ZooModel(
        title="FLUX.2",
        class_name="Flux2Transformer2DModel",
        layers={"num_layers": 2, "num_single_layers": 6},
        published={"num_layers": 8, "num_single_layers": 48},
        full={},
        small={
            "in_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "joint_attention_dim": 32,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        sizes={"side": 64, "text": 512},
        small_sizes={"side": 4, "text": 6},
        make_inputs=flux2_inputs,
    ),
    "qwen-image": ZooModel(
        title="Qwen-Image",
        class_name="QwenImageTransformer2DModel",
        layers={"num_layers": 4},
        published={"num_layers": 60},
        full={},
        small={
            "in_channels": 16,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "joint_attention_dim": 16,
            "axes_dims_rope": (8, 4, 4),
        },
        sizes={"side": 64, "text": 256},
        small_sizes={"side": 4, "text": 6},
        make_inputs=qwen_inputs,
    ),
    "wan2.1": ZooModel(
        title="Wan 2.1 14B",
        class_name="WanTransformer3DModel",
        layers={"num_layers": 2},
        published={"num_layers": 40},
        full={},
        small={
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "text_dim": 16,
            "freq_dim": 32,
            "ffn_dim": 64,
        },
        sizes={"frames": 21, "height": 60, "width": 104, "text": 512},  # 81 frames of 832×480
        small_sizes={"frames": 2, "height": 4, "width": 6, "text": 6},
        make_inputs=wan_inputs,
    ),
    "sd3.5": ZooModel(
        title="SD3.5 large",
        class_name="SD3Transformer2DModel",
        layers={"num_layers": 4},
        published={"num_layers": 38},
        full={
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        small={
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 16,
            "pos_embed_max_size": 16,
            "qk_norm": "rms_norm",
        },
        sizes={"latent": 128, "text": 333},  # 77 tokens of the CLIPs, 256 of T5
        small_sizes={"latent": 8, "text": 6},
        make_inputs=sd3_inputs,
        blocks=("JointTransformerBlock",),
    ),
    "hunyuanvideo1.5": ZooModel(
        title="HunyuanVideo-1.5",
        class_name="HunyuanVideo15Transformer3DModel",
        layers={"num_layers": 3},
        published={"num_layers": 54},
        full={"task_type": "t2v"},
        small={
            "in_channels": 9,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_refiner_layers": 1,
            "text_embed_dim": 16,
            "text_embed_2_dim": 12,
            "image_embed_dim": 8,
            "rope_axes_dim": (4, 6, 6),
            "task_type": "t2v",
        },
        # 61 frames of 832×480. The prompt is padded to 1000 tokens, which are masked, but in every attention.
        sizes={"frames": 16, "height": 30, "width": 52, "text": 1000, "prompt": 100, "glyphs": 256, "image": 729},
        small_sizes={"frames": 2, "height": 4, "width": 4, "text": 8, "prompt": 5, "glyphs": 4, "image": 3},
        make_inputs=hunyuan_inputs,
    ),
    "ltx2": ZooModel(
        title="LTX-2",
        class_name="LTX2VideoTransformer3DModel",
        layers={"num_layers": 2},
        published={"num_layers": 48},
        full={"rope_type": "split"},
        small={
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 16,
            "caption_channels": 16,
            "rope_type": "split",
        },
        sizes={"frames": 16, "height": 16, "width": 24, "audio": 126, "text": 1024},  # 121 frames of 768×512
        small_sizes={"frames": 2, "height": 2, "width": 3, "audio": 5, "text": 6},
        make_inputs=ltx2_inputs,
    ),
    "lumina2": ZooModel(
        title="Lumina 2",
        class_name="Lumina2Transformer2DModel",
        layers={"num_layers": 6, "num_refiner_layers": 2},
        published={"num_layers": 26, "num_refiner_layers": 2},
        full={"cap_feat_dim": 2304},
        small={
            "sample_size": 16,
            "in_channels": 4,
            "hidden_size": 48,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "axes_dim_rope": (8, 8, 8),
            "axes_lens": (64, 64, 64),
            "cap_feat_dim": 16,
        },
        sizes={"latent": 128, "text": 256},
        small_sizes={"latent": 8, "text": 6},
        make_inputs=lumina2_inputs,
        blocks=("Lumina2TransformerBlock",),
    ),
}
