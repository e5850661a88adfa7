"""The pass on graphs: what it leaves behind, and graphs that are built by hand because models seldom make them."""

from __future__ import annotations

import pytest
import torch
from graph_backend import run
from site_modules import EPS, SiteModule, Spec, diffusers_norm, inputs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from dit_kernels import reference
from fusion_pass import Backend
from fusion_pass.graph_pass import FusionPass
from fusion_pass.report import FusionReport

DUAL = torch.ops.dit_kernels.norm_tanh_mul_add_norm_scale.default
SINGLE = torch.ops.dit_kernels.norm_tanh_mul_add.default
B, S, D = 2, 4, 16


def traced(function, *args: torch.Tensor) -> Graph:
    """The ATen graph of a function, with fake tensors for metadata."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return make_fx(function, tracing_mode="fake")(*args).graph


def rewritten(graph: Graph) -> FusionReport:
    report = FusionReport()
    FusionPass(kernels="reference", collector=report)(graph)
    return report


def tensors(count: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, S, D) for _ in range(count)]


def gated(x, residual, gate):
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return residual + gate.tanh() * (x * rstd)


def assert_computes(graph: Graph, function, args: list[torch.Tensor]) -> None:
    graph.lint()
    module = GraphModule(torch.nn.Module(), graph)
    expected, got = function(*(a.clone() for a in args)), module(*(a.clone() for a in args))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


# --- mutation and streams --------------------------------------------------------------------------------------------


def test_a_mutation_between_the_nodes_of_a_site_keeps_it_from_being_fused() -> None:
    def function(x, residual, gate):
        n = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        residual.copy_(gate)
        return residual + gate.tanh() * n

    args = tensors(3)
    graph = traced(function, *args)
    report = rewritten(graph)
    assert [site.reason_name for site in report.missed] == ["MUTATION"]
    assert_computes(graph, function, args)


def test_a_mutation_between_a_cast_of_x_and_the_site_keeps_it_from_being_fused() -> None:
    """The op would read x itself, where the graph reads what x was when it was cast."""

    def function(x, residual, gate):
        wide = x.float()
        x.add_(2)
        n = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(residual.dtype)
        return residual + gate.tanh() * n, x

    args = [t.bfloat16() for t in tensors(3)]
    graph = make_fx(function, decomposition_table={torch.ops.aten._to_copy.default: _cast}, tracing_mode="fake")(
        *args
    ).graph
    assert [site.reason_name for site in rewritten(graph).missed] == ["MUTATION"]


def _cast(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """As Inductor decomposes a cast."""
    return torch.ops.prims.convert_element_type.default(x, dtype)


@pytest.mark.parametrize("position", ("before", "after"))
def test_a_mutation_outside_a_site_stays_on_its_side_of_the_op(position) -> None:
    def function(x, residual, gate):
        if position == "before":
            x.mul_(2)
        y = gated(x, residual, gate)
        if position == "after":
            x.mul_(2)
            residual.zero_()
        return y, x + residual

    args = tensors(3)
    graph = traced(function, *args)
    assert rewritten(graph).counts() == {"norm_tanh_mul_add": 1}
    assert_computes(graph, function, args)


def test_a_mutation_between_the_two_halves_leaves_two_single_sites() -> None:
    def function(x, residual, gate):
        y = gated(x, residual, gate)
        x.zero_()
        z = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS) * (1 + gate)
        return y, z, x

    args = tensors(3)
    graph = traced(function, *args)
    assert rewritten(graph).counts() == {"norm_scale": 1, "norm_tanh_mul_add": 1}
    assert_computes(graph, function, args)


def test_a_switch_of_streams_inside_a_site_keeps_it_from_being_fused() -> None:
    graph = traced(gated, *tensors(3))
    (add,) = [n for n in graph.nodes if n.name == "add_1"]
    add.meta["custom"] = {"stream": 1}
    assert [site.reason_name for site in rewritten(graph).missed] == ["MUTATION"]


# --- order -----------------------------------------------------------------------------------------------------------


def test_a_reader_of_y_that_stands_before_the_scale_is_moved_behind_the_op() -> None:
    def function(x, residual, gate, scale):
        y = gated(x, residual, gate)
        used = y.relu() * 3
        s = 1 + scale.exp()
        return used, y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS) * s

    args = tensors(4)
    graph = traced(function, *args)
    assert rewritten(graph).counts() == {"norm_tanh_mul_add_norm_scale": 1}
    assert_computes(graph, function, args)


def test_two_sites_that_would_wait_for_each_other_are_not_both_two_output_sites() -> None:
    """y1 makes the gate of the second site, whose y makes the scale of the first one."""

    def norm(v):
        return v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + EPS)

    def function(x, residual, gate):
        y1 = gated(x, residual, gate)
        y2 = gated(residual, x, y1.sin())
        return y1, y2, norm(y1) * (1 + y2.cos()), norm(y2) * (1 + gate)

    args = tensors(3)
    graph = traced(function, *args)
    report = rewritten(graph)
    assert report.counts() == {"norm_scale": 1, "norm_tanh_mul_add": 1, "norm_tanh_mul_add_norm_scale": 1}
    assert_computes(graph, function, args)


def test_a_result_of_another_layout_is_left_alone_where_memory_is_read_by_strides() -> None:
    def function(x, residual, gate):
        y = gated(x.transpose(0, 1), residual.transpose(0, 1), gate.transpose(0, 1))
        return (y * 2).as_strided((3, 2), (1, 5))

    args = tensors(3)
    graph = traced(function, *args)
    assert [site.reason_name for site in rewritten(graph).missed] == ["LAYOUT"]
    assert_computes(graph, function, args)


# --- what stands in the graph afterwards ------------------------------------------------------------------------------


def test_the_inserted_node_carries_what_inductor_and_its_tools_read() -> None:
    spec = Spec(gate_shape="chunk", scale_shape="chunk")
    _, backend = run(SiteModule(spec), *inputs(spec))
    (graph_module,) = backend.graphs
    (call,) = graph_module.graph.find_nodes(op="call_function", target=DUAL)
    y, z = call.meta["val"]
    assert y.shape == z.shape == spec.shape()
    assert y.is_contiguous() and z.is_contiguous()
    vals, _ = call.meta["eager_input_vals"]
    for argument, val in zip(call.args, vals, strict=True):
        assert (argument.meta["val"] is val) if isinstance(argument, Node) else argument == val
    assert vals[3].stride() == (4 * spec.width, 4 * spec.width, 1)  # the gate as the model has it: a chunk
    assert "site_modules.py" in call.meta["stack_trace"]


def test_nothing_of_the_site_is_left_in_the_graph() -> None:
    spec = Spec()
    _, backend = run(SiteModule(spec), *inputs(spec))
    (graph_module,) = backend.graphs
    left = [n for n in graph_module.graph.nodes if n.op == "call_function" and n.target is not DUAL]
    assert [n.name for n in left if "getitem" not in n.name] == []


def test_the_op_gets_the_strides_that_the_graph_has_through_a_real_inductor_compilation(monkeypatch) -> None:
    """Inductor must not copy a gate that is a view, nor hand the op another layout than the pass saw."""
    seen = []
    definition = reference.stage

    def recording(*args):
        seen.append(args)
        return definition(*args)

    monkeypatch.setattr(reference, "stage", recording)

    def model(v, residual, projection):
        gate = projection.unsqueeze(1).chunk(4, dim=2)[3]
        return residual + gate.tanh() * diffusers_norm(v.transpose(1, 2), None)

    v = torch.randn(B, D, S).bfloat16()
    residual, projection = torch.randn(B, S, D).bfloat16(), torch.randn(B, 4 * D).bfloat16()
    with torch.no_grad():
        got = torch.compile(model, backend=Backend(kernels="reference"))(v, residual, projection)
    assert torch.equal(got, model(v, residual, projection))
    ((x, _, _, gate, *_),) = seen
    assert x.stride() == v.transpose(1, 2).stride()
    assert gate.stride()[::2] == (4 * D, 1)


def test_slices_instead_of_split_make_no_difference() -> None:
    """From torch 2.14 on, chunk arrives as slices."""

    def function(x, residual, projection):
        gate = torch.ops.aten.slice.Tensor(projection, 2, 3 * D, 4 * D)
        return gated(x, residual, gate)

    args = [*tensors(2), torch.randn(B, 1, 4 * D)]
    graph = traced(function, *args)
    assert rewritten(graph).counts() == {"norm_tanh_mul_add": 1}
    assert_computes(graph, function, args)


def test_a_whole_site_whose_modulation_is_slices_is_one_op_that_reads_them() -> None:
    """As torch 2.14 chunks a projection; defaults that are written out change nothing."""

    def function(x, residual, projection):
        wide = torch.ops.aten.unsqueeze.default(projection, 1)
        scale, gate = (torch.ops.aten.slice.Tensor(wide, 2, i * D, (i + 1) * D) for i in range(2))
        y = gated(x, residual, gate)
        mean = torch.ops.aten.mean.dim(y.pow(2), [-1], True, dtype=None)
        rstd = torch.rsqrt(torch.ops.aten.add.Tensor(mean, EPS, alpha=1))
        return y, y * rstd * torch.ops.aten.add.Tensor(scale, 1, alpha=1)

    args = [*tensors(2), torch.randn(B, 2 * D)]
    graph = traced(function, *args)
    for node in graph.nodes:  # tracing drops defaults
        if node.target is torch.ops.aten.mean.dim:
            node.kwargs = {"dtype": None}
        if node.target is torch.ops.aten.add.Tensor:
            node.kwargs = {"alpha": 1}
    report = rewritten(graph)
    assert [(site.kind, site.gate, site.scale) for site in report.fused] == [
        ("norm_tanh_mul_add_norm_scale", "tanh", "one_plus")
    ]
    (call,) = graph.find_nodes(op="call_function", target=DUAL)
    assert [call.args[i].target for i in (3, 8)] == [torch.ops.aten.slice.Tensor] * 2
    assert_computes(graph, function, args)


def test_one_norm_that_cannot_be_read_does_not_cost_the_others(monkeypatch) -> None:
    from fusion_pass.kinds import norm

    find = norm.NORM.find
    calls = []

    def failing(anchor):
        calls.append(anchor)
        if anchor.name == "rsqrt":
            raise ZeroDivisionError("seeded")
        return find(anchor)

    monkeypatch.setattr(norm.NORM, "find", failing, raising=False)

    def function(x, residual, gate):
        return gated(x, residual, gate), gated(residual, gate, x)

    args = tensors(3)
    graph = traced(function, *args)
    report = rewritten(graph)
    assert report.counts() == {"norm_tanh_mul_add": 1}
    assert [site.reason_name for site in report.missed] == ["ERROR"]
    assert_computes(graph, function, args)


def test_of_two_norms_that_are_added_the_gated_one_is_the_site() -> None:
    """The other one is its residual, whichever stands first in the graph."""

    def norm(v):
        return v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + EPS)

    def gated_first(x, residual, gate):
        p = gate.tanh() * norm(x)
        return norm(residual) + p

    def gated_last(x, residual, gate):
        return norm(residual) + gate.tanh() * norm(x)

    def neither_is_gated(x, residual, gate):
        return norm(residual) + norm(x)

    args = tensors(3)
    for function, gate in ((gated_first, "tanh"), (gated_last, "tanh"), (neither_is_gated, None)):
        graph = traced(function, *args)
        report = rewritten(graph)
        assert [(site.kind, site.gate) for site in report.fused] == [("norm_tanh_mul_add", gate)]
        assert [site.reason_name for site in report.missed] == ["ALONE"]
        assert_computes(graph, function, args)


def test_a_norm_is_always_reported_as_fused_or_as_missed() -> None:
    def function(x, residual, gate):
        alone = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        return alone.sin(), gated(gate, x, residual), torch.layer_norm(x, (D,))

    graph = traced(function, *tensors(3))
    report = rewritten(graph)
    assert report.counts() == {"norm_tanh_mul_add": 1}
    assert "ALONE" in [site.reason_name for site in report.missed]
    assert all(site.shape == (B, S, D) for site in (*report.fused, *report.missed))
