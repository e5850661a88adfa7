"""torch.ops.dit_kernels.*: schemas, fake implementations, dispatch.

    norm_tanh_mul_add             y = residual + tanh(gate) * norm(x)
    norm_tanh_mul_add_norm_scale  the same y, and z = norm(y) * (1 + scale)
    norm_scale                    z = norm(x) * (1 + scale)

Shapes: x and residual [..., S, D]; weight and bias [D] or None; gate and scale None or anything that broadcasts to x
([D], [1,1,D], [B,1,D], [B,S,D], one element, ...), with any strides. Results are fresh and contiguous, of x's shape.
dtypes: bfloat16, float16 and float32, each operand its own; float64 in the PyTorch definition.
`norm` is "rms" or "layer"; `tanh=False` takes a gate that is activated already, `add_one=False` a scale that holds its
1 already; `rounding` is a form of dit_kernels.rounding, `root` a spelling of an rms norm's root there. `y_dtype` and
`z_dtype` default to what PyTorch's promotion gives the chain, `norm_dtype` (what the normalised value is cast to) to
what rounding.norm_steps says.
Each op has an overload `.eps_tensor`, which takes eps as a one-element CPU tensor and reads it on the host.
Bad arguments raise ValueError, which names the argument, what came and what was expected.

On CPU, and where autograd needs a gradient, an op runs its PyTorch definition (dit_kernels.reference); on CUDA, its
CuTeDSL kernel, or the definition where that cannot run (no CuTeDSL, a GPU older than sm_80, float64).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack

from dit_kernels import reference
from dit_kernels.chain import Chain
from dit_kernels.rounding import FORMS, NORMS, ROOTS, gated_steps, scaled_steps

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DTYPES = (*KERNEL_DTYPES, torch.float64)
MINIMUM_CAPABILITY = (8, 0)
ALIGNMENT = 16  # bytes: of every tensor that a kernel is launched on without looking at it again

_TAIL = "ScalarType? norm_dtype=None, str root='rsqrt'"
_SCHEMAS = {
    "norm_tanh_mul_add": (
        "(Tensor x, Tensor? weight, Tensor? bias, Tensor? gate, Tensor residual, {eps} eps, *, str norm='rms', "
        f"bool tanh=True, str rounding='cast_then_weight', ScalarType? y_dtype=None, {_TAIL}) -> Tensor"
    ),
    "norm_tanh_mul_add_norm_scale": (
        "(Tensor x, Tensor? weight, Tensor? bias, Tensor? gate, Tensor residual, {eps} eps, Tensor? weight2, "
        "Tensor? bias2, Tensor? scale, {eps} eps2, *, str norm='rms', bool tanh=True, bool add_one=True, "
        "str rounding='cast_then_weight', ScalarType? y_dtype=None, ScalarType? z_dtype=None, "
        f"{_TAIL}) -> (Tensor, Tensor)"
    ),
    "norm_scale": (
        "(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, {eps} eps, *, str norm='rms', bool add_one=True, "
        f"str rounding='cast_then_weight', ScalarType? z_dtype=None, {_TAIL}) -> Tensor"
    ),
}


@dataclass(slots=True)
class Call:
    """The checked arguments of one call of any of the ops; what an op does not have is None."""

    chain: Chain
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    gate: Tensor | None
    residual: Tensor | None
    eps: float | Tensor
    weight2: Tensor | None = None
    bias2: Tensor | None = None
    scale: Tensor | None = None
    eps2: float | Tensor = 0.0

    def tensors(self) -> list[Tensor]:
        """The operands that hold data; eps as a tensor is not one of them."""
        operands = (self.x, self.weight, self.bias, self.gate, self.residual, self.weight2, self.bias2, self.scale)
        return [t for t in operands if t is not None]


# --- checking -------------------------------------------------------------------------------------------------------


def _reject(op: str, name: str, got: object, expected: str) -> None:
    raise ValueError(f"{op}: {name} is {got}, expected {expected}")


def _check_operand(op: str, name: str, t: Tensor, x: Tensor) -> None:
    if t.layout != torch.strided:
        _reject(op, f"{name}.layout", t.layout, "torch.strided")
    if t.dtype not in DTYPES:
        _reject(op, f"{name}.dtype", t.dtype, "bfloat16, float16, float32 or float64")
    if t.device != x.device:
        _reject(op, f"{name}.device", t.device, f"{x.device}, the device of x")


def _check_row(op: str, name: str, t: Tensor | None, x: Tensor) -> None:
    """weight and bias: [D]."""
    if t is None:
        return
    _check_operand(op, name, t, x)
    if t.ndim != 1 or t.shape[0] != x.shape[-1]:
        _reject(op, f"{name}.shape", list(t.shape), f"[{x.shape[-1]}], the last dimension of x")


def _check_broadcast(op: str, name: str, t: Tensor | None, x: Tensor) -> None:
    """gate and scale: anything that broadcasts to x."""
    if t is None:
        return
    _check_operand(op, name, t, x)
    pairs = zip(reversed(t.shape), reversed(x.shape), strict=False)
    fits = t.ndim <= x.ndim and all(a == b or a == 1 for a, b in pairs)
    if not fits:
        _reject(op, f"{name}.shape", list(t.shape), f"one that broadcasts to the shape of x, {list(x.shape)}")


def _check_eps(op: str, name: str, eps: float | Tensor) -> None:
    if eps is None:
        _reject(op, name, eps, "a number, or one floating-point element on the CPU")
    if isinstance(eps, Tensor) and (eps.device.type != "cpu" or eps.numel() != 1 or not eps.is_floating_point()):
        got = f"a {eps.dtype} tensor of shape {list(eps.shape)} on {eps.device}"
        _reject(op, name, got, "one floating-point element on the CPU")


def _check_words(op: str, norm: str, rounding: str, root: str, **dtypes: torch.dtype | None) -> None:
    if norm not in NORMS:
        _reject(op, "norm", repr(norm), " or ".join(map(repr, NORMS)))
    if rounding not in FORMS:
        _reject(op, "rounding", repr(rounding), ", ".join(map(repr, FORMS)))
    if root not in ROOTS:
        _reject(op, "root", repr(root), ", ".join(map(repr, ROOTS)))
    for name, dtype in dtypes.items():
        if dtype is not None and dtype not in DTYPES:
            _reject(op, name, dtype, "bfloat16, float16, float32 or float64")


def _check_x(op: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        _reject(op, "x", x, "a tensor [..., S, D]")
    if x.ndim < 2:
        _reject(op, "x.shape", list(x.shape), "[..., S, D]")
    _check_operand(op, "x", x, x)


def _check_residual(op: str, residual: Tensor, x: Tensor) -> None:
    if not isinstance(residual, Tensor):
        _reject(op, "residual", residual, "a tensor of the shape of x")
    _check_operand(op, "residual", residual, x)
    if residual.shape != x.shape:
        _reject(op, "residual.shape", list(residual.shape), f"{list(x.shape)}, the shape of x")


# --- arguments to a Call --------------------------------------------------------------------------------------------


def _dtype(t: Tensor | None) -> torch.dtype | None:
    return None if t is None else t.dtype


def _promoting(t: Tensor | None) -> torch.dtype | None:
    """The dtype with which an operand takes part in promotion: none for a 0-d one."""
    return None if t is None or t.ndim == 0 else t.dtype


_gated_steps = lru_cache(maxsize=None)(gated_steps)
_scaled_steps = lru_cache(maxsize=None)(scaled_steps)
_chain = lru_cache(maxsize=None)(Chain)


def _gated_call(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor,
    eps: float | Tensor,
    *,
    norm: str = "rms",
    tanh: bool = True,
    rounding: str = "cast_then_weight",
    y_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    root: str = "rsqrt",
    op: str = "norm_tanh_mul_add",
) -> Call:
    _check_words(op, norm, rounding, root, y_dtype=y_dtype, norm_dtype=norm_dtype)
    _check_x(op, x)
    _check_row(op, "weight", weight, x)
    _check_row(op, "bias", bias, x)
    _check_broadcast(op, "gate", gate, x)
    _check_residual(op, residual, x)
    _check_eps(op, "eps", eps)
    steps = _gated_steps(
        rounding,
        norm,
        x.dtype,
        _dtype(weight),
        _dtype(bias),
        _promoting(gate),
        residual.dtype,
        y_dtype,
        norm_dtype,
        root,
    )
    return Call(_chain(norm, tanh, True, steps, None), x, weight, bias, gate, residual, eps)


def _scaled_call(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    eps: float | Tensor,
    *,
    norm: str = "rms",
    add_one: bool = True,
    rounding: str = "cast_then_weight",
    z_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    root: str = "rsqrt",
) -> Call:
    op = "norm_scale"
    _check_words(op, norm, rounding, root, z_dtype=z_dtype, norm_dtype=norm_dtype)
    _check_x(op, x)
    _check_row(op, "weight", weight, x)
    _check_row(op, "bias", bias, x)
    _check_broadcast(op, "scale", scale, x)
    _check_eps(op, "eps", eps)
    steps = _scaled_steps(
        rounding, norm, x.dtype, _dtype(weight), _dtype(bias), _promoting(scale), z_dtype, norm_dtype, root
    )
    return Call(_chain(norm, True, add_one, None, steps), x, weight, bias, None, None, eps, scale=scale)


def _dual_call(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor,
    eps: float | Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    scale: Tensor | None,
    eps2: float | Tensor,
    *,
    norm: str = "rms",
    tanh: bool = True,
    add_one: bool = True,
    rounding: str = "cast_then_weight",
    y_dtype: torch.dtype | None = None,
    z_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    root: str = "rsqrt",
) -> Call:
    op = "norm_tanh_mul_add_norm_scale"
    first = _gated_call(
        x,
        weight,
        bias,
        gate,
        residual,
        eps,
        norm=norm,
        tanh=tanh,
        rounding=rounding,
        y_dtype=y_dtype,
        norm_dtype=norm_dtype,
        root=root,
        op=op,
    )
    _check_words(op, norm, rounding, root, z_dtype=z_dtype)
    _check_row(op, "weight2", weight2, x)
    _check_row(op, "bias2", bias2, x)
    _check_broadcast(op, "scale", scale, x)
    _check_eps(op, "eps2", eps2)
    gated = first.chain.gated
    assert gated is not None
    steps = _scaled_steps(
        rounding, norm, gated.y, _dtype(weight2), _dtype(bias2), _promoting(scale), z_dtype, norm_dtype, root
    )
    chain = _chain(norm, tanh, add_one, gated, steps)
    return Call(chain, x, weight, bias, gate, residual, eps, weight2, bias2, scale, eps2)


# --- the three ways to run a Call: each gives the results in order --------------------------------------------------


def _run_definition(call: Call) -> tuple[Tensor, ...]:
    c = call
    results = []
    read, weight, bias, eps = c.x, c.weight, c.bias, c.eps
    if c.chain.gated is not None:
        assert c.residual is not None
        read = reference.gated(read, weight, bias, c.gate, c.residual, eps, c.chain)
        results.append(read)
        weight, bias, eps = c.weight2, c.bias2, c.eps2
    if c.chain.scaled is not None:
        results.append(reference.scaled(read, weight, bias, c.scale, eps, c.chain))
    return tuple(r.contiguous() for r in results)


def _empty_results(call: Call) -> tuple[Tensor, ...]:
    gated, scaled = call.chain.gated, call.chain.scaled
    dtypes = ([gated.y] if gated is not None else []) + ([scaled.z] if scaled is not None else [])
    return tuple(call.x.new_empty(call.x.shape, dtype=dtype) for dtype in dtypes)


def _run_cuda(call: Call) -> tuple[Tensor, ...]:
    if not has_kernel(call):
        missing = kernels_missing(call.x.device)
        if missing is not None:
            _warn_once(f"dit_kernels: {missing}; the PyTorch definitions run instead")
        return _run_definition(call)
    results = _empty_results(call)
    _run_kernel(call, results)
    return results


def _run_kernel(call: Call, results: tuple[Tensor, ...]) -> None:
    if call.x.numel():
        _compiler().run(call.chain, *_kernel_operands(call, results))


def run_into(call: Call, results: tuple[Tensor, ...]) -> None:
    """Runs a call into results that are there already: contiguous, of the shape of x and the chain's dtypes."""
    if has_kernel(call):
        _run_kernel(call, results)
        return
    run = _run_cuda if call.x.is_cuda else _run_definition
    for result, value in zip(results, run(call), strict=True):
        result.copy_(value)


