"""Which calls of an op are like one before, so that they skip what was checked and found out for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from dit_kernels import ops


def plan_all_by(monkeypatch: pytest.MonkeyPatch, plan: Callable[..., Any]) -> None:
    """There are no plans yet, every call can have one, and each will be this."""
    monkeypatch.setattr(ops, "_plans", {})
    monkeypatch.setattr(ops, "has_kernel", lambda call: True)
    monkeypatch.setattr(ops, "_make_plan", lambda op, call, args: plan)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    """Is there a plan for this call, after one with the arguments of the gated norm as they come from here?"""
    plan_all_by(monkeypatch, lambda args, tensors: True)

    def arguments(dtype: torch.dtype = torch.float32, tokens: int = 4, d: int = 8, **replaced: Any) -> tuple[Any, ...]:
        x, residual = (torch.ones(1, tokens, d, dtype=dtype) for _ in range(2))
        weight, gate = torch.ones(d, dtype=dtype), torch.ones(1, 1, d, dtype=dtype)
        given = {"x": x, "weight": weight, "bias": None, "gate": gate, "residual": residual, "eps": 1e-5, **replaced}
        return tuple(given.values())

    def after(first: dict[str, Any], second: dict[str, Any], **options: Any) -> bool:
        ops._plans.clear()
        ops._keep_plan("op", ops.OPS["norm_tanh_mul_add"], arguments(**first), {})
        return ops._planned("op", arguments(**second), options) is True

    return after


def test_a_plan_serves_calls_with_other_content_and_another_eps(planned: Callable[..., bool]) -> None:
    assert planned({}, {})
    assert planned({}, {"eps": 1e-2, "weight": torch.zeros(8)})


@pytest.mark.parametrize(
    "other",
    (
        {"tokens": 5},
        {"d": 16},
        {"dtype": torch.bfloat16},
        {"weight": None},
        {"gate": torch.ones(1, 4, 8)},
        {"weight": torch.nn.Parameter(torch.ones(8))},
        {"x": torch.ones(1, 8, 4).transpose(1, 2)},
        {"x": torch.ones(1, 4, 16)[..., ::2]},
        {"residual": torch.ones(1, 4, 8, dtype=torch.float64)},
        {"eps": torch.tensor(1e-5)},
        {"gate": torch.ones(8)},
        {"x": torch._neg_view(torch.ones(1, 4, 8))},
    ),
    ids=(
        *(
            "tokens",
            "width",
            "dtype",
            "absent",
            "gate of each token",
            "parameter",
            "strides of tokens",
            "strides of elements",
        ),
        *("dtype of one", "eps as a tensor", "rank", "negative view"),
    ),
)
def test_a_plan_serves_no_call_that_differs_in_metadata(planned: Callable[..., bool], other: dict[str, Any]) -> None:
    assert not planned({}, other)


def test_a_plan_serves_no_call_with_other_options(planned: Callable[..., bool]) -> None:
    assert not planned({}, {}, tanh=False)


def test_there_is_no_plan_for_a_tensor_that_comes_twice_and_it_is_not_tried_for_ever(
    planned: Callable[..., bool],
) -> None:
    x = torch.ones(1, 4, 8)
    assert not planned({"x": x, "residual": x}, {"x": x, "residual": x})
    assert not ops._plans


def test_no_plan_is_made_from_a_call_whose_pointers_are_not_aligned(planned: Callable[..., bool]) -> None:
    x = torch.ones(4 * 8 + 1)[1:].view(1, 4, 8)
    assert x.data_ptr() % ops.ALIGNMENT
    assert not planned({"x": x}, {})
    assert not ops._plans


def test_that_a_call_can_have_no_plan_is_found_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[str] = []
    monkeypatch.setattr(ops, "_plans", {})
    monkeypatch.setattr(ops, "has_kernel", lambda call: looked_at.append("call") or False)
    monkeypatch.setattr(ops, "_run_cuda", lambda call: call.definition())
    implementation = ops._cuda("silu_mul", ops.OPS["silu_mul"])
    for _ in range(3):
        implementation(torch.ones(1, 4, 8), torch.ones(1, 4, 8))
    assert len(looked_at) == 1


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("around", "served"),
    ((nullcontext, True), (torch.no_grad, True), (forward_ad.dual_level, False), (Passing, False)),
    ids=("nothing", "no gradients", "forward gradients", "a dispatch mode"),
)
def test_an_op_is_served_by_a_plan_where_nothing_else_is_to_see_the_call(
    around: Callable[[], AbstractContextManager[Any]], served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan that returns the first argument itself, which no op does."""
    op, a, b = torch.ops.dit_kernels.silu_mul, torch.ones(1, 4, 8), torch.zeros(1, 4, 8)
    plan_all_by(monkeypatch, lambda args, tensors: args[0])
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            ops._keep_plan("silu_mul", ops.OPS["silu_mul"], (a, b), {})
    with around():
        assert torch.equal(op(a, b), a) == served


