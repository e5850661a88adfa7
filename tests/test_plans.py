"""Calls like one before run by a plan, which skips what was checked and chosen for the first of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from dit_kernels import ops, plans
from dit_kernels.arguments import COLUMN, EPS, HEADS, HEADS_BEFORE, JOINED_TABLE, MATRIX, MODULATION, SCALAR, TABLE
from dit_kernels.families import OPS
from dit_kernels.families.family import Family, Op
from dit_kernels.plans import ALIGNMENT, Plans, can_be_planned

GATED = OPS["norm_tanh_mul_add"]


def arguments(dtype: torch.dtype = torch.float32, tokens: int = 4, d: int = 8, **replaced: Any) -> tuple[Any, ...]:
    x, residual = (torch.ones(1, tokens, d, dtype=dtype) for _ in range(2))
    weight, gate = torch.ones(d, dtype=dtype), torch.ones(1, 1, d, dtype=dtype)
    given = {"x": x, "weight": weight, "bias": None, "gate": gate, "residual": residual, "eps": 1e-5, **replaced}
    return tuple(given.values())


def is_planned(first: dict[str, Any], second: dict[str, Any], **options: Any) -> bool:
    """Is there a plan for the second call, after one was kept for the first?"""
    kept, args = Plans(GATED), arguments(**first)
    if can_be_planned(args):
        kept.keep(args, {}, lambda args, tensors: True)
    return kept.run(arguments(**second), options) is True


def test_a_plan_serves_calls_with_other_content_and_another_eps() -> None:
    assert is_planned({}, {})
    assert is_planned({}, {"eps": 1e-2, "weight": torch.zeros(8)})


OTHER = {
    "tokens": {"tokens": 5},
    "width": {"d": 16},
    "dtype": {"dtype": torch.bfloat16},
    "absent": {"weight": None},
    "gate of each token": {"gate": torch.ones(1, 4, 8)},
    "parameter": {"weight": torch.nn.Parameter(torch.ones(8))},
    "strides of tokens": {"x": torch.ones(1, 8, 4).transpose(1, 2)},
    "strides of elements": {"x": torch.ones(1, 4, 16)[..., ::2]},
    "dtype of one": {"residual": torch.ones(1, 4, 8, dtype=torch.float64)},
    "eps as a tensor": {"eps": torch.tensor(1e-5)},
    "rank": {"gate": torch.ones(8)},
    "negative view": {"x": torch._neg_view(torch.ones(1, 4, 8))},
}


@pytest.mark.parametrize("other", OTHER)
def test_a_plan_serves_no_call_that_differs_in_metadata(other: str) -> None:
    assert not is_planned({}, OTHER[other])


def test_a_plan_serves_no_call_with_other_options() -> None:
    assert not is_planned({}, {}, tanh=False)


def test_there_is_no_plan_for_a_tensor_that_comes_twice() -> None:
    x = torch.ones(1, 4, 8)
    assert not can_be_planned(arguments(x=x, residual=x))


def test_there_is_no_plan_for_a_call_whose_pointers_are_not_aligned() -> None:
    x = torch.ones(4 * 8 + 1)[1:].view(1, 4, 8)
    assert x.data_ptr() % ALIGNMENT
    assert not can_be_planned(arguments(x=x))


def test_there_is_no_plan_for_a_functional_tensor() -> None:
    assert not can_be_planned(arguments(x=torch._to_functional_tensor(torch.ones(1, 4, 8))))


# --- the ops, with kernels that only note how they are launched -------------------------------------------------------


class Compiler:
    """`dit_kernels.compile`, with a kernel that does nothing."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []

    def run(self, family: Family, chain: Any, operands: Any) -> tuple[Callable[..., None], tuple[int, ...]]:
        numbers = family.launch_numbers(operands.values)
        self.launched.append((*operands.addresses(), *numbers))
        return lambda *given: self.launched.append(given), numbers


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """CPU tensors are taken for those of a GPU."""
    compiler, guards = Compiler(), torch._C._dynamo.guards
    monkeypatch.setattr(ops, "_compiler", lambda: compiler)
    monkeypatch.setattr(ops, "has_kernel", lambda call: True)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda of: 77, raising=False)
    monkeypatch.setattr(guards, "_empty_strided_cuda", guards._empty_strided_cpu, raising=False)
    for family in {base for op in OPS.values() for base in type(op.family).__mro__}:
        if "of_launch" in vars(family):
            monkeypatch.setattr(family, "of_launch", lambda *given: given[1:])
    return compiler


