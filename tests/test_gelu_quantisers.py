"""GELU and joined rows in front of quantisers to FP8: what is matched, bit-equality to eager, what must not match."""

from __future__ import annotations

from typing import Any

import pytest
import quantized
import torch
import torch.nn.functional as F
from graph_backend import GraphBackend, needs_casts, run
from graph_checks import BF16, FP32, options_of, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized import FP8
from test_equal_quantisers import casts
from test_models import compiled, flux1, flux2
from test_models import run as run_model
from test_quantisers import DEFAULTS, STEPS, Model, assert_equal
from torch import Tensor
from torch._inductor.utils import fresh_cache, run_and_get_code

import fusion_pass
from dit_kernels import ops
from dit_kernels.families import family
from dit_kernels.plans import can_be_planned
from fusion_pass import eligibility
from fusion_pass.dataflow import aten

GELU, SILU = "gelu_quant", "silu_mul_quant"
TANH = torch.ops.dit_kernels.gelu_quant.default


def gelu_tanh(quantise: Model) -> Model:
    return lambda a, b, before: quantise(F.gelu(a, approximate="tanh"))


def gelu_erf(quantise: Model) -> Model:
    return lambda a, b, before: quantise(F.gelu(a))


def joined_gelu(quantise: Model) -> Model:
    return lambda a, b, before: quantise(torch.cat([before, F.gelu(a, approximate="tanh")], dim=2))


def joined_silu(quantise: Model) -> Model:
    return lambda a, b, before: quantise(torch.cat((before, F.silu(a) * b), -1))


SITES = {gelu_tanh: GELU, gelu_erf: GELU, joined_gelu: GELU, joined_silu: SILU}


def arguments(dtype: torch.dtype = BF16, batch: int = 2, tokens: int = 5, width: int = 32, more: int = 16) -> Any:
    rows = (batch, tokens, width)
    a, b, before = tensors(rows, rows, (*rows[:-1], more), dtype=dtype)
    return a * 3, b, before


# --- what is matched --------------------------------------------------------------------------------------------------


@needs_casts
@pytest.mark.parametrize("site", SITES, ids=lambda site: site.__name__)
def test_the_quantisers_of_several_layers_become_one_op(site: Model) -> None:
    model, args = site(lambda z: [quantized.torchao(z) for _ in range(3)]), arguments()
    got, backend = run(model, *args, strict=True)
    assert_equal(got, model(*args))
    assert backend.report.counts() == {SITES[site]: 1} and backend.report.missed == []
    options = options_of(backend)
    assert options.get("approximate", "tanh") == ("none" if site is gelu_erf else "tanh")
    assert options["out_dtype"] == options["s_dtype"] == BF16
    assert backend.count(aten.cat.default) == backend.count(torch.ops.prims.convert_element_type.default) == 0


@needs_casts
@pytest.mark.parametrize("form", STEPS, ids=lambda form: form.__name__)
@settings(max_examples=3)
@given(
    site=st.sampled_from(list(SITES)),
    dtype=st.sampled_from((BF16, torch.float16, FP32)),
    sizes=st.tuples(st.integers(2, 3), st.integers(2, 5), st.sampled_from((16, 17)), st.sampled_from((1, 16, 33))),
    dynamic=st.sampled_from((False, False, True)),
)
def test_q_and_s_are_bit_equal_to_eager(
    form: quantized.Quantise, site: Model, dtype: torch.dtype, sizes: tuple[int, ...], dynamic: bool
) -> None:
    model, args = site(form), arguments(dtype, *sizes)
    got, backend = run(model, *args, dynamic=dynamic)
    assert_equal(got, model(*args))
    assert backend.report.counts() == {SITES[site]: 1}
    options = options_of(backend)
    assert options.keys() >= DEFAULTS.keys()


def test_the_dtype_of_the_result_is_read_off_the_graph() -> None:
    a, _, before = arguments()

    def wide(a: Tensor, before: Tensor) -> Any:
        return quantized.torchao(F.gelu(a.float())), quantized.torchao(
            torch.cat((before, F.gelu(a.float()).half()), -1)
        )

    got, backend = run(wide, a, before.half(), strict=True)
    assert_equal(got, wide(a, before.half()))
    calls = [node for gm in backend.graphs for node in gm.graph.nodes if node.target is TANH]
    assert sorted(str(call.kwargs["out_dtype"]) for call in calls) == ["torch.float16", "torch.float32"]


