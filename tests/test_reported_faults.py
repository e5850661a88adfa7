"""Programs on which an earlier version failed, silently or loudly. Each is an example of a kind of fault."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_backend import run
from site_modules import native_norm
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import fusion_pass
from fusion_pass import Backend

D = 64
REFERENCE = Backend(kernels="reference")
ROOT = Path(__file__).parents[1]


def norm(x: Tensor) -> Tensor:
    return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def gated(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """A scaled norm, a matmul and a gated residual add."""
    return x + gate.tanh() * norm((norm(x) * (1 + gate)) @ weight)


def kinds(function: Any, *args: Any, **options: Any) -> tuple[list[str], list[str | None]]:
    """What is fused, and the reasons of what is not; the result is that of eager."""
    got, backend = run(function, *args, **options)
    with torch.no_grad():
        torch.testing.assert_close(got, function(*args))
    report = backend.report
    return sorted(site.kind for site in report.fused), [site.reason_name for site in report.missed]


# --- sizes that nobody knows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", (False, True), ids=("tokens", "tokens in frames"))
def test_a_number_of_tokens_that_a_mask_decides_is_no_obstacle(view: bool) -> None:
    """The number is an unbacked symbol, and no check may ask what it is."""
    x, gate, weight = torch.randn(1, 24, D), torch.randn(1, 1, D), torch.randn(D, D) / 8

    def packed(x: Tensor, mask: Tensor) -> Tensor:
        tokens = x[:, mask]
        if view:
            return gated(tokens.unflatten(1, (-1, 1)), gate[:, None], weight).flatten(1, 2)
        return gated(tokens, gate, weight)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        fused, _ = kinds(packed, x, torch.arange(24) % 3 != 0)
    assert fused == ["norm_scale", "norm_tanh_mul_add"]


def test_a_dimension_that_is_marked_unbacked_is_no_obstacle_to_inductor() -> None:
    x, gate, weight = torch.randn(1, 24, D), torch.randn(1, 1, D), torch.randn(D, D) / 8
    torch._dynamo.decorators.mark_unbacked(x, 1)
    with torch.no_grad():
        got = torch.compile(gated, backend=Backend(kernels="reference", strict=True), fullgraph=True)(x, gate, weight)
    torch.testing.assert_close(got, gated(x, gate, weight))


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_inputs_of_a_plain_subclass_run() -> None:
    class Tagged(torch.Tensor):
        pass

    weight = torch.randn(D, D) / 8  # not tagged: Inductor's own matmuls take no subclass
    args = [*(t.as_subclass(Tagged) for t in (torch.randn(1, 24, D), torch.randn(1, 1, D))), weight]
    with torch.no_grad():
        got = torch.compile(gated, backend=REFERENCE)(*args)
        torch.testing.assert_close(got, gated(*args))


def test_torch_compile_takes_the_options_that_it_takes_without_us(without_code: None) -> None:
    keep = lambda guards: [True for _ in guards]  # noqa: E731
    options = fusion_pass.inductor_options(options={"guard_filter_fn": keep, "max_autotune": False})
    assert options["guard_filter_fn"] is keep and options["max_autotune"] is False
    torch.compile(nn.Linear(8, 8), options=options)(torch.randn(2, 8))


def test_options_that_are_no_dict_are_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"options is \[1\], expected a dict"):
        torch.compile(lambda a: a + 1, backend="fusion_pass", options=[1])(torch.randn(3))
    with pytest.raises(ValueError, match=r"options is \[1\], expected a dict"):
        fusion_pass.inductor_options(options=[1])


# --- scales, gates, shifts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", (1, 24))
def test_the_size_of_an_operand_does_not_decide_what_is_a_scale_and_what_is_a_gate(tokens: int) -> None:
    """A visible 1 + makes a scale, and what is added to it a shift; anything else is a gate, and a residual."""
    lin = nn.Linear(D, D)

    def shifted(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return lin((F.layer_norm(x.float(), (D,), eps=1e-6) * (1 + scale) + shift).type_as(x))

    def added(x: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
        return lin(norm(x) * gate + residual.expand_as(x).clone())

    args = torch.randn(1, 24, D), torch.randn(1, tokens, D), torch.randn(1, tokens, D)
    assert "norm_tanh_mul_add" not in kinds(shifted, *args)[0]
    assert kinds(added, *args[:2], torch.randn(1, 24, D))[0] == ["norm_tanh_mul_add"]


# --- what Inductor does better ----------------------------------------------------------------------------------------


def test_what_is_only_joined_with_another_tensor_is_left_to_inductor() -> None:
    """The kernel of Inductor writes into the joined tensor; an op would be copied into it."""
    lin, other = nn.Linear(2 * D, D), torch.randn(1, 24, D)

    def silu(a: Tensor, b: Tensor) -> Tensor:
        return lin(torch.cat((F.silu(a) * b, other), -1))

    def scaled(a: Tensor, b: Tensor) -> Tensor:
        return lin(torch.cat((other, norm(a) * (1 + b[:, :1])), -1))

    def read_twice(a: Tensor, b: Tensor) -> Tensor:
        product = F.silu(a) * b
        return lin(torch.cat((product, other), -1)) + product @ torch.ones(D, D)

    args = torch.randn(1, 24, D), torch.randn(1, 24, D)
    assert kinds(silu, *args) == ([], ["INLINE"])
    assert kinds(scaled, *args) == ([], ["INLINE"])
    assert kinds(read_twice, *args) == (["silu_mul"], [])


class GatedConvolution(nn.Module):
    """A gated unit between convolutions, as Sana has it."""

    def __init__(self, d: int = 32) -> None:
        super().__init__()
        self.inverted, self.point = nn.Conv2d(d, 2 * d, 1), nn.Conv2d(d, d, 1)
        self.depth = nn.Conv2d(2 * d, 2 * d, 3, padding=1, groups=2 * d)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.depth(F.silu(self.inverted(x))).chunk(2, dim=1)
        return self.point(x * F.silu(gate))


def test_a_gated_unit_between_convolutions_neither_warns_nor_raises_under_strict() -> None:
    """Its rows lie apart in memory, and the user cannot change that."""
    model = GatedConvolution().eval().bfloat16().to(memory_format=torch.channels_last)
    x = torch.randn(1, 32, 8, 8).bfloat16().to(memory_format=torch.channels_last)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        torch.compile(model, backend=Backend(kernels="reference", strict=True))(x)
    assert [str(w.message) for w in caught if "fusion_pass" in str(w.message)] == []
    _, backend = run(model, x)
    assert [site.reason_name for site in backend.report.missed] == ["APART"]


# --- never silent -----------------------------------------------------------------------------------------------------


def silu_mul(a: Tensor, b: Tensor) -> Tensor:
    return (F.silu(a) * b) @ torch.ones(16, 16)


def test_a_graph_from_a_warm_cache_leaves_its_counts_on_the_stock_backend_too() -> None:
    x, seen = torch.randn(4, 16), []
    with fresh_cache(), torch.no_grad():
        for _ in range(3):
            torch._dynamo.reset()
            counters.clear()
            torch.compile(silu_mul, options=fusion_pass.inductor_options(kernels="reference"))(x, x)
            seen.append((counters["fusion_pass"]["silu_mul"], counters["fusion_pass"]["graphs"]))
    assert seen == [(1, 1), (1, 0), (1, 0)]


def test_explain_says_why_nothing_was_compiled() -> None:
    x = torch.randn(4, 16)
    with torch.compiler.set_stance("force_eager"):
        report = fusion_pass.explain(silu_mul, x, x, backend=REFERENCE)
    assert report.graphs == 0 and "compilation is switched off" in report.note


def test_where_inductor_leaves_custom_passes_out_that_is_said_or_under_strict_raised() -> None:
    program = (
        f"import sys, warnings; sys.path[:0] = {[str(ROOT), str(ROOT / 'kernels')]}\n"
        "import torch, fusion_pass; warnings.simplefilter('always')\n"
        "f = lambda a, b: (torch.nn.functional.silu(a) * b) @ torch.ones(16, 16)\n"
        "x = torch.randn(4, 16)\n"
        "with torch.no_grad():\n"
        "    for strict in (False, True):\n"
        "        backend = fusion_pass.Backend(kernels='reference', strict=strict)\n"
        "        print('NOTE', fusion_pass.explain(f, x, x, backend=backend).note)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TORCHINDUCTOR_FX_COMPILE_MODE": "SUBPROCESS"},
        capture_output=True,
        text=True,
        check=False,
    )
    said = "Inductor compiles in a subprocess (TORCHINDUCTOR_FX_COMPILE_MODE), which runs no custom passes"
    assert f"UserWarning: fusion_pass: {said}" in result.stderr
    assert result.stdout.count("NOTE") == 1 and f"NOTE {said}" in result.stdout
    assert result.returncode != 0
    assert f"RuntimeError: fusion_pass (strict): {said}" in result.stderr


# --- fp16 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "rounding", "is_remarked"),
    [(torch.float16, "model", True), (torch.float16, "fp32", False), (torch.bfloat16, "model", False)],
)
def test_squares_in_fp16_overflow_as_in_eager_and_the_report_says_so(
    dtype: torch.dtype, rounding: str, is_remarked: bool
) -> None:
    def scaled(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
        return (native_norm(x, None) * (1 + scale)) @ weight

    x, scale, weight = (
        torch.full((1, 3, D), 300.0, dtype=dtype),
        torch.zeros(1, 1, D, dtype=dtype),
        torch.eye(D).to(dtype),
    )
    got, backend = run(scaled, x, scale, weight, rounding=rounding)
    (site,) = backend.report.fused
    text = " ".join(str(backend.report).split())
    assert (site.remark != "", "1 of the fused sites: x*x is computed in fp16" in text) == (is_remarked, is_remarked)
    assert bool((got == 0).all()) == is_remarked


# --- output -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ("ascii", "cp1252"))
def test_a_report_can_be_printed_where_stdout_is_not_utf_8(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, if the output goes into a file."""
    report = run(gated, torch.randn(1, 3, D), torch.randn(1, 1, D), torch.randn(D, D))[1].report
    report.calls = [2]
    report.note = "a mean of x²"
    assert "called in turn 2×" in str(report)
    written = io.BytesIO()
    stdout = io.TextIOWrapper(written, encoding=encoding)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        print(report)
    stdout.flush()
    text = written.getvalue().decode(encoding)
    assert report.fused and all(site.kind in text for site in report.fused)
    assert f"called in turn 2{'x' if encoding == 'ascii' else '×'}" in text