def given_to(op: Op, tokens: int = 4) -> tuple[Any, ...]:
    """Arguments of an op, without biases, a second weight of heads or sines."""
    heads = (1, tokens, 2, 8)
    shapes = {COLUMN: (8,), MODULATION: (1, 1, 8), HEADS: heads, HEADS_BEFORE: heads, SCALAR: ()}
    shapes |= {TABLE: (tokens, 4), JOINED_TABLE: (2 * tokens, 4), MATRIX: (8, 8)}
    is_complex = "rotation" in op.arguments
    absent = ("bias", "bias2", "bias_up", "k_weight", "k_before_weight", *(("sin",) if is_complex else ()))
    return tuple(
        1e-5
        if argument.role is EPS
        else None
        if argument.name in absent
        else torch.ones(
            shapes.get(argument.role, (1, tokens, 8)), dtype=torch.complex64 if argument.name == "rotation" else None
        )
        for argument in op.inputs
    )


@pytest.mark.parametrize("name", OPS)
def test_a_plan_launches_its_kernel_on_the_tensors_and_on_fresh_results(name: str, compiler: Compiler) -> None:
    op, implementation = OPS[name], ops._on_cuda(OPS[name])
    implementation(*given_to(op))
    args = given_to(op)
    results = implementation(*args)
    expected = op.call(*args).empty_results()
    results = results if len(expected) > 1 else (results,)
    assert [(r.shape, r.stride(), r.dtype) for r in results] == [(e.shape, e.stride(), e.dtype) for e in expected]
    addresses = [a.data_ptr() if isinstance(a, Tensor) else a for a in op.arranged((*args, *results))]
    checked, planned = compiler.launched
    numbers = checked[len(op.family.arguments) :]
    assert planned == (*addresses, *numbers, -1, 77, 1, 77)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("level", ("CUDA", "autograd"))
def test_the_first_call_is_checked_once_allocates_once_and_makes_one_plan(
    name: str, level: str, compiler: Compiler
) -> None:
    op = OPS[name]
    with (
        mock.patch.object(Op, "call", autospec=True, side_effect=Op.call) as checks,
        mock.patch.object(plans.Plans, "keep", autospec=True, side_effect=Plans.keep) as kept,
        mock.patch.object(ops, "make_launch", side_effect=ops.make_launch) as made,
    ):
        run = ops._on_cuda(op) if level == "CUDA" else _autograd_on_gpu(op)
        run(*given_to(op))
        counts = checks.call_count, kept.call_count, made.call_count, len(compiler.launched)
        assert counts == (1, 1, 1, 1)
        run(*given_to(op))
        assert checks.call_count == kept.call_count == made.call_count == 1
        assert len(compiler.launched) == 2


def _autograd_on_gpu(op: Op) -> Callable[..., Any]:
    """What the dispatcher calls for autograd, where CPU tensors are taken for those of a GPU."""

    def unexpected(*_: Any, **__: Any) -> Any:
        raise AssertionError("the call goes on through the dispatcher")

    implementation = ops._autograd(op, unexpected, unexpected)

    def run(*args: Any) -> Any:
        with mock.patch.object(ops, "_is_on_gpu", return_value=True):
            return implementation(*args)

    return run


def test_twenty_shapes_in_turn_are_checked_once_each(compiler: Compiler) -> None:
    op, run = OPS["silu_mul"], ops._on_cuda(OPS["silu_mul"])
    with mock.patch.object(Op, "call", autospec=True, side_effect=Op.call) as checks:
        for _ in range(3):
            for tokens in range(1, 21):
                run(*given_to(op, tokens))
    assert checks.call_count == 20
    assert len(compiler.launched) == 60


