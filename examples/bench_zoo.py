"""Times popular diffusion transformers, plain torch.compile and backend="fusion_pass" in turn.

    python examples/bench_zoo.py --json out/zoo.json --plot out/zoo.svg
    python examples/bench_zoo.py --models z-image,flux1 --fp8 --coordinate-descent --json out/zoo_fp8.json
    python examples/bench_zoo.py --models z-image --fp8 --size pixels=512 --steps 4 --json out/zoo_512.json
    python examples/bench_zoo.py --merge out/zoo.json out/zoo_fp8.json --json out/all.json --plot out/all.svg

The models (zoo_models.py) are diffusers' own, as wide as the published ones and with as many tokens, but with few
layers and random weights. A row tells how many times as fast a step is, with its intervals; where the GPU's time goes;
how far each variant is from eager, on average over five inputs; what was fused; and whether the generated code is plain
torch.compile's, as it should be where nothing is fused. A model that fails becomes a row with its error. Results are
written after each model.

Needs a GPU that the kernels run on; --small runs tiny models on the CPU, with the ops run by their PyTorch definitions.
--fp8 and --int8 need torchao, which by itself also turns coordinate descent tuning on; here that is an option, for both
variants. torchao's weights take the host several milliseconds a step. By default a time is that of one step alone, and
the GPU waits that long. In a denoising run the host is ahead of the GPU, as it is with --steps 4.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from bench_zimage import MODES, kernel_ms, sharing_weights
from common import distance, register_backend
from rich.console import Console
from rich.table import Table
from timing import alternate, console, environment, first_look, progress, run_step, speedup, time_step
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.graph import GraphLowering
from torch.utils._pytree import tree_map_only
from zoo_models import MODELS, Arguments, ZooModel

import fusion_pass
from dit_kernels.versions import installed_version
from fusion_pass.environment import why_no_kernels

PLAIN, FUSED = "torch.compile", "fusion_pass"
FP8_MODELS = ("z-image", "flux1")  # what --fp8 and --int8 run where no models are named
LEVELS = {"interval_95": 0.95, "interval_999": 0.999}
CLASSES = ("matmul", "attention", "ours", "rest")  # of kernels
RESAMPLES = 20_000
SEEDS = range(1, 6)  # of the inputs whose outputs are compared with eager's
# What each row has from its measurement; None where it failed.
MEASURED = (
    "parameters",
    "eager_ms",
    "eager_peak_bytes",
    PLAIN,
    FUSED,
    "speedup",
    "from_fp32",
    "fused",
    "missed",
    "graphs",
    "same_code",
)

Row = dict[str, Any]
Results = dict[str, Any]
Tell = Callable[[str], None]

wide = Console(width=max(170, console.width))  # what the tables need, also where there is no terminal


# --- one model --------------------------------------------------------------------------------------------------------


class Step:
    """One forward pass, called as zimage.py calls its model, so that timing.py times any model.

    They pass on the inputs, of which they read the device alone, and flatten and join the outputs.
    """

    def __init__(self, call: Callable[..., Any], arguments: Arguments):
        self.call, self.arguments = call, arguments

    def __call__(self, *_: Any, return_dict: bool = False) -> tuple[list[Tensor]]:
        outputs = self.call(**self.arguments, return_dict=return_dict)
        return ([tensor for each in outputs for tensor in (each if isinstance(each, list) else (each,))],)


def quantize(model: nn.Module, precision: str, recommended_settings: bool, arguments: Arguments) -> None:
    """FP8 or int8 weights, and inputs that are quantised row by row: torchao's, in every linear layer it can take.

    A layer whose weight is not bf16, as in Wan's time embedding, stays as it is: FP8 is refused there. In int8, so does
    a layer that reads few rows when the model is called with `arguments`.
    """
    from torchao import quantization

    if precision == "fp8":
        config = quantization.Float8DynamicActivationFloat8WeightConfig(
            granularity=quantization.PerRow(), set_inductor_config=recommended_settings
        )
    else:
        config = quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=recommended_settings)
    skipped = layers_of_few_rows(model, arguments) if precision == "int8" else set()

    def can_be_quantised(module: nn.Module, _: str) -> bool:
        return isinstance(module, nn.Linear) and module.weight.dtype == torch.bfloat16 and module not in skipped

    quantization.quantize_(model, config, can_be_quantised)
    torch._inductor.config.fx_graph_cache = False  # which the recommended settings turn on


def layers_of_few_rows(model: nn.Module, arguments: Arguments) -> set[nn.Module]:
    """The linear layers that read fewer than the 17 rows that torch._int_mm needs, in one forward pass."""
    found: set[nn.Module] = set()

    def check(module: nn.Module, _: Any, output: Tensor) -> None:
        if output.shape[:-1].numel() < 17:
            found.add(module)

    hooks = [module.register_forward_hook(check) for module in model.modules() if isinstance(module, nn.Linear)]
    model(**arguments)
    for hook in hooks:
        hook.remove()
    return found


def widened(arguments: Arguments) -> Arguments:
    """The same inputs, those of floating point in fp32."""
    return tree_map_only(Tensor, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor, arguments)


@contextmanager
def inductor_settings(coordinate_descent: bool) -> Iterator[None]:
    """Inductor's settings for one model. On exit all are as before, torchao's too.

    Graphs come from no cache: their code is compared, and what was fused is counted while they are compiled. Triton's
    kernels may come from one.
    """
    config = torch._inductor.config
    before = config.save_config_portable(ignore_private_configs=False)
    autograd_cache = torch._functorch.config.patch(enable_autograd_cache=False)
    try:
        with autograd_cache:
            config.coordinate_descent_tuning = coordinate_descent
            config.fx_graph_cache = False
            yield
    finally:
        config.load_config(before)


@contextmanager
def generated_code(into: list[str]) -> Iterator[None]:
    """Collects the code that Inductor generates, graph by graph, without its comments, which number the graphs."""

    def save(code: str) -> None:
        into.append("\n".join(line for line in code.splitlines() if not line.lstrip().startswith(("#", "//"))))

    with mock.patch.object(GraphLowering, "save_output_code", save):
        yield


def compiled(model: Any, backend: Any, options: Mapping[str, Any]) -> Callable[..., Any]:
    """The model, compiled as the options say. The variants share their weights."""
    settings = {"backend": backend, "mode": options["mode"], "dynamic": True if options["dynamic"] else None}
    if not options["per_block"]:
        return torch.compile(model, **settings)
    ours = sharing_weights(model)
    ours.compile_repeated_blocks(**settings)
    return ours


def kernel_class(name: str) -> str:
    """Which of CLASSES a kernel is, by its name in the profiler."""
    if "dit_kernels" in name:
        return "ours"
    name = name.lower()
    if name.startswith("triton_") and not name.startswith("triton_tem"):
        return "rest"  # named after the ops in it, or behind it: an attention's name there says nothing
    if any(part in name for part in ("sdpa", "flash", "fmha", "attention")):
        return "attention"
    matmuls = ("nvjet", "gemm", "gemv", "cutlass", "cublas", "xmma", "splitk", "triton_tem", "scaled_mm", "dot_kernel")
    return "matmul" if any(part in name for part in matmuls) else "rest"


def by_class(kernels: Mapping[str, float]) -> dict[str, float]:
    totals = dict.fromkeys(CLASSES, 0.0)
    for name, ms in kernels.items():
        totals[kernel_class(name)] += ms
    return totals


def bootstrap(ratios: Sequence[float]) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap intervals of the median, by level: medians of samples drawn anew from the ratios."""
    values = np.asarray(ratios)
    picks = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    medians = np.median(values[picks], axis=1)
    bounds = {name: np.quantile(medians, [(1 - level) / 2, (1 + level) / 2]) for name, level in LEVELS.items()}
    return {name: (float(low), float(high)) for name, (low, high) in bounds.items()}


