"""The torch.compile backend: Inductor, with the fusion pass added to the passes that are configured already."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

import dit_kernels  # noqa: F401  registers the ops, which code from a warm cache calls by name
from dit_kernels.versions import warn_if_newer
from dit_kernels.warn import warn_once
from fusion_pass.report import FusionReport

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fusion_pass.graph_pass import FusionPass

log = logging.getLogger("fusion_pass")

ROUNDINGS = ("model", "fp32")
KERNELS = ("auto", "reference")
_HOOK = "post_grad_custom_pre_pass"
_OF_DYNAMO = ("guard_filter_fn", "use_aoti")  # options that torch.compile takes out before Inductor sees the others
IN_A_SUBPROCESS = "Inductor compiles in a subprocess (TORCHINDUCTOR_FX_COMPILE_MODE), which runs no custom passes"
NOT_COMPILED = (
    "no graph was compiled: compilation is switched off (torch.compiler.set_stance, TORCH_COMPILE_DISABLE or "
    "TORCHDYNAMO_DISABLE), or the model has nothing to compile"
)


def _check_choice(name: str, got: object, expected: tuple[str, ...]) -> None:
    if got not in expected:
        raise ValueError(f"Backend: {name} is {got!r}, expected {' or '.join(map(repr, expected))}")


class Backend:
    """torch.compile's "inductor" backend with the fusion pass: `torch.compile(model, backend=Backend(...))`.

    rounding: "model" (each fused site rounds where the model's own eager code rounds) or "fp32" (one rounding at each
    output). kernels: "auto" (fuse where a CUDA kernel can run) or "reference" (fuse every proven site, on any device,
    and run the PyTorch definitions). strict: raise an error, instead of warning once for each reason, if a site that
    matched cannot be fused, if Inductor would leave the pass out, or if the pass fails. Raises a ValueError that names
    a bad argument.
    """

    def __init__(self, rounding: str = "model", kernels: str = "auto", strict: bool = False) -> None:
        _check_choice("rounding", rounding, ROUNDINGS)
        _check_choice("kernels", kernels, KERNELS)
        if not isinstance(strict, bool):
            raise ValueError(f"Backend: strict is {strict!r}, expected True or False")
        self.rounding, self.kernels, self.strict = rounding, kernels, strict

    def __call__(
        self,
        gm: torch.fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: dict[str, Any] | None = None,
        name: str | None = None,
    ) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        self.check_compiler()
        fusion_pass = self._make_pass()
        patches = _with_hook(_inductor_config(mode, options), fusion_pass)
        region = (
            {"compile_region_name": name} if "compile_region_name" in inspect.signature(compile_fx).parameters else {}
        )
        with _log_of_cached_graphs(fusion_pass):
            return compile_fx(gm, example_inputs, config_patches=patches, **region)

    def check_compiler(self) -> None:
        """Warns once where torch or CuTeDSL is newer than any version tried, and where Inductor would leave the pass
        out; under `strict`, raises RuntimeError for the latter."""
        warn_if_newer()
        if _compiles_in_a_subprocess():
            if self.strict:
                raise RuntimeError(f"fusion_pass (strict): {IN_A_SUBPROCESS}")
            warn_once(f"fusion_pass: {IN_A_SUBPROCESS}; nothing is fused")

    def _make_pass(self) -> FusionPass:
        from fusion_pass.graph_pass import FusionPass

        return FusionPass(self.rounding, self.kernels, self.strict)

    def reset(self) -> None:
        """Drops the recorded CUDA graphs. Called by torch.compiler.reset()."""
        trees = sys.modules.get("torch._inductor.cudagraph_trees")
        if trees is not None:
            trees.reset_cudagraph_trees()

    def get_compiler_config(self) -> Any:
        """Inductor's configuration with the pass in it."""
        from torch._inductor.compile_fx import get_patched_config_dict

        return get_patched_config_dict(config_patches=_with_hook({}, self._make_pass()))

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash((type(self), self.rounding, self.kernels, self.strict))

    def __repr__(self) -> str:
        return f"Backend(rounding={self.rounding!r}, kernels={self.kernels!r}, strict={self.strict!r})"


