"""linear_silu_mul and linear_gelu: schema, fake, gradients, errors; the definitions against the models' own code."""

from __future__ import annotations

import warnings
from itertools import cycle
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_kernels import ops as kernel_ops
from dit_kernels.families import OPS, linear
from dit_kernels.families.linear import FARTHEST, TILINGS, Linear, tiling_of
from dit_kernels.rounding import ACTIVATION_FORMS

ops = torch.ops.dit_kernels
B, S, K, N = 2, 3, 16, 24
BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = (BF16, torch.float16, FP32)
NAMES = ("linear_silu_mul", "linear_gelu")


def tensor(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape).to(dtype)


def arguments(name: str, dtype: torch.dtype = FP32, biases: bool = True, lead: tuple[int, ...] = (B, S)) -> list[Any]:
    torch.manual_seed(0)
    layers = 2 if name == "linear_silu_mul" else 1
    weights = [tensor(N, K, dtype=dtype) for _ in range(layers)]
    return [tensor(*lead, K, dtype=dtype), *weights, *(tensor(N, dtype=dtype) if biases else None for _ in weights)]


def by_hand(name: str, x: Tensor, *others: Tensor | None, approximate: str = "none") -> Tensor:
    """What a model computes. Its F.linear of an x that is not contiguous would round before it adds the bias."""
    layers = others[: len(others) // 2], others[len(others) // 2 :]
    a, *b = (F.linear(x.contiguous(), w, bias) for w, bias in zip(*layers, strict=True))
    return F.silu(a) * b[0] if b else F.gelu(a, approximate=approximate)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck_passes(name: str) -> None:
    op = getattr(ops, name).default
    for dtype, rounding, biases in zip(DTYPES, cycle(ACTIVATION_FORMS), cycle((True, False))):
        torch.library.opcheck(op, arguments(name, dtype, biases), {"rounding": rounding})
    torch.library.opcheck(op, [t.requires_grad_() for t in arguments(name)])
    torch.library.opcheck(op, arguments(name, BF16), {"out_dtype": FP32, "configuration": "128x192/2x1"})


@pytest.mark.parametrize("rounding", ACTIVATION_FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_formula(name: str, rounding: str) -> None:
    args = [t[..., :5].double().requires_grad_() for t in arguments(name, biases=False)[: -1 if "gelu" in name else -2]]
    bias = torch.randn(N, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: getattr(ops, name)(*t, rounding=rounding), (*args, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_definition_is_the_models_own_code(name: str, dtype: torch.dtype) -> None:
    for lead, biases in zip(((S,), (B, S), (2, B, S)), cycle((True, False))):
        args = arguments(name, dtype, biases, lead)
        assert torch.equal(getattr(ops, name)(*args), by_hand(name, *args))
    if "gelu" in name:
        assert torch.equal(ops.linear_gelu(*args, approximate="tanh"), by_hand(name, *args, approximate="tanh"))


@pytest.mark.parametrize("name", NAMES)
def test_results_are_the_same_and_contiguous_whatever_the_strides(name: str) -> None:
    x, *others = arguments(name, BF16)
    expected = by_hand(name, x, *others)
    wide = torch.cat((x, x), -1)[..., :K]
    for strided in (wide, x.transpose(0, 1).contiguous().transpose(0, 1), x.mT.contiguous().mT):
        got = getattr(ops, name)(strided, *others)
        assert torch.equal(got, expected) and got.is_contiguous()


def test_the_layers_may_be_parts_of_one() -> None:
    x, gate, up, bias, _ = arguments("linear_silu_mul", BF16)
    a, b = F.linear(x, torch.cat((gate, up)), torch.cat((bias, bias))).chunk(2, -1)
    both, biases = torch.cat((gate, up)), torch.cat((bias, bias))
    got = ops.linear_silu_mul(x, both[:N], both[N:], biases[:N], biases[N:])
    assert torch.equal(got, F.silu(a) * b)
    assert torch.equal(ops.linear_silu_mul(x, gate, up, None, bias), F.silu(F.linear(x, gate)) * F.linear(x, up, bias))


def test_each_step_is_rounded_as_it_is_told_to() -> None:
    x, gate, up, *biases = arguments("linear_silu_mul", BF16)
    a, b = (F.linear(x, w, bias) for w, bias in zip((gate, up), biases, strict=True))
    wide = F.silu(a.float())
    assert torch.equal(ops.linear_silu_mul(x, gate, up, *biases, silu_dtype=FP32, out_dtype=FP32), wide * b)
    a, b = (F.linear(x.float(), w.float(), bias.float()) for w, bias in zip((gate, up), biases, strict=True))
    assert torch.equal(ops.linear_silu_mul(x, gate, up, *biases, rounding="fp32"), (F.silu(a) * b).to(BF16))
    assert torch.equal(ops.linear_gelu(x, gate, biases[0], rounding="fp32"), F.gelu(a).to(BF16))
    assert torch.equal(ops.linear_gelu(x, gate, out_dtype=FP32), F.gelu(F.linear(x, gate).float()))


@settings(max_examples=15)
@given(
    name=st.sampled_from(NAMES),
    dtype=st.sampled_from(DTYPES),
    lead=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    out=st.sampled_from((None, *DTYPES)),
    rounding=st.sampled_from(ACTIVATION_FORMS),
)
def test_the_fake_result_has_the_metadata_of_the_real_one(name, dtype, lead, sizes, out, rounding) -> None:
    k, n = sizes
    args = [tensor(*lead, k, dtype=dtype), *(tensor(n, k, dtype=dtype) for _ in range(2 if "silu" in name else 1))]
    real = getattr(ops, name)(*args, out_dtype=out, rounding=rounding)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = getattr(ops, name)(*map(mode.from_tensor, args), out_dtype=out, rounding=rounding)
    assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


# --- errors -----------------------------------------------------------------------------------------------------------

X, W, BIAS = torch.zeros(B, S, K), torch.zeros(N, K), torch.zeros(N)
BAD = {
    "x": lambda: ops.linear_gelu(None, W),
    "x.shape": lambda: ops.linear_gelu(X[0, 0], W),
    "x.dtype": lambda: ops.linear_gelu(X.int(), W),
    "x.layout": lambda: ops.linear_gelu(X.to_sparse(), W),
    "w": lambda: ops.linear_gelu(X, None),
    "w.shape": lambda: ops.linear_gelu(X, W.mT),
    "w.dtype": lambda: ops.linear_gelu(X, W.bfloat16()),
    "w.device": lambda: ops.linear_gelu(X, W.to("meta")),
    "bias.shape": lambda: ops.linear_gelu(X, W, BIAS[:3]),
    "bias.dtype": lambda: ops.linear_gelu(X, W, BIAS.half()),
    "approximate": lambda: ops.linear_gelu(X, W, approximate="sigmoid"),
    "rounding": lambda: ops.linear_gelu(X, W, rounding="native"),
    "out_dtype": lambda: ops.linear_gelu(X, W, out_dtype=torch.int8),
    "configuration": lambda: ops.linear_gelu(X, W, configuration="fast"),
    "w_gate.shape": lambda: ops.linear_silu_mul(X, W[0], W),
    "w_up": lambda: ops.linear_silu_mul(X, W, None),
    "w_up.shape": lambda: ops.linear_silu_mul(X, W, W[:3]),
    "w_up.dtype": lambda: ops.linear_silu_mul(X, W, W.double()),
    "bias_gate.shape": lambda: ops.linear_silu_mul(X, W, W, BIAS[None]),
    "bias_up.shape": lambda: ops.linear_silu_mul(X, W, W, None, BIAS[:1]),
    "silu_dtype": lambda: ops.linear_silu_mul(X, W, W, silu_dtype=torch.bool),
}


@pytest.mark.parametrize("argument", BAD)
def test_a_bad_argument_raises_a_value_error_that_names_it_and_what_was_expected(argument: str) -> None:
    with pytest.raises(ValueError, match=rf"linear_\w+: {argument} is .*, expected \S"):
        BAD[argument]()


def test_no_tokens_give_empty_results() -> None:
    assert ops.linear_gelu(X[:, :0], W, BIAS).shape == (B, 0, N)
    assert ops.linear_silu_mul(X[:0], W, W).shape == (0, S, N)


def test_a_configuration_is_written_as_it_is_read() -> None:
    for tiling in (tiling for tilings in TILINGS.values() for tiling in tilings):
        assert tiling_of(str(tiling)) == tiling


@pytest.mark.parametrize("name", NAMES)
def test_no_kernel_takes_operands_on_a_cpu(name: str) -> None:
    assert not OPS[name].call(*arguments(name, BF16)).fits_kernel()


# --- what a tensor map takes ------------------------------------------------------------------------------------------


def shifted(t: Tensor, by: int) -> Tensor:
    """The tensor, `by` elements behind an aligned address."""
    memory = torch.empty(t.numel() + by, dtype=t.dtype)
    return memory[by:].view(t.shape).copy_(t)


def wider(t: Tensor, by: int) -> Tensor:
    """The tensor as a part of rows that are `by` elements wider."""
    return torch.cat((t, torch.zeros(*t.shape[:-1], by, dtype=t.dtype)), -1)[..., : t.shape[-1]]


def launched(name: str, args: list[Any], out: Tensor, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Is a kernel launched for these operands? If not, `out` has the definition's result."""

    class Launched(Exception):
        pass

    def run(*_: Any) -> Any:
        raise Launched

    monkeypatch.setattr(kernel_ops, "has_kernel", lambda call: True)
    monkeypatch.setattr(kernel_ops, "_compiler", lambda: mock.Mock(run=run))
    call = OPS[name].call(*args)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kernel_ops.run_into(call, (out,))
    except Launched:
        return True
    assert torch.equal(out, call.definition()[0])
    return False


@pytest.mark.parametrize("by", (1, 4, 8))
@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("name", NAMES)
def test_only_aligned_addresses_reach_the_kernel(
    name: str, place: int, by: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    args, out = arguments(name, BF16, biases=name == "linear_gelu"), torch.empty(B, S, N, dtype=BF16)
    args = [given for given in args if given is not None]
    tensors = [shifted(t, by if place == i else 0) for i, t in enumerate((*args, out))]
    assert launched(name, tensors[:-1], tensors[-1], monkeypatch) == (by == 8)


@pytest.mark.parametrize("by", (1, 4, 8))
def test_only_aligned_strides_reach_the_kernel(by: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, bias = arguments("linear_gelu", BF16)
    out = torch.empty(B, S, N + by, dtype=BF16)[..., by:]
    assert launched("linear_gelu", [x, w, bias], out, monkeypatch) == (by == 8)


@pytest.mark.parametrize("by", (1, 4, 8))
@pytest.mark.parametrize("place", (0, 1))
def test_a_kernel_fits_only_aligned_strides(place: int, by: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Linear, "missing", lambda family, device: None)
    args = arguments("linear_gelu", BF16)
    args[place] = wider(args[place], by)
    assert OPS["linear_gelu"].call(*args).fits_kernel() == (by == 8)


def test_one_tensor_map_spans_two_weights_that_are_not_one_and_not_too_far_apart() -> None:
    family = OPS["linear_silu_mul"].family
    assert family.can_launch((0, 4096, 8192, None, None, 0))
    assert family.can_launch((0, 8192, 4096, None, None, 0))
    assert not family.can_launch((0, 4096, 4096, None, None, 0))
    assert not family.can_launch((0, 4096, 4096 + FARTHEST, None, None, 0))


def test_another_version_of_quack_has_other_kernels_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    for version in ("0.6.5", "0.6.6"):
        monkeypatch.setattr(linear, "installed_version", lambda name, version=version: version)
        names.append(repr(OPS["linear_gelu"].family))
    assert names[0] != names[1]


@pytest.mark.parametrize(
    "configuration", ("128x192/2x1/fast", "128x192/2x1/pingpong/x", "0x64/1x1", "128x192", "0128x192/2x1")
)
def test_other_words_name_no_configuration(configuration: str) -> None:
    with pytest.raises(ValueError, match="configuration"):
        OPS["linear_gelu"].call(*arguments("linear_gelu"), configuration=configuration)
