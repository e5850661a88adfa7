"""SwiGLU and GELU in the matmul in front of them: bit-equality to eager, what is matched, what must not match."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import quantized
import torch
import torch.nn.functional as F
from graph_backend import GraphBackend, needs_casts, run
from graph_checks import BF16, FP32, Model, assert_equal, options_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gelu_quantisers import by_hand
from test_graph_pass import rewritten, traced
from test_lowering import is_direct
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from dit_kernels import tuning
from dit_kernels.families.linear import Linear
from dit_kernels.tuning import LIBRARY, Choice, NotMeasured
from fusion_pass import Backend, eligibility
from fusion_pass.dataflow import aten
from fusion_pass.refusal import Reason, Refused
from fusion_pass.site import Site

ops = torch.ops.dit_kernels
FP16 = torch.float16
SILU, GELU = "linear_silu_mul", "linear_gelu"
B, S, K, N = 2, 5, 24, 32
MATMULS = (aten.mm.default, aten.addmm.default, aten.bmm.default)


def exact(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    """Eighths between -2 and 2. Their sums of products are exact in fp32, in every order, and not in 16 bits."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randint(-16, 17, shape, generator=generator) / 8).to(dtype)


# --- spellings --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """A feed-forward. act: "silu" is a SwiGLU, "none" and "tanh" are GELUs.

    one_weight: how gate and up are made of one weight's result; "": there are two weights. biases: of which layers.
    flattens: does the model itself flatten its tokens in front of the layers, or behind the activation? wide: is the
    activation computed in fp32, and its result kept in fp32? joined: is the result joined with another tensor?
    """

    act: str = "silu"
    one_weight: str = ""
    up_first: bool = False
    biases: tuple[bool, bool] = (False, False)
    by_transpose: bool = False  # x @ w.T
    flattens: str = ""
    wide: bool = False
    joined: bool = False
    dtype: torch.dtype = BF16
    sizes: tuple[int, ...] = (B, S, K)
    width: int = N

    @property
    def kind(self) -> str:
        return SILU if self.act == "silu" else GELU


class FeedForward(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec, rows = spec, spec.width * (2 if spec.one_weight else 1)
        for i, has_bias in enumerate(spec.biases):
            self.register_parameter(f"w{i}", nn.Parameter(exact(rows, spec.sizes[-1], dtype=spec.dtype, seed=i)))
            bias = nn.Parameter(exact(rows, dtype=spec.dtype, seed=i)) if has_bias else None
            self.register_parameter(f"bias{i}", bias)

    def layer(self, x: Tensor, i: int) -> Tensor:
        w, bias = getattr(self, f"w{i}"), getattr(self, f"bias{i}")
        return x @ w.T if self.spec.by_transpose and bias is None else F.linear(x, w, bias)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        width, way = self.spec.width, self.spec.one_weight
        if not way:
            return self.layer(x, 0), self.layer(x, 1)
        whole = self.layer(x, 0)
        if way == "slices":
            return whole[..., :width], whole[..., width:]
        return whole.chunk(2, -1) if way == "chunk" else whole.split([width, width], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        spec, first = self.spec, x
        x = x.flatten(0, -2) if spec.flattens == "before" else x
        if spec.act == "silu":
            a, b = reversed(self.parts(x)) if spec.up_first else self.parts(x)
            z = F.silu(a.float() if spec.wide else a) * b
        else:
            a = self.layer(x, 0)
            z = F.gelu(a.float() if spec.wide else a, approximate=spec.act)
        z = z.flatten(0, -2) if spec.flattens == "behind" else z
        if spec.joined:
            z = torch.cat((first.reshape(*z.shape[:-1], -1).to(z.dtype), z), -1)
        return z @ z.new_ones(z.shape[-1], 2)


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    lead = draw(st.sampled_from(((5,), (2, 3), (1, 4), (2, 2, 3))))
    act = draw(st.sampled_from(("silu", "silu", "none", "tanh")))
    flattens = draw(st.sampled_from(("", "", "before", "behind")))
    return Spec(
        act=act,
        one_weight=draw(st.sampled_from(("", "chunk", "split", "slices"))) if act == "silu" else "",
        up_first=draw(st.booleans()),
        biases=draw(st.tuples(st.booleans(), st.booleans())),
        by_transpose=draw(st.booleans()),
        flattens=flattens,
        wide=draw(st.booleans()),
        joined=draw(st.booleans()) and not flattens,
        dtype=draw(st.sampled_from((BF16, FP16, FP32))),
        sizes=(*lead, draw(st.sampled_from((8, 30, 48)))),
        width=draw(st.sampled_from((8, 16, 31))),
    )


def feed_forward(spec: Spec, dynamic: bool = False, **options: Any) -> tuple[GraphBackend, Tensor, Tensor]:
    """The backend, what the compiled model gives, and what eager gives."""
    model, x = FeedForward(spec), exact(*spec.sizes, dtype=spec.dtype, seed=7)
    torch._dynamo.mark_static(x, x.ndim - 1)
    with torch.no_grad():
        expected = model(x)
    got, backend = run(model, x, dynamic=dynamic, **options)
    return backend, got, expected


@needs_casts
@settings(max_examples=25)
@given(spec=specs(), dynamic=st.sampled_from((False, False, True)))
def test_the_activation_is_fused_with_its_matmul_and_the_result_is_eagers(spec: Spec, dynamic: bool) -> None:
    backend, got, expected = feed_forward(spec, dynamic, strict=True)
    assert_equal(got, expected)
    assert backend.report.counts() == {spec.kind: 1} and backend.report.missed == [], backend.report
    (site,) = backend.report.fused
    assert (site.rounding, site.dtype, site.remark) == ("model", spec.dtype, "")
    left = sum(map(backend.count, MATMULS))
    assert left == 1, "the matmul that reads the result is the only one left"


@pytest.mark.parametrize("act", ("silu", "none", "tanh"))
def test_under_the_policy_fp32_the_same_ops_are_fused(act: str) -> None:
    backend, *_ = feed_forward(Spec(act=act), rounding="fp32")
    assert options_of(backend)["rounding"] == "fp32"


def test_the_options_are_read_off_the_graph() -> None:
    assert options_of(feed_forward(Spec())[0]) == {"rounding": "model", "silu_dtype": BF16, "out_dtype": BF16}
    wide = options_of(feed_forward(Spec(wide=True, dtype=FP16))[0])
    assert wide == {"rounding": "model", "silu_dtype": FP32, "out_dtype": FP32}
    erf, tanh = (options_of(feed_forward(Spec(act=act))[0]) for act in ("none", "tanh"))
    assert (erf["approximate"], tanh["approximate"]) == ("none", "tanh")
    assert erf["out_dtype"] == tanh["out_dtype"] == BF16


@needs_casts
def test_autocast_over_fp32_weights_is_fused() -> None:
    model, x = FeedForward(Spec(biases=(True, True), dtype=FP32)), exact(B, S, K, dtype=FP32, seed=7)
    with torch.autocast("cpu", BF16), torch.no_grad():
        got, backend = run(model, x, strict=True)
        assert_equal(got, model(x))
    assert backend.report.counts() == {SILU: 1}


# --- the graph after the rewrite --------------------------------------------------------------------------------------


def call_of(backend: GraphBackend, kind: str) -> torch.fx.Node:
    (graph,) = backend.graphs
    (call,) = graph.graph.find_nodes(op="call_function", target=getattr(ops, kind).default)
    return call


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
@pytest.mark.parametrize("act", ("silu", "none"))
def test_the_op_reads_x_and_the_parameters_themselves_and_nothing_is_copied(act: str, dynamic: bool) -> None:
    backend, *_ = feed_forward(Spec(act=act, biases=(True, True)), dynamic)
    call = call_of(backend, SILU if act == "silu" else GELU)
    assert [arg.op for arg in call.args] == ["placeholder"] * (5 if act == "silu" else 3)
    assert backend.count(aten.clone.default) == backend.count(aten.permute.default) == 0


@pytest.mark.parametrize("up_first", (False, True))
def test_the_parts_of_one_weight_are_views_of_it(up_first: bool) -> None:
    backend, *_ = feed_forward(Spec(one_weight="chunk", biases=(True, False), up_first=up_first))
    _, *parts = call_of(backend, SILU).args
    assert all(part.target is aten.slice.Tensor and part.args[0].op == "placeholder" for part in parts)
    assert len({part.args[0] for part in parts}) == 2
    rows = [part.args[1:] for part in parts]
    assert rows == 2 * ([(0, N, 2 * N), (0, 0, N)] if up_first else [(0, 0, N), (0, N, 2 * N)])
    assert backend.count(aten.split.Tensor) == 0


def test_a_part_of_a_part_of_a_result_is_found() -> None:
    """As in FLUX.2's single blocks, had nothing else read the other parts."""

    def model(x: Tensor, w: Tensor) -> Tensor:
        _, both = F.linear(x, w).split([8, 2 * N], dim=-1)
        gate, up = both.chunk(2, -1)
        return (F.silu(gate) * up) @ x.new_ones(N, 2)

    args = exact(B, S, K), exact(8 + 2 * N, K)
    got, backend = run(model, *args)
    assert_equal(got, model(*args))
    assert [part.args[1:] for part in call_of(backend, SILU).args[1:3]] == [(0, 8, 8 + N), (0, 8 + N, 8 + 2 * N)]


