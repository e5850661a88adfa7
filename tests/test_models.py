"""Other models that write the same mathematics: counts as functions of their layers, results equal to eager's."""

from __future__ import annotations

import pytest
import torch
import zimage
from diffusers import Lumina2Transformer2DModel
from graph_backend import GraphBackend
from torch import nn


def lumina2(layers: int, refiners: int) -> nn.Module:
    torch.manual_seed(0)
    model = Lumina2Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=layers,
        num_refiner_layers=refiners,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=[4, 2, 2],
        axes_lens=[128, 128, 128],
        cap_feat_dim=8,
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1 if parameter.ndim > 1 else 1.0)
    return model.eval().to(torch.bfloat16)


@pytest.mark.parametrize(("layers", "refiners"), ((2, 1), (3, 2)))
def test_lumina_2_has_the_sites_of_z_image(layers: int, refiners: int) -> None:
    model = lumina2(layers, refiners)
    arguments = {
        "hidden_states": torch.randn(2, 4, 16, 16).bfloat16(),
        "timestep": torch.rand(2).bfloat16(),
        "encoder_hidden_states": torch.randn(2, 6, 8).bfloat16(),
        "encoder_attention_mask": torch.ones(2, 6, dtype=torch.bool),
        "return_dict": False,
    }
    backend = GraphBackend()
    with torch.no_grad():
        expected = model(**arguments)[0]
        got = torch.compile(model, backend=backend)(**arguments)[0]
    assert torch.equal(got, expected)
    assert backend.report.counts() == zimage.expected_counts(layers, refiners)


@pytest.mark.parametrize("layers", (2, 3))
def test_controlnet_samples_between_y_and_the_next_norm_part_the_two_output_sites(layers: int) -> None:
    transformer, (latents, timestep, captions) = zimage.model(layers=layers), zimage.inputs()
    shapes: list[torch.Size] = []
    hook = transformer.layers[0].register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    zimage.run(transformer, (latents, timestep, captions))
    hook.remove()
    samples = {index: torch.randn(shapes[0]).bfloat16() for index in range(layers)}

    def run(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(latents, timestep, captions, controlnet_block_samples=samples, return_dict=False)[0][0]

    backend = GraphBackend()
    assert torch.equal(run(torch.compile(transformer, backend=backend)), run(transformer))
    expected = zimage.expected_counts(layers)
    boundaries = layers - 1
    expected["norm_tanh_mul_add_norm_scale"] -= boundaries
    expected["norm_tanh_mul_add"] += boundaries
    expected["norm_scale"] += boundaries
    assert backend.report.counts() == expected