def times_as_fast(plain: Sequence[float], fused: Sequence[float]) -> dict[str, Any]:
    """How many times as fast the fused steps are, pair by pair: the median, and its intervals."""
    ratios = [before / after for before, after in zip(plain, fused, strict=True)]
    return {"median": speedup(plain, fused)["median"], **bootstrap(ratios)}


def measure(
    spec: ZooModel,
    layers: Mapping[str, int],
    sizes: Mapping[str, int],
    options: Mapping[str, Any],
    precision: str,
    pairs: int,
    from_fp32: bool,
    tell: Tell,
) -> Row:
    """One model: what MEASURED names."""
    small, mode = options["small"], options["mode"]
    device = "cpu" if small else "cuda"
    tell("building")
    model = spec.build(layers, small, device)
    row: Row = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    arguments = spec.inputs(model, sizes, options["batch"], device)
    inputs: Any = ([], torch.zeros((), device=device), [])

    def outputs(call: Callable[..., Any], change: Callable[[Arguments], Arguments] = lambda same: same) -> list[Tensor]:
        """One for each seed."""
        drawn = (spec.inputs(model, sizes, options["batch"], device, seed) for seed in SEEDS)
        return [run_step(Step(call, change(arguments)), inputs).float() for arguments in drawn]

    if from_fp32:
        tell("fp32")
        exact = outputs(copy.deepcopy(model).float(), widened)
        row["from_fp32"] = {"bf16": [distance(*pair) for pair in zip(outputs(model), exact, strict=True)]}
    if precision != "bf16":
        quantize(model, precision, options["coordinate_descent"], arguments)
    # First eager: some models build their tables of rotations in their first pass, which would break the graph.
    tell("eager")
    eager = Step(model, arguments)
    result, _ = first_look(eager, inputs, "default")
    references = outputs(model)
    if not all(bool(reference.isfinite().all()) for reference in references):
        raise ArithmeticError("eager's output is not finite")
    if from_fp32:
        row["from_fp32"]["eager"] = [distance(*pair) for pair in zip(references, exact, strict=True)]
    eager_ms = [time_step(eager, inputs, not small) for _ in range(5)]
    row |= {"eager_ms": statistics.median(eager_ms), "eager_peak_bytes": result.peak_bytes}
    codes: dict[str, list[str]] = {PLAIN: [], FUSED: []}
    steps: dict[str, Step] = {}
    counters["fusion_pass"].clear()
    backends = {PLAIN: "inductor", FUSED: fusion_pass.Backend(kernels="reference") if small else "fusion_pass"}
    for name, backend in backends.items():
        tell(f"compiling with {name}")
        steps[name] = Step(compiled(model, backend, options), arguments)
        with generated_code(codes[name]):
            result, _ = first_look(steps[name], inputs, mode)
        compared = [*zip(outputs(steps[name].call), references, strict=True)]
        distances = [distance(*pair) for pair in compared]
        if from_fp32:
            pairs_of_outputs = zip((output for output, _ in compared), exact, strict=True)
            row["from_fp32"][name] = [distance(*pair) for pair in pairs_of_outputs]
        kernels = {} if small else kernel_ms(steps[name], inputs)
        row[name] = {
            "first_call_s": result.first_call_s,
            "peak_bytes": result.peak_bytes,
            "distance": statistics.mean(distances),
            "distances": distances,
            "equal": statistics.mean(float((output == reference).float().mean()) for output, reference in compared),
            "kernels_ms": by_class(kernels),
            "kernels": dict(sorted(kernels.items(), key=lambda item: -item[1])[:25]),
        }
        del compared  # so that the next variant has as much room
    counts = dict(counters["fusion_pass"])
    row["fused"] = {name: n for name, n in sorted(counts.items()) if hasattr(torch.ops.dit_kernels, name)}
    row |= {"missed": counts.get("missed", 0), "graphs": counts.get("graphs", 0)}
    row["same_code"] = codes[PLAIN] == codes[FUSED]
    tell(f"timing {pairs} pairs")
    for name, times in zip(
        steps, alternate(steps[PLAIN], steps[FUSED], inputs, pairs, steps=options["steps"]), strict=True
    ):
        row[name] |= {"ms": statistics.median(times), "step_ms": [round(ms, 4) for ms in times]}
    row["speedup"] = times_as_fast(row[PLAIN]["step_ms"], row[FUSED]["step_ms"])
    return row


