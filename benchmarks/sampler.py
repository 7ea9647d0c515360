"""The strategies of `generate` on arcLM-nano: exact match against tokens per forward, and degenerate outputs.

    python benchmarks/sampler.py

measures nano/arclm-nano and writes benchmarks/results/sampler.json and sampler.png. "curves": each strategy, greedy,
from slow to fast. "degenerate": the share of outputs that do not stop, hold special tokens, or repeat themselves (see
`degeneration` in nano/evaluate.py), sampled at three temperatures. "parity" repeats what benchmarks/dllm_parity.py
found.
"""

import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from common import RESULTS, SHAPES, start_record, write_record
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoTokenizer, HfArgumentParser
from transformers.hf_argparser import HfArg

from arclm.nano.evaluate import answer, degeneration, judge
from arclm.nano.world import FAMILIES, tasks_per_family


STEPS = [{"max_denoising_steps": steps} for steps in (16, 8, 4, 2)]
SWEEPS = {
    "low_confidence_static": STEPS,
    "low_confidence_dynamic": [{"confidence_threshold": value} for value in (0.99, 0.9, 0.7, 0.4)],
    "entropy_bound": [{"entropy_bound": value} for value in (0.01, 0.1, 0.5, 2.0)],
    "sequential": STEPS,
    "random": STEPS,
}
TEMPERATURES = (0.6, 0.9, 1.2)


@dataclass
class SamplerArguments:
    """What to measure."""

    model: str = HfArg(default=str(SHAPES["nano"]), help="Directory of the model.")
    tasks_per_family: int = HfArg(default=200, help="Held-out tasks of every family.")
    seed: int = HfArg(default=11, help="Seed of the tasks, one that no training or choice of settings has used.")
    output_file: str = HfArg(default=str(RESULTS / "sampler.json"), help="Result file; the plot is beside it.")


def measure(model, tokenizer, tasks, **knobs) -> dict:
    """Answer all tasks in one way: exact match by family, tokens per forward, and counts of degenerate outputs."""
    torch.manual_seed(0)
    right, rates, bad = Counter(), [], Counter()
    for task, ids, rate in answer(model, tokenizer, tasks, **knobs):
        right[task.family] += judge(tokenizer, task, ids)[0]
        rates.append(rate)
        bad[degeneration(tokenizer, task, ids)] += 1
    bad.pop(None, None)
    per_family = len(tasks) // len(FAMILIES)
    return {
        "exact_match": {"all": right.total() / len(tasks)} | {name: right[name] / per_family for name in FAMILIES},
        "tokens_per_forward": round(sum(rates) / len(rates), 3),
        "degenerate": bad.total() / len(tasks),
        "degenerate_kinds": dict(bad),
    }


def print_table(title: str, rows: list[dict], knobs: list[str]) -> None:
    """Print measurements, one line each."""
    table = Table(*knobs, "exact match", "tokens per forward", "degenerate", title=title)
    for row in rows:
        cells = [str(row[knob]) for knob in knobs]
        table.add_row(
            *cells, f"{row['exact_match']['all']:.1%}", f"{row['tokens_per_forward']:.2f}", f"{row['degenerate']:.2%}"
        )
    Console().print(table)


def plot(curves: dict[str, list[dict]], file: Path) -> None:
    """Draw exact match against tokens per forward, a line for each strategy."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for strategy, rows in curves.items():
        points = sorted((row["tokens_per_forward"], 100 * row["exact_match"]["all"]) for row in rows)
        axes.plot(*zip(*points, strict=True), marker="o", label=strategy)
    axes.set(xlabel="tokens per forward", ylabel="exact match (%)", title="arcLM-nano, greedy", ylim=(None, 100))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def main() -> None:
    """Measure, print, draw, write."""
    args = HfArgumentParser(SamplerArguments).parse_args_into_dataclasses()[0]
    record = start_record(
        "arcLM-nano on held-out tasks. tokens_per_forward: generated tokens up to and with the end token per "
        "denoising step, mean over tasks. degenerate: share of outputs.",
        "cpu",
        seed=args.seed,
    )
    start = time.perf_counter()
    tasks = tasks_per_family("test", args.seed, args.tasks_per_family)
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
    model = AutoModel.from_pretrained(args.model, trust_remote_code=True, dtype=torch.float32)

    curves = {}
    for strategy, sweep in SWEEPS.items():
        curves[strategy] = [
            knobs | measure(model, tokenizer, tasks, remasking_strategy=strategy, **knobs) for knobs in sweep
        ]
        print_table(strategy, curves[strategy], list(sweep[0]))
    sampled = []
    for temperature in TEMPERATURES:
        for knobs in STEPS:
            row = measure(model, tokenizer, tasks, do_sample=True, temperature=temperature, **knobs)
            sampled.append({"temperature": temperature} | knobs | row)
    print_table("low_confidence_static, sampled", sampled, ["temperature", "max_denoising_steps"])

    parity = json.loads((RESULTS / "dllm_parity.json").read_text(encoding="utf-8"))
    record |= {
        "tasks_per_family": args.tasks_per_family,
        "block_size": model.config.block_size,
        "seconds": round(time.perf_counter() - start),
        "curves": curves,
        "degenerate": sampled,
        "parity": {name: parity[name] for name in ("what", "equal", "runs")},
    }
    write_record(record, args.output_file)
    plot(curves, Path(args.output_file).with_suffix(".png"))


if __name__ == "__main__":
    main()
