"""The examples run as they are typed, and fuse every site of the blocks that they compile."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zimage
from processes import ROOT, run_python

EXAMPLES = ROOT / "examples"


def run(folder: Path, *command: str) -> dict[str, Any]:
    """Runs an example with --json in a process that sees this checkout, and no GPU, and returns what it wrote."""
    output = folder / "results.json"
    run_python(folder, *command, "--json", str(output), HF_HUB_OFFLINE="1")
    return json.loads(output.read_text())


def blocks(gated: int, ungated: int) -> dict[str, int]:
    """Sites of Z-Image blocks that are compiled one by one: two adds, an attention and a SwiGLU in each, and in the
    gated ones a norm in front."""
    both = gated + ungated
    counts = {"norm_scale": gated, "norm_tanh_mul_add": both, "norm_tanh_mul_add_norm_scale": both}
    return {**counts, "qk_norm_rope": both, "silu_mul": both}


# Runs examples in one process, as __main__. To save minutes, Inductor stops behind its passes and generates no code:
# PyTorch runs the graph. The example for ComfyUI, further below, generates code.
WITHOUT_CODE = """
import functools, runpy, sys
from graph_backend import GraphBackend
from torch._inductor import compile_fx as inductor

inductor.compile_fx = functools.partial(inductor.compile_fx, inner_compile=GraphBackend()._stop_after_passes)
folder, *names = sys.argv[1:]
for name in names:
    inductor.torch._dynamo.reset()
    sys.argv = [name, "--json", name + ".json", *(("--steps", "1") if name == "zimage" else ())]
    print(f"--- {name}")
    runpy.run_path(f"{folder}/{name}.py", run_name="__main__")
"""


Results = dict[str, tuple[dict[str, Any], str]]  # what each example wrote with --json, and what it printed


def run_without_code(folder: Path, *names: str, launcher: tuple[str, ...] = ()) -> Results:
    """Runs examples in one process. launcher: the arguments of the interpreter before the program."""
    imports = (EXAMPLES, ROOT / "tests")  # in this order: both have a module zimage
    variables = {"HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "COLUMNS": "80"}
    program = folder / "without_code.py"
    program.write_text(WITHOUT_CODE)
    text = run_python(folder, *launcher, str(program), str(EXAMPLES), *names, imports=imports, **variables)
    printed = dict(part.split("\n", 1) for part in text.split("--- ")[1:])
    return {name: (json.loads((folder / f"{name}.json").read_text()), printed[name]) for name in names}


NEEDED = {"quantized_zimage": ("torchao",), "lora_offload": ("peft", "accelerate")}


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The results of all examples that run in one process, and whose packages are installed."""
    names = ("flux", "qwen_image", "wan", "regional_compile", "quantized_zimage", "lora_offload", "zimage")
    there = [name for name in names if all(map(importlib.util.find_spec, NEEDED.get(name, ())))]
    return run_without_code(tmp_path_factory.mktemp("examples"), *there)