def release() -> None:
    """Gives back what the model before took."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_model(name: str, header: Results, args: argparse.Namespace, tell: Tell) -> Row:
    """The row of a model, also where it fails: then with an error."""
    spec, start = MODELS[name], time.perf_counter()
    row: Row = {
        "model": name,
        "title": spec.title,
        "precision": precision_of(args),
        "layers": None,
        "sizes": spec.with_sizes(args.size, args.small),
        "options": header["options"],
        "pairs": args.pairs,
        "date": now(),
        "gpu": header["gpu"],
        "commit": header["commit"],
        "versions": header["versions"],
        "error": None,
        **dict.fromkeys(MEASURED),
    }
    try:
        row["layers"] = spec.with_layers(args.layers or ("1" if args.small else None))
        with inductor_settings(args.coordinate_descent), torch.no_grad():
            given = (row[name] for name in ("layers", "sizes", "options", "precision", "pairs"))
            row |= measure(spec, *given, args.from_fp32, tell)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}".strip()[:2000]
    release()
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


# --- results ----------------------------------------------------------------------------------------------------------


def precision_of(args: argparse.Namespace) -> str:
    return "fp8" if args.fp8 else "int8" if args.int8 else "bf16"


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def header_of(args: argparse.Namespace) -> Results:
    """What holds for all rows of a run."""
    header = environment("cpu" if args.small else "cuda")
    header["versions"]["torchao"] = installed_version("torchao") or None
    header["commit"] = args.commit or header["commit"]
    names = ("batch", "dynamic", "per_block", "mode", "coordinate_descent", "steps", "small")
    return header | {"options": {name: getattr(args, name) for name in names}}


def write(path: Path, results: Results) -> None:
    """Whole or not at all: a run that is cut off leaves the rows of the models before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    draft.replace(path)


