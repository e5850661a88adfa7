"""The benchmark of whole models: every row is complete, an error is a row, and joined results keep the newer row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT, run_python
from zimage import expected_counts

pytestmark = pytest.mark.xdist_group("bench_zoo")

HEADER = {"date", "gpu", "commit", "versions", "options", "rows"}
OPTIONS = {"batch", "dynamic", "per_block", "mode", "coordinate_descent", "steps", "small"}
IDENTITY = {"model", "title", "precision", "layers", "sizes", "options", "pairs", "date", "gpu", "commit", "versions"}
TIMES = {"eager_ms", "eager_peak_bytes", "torch.compile", "fusion_pass", "speedup", "from_fp32"}
ROW = IDENTITY | TIMES | {"parameters", "fused", "missed", "graphs", "same_code", "error", "seconds"}
VARIANT = {"ms", "step_ms", "first_call_s", "peak_bytes", "distance", "distances", "equal", "kernels_ms", "kernels"}
PAIRS = 4
OLD, NEW = "2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00"
# This program runs in its own process, because the examples and the tests each have a module `zimage`. To save time,
# Z-Image has one block, and Inductor generates scalar code. A model without a site takes the place of SD3.5.
DRIVER = f"""
import json
from dataclasses import replace
from pathlib import Path
import diffusers
import torch._inductor.config
import bench_zoo

def fail(*_):
    raise RuntimeError("no room")

class Plain(torch.nn.Module):
    def __init__(self, num_layers):
        super().__init__()
        self.layer = torch.nn.Linear(64, 64)

    def forward(self, x, return_dict):
        return (torch.nn.functional.gelu(self.layer(x)).softmax(-1),)

def of_plain(draw, model, sizes):
    return dict(x=draw.normal(32, 64))

diffusers.Plain = Plain

torch._inductor.config.cpp.simdlen = 1
zimage = bench_zoo.MODELS["z-image"]
short = dict(layers=dict(n_layers=1), small=dict(zimage.small, n_refiner_layers=0))
bench_zoo.MODELS["z-image"] = replace(zimage, **short)
sd3 = bench_zoo.MODELS["sd3.5"]
bench_zoo.MODELS["sd3.5"] = replace(sd3, class_name="Plain", small={{}}, make_inputs=of_plain)
bench_zoo.MODELS["flux1"] = replace(bench_zoo.MODELS["flux1"], make_inputs=fail)
try:
    bench_zoo.main("--small --models z-image,flux1,sd3.5 --pairs {PAIRS} --from-fp32 --json zoo.json".split())
except SystemExit as stop:
    Path("stop.txt").write_text(str(stop))

results = json.loads(Path("zoo.json").read_text())
for name, date, gpu, rows in (("a", "{NEW}", "one", 2), ("b", "{OLD}", "one", 3), ("c", "{OLD}", "other", 3)):
    said = dict(date=date, gpu=gpu)
    rows = [dict(row, **said) for row in results["rows"][:rows]]
    Path(name + ".json").write_text(json.dumps(dict(results, **said, rows=rows)))
bench_zoo.main("--merge a.json b.json c.json --json merged.json".split())

class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bf16, self.fp32, self.of_time = (torch.nn.Linear(64, 64, dtype=dtype) for dtype in DTYPES)

    def forward(self, x, t):
        return self.bf16(x), self.fp32(x.float()), self.of_time(t)