def test_a_result_that_is_viewed_in_another_shape_is_reshaped() -> None:
    def model(x: Tensor, w: Tensor) -> Tensor:
        return F.gelu(F.linear(x, w).unflatten(0, (S, -1))) @ x.new_ones(N, 2)

    for dynamic in (False, True):
        x = exact(2 * S, K)
        torch._dynamo.mark_static(x, 1)
        got, backend = run(model, x, nn.Parameter(exact(N, K)), dynamic=dynamic)
        assert_equal(got, model(x, exact(N, K)))
        assert backend.report.counts() == {GELU: 1}


def test_numbers_of_tokens_change_without_another_compilation() -> None:
    model, backend = FeedForward(Spec(biases=(True, False))), GraphBackend()
    dynamic = torch.compile(model, backend=backend, dynamic=True)
    for batch, tokens in ((2, 5), (2, 7), (3, 4)):
        x = exact(batch, tokens, K)
        torch._dynamo.mark_static(x, 2)
        with torch.no_grad():
            assert_equal(dynamic(x), model(x))
    assert len(backend.graphs) == 1 and backend.report.counts() == {SILU: 1}


def test_a_number_of_tokens_that_depends_on_values_adds_no_guard() -> None:
    def model(x: Tensor, chosen: Tensor, w: Tensor) -> Tensor:
        rows = x[chosen]
        return torch.cat((rows, F.gelu(F.linear(rows, w))), -1) @ x.new_ones(K + N, 2)

    backend, w = GraphBackend(strict=True), nn.Parameter(exact(N, K))
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), torch.no_grad():
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for count in (3, 1, 0):
            args = exact(B, S, K), torch.arange(B * S).view(B, S) < count, w
            assert_equal(compiled(*args), model(*args))
    assert len(backend.graphs) == 1 and backend.report.counts() == {GELU: 1}