def kernel_of(call: Call, results: tuple[Tensor, ...]) -> tuple[Callable[..., None], int]:
    """The kernel that a call runs, and the number of processors that it is launched with."""
    function, numbers = _compiler().bound(call.chain, *_kernel_operands(call, results))
    return function, numbers[-1]


# --- from a Call to what a kernel takes -----------------------------------------------------------------------------


@cache
def kernels_missing(device: torch.device) -> str | None:
    """Why no kernel can run on `device`, or None where one can."""
    if device.type != "cuda":
        return f"no kernel for device type {device.type}"
    if find_spec("cutlass") is None:
        return "nvidia-cutlass-dsl is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMUM_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is older than 8.0"
    return None


def has_kernel(call: Call) -> bool:
    """Can the CuTeDSL kernel run this call?"""
    if kernels_missing(call.x.device) is not None:
        return False
    # A 0-d operand does not promote: of another dtype than x, it makes a chain of its own, seen in no model.
    scalars = [t for t in (call.gate, call.scale) if t is not None and t.ndim == 0]
    same = all(t.dtype == call.x.dtype for t in scalars)
    return same and all(t.dtype in KERNEL_DTYPES for t in call.tensors())


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


@cache
def _compiler() -> Any:
    from dit_kernels import compile  # imports cutlass: only now, at the first call on a GPU

    return compile