def key(row: Row) -> str:
    """Rows with one key are measurements of the same: of one model, precision, size, set of options and GPU."""
    options = {"steps": 1} | row["options"]  # results of before 2026-11-27 do not name the steps
    return json.dumps(
        [*(row[name] for name in ("model", "precision", "layers", "sizes", "gpu")), options], sort_keys=True
    )


def merge(runs: Sequence[Results]) -> Results:
    """One run of several: of two rows with one key the newer wins. What holds for all rows is the newest run's."""
    rows: dict[str, Row] = {}
    for row in (row for run in runs for row in run["rows"]):
        if key(row) not in rows or instant(row) >= instant(rows[key(row)]):
            rows[key(row)] = row
    order = list(MODELS)

    def place(row: Row) -> tuple[Any, ...]:
        known = order.index(row["model"]) if row["model"] in order else len(order)
        return known, row["model"], row["precision"], key(row)

    newest = max(runs, key=instant)
    gpus = sorted({row["gpu"] for row in rows.values() if row["gpu"]})
    return newest | {"gpu": ", ".join(gpus) or None, "rows": sorted(rows.values(), key=place)}


def instant(dated: Mapping[str, Any]) -> datetime:
    return datetime.fromisoformat(dated["date"])


def label(row: Row) -> str:
    """The model, and what sets the row apart from those of the usual options."""
    options = row["options"]
    words = [row["title"]]
    if row["precision"] != "bf16":
        words.append(row["precision"].upper())
    usual = MODELS[row["model"]].sizes if row["model"] in MODELS and not options["small"] else row["sizes"]
    words += [f"{name} {number}" for name, number in row["sizes"].items() if number != usual.get(name)]
    if options["batch"] > 1:
        words.append(f"batch {options['batch']}")
    words += [
        word.replace("_", " ") for word in ("dynamic", "per_block", "coordinate_descent", "small") if options[word]
    ]
    if options["mode"] != "default":
        words.append(options["mode"])
    if options.get("steps", 1) > 1:
        words.append(f"{options['steps']} steps")
    return ", ".join(words)


