"""Equal quantisers of one value become one, in front of the search for sites: which are equal, and which are not."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import quantized
import torch
import torch.nn.functional as F
from graph_backend import GraphBackend, needs_casts, run
from graph_checks import assert_equal, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized import FP8, Quantise
from test_models import qwen_image
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

import fusion_pass
from fusion_pass import graph_pass
from fusion_pass.dataflow import aten, prims
from fusion_pass.prepare import merge_equal_quantisers

E5M2 = torch.float8_e5m2


def matmul(q: Tensor, s: Tensor) -> Tensor:
    """Reads q and s as the matmul of a linear layer does, for any dtype of q."""
    return (q.float() @ torch.ones(q.shape[-1])).flatten() * s.float().flatten()


def int8(z: Tensor) -> tuple[Tensor, Tensor]:
    """torchao's Int8DynamicActivationInt8WeightConfig."""
    low, high = z.amin(-1, keepdim=True), z.amax(-1, keepdim=True)
    low, high = torch.min(low, torch.zeros_like(low)), torch.max(high, torch.zeros_like(high))
    s = (torch.max(-low, high) / 127.5).float().clamp(min=1e-5).to(z.dtype)
    return (z * (1.0 / s)).round().clamp(-128, 127).to(torch.int8), s


def to_e5m2(z: Tensor) -> tuple[Tensor, Tensor]:
    s = (z.abs().amax(-1, keepdim=True) / 448.0).float()
    return (z.float() / s).clamp(-448.0, 448.0).to(E5M2), s


def per_tensor(z: Tensor) -> tuple[Tensor, Tensor]:
    s = (z.abs().amax() / 448.0).float()
    return (z.float() / s).clamp(-448.0, 448.0).to(FP8), s


def of_columns(z: Tensor) -> tuple[Tensor, Tensor]:
    s = (z.abs().amax(-2, keepdim=True) / 448.0).float()
    return (z.float() / s).clamp(-448.0, 448.0).to(FP8), s.mean()


def to_another_constant(z: Tensor) -> tuple[Tensor, Tensor]:
    s = (z.abs().amax(-1, keepdim=True) / 240.0).float()
    return (z.float() / s).clamp(-448.0, 448.0).to(FP8), s


def by_an_asymmetric_range(z: Tensor) -> tuple[Tensor, Tensor]:
    low, high = torch.aminmax(z, dim=-1, keepdim=True)
    s = (high - low) / 255.0
    return ((z - low) / s - 128.0).round().clamp(-128, 127).to(torch.int8), s


FORMS: tuple[Quantise, ...] = (
    *quantized.ROW_WISE,
    int8,
    to_e5m2,
    per_tensor,
    of_columns,
    to_another_constant,
    by_an_asymmetric_range,
)


def casts(backend: GraphBackend) -> int:
    """How many casts to 8 bits are left in the graphs."""
    return sum(len(casts_in(gm.graph, FP8, E5M2, torch.int8)) for gm in backend.graphs)


CAST = prims.convert_element_type.default


def casts_in(graph: Graph, *dtypes: torch.dtype) -> list[Node]:
    return [node for node in graph.find_nodes(op="call_function", target=CAST) if node.args[1] in dtypes]


def linears(*forms: Quantise) -> Callable[..., tuple[Tensor, ...]]:
    return lambda x: tuple(matmul(*form(z)) for z in [x.sin()] for form in forms)


# --- what is merged ---------------------------------------------------------------------------------------------------


@needs_casts
@settings(max_examples=6)
@given(
    chosen=st.lists(st.tuples(st.sampled_from(FORMS), st.integers(0, 1)), min_size=2, max_size=4),
    dynamic=st.sampled_from((False, False, True)),
)
def test_each_quantiser_of_a_value_is_computed_once_and_the_result_is_eagers(
    chosen: list[tuple[Quantise, int]], dynamic: bool
) -> None:
    def model(x: Tensor) -> tuple[Tensor, ...]:
        values = (x.sin(), x.cos())
        return tuple(matmul(*form(values[which])) for form, which in chosen)

    args = tensors((2, 3, 16))
    got, backend = run(model, *args, dynamic=dynamic, strict=True)
    assert_equal(got, model(*args))
    assert casts(backend) == len(set(chosen))


@needs_casts
def test_inductor_merges_none_of_them() -> None:
    """If this fails with a new torch, the pass has nothing left to merge."""
    _, backend = run(linears(quantized.torchao, int8, quantized.torchao, int8), *tensors((2, 3, 16)), fuse=False)
    assert casts(backend) == 4


