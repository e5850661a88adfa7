"""The backend through torch.compile: options, other people's passes, caches, strictness, equality, explain."""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from site_modules import SiteModule, Spec, inputs
from torch._dynamo.utils import counters
from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache
from torch._inductor.codecache import FxGraphCache
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import clear_caches, fresh_cache

import dit_kernels
import fusion_pass
from dit_kernels.warn import warn_once
from fusion_pass import Backend, graph_pass
from fusion_pass.backend import fusion_pass_backend
from fusion_pass.dataflow import module_path
from fusion_pass.graph_pass import FusionPass
from fusion_pass.kinds.modulated_norm import NormTanhMulAddNormScale
from fusion_pass.kinds.norm import NormValue

REFERENCE = Backend(kernels="reference")
DUAL = "norm_tanh_mul_add_norm_scale"


@pytest.fixture
def module() -> SiteModule:
    torch.manual_seed(0)
    return SiteModule(Spec()).eval().requires_grad_(False)


@pytest.fixture
def args() -> tuple[torch.Tensor, ...]:
    return inputs(Spec())


@pytest.fixture(autouse=True, scope="module")
def _compiled_code():
    """The tests share what the C++ compiler makes of generated code, and its headers: that takes most of their time."""
    with fresh_cache():
        yield


@pytest.fixture(autouse=True)
def _fresh_process(_compiled_code: None) -> None:
    """Each test starts as a new process would: warnings that are given once, counters, Inductor's caches of graphs."""
    warn_once.cache_clear()
    counters.clear()
    clear_caches()
    for cache in (FxGraphCache, AOTAutogradCache):
        cache.clear()


