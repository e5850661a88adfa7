"""torch.ops.dit_kernels.*: schema, fake, dispatch, gradients, errors; the definitions against what they define."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dit_kernels.rounding import FORMS, ROOTS

ops = torch.ops.dit_kernels
B, S, D = 2, 3, 16
BROADCASTS = {
    "[D]": (D,),
    "[1,1,D]": (1, 1, D),
    "[B,1,D]": (B, 1, D),
    "[B,S,D]": (B, S, D),
    "[1,S,D]": (1, S, D),
    "one element": (1,),
    "0-d": (),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def arguments(name: str, dtype: torch.dtype, broadcast: tuple[int, ...], eps: object = 1e-5) -> tuple:
    torch.manual_seed(0)
    x, residual = tensor(B, S, D, dtype=dtype), tensor(B, S, D, dtype=dtype)
    weight, bias = tensor(D, dtype=dtype), tensor(D, dtype=dtype)
    gate, scale = tensor(*broadcast, dtype=dtype), tensor(*broadcast, dtype=dtype)
    return {
        "norm_tanh_mul_add": (x, weight, None, gate, residual, eps),
        "norm_tanh_mul_add_norm_scale": (x, None, None, gate, residual, eps, weight, bias, scale, eps),
        "norm_scale": (x, weight, bias, scale, eps),
    }[name]


NAMES = ("norm_tanh_mul_add", "norm_tanh_mul_add_norm_scale", "norm_scale")


@pytest.mark.parametrize("name", NAMES)
def test_opcheck_passes_for_every_broadcast_form_and_every_dtype(name: str) -> None:
    op = getattr(ops, name)
    for broadcast, dtype in zip(BROADCASTS.values(), itertools.cycle(DTYPES)):
        torch.library.opcheck(op.default, arguments(name, dtype, broadcast))


@pytest.mark.parametrize("name", NAMES)
def test_opcheck_passes_with_gradients_with_eps_as_a_tensor_and_with_every_keyword(name: str) -> None:
    op = getattr(ops, name)
    args = arguments(name, torch.float32, (B, 1, D))
    torch.library.opcheck(op.default, [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in args])
    torch.library.opcheck(op.eps_tensor, arguments(name, torch.bfloat16, (D,), torch.tensor(1e-5)))
    keywords = {"norm": "layer", "rounding": "fp32"}
    keywords |= {"y_dtype": torch.float32} if "tanh" in name else {}
    keywords |= {"z_dtype": torch.float16} if name.endswith("scale") else {}
    torch.library.opcheck(op.default, arguments(name, torch.bfloat16, (D,)), keywords)


@pytest.mark.parametrize("norm", ("rms", "layer"))
@pytest.mark.parametrize("rounding", FORMS)
@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_formula(name: str, root: str, rounding: str, norm: str) -> None:
    op = getattr(ops, name)
    if norm == "layer" and root != "rsqrt":
        with pytest.raises(ValueError, match=r"root is .*, expected 'rsqrt' with norm='layer'"):
            op(*arguments(name, torch.float32, (B, 1, D)), norm=norm, root=root)
        return
    args = [
        a[..., :5].double().requires_grad_() if isinstance(a, torch.Tensor) else a
        for a in arguments(name, torch.float32, (B, 1, D))
    ]
    assert torch.autograd.gradcheck(lambda *a: op(*a, rounding=rounding, norm=norm, root=root), args)


def test_gradients_flow_to_every_operand_that_broadcasts() -> None:
    for broadcast in BROADCASTS.values():
        args = arguments("norm_tanh_mul_add_norm_scale", torch.float32, broadcast)
        args = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
        y, z = ops.norm_tanh_mul_add_norm_scale(*args)
        (y.sum() + z.square().sum()).backward()
        assert all(a.grad is not None and a.grad.shape == a.shape for a in args if isinstance(a, torch.Tensor))


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_gradients_flow_too(name: str) -> None:
    op = getattr(ops, name)
    args = arguments(name, torch.float64, (B, 1, D))
    x, tangent = args[0], torch.randn(B, S, D, dtype=torch.float64)
    _, got = torch.func.jvp(lambda v: _tuple(op(v, *args[1:]))[-1], (x,), (tangent,))
    step = 1e-6
    up, down = (_tuple(op(x + sign * step * tangent, *args[1:]))[-1] for sign in (1, -1))
    torch.testing.assert_close(got, (up - down) / (2 * step), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_results_are_fresh_contiguous_and_of_the_shape_of_x_whatever_the_strides(name: str) -> None:
    op = getattr(ops, name)
    plain = arguments(name, torch.bfloat16, (B, 1, D))
    strided = [
        a.transpose(0, -1).contiguous().transpose(0, -1) if isinstance(a, torch.Tensor) and a.ndim > 1 else a
        for a in plain
    ]
    for got, expected in zip(_tuple(op(*strided)), _tuple(op(*plain)), strict=True):
        assert got.is_contiguous()
        assert torch.equal(got, expected)
        assert all(got.data_ptr() != a.data_ptr() for a in strided if isinstance(a, torch.Tensor))


def _tuple(result: object) -> tuple:
    return result if isinstance(result, tuple) else (result,)


@given(
    name=st.sampled_from(NAMES),
    dtype=st.sampled_from(DTYPES),
    lead=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    width=st.integers(1, 40),
    rounding=st.sampled_from(FORMS),
    norm=st.sampled_from(("rms", "layer")),
)
def test_the_fake_result_has_the_metadata_of_the_real_one(name, dtype, lead, width, rounding, norm) -> None:
    x = tensor(*lead, width, dtype=dtype)
    row, gate = tensor(width, dtype=dtype), tensor(width)
    args = {
        "norm_tanh_mul_add": (x, row, None, gate, x, 1e-5),
        "norm_tanh_mul_add_norm_scale": (x, row, None, gate, x, 1e-5, None, row, gate, 1e-5),
        "norm_scale": (x, row, row, gate, 1e-5),
    }[name]
    keywords = {"rounding": rounding, "norm": norm}
    if x.ndim < 2:
        with pytest.raises(ValueError, match=r"x.shape"):
            getattr(ops, name)(*args, **keywords)
        return
    real = _tuple(getattr(ops, name)(*args, **keywords))
    with torch._subclasses.FakeTensorMode() as mode:
        fake_args = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
        fake = _tuple(getattr(ops, name)(*fake_args, **keywords))
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.dtype, _strides(r)) == (f.shape, f.dtype, _strides(f))


def _strides(t: torch.Tensor) -> list[int]:
    """The strides that matter: of dimensions that have more than one index."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1 and t.numel()]