EXPECTED = {
    "flux": {"qk_norm_cat_rope": 1, "qk_norm_rope": 1},
    "qwen_image": {"qk_norm_rope": 2},
    "wan": {"norm_all_heads_rope": 2},
    "regional_compile": {"qk_norm_rope": 2},  # in one of three equal blocks
    "quantized_zimage": zimage.expected_counts(layers=1, refiners=1),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_small_models_are_explained_and_compared_with_eager(name: str, examples: Results) -> None:
    for package in NEEDED.get(name, ()):
        pytest.importorskip(package)
    result, text = examples[name]
    assert result["fused"] == EXPECTED[name]
    assert result["graphs"] == 1
    assert 0 <= result["distance"] < 0.05
    assert text.count("from eager: ") == 1
    assert name != "regional_compile" or result["calls"] == [3]


def test_the_demo_measures_and_ends_with_what_to_do_next(examples: Results) -> None:
    result, text = examples["zimage"]
    assert set(result["results"]) == {"eager", "torch.compile", 'backend="fusion_pass"'}
    counted = [site["kind"] for site in result["report"]["fused"]]
    assert {kind: counted.count(kind) for kind in counted} == zimage.expected_counts(layers=2, refiners=1)
    lines = text.splitlines()
    assert "\x1b" not in text  # a log has no colours, no bar and a line for each step
    assert [line for line in lines if line.endswith(" ...")][-1] == "timing 1 steps of each ..."
    assert [line.partition(":")[0] for line in lines[-4:-1]] == ["In your program", "What it fuses", "More"]
    tables = [line for line in lines if not line.startswith(("The CUDA kernels", "wrote"))]
    assert max(map(len, tables)) <= 100
    assert "…" not in text  # no cell is cut off


def test_a_lora_and_offload_cost_no_fusion(examples: Results) -> None:
    for package in NEEDED["lora_offload"]:
        pytest.importorskip(package)
    result, _ = examples["lora_offload"]
    # The blocks of the image, those of the captions, and the first again for another number of tokens.
    assert result["graphs"] == 3
    assert result["fused"] == blocks(gated=2, ungated=1)
    assert 0 <= result["distance"] < 0.05


# Runs examples with --pretrained, in one process. A small transformer stands in for the checkpoint. Its pipeline checks
# that it gets arguments that the real pipeline takes, calls the transformer and returns two pictures. Nothing is
# compiled: the tests above do that.
PRETRAINED = """
import inspect, sys
from types import SimpleNamespace
import common, diffusers, flux, quantized_zimage, qwen_image, torch, wan, zimage
from PIL import Image

EXAMPLES = {
    flux: ("FluxPipeline", "flux1", "images"),
    qwen_image: ("QwenImagePipeline", "qwen-image", "images"),
    wan: ("WanPipeline", "wan2.1", "frames"),
    zimage: ("ZImagePipeline", "z-image", "images"),
    quantized_zimage: ("ZImagePipeline", "z-image", "images"),
}
called, compiled = [], []


def pipeline(known, model, inputs, result):
    def call(*args, **given):
        inspect.signature(known).bind(None, *args, **given)
        called.append((args, given["num_inference_steps"]))
        for _ in range(given["num_inference_steps"]):
            model(**inputs)
        pictures = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
        return SimpleNamespace(**{result: [pictures] if result == "frames" else pictures})

    call.transformer, call.transformer_2, call.to = model, None, lambda device: call
    return call


torch.nn.Module.compile = lambda module, backend, **_: compiled.append((type(module), backend.kernels))
for module, (name, model, result) in EXAMPLES.items():
    made = pipeline(getattr(diffusers, name).__call__, *common.small_model(model), result)
    getattr(diffusers, name).from_pretrained = lambda path, made=made, **_: made
    explained = []
    common.fusion_pass.explain = lambda *inputs, **named: explained.append(inputs) or common.fusion_pass.FusionReport()
    called.clear(), compiled.clear()
    output = module.__name__ + ".gif"
    sys.argv = [name, "--pretrained", "checkpoint", "--prompt", "fog", "--steps", "3", "--output", output]
    module.main()
    assert len(explained) == 1 and compiled == [(type(made.transformer), "reference")], (name, explained, compiled)
    assert called[0] == (("fog",), 1) and called[-1] == (("fog",), 3), (name, called)
    with Image.open(output) as picture:
        assert picture.n_frames == 2
"""


def test_the_pipelines_are_called_as_diffusers_defines_them_and_what_they_make_is_saved(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    pytest.importorskip("transformers")
    run_python(tmp_path, "-c", PRETRAINED, imports=(EXAMPLES,), HF_HUB_OFFLINE="1")


def test_blocks_in_comfyuis_style_are_fused(tmp_path: Path) -> None:
    results = run(tmp_path, str(EXAMPLES / "comfyui.py"))
    assert results["fused"] == {"norm_scale": 1, "norm_tanh_mul_add": 1, "norm_tanh_mul_add_norm_scale": 3}
    assert results["graphs"] == 1
    assert results["distance"] < 0.05


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
def test_a_model_split_over_two_processes_is_fused_in_each(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    results, _ = run_without_code(tmp_path, "context_parallel", launcher=torchrun)["context_parallel"]
    assert results["processes"] == 2
    # Of each stack the block that splits, and the one that gathers: diffusers' hooks are compiled with them.
    # What attends are all heads of some tokens, so that q and k are exchanged, each for itself.
    expected = blocks(gated=4, ungated=2)
    expected["norm_rope"] = 2 * expected.pop("qk_norm_rope")
    assert results["fused"] == expected
    assert results["distance"]["split"] < 0.05
    assert results["distance"]["split and compiled"] < 0.05


def test_the_comfyui_node_compiles_a_clone_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    helpers = SimpleNamespace(
        set_torch_compile_wrapper=lambda model, **options: calls.append({"model": model, **options})
    )
    monkeypatch.setitem(sys.modules, "comfy_api", SimpleNamespace(torch_helpers=helpers))
    monkeypatch.setitem(sys.modules, "comfy_api.torch_helpers", helpers)
    monkeypatch.syspath_prepend(EXAMPLES)
    import comfyui

    class Patcher:
        def clone(self) -> str:
            return "the clone"

    (node,) = comfyui.NODE_CLASS_MAPPINGS.values()
    assert getattr(node(), node.FUNCTION)(Patcher()) == ("the clone",)
    (call,) = calls
    assert call["model"] == "the clone"
    assert call["backend"] == "fusion_pass"