def test_under_the_policy_fp32_the_same_ops_are_fused() -> None:
    for site in (gelu_tanh, joined_silu):
        _, backend = run(site(quantized.torchao), *arguments(), rounding="fp32")
        assert backend.report.counts() == {SITES[site]: 1}
        assert options_of(backend)["rounding"] == "fp32"


# --- what must not match ----------------------------------------------------------------------------------------------


def gelu(a: Tensor) -> Tensor:
    return F.gelu(a, approximate="tanh")


def by_hand(a: Tensor) -> Tensor:
    return 0.5 * a * (1.0 + torch.tanh(0.7978845608028654 * (a + 0.044715 * (a * a * a))))


q = quantized.torchao


def another_reader(a: Tensor, before: Tensor) -> Any:
    z = gelu(a)
    return q(z), z * 2


def another_reader_of_a_joined_value(a: Tensor, before: Tensor) -> Any:
    z = gelu(a)
    return q(torch.cat((before, z), 2)), z @ z.mT


def along_the_tokens(a: Tensor, before: Tensor) -> Any:
    return q(torch.cat((before, gelu(a)), 1))


def three_parts(a: Tensor, before: Tensor) -> Any:
    return q(torch.cat((before, before, gelu(a)), 2))


def first_in_the_row(a: Tensor, before: Tensor) -> Any:
    return q(torch.cat((gelu(a), before), 2))


def the_row_is_read_elsewhere(a: Tensor, before: Tensor) -> Any:
    row = torch.cat((before, gelu(a)), 2)
    return q(row), row @ row.mT


def the_scale_is_read_elsewhere(a: Tensor, before: Tensor) -> Any:
    rows, s = q(torch.cat((before, gelu(a)), 2))
    return rows, s, (s * 2).sin()


def of_two_dtypes(a: Tensor, before: Tensor) -> Any:
    return q(torch.cat((before.float(), gelu(a)), 2))


def one_scale(a: Tensor, before: Tensor) -> Any:
    row = torch.cat((before, gelu(a)), 2)
    s = (row.abs().amax() / 448.0).float()
    return (row.float() / s).to(FP8), s


def two_ways(a: Tensor, before: Tensor) -> Any:
    row = torch.cat((before, gelu(a)), 2)
    return q(row), quantized.by_hand(row)


def written_by_hand(a: Tensor, before: Tensor) -> Any:
    return q(by_hand(a.float()))


def written_by_hand_in_bf16(a: Tensor, before: Tensor) -> Any:
    return q(by_hand(a))


REFUSED: dict[Model, str] = {
    another_reader: "something else reads the value",
    another_reader_of_a_joined_value: "something else reads the value",
    along_the_tokens: "along another dimension",
    three_parts: "not one other tensor and then the value",
    first_in_the_row: "not one other tensor and then the value",
    the_row_is_read_elsewhere: "something else reads the concatenated row",
    the_scale_is_read_elsewhere: "something other than the matmul reads the scale",
    one_scale: "one scale for each row",
    two_ways: "quantise it in different ways",
    written_by_hand: "a GELU that is not F.gelu",
    written_by_hand_in_bf16: "a GELU that is not F.gelu",
    of_two_dtypes: "the concatenated tensors have different dtypes",
}


@needs_casts
def test_a_gelu_that_is_read_beside_its_quantiser_is_stored_too() -> None:
    def model(a: Tensor) -> Any:
        z = gelu(a)
        return q(z), z @ z.mT

    a, *_ = arguments(width=16)
    got, backend = run(model, a, strict=True)
    assert_equal(got, model(a))
    assert backend.count(torch.ops.dit_kernels.gelu_quant.keep_z) == 1


@needs_casts
@pytest.mark.parametrize("model", REFUSED, ids=lambda model: model.__name__)
def test_other_rows_and_quantisers_are_left_alone_and_reported(model: Model) -> None:
    a, _, before = arguments(width=16)
    got, backend = run(model, a, before, strict=True)  # by design: no error
    assert_equal(got, run(model, a, before, fuse=False)[0])
    assert backend.report.fused == []
    ((kind, name, reason),) = [(site.kind, site.reason_name, site.reason) for site in backend.report.missed]
    assert (kind, name) == (GELU, "QUANTISER") and REFUSED[model] in reason, reason


