"""The examples run as they are typed, and fuse every site of the blocks that they compile."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
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


def test_a_lora_and_offload_cost_no_fusion(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    results = run(tmp_path, str(EXAMPLES / "lora_offload.py"))
    # The blocks of the image, those of the captions, and the first again for another number of tokens.
    assert results["graphs"] == 3
    assert results["fused"] == blocks(gated=2, ungated=1)
    assert 0 < results["distance"] < 0.05


def test_blocks_in_comfyuis_style_are_fused(tmp_path: Path) -> None:
    results = run(tmp_path, str(EXAMPLES / "comfyui.py"))
    assert results["fused"] == {"norm_scale": 1, "norm_tanh_mul_add": 1, "norm_tanh_mul_add_norm_scale": 3}
    assert results["graphs"] == 1
    assert results["distance"] < 0.05


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
def test_a_model_split_over_two_processes_is_fused_in_each(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    results = run(tmp_path, *torchrun, str(EXAMPLES / "context_parallel.py"))
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