DTYPES = (torch.bfloat16, torch.float32, torch.bfloat16)
layers = Layers()
arguments = dict(x=torch.zeros(2, 9, 64).bfloat16(), t=torch.zeros(2, 64).bfloat16())
bench_zoo.quantize(layers, "int8", False, arguments)
quantised = [name for name, layer in layers.named_children() if type(layer.weight) is not torch.nn.Parameter]
Path("int8.json").write_text(json.dumps(quantised))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds zoo.json: results of Z-Image, of a model that fails, and of one without a site. And merged.json: joined
    from results of two GPUs, of one of them at two dates, where the newer lack the last model."""
    folder = tmp_path_factory.mktemp("zoo")
    run_python(folder, "-c", DRIVER, imports=(ROOT / "examples",), OMP_NUM_THREADS="1")
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "zoo.json").read_text())


def row(results: dict[str, Any], model: str) -> dict[str, Any]:
    (found,) = (row for row in results["rows"] if row["model"] == model)
    return found


def test_the_results_and_each_row_have_every_field(results: dict[str, Any]) -> None:
    assert set(results) >= HEADER
    assert set(results["options"]) == OPTIONS
    assert set(results["versions"]) >= {"torch", "diffusers", "torchao", "nvidia-cutlass-dsl"}
    assert [row["model"] for row in results["rows"]] == ["z-image", "flux1", "sd3.5"]
    assert all(set(row) == ROW for row in results["rows"])
    for model in ("z-image", "sd3.5"):
        complete = row(results, model)
        empty = {name for name, value in complete.items() if value is None}
        assert empty <= {"error", "gpu", "commit", "eager_peak_bytes"}  # no GPU; no history
        for variant in (complete["torch.compile"], complete["fusion_pass"]):
            assert set(variant) == VARIANT
            assert len(variant["step_ms"]) == PAIRS
            assert 0 < variant["distance"] < 0.05
            assert len(set(variant["distances"])) == 5  # one for each seed
            assert set(variant["kernels_ms"]) == {"matmul", "attention", "ours", "rest"}


def test_the_distances_from_fp32_are_recorded_for_each_seed(results: dict[str, Any]) -> None:
    for model in ("z-image", "sd3.5"):
        distances = row(results, model)["from_fp32"]
        assert set(distances) == {"bf16", "eager", "torch.compile", "fusion_pass"}
        assert all(len(set(each)) == 5 and 0 < min(each) <= max(each) < 0.05 for each in distances.values())
        assert distances["eager"] == distances["bf16"]  # nothing is quantised


def test_layers_of_few_rows_and_of_fp32_are_not_quantised_to_int8(folder: Path) -> None:
    assert json.loads((folder / "int8.json").read_text()) == ["bf16"]


def test_the_sites_of_z_image_are_counted_and_where_nothing_is_fused_the_code_is_plain(results: dict[str, Any]) -> None:
    zimage, sd3 = row(results, "z-image"), row(results, "sd3.5")
    assert zimage["fused"] == expected_counts(layers=1, refiners=0)
    assert zimage["graphs"] == 1
    assert not zimage["same_code"]
    assert sd3["fused"] == {}
    assert sd3["same_code"]


def test_z_image_through_inductor_is_as_near_to_eager_as_plain_inductor(results: dict[str, Any]) -> None:
    zimage = row(results, "z-image")
    assert zimage["fusion_pass"]["distance"] <= 1.2 * zimage["torch.compile"]["distance"]


def test_a_model_that_fails_is_a_row_with_its_error_and_the_next_one_runs(
    results: dict[str, Any], folder: Path
) -> None:
    assert "FLUX.1 failed" in (folder / "stop.txt").read_text()
    failed = row(results, "flux1")
    assert failed["error"] == "RuntimeError: no room"
    assert failed["layers"] == {"num_layers": 1, "num_single_layers": 1}
    assert failed["speedup"] is None
    assert row(results, "sd3.5")["error"] is None


def test_the_intervals_contain_the_median_and_the_wider_one_the_other(results: dict[str, Any]) -> None:
    for model in ("z-image", "sd3.5"):
        speed = row(results, model)["speedup"]
        low, high = speed["interval_95"]
        assert low <= speed["median"] <= high
        assert speed["interval_999"][0] <= low
        assert speed["interval_999"][1] >= high


def test_joined_results_keep_the_newer_row_and_the_rows_of_each_gpu(folder: Path) -> None:
    merged = json.loads((folder / "merged.json").read_text())
    dates = {(row["model"], row["gpu"]): row["date"] for row in merged["rows"]}
    assert len(merged["rows"]) == 6
    assert dates == {
        **{(model, "one"): NEW for model in ("z-image", "flux1")},
        ("sd3.5", "one"): OLD,
        **{(model, "other"): OLD for model in ("z-image", "flux1", "sd3.5")},
    }
    assert merged["date"] == NEW