UNSEEN: dict[str, Model] = {
    "read by a matmul": lambda a, before: gelu(a) @ before.mT,
    "joined": lambda a, before: torch.cat((before, gelu(a)), 2) @ torch.ones(2 * 16, 4, dtype=a.dtype),
    "erf": lambda a, before: F.gelu(a) @ before.mT,
    "by hand": lambda a, before: by_hand(a.float()) @ before.float().mT,
    "only a tanh": lambda a, before: q(torch.tanh(a)),
    "another constant": lambda a, before: q(0.5 * a.float() * (1 + torch.erf(a.float() * 0.7))),
    "another half": lambda a, before: q(0.5 * before.float() * (1 + torch.erf(a.float() * 0.7071067811865476))),
    "another sum": lambda a, before: q(0.5 * a.float() * (2 + torch.erf(a.float() * 0.7071067811865476))),
    "joined with itself": lambda a, before: q(torch.cat(2 * [gelu(a)], 2)),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_a_gelu_that_no_quantiser_follows_and_what_is_no_gelu_has_no_row(name: str) -> None:
    a, _, before = arguments(width=16)
    got, backend = run(UNSEEN[name], a, before, strict=True)
    assert_equal(got, UNSEEN[name](a, before))
    assert backend.report.fused == backend.report.missed == []


def test_a_silu_that_is_joined_in_another_way_is_left_alone_and_reported() -> None:
    a, b, before = arguments()
    _, backend = run(lambda: q(torch.cat((F.silu(a) * b, before), 2)), strict=True)
    assert [(site.kind, site.reason_name) for site in backend.report.missed] == [(SILU, "QUANTISER")]


# --- where kernels run ------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls whose kernels would be compiled, on a GPU that is said to quantise."""
    calls: list[Any] = []
    monkeypatch.setattr(eligibility, "kernels_missing", lambda device: None)
    monkeypatch.setattr(eligibility, "prepare", calls.append)
    monkeypatch.setattr(family, "quantises_on", lambda t: True)
    return calls


@pytest.mark.parametrize("site", SITES, ids=lambda site: site.__name__)
def test_with_a_kernel_for_fp8_the_quantiser_is_fused(site: Model, prepared: list[Any]) -> None:
    _, backend = run(site(q), *arguments(), kernels="auto", strict=True)
    assert backend.report.counts() == {SITES[site]: 1} and len(prepared) == 1


@pytest.mark.parametrize("width", ({"width": 24}, {"more": 24}, {"more": 40960}), ids=str)
def test_rows_that_no_kernel_takes_are_left_alone(width: dict, prepared: list[Any]) -> None:
    _, backend = run(joined_gelu(q), *arguments(**width), kernels="auto", strict=True)
    assert backend.report.fused == backend.report.missed == prepared == []


def test_without_a_kernel_for_fp8_there_is_no_row(prepared: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "quantises_on", lambda t: False)
    for site in (gelu_tanh, joined_gelu):
        _, backend = run(site(q), *arguments(), kernels="auto", strict=True)
        assert backend.report.fused == backend.report.missed == []


def test_what_comes_before_is_not_stored_for_the_op_alone(prepared: list[Any]) -> None:
    _, backend = run(lambda a, b, before: joined_gelu(q)(a, b, before * b[..., :16]), *arguments(), kernels="auto")
    assert [site.reason_name for site in backend.report.missed] == ["PER_TOKEN"]


def test_inductors_code_calls_the_op_directly() -> None:
    model, args = joined_gelu(q), arguments()
    with fresh_cache(), torch.no_grad():
        compiled = torch.compile(model, backend=fusion_pass.Backend(kernels="reference"))
        got, (code,) = run_and_get_code(compiled, *args)
    assert_equal(got, model(*args))
    assert "DirectCall('gelu_quant', " in code


# --- models -----------------------------------------------------------------------------------------------------------


def quantised_count(backend: GraphBackend, kind: str) -> int:
    return backend.report.counts().get(kind, 0)


@needs_casts
def test_flux_1_quantises_two_gelus_a_double_block_and_a_joined_row_a_single_block() -> None:
    layers, single_layers = 1, 2
    model, arguments = flux1(layers, single_layers)
    got, backend = compiled(quantized.quantize_(model, chosen=quantized.of_blocks), arguments)
    assert torch.equal(got, run_model(model, arguments))
    assert quantised_count(backend, GELU) == 2 * layers + single_layers
    calls = [node for node in backend.graphs[0].graph.nodes if node.target is TANH]
    assert sum(call.args[1] is not None for call in calls) == single_layers  # with attention before it
    assert backend.count(aten.tanh.default) == 0
    # Each value is quantised once: beside those in the ops, both outputs of attention of a double block.
    quantised = sum(count for kind, count in backend.report.counts().items() if kind.endswith("_quant"))
    assert quantised == 6 * layers + 2 * single_layers
    assert casts(backend) == backend.count(aten.amax.default) == 2 * layers
    assert {site.kind for site in backend.report.missed} <= {"norm", "norm_scale", "rope", "residual_add"}


@needs_casts
def test_flux_2_quantises_two_swiglus_a_double_block_and_a_joined_row_a_single_block() -> None:
    layers = 1
    model, arguments = flux2(layers)
    quantized.quantize_(model, chosen=quantized.of_blocks)
    _, backend = compiled(model, arguments)
    assert quantised_count(backend, SILU) == 3 * layers


# --- the ops by hand --------------------------------------------------------------------------------------------------


def given_to(name: str, dtype: torch.dtype = BF16) -> tuple[Tensor, ...]:
    a, b, before = arguments(dtype)
    return (a, before) if name == GELU else (a, b, before)


@pytest.mark.parametrize(("name", "dtype"), ((GELU, FP32), (SILU, BF16)))
def test_the_ops_pass_opcheck(name: str, dtype: torch.dtype) -> None:
    op = getattr(torch.ops.dit_kernels, name).default
    torch.library.opcheck(op, given_to(name, dtype))
    torch.library.opcheck(op, given_to(name, dtype)[:-1], {"s_dtype": FP32, "reciprocal": True})


def test_q_and_s_are_those_of_the_joined_row() -> None:
    a, b, before = arguments()
    for op, z in (
        (lambda *more: torch.ops.dit_kernels.gelu_quant(a, *more), F.gelu(a)),
        (lambda *more: torch.ops.dit_kernels.gelu_quant(a, *more, approximate="tanh"), gelu(a)),
        (lambda *more: torch.ops.dit_kernels.silu_mul_quant(a, b, *more), F.silu(a) * b),
    ):
        assert_equal(op(), q(z))
        assert_equal(op(before), q(torch.cat((before, z), -1)))
        assert_equal(op(before.mT.contiguous().mT), q(torch.cat((before, z), -1)))
    wide = torch.ops.dit_kernels.gelu_quant(a.float(), before, out_dtype=BF16)
    assert_equal(wide, q(torch.cat((before, F.gelu(a.float()).bfloat16()), -1)))


@pytest.mark.parametrize("name", (GELU, SILU))
def test_a_call_that_needs_a_gradient_raises(name: str) -> None:
    *others, before = given_to(name, FP32)
    with pytest.raises(RuntimeError, match=f"{name}: a gradient is needed, and this op has none"):
        getattr(torch.ops.dit_kernels, name)(*others, before.requires_grad_())


def test_bad_arguments_are_named() -> None:
    a, _, before = arguments()
    op = torch.ops.dit_kernels.gelu_quant
    for wrong, message in (
        (before[:, :4], r"before\.shape is \[2, 4, 16\], expected \[2, 5, 32\], the shape of a, except for the last"),
        (before[0], r"before\.shape is \[5, 16\], expected"),
        (before.float(), r"before\.dtype is torch\.float32, expected torch\.bfloat16, the dtype of the result"),
    ):
        with pytest.raises(ValueError, match=rf"gelu_quant: {message}"):
            op(a, wrong)
    with pytest.raises(ValueError, match="gelu_quant: approximate is 'sigmoid', expected 'none', 'tanh'"):
        op(a, approximate="sigmoid")


def test_calls_with_and_without_what_comes_before_have_plans_of_their_own() -> None:
    a, _, before = arguments()
    plans = ops.Plans(ops.OPS[GELU])
    assert can_be_planned((a, before))
    plans.keep((a, before), {}, lambda args, tensors: True)
    assert plans.run((a, before), {}) is True
    assert plans.run((a, None), {}) is None
    assert plans.run((a, before[..., :8]), {}) is None