def test_casts_and_views_in_front_of_equal_quantisers_are_merged_with_them() -> None:
    """Under autocast, a value in fp32 is cast for each of the layers that read it."""

    def model(x: Tensor) -> tuple[Tensor, ...]:
        z = x.float().sin()
        return tuple(matmul(*quantized.torchao(z.to(x.dtype).reshape(-1, 16))) for _ in range(3))

    args = tensors((2, 3, 16))
    got, backend = run(model, *args)
    assert_equal(got, model(*args))
    assert casts(backend) == 1
    assert len(casts_in(backend.graphs[0].graph, torch.bfloat16)) == 1


def test_a_text_that_each_layer_quantises_is_quantised_once() -> None:
    def model(text: Tensor, x: Tensor) -> Tensor:
        for _ in range(4):
            x = F.layer_norm(x + matmul(*quantized.torchao(text)).mean().to(x.dtype), x.shape[-1:])
        return x

    args = tensors((2, 3, 16), (2, 5, 4))
    got, backend = run(model, *args)
    assert casts(backend) == 1
    assert_equal(got, run(model, *args, fuse=False)[0])


@needs_casts
def test_a_model_in_int8_quantises_each_value_once() -> None:
    """Of Qwen-Image's blocks: the norms of the image and the text in front of attention and of the feed-forward, both
    outputs of attention, and both activations. It does not return its text. test_gelu_quantisers.py has FLUX.1."""
    torchao, layers = pytest.importorskip("torchao.quantization"), 2
    model, args = qwen_image(layers)

    def chosen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and "blocks" in name and "norm" not in name and "mod" not in name

    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig(), chosen)
    backend = GraphBackend()
    with torch.no_grad():
        got = torch.compile(model, backend=backend, fullgraph=True)(**args)
        assert torch.equal(got[0], model(**args)[0])
    assert not [kind for kind in backend.report.counts() if kind.endswith("_quant")]
    assert casts(backend) == backend.count(aten.amax.default) == 8 * layers - 3


# --- what stays apart -------------------------------------------------------------------------------------------------


def traced(function: Callable[..., Any], *args: Tensor) -> Graph:
    """The graph with its mutations, which Inductor would have made functional."""
    decompositions = {aten._to_copy.default: lambda x, dtype=None: CAST(x, dtype)}
    return make_fx(function, decomposition_table=decompositions, tracing_mode="fake")(*args).graph


def test_in_such_a_graph_equal_quantisers_are_merged() -> None:
    args = tensors((2, 3, 16))
    for form in (quantized.torchao, by_an_asymmetric_range):  # which the tests below keep apart
        graph = traced(linears(form, form), *args)
        merge_equal_quantisers(graph)
        assert len(casts_in(graph, FP8, torch.int8)) == 1
        assert_computes(graph, linears(form, form), *args)


def assert_unchanged(graph: Graph) -> None:
    before = str(graph)
    merge_equal_quantisers(graph)
    assert str(graph) == before


def assert_computes(graph: Graph, function: Callable[..., Any], *args: Tensor) -> None:
    graph.lint()
    module = GraphModule(nn.Module(), graph)
    assert_equal(module(*(a.clone() for a in args)), function(*(a.clone() for a in args)))


def test_a_write_into_the_value_between_two_quantisers_keeps_them_apart() -> None:
    def model(x: Tensor) -> tuple[Tensor, ...]:
        first = matmul(*quantized.torchao(x))
        x.mul_(2)
        return first, matmul(*quantized.torchao(x)), matmul(*quantized.torchao(x))

    args = tensors((2, 3, 16))
    graph = traced(model, *args)
    merge_equal_quantisers(graph)
    assert len(graph.find_nodes(op="call_function", target=aten.amax.default)) == 2
    assert_computes(graph, model, *args)


def test_a_write_into_quantised_rows_keeps_them_apart() -> None:
    def model(x: Tensor) -> tuple[Tensor, ...]:
        (q, s), (r, t) = by_an_asymmetric_range(x), by_an_asymmetric_range(x)
        q.view(-1).add_(1)
        return matmul(q, s), matmul(r, t)

    args = tensors((2, 3, 16))
    graph = traced(model, *args)
    assert_unchanged(graph)
    assert_computes(graph, model, *args)


def test_quantisers_on_two_streams_stay_apart() -> None:
    graph = traced(linears(quantized.torchao, quantized.torchao), *tensors((2, 3, 16)))
    _, second = graph.find_nodes(op="call_function", target=aten.amax.default)
    second.meta["custom"] = {"stream": 1}
    assert_unchanged(graph)