class _ExplainBackend(Backend):
    """The backend of `explain`, which collects the reports.

    It is equal to no other backend, so that it shares no compiled code. Nothing that it compiles is cached.
    """

    def __init__(self, like: Backend) -> None:
        super().__init__(like.rounding, like.kernels, like.strict)
        self.report = FusionReport()

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        compiled = super().__call__(gm, example_inputs, **kwargs)
        calls = self.report.calls
        index = len(calls)
        calls.append(0)

        def counted(*args: Any) -> Any:
            calls[index] += 1
            return compiled(*args)

        return counted

    def _make_pass(self) -> FusionPass:
        from fusion_pass.graph_pass import FusionPass

        return FusionPass(self.rounding, self.kernels, self.strict, collector=self.report)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


_DEFAULT = Backend()


def fusion_pass_backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
    """The entry point for `torch.compile(model, backend="fusion_pass")`. It does the same as Backend()."""
    return _DEFAULT(gm, example_inputs, **kwargs)


fusion_pass_backend.reset = _DEFAULT.reset  # type: ignore[attr-defined]
fusion_pass_backend.get_compiler_config = _DEFAULT.get_compiler_config  # type: ignore[attr-defined]


def inductor_options(
    rounding: str = "model",
    kernels: str = "auto",
    strict: bool = False,
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The options that make the stock backend run the pass: `torch.compile(model, options=inductor_options())`.

    The first three arguments are those of Backend. `mode` and `options` are those of torch.compile.
    """
    backend = Backend(rounding, kernels, strict)
    backend.check_compiler()
    fusion_pass = backend._make_pass()
    fusion_pass.watches_caches = True
    inductors = _checked_options(options)
    dynamos = {name: inductors.pop(name) for name in _OF_DYNAMO if name in inductors}
    return {**_with_hook(_inductor_config(mode, inductors), fusion_pass), **dynamos}


def explain(model: Callable[..., Any], *args: Any, backend: Backend | None = None, **kwargs: Any) -> FusionReport:
    """Compiles `model` anew, calls `model(*args, **kwargs)` once, and reports what was fused and what was missed.

    A model that is already compiled, as a whole or block by block, is compiled again from its original code, in the
    same parts. A module in eval mode is compiled for inference, without gradients; anything else is compiled in the
    caller's grad mode. Dynamo's caches are reset before and after. Inductor's caches are neither read nor written.
    Shapes are static, as in a first call, even if the compiled model has dynamic shapes.

    backend: the Backend whose options are used; None for the default one. Raises ValueError if `backend` is anything
    else, or if `model` cannot be called.
    """
    if not callable(model):
        raise ValueError(f"explain: model is {model!r}, expected a module or a function")
    if backend is None:
        backend = _DEFAULT
    if not isinstance(backend, Backend):
        raise ValueError(f"explain: backend is {backend!r}, expected a fusion_pass.Backend or None")
    fresh, gradients = _ExplainBackend(backend), _wants_gradients(model)
    torch._dynamo.reset()
    try:
        with _compiled_with(fresh, model) as compiled, torch.set_grad_enabled(gradients):
            compiled(*args, **kwargs)
    finally:
        torch._dynamo.reset()
    if not fresh.report.graphs:
        fresh.report.note = IN_A_SUBPROCESS if _compiles_in_a_subprocess() else NOT_COMPILED
    elif torch.is_grad_enabled() and not gradients:
        fresh.report.note = (
            "compiled without gradients, as under torch.no_grad() or torch.inference_mode(); if neither is on and the "
            "model's parameters require gradients, nothing is fused"
        )
    return fresh.report


def _compiles_in_a_subprocess() -> bool:
    from torch._inductor import compile_fx

    return "SUBPROCESS" in str(getattr(compile_fx, "fx_compile_mode", ""))


def _wants_gradients(model: Callable[..., Any]) -> bool:
    module = getattr(model, "__self__", model)  # a method of a module
    inference = isinstance(module, torch.nn.Module) and not module.training
    return torch.is_grad_enabled() and not inference


def _uncompiled(function: Any) -> Any:
    """What torch.compile was called with, if `function` is a result of torch.compile; else `function` itself."""
    return getattr(function, "_orig_mod", getattr(function, "_torchdynamo_orig_callable", function))


@contextmanager
def _compiled_with(backend: Backend, model: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Yields the model, compiled with `backend`: as a whole, or in the parts that are already compiled.

    On exit, these parts get back the compiled code that they had before.
    """
    model = _uncompiled(model)
    parts = list(_compiled_parts(model)) if isinstance(model, torch.nn.Module) else []
    if not parts:
        yield torch.compile(model, backend=backend)
        return
    before = [holder[name] for holder, name, _ in parts]
    try:
        for holder, name, original in parts:
            holder[name] = torch.compile(original, backend=backend)
        yield model
    finally:
        for (holder, name, _), compiled in zip(parts, before, strict=True):
            holder[name] = compiled


def _compiled_parts(model: torch.nn.Module) -> Iterator[tuple[dict[str, Any], str, Callable[..., Any]]]:
    """The compiled parts inside a model, each as (the dict that holds it, its key in the dict, its original code).

    A part is a module after module.compile(), or a submodule or a forward that torch.compile has wrapped.
    """
    for module in model.modules():
        if isinstance(module, torch._dynamo.OptimizedModule):
            continue
        if module._compiled_call_impl is not None:
            yield module.__dict__, "_compiled_call_impl", module._call_impl
        forward = module.__dict__.get("forward")
        if _uncompiled(forward) is not forward:
            yield module.__dict__, "forward", _uncompiled(forward)
        for name, child in module._modules.items():
            if isinstance(child, torch._dynamo.OptimizedModule):
                yield module._modules, name, child._orig_mod


def _inductor_config(mode: str | None, options: dict[str, Any] | None) -> dict[str, Any]:
    """`mode` and `options` as Inductor's configuration, checked as the stock backend checks them."""
    return dict(torch._TorchCompileInductorWrapper(mode, _checked_options(options), None).config)


def _checked_options(options: dict[str, Any] | None) -> dict[str, Any]:
    """A copy of the options. Raises ValueError if they are no dict, or are arguments of Backend."""
    if options is not None and not isinstance(options, dict):
        raise _bad_options(f"fusion_pass: options is {options!r}, expected a dict of Inductor's options, or None")
    ours = sorted({"rounding", "kernels", "strict"} & set(options or ()))
    if ours:
        raise _bad_options(
            f"fusion_pass: options has {', '.join(map(repr, ours))}, expected options of Inductor; the settings of the "
            "pass are arguments of fusion_pass.Backend: torch.compile(model, backend=fusion_pass.Backend(...))"
        )
    return dict(options or {})


def _bad_options(message: str) -> ValueError:
    """A ValueError that Dynamo does not wrap, as it wraps every other error of a backend."""
    from torch._dynamo.exc import ShortenTraceback

    class BadOptions(ShortenTraceback, ValueError):
        pass

    return BadOptions(message, first_useful_frame=None)  # type: ignore[call-arg]


def _with_hook(config: dict[str, Any], fusion_pass: FusionPass) -> dict[str, Any]:
    """The configuration with our pass in the hook. The pass runs after the passes that `config` sets, or else after
    those of Inductor's own configuration."""
    from torch._inductor import config as inductor_config

    from fusion_pass.hook import join

    present = config.get(_HOOK, getattr(inductor_config, _HOOK))
    return {**config, _HOOK: join(present, fusion_pass)}


@contextmanager
def _log_of_cached_graphs(fusion_pass: FusionPass) -> Iterator[None]:
    """Logs the INFO line and adds the counts, even if the graph comes from a warm cache and the pass is not called."""
    from fusion_pass.graph_pass import counted, report_cached

    before = counted()
    yield
    if not fusion_pass.calls:
        report_cached(before)