# --- joined results ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_compiled_code_calls_the_op_directly_and_copies_no_weight(dynamic: bool) -> None:
    model, x = FeedForward(Spec(one_weight="chunk", biases=(True, False))), exact(B, S, K)
    torch._dynamo.mark_static(x, 2)
    got, (code,) = run_and_get_code(torch.compile(model, backend=Backend(kernels="reference"), dynamic=dynamic), x)
    assert is_direct(code)
    assert code.count(" = empty_strided_cpu(") == 3, "the result of the op, and ones and the result of a matmul"
    assert_equal(got, model(x))


@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.parametrize("act", ("silu", "tanh"))
def test_compiled_code_writes_a_joined_result_into_its_place(act: str) -> None:
    model, x = FeedForward(Spec(act=act, joined=True)), exact(B, S, K)
    got, (code,) = run_and_get_code(torch.compile(model, backend=Backend(kernels="reference")), x)
    assert "DirectCall('linear_" in code and is_direct(code)
    assert f"({B}, {S}, {N}), ({S * (K + N)}, {K + N}, 1), {K})  # alias" in code
    assert_equal(got, model(x))


def joined_in_another_shape(x: Tensor) -> Tensor:
    z = F.gelu(F.linear(x.flatten(0, 1), W))
    return torch.cat((x, z.view(*x.shape[:-1], -1)), -1) @ x.new_ones(K + N, 2)


def computed_with(x: Tensor) -> Tensor:
    return (F.gelu(F.linear(x, W)) * 2).sin()


INLINE = (joined_in_another_shape, computed_with)


@pytest.mark.parametrize("model", INLINE, ids=lambda model: model.__name__)
def test_a_result_that_inductor_computes_where_it_is_read_is_left_to_it(model: Model) -> None:
    x = exact(B, S, K)
    got, backend = run(model, x, strict=True)
    assert_equal(got, run(model, x, fuse=False)[0])
    assert backend.report.fused == backend.report.missed == []