def test_results_that_the_graph_returns_stay_apart() -> None:
    """Also through a view: who gets them may write into one of them."""

    def model(x: Tensor) -> tuple[Tensor, ...]:
        (q, s), (r, t) = quantized.torchao(x), quantized.torchao(x)
        return q, s, r.view(torch.uint8), t

    (x,) = tensors((2, 3, 16))
    got, backend = run(model, x)
    assert casts(backend) == 2
    assert got[0].data_ptr() != got[2].data_ptr()


def stochastic(z: Tensor) -> tuple[Tensor, Tensor]:
    s = z.abs().amax(-1, keepdim=True).float() / 127.0
    return (z / s + torch.rand_like(s)).floor().to(torch.int8), s


def negative_zero(z: Tensor) -> tuple[Tensor, Tensor]:
    s = z.amax(-1, keepdim=True)
    return (z / s).clamp(min=-0.0).to(FP8), s


def positive_zero(z: Tensor) -> tuple[Tensor, Tensor]:
    s = z.amax(-1, keepdim=True)
    return (z / s).clamp(min=0.0).to(FP8), s


def static(z: Tensor) -> tuple[Tensor, Tensor]:
    return (z * 0.25).to(FP8), z[..., :1]


def without_a_cast(z: Tensor) -> tuple[Tensor, Tensor]:
    s = z.abs().amax(-1, keepdim=True)
    return z / s, s


def to_bf16(z: Tensor) -> tuple[Tensor, Tensor]:
    s = z.abs().amax(-1, keepdim=True).float()
    return (z / s).to(torch.bfloat16), s


@pytest.mark.parametrize(
    "forms",
    (
        (stochastic, stochastic),
        (static, static),  # finds no range
        (without_a_cast, without_a_cast),
        (to_bf16, to_bf16),
        (positive_zero, negative_zero),
        (quantized.torchao, to_e5m2),
        (quantized.torchao, to_another_constant),
        (quantized.torchao, per_tensor, of_columns, int8),
    ),
    ids=lambda forms: "-".join(form.__name__ for form in forms),
)
def test_what_differs_or_is_no_quantiser_is_not_touched(forms: tuple[Quantise, ...]) -> None:
    assert_unchanged(traced(linears(*forms), *tensors((2, 3, 16))))


def test_a_training_graph_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_pass, "merge_equal_quantisers", lambda graph: pytest.fail("called"))
    (x,) = tensors((2, 3, 16))
    backend = GraphBackend()
    model = torch.compile(lambda x: sum(matmul(*quantized.torchao(x.detach() * x)) for _ in range(2)), backend=backend)
    model(x.requires_grad_()).sum().backward()


def test_an_error_of_the_pass_brings_the_quantisers_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(matcher: Any, graph: Graph) -> None:
        assert len(graph.find_nodes(op="call_function", target=aten.amax.default)) == 1
        raise ZeroDivisionError("seeded")

    monkeypatch.setattr(graph_pass.PatternMatcherPass, "apply", fail)
    graph = traced(linears(quantized.torchao, quantized.torchao), *tensors((2, 3, 16)))
    before = [node.target for node in graph.nodes]
    with pytest.warns(UserWarning, match="seeded"):
        graph_pass.FusionPass(kernels="reference")(graph)
    assert [node.target for node in graph.nodes] == before


# --- the generated code -----------------------------------------------------------------------------------------------


def code(model: Callable[..., Any], *args: Tensor, backend: Any) -> str:
    torch._dynamo.reset()
    with fresh_cache(), torch.no_grad():
        got, (text,) = run_and_get_code(torch.compile(model, backend=backend), *args)
    assert [t.shape for t in got] == [t.shape for t in model(*args)]
    return re.sub("# AOT ID: .*", "", text)


def integer_matmuls(*forms: Quantise) -> Callable[..., tuple[Tensor, ...]]:
    def model(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        z = x.sin()
        return tuple(torch._int_mm(form(z)[0].reshape(-1, z.shape[-1]), weight) for form in forms)

    return model


def test_the_generated_code_stores_the_quantised_rows_once() -> None:
    args = (*tensors((2, 3, 16)), torch.ones(16, 16, dtype=torch.int8))
    model = integer_matmuls(int8, int8, int8)
    plain, ours = (code(model, *args, backend=backend) for backend in ("inductor", fusion_pass.Backend()))
    stored = [text.count(", torch.int8)\n") for text in (plain, ours)]
    assert stored == [3, 1]


def test_where_nothing_is_merged_or_fused_the_generated_code_is_that_of_plain() -> None:
    args = (*tensors((2, 3, 16)), torch.ones(16, 16, dtype=torch.int8))
    model = integer_matmuls(int8, by_an_asymmetric_range)
    plain, ours = (code(model, *args, backend=backend) for backend in ("inductor", fusion_pass.Backend()))
    assert plain == ours