# --- the definitions against the modules that they define ------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_form_is_bit_equal_to_the_code_that_it_is_named_after(dtype: torch.dtype) -> None:
    from diffusers.models.normalization import RMSNorm

    torch.manual_seed(0)
    x, residual, w = tensor(B, S, D, dtype=dtype), tensor(B, S, D, dtype=dtype), tensor(D, dtype=dtype)
    gate, scale = tensor(B, 1, D, dtype=dtype), tensor(B, 1, D, dtype=dtype)
    ours = RMSNorm(D, eps=1e-5)
    ours.weight.data = w
    t = gate.tanh()
    expected = {
        "cast_then_weight": residual + t * ours(x),
        "weight_then_cast": residual + t * F.rms_norm(x, (D,), w, 1e-5),
        "native": residual + t * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * w),
    }
    for form, y in expected.items():
        assert torch.equal(ops.norm_tanh_mul_add(x, w, None, gate, residual, 1e-5, rounding=form), y), form
    y = residual + t * F.layer_norm(x, (D,), w, w, 1e-5)
    assert torch.equal(ops.norm_tanh_mul_add(x, w, w, gate, residual, 1e-5, norm="layer"), y)
    z = F.layer_norm(x, (D,), None, None, 1e-5) * (1 + scale)
    assert torch.equal(ops.norm_scale(x, None, None, scale, 1e-5, norm="layer"), z)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_root_is_bit_equal_to_the_code_that_it_is_named_after(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = tensor(64, 333, dtype=dtype)
    for form, wide in (("cast_then_weight", x.float()), ("native", x)):
        v = wide.pow(2).mean(-1, keepdim=True) + 1e-5
        expected = {"rsqrt": wide * v.rsqrt(), "reciprocal": wide * (1 / v.sqrt()), "quotient": wide / v.sqrt()}
        for root, n in expected.items():
            got = ops.norm_scale(x, None, None, None, 1e-5, rounding=form, root=root)
            assert torch.equal(got, n.to(dtype)), (form, root)
            once = ops.norm_scale(x, None, None, None, 1e-5, rounding="fp32", root=root)
            assert torch.equal(once, ops.norm_scale(x, None, None, None, 1e-5, rounding="fp32"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mochis_form_rounds_the_product_with_the_gate_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, residual = tensor(B, S, D, dtype=dtype), tensor(B, S, D, dtype=dtype)
    gate, scale = tensor(B, D, dtype=dtype), tensor(B, D, dtype=dtype)

    def norm(v: torch.Tensor) -> torch.Tensor:
        return v.float() * torch.rsqrt(v.float().pow(2).mean(-1, keepdim=True) + 1e-6)

    y = residual + (norm(x) * gate.tanh().unsqueeze(1)).to(dtype)
    z = (norm(y) * (1 + scale.unsqueeze(1).float())).to(dtype)
    got = ops.norm_tanh_mul_add_norm_scale(
        x, None, None, gate[:, None], residual, 1e-6, None, None, scale[:, None], 1e-6, rounding="gate_in_fp32"
    )
    assert torch.equal(got[0], y)
    assert torch.equal(got[1], z)


def test_an_fp32_weight_keeps_diffusers_chain_in_fp32() -> None:
    from diffusers.models.normalization import RMSNorm

    torch.manual_seed(0)
    x, residual = tensor(B, S, D, dtype=torch.bfloat16), tensor(B, S, D, dtype=torch.bfloat16)
    gate, norm = tensor(B, 1, D, dtype=torch.bfloat16), RMSNorm(D, eps=1e-5)
    norm.weight.data = tensor(D)
    y = residual + gate.tanh() * norm(x)
    got = ops.norm_tanh_mul_add(x, norm.weight, None, gate, residual, 1e-5)
    assert got.dtype == y.dtype == torch.float32
    assert torch.equal(got, y)


def test_the_two_output_op_is_the_two_single_ones() -> None:
    for dtype, rounding, norm in itertools.product(DTYPES, FORMS, ("rms", "layer")):
        x, _, _, gate, residual, eps, w2, b2, scale, eps2 = arguments("norm_tanh_mul_add_norm_scale", dtype, (B, 1, D))
        keywords = {"rounding": rounding, "norm": norm}
        y, z = ops.norm_tanh_mul_add_norm_scale(x, w2, b2, gate, residual, eps, w2, b2, scale, eps2, **keywords)
        assert torch.equal(y, ops.norm_tanh_mul_add(x, w2, b2, gate, residual, eps, **keywords))
        assert torch.equal(z, ops.norm_scale(y, w2, b2, scale, eps2, **keywords))


def test_absent_gate_scale_and_activation_mean_what_they_say() -> None:
    x, w, _, gate, residual, eps = arguments("norm_tanh_mul_add", torch.bfloat16, (B, 1, D))
    n = ops.norm_scale(x, w, None, None, eps)
    assert torch.equal(ops.norm_tanh_mul_add(x, w, None, None, residual, eps), residual + n)
    assert torch.equal(ops.norm_tanh_mul_add(x, w, None, gate, residual, eps, tanh=False), residual + gate * n)
    assert torch.equal(ops.norm_scale(x, w, None, gate, eps, add_one=False), n * gate)


def test_eps_as_a_tensor_is_eps_as_a_number() -> None:
    for name in NAMES:
        op = getattr(ops, name)
        number = _tuple(op(*arguments(name, torch.bfloat16, (D,), 1e-3)))
        for dtype in (torch.float32, torch.float64):
            as_tensor = _tuple(op.eps_tensor(*arguments(name, torch.bfloat16, (D,), torch.tensor(1e-3, dtype=dtype))))
            assert all(map(torch.equal, number, as_tensor))


def test_inductor_keeps_an_eps_tensor_out_of_its_cuda_graphs() -> None:
    """A graph would replay the eps of its capture; and Inductor's CUDA graphs cannot take a CPU tensor as an input."""
    for name in NAMES:
        op = getattr(ops, name)
        assert torch.Tag.cudagraph_unsafe in op.eps_tensor.tags
        assert torch.Tag.cudagraph_unsafe not in op.default.tags


# --- errors ----------------------------------------------------------------------------------------------------------

X = torch.zeros(B, S, D)
W = torch.zeros(D)
BAD = {
    "x": lambda: ops.norm_scale(None, None, None, None, 1e-5),
    "x.layout": lambda: ops.norm_scale(X.to_sparse(), None, None, None, 1e-5),
    "x.shape": lambda: ops.norm_scale(W, None, None, None, 1e-5),
    "x.dtype": lambda: ops.norm_scale(X.int(), None, None, None, 1e-5),
    "weight.shape": lambda: ops.norm_scale(X, W[:3], None, None, 1e-5),
    "weight.dtype": lambda: ops.norm_scale(X, W.int(), None, None, 1e-5),
    "bias.shape": lambda: ops.norm_scale(X, W, X, None, 1e-5),
    "scale.shape": lambda: ops.norm_scale(X, W, None, X[:, :2], 1e-5),
    "scale.device": lambda: ops.norm_scale(X, W, None, W.to("meta"), 1e-5),
    "gate.shape": lambda: ops.norm_tanh_mul_add(X, W, None, X[None], X, 1e-5),
    "residual.shape": lambda: ops.norm_tanh_mul_add(X, W, None, None, X[:1], 1e-5),
    "residual.dtype": lambda: ops.norm_tanh_mul_add(X, W, None, None, X.to(torch.complex64), 1e-5),
    "weight2.shape": lambda: ops.norm_tanh_mul_add_norm_scale(X, W, None, None, X, 1e-5, X, None, None, 1e-5),
    "bias2.shape": lambda: ops.norm_tanh_mul_add_norm_scale(X, W, None, None, X, 1e-5, W, X, None, 1e-5),
    "norm": lambda: ops.norm_scale(X, W, None, None, 1e-5, norm="batch"),
    "rounding": lambda: ops.norm_scale(X, W, None, None, 1e-5, rounding="model"),
    "root": lambda: ops.norm_scale(X, W, None, None, 1e-5, root="sqrt"),
    "z_dtype": lambda: ops.norm_scale(X, W, None, None, 1e-5, z_dtype=torch.int8),
    "y_dtype": lambda: ops.norm_tanh_mul_add(X, W, None, None, X, 1e-5, y_dtype=torch.int8),
    "norm_dtype": lambda: ops.norm_scale(X, W, None, None, 1e-5, norm_dtype=torch.bool),
    "eps": lambda: ops.norm_scale(X, W, None, None, torch.zeros(2)),
    "eps, which is NaN,": lambda: ops.norm_scale(X, W, None, None, float("nan")),
    "eps, which is negative,": lambda: ops.norm_scale(X, W, None, None, -1e-5),
    "eps, which is None,": lambda: ops.norm_scale(X, W, None, None, None),
    "eps2, which is None,": lambda: ops.norm_tanh_mul_add_norm_scale(X, W, None, None, X, 1e-5, W, None, None, None),
    "eps2, which is None beside a tensor,": lambda: ops.norm_tanh_mul_add_norm_scale(
        X, W, None, None, X, torch.tensor(1e-5), W, None, None, None
    ),
    "eps2": lambda: ops.norm_tanh_mul_add_norm_scale.eps_tensor(
        X, W, None, None, X, torch.tensor(1e-5), W, None, None, torch.tensor(1)
    ),
}


@pytest.mark.parametrize("argument", BAD)
def test_a_bad_argument_raises_a_value_error_that_names_it_and_what_was_expected(argument: str) -> None:
    with pytest.raises(ValueError, match=rf"\b{argument.split(',', maxsplit=1)[0]} is .*, expected \S"):
        BAD[argument]()


def test_an_eps_of_one_element_and_more_dimensions_is_a_number() -> None:
    x = tensor(B, S, D)
    for shape in ((), (1,), (1, 1, 1, 1)):
        eps = torch.full(shape, 1e-3, dtype=torch.float64)
        assert torch.equal(ops.norm_scale(x, None, None, None, eps), ops.norm_scale(x, None, None, None, 1e-3))


def test_empty_tensors_give_empty_results() -> None:
    for shape in ((0, S, D), (B, 0, D)):
        x = torch.zeros(shape)
        assert ops.norm_scale(x, W, None, None, 1e-5).shape == x.shape