# --- what must not match ----------------------------------------------------------------------------------------------

W, W3, ONES = exact(N, K, seed=1), exact(N, K, seed=2), torch.ones(N, 2, dtype=BF16)
LORA = exact(2, K, seed=3), exact(N, 2, seed=4)
Layers = tuple[Tensor, Tensor]


def a_lora(x: Tensor) -> Layers:
    down, up = LORA
    return F.linear(x, W) + F.linear(F.linear(x, down), up) * 0.5, F.linear(x, W3)


def in_fp8(x: Tensor) -> Layers:
    layers = [nn.Linear(K, N, dtype=BF16) for _ in range(2)]
    a, b = (quantized.Linear(layer)(x) for layer in layers)
    return a, b


def a_part_of_the_tokens(x: Tensor) -> Layers:
    a, b = F.linear(torch.cat((x, x), 1), W).chunk(2, 1)
    return a, b


def a_sum_with_a_bias_is_rounded_twice(x: Tensor) -> Layers:
    return F.linear(x, W) + W3[:, 0], F.linear(x, W3)


def up_is_returned(x: Tensor) -> Any:
    a, b = F.linear(x, W), F.linear(x, W3)
    return a, b, b @ ONES


def another_part_is_read(x: Tensor) -> Any:
    a, b, q = F.linear(x, torch.cat((W, W3, W))).split(N, -1)
    return a, b, q @ ONES


def the_weight_is_k_n(x: Tensor) -> Layers:
    return x @ W.T.contiguous(), F.linear(x, W3)


def the_weight_of_up_is_k_n(x: Tensor) -> Layers:
    return F.linear(x, W), F.linear(x, W3.T.contiguous().T)


def a_factor(x: Tensor) -> Layers:
    return torch.addmm(W[:, 0], x[0], W.T, alpha=2), F.linear(x[0], W3)


def a_factor_of_the_bias(x: Tensor) -> Layers:
    return torch.addmm(W[:, 0], x[0], W.T, beta=2), F.linear(x[0], W3)


def a_bias_for_each_token(x: Tensor) -> Layers:
    return torch.addmm(x[0, :, :1], x[0], W.T), F.linear(x[0], W3)


def a_bias_of_two_dimensions(x: Tensor) -> Layers:
    return torch.addmm(W[None, :, 0], x[0], W.T), F.linear(x[0], W3)


def one_number_as_bias(x: Tensor) -> Layers:
    return torch.addmm(x[0, 0, :1], x[0], W.T), F.linear(x[0], W3)


def x_is_transposed(x: Tensor) -> Layers:
    x = x[0].T.contiguous().T
    return F.linear(x, W), F.linear(x, W3)


def x_is_not_contiguous(x: Tensor) -> Layers:
    x = torch.cat((x, x), 1)[:, 1 : 1 + S]
    return F.linear(x, W), F.linear(x, W3)


def of_two_dtypes(x: Tensor) -> Layers:
    return F.linear(x, W), F.linear(x.float(), W3.float())


def of_two_values(x: Tensor) -> Layers:
    return F.linear(x, W), F.linear(x.flip(0), W3)


def one_layer(x: Tensor) -> Layers:
    a = F.linear(x, W)
    return a, a


NO_LAYER = (a_lora, in_fp8, a_part_of_the_tokens, a_sum_with_a_bias_is_rounded_twice)
OF_A_PAIR: dict[Model, str] = {
    up_is_returned: "something else reads its result",
    another_part_is_read: "something else reads its result",
    the_weight_of_up_is_k_n: "the weight is stored as [K, N]",
    of_two_dtypes: "the layers of gate and up read different values",
    of_two_values: "the layers of gate and up read different values",
    one_layer: "gate and up are one value",
}
OBSTACLES: dict[Model, str] = {
    the_weight_is_k_n: "the weight is stored as [K, N]",
    a_factor: "multiplied by a number",
    a_factor_of_the_bias: "multiplied by a number",
    a_bias_for_each_token: "its bias is not one number for each column",
    a_bias_of_two_dimensions: "its bias is not one number for each column",
    one_number_as_bias: "its bias is not one number for each column",
    x_is_transposed: "the op would have to copy its input",
    x_is_not_contiguous: "each batch item has a matmul of its own",
}


