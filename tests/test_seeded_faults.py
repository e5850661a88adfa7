"""One small test for each fault that larger tests see late or not at all; its message names the place of the fault.

The launch numbers, the key of Inductor's caches, the checks of a proof, and which norm has which eps. Faults in device
code: tests/ptx/test_ptx_mistakes.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_modules import RopeModule, RopeSpec, rope_inputs
from graph_backend import run
from test_graph_pass import rewritten, tensors, traced
from test_lowering import compiled
from torch import Tensor
from torch._inductor.utils import fresh_cache

from dit_kernels.arguments import laid
from dit_kernels.direct import DirectCall
from dit_kernels.families import OPS
from fusion_pass import graph_pass, proof
from fusion_pass.graph_pass import FusionPass
from fusion_pass.refusal import Reason, Refused

ops = torch.ops.dit_kernels
DUAL, HEADS, SILU = "norm_tanh_mul_add_norm_scale", "qk_norm_rope", "silu_mul"
B, S, H, HK, D = 2, 3, 4, 2, 16
EPS, EPS2 = 1e-5, 0.5
bf16 = torch.bfloat16


# --- the launch numbers ---------------------------------------------------------------------------------------------


# In each operand's buffer a token has so many rows, of which the first is read: no two have a stride in common.
ROWS = {
    DUAL: dict(x=2, gate=3, residual=4, scale=5, shift=7),
    HEADS: dict(q=2, k=3, rotation=6, sin=7),
    SILU: dict(a=2, b=3),
}
WIDTHS = {"q": H * D, "k": HK * D}
# The strides of contiguous results, where a kernel is launched with them.
RESULTS = {
    DUAL: {},
    HEADS: dict(q_out=(S * H * D, H * D, D), k_out=(S * HK * D, HK * D, D)),
    SILU: dict(out=(S * D, D)),
}


def buffers(op: str) -> list[Tensor]:
    tokens = {"gate": 1}
    return [
        torch.zeros(B, tokens.get(name, S), rows * WIDTHS.get(name, D), dtype=bf16) for name, rows in ROWS[op].items()
    ]


def arguments(op: str, *buffers: Tensor) -> dict[str, Any]:
    """The arguments of an op, by name and in order: views of the buffers."""
    t = {name: b[..., : WIDTHS.get(name, D)] for name, b in zip(ROWS[op], buffers, strict=True)}
    if op == DUAL:
        first = dict(x=t["x"], weight=None, bias=None, gate=t["gate"], residual=t["residual"], eps=EPS)
        return {**first, "weight2": None, "bias2": None, "scale": t["scale"], "eps2": EPS, "shift": t["shift"]}
    if op == HEADS:
        q, k = (t[name].unflatten(-1, (-1, D)) for name in "qk")
        rotation, sin = t["rotation"], t["sin"]
        return dict(q=q, k=k, q_weight=None, k_weight=None, rotation=rotation, sin=sin, q_eps=EPS, k_eps=EPS)
    return t


def by_hand(op: str) -> dict[str, tuple[int, ...]]:
    """The numbers of a launch, of each operand those of a batch item, a token and a head."""
    strides: dict[str, tuple[int, ...]] = {}
    for name, rows in ROWS[op].items():
        by_token = rows * WIDTHS.get(name, D)
        strides[name] = (by_token, 0) if name == "gate" else (S * by_token, by_token)
        strides[name] += (D,) if name in WIDTHS else ()
    return {"B and S": (B, S), **strides, **RESULTS[op]}


def named(op: str, numbers: tuple[Any, ...]) -> dict[str, tuple[int, ...]]:
    """The numbers of a launch, by what they belong to."""
    found, rest = {"B and S": tuple(numbers[:2])}, list(numbers[2:])
    for argument in OPS[op].family.arguments:
        if argument.numbers:
            found[argument.name] = tuple(rest[: argument.numbers])
            rest = rest[argument.numbers :]
    assert not rest
    return found


@pytest.mark.parametrize("op", ROWS)
def test_a_kernel_is_launched_with_b_and_s_and_the_strides_of_each_operand_from_the_outermost(op: str) -> None:
    """Layout.launch_numbers and Family.launch_numbers."""
    given, family = arguments(op, *buffers(op)), OPS[op].family
    first = next(iter(given.values()))
    results = getattr(ops, op)(*given.values())
    written = zip(OPS[op].results, results if isinstance(results, tuple) else (results,), strict=True)
    given |= {argument.name: t for argument, t in written}
    layouts = {n: laid(family.named[n], t, first.shape)[0] for n, t in given.items() if isinstance(t, Tensor)}
    assert named(op, family.launch_numbers(layouts)) == by_hand(op)


@pytest.mark.parametrize(("op", "dynamic"), ((DUAL, True), (HEADS, False), (HEADS, True), (SILU, False)))
def test_compiled_code_launches_with_the_same_numbers(op: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """fusion_pass/lowering.py."""
    seen = []

    def note(call: DirectCall, addresses: tuple[Any, ...], numbers: tuple[int, ...]) -> bool:
        seen.append(named(op, numbers))
        return False  # the checked call computes

    def call(*buffers: Tensor) -> Any:
        return getattr(ops, op)(*arguments(op, *buffers).values())

    monkeypatch.setattr(DirectCall, "__call__", note)
    given = buffers(op)
    for t in given:
        torch._dynamo.mark_static(t, 2)
    with fresh_cache(), torch.no_grad():
        compiled(call, *given, dynamic=dynamic)
    assert seen == [by_hand(op)]


# --- the key of Inductor's caches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ("_fingerprint", "_registered", "options"))
def test_each_part_of_the_uuid_makes_another_uuid(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """_fingerprint: the sources and versions; _registered: the kinds; options: those of the pass."""
    before = FusionPass().uuid()
    monkeypatch.setattr(FusionPass if part == "options" else graph_pass, part, lambda *_: "another")
    assert FusionPass().uuid() != before, f"FusionPass.uuid() does not depend on {part}()"


# --- the proof ------------------------------------------------------------------------------------------------------


def normed(x: Tensor, eps: float = EPS) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def gated(x: Tensor, residual: Tensor, gate: Tensor) -> Tensor:
    return residual + gate.tanh() * normed(x)


@pytest.mark.parametrize("check", sorted(name for name in vars(proof) if name.startswith("_prove_")))
def test_each_check_of_the_proof_is_made_for_a_site(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(site: Any, *_: Any) -> None:
        raise Refused(Reason.ERROR, site.anchor)

    monkeypatch.setattr(proof, check, refuse)
    report = rewritten(traced(gated, *tensors(3)))
    assert not report.fused, f"proof.prove() fuses a site without {check}()"


def read_from_outside(x: Tensor, residual: Tensor, gate: Tensor) -> Any:
    mean = x.pow(2).mean(-1, keepdim=True)
    return residual + gate.tanh() * (x * torch.rsqrt(mean + EPS)), mean


def waiting_for_itself(x: Tensor, residual: Tensor, gate: Tensor) -> Any:
    """The scale of the second norm is computed from the first line's result, so that the dual cannot be one node."""
    y = gated(x, residual, gate)
    return y, normed(y) * (1 + y.sin().cos())