def _rows(t: Tensor) -> Tensor:
    """[..., S, D] as [B, S, D] with a last dimension of stride 1; a copy only where a view cannot do it."""
    if t.ndim != 3:
        t = t.reshape(-1, *t.shape[-2:]) if t.ndim > 3 else t.unsqueeze(0)
    return t if t.stride(-1) == 1 else t.contiguous()


def _row(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _broadcast(t: Tensor | None, x: Tensor) -> Tensor | None:
    """A gate or scale as [1 or B, 1 or S, D], or [1, 1, 1]."""
    if t is None:
        return None
    if t.numel() == 1:
        return t.reshape(1, 1, 1)
    if t.shape[-1] != x.shape[-1]:
        t = t.expand(*t.shape[:-1], x.shape[-1])
    if x.ndim > 3 and any(size != 1 for size in t.shape[:-2]):
        t = t.expand(*x.shape[:-2], *t.shape[-2:]).reshape(-1, *t.shape[-2:])
    elif t.ndim > 3:
        t = t.reshape(1, *t.shape[-2:])
    while t.ndim < 3:
        t = t.unsqueeze(0)
    return t if t.stride(-1) == 1 else t.contiguous()


def _number(eps: float | Tensor) -> float:
    return eps if isinstance(eps, float) else float(eps)


def _kernel_operands(call: Call, results: tuple[Tensor, ...], read_eps: bool = True) -> tuple[Any, ...]:
    """x .. z in the order and the forms of dit_kernels.compile.bound."""
    c = call
    y = results[0] if c.chain.gated is not None else None
    z = results[-1] if c.chain.scaled is not None else None
    return (
        _rows(c.x),
        _row(c.weight),
        _row(c.bias),
        _broadcast(c.gate, c.x),
        None if c.residual is None else _rows(c.residual),
        _number(c.eps) if read_eps else 0.0,
        _row(c.weight2),
        _row(c.bias2),
        _broadcast(c.scale, c.x),
        _number(c.eps2) if read_eps else 0.0,
        None if y is None else _rows(y),
        None if z is None else _rows(z),
    )


# --- plans: what was checked and found out for one call is not again for the next like it ---------------------------

_Key = tuple[Any, ...]
_Plan = Callable[[Tensor, list[Any]], Any]
_plans: dict[_Key, _Plan] = {}
_MOST_PLANS = 4096  # shapes that change with every call must not fill the memory
_PLAIN = (Tensor, torch.nn.Parameter)


def _plan_key(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[_Key | None, list[Any]]:
    """All that checking and the choice of a kernel depend on, None for arguments that no plan is made for; and the
    arguments as a kernel takes them: a tensor by its address."""
    key: list[Any] = [name, *kwargs.items()]
    given: list[Any] = []
    pointers = 0
    for a in args:
        if a.__class__ in _PLAIN:
            pointer = a.data_ptr()
            if not pointer or a.is_neg():
                return None, given
            pointers |= pointer
            given.append(pointer)
            key += (a.dtype, a.shape, a.stride(), a.get_device())
        elif a is None or a.__class__ is float:
            given.append(a)
            key.append(a is None)
        else:
            return None, given
    return None if pointers % ALIGNMENT else tuple(key), given


def _make_plan(call: Call, given: list[Any]) -> _Plan | None:
    """Runs calls with the key of this one. None where the kernel reads a copy of an argument."""
    c, results = call, _empty_results(call)
    operands = _kernel_operands(call, results)
    addresses = [t.data_ptr() for t in operands[:-2] if isinstance(t, Tensor)]
    if sorted(addresses) != sorted(a for a in given if isinstance(a, int)):
        return None
    function, numbers = _compiler().bound(c.chain, *operands)
    dual, scaled = c.chain.gated is not None and c.chain.scaled is not None, c.chain.gated is None
    device, shape, dtypes = c.x.get_device(), c.x.shape, [r.dtype for r in results]
    first_dtype, last_dtype = dtypes[0], dtypes[-1]
    like = c.x.is_contiguous() and set(dtypes) == {c.x.dtype}
    empty_like, stream_of = torch.empty_like, torch._C._cuda_getCurrentRawStream
    current_device = torch.cuda.current_device

    def plan(x: Tensor, given: list[Any]) -> Any:
        if current_device() != device:
            with torch.cuda.device(device):
                return plan(x, given)
        first = empty_like(x) if like else x.new_empty(shape, dtype=first_dtype)
        if dual:
            second = empty_like(x) if like else x.new_empty(shape, dtype=last_dtype)
            function(*given, first.data_ptr(), second.data_ptr(), *numbers, stream_of(device))
            return first, second
        if scaled:
            x_, weight, bias, scale, eps = given
            given = [x_, weight, bias, None, None, eps, None, None, scale, 0.0, None, first.data_ptr()]
        else:
            given = [*given, None, None, None, 0.0, first.data_ptr(), None]
        function(*given, *numbers, stream_of(device))
        return first

    return plan


def _cuda(name: str, make_call: Callable[..., Call]) -> Callable[..., Any]:
    def implementation(*args: Any, **kwargs: Any) -> Any:
        key, given = _plan_key(name, args, kwargs)
        plan = None if key is None else _plans.get(key)
        if plan is not None:
            return plan(args[0], given)
        call = make_call(*args, **kwargs)
        results = _run_cuda(call)
        if key is not None and has_kernel(call):
            plan = _make_plan(call, given)
            if plan is not None:
                if len(_plans) >= _MOST_PLANS:
                    _plans.clear()
                _plans[key] = plan
        return results if len(results) > 1 else results[0]

    return implementation


# --- registration ---------------------------------------------------------------------------------------------------

_CALLS: dict[str, Callable[..., Call]] = {
    "norm_tanh_mul_add": _gated_call,
    "norm_tanh_mul_add_norm_scale": _dual_call,
    "norm_scale": _scaled_call,
}


def checked_call(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Call:
    """The arguments of an op of this library as a Call. Raises ValueError where the op would."""
    return _CALLS[op._opname](*args, **kwargs)


def prepare(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> None:
    """Compiles the kernels that `op(*args, **kwargs)` will launch, ahead of the first call.

    The arguments may be fake tensors, with symbolic sizes; nothing is read from them and nothing is launched.
    """
    call = checked_call(op, *args, **kwargs)
    if has_kernel(call):
        _compiler().prepare(call.chain, *_kernel_operands(call, _empty_results(call), read_eps=False))


def _results(run: Callable[[Call], tuple[Tensor, ...]], make_call: Callable[..., Call]) -> Callable[..., Any]:
    def implementation(*args: Any, **kwargs: Any) -> Any:
        results = run(make_call(*args, **kwargs))
        return results if len(results) > 1 else results[0]

    return implementation


def _autograd(op: torch._ops.OpOverload, name: str, definition: Callable[..., Any]) -> Callable[..., Any]:
    """Runs the definition, which differentiates, where a gradient is wanted; else what the device has.

    A plan is run from here, where nothing between autograd and the device is there to see the call: that saves a second
    way through the dispatcher.
    """

    def implementation(*args: Any, **kwargs: Any) -> Any:
        wanted = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        if wanted or torch.autograd.forward_ad._current_level >= 0:
            return definition(*args, **kwargs)
        x = args[0]
        if x is not None and x.is_cuda and not _len_torch_dispatch_stack() and peek_interpreter_stack() is None:
            key, given = _plan_key(name, args, kwargs)
            plan = None if key is None else _plans.get(key)
            if plan is not None:
                return plan(x, given)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args, **kwargs)

    return implementation


def _register(library: torch.library.Library) -> None:
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
    for name, schema in _SCHEMAS.items():
        make_call = _CALLS[name]
        definition = _results(_run_definition, make_call)
        for overload, eps in (("", "float"), (".eps_tensor", "Tensor")):
            # A CUDA graph would keep the eps of its capture, and Inductor's graphs take no CPU tensor into their pool.
            unsafe = (torch.Tag.cudagraph_unsafe,) if overload else ()
            library.define(name + overload + schema.format(eps=eps), tags=tags + unsafe)
            library.impl(name + overload, definition, "CompositeExplicitAutograd")
            library.impl(name + overload, _cuda(name, make_call), "CUDA")
            torch.library.register_fake(
                f"{library.ns}::{name}{overload}", _results(_empty_results, make_call), lib=library
            )
            op = getattr(getattr(torch.ops.dit_kernels, name), overload[1:] or "default")
            library.impl(name + overload, _autograd(op, name, definition), "Autograd")


_LIBRARY = torch.library.Library("dit_kernels", "DEF")
_register(_LIBRARY)