def test_a_graph_that_is_traced_of_real_tensors_has_the_op_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.ones(1, 4, 8), torch.zeros(1, 4, 8)
    plan_all_by(monkeypatch, lambda args, tensors: args[0].clone())
    ops._keep_plan("silu_mul", ops.OPS["silu_mul"], (a, b), {})
    graph = make_fx(torch.ops.dit_kernels.silu_mul)(a, b).graph
    calls = [node.target for node in graph.nodes if node.op == "call_function"]
    assert calls == [torch.ops.dit_kernels.silu_mul.default]


def test_a_plan_for_a_parameter_serves_no_call_that_wants_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.nn.Parameter(torch.ones(1, 4, 8)), torch.ones(1, 4, 8)
    plan_all_by(monkeypatch, lambda args, tensors: b)
    with torch.no_grad():
        ops._keep_plan("silu_mul", ops.OPS["silu_mul"], (a, b), {})
        assert torch.equal(torch.ops.dit_kernels.silu_mul(a, b), b)
    assert torch.ops.dit_kernels.silu_mul(a, b).requires_grad


SIZES = {"weight": (8,), "weight2": (8,), "gate": (1, 1, 8), "scale": (1, 1, 8), "rotation": (4, 4)}
SIZES |= {"q": (1, 4, 2, 8), "k": (1, 4, 2, 8), "q_weight": (8,)}


@pytest.mark.parametrize("name", ops.OPS)
def test_a_plan_launches_its_kernel_on_the_tensors_and_on_fresh_results(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, with a kernel that only notes what it is given."""
    op, device = ops.OPS[name], -1
    launched: list[tuple[Any, ...]] = []
    compiler = SimpleNamespace(bound=lambda chain, *operands: (lambda *given: launched.append(given), (1, 4)))
    monkeypatch.setattr(ops, "_compiler", lambda: compiler)
    monkeypatch.setattr(ops, "_plans", {})
    monkeypatch.setattr(ops, "has_kernel", lambda call: True)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: device, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda of: 77, raising=False)
    guards = torch._C._dynamo.guards
    monkeypatch.setattr(guards, "_empty_strided_cuda", guards._empty_strided_cpu, raising=False)
    op = replace(op, family=replace(op.family, of_launch=lambda *given: given))

    def given() -> tuple[Any, ...]:
        dtypes = {"rotation": torch.complex64}
        return tuple(
            1e-5
            if "eps" in a
            else None
            if a in ("bias", "bias2", "k_weight", "sin")
            else torch.ones(SIZES.get(a, (1, 4, 8)), dtype=dtypes.get(a))
            for a in op.arguments
            if a not in op.family.results
        )

    ops._keep_plan(name, op, given(), {})
    args = given()
    results = ops._planned(name, args, {})
    expected = op.make_call(*args).empty_results()
    results = results if len(expected) > 1 else (results,)
    assert [(r.shape, r.stride(), r.dtype) for r in results] == [(e.shape, e.stride(), e.dtype) for e in expected]
    addresses = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in op.arranged((*args, *results))]
    assert launched == [(*addresses, 1, 4, device, 77, 1, 77)]


@pytest.mark.parametrize("name", ops.OPS)
def test_a_kernel_is_given_what_the_op_is_given_in_its_own_order(name: str) -> None:
    op = ops.OPS[name]
    results = [a for a in op.arguments if a in op.family.results]
    names = [a for a in op.arguments if a not in results]
    present = [a for a in names if a not in ("bias", "k_weight")]
    args = tuple(0.5 if "eps" in a else torch.ones(1) if a in present else None for a in names)
    arranged, floats_of = ops._arranged(op, args, len(results))
    tensors = [a for a in present if "eps" not in a]
    values = (*tensors, *results, *floats_of(tuple(names)), None, 0.0)
    expected = [a if a in present or a in results else 0.0 if "eps" in a else None for a in op.family.arguments]
    assert [*arranged(values)] == expected