def assert_equal(got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


class Recorder(CustomGraphPass):
    """A user's own pass."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.graphs += 1

    def uuid(self) -> str:
        return "recorder"


# --- torch.compile's own arguments -----------------------------------------------------------------------------------


def test_the_backend_is_found_by_name_and_leaves_alone_what_has_no_kernel_here(module, args) -> None:
    if "fusion_pass" not in torch._dynamo.list_backends():
        pytest.skip("fusion-pass is on the path, but not installed: its entry point is not there")
    plain = torch.compile(module)(*args)
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="no kernel for device type cpu"):
        got = torch.compile(module, backend="fusion_pass", fullgraph=True)(*args)
    assert_equal(got, plain)
    assert counters["fusion_pass"]["missed"] == 2
    assert counters["fusion_pass"][DUAL] == 0
    (site, _) = fusion_pass.explain(module, *args).missed
    assert (site.gate, site.scale, site.rounding, site.reason_name) == ("tanh", None, "cast_then_weight", "NO_KERNEL")


@pytest.mark.parametrize("dynamic", (None, False, True))
def test_a_site_through_inductor_is_bit_equal_to_eager(module, args, dynamic) -> None:
    """All of this module is one op: nothing is left to Inductor's own rounding."""
    got = torch.compile(module, backend=REFERENCE, dynamic=dynamic, fullgraph=True)(*args)
    assert_equal(got, module(*args))
    assert counters["fusion_pass"][DUAL] == 1
    assert counters["inductor"][graph_pass.COUNTER_PREFIX + DUAL] == 1


def test_modes_and_options_are_inductors(module, args) -> None:
    for keywords in ({"mode": "max-autotune"}, {"options": {"max_autotune": True}}, {"options": {"freezing": True}}):
        torch._dynamo.reset()
        assert_equal(torch.compile(module, backend=REFERENCE, **keywords)(*args), module(*args))
    for backend in (REFERENCE, "inductor"):
        for bad in ({"no_such_option": 1}, {"max_autotune": "yes"}):
            torch._dynamo.reset()
            with pytest.raises(Exception, match=r"Unexpected (optimization option|type of attr)"):
                torch.compile(module, backend=backend, options=bad)(*args)
        torch._dynamo.reset()
        with pytest.raises(Exception, match="Unrecognized mode"):
            torch.compile(module, backend=backend, mode="fastest")(*args)


def test_a_name_for_the_region_is_accepted_as_torch_2_15_passes_it(module, args) -> None:
    def named(gm, example_inputs):
        return REFERENCE(gm, example_inputs, name="block")

    assert_equal(torch.compile(module, backend=named)(*args), module(*args))


@pytest.mark.parametrize("where", ("options", "config"))
def test_a_users_own_pass_keeps_running_before_ours(module, args, where) -> None:
    recorder = Recorder()
    hook = {"post_grad_custom_pre_pass": recorder}
    if where == "options":
        got = torch.compile(module, backend=REFERENCE, options=hook)(*args)
    else:
        with torch._inductor.config.patch(hook):
            got = torch.compile(module, backend=REFERENCE)(*args)
    assert_equal(got, module(*args))
    assert recorder.graphs == 1
    assert counters["fusion_pass"][DUAL] == 1


def test_a_users_plain_function_keeps_running_too(module, args) -> None:
    seen = []
    hook = {"post_grad_custom_pre_pass": lambda graph: seen.append(len(graph.nodes))}
    assert_equal(torch.compile(module, backend=REFERENCE, options=hook)(*args), module(*args))
    assert len(seen) == 1


def test_the_stock_backend_runs_the_pass_with_our_options(module, args) -> None:
    options = fusion_pass.inductor_options(kernels="reference", mode="max-autotune-no-cudagraphs")
    assert options["max_autotune"] is True
    assert_equal(torch.compile(module, options=options)(*args), module(*args))
    assert counters["fusion_pass"][DUAL] == 1


# --- Backend as a value ----------------------------------------------------------------------------------------------


def test_backends_with_equal_options_are_equal_and_share_compiled_code(module, args) -> None:
    assert Backend() == Backend()
    assert hash(Backend(strict=True)) == hash(Backend(strict=True))
    assert len({Backend(), Backend(rounding="fp32"), Backend(kernels="reference"), Backend(strict=True)}) == 4
    torch.compile(module, backend=Backend(kernels="reference"))(*args)
    torch.compile(module, backend=Backend(kernels="reference"))(*args)
    assert counters["fusion_pass"]["graphs"] == 1


@pytest.mark.parametrize(
    ("argument", "value"), (("rounding", "bf16"), ("kernels", "cuda"), ("strict", "no"), ("rounding", None))
)
def test_a_bad_argument_to_backend_is_a_value_error_that_names_it(argument, value) -> None:
    with pytest.raises(ValueError, match=rf"Backend: {argument} is {value!r}, expected"):
        Backend(**{argument: value})
    with pytest.raises(ValueError, match=argument):
        fusion_pass.inductor_options(**{argument: value})


def test_explain_refuses_what_is_no_model_or_no_backend(module, args) -> None:
    with pytest.raises(ValueError, match="explain: model is 5, expected"):
        fusion_pass.explain(5)
    with pytest.raises(ValueError, match="explain: backend is 'inductor', expected"):
        fusion_pass.explain(module, *args, backend="inductor")


def test_the_entry_point_has_what_dynamo_asks_of_a_backend() -> None:
    fusion_pass_backend.reset()
    assert "post_grad_custom_pre_pass" in fusion_pass_backend.get_compiler_config()
    assert "post_grad_custom_pre_pass" in Backend().get_compiler_config()


# --- the uuid and the caches -----------------------------------------------------------------------------------------


def test_the_uuid_tells_options_apart_and_nothing_else() -> None:
    passes = [FusionPass(), FusionPass("fp32"), FusionPass("model", "reference"), FusionPass(strict=True)]
    assert len({p.uuid() for p in passes}) == len(passes)
    assert FusionPass().uuid() == FusionPass().uuid()


def test_the_uuid_changes_with_every_source_and_with_nothing_else(tmp_path: Path, monkeypatch) -> None:
    packages = [Path(package.__file__).parent for package in (fusion_pass, dit_kernels)]
    assert sorted(graph_pass._PACKAGES) == sorted(packages)

    def copied(place: str) -> list[Path]:
        copies = [tmp_path / place / package.name for package in packages]
        for package, copy in zip(packages, copies, strict=True):
            shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
        monkeypatch.setattr(graph_pass, "_PACKAGES", copies)
        return [source for copy in copies for source in sorted(copy.rglob("*.py"))]

    fingerprint = graph_pass._fingerprint.__wrapped__
    sources, before, blind = copied("here"), fingerprint(), []
    for source in sources:
        source.touch()
    (sources[0].parent / "notes.txt").write_text("no source")
    assert fingerprint() == before
    for source in sources:
        text = source.read_bytes()
        source.write_bytes(text + b"# changed\n")
        if fingerprint() == before:
            blind.append(source)
        source.write_bytes(text)
    assert len(sources) > 50
    assert blind == []
    assert fingerprint() == before
    copied("there")
    assert fingerprint() == before  # wherever the packages lie


PROCESS = """
    import json, logging, sys
    from pathlib import Path
    import torch
    from torch._dynamo.utils import counters
    from torch._functorch import config
    from torch._inductor.utils import fresh_cache
    sys.path.insert(0, {tests!r})
    import fusion_pass
    from site_modules import SiteModule, Spec, inputs

    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    torch._logging.set_logs(modules={{"fusion_pass": logging.INFO}})
    logging.getLogger("fusion_pass").addHandler(handler)
    torch.manual_seed(0)
    module = SiteModule(Spec())

    def compile_and_tell(autograd_cache):
        torch._dynamo.reset(), counters.clear(), lines.clear()
        with torch.no_grad(), config.patch(enable_autograd_cache=autograd_cache):
            got = torch.compile(module, backend=fusion_pass.Backend(kernels="reference"))(*inputs(Spec()))
            equal = all(map(torch.equal, got, module(*inputs(Spec()))))
        called = counters["fusion_pass"]["graphs"]
        counted = counters["fusion_pass"]["norm_tanh_mul_add_norm_scale"]
        hits = {{key: counters["inductor"][key] + counters["aot_autograd"][key] for key in ("fxgraph_cache_hit",
                "fxgraph_cache_miss", "autograd_cache_hit", "autograd_cache_miss", "autograd_cache_bypass")}}
        print(json.dumps({{"equal": equal, "called": called, "counted": counted, "hits": hits, "lines": lines}}))

    compile_and_tell(False), compile_and_tell(True)
    saved = Path({saved!r})
    if saved.exists():
        with fresh_cache():  # an empty folder, as on another machine
            torch.compiler.load_cache_artifacts(saved.read_bytes())
            compile_and_tell(True)
    else:
        saved.write_bytes(torch.compiler.save_cache_artifacts()[0])
"""


def test_a_second_process_compiles_nothing_and_still_tells_what_is_fused(tmp_path: Path) -> None:
    """With the cache of Inductor's graphs alone, with that of autograd's as well, and from torch's cache artifacts."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    script = textwrap.dedent(PROCESS).format(tests=str(Path(__file__).parent), saved=str(tmp_path / "artifacts"))
    command = [sys.executable, "-c", script]
    (cold, _), warm = (
        [json.loads(line) for line in subprocess.check_output(command, env=environment, text=True).splitlines()[-n:]]
        for n in (2, 3)
    )
    assert cold["called"] == 1
    assert cold["lines"] == [f"graph: fused 1 ({DUAL} 1), missed 0"]
    for one, cache in zip(warm, ("fxgraph_cache_hit", "autograd_cache_hit", "autograd_cache_hit"), strict=True):
        assert one["equal"] and cold["equal"]
        assert one["counted"] == cold["counted"] == 1
        assert one["called"] == 0
        assert one["hits"]["fxgraph_cache_miss"] == 0
        assert one["hits"][cache] == 1, one["hits"]
        assert one["lines"] == [f"graph from a warm cache: fused ops in it: 1 ({DUAL} 1)"]


# --- strict, and errors of our own -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ("options", "inductor_options"))
def test_a_setting_of_ours_among_inductors_options_is_a_value_error_that_says_where_it_goes(module, args, form) -> None:
    def compiled() -> None:
        if form == "options":
            torch.compile(module, backend="fusion_pass", options={"rounding": "fp32"})(*args)
        else:
            fusion_pass.inductor_options(options={"rounding": "fp32"})

    with pytest.raises(Exception, match=r"'rounding', expected options of Inductor.*fusion_pass\.Backend"):
        compiled()


def test_a_kernel_that_does_not_compile_costs_its_own_site_only(module, args, monkeypatch) -> None:
    real = graph_pass.eligibility.prepare

    def failing(call):
        if call.op.name == "norm_tanh_mul_add_norm_scale":
            raise RuntimeError("seeded")
        real(call)

    monkeypatch.setattr(graph_pass.eligibility, "kernels_missing", lambda device: None)
    monkeypatch.setattr(graph_pass.eligibility, "prepare", failing)
    with pytest.warns(UserWarning, match=r"no kernel can run here \(RuntimeError: seeded\)"):
        report = fusion_pass.explain(module, *args)
    assert report.counts() == {"norm_tanh_mul_add": 1}
    assert [site.reason_name for site in report.missed] == ["NO_KERNEL"]


@pytest.mark.usefixtures("without_code")
def test_strict_raises_where_a_site_cannot_be_fused(module, args) -> None:
    with pytest.raises(Exception, match=r"fusion_pass \(strict\): .*no kernel can run here"):
        torch.compile(module, backend=Backend(strict=True))(*args)
    torch._dynamo.reset()
    torch.compile(module, backend=Backend(strict=True, kernels="reference"))(*args)


STEPS = (
    "_copied",
    "_is_training",
    "Survey",
    "NormValue.find",
    "NormTanhMulAddNormScale.find",
    "prove",
    "eligibility.check",
    "rewrite",
    "stable_topological_sort",
    "eligibility.prepare",
    "module_path",
    "_warn_if_nothing_fused",
    "FusionReport.to_json",
    "_fingerprint",
)


WITH_CODE = ("rewrite", "_fingerprint")  # to save time, Inductor generates code for these only


@functools.cache
def plain_result(with_code: bool) -> tuple[torch.Tensor, ...]:
    """Of the fixtures `module` and `args`, compiled by Inductor alone, here with or without generated code."""
    torch.manual_seed(0)
    module = SiteModule(Spec()).eval().requires_grad_(False)
    result = torch.compile(module)(*inputs(Spec()))
    torch._dynamo.reset()
    return result


@pytest.mark.parametrize("step", STEPS)
def test_an_error_of_our_own_gives_plain_inductors_result_and_one_warning(
    module, args, step, monkeypatch, request
) -> None:
    if step not in WITH_CODE:
        request.getfixturevalue("without_code")
    plain = plain_result(step in WITH_CODE)
    owner, _, name = step.rpartition(".")
    kinds = {"NormValue": NormValue, "NormTanhMulAddNormScale": NormTanhMulAddNormScale}
    target = kinds.get(owner) or (getattr(graph_pass, owner) if owner else graph_pass)
    original = getattr(target, name)

    def failing(*positional, **named):
        original(*positional, **named)
        raise ZeroDivisionError("seeded")

    monkeypatch.setattr(target, name, failing)
    if step == "stable_topological_sort":  # called only where a reader comes before the call
        monkeypatch.setattr(graph_pass, "reads_too_early", lambda call: True)
    if "eligibility" in step:
        monkeypatch.setattr(graph_pass.eligibility, "kernels_missing", lambda device: None)
    backend = Backend(kernels="auto" if "eligibility" in step else "reference")
    options = {"fx_graph_cache": step == "_fingerprint"}  # another compilation each time, but where uuid() is asked
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = torch.compile(module, backend=backend, options=options)(*args)
        torch._dynamo.reset()
        torch.compile(module, backend=backend, options=options)(*args)
    assert_equal(got, module(*args) if step == "_fingerprint" else plain)
    ours = [str(w.message) for w in caught if "fusion_pass" in str(w.message)]
    assert len(ours) == 1
    assert "ZeroDivisionError: seeded" in ours[0]
    if step == "_fingerprint":  # only keeps the graph from being cached
        return
    assert counters["fusion_pass"][DUAL] == 0
    torch._dynamo.reset()
    strict = Backend(kernels=backend.kernels, strict=True)
    with pytest.raises(Exception, match="seeded"):
        torch.compile(module, backend=strict, options={"fx_graph_cache": False})(*args)


# --- explain ---------------------------------------------------------------------------------------------------------


def test_explain_tells_the_truth_of_a_model_that_is_compiled_already(module, args) -> None:
    compiled = torch.compile(module, backend=REFERENCE)
    compiled(*args)
    first, second = (fusion_pass.explain(compiled, *args, backend=REFERENCE) for _ in range(2))
    assert first.counts() == second.counts() == {DUAL: 1}
    assert first.graphs == second.graphs == 1


@pytest.mark.parametrize("how", ("module.compile()", "a wrapped submodule", "a wrapped forward"))
def test_explain_looks_at_parts_that_are_compiled_already_as_parts(args, how) -> None:
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = SiteModule(Spec(second=False)), SiteModule(Spec(add=False))

        def forward(self, x, residual, gate, scale):
            (y,) = self.a(x, residual, gate, scale)
            return y, *self.b(y, residual, gate, scale)

    model = Model().eval()
    assert fusion_pass.explain(model, *args, backend=REFERENCE).counts() == {DUAL: 1}
    if how == "module.compile()":
        model.a.compile()
    elif how == "a wrapped submodule":
        model.a = torch.compile(model.a)
    else:
        model.a.forward = torch.compile(model.a.forward)
    before = (model.a, model.a._compiled_call_impl, model.a.__dict__.get("forward"))
    report = fusion_pass.explain(model, *args, backend=REFERENCE)
    assert report.counts() == {"norm_tanh_mul_add": 1}
    assert report.graphs == 1
    assert (model.a, model.a._compiled_call_impl, model.a.__dict__.get("forward")) == before


def test_explain_says_how_often_a_block_that_is_compiled_once_is_called(args) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(SiteModule(Spec()) for _ in range(3))

        def forward(self, x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x, *rest)[0]
            return x

    model = Model().eval().requires_grad_(False)
    for block in model.blocks:
        block.compile(backend=REFERENCE)
    report = fusion_pass.explain(model, *args, backend=REFERENCE)
    assert report.graphs == 1
    assert report.calls == [3]
    assert "1 graph compiled, called in turn 3×" in str(report)
    assert json.loads(report.to_json())["calls"] == [3]


@pytest.mark.usefixtures("without_code")
def test_a_graph_with_norms_and_gates_of_which_nothing_is_fused_warns_once(module, args) -> None:
    class Shifted(torch.nn.Module):
        """The gate multiplies something else than a norm."""

        def forward(self, x, residual, gate, scale):
            n = torch.nn.functional.rms_norm(x, x.shape[-1:]) - 1
            return residual + gate.tanh().expand_as(x) * n

    def warned(model: torch.nn.Module) -> int:
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            for _ in range(2):
                torch._dynamo.reset()
                torch.compile(model, backend=REFERENCE)(*args)
        return sum("norms and gates, and nothing of it was fused" in str(w.message) for w in caught)

    assert warned(module) == 0
    assert warned(Shifted()) == 1


def test_explain_reads_and_writes_no_cache(module, args, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for _ in range(2):
        counters.clear()
        assert fusion_pass.explain(module, *args, backend=REFERENCE).counts() == {DUAL: 1}
        assert counters["inductor"]["fxgraph_cache_hit"] == counters["inductor"]["fxgraph_cache_miss"] == 0
        assert counters["aot_autograd"]["autograd_cache_hit"] == counters["aot_autograd"]["autograd_cache_miss"] == 0


def test_explain_calls_the_model_once_with_the_given_arguments(args) -> None:
    calls = []

    class Model(SiteModule):
        def forward(self, *positional, named=None):
            calls.append(named)
            return super().forward(*positional)

    report = fusion_pass.explain(Model(Spec()).eval(), *args, backend=REFERENCE, named="x")
    assert report.counts() == {DUAL: 1}
    assert len(calls) == 1


def test_explain_says_that_it_looked_without_gradients_where_the_caller_has_them(module, args) -> None:
    with torch.enable_grad():
        assert "without gradients" in str(fusion_pass.explain(module, *args, backend=REFERENCE))
    with torch.no_grad():
        assert fusion_pass.explain(module, *args, backend=REFERENCE).note == ""


@pytest.mark.parametrize("columns", ("auto", "20", ""))
def test_a_report_prints_whatever_the_terminal_says_of_its_width(columns: str, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert "Fused: 0" in str(fusion_pass.FusionReport())


def test_a_model_in_training_is_not_fused_and_the_report_says_why(args) -> None:
    report = fusion_pass.explain(SiteModule(Spec()).train(), *args, backend=REFERENCE)
    assert report.fused == []
    assert {site.reason_name for site in report.missed} == {"TRAINING"}


# --- what is said ----------------------------------------------------------------------------------------------------


def test_one_info_line_a_graph_and_the_detail_at_debug(module, args, caplog) -> None:
    with caplog.at_level(logging.DEBUG, logger="fusion_pass"):
        fusion_pass.explain(module, *args, backend=REFERENCE)
    infos = [r.getMessage() for r in caplog.records if r.name == "fusion_pass" and r.levelno == logging.INFO]
    debugs = [r.getMessage() for r in caplog.records if r.name == "fusion_pass" and r.levelno == logging.DEBUG]
    assert infos == [f"graph: fused 1 ({DUAL} 1), missed 0"]
    assert len(debugs) == 1
    assert "site_modules.py:" in debugs[0]


def test_the_report_is_an_artifact_of_torchs_structured_trace(module, args, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(
        graph_pass, "trace_structured", lambda kind, metadata_fn, payload_fn: seen.append((metadata_fn(), payload_fn()))
    )
    fusion_pass.explain(module, *args, backend=REFERENCE)
    ((metadata, payload),) = seen
    assert metadata == {"name": "fusion_pass_report", "encoding": "json"}
    assert json.loads(payload)["fused"][0]["kind"] == DUAL


@pytest.mark.parametrize(
    ("traced", "path"),
    [
        ("L['self']._modules['layers']._modules['0']._modules['norm']", "layers.0.norm"),
        ("L['self'].layers[0].norm", "layers.0.norm"),
        ("L['fn'].forward.func.__closure__[0].cell_contents.forward.__self__._modules['norm']", "norm"),
    ],
)
def test_a_module_is_named_by_its_place_in_the_model(traced: str, path: str) -> None:
    node = torch.fx.Graph().placeholder("x")
    node.meta["nn_module_stack"] = {"norm": (traced, torch.nn.Module)}
    assert module_path(node) == path


def test_the_report_is_a_table_and_json(module, args) -> None:
    report = fusion_pass.explain(module, *args, backend=REFERENCE)
    (site,) = json.loads(report.to_json())["fused"]
    assert site["kind"] == DUAL
    assert (site["gate"], site["scale"], site["rounding"]) == ("tanh", "one_plus", "cast_then_weight")
    assert (site["shape"], site["dtype"]) == ([2, 6, 32], "bfloat16")
    assert "site_modules.py" in site["source"]
    assert DUAL in str(report)
    assert "Missed: 0" in str(report)
