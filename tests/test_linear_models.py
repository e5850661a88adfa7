"""Activations in the matmuls of diffusers' models: counts as functions of their layers, results equal to eager's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graph_backend import GraphBackend, needs_casts
from long import LONG
from test_adaln_models import MODELS as ADALN
from test_adaln_models import check
from test_all_heads_sites import ltx2
from test_models import Arguments, compiled, flux1, run
from torch import nn

import fusion_pass
from fusion_pass.dataflow import aten

pytestmark = [pytest.mark.usefixtures("one_graph"), needs_casts]

GELU, SILU = "linear_gelu", "linear_silu_mul"
Make = Callable[[int], tuple[nn.Module, Arguments]]
Counts = tuple[int, int]  # of linear_gelu, and of linear_silu_mul


def of_two_streams(layers: int) -> Counts:
    """A feed-forward for each stream, but for the text's last, which nothing reads."""
    return 2 * layers - 1, 0


def of_flux(layers: int) -> Counts:
    """A feed-forward for each stream of a double block; and a joined row in the one single block."""
    return 2 * layers + 1, 0


def behind_an_embedding(layers: int) -> Counts:
    """A feed-forward a layer, and one that embeds the text."""
    return layers + 1, 0


OF_EACH: dict[str, Callable[[int], Counts]] = {
    "FLUX.1": of_flux,
    "SD3.5": of_two_streams,
    "Qwen-Image": of_two_streams,
    "Wan 2.1": behind_an_embedding,
    "LTX-Video": behind_an_embedding,
    # The others take longer, and are for a night.
    "FLUX.2": lambda layers: (0, 2 * layers),  # one matmul of its single blocks makes q, k and v, too
    "Wan 2.2 TI2V": behind_an_embedding,
    "PixArt": behind_an_embedding,
    "Kandinsky 5": behind_an_embedding,  # whose one block of the text is the other
    "CogView4": of_two_streams,
    "HunyuanVideo": of_flux,
    "Bria": of_flux,
    "Chroma": of_flux,
    "CogVideoX": lambda layers: (layers, 0),
    "Sana": lambda layers: (1, 0),  # its feed-forwards are convolutions
    "Krea 2": lambda layers: (2, layers + 2),  # two blocks of the text
    "ERNIE": lambda layers: (0, 0),  # its GELU is a gate
    "LTX-2": lambda layers: (2 * layers + 2, 0),  # of image and sound
}
MODELS: dict[str, Make] = {name: make for name, (make, _) in ADALN.items()} | {
    "LTX-2": lambda layers: ltx2(layers, "split")
}
EACH = [(name, layers) for layers in (1, 2) for name in OF_EACH]
CHOSEN = EACH if LONG else [("FLUX.1", 2), ("Wan 2.1", 1)]
DYNAMIC = [(name, 1) for name in OF_EACH] if LONG else [("Qwen-Image", 1)]


def counted(backend: GraphBackend) -> Counts:
    counts = backend.report.counts()
    assert all(site.remark == "" for site in backend.report.fused if site.kind in (GELU, SILU))
    return counts.get(GELU, 0), counts.get(SILU, 0)


@pytest.mark.parametrize(("name", "layers"), CHOSEN)
def test_each_feed_forward_is_fused_and_the_result_is_eagers(name: str, layers: int) -> None:
    assert counted(check(*MODELS[name](layers))) == OF_EACH[name](layers)


@pytest.mark.parametrize(("name", "layers"), DYNAMIC)
def test_with_sizes_that_change_the_same_feed_forwards_are_fused(name: str, layers: int) -> None:
    model, arguments = MODELS[name](layers)
    got, backend = compiled(model, arguments, dynamic=True)
    assert torch.equal(got, run(model, arguments)) or name == "FLUX.2"
    assert counted(backend) == OF_EACH[name](layers)


def test_the_gelu_of_fluxs_single_blocks_is_written_where_it_is_joined() -> None:
    model, arguments = flux1(1, 1)
    _, backend = compiled(model, arguments)
    (graph,) = backend.graphs
    calls = graph.graph.find_nodes(op="call_function", target=torch.ops.dit_kernels.linear_gelu.default)
    readers = [[user.target for user in call.users] for call in calls]
    assert readers.count([aten.cat.default]) == 1
    assert backend.count(aten.tanh.default) == 0


def test_compiled_block_by_block_each_block_has_its_gelus_and_the_result_is_eagers() -> None:
    model, arguments = flux1(1, 1)
    expected = run(model, arguments)
    blocks = {"transformer_blocks.0": 2, "single_transformer_blocks.0": 1}
    backends = {name: GraphBackend() for name in blocks}
    for name, backend in backends.items():
        model.get_submodule(name).compile(backend=backend, fullgraph=True)
    assert torch.equal(run(model, arguments), expected)
    assert {name: counted(backend)[0] for name, backend in backends.items()} == blocks


def test_on_a_machine_without_kernels_each_gelu_behind_a_matmul_has_a_row() -> None:
    model, arguments = MODELS["PixArt"](1)
    report = fusion_pass.explain(model, **arguments, return_dict=False)
    rows = [site.reason_name for site in report.missed if site.kind == GELU]
    assert rows == ["NO_KERNEL"] * sum(behind_an_embedding(1))