def tables(results: Results) -> list[Table]:
    """The steps, and where their time goes. a → b is plain torch.compile's and ours."""
    several = len({row["gpu"] for row in results["rows"]}) > 1
    names = ("model", "GPU") if several else ("model",)
    where = "" if several else f" on {results['gpu'] or 'the CPU'}"
    steps = Table(*names, "layers", title=f"one forward pass{where}: {PLAIN} → {FUSED}")
    for column in ("eager ms", "ms", "times as fast", "95%", "99.9%", "peak GiB", "from eager"):
        steps.add_column(column, no_wrap=True)
    kernels = Table(*names, title=f"ms of its kernels{where}: {PLAIN} → {FUSED}")
    for column in (*CLASSES, "fused"):
        kernels.add_column(column, no_wrap=column != "fused")
    for row in results["rows"]:
        named = (label(row), row["gpu"] or "–")[: len(names)]
        layers = "+".join(str(number) for number in (row["layers"] or {}).values())
        if row["error"] is not None:
            steps.add_row(*named, layers, "[red]failed[/red]")
            continue
        plain, fused, speed = row[PLAIN], row[FUSED], row["speedup"]
        on_gpu = plain["peak_bytes"] is not None
        steps.add_row(
            *named,
            layers,
            f"{row['eager_ms']:.2f}",
            arrow(plain["ms"], fused["ms"]),
            f"{speed['median']:.3f}",
            *(f"{low:.3f} to {high:.3f}" for low, high in (speed[name] for name in LEVELS)),
            arrow(plain["peak_bytes"] / 2**30, fused["peak_bytes"] / 2**30) if on_gpu else "–",
            f"{plain['distance']:.2e} → {fused['distance']:.2e}",
        )
        sites = ", ".join(f"{name} {count}" for name, count in row["fused"].items())
        kernels.add_row(
            *named,
            *(arrow(plain["kernels_ms"][name], fused["kernels_ms"][name]) if on_gpu else "–" for name in CLASSES),
            sites or ("none, and the same code" if row["same_code"] else "[red]none, but other code[/red]"),
        )
    return [steps, kernels]


def arrow(before: float, after: float) -> str:
    return f"{before:.2f} → {after:.2f}"