def swiglu(layers: Model) -> Callable[[Tensor], Any]:
    def model(x: Tensor) -> Any:
        a, b, *others = layers(x)
        return ((F.silu(a) * b).to(BF16) @ ONES, *others)

    return model


@needs_casts
@pytest.mark.parametrize("layers", (*NO_LAYER, *OF_A_PAIR, *OBSTACLES), ids=lambda layers: layers.__name__)
def test_a_matmul_that_no_op_computes_is_left_alone_and_the_swiglu_says_why(layers: Model) -> None:
    model, x = swiglu(layers), exact(B, S, K)
    torch.manual_seed(0)
    got, backend = run(model, x, strict=True)
    torch.manual_seed(0)
    assert_equal(got, run(model, x, fuse=False)[0])
    (site,) = (site for site in backend.report.fused if site.kind != "quant")
    assert site.kind == "silu_mul" and backend.report.missed == []
    obstacle = (OF_A_PAIR | OBSTACLES).get(layers)
    assert site.remark == "" if obstacle is None else obstacle in site.remark, site.remark
    assert obstacle is None or site.remark.startswith(Reason.MATMUL.value)


def gelu_of(layers: Model) -> Callable[[Tensor], Any]:
    return lambda x: F.gelu(layers(x)[0], approximate="tanh") @ ONES


def read_twice(x: Tensor) -> Any:
    a = F.linear(x, W)
    return F.gelu(a) @ ONES, a


def sizes_are_kept_and_values_read(x: Tensor) -> Any:
    a = F.linear(x, W)
    return F.gelu(a) @ ONES, a.sum()


def a_value_inside_is_read(x: Tensor) -> Any:
    a = F.linear(x, W).float()
    return F.gelu(a) @ ONES.float(), (a * 0.7071067811865476) @ ONES.float()


def written_by_hand(x: Tensor) -> Any:
    return by_hand(F.linear(x, W).float()) @ ONES.float()


NO_GELU = (
    *map(gelu_of, (*NO_LAYER, *OBSTACLES)),
    read_twice,
    sizes_are_kept_and_values_read,
    a_value_inside_is_read,
    written_by_hand,
)
NAMES = [layers.__name__ for layers in (*NO_LAYER, *OBSTACLES, *NO_GELU[-4:])]


@needs_casts
@pytest.mark.parametrize("model", NO_GELU, ids=NAMES)
def test_a_gelu_that_is_no_site_has_no_row(model: Model) -> None:
    x = exact(B, S, K)
    torch.manual_seed(0)
    got, backend = run(model, x, strict=True)
    torch.manual_seed(0)
    assert_equal(got, run(model, x, fuse=False)[0])
    assert [site.kind for site in backend.report.fused if site.kind != "quant"] == backend.report.missed == []


@pytest.mark.parametrize("mutated", ("x", "w", "w3", "nothing"))
@pytest.mark.parametrize("place", ("before", "between", "behind"))
def test_a_mutation_between_a_matmul_and_its_activation_leaves_the_matmul_alone(mutated: str, place: str) -> None:
    def function(x: Tensor, w: Tensor, w3: Tensor, ones: Tensor) -> Any:
        def mutate(at: str) -> None:
            if at == place and mutated != "nothing":
                {"x": x, "w": w, "w3": w3}[mutated].mul_(2)

        mutate("before")
        a, b = (aten.mm.default(x, aten.permute.default(weight, [1, 0])) for weight in (w, w3))
        mutate("between")
        z = aten.mm.default(a / (torch.exp(-a) + 1) * b, ones)
        mutate("behind")
        return z, x + w[: len(x)] + w3[: len(x)]

    args = [exact(*shape, dtype=FP32) for shape in ((S, K), (N, K), (N, K), (N, 2))]
    graph = traced(function, *args)
    for node in graph.find_nodes(op="call_function", target=aten.exp.default):
        node.meta["original_aten"] = aten.silu.default
    report = rewritten(graph)
    parted = place == "between" and mutated != "nothing"
    assert report.counts() == {"silu_mul" if parted else SILU: 1} and report.missed == []
    assert ("a mutation or a switch of streams" in report.fused[0].remark) == parted
    torch.testing.assert_close(
        *(f(*(a.clone() for a in args)) for f in (function, _as_function(graph))), rtol=0, atol=0
    )


