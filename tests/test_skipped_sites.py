"""The pass skips a site whose gate or scale would cost more memory traffic than it saves, or that no kernel takes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graph_backend import run
from graph_checks import FP32, SINGLE, Model, assert_equal, tensors
from site_modules import EPS, diffusers_norm
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_pass import eligibility
from fusion_pass.graph_pass import FusionPass
from fusion_pass.report import FusionReport

# --- gates and scales of each token -----------------------------------------------------------------------------------


def picked_by_token(a: Tensor, b: Tensor) -> Tensor:
    """As in the blocks of Z-Image with two kinds of tokens."""
    mask = torch.arange(6)[:, None] < 4
    return torch.where(mask, a.tanh().expand(2, 6, 32), b.tanh().expand(2, 6, 32))


def picked_and_viewed(a: Tensor, b: Tensor) -> Tensor:
    return picked_by_token(a, b).view(2, 6, 2, 16).view(2, 6, 32)


def projected(a: Tensor, b: Tensor) -> Tensor:
    return picked_by_token(a, b) @ torch.eye(32, dtype=a.dtype)


def one_for_all_tokens(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a > b, a.tanh(), b.tanh())


def a_part_of_more(a: Tensor, b: Tensor) -> Tensor:
    return (torch.cat((picked_by_token(a, b),) * 2, -1) * 2).chunk(2, dim=-1)[0]


def one_of_a_table(a: Tensor, b: Tensor) -> Tensor:
    """As in LTX and Wan 2.2: a table of all modulations plus those of each token."""
    return (torch.ones(1, 1, 2, 1, dtype=a.dtype) + projected(a, b).unsqueeze(2)).unbind(2)[1]


def a_part_of_a_projection(a: Tensor, b: Tensor) -> Tensor:
    return (picked_by_token(a, b) @ torch.eye(32, 64, dtype=a.dtype))[..., :32]


@pytest.mark.parametrize(
    ("where", "gate_of", "fused"),
    (
        ("gate", picked_by_token, False),
        ("scale", picked_by_token, False),
        ("gate", picked_and_viewed, False),
        ("scale", a_part_of_more, False),
        ("gate", one_of_a_table, False),
        ("gate", projected, True),
        ("scale", projected, True),
        ("scale", a_part_of_a_projection, True),
        ("gate", one_for_all_tokens, True),
        ("scale", one_for_all_tokens, True),
    ),
)
def test_a_gate_for_each_token_is_fused_only_if_inductor_stores_it_anyway(
    gate_of: Model, fused: bool, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eligibility, "kernels_missing", lambda device: None)

    def model(x, residual, a, b):
        if where == "gate":
            return residual + gate_of(a, b) * diffusers_norm(x, None)
        return diffusers_norm(x, None) * gate_of(a, b)

    args = tensors((2, 6, 32), (2, 6, 32), (2, 1, 32), (2, 1, 32))
    got, backend = run(model, *args, kernels="auto")
    assert_equal(got, model(*args))
    assert bool(backend.report.fused) == fused
    assert [site.reason_name for site in backend.report.missed] == ([] if fused else ["PER_TOKEN"])


@pytest.mark.parametrize("batch", (1, 2))
def test_a_gate_for_each_token_is_recognised_if_tokens_are_the_first_dimension(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eligibility, "kernels_missing", lambda device: None)

    def model(x, residual, a):
        return residual + (a * 2) * diffusers_norm(x, None)

    args = tensors(*((6, batch, 32) for _ in range(3)))
    got, backend = run(model, *args, kernels="auto")
    assert_equal(got, model(*args))
    assert [site.reason_name for site in backend.report.missed] == ["PER_TOKEN"]


def test_a_shift_as_large_as_x_is_not_read_as_a_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eligibility, "kernels_missing", lambda device: None)

    def model(x, shift, scale):
        return shift.expand(x.shape).contiguous() + scale * diffusers_norm(x, None)

    args = tensors((2, 6, 32), (2, 1, 32), (2, 1, 32))
    got, backend = run(model, *args, kernels="auto")
    assert_equal(got, model(*args))
    assert [site.reason_name for site in backend.report.missed] == ["PER_TOKEN"]


# --- operands that no kernel takes ------------------------------------------------------------------------------------


class Subclass(Tensor):
    pass


def a_subclass(val: Tensor) -> Tensor:
    return val.as_subclass(Subclass)


def sparse(val: Tensor) -> Tensor:
    return val.to_sparse()


def quantised(val: Tensor) -> Tensor:
    return torch.quantize_per_tensor(torch.ones(val.shape), 0.1, 0, torch.qint8)


def of_integers(val: Tensor) -> Tensor:
    return val.int()


def of_complex_numbers(val: Tensor) -> Tensor:
    return val.to(torch.complex64)


def elsewhere(val: Tensor) -> Tensor:
    return val.to("meta")


@pytest.mark.parametrize("operand", ("x", "residual", "gate", "weight"))
@pytest.mark.parametrize(
    ("kind", "reason"),
    (
        (a_subclass, "DTYPE"),
        (sparse, "DTYPE"),
        (quantised, "DTYPE"),
        (of_integers, "DTYPE"),
        (of_complex_numbers, "DTYPE"),
        (elsewhere, "DEVICE"),
    ),
)
def test_a_site_with_an_operand_that_no_kernel_takes_is_not_fused(
    operand: str, kind: Callable[[Tensor], Tensor], reason
) -> None:
    """No model traces to a graph with such an operand, so the test puts one into the metadata of a node."""

    def model(x, residual, gate, weight):
        return residual + gate.tanh() * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight)

    args = tensors((2, 4, 16), (2, 4, 16), (2, 1, 16), (16,), dtype=FP32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        graph = make_fx(model, tracing_mode="fake")(*args).graph
    node = graph.find_nodes(op="placeholder")[("x", "residual", "gate", "weight").index(operand)]
    shape = node.meta["val"].shape
    node.meta["val"] = kind(torch.ones(shape))
    report = FusionReport()
    before = str(graph)
    FusionPass(kernels="reference", collector=report)(graph)
    assert report.fused == []
    assert str(graph) == before
    (site,) = report.missed
    accepted = {reason, "ROUNDING"} if operand == "x" else {reason}
    assert site.reason_name in accepted


def test_a_wrapper_subclass_is_fused_as_the_tensors_that_it_wraps() -> None:
    """AOTAutograd unwraps it before the pass sees the graph."""
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor

    def model(x, residual, gate):
        return residual + gate.tanh() * diffusers_norm(x, None)

    x, residual, gate = tensors((2, 4, 16), (2, 4, 16), (2, 1, 16))
    wrapped = two_tensor(x, residual)
    got, backend = run(model, wrapped, residual, gate)
    expected = model(wrapped, residual, gate)
    assert torch.equal(got.a, expected.a) and torch.equal(got.b, expected.b)
    assert backend.report.counts() == {SINGLE: 2}
