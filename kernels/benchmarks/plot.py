"""Draws what bench_kernels.py and examples/bench_zimage.py have measured.

    python kernels/benchmarks/plot.py --kernels out/h200.json --model out/zimage_bench.json --to out

Writes kernels_tokens.svg (time over that of a copy, by tokens), kernels_width.svg (the same, by width), and model.svg
(how much faster the whole model runs than with plain torch.compile, with the interval).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "fusion-pass"  # the same numbers give the same file
import matplotlib.pyplot as plt  # noqa: E402

SERIES = {
    "ours": ("this", "C3", "o"),
    "default": ("Inductor", "C0", "s"),
    "max-autotune": ("Inductor, max-autotune", "C9", "^"),
    "emulate": ("Inductor, emulate_precision_casts", "C7", "v"),
    "triton": ("Triton, one program a row", "C2", "D"),
}
PANELS = {  # op, the sizes of Z-Image that come before the tokens in a case's name, and the op's name
    ("dual", 3840): "norm_tanh_mul_add_norm_scale",
    ("gated", 3840): "norm_tanh_mul_add",
    ("scaled", 3840): "norm_scale",
    ("qk_norm_rope", 30, 30, 128): "qk_norm_rope",
    ("silu_mul", 10240): "silu_mul",
}
Rows = list[dict[str, Any]]


def over_copy(rows: Sequence[dict[str, Any]], series: str) -> list[float]:
    return [row["us"][series] / row["us"]["copy"] for row in rows]


def draw_lines(axes: Any, rows: Rows, positions: list[int]) -> None:
    for series, (label, colour, marker) in SERIES.items():
        measured = [(p, row) for p, row in zip(positions, rows, strict=True) if series in row["us"]]
        if measured:
            at, of = zip(*measured, strict=True)
            axes.plot(at, over_copy(of, series), color=colour, marker=marker, label=label, linewidth=1)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(positions, [str(position) for position in positions])
    axes.minorticks_off()
    axes.grid(axis="y", alpha=0.3)


def plain(rows: Rows, op: str) -> list[tuple[tuple[int, ...], dict[str, Any]]]:
    """(sizes, row) of the cases of an op whose names have no further word: bf16, B=1, gate and scale broadcast."""
    found = []
    for row in rows:
        name, *numbers = row["case"].split()
        if name == op and all(number.isdigit() for number in numbers):
            found.append((tuple(map(int, numbers)), row))
    return sorted(found, key=lambda each: each[0])


def by_tokens(results: dict[str, Any], path: Path) -> None:
    figure, grid = plt.subplots(2, 3, figsize=(12, 6.4), layout="constrained")
    panels = grid.flat
    for axes, ((op, *sizes), title) in zip(panels, PANELS.items(), strict=False):
        cases = [(numbers[-1], row) for numbers, row in plain(results["rows"], op) if numbers[:-1] == tuple(sizes)]
        axes.set_xscale("log")
        draw_lines(axes, [row for _, row in cases], [tokens for tokens, _ in cases])
        axes.set(title=title, xlabel="tokens")
        axes.set_ylim(0.9, max(2.1, axes.get_ylim()[1]))  # the same where it can be
    for axes in grid[:, 0]:
        axes.set_ylabel("time / copy of the same bytes")
    labelled = [axes.get_legend_handles_labels() for axes in grid.flat]
    handles = {label: handle for pair in labelled for handle, label in zip(*pair, strict=True)}
    grid[1, 2].axis("off")
    grid[1, 2].legend(handles.values(), handles.keys(), loc="center")
    figure.suptitle(f"Sizes of Z-Image, bf16, {results['gpu']}")
    figure.savefig(path, metadata={"Date": None})


def by_width(results: dict[str, Any], path: Path) -> None:
    cases = [(d, row) for (d, tokens), row in plain(results["rows"], "dual") if tokens == 4128]
    figure, axes = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    axes.set_xscale("log")
    draw_lines(axes, [row for _, row in cases], [d for d, _ in cases])
    axes.set(title=f"{PANELS['dual', 3840]}, 4128 tokens, bf16, {results['gpu']}", xlabel="D")
    axes.set_ylabel("time / copy of the same bytes")
    axes.set_ylim(bottom=0.9)
    axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def model(results: dict[str, Any], path: Path) -> None:
    rows = results["rows"]
    names = [f"{r['pixels']}², B={r['batch']}, {r['scope']}, {r['mode']}" for r in rows]
    medians = [row["speedup"]["median"] for row in rows]
    lows, highs = zip(*(row["speedup"]["interval"] for row in rows), strict=True)
    below = [m - low for m, low in zip(medians, lows, strict=True)]
    above = [high - m for m, high in zip(medians, highs, strict=True)]
    figure, axes = plt.subplots(figsize=(7.5, 0.8 + 0.35 * len(rows)), layout="constrained")
    axes.errorbar(medians, range(len(rows)), xerr=[below, above], fmt="o", color="C3", capsize=3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set(xlabel="times as fast as torch.compile", title=f"Z-Image, a whole step, {results['gpu']}")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", type=Path, help="json of bench_kernels.py")
    parser.add_argument("--model", type=Path, help="json of bench_zimage.py")
    parser.add_argument("--to", type=Path, required=True, help="folder of the plots")
    arguments = parser.parse_args()
    arguments.to.mkdir(parents=True, exist_ok=True)
    if arguments.kernels:
        kernels = json.loads(arguments.kernels.read_text())
        by_tokens(kernels, arguments.to / "kernels_tokens.svg")
        by_width(kernels, arguments.to / "kernels_width.svg")
    if arguments.model:
        model(json.loads(arguments.model.read_text()), arguments.to / "model.svg")


if __name__ == "__main__":
    main()