def plot(results: Results, path: Path) -> None:
    """Times as fast by model: the median, the 95% interval as a bar and the 99.9% interval as a line."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "fusion-pass"  # the same numbers give the same file
    import matplotlib.pyplot as plt

    rows = [row for row in results["rows"] if row["error"] is None]
    labels = list(dict.fromkeys(label(row) for row in rows))
    gpus = list(dict.fromkeys(row["gpu"] or "CPU" for row in rows))
    figure, axes = plt.subplots(figsize=(8, 1.6 + 0.36 * len(labels)), layout="constrained")
    seen: set[str] = set()
    for row in rows:
        gpu = row["gpu"] or "CPU"
        which = gpus.index(gpu)
        at = labels.index(label(row)) + 0.22 * (which - (len(gpus) - 1) / 2)
        colour, speed = f"C{which}", row["speedup"]
        axes.plot(speed["interval_999"], [at, at], color=colour, linewidth=1)
        axes.plot(speed["interval_95"], [at, at], color=colour, linewidth=4, alpha=0.5, solid_capstyle="butt")
        axes.plot(speed["median"], at, "o", color=colour, markersize=4, label=None if gpu in seen else gpu)
        seen.add(gpu)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set(xlabel=f"times as fast as {PLAIN} (bar: 95% interval, line: 99.9%)")
    if rows:
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


# --- the command line -------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> Results:
    """All models, one after the other."""
    results = header_of(args) | {"rows": []}
    torch._dynamo.config.recompile_limit = 64  # two variants share the code of a block, which has several shapes
    with progress(total=len(args.models)) as display:
        for name in args.models:
            title = MODELS[name].title
            row = run_model(name, results, args, lambda text, title=title: display.tell(f"{title}: {text}"))
            results["rows"].append(row)
            if args.json:
                write(args.json, results)
            display.done()
            console.print(summary(row), soft_wrap=True)
    return results


def summary(row: Row) -> str:
    if row["error"] is not None:
        return f"[red]{row['title']} failed after {row['seconds']:.0f} s:[/red] {row['error']}"
    low, high = row["speedup"]["interval_999"]
    return (
        f"{label(row)}: {arrow(row[PLAIN]['ms'], row[FUSED]['ms'])} ms, {row['speedup']['median']:.3f} times as fast "
        f"(99.9%: {low:.3f} to {high:.3f}), {sum(row['fused'].values())} sites, in {row['seconds']:.0f} s"
    )


def size(text: str) -> tuple[str, int]:
    """ "pixels=512" as a name and a number."""
    name, _, number = text.partition("=")
    if not number.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=NUMBER, like pixels=512")
    return name, int(number)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", help=f"separated by commas, of {','.join(MODELS)} (all; with --fp8 {','.join(FP8_MODELS)})"
    )
    parser.add_argument("--layers", metavar="N[+M]", help="layers of each sort, other than the usual few")
    parser.add_argument("--batch", type=int, default=1, help="images or videos at once (%(default)s)")
    parser.add_argument("--pairs", type=int, default=40, help="steps of each compiled variant (%(default)s)")
    parser.add_argument("--steps", type=int, default=1, help="steps without a wait in each time (%(default)s)")
    parser.add_argument(
        "--size", type=size, action="append", default=[], help="of the input, as pixels=512; repeatable"
    )
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--fp8", action="store_true", help="linear layers in FP8, by torchao; else bf16")
    precision.add_argument("--int8", action="store_true", help="linear layers in int8, by torchao; else bf16")
    parser.add_argument("--coordinate-descent", action="store_true", help="Inductor's coordinate descent tuning (slow)")
    parser.add_argument("--from-fp32", action="store_true", help="record how far all are from the model in fp32, too")
    parser.add_argument("--dynamic", action="store_true", help="compile for any shapes")
    parser.add_argument("--per-block", action="store_true", help="compile the repeated blocks, not the whole model")
    parser.add_argument("--mode", default="default", choices=MODES, help="torch.compile's, for both variants")
    parser.add_argument(
        "--small", action="store_true", help="tiny models on the CPU: shows that all runs, times nothing"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, after each model")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw them (needs matplotlib)")
    parser.add_argument("--commit", help="to be recorded where the checkout has no history")
    parser.add_argument(
        "--merge", type=Path, nargs="+", metavar="FILE", help="measure nothing: join results, newer rows win"
    )
    args = parser.parse_args(argv)
    args.models = args.models.split(",") if args.models else list(FP8_MODELS if args.fp8 or args.int8 else MODELS)
    for name in args.models:
        if name not in MODELS:
            parser.error(f"--models: no {name}, only {', '.join(MODELS)}")
        try:
            MODELS[name].with_layers(args.layers)
        except ValueError as error:
            parser.error(f"--layers: {error}")
        try:
            MODELS[name].with_sizes(args.size, args.small)
        except ValueError as error:
            parser.error(f"--size: {error}")
    for name in ("batch", "pairs", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib")
    if args.merge and not args.json and not args.plot:
        parser.error("--merge needs --json or --plot")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.merge:
        results = merge([json.loads(path.read_text()) for path in args.merge])
        if args.json:
            write(args.json, results)
    else:
        missing = None if args.small else why_no_kernels()
        if missing is not None:
            raise SystemExit(f"error: this benchmark needs the CUDA kernels: {missing}. --small runs on the CPU.")
        register_backend()
        results = run(args)
    wide.print(*tables(results))
    if args.plot:
        plot(results, args.plot)
    failed = [row["title"] for row in results["rows"] if row["error"] is not None]
    if failed and not args.merge:
        raise SystemExit(f"error: {', '.join(failed)} failed; the results say how")


if __name__ == "__main__":
    main()