def test_an_op_keeps_the_latest_plans_only() -> None:
    kept, last = Plans(OPS["silu_mul"]), 3 * plans.MOST_PLANS
    for tokens in range(1, last + 1):
        kept.keep(given_to(kept.op, tokens), {}, plans.no_launch)
    assert sum(len(found) for _, found in kept.kept.values()) == plans.MOST_PLANS
    assert kept.knows(given_to(kept.op, last), {}) and not kept.knows(given_to(kept.op, 1), {})


def test_that_a_call_can_have_no_plan_is_found_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "has_kernel", lambda call: False)
    run = ops._on_cuda(OPS["silu_mul"])
    with mock.patch.object(Plans, "keep", autospec=True, side_effect=Plans.keep) as kept:
        for _ in range(3):
            run(torch.ones(1, 4, 8), torch.ones(1, 4, 8))
    assert kept.call_count == 1


# --- who must see a call ----------------------------------------------------------------------------------------------


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.fixture
def planned_silu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """silu_mul, with a plan for every call, which returns the first argument itself: no op does that."""
    monkeypatch.setattr(Plans, "run", lambda plans, args, options: args[0])
    op: Callable[..., Tensor] = torch.ops.dit_kernels.silu_mul
    return op


@pytest.mark.parametrize(
    ("around", "served"),
    ((nullcontext, True), (torch.no_grad, True), (forward_ad.dual_level, False), (Passing, False)),
    ids=("nothing", "no gradients", "forward gradients", "a dispatch mode"),
)
def test_a_plan_serves_an_op_where_nothing_else_must_see_the_call(
    around: Callable[[], AbstractContextManager[Any]], served: bool, planned_silu: Callable[..., Tensor]
) -> None:
    a, b = torch.ones(1, 4, 8), torch.zeros(1, 4, 8)
    with around():
        assert torch.equal(planned_silu(a, b), a) == served


def test_a_graph_that_is_traced_of_real_tensors_has_the_op_in_it(planned_silu: Callable[..., Tensor]) -> None:
    graph = make_fx(planned_silu)(torch.ones(1, 4, 8), torch.zeros(1, 4, 8)).graph
    calls = [node.target for node in graph.nodes if node.op == "call_function"]
    assert calls == [torch.ops.dit_kernels.silu_mul.default]


def test_a_plan_for_a_parameter_serves_no_call_that_wants_its_gradient() -> None:
    a, b = torch.nn.Parameter(torch.ones(1, 4, 8)), torch.ones(1, 4, 8)
    kept = Plans(OPS["silu_mul"])
    with torch.no_grad():
        kept.keep((a, b), {}, lambda args, tensors: b)
        assert kept.run((a, b), {}) is b
    assert kept.run((a, b), {}) is None


# --- the order of arguments -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPS)
def test_a_kernel_is_given_what_the_op_is_given_in_its_own_order(name: str) -> None:
    op = OPS[name]
    names = [argument.name for argument in op.inputs]
    args = given_to(op)
    arranged, floats_of = plans.arranging(op, args)
    present = {name for name, arg in zip(names, args, strict=True) if arg is not None}
    tensors = [a.name for a in op.inputs if a.name in present and a.is_tensor]
    results = [a.name for a in op.results]
    values = (*tensors, *results, *floats_of(tuple(names)), None, 0.0)
    expected = [
        a.name if a.name in present or a.name in results else None if a.is_tensor else 0.0 for a in op.family.arguments
    ]
    assert [*arranged(values)] == expected


def test_an_op_can_be_called_by_names_of_its_own() -> None:
    op = replace(OPS["norm_rope"], called={**OPS["norm_rope"].called, "rotation": "freqs"})
    assert list(op.roles) == ["x", "weight", "freqs", "sin", "eps"]
