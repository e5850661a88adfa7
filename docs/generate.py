"""Makes the tables of the README and of these pages from results and from the code, and draws the README's plot.

    python docs/generate.py            rewrite what has changed
    python docs/generate.py --check    change nothing; fail if something would change

Each table is between the comments `<!-- generated: NAME -->` and `<!-- end -->`. BLOCKS maps NAME to the function that
makes the table.
tests/test_docs.py fails if a table or the plot is not what this program makes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "kernels/benchmarks/results"
PLOT = ROOT / "docs/images/zoo.svg"
BLOCK = re.compile(r"(<!-- generated: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

PLAIN, FUSED = "torch.compile", "fusion_pass"
# What the README calls the sites of an op.
WORDS = {
    "norm_scale": "norms",
    "norm_tanh_mul_add": "norms",
    "norm_tanh_mul_add_norm_scale": "norms",
    "mul_add_norm_scale": "norms",
    "norm_rope": "QK-norm + RoPE",
    "qk_norm_rope": "QK-norm + RoPE",
    "qk_norm_cat_rope": "QK-norm + RoPE",
    "qk_norm_part_rope": "QK-norm + RoPE",
    "norm_all_heads_rope": "QK-norm + RoPE",
    "silu_mul": "SwiGLU",
    "linear_silu_mul": "SwiGLU in its matmul",
    "linear_gelu": "GELU in its matmul",
    "norm_scale_quant": "norms to FP8",
    "norm_tanh_mul_add_norm_scale_quant": "norms to FP8",
    "mul_add_norm_scale_quant": "norms to FP8",
    "silu_mul_quant": "SwiGLU to FP8",
    "gelu_quant": "GELU to FP8",
    "quant": "FP8 input",
}
# What bench_kernels.py calls an op, and the name of the op.
BENCHED = {"dual": "norm_tanh_mul_add_norm_scale", "gated": "norm_tanh_mul_add", "scaled": "norm_scale"}
SERIES = {
    "default": "Inductor",
    "max-autotune": "Inductor, max-autotune",
    "emulate": "Inductor, emulate_precision_casts",
    "triton": "Triton",
}
Link = Callable[[str], str]  # the address of a file of the repository, as seen from the page
Row = Mapping[str, Any]


@cache
def results(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def source(link: Link, name: str, *facts: str) -> str:
    """The line under a table that says where its numbers come from."""
    return f"\n{', '.join(facts)}. Source: [{name}]({link(f'kernels/benchmarks/results/{name}')}).\n"


# --- models -----------------------------------------------------------------------------------------------------------


def zoo_rows() -> list[Row]:
    """The models that ran, the fastest first."""
    return fastest_first(row for row in results("h100_zoo.json")["rows"] if row["error"] is None)


def fastest_first(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: -row["speedup"]["median"])


def zoo_label(row: Row) -> str:
    """The model, and what differs from bf16 and from the usual options."""
    options = row["options"]
    words = [row["title"], *([] if row["precision"] == "bf16" else [row["precision"].upper()])]
    words += [name.replace("_", " ") for name in ("dynamic", "per_block", "coordinate_descent") if options[name]]
    words += [f"{options['steps']} steps in a row"] if options.get("steps", 1) > 1 else []
    words += [f"{row['sizes']['pixels']}²"] if row["sizes"].get("pixels", 1024) != 1024 else []
    return ", ".join(words)


def zoo_source(link: Link) -> str:
    header = results("h100_zoo.json")
    facts = (f"One {header['gpu']}", header["date"][:10], f"torch {header['versions']['torch']}")
    precisions = "bf16, FP8 or INT8 (torchao, row-wise), random weights"
    return source(link, "h100_zoo.json", *facts, f"diffusers {header['versions']['diffusers']}", precisions)


def interval(row: Row) -> str:
    low, high = row["speedup"]["interval_999"]
    return f"{row['speedup']['median']:.3f} ({low:.3f} to {high:.3f})"


def in_words(fused: Mapping[str, int]) -> str:
    counts: dict[str, int] = {}
    for op, count in fused.items():
        words = WORDS.get(op, f"`{op}`")
        counts[words] = counts.get(words, 0) + count
    return ", ".join(f"{count} {words}" for words, count in counts.items()) or "nothing"


def distances(row: Row) -> str:
    return f"{row[PLAIN]['distance']:.4f} → {row[FUSED]['distance']:.4f}"


def quantised_distance(link: Link) -> str:
    """The rows that bench_zoo.py measured with --from-fp32."""
    head = ("model", "bf16, eager", "quantised, eager", "`torch.compile`", "fusion_pass")
    rows = []
    for row in zoo_rows():
        if row.get("from_fp32"):
            means = (statistics.mean(row["from_fp32"][name]) for name in ("bf16", "eager", PLAIN, FUSED))
            rows.append((zoo_label(row), *(f"{mean:.4f}" for mean in means)))
    return table(head, rows) + zoo_source(link)


def usual_rows() -> list[Row]:
    """One row for each model and precision: of the usual size, without coordinate descent, of the fewest steps."""
    found: dict[tuple[str, str], Row] = {}
    for row in sorted(zoo_rows(), key=lambda row: row["options"].get("steps", 1)):
        if not row["options"]["coordinate_descent"] and row["sizes"].get("pixels", 1024) == 1024:
            found.setdefault((row["title"], row["precision"]), row)
    return fastest_first(found.values())


def zoo(link: Link) -> str:
    head = ("model", "fused", "times as fast (99.9% interval)", "distance from eager")
    rows = [(zoo_label(row), in_words(row["fused"]), interval(row), distances(row)) for row in usual_rows()]
    return table(head, rows) + zoo_source(link)


def zoo_details(link: Link) -> str:
    head = (
        "model", "layers", "eager, ms", "`torch.compile`, ms", "fusion_pass, ms", "times as fast (99.9% interval)",
        "peak memory, GiB", "distance from eager", "fused",
    )  # fmt: skip
    rows = []
    for row in zoo_rows():
        plain, fused = row[PLAIN], row[FUSED]
        memory = " → ".join(f"{each['peak_bytes'] / 2**30:.2f}" for each in (plain, fused))
        layers = " + ".join(str(n) for n in row["layers"].values())
        times = (f"{ms:.1f}" for ms in (row["eager_ms"], plain["ms"], fused["ms"]))
        ops = ", ".join(f"{count} `{op}`" for op, count in row["fused"].items()) or "nothing"
        rows.append((zoo_label(row), layers, *times, interval(row), memory, distances(row), ops))
    return table(head, rows) + zoo_source(link)


def zimage(link: Link) -> str:
    results_of = results("h200_zimage_bench.json")
    head = (
        "resolution", "batch", "compiled", "mode", "eager, ms", "`torch.compile`, ms", "fusion_pass, ms",
        "times as fast (95% interval)", "peak memory, GiB", "distance from eager",
    )  # fmt: skip
    rows = []
    for row in results_of["rows"]:
        plain, fused = row[PLAIN], row[FUSED]
        low, high = row["speedup"]["interval"]
        memory = " → ".join(f"{each['peak_bytes'] / 2**30:.2f}" for each in (plain, fused))
        times = (f"{ms:.1f}" for ms in (row["eager_ms"], plain["ms"], fused["ms"]))
        speed = f"{row['speedup']['median']:.3f} ({low:.3f} to {high:.3f})"
        scope = {"whole": "whole model", "block": "block by block"}[row["scope"]]
        rows.append((f"{row['pixels']}²", row["batch"], scope, row["mode"], *times, speed, memory, distances(row)))
    facts = (f"One {results_of['gpu']}", results_of["date"][:10], f"torch {results_of['versions']['torch']}")
    return table(head, rows) + source(link, "h200_zimage_bench.json", *facts, "6 billion random bf16 weights")


def zimage_line(link: Link) -> str:
    """One sentence for the README."""
    found = results("h200_zimage_bench.json")
    speeds = [row["speedup"]["median"] for row in found["rows"]]
    fast = f"{min(speeds):.2f} to {max(speeds):.2f} times as fast on one {found['gpu']}"
    file = link("kernels/benchmarks/results/h200_zimage_bench.json")
    return (
        f"The whole Z-Image (6 billion parameters, {len(speeds)} settings) is {fast}.\n"
        f"Source: [h200_zimage_bench.json]({file}), {found['date'][:10]}.\n"
    )


# --- kernels ----------------------------------------------------------------------------------------------------------


def kernels_source(link: Link, name: str, *facts: str) -> str:
    """The line under a table of a file that bench_kernels.py has written."""
    header = results(name)
    return source(link, name, f"One {header['gpu']}", header["date"][:10], f"torch {header['torch']}", *facts)


def case_of(text: str) -> tuple[str, str]:
    """The op and the sizes of a case of bench_kernels.py."""
    name, *words = text.split()
    numbers = [word for word in words if word.isdigit()]
    rest = [word for word in words if not word.isdigit()]
    *width, tokens = numbers
    size = f"D={width[0]}" if len(width) == 1 else f"{width[0]} and {width[1]} heads of {width[2]}"
    return BENCHED.get(name, name), ", ".join([size, f"{tokens} tokens", *([" ".join(rest)] if rest else [])])


def beside_copy(us: Mapping[str, float]) -> tuple[str, str, str]:
    """The times of the copy and of ours, and their quotient."""
    return f"{us['copy']:.1f}", f"{us['ours']:.1f}", f"{us['ours'] / us['copy']:.2f}"


def kernels(link: Link) -> str:
    wanted = ("dual 3840 ", "gated 3840 ", "scaled 3840 ", "qk_norm_rope 30 30 128 ", "silu_mul 10240 ")
    head = ("op", "tokens", "copy", "fusion_pass", "over the copy", *SERIES.values())
    rows = []
    for start in wanted:
        found = [row for row in results("h200.json")["rows"] if re.fullmatch(rf"{start}\d+", row["case"])]
        for row in found:
            us = row["us"]
            others = (f"{us[name]:.1f}" if name in us else "–" for name in SERIES)
            op = f"`{case_of(row['case'])[0]}`"
            tokens = row["case"].split()[-1]
            rows.append((op, tokens, *beside_copy(us), *others))
    return table(head, rows) + kernels_source(link, "h200.json", "bf16, microseconds")


def quant_kernels(link: Link) -> str:
    return beside_inductor(link, "h100_quant.json", "bf16 to FP8, microseconds")


def adaln_kernels(link: Link) -> str:
    return beside_inductor(link, "h100_adaln.json", "bf16, microseconds")


def beside_inductor(link: Link, name_of_file: str, facts: str) -> str:
    """Cases as "norm_scale shift 3072 512 quant", "gelu 12288 row 3072 512 quant" and "row 3072 512 quant"."""
    head = ("op", "D", "tokens", "copy", "fusion_pass", "over the copy", "Inductor")
    rows = []
    for row in results(name_of_file)["rows"]:
        name, *words = row["case"].split()
        *widths, tokens = (word for word in words if word.isdigit())
        op = "`quant`" if name == "row" else f"`{BENCHED.get(name, name)}{'_quant' if 'quant' in words else ''}`"
        op += ", with a shift" if "shift" in words else ", of a joined row" if "row" in words else ""
        tokens = f"2 × {tokens}" if "B=2" in words else tokens
        us = row["us"]
        rows.append((op, " + ".join(reversed(widths)), tokens, *beside_copy(us), f"{us['default']:.1f}"))
    return table(head, rows) + kernels_source(link, name_of_file, facts)


def head_norms(link: Link) -> str:
    head = ("norm", "heads", "tokens", "copy", "Inductor", "over the copy")
    rows = []
    for row in results("h100_head_norms.json")["rows"]:
        copy, inductor = row["us"]["copy"], row["us"]["inductor"]
        sizes = f"{row['heads']} of {row['d']}", row["tokens"]
        rows.append((row["case"], *sizes, f"{copy:.1f}", f"{inductor:.1f}", f"{inductor / copy:.2f}"))
    return table(head, rows) + kernels_source(link, "h100_head_norms.json", "bf16, microseconds")


def linear_kernels(link: Link) -> str:
    """Cases as "silu_mul 4096 6144 18432 halves (FLUX.2)". A tiling that gives wrong results is never chosen."""
    head = (
        "op",
        "sizes of",
        "tokens",
        "K",
        "N",
        "cuBLAS alone",
        "and a kernel behind it",
        "fused",
        "chosen, over behind",
    )
    rows = []
    for row in results("h100_linear.json")["rows"]:
        (name, tokens, k, n, *words), model = row["case"].split(" (")[0].split(), row["case"].split(" (")[1].strip(")")
        op = ("`linear_silu_mul`" if name == "silu_mul" else "`linear_gelu`") + ", one weight" * ("halves" in words)
        behind = min(us for variant, us in row["us"].items() if "/" not in variant and variant != "matmuls")
        fused = min(us for variant, us in row["us"].items() if "/" in variant and variant not in row["wrong"])
        times = (f"{us:.0f}" for us in (row["us"]["matmuls"], behind, fused))
        rows.append((op, model, tokens, k, n, *times, f"{min(1.0, fused / behind):.2f}"))
    return table(head, rows) + kernels_source(link, "h100_linear.json", "bf16, microseconds")


def measured_cases() -> Iterator[tuple[str, Mapping[str, float], str]]:
    """Each case, its microseconds, and the file that has it."""
    for row in results("h200.json")["rows"]:
        yield row["case"], row["us"], "h200.json"
    for case, us in results("h200_sweeps.json")["thirteenth"].items():
        yield case, us, "h200_sweeps.json"


def slower(link: Link) -> str:
    rows = []
    for case, us, file in measured_cases():
        times = {name: us[name] for name in SERIES if name in us}
        best = min(times, key=lambda name: times[name])
        if us["ours"] > 1.01 * times[best]:
            op, sizes = case_of(case)
            more = f"{100 * (us['ours'] / times[best] - 1):.0f}%"
            rows.append((f"`{op}`", sizes, f"{us['ours']:.1f}", f"{times[best]:.1f}", SERIES[best], more, f"`{file}`"))
    head = ("op", "sizes", "fusion_pass, µs", "fastest other, µs", "which is", "slower by", "file")
    header = results("h200.json")
    facts = (f"One {header['gpu']} for each file", "2026-11-25 and 2026-11-26", f"torch {header['torch']}")
    return table(head, rows) + source(link, "h200.json", *facts)


def host(link: Link) -> str:
    us = results("h200.json")["host_us"]
    rows = [(f"`{BENCHED.get(name, name)}`", f"{value:.1f}") for name, value in us.items()]
    return table(("call", "µs on the host"), rows) + kernels_source(link, "h200.json", "host times 2026-11-26")


def cold_start(link: Link) -> str:
    times = results("h200.json")["cold_start_ms"]
    words = {
        "import": "`import fusion_pass`", "CuTeDSL": "loading CuTeDSL", "first kernel": "the first kernel",
        "next kernel": "each further kernel",
    }  # fmt: skip
    rows = [(text, *(f"{times[state][step]:.0f}" for state in ("compiled", "on disk"))) for step, text in words.items()]
    head = ("step", "first time, ms", "kernels already on disk, ms")
    return table(head, rows) + kernels_source(link, "h200.json", "Python without bytecode files")


# --- tests, examples, ops ---------------------------------------------------------------------------------------------


def gpu_tests(link: Link) -> str:
    rows = []
    for run in results("gpu_tests.json")["runs"]:
        tests, versions = run["tests"], run["versions"]
        outcome = f"{tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped"
        commit, note = run["commit"][:7], run["note"]
        rows.append((run["date"][:10], commit, run["gpu"], versions["torch"], outcome, note))
    head = ("date", "commit", "GPU", "torch", "result", "note")
    cutedsl = sorted({run["versions"]["nvidia-cutlass-dsl"] for run in results("gpu_tests.json")["runs"]})
    return table(head, rows) + source(link, "gpu_tests.json", f"CuTeDSL {', '.join(cutedsl)}")


def examples(link: Link) -> str:
    found = results("h200_examples.json")
    rows = []
    for name in ("lora_offload", "comfyui", "context_parallel"):
        run = found[name]
        far = run["distance"]["split and compiled"] if isinstance(run["distance"], dict) else run["distance"]
        fused = ", ".join(f"{count} `{op}`" for op, count in run["fused"].items())
        rows.append((f"[{name}.py]({link(f'examples/{name}.py')})", fused, f"{far:.4f}"))
    facts = (f"One {found['gpu']}, two for context_parallel.py", found["date"], f"torch {found['torch']}")
    return table(("example", "fused", "distance from eager"), rows) + source(link, "h200_examples.json", *facts)


ROLES = {
    "row": "`[..., S, D]`: S tokens of D features",
    "part": "`[..., S, E]`: E features of the same tokens",
    "modulation": "broadcasts to the first argument, with any strides",
    "column": "`[D]`",
    "heads": "`[B, S, H, Dh]`: H heads of Dh features; k may have another H than q",
    "heads before": "`[B, S', H, Dh]`: the heads of S' tokens that come before those of q and k",
    "joined table": "`[S' + S, n]`, `[1 or B, S' + S, n]`, `[S' + S, 1, n]` or `[1 or B, S' + S, 1, n]`",
    "later table": "`[S', n]`, `[1 or B, S', n]` or `[1 or B, S', 1, n]`, for the last S' of the S tokens",
    "table": "`[S, n]`, `[1 or B, S, n]`, `[S, 1, n]` or `[1 or B, S, 1, n]`",
    "scalar": "one element",
    "tokens": "`[..., S, K]`: S tokens of K features",
    "matrix": "`[N, K]`, as `nn.Linear` stores it",
    "layer bias": "`[N]`",
    "eps": "a number ≥ 0. The overload `.eps_tensor` takes a CPU tensor of one element",
}
MORE = {  # what the role of an argument does not say
    "rotation": (
        "With `sin` the cosines, n = Dh or Dh/2. Without `sin` complex, n = Dh/2; or the 2×2 matrices of the pairs, "
        "n = 2 · Dh"
    ),
    "cos": "The cosines, one for each element or for each pair. n = Dh or Dh/2; with `own`, D or D/2",
    "sin": "The sines",
    "static_scale": "Without it, nothing is scaled",
    "shift": "What is added to z",
    "before": "What the quantised row starts with, in the dtype of the result",
    **dict.fromkeys(("q_bias", "k_bias"), "An RMSNorm has none"),
}
OPTIONS = {
    "norm": "The norm: RMSNorm or LayerNorm",
    "tanh": "True: the op computes tanh(gate). False: the gate is already activated",
    "add_one": "True: the op computes 1 + scale. False: the scale already includes the 1",
    "approximate": "How GELU is computed: with erf (`'none'`) or with tanh, as in `F.gelu`",
    "rounding": "Where the op rounds, see [rounding](rounding.md)",
    "root": "How the RMSNorm computes its root, see [rounding](rounding.md)",
    "interleaved": "True: a pair is two neighbouring elements. False: one element from each half of a head",
    "heads": "H. D = H · Dh",
    "own": "True: each head has its own rotation. False: all heads share one rotation",
    "addcmul": "True: the sum of the two real products is `torch.addcmul`, which does not round the second product",
    "y_dtype": "The dtype of y",
    "z_dtype": "The dtype of z",
    "out_dtype": "The dtype of the result",
    "norm_dtype": "The dtype that the norm is cast to",
    "norm_dtype2": "The dtype that the second norm is cast to",
    "rope_dtype": "The dtype that the rotation is rounded to",
    "silu_dtype": "The dtype that silu(a) is rounded to",
    "s_dtype": "The dtype that s is rounded to, before it is kept in fp32",
    "fmax": "What the largest absolute value of a row is divided by, for s",
    "smallest_amax": "What the largest absolute value of a row counts as at least",
    "smallest_scale": "What s is at least",
    "reciprocal": "q is z · (1 / s); otherwise z / s",
    "clamp": "Clamp to ±448 before the cast to FP8",
    "scaling": "How q is computed: z / static_scale, z · (1 / static_scale), or z · static_scale",
    "factor_dtype": "The dtype that static_scale, or its reciprocal, is rounded to before it scales",
    "configuration": "The kernel's tile, cluster and schedule, as in `128x192/2x1/pingpong`. `''`: the default",
    "scaled_dtype": "The dtype that the quotient or the product is rounded to before the cast to FP8",
}
UNSET = {  # what None means, for an option that has no default by type promotion
    "s_dtype": "the dtype of what is quantised",
    "smallest_amax": "there is no least",
    "smallest_scale": "there is no least",
    "factor_dtype": "fp32",
    "scaled_dtype": "fp32",
}
MEANS = {
    "norm_tanh_mul_add": "y = residual + tanh(gate) · norm(x)",
    "norm_tanh_mul_add_norm_scale": "y = residual + tanh(gate) · norm(x), and z = norm(y) · (1 + scale) + shift",
    "mul_add_norm_scale": "y = residual + gate · x, and z = norm(y) · (1 + scale) + shift",
    "norm_scale": "z = norm(x) · (1 + scale) + shift",
    "norm_rope": "rotate(norm(x)), for each head",
    "qk_norm_rope": "rotate(norm(q)) and rotate(norm(k)), with one rotation",
    "qk_norm_cat_rope": (
        "rotate(cat(norm(q_before), norm(q))) and the same for k, with one rotation. The tokens of both are joined"
    ),
    "qk_norm_part_rope": (
        "norm(q) and norm(k), whose last tokens are rotated with one rotation: as many tokens as the rotation has rows"
    ),
    "norm_all_heads_rope": "rotate(norm(x)), with one norm over all heads of a token",
    "silu_mul": "silu(a) · b",
    "linear_silu_mul": "silu(x · w_gateᵀ + bias_gate) · (x · w_upᵀ + bias_up)",
    "linear_gelu": "gelu(x · wᵀ + bias)",
    "norm_tanh_mul_add_norm_scale_quant": (
        "y = residual + tanh(gate) · norm(x), and q, s = quantised(norm(y) · (1 + scale) + shift)"
    ),
    "mul_add_norm_scale_quant": "y = residual + gate · x, and q, s = quantised(norm(y) · (1 + scale) + shift)",
    "norm_scale_quant": "q, s = quantised(norm(x) · (1 + scale) + shift)",
    "silu_mul_quant": "q, s = quantised(silu(a) · b). With `before`: q, s = quantised([before, silu(a) · b])",
    "quant": "q, s = quantised(x)",
    "gelu_quant": "q, s = quantised(gelu(a)). With `before`: q, s = quantised([before, gelu(a)])",
}
OVERLOADS = {  # what an overload of an op does in another way
    "keep_z": "What is quantised is returned, too, in front of q.",
    "static": "All rows are scaled by `static_scale`, and q is returned without s.",
    "static_keep_z": "All rows are scaled by `static_scale`. What is quantised and q are returned, without s.",
}


def told_of_argument(name: str, argument: Any) -> str:
    text = ROLES[argument.role.name] + (", or None" if argument.optional else "")
    more = MORE.get(name)
    return f"{text}. {more}" if more else text


def told_of_option(option: Any) -> str:
    text = OPTIONS[option.name]
    if option.words:
        return f"{text}. One of {', '.join(f'`{word}`' for word in option.words)}"
    if option.default is not None:
        return text
    unset = UNSET.get(option.name, "as PyTorch's type promotion gives it")
    return f"{text}. None: {unset}"


def ops(link: Link) -> str:
    from dit_kernels.families import OPS

    parts = []
    for op in OPS.values():
        name, _, overload = op.name.partition(".")
        told = {*OPS[name].roles, *OPS[name].options} if overload else {}
        arguments = [(f"`{n}`", told_of_argument(n, role)) for n, role in op.roles.items() if n not in told]
        options = [(f"`{o.name}={o.default!r}`", told_of_option(o)) for o in op.options if o not in told]
        schema = f"```text\n{op.name}{op.schema('float')}\n```\n"
        meaning = "\n" + table(("argument", "meaning"), arguments + options) if arguments + options else ""
        heading, means = ("###", OVERLOADS[overload]) if overload else ("##", MEANS[name])
        parts.append(f"{heading} {op.name}\n\n{means}\n\n{schema}{meaning}")
    return "\n".join(parts)


def tried_versions(link: Link) -> str:
    from dit_kernels.versions import NEWEST_TRIED

    rows = [(name, ".".join(map(str, version))) for name, version in NEWEST_TRIED.items()]
    return table(("package", "newest version tried"), rows)


BLOCKS: dict[str, Callable[[Link], str]] = {
    "zoo": zoo,
    "zoo-details": zoo_details,
    "quantised-distance": quantised_distance,
    "zimage": zimage,
    "zimage-line": zimage_line,
    "kernels": kernels,
    "quant-kernels": quant_kernels,
    "adaln-kernels": adaln_kernels,
    "head-norms": head_norms,
    "linear-kernels": linear_kernels,
    "slower": slower,
    "host": host,
    "cold-start": cold_start,
    "gpu-tests": gpu_tests,
    "examples": examples,
    "ops": ops,
    "tried-versions": tried_versions,
}


# --- the plot ---------------------------------------------------------------------------------------------------------


def plot() -> str:
    """Bars from 1.00, the speed of plain torch.compile, with 99.9% intervals, as SVG.

    The white card behind the bars keeps the plot readable on a dark page.
    """
    rows, header = zoo_rows(), results("h100_zoo.json")
    left, right, top, step, width = 150, 70, 62, 26, 760
    low = min(0.98, *(row["speedup"]["interval_999"][0] for row in rows))
    high = max(row["speedup"]["interval_999"][1] for row in rows) + 0.005
    bottom = top + step * len(rows)

    def at(speed: float) -> float:
        return round(left + (speed - low) / (high - low) * (width - left - right), 1)

    def text(x: float, y: float, content: str, more: str = "") -> str:
        return f'<text x="{x}" y="{y}" {more}>{content}</text>'

    parts = [
        f'<rect x="0.5" y="0.5" width="{width - 1}" height="{bottom + 45}" rx="6" fill="#fff" stroke="#d0d7de"/>',
        text(16, 26, "Times as fast as plain torch.compile, by model", 'font-size="15" font-weight="bold"'),
        text(
            16, 45, f"One forward pass, bf16, {header['gpu']}, {header['date'][:10]}, h100_zoo.json", 'fill="#57606a"'
        ),
    ]
    ticks = [tick / 100 for tick in range(90, 200, 2) if low <= tick / 100 <= high]
    for tick in ticks:
        line = 'stroke="#1f2328"' if tick == 1 else 'stroke="#eaeef2"'
        parts.append(f'<line x1="{at(tick)}" x2="{at(tick)}" y1="{top}" y2="{bottom + 4}" {line}/>')
        parts.append(text(at(tick), bottom + 18, f"{tick:.2f}", 'text-anchor="middle" fill="#57606a"'))
    for i, row in enumerate(rows):
        y, speed = top + step * i, row["speedup"]["median"]
        start, end = sorted((at(1), at(speed)))
        colour = "#54aeff" if row["fused"] else "#afb8c1"
        parts.append(text(left - 10, y + 17, zoo_label(row), 'text-anchor="end"'))
        parts.append(f'<rect x="{start}" y="{y + 5}" width="{max(end - start, 0.5):.1f}" height="16" fill="{colour}"/>')
        first, last = (at(bound) for bound in row["speedup"]["interval_999"])
        parts.append(f'<line x1="{first}" x2="{last}" y1="{y + 13}" y2="{y + 13}" stroke="#1f2328"/>')
        parts += [f'<line x1="{x}" x2="{x}" y1="{y + 9}" y2="{y + 17}" stroke="#1f2328"/>' for x in (first, last)]
        parts.append(text(width - 14, y + 17, f"{speed:.2f}", 'text-anchor="end" font-weight="bold"'))
    key = "Bars start at 1.00. Blue: sites were fused. Grey: nothing was fused, same code. Thin line: 99.9% interval."
    parts.append(text(16, bottom + 37, key, 'fill="#57606a"'))
    alt = "; ".join(f"{zoo_label(row)} {row['speedup']['median']:.2f}" for row in rows)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 46}" width="{width}" role="img" '
        f'font-family="-apple-system, Segoe UI, Helvetica, Arial, sans-serif" font-size="12" fill="#1f2328">\n'
        f"<title>Times as fast as plain torch.compile: {alt}</title>\n" + "\n".join(parts) + "\n</svg>\n"
    )


# --- pages ------------------------------------------------------------------------------------------------------------


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(page: Path, text: str) -> str:
    """The text of a page with its tables as they should be."""

    def link(path: str) -> str:
        return os.path.relpath(ROOT / path, page.parent)

    return BLOCK.sub(lambda match: f"{match[1]}{BLOCKS[match[2]](link)}{match[3]}", text)


def expected() -> dict[Path, str]:
    """What each file that this program writes should contain."""
    return {PLOT: plot()} | {page: filled(page, page.read_text()) for page in pages()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if something would change")
    args = parser.parse_args()
    stale = {path: text for path, text in expected().items() if not path.exists() or path.read_text() != text}
    for path, text in stale.items():
        print(f"{'stale' if args.check else 'written'}: {path.relative_to(ROOT)}")
        if not args.check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    sys.exit(bool(args.check and stale))


if __name__ == "__main__":
    main()