def changed_in_between(x: Tensor, residual: Tensor, gate: Tensor) -> Any:
    n = normed(x)
    residual.copy_(gate)
    return residual + gate.tanh() * n


def seen_by_strides(x: Tensor, residual: Tensor, gate: Tensor) -> Any:
    y = gated(*(t.transpose(0, 1) for t in (x, residual, gate)))
    return (y * 2).as_strided((3, 2), (1, 5))


def of_one_dimension(x: Tensor, residual: Tensor, gate: Tensor) -> Any:
    return gated(x[0, 0], residual[0, 0], gate[0, 0])


@pytest.mark.parametrize(
    ("check", "model", "reason"),
    (
        ("_prove_closed", read_from_outside, "ESCAPES"),
        ("_prove_order", waiting_for_itself, "ORDER"),
        ("_prove_undisturbed", changed_in_between, "MUTATION"),
        ("_prove_layout", seen_by_strides, "LAYOUT"),
        ("_prove_shapes", of_one_dimension, "SHAPE"),
    ),
)
def test_each_check_of_the_proof_refuses_what_only_it_sees(
    check: str, model: Callable[..., Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Refused, "__init__", _noting(refusals := []))
    rewritten(traced(model, *tensors(3)))
    assert reason in refusals, f"proof.{check}() does not refuse {model.__name__}"


def _noting(refusals: list[str]) -> Callable[..., None]:
    original = Refused.__init__

    def init(self: Refused, reason: Reason, *others: Any, **options: Any) -> None:
        refusals.append(reason.name)
        original(self, reason, *others, **options)

    return init


# --- which norm has which eps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("eps", "eps2"), ((EPS, EPS2), (EPS2, EPS)))
def test_a_site_of_two_norms_gives_each_norm_its_own_eps(eps: float, eps2: float) -> None:
    """kinds/modulated_norm._site."""

    def model(x: Tensor, residual: Tensor, gate: Tensor) -> Any:
        y = residual + gate.tanh() * normed(x, eps)
        return y, normed(y, eps2) * (1 + gate)

    graph = traced(model, *tensors(3))
    rewritten(graph)
    (call,) = graph.find_nodes(op="call_function", target=getattr(ops, DUAL).default)
    names = list(OPS[DUAL].roles)
    found = {name: call.args[names.index(name)] for name in ("eps", "eps2")}
    assert found == {"eps": eps, "eps2": eps2}


class TwoEps(RopeModule):
    def rotated(self, x: Tensor, weight: Tensor | None, *tables: Tensor) -> Tensor:
        self.eps = EPS if weight is self.q_weight else EPS2
        return super().rotated(x, weight, *tables)


def test_a_site_of_q_and_k_gives_each_its_own_eps() -> None:
    """kinds/norm_rope.site_of."""
    spec = RopeSpec()
    _, backend = run(TwoEps(spec), *rope_inputs(spec))
    (graph,) = backend.graphs
    (call,) = graph.graph.find_nodes(op="call_function", target=ops.qk_norm_rope.default)
    names = list(OPS[HEADS].roles)
    found = {name: call.args[names.index(name)] for name in ("q_eps", "k_eps")}
    assert found == {"q_eps": EPS, "k_eps": EPS2}


@pytest.mark.parametrize(("eps", "eps2"), ((EPS, EPS2), (EPS2, EPS)))
def test_the_definition_of_two_norms_gives_each_norm_its_own_eps(eps: float, eps2: float) -> None:
    """ModulatedNorm.definition, by the definitions of its two lines and by hand."""
    x, residual, gate = tensors(3)
    y, z = getattr(ops, DUAL)(x, None, None, gate, residual, eps, None, None, gate, eps2)
    torch.testing.assert_close(y, residual + gate.tanh() * normed(x, eps), msg=lambda m: f"y, by eps: {m}")
    torch.testing.assert_close(z, normed(y, eps2) * (1 + gate), msg=lambda m: f"z, by eps2: {m}")


@pytest.mark.parametrize(("eps", "eps2"), ((EPS, EPS2), (EPS2, EPS)))
def test_the_definition_of_q_and_k_gives_each_its_own_eps(eps: float, eps2: float) -> None:
    """NormRope.definition."""
    torch.manual_seed(0)
    q, k = torch.randn(B, S, H, D), torch.randn(B, S, HK, D)
    cos, sin = torch.ones(S, D), torch.zeros(S, D)
    q_out, k_out = ops.qk_norm_rope(q, k, None, None, cos, sin, eps, eps2)
    torch.testing.assert_close(q_out, normed(q, eps), msg=lambda m: f"q, by q_eps: {m}")
    torch.testing.assert_close(k_out, normed(k, eps2), msg=lambda m: f"k, by k_eps: {m}")
