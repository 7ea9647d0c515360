"""How time and memory of arcLM grow with context, batch and block size, and the exponents of these laws.

    python benchmarks/scaling.py

measures two kinds of steps, each with one of its sizes growing while the others stay at their base: a denoising step
over a cache, and a training step on rows that are trained on as a whole. The sizes take turns. Writes
benchmarks/results/scaling_cpu.json (or _gpu.json) and a plot beside it.

Peak memory is that of one step with all that it needs: weights and cache, or weights, gradients and optimizer. An
exponent is that of a power law fitted to all sizes, "upper" to the largest three: what a law that begins with a
constant grows into. 1 is proportional.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from common import (
    MB,
    cache_bytes,
    default_device,
    default_dtype,
    default_output,
    exponent,
    interleave,
    make_arclm,
    make_config,
    median,
    peak_memory,
    prefill,
    print_table,
    random_ids,
    start_record,
    timed,
    write_record,
)
from train_speed import arclm_loss, random_rows, training_step
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from arclm.cache_arclm import ArcLMCache
from arclm.graphs_arclm import borrow_graphs


AXES = ("context", "batch", "block")
BASE = {"denoise": {"context": 1024, "batch": 1}, "train": {"context": 512, "batch": 1}}


@dataclass
class ScalingArguments:
    """What to measure."""

    device: str = HfArg(default_factory=default_device, help="cpu or cuda.")
    shapes: list[str] | None = field(
        default=None, metadata={"help": "Among nano, hidden256, 0.8b. CPU: hidden256; GPU: and 0.8b."}
    )
    contexts: list[int] | None = field(
        default=None, metadata={"help": "Cached tokens: 64 256 1024 4096 16384 32768 by default."}
    )
    lengths: list[int] | None = field(
        default=None, metadata={"help": "Tokens of a training row: 128 256 512 1024 2048 by default."}
    )
    batch_sizes: list[int] | None = field(default=None, metadata={"help": "Rows per batch: 1 2 4 8 16 by default."})
    repeats: int = HfArg(default=5, help="Recorded rounds, of which the median counts.")
    output_file: str | None = HfArg(default=None, help="Result file.")


def prepare_denoise(shape: str | dict, size: dict[str, int], device: str) -> Callable[[], ArcLMCache]:
    """Return a denoising step of `size`, context, batch and block; it returns the cache that it reads."""
    model = make_arclm(shape, device, default_dtype(device))
    cache = prefill(model, random_ids(model.config, size["batch"], size["context"], device), size["block"])
    block = random_ids(model.config, size["batch"], size["block"], device)
    graphs = borrow_graphs(model.model, cache)  # as `generate` does; none on a CPU

    @torch.no_grad()
    def step() -> ArcLMCache:
        model(noisy_input_ids=block, past_key_values=cache, block_size=size["block"], graphs=graphs)
        return cache

    return step


def prepare_train(shape: str | dict, size: dict[str, int], device: str) -> Callable[[], float]:
    """Return a training step of `size`: context tokens per row, batch and block."""
    model = make_arclm(shape, device, torch.float32)
    model.config.block_size = size["block"]
    rows = random_rows(model.config, size["batch"], size["context"], 1.0, device)
    return training_step(model, arclm_loss(model, *rows), device)


PREPARE = {"denoise": prepare_denoise, "train": prepare_train}


def sizes_of(kind: str, axis: str, values: list[int], block: int) -> list[dict[str, int]]:
    """Return the sizes along one axis; the others stay at their base."""
    return [{**BASE[kind], "block": block, axis: value} for value in values]


def measure(kind: str, shape: str | dict, axis: str, sizes: list[dict], device: str, *, repeats: int) -> list[dict]:
    """Time and weigh the steps of `sizes`, which differ along `axis`; returns a row of the table for each."""
    seconds, caches, rows = [], [], []
    # a GPU has no room for the models of all sizes, and nothing else to do meanwhile
    for group in [[size] for size in sizes] if device == "cuda" else [sizes]:
        steps = [PREPARE[kind](shape, size, device) for size in group]
        runs = {str(i): lambda step=step: timed(step, device) for i, step in enumerate(steps)}
        measured = [median(values) for values in interleave(runs, repeats).values()]
        has_cache = [kind == "denoise" and value is not None for value in measured]
        caches += [cache_bytes(step()) if has else None for step, has in zip(steps, has_cache, strict=True)]
        seconds += measured
        del steps, runs
    for size, value, cache in zip(sizes, seconds, caches, strict=True):
        peak = None if value is None else peak_memory(device, PREPARE[kind], shape, size, device)
        rows.append(
            {
                "step": kind,
                "axis": axis,
                **size,
                "step_ms": None if value is None else 1e3 * value,
                "peak_mb": None if peak is None else peak / MB,
                "cache_mb": None if cache is None else cache / MB,
            }
        )
        print(rows[-1], flush=True)
    return rows


def fit(rows: list[dict]) -> dict:
    """Return the exponents of time and memory over the rows of one axis, all of them and the largest three."""
    axis, fits = rows[0]["axis"], {"step": rows[0]["step"], "axis": rows[0]["axis"]}
    for quantity in ("step_ms", "peak_mb", "cache_mb"):
        points = [(row[axis], row[quantity]) for row in rows if row[quantity]]
        for name, part in (("", points), ("_upper", points[-3:])):
            fits[f"{quantity}{name}"] = exponent(*zip(*part, strict=True)) if len(part) > 1 else None
    return fits


def measure_shape(shape: str, args: ScalingArguments, result: dict, save: Callable[[], None]) -> None:
    """Measure all axes of both kinds of steps of one shape; `result` grows and is saved after each."""
    block = make_config(shape).block_size
    blocks = [size for size in (4, 8, 16, 32, 64) if size <= block]
    rows, fits = result["rows"], result["exponents"] = [], []
    for kind in PREPARE:
        contexts = args.contexts if kind == "denoise" else args.lengths
        for axis, values in zip(AXES, (contexts, args.batch_sizes, blocks), strict=True):
            sizes = sizes_of(kind, axis, values, block)
            part = measure(kind, shape, axis, sizes, args.device, repeats=args.repeats)
            rows += part
            fits.append(fit(part))
            save()
    print_table(f"{shape}: time and memory of a step", rows)
    print_table(f"{shape}: exponents", fits)


def plot(shapes: dict[str, dict], file: Path) -> None:
    """Draw time and peak memory along every axis, a line for each shape and kind of step."""
    figure, axes = plt.subplots(2, len(AXES), figsize=(11, 6.5), layout="constrained")
    for column, axis in enumerate(AXES):
        for row, (quantity, label) in enumerate((("step_ms", "step (ms)"), ("peak_mb", "peak memory (MB)"))):
            for shape, result in shapes.items():
                for kind in PREPARE:
                    points = [r for r in result["rows"] if (r["step"], r["axis"]) == (kind, axis) and r[quantity]]
                    x, y = [r[axis] for r in points], [r[quantity] for r in points]
                    axes[row, column].plot(x, y, marker="o", label=f"{shape}, {kind}")
            axes[row, column].set(xlabel=axis, ylabel=label, xscale="log", yscale="log")
            axes[row, column].grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    """Measure, print, draw, write."""
    args = HfArgumentParser(ScalingArguments).parse_args_into_dataclasses()[0]
    args.shapes = args.shapes or ["hidden256", *["0.8b"] * (args.device == "cuda")]
    args.contexts = args.contexts or [64, 256, 1024, 4096, 16384, 32768]
    args.lengths = args.lengths or [128, 256, 512, 1024, 2048]
    args.batch_sizes = args.batch_sizes or [1, 2, 4, 8, 16]
    record = start_record("Time and peak memory of arcLM's steps, medians, and exponents of growth.", args.device)
    record |= {"repeats": args.repeats, "base": BASE, "shapes": {}}
    file = Path(args.output_file or default_output("scaling", args.device))
    for shape in args.shapes:
        record["shapes"][shape] = {}
        measure_shape(shape, args, record["shapes"][shape], lambda: write_record(record, file))
    plot(record["shapes"], file.with_suffix(".png"))


if __name__ == "__main__":
    main()