def _as_function(graph: torch.fx.Graph) -> Callable[..., Any]:
    graph.lint()
    return torch.fx.GraphModule(nn.Module(), graph)


def test_an_operand_that_is_computed_from_the_result_is_no_operand() -> None:
    """The second layer's x is the first one's result."""

    def model(x: Tensor) -> Tensor:
        a = F.silu(F.linear(x, W))
        return (a * F.linear(a[..., :K], W3)) @ ONES

    x = exact(B, S, K)
    got, backend = run(model, x)
    assert_equal(got, run(model, x, fuse=False)[0])
    assert backend.report.fused == []


def test_a_weight_that_is_computed_late_moves_the_op_behind_it() -> None:
    def model(x: Tensor) -> Any:
        a = F.linear(x, W)
        late = W3 + a.new_ones(N, 1)
        return (F.silu(a) * F.linear(x, late)) @ ONES

    x = exact(B, S, K)
    got, backend = run(model, x, strict=True)
    assert_equal(got, model(x))
    assert backend.report.counts() == {SILU: 1}


def test_in_a_training_graph_nothing_is_fused_and_the_gradients_are_eagers() -> None:
    for act in ("silu", "none"):
        model, x = FeedForward(Spec(act=act, biases=(True, True), dtype=FP32)), exact(B, S, K, dtype=FP32)
        model(x).sum().backward()
        expected = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        model.zero_grad()
        torch._dynamo.reset()
        backend = GraphBackend()
        torch.compile(model, backend=backend)(x).sum().backward()
        assert backend.report.fused == []
        assert {site.reason_name for site in backend.report.missed} <= {"TRAINING"}
        got = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        torch.testing.assert_close(got, expected)


# --- where kernels run ------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine that is said to have a kernel for each op, or where one is refused for a reason."""

    def said_to(reason: Reason | None = None, detail: str = "") -> None:
        def prepared(site: Site) -> Site:
            if reason is not None and site.kind in (SILU, GELU):
                raise Refused(reason, site.anchor, detail, site.kind)
            return site

        monkeypatch.setattr(eligibility, "prepared", prepared)

    return said_to


ACTS = {"silu": SILU, "none": GELU}


@pytest.mark.parametrize("act", ACTS)
def test_with_a_kernel_the_matmul_is_fused(act: str, gpu: Callable[..., None]) -> None:
    gpu()
    backend, *_ = feed_forward(Spec(act=act), kernels="auto", strict=True)
    assert backend.report.counts() == {ACTS[act]: 1}


def test_where_it_does_not_pay_the_smaller_site_is_fused_and_says_why(gpu: Callable[..., None]) -> None:
    gpu(Reason.MATMUL, "cuBLAS: 9 µs, fused: 10 µs")
    backend, *_ = feed_forward(Spec(), kernels="auto", strict=True)
    assert backend.report.counts() == {"silu_mul": 1} and backend.report.missed == []
    assert backend.report.fused[0].remark == f"{Reason.MATMUL.value} (cuBLAS: 9 µs, fused: 10 µs)"


def test_where_it_does_not_pay_a_gelu_has_a_row(gpu: Callable[..., None]) -> None:
    gpu(Reason.MATMUL, "quack is not installed")
    backend, *_ = feed_forward(Spec(act="none"), kernels="auto", strict=True)
    (site,) = backend.report.missed
    assert (site.kind, site.reason_name, site.shape) == (GELU, "MATMUL", (B, S, N))
    assert "quack is not installed" in site.reason and backend.report.fused == []


def test_where_it_does_not_pay_a_joined_swiglu_has_a_row(gpu: Callable[..., None]) -> None:
    gpu(Reason.MATMUL, "cuBLAS is faster")
    backend, *_ = feed_forward(Spec(joined=True), kernels="auto", strict=True)
    assert [(site.kind, site.reason_name) for site in backend.report.missed] == [(SILU, "MATMUL")]


