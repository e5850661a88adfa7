"""Models of which a part is quantised, or all in one of several ways: the sites are those of the model in bf16, and the
result is eager's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import quantized
import torch
import torch.nn.functional as F
import zimage
from graph_backend import GraphBackend, needs_casts
from graph_checks import but_adaln, but_matmuls
from long import only_long
from test_models import flux1
from torch import Tensor, nn

from fusion_pass.report import FusionReport

torchao = pytest.importorskip("torchao.quantization")

pytestmark = needs_casts

BF16 = torch.bfloat16


# --- linear layers of other libraries ---------------------------------------------------------------------------------


@torch.library.custom_op("fusion_pass_tests::matmul_4bit", mutates_args=())
def matmul_4bit(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """Two numbers of 4 bits in each byte, one scale for each row of the weight."""
    low, high = (packed & 15).to(x.dtype) - 8, (packed >> 4).to(x.dtype) - 8
    return F.linear(x, torch.stack((low, high), -1).flatten(-2) * scale)


@matmul_4bit.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


class Opaque(nn.Module):
    """What a graph sees of bitsandbytes' Linear4bit: a custom op, whose code Inductor does not see."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.scale = weight.abs().amax(1, keepdim=True) / 7
        numbers = (weight / self.scale).round().clamp(-8, 7).to(torch.int16) + 8
        self.packed = (numbers[:, ::2] | (numbers[:, 1::2] << 4)).to(torch.uint8)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        product = torch.ops.fusion_pass_tests.matmul_4bit(x, self.packed, self.scale)
        return product if self.bias is None else product + self.bias


class Dequantised(nn.Module):
    """As diffusers' GGUFLinear with Q8_0: blocks of bytes are turned into the weight, in the graph, at each call."""

    BLOCK = 32

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        blocks = linear.weight.detach().float().reshape(-1, self.BLOCK)
        scale = (blocks.abs().amax(1, keepdim=True) / 127).half()
        numbers = (blocks / scale.float()).round().to(torch.int8)
        self.data = torch.cat((scale.view(torch.uint8), numbers.view(torch.uint8)), 1)
        self.shape, self.bias = linear.weight.shape, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        scale, numbers = self.data[:, :2].view(torch.float16), self.data[:, 2:].view(torch.int8)
        return F.linear(x, (scale.float() * numbers).reshape(self.shape).to(x.dtype), self.bias)


def replace(model: nn.Module, make: Callable[[nn.Linear], nn.Module], chosen: Callable[[str], bool]) -> None:
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and chosen(name) and module.in_features % Dequantised.BLOCK == 0:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, make(module))


def by_torchao(config: Any) -> Callable[[nn.Module, Callable[[str], bool]], Any]:
    return lambda model, chosen: torchao.quantize_(
        model, config, lambda module, name: isinstance(module, nn.Linear) and chosen(name)
    )


INT8_DYNAMIC = by_torchao(torchao.Int8DynamicActivationInt8WeightConfig())
INT8_WEIGHTS = by_torchao(torchao.Int8WeightOnlyConfig())
FP8_WEIGHTS = by_torchao(torchao.Float8WeightOnlyConfig())


# --- the models -------------------------------------------------------------------------------------------------------


def is_linear_of_a_block(name: str) -> bool:
    return ("layers." in name or "refiner." in name or "blocks." in name) and not ("adaLN" in name or "norm" in name)


def fused(model: nn.Module, args: Any) -> FusionReport:
    """The report, after a run whose result is eager's."""
    keywords = args if isinstance(args, dict) else {}
    positional = () if keywords else args
    backend = GraphBackend()
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(*positional, **keywords, return_dict=False)[0]
        got = torch.compile(model, backend=backend)(*positional, **keywords, return_dict=False)[0]
    for ours, eager in zip(got, expected, strict=True):
        assert torch.equal(ours, eager)
    return backend.report


def missed(report: FusionReport) -> Counter[tuple[str, str | None]]:
    return Counter((site.kind, site.reason_name) for site in report.missed)


def z_image(layers: int = 1, refiners: int = 0) -> tuple[nn.Module, Any]:
    return zimage.model(layers=layers, refiners=refiners), zimage.inputs()


@cache
def in_bf16(make: Callable[[], tuple[nn.Module, Any]]) -> FusionReport:
    return fused(*make())


def flux() -> tuple[nn.Module, Any]:
    return flux1(1, 1)


@pytest.mark.parametrize("make", (z_image, pytest.param(flux, marks=only_long)))
def test_a_model_in_int8_has_the_sites_of_the_model_in_bf16(make: Any) -> None:
    model, args = make()
    INT8_DYNAMIC(model, is_linear_of_a_block)
    report, expected = fused(model, args), in_bf16(make)
    if make is z_image:
        assert but_matmuls(report.counts()) == but_matmuls(expected.counts())
        assert missed(report) == missed(expected)
    else:  # Inductor multiplies a result in int8 by its scales in the kernel of the residual add
        assert but_adaln(report) == but_adaln(expected)
        assert "mul_add_norm_scale" not in report.counts()


def test_layerwise_casting_costs_no_site_of_a_block() -> None:
    """diffusers' own: weights are kept in FP8, and cast up before each layer and down behind it. Dynamo breaks the
    graph at each cast: this test compiles one block, to save time."""
    reports = []
    for casts in (False, True):
        model, args = z_image()
        if casts:
            model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=BF16)
        expected, backend = zimage.run(model, args), GraphBackend()
        torch._dynamo.reset()
        model.layers[0].compile(backend=backend)
        assert torch.equal(zimage.run(model, args), expected)
        reports.append(backend.report)
    assert but_matmuls(reports[0].counts()) == but_matmuls(reports[1].counts())
    assert {site.reason_name for site in reports[1].missed} <= {site.reason_name for site in reports[0].missed}


def test_weights_that_are_quantised_in_four_ways_in_one_model_cost_no_site() -> None:
    """Attention and the feed-forward of each layer in another way: int8 and FP8 weights by torchao, a linear layer that
    is one op, and one that turns bytes into its weight."""
    layers = 2
    model, args = z_image(layers)
    for prefix, quantise in (
        ("layers.0.attention.", INT8_WEIGHTS),
        ("layers.0.feed_forward.", lambda model, chosen: replace(model, Opaque, chosen)),
        ("layers.1.attention.", lambda model, chosen: replace(model, Dequantised, chosen)),
        ("layers.1.feed_forward.", FP8_WEIGHTS),
    ):
        quantise(model, lambda name, prefix=prefix: name.startswith(prefix) and is_linear_of_a_block(name))
    assert {type(module) for module in model.modules()} >= {Opaque, Dequantised}
    with torch._inductor.config.patch(pattern_matcher=False):  # its lowering of int8 weights on a CPU is no graph
        report = fused(model, args)
    assert but_matmuls(report.counts()) == but_matmuls(zimage.expected_counts(layers, 0))
    assert missed(report).keys() == missed(in_bf16(z_image)).keys()


def test_layers_in_fp8_and_in_bf16_each_have_their_own_ops() -> None:
    """The first layer is left in bf16, as it matters most for quality."""
    layers = 2
    model, args = z_image(layers)
    quantized.quantize_(model, chosen=lambda name: name.startswith("layers.1.") and is_linear_of_a_block(name))
    counts = zimage.expected_counts(layers, 0)
    # The norm in front of a block's attention is fused with the block before it; that of its feed-forward is inside.
    in_fp8 = {"linear_silu_mul": 1, "norm_tanh_mul_add_norm_scale": 2}
    expected = {kind: count - in_fp8.get(kind, 0) for kind, count in counts.items()}
    expected |= {f"{kind.removeprefix('linear_')}_quant": count for kind, count in in_fp8.items()}
    report = fused(model, args)
    assert report.counts() == expected
    assert missed(report) == {("norm", "ALONE"): len(report.missed)}


def test_flux_with_one_block_in_fp8_has_the_sites_of_the_model_in_bf16() -> None:
    model, args = flux()
    quantized.quantize_(model, chosen=lambda name: name.startswith("single_") and is_linear_of_a_block(name))
    counts, expected = fused(model, args).counts(), in_bf16(flux).counts()
    assert counts.pop("gelu_quant") == counts.pop("norm_scale_quant") == 1
    in_fp8 = {"norm_scale": 1, "linear_gelu": 1}
    assert counts == {kind: count - in_fp8.get(kind, 0) for kind, count in expected.items()}


@pytest.mark.parametrize("make", (Opaque, Dequantised))
def test_where_nothing_is_fused_or_merged_the_graph_is_that_of_plain(make: Callable[[nn.Linear], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(make(nn.Linear(32, 64)), nn.ReLU(), make(nn.Linear(64, 32))), torch.randn(2, 5, 32)
    graphs = []
    for fuse in (False, True):
        torch._dynamo.reset()
        backend = GraphBackend(fuse=fuse)
        with torch.no_grad():
            assert torch.equal(torch.compile(model, backend=backend)(x), model(x))
        graphs.append([str(gm.graph) for gm in backend.graphs])
    assert graphs[0] == graphs[1]