@pytest.mark.parametrize("act", ACTS)
def test_what_no_kernel_takes_is_as_without_the_op(act: str, gpu: Callable[..., None]) -> None:
    gpu(Reason.UNFIT)
    backend, *_ = feed_forward(Spec(act=act), kernels="auto", strict=True)
    assert backend.report.counts() == ({"silu_mul": 1} if act == "silu" else {}) and backend.report.missed == []
    assert [site.remark for site in backend.report.fused] == [""] * (act == "silu")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine on which kernels run, and on which every measurement gives one choice, or an error."""

    def as_told(result: Any) -> None:
        def choice(*_: Any) -> Any:
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr(tuning, "choice", choice)
        monkeypatch.setattr(eligibility, "kernels_missing", lambda device: None)
        monkeypatch.setattr(eligibility, "prepare", lambda call: None)
        monkeypatch.setattr(Linear, "missing", lambda family, device: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    return as_told


CHOSEN = Choice("128x160/2x1/pingpong", {LIBRARY: 100.0, "128x160/2x1/pingpong": 80.0})
LEFT = Choice(None, {LIBRARY: 100.0, "128x160/2x1/pingpong": 100.0})


@pytest.mark.parametrize("dynamic", (False, True))
@pytest.mark.parametrize("act", ACTS)
def test_the_call_has_the_measured_configuration_and_the_report_the_numbers(
    act: str, dynamic: bool, measured: Callable[..., None]
) -> None:
    measured(CHOSEN)
    backend, *_ = feed_forward(Spec(act=act), kernels="auto", strict=True, dynamic=dynamic)
    (site,) = backend.report.fused
    assert (site.kind, site.remark) == (ACTS[act], f"{CHOSEN.configuration}, {CHOSEN.why}")
    (call,) = (node for gm in backend.graphs for node in gm.graph.nodes if "linear_" in str(node.target))
    assert call.kwargs["configuration"] == "128x160/2x1/pingpong"


@pytest.mark.parametrize(
    ("result", "why"),
    (
        (LEFT, LEFT.why),
        (NotMeasured("the GPU's memory is short"), "not measured: the GPU's memory is short"),
        (RuntimeError("CUDA error"), "not measured: CUDA error"),
    ),
    ids=lambda value: type(value).__name__,
)
def test_where_nothing_is_gained_or_measured_the_matmul_is_left_as_it_is(
    result: Any, why: str, measured: Callable[..., None]
) -> None:
    measured(result)
    backend, *_ = feed_forward(Spec(), kernels="auto", strict=True)
    (site,) = backend.report.fused
    assert (site.kind, site.remark) == ("silu_mul", f"{Reason.MATMUL.value} ({why})")
    backend, *_ = feed_forward(Spec(act="none"), kernels="auto", strict=True)
    assert backend.report.fused == []
    assert [why in site.reason for site in backend.report.missed] == [True]


def test_where_the_fused_kernel_does_not_compile_the_smaller_site_is_fused(
    measured: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(call: Any) -> None:
        if call.op.name == SILU:
            raise RuntimeError("ptxas")

    measured(CHOSEN)
    monkeypatch.setattr(eligibility, "prepare", prepare)
    backend, *_ = feed_forward(Spec(), kernels="auto", strict=True)
    (site,) = backend.report.fused
    assert (site.kind, site.remark) == ("silu_mul", f"{Reason.MATMUL.value} (RuntimeError: ptxas)")


@pytest.mark.parametrize("columns", (6, 8, 12))
def test_a_result_that_a_tensor_map_cannot_place_in_a_joined_tensor_is_left_to_inductor(
    columns: int, measured: Callable[..., None]
) -> None:
    measured(CHOSEN)
    x, w, other = exact(4, 16), exact(24, 16, seed=1), exact(4, columns, seed=2)

    def joined(x: Tensor, w: Tensor, other: Tensor) -> Tensor:
        return torch.cat((other * 2, F.gelu(F.linear(x, w))), -1)

    _, backend = run(joined, x, w, other, kernels="auto", strict=True)
    assert backend.report.counts() == ({GELU: 1} if columns % 8 == 0 else {})


def test_a_slice_that_starts_before_the_first_column_is_that_from_the_first() -> None:
    x, w = exact(4, 16), exact(24, 16, seed=1)

    def sliced(x: Tensor, w: Tensor) -> Tensor:
        return F.gelu(F.linear(x, w)[..., -100:8]) + 0

    got, _ = run(sliced, x, w, strict=True)
    assert_equal(got, sliced(x, w))


@pytest.mark.parametrize("act", ACTS)
def test_where_no_kernel_can_run_the_report_says_so(act: str) -> None:
    backend, *_ = feed_forward(Spec(act=act), kernels="auto")
    assert [(site.kind, site.reason_name) for site in backend.report.missed] == [(ACTS[act], "NO_KERNEL")]
