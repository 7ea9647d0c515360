"""Boundary states against one scan over [x_t ; x_0]: the ablation of what makes arcLM arcLM.

    python benchmarks/ablation.py

converts nano/arclm-nano-base as nano/build.py does (blocks of 16, shifted logits) and trains it on the same tasks, for
the same steps and with the same seeds in two ways: as arcLM, and as `OneScanForDiffusionLM`, the way of a framework
written for attention (see one_scan.py). A seed decides the order of the tasks and the noise; the start is the same.
Each trained model is then read in up to three ways:

- "clean state": by arcLM, so a block is denoised over what the finished tokens before it left;
- "state dropped": by `DroppedStateForDiffusionLM`, as under transformers 5.2.0 to 5.6.2;
- "training view" (one scan only): [x_t ; x_0] in one scan, which exists in training and nowhere else.

NELBO: nats per answer token on held-out tasks with the same masks for all, every `eval_steps` steps. Exact match:
greedy, static strategy, 1, 2 and 4 tokens per step, at the end; the training view cannot generate.

Expected before the run: in its own training view one scan is about as good as arcLM. Sampled with the clean state it
is worse by more than the spread over seeds, in NELBO, with a gap that grows over the steps, and in exact match, most
of all in reasoning, whose later blocks need the earlier ones. Dropping the state costs either model most of its exact
match. (What came out is in LOG.md.)

Results: benchmarks/results/ablation.json and ablation.png. Two trainings run side by side, one thread each. Each
writes its result into `work_dir` when it is done, and a second call only makes up for those that are missing.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from one_scan import DroppedStateForDiffusionLM, OneScanForDiffusionLM
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainerCallback
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.hf_argparser import HfArg

from arclm import train_bd3lm as bd3lm
from arclm.data_bd3lm import collate
from arclm.modeling_arclm import ArcLMForDiffusionLM
from arclm.nano.evaluate import decodings, evaluate
from arclm.nano.world import FAMILIES, tasks_per_family


ROOT = Path(__file__).resolve().parents[1]
PARENT = ROOT / "nano" / "arclm-nano-base"
SEEDS = (1, 2, 3)
TRAINED = {"boundary state": ArcLMForDiffusionLM, "one scan": OneScanForDiffusionLM}
SAMPLED = {"clean state": ArcLMForDiffusionLM, "state dropped": DroppedStateForDiffusionLM}
VIEWS = {"boundary state": SAMPLED, "one scan": SAMPLED | {"training view": OneScanForDiffusionLM}}
# held-out tasks that no training or choice of settings has used
EXACT_MATCH_SEED, NELBO_SEED = 21, 22


@dataclass
class AblationArguments:
    """How to train and what to measure."""

    max_steps: int = HfArg(default=2000, help="Optimizer steps of 16 tasks; every task is seen once.")
    eval_steps: int = HfArg(default=250, help="Steps between two measurements of the NELBO.")
    reasoning_weight: int = HfArg(default=3, help="How many times as often each reasoning kind is drawn.")
    nelbo_tasks: int = HfArg(default=128, help="Held-out tasks, of all kinds equally, for the NELBO.")
    tasks_per_family: int = HfArg(default=80, help="Held-out tasks of every family for exact match.")
    processes: int = HfArg(default=2, help="Trainings side by side, one thread each.")
    work_dir: str = HfArg(default=str(ROOT / "outputs" / "ablation"), help="Directory for what is made on the way.")
    output_file: str = HfArg(
        default=str(ROOT / "benchmarks" / "results" / "ablation.json"), help="Result file; the plot is beside it."
    )

    def settings(self) -> dict:
        """Return what the result of a run depends on."""
        return {key: value for key, value in asdict(self).items() if isinstance(value, int) and key != "processes"}


# ---- One run: train, measure


def view_of(model: ArcLMForDiffusionLM, cls: type[ArcLMForDiffusionLM]) -> ArcLMForDiffusionLM:
    """Return a model of class `cls` with a copy of the weights."""
    view = cls(model.config).eval()
    view.load_state_dict(model.state_dict())
    view.generation_config = model.generation_config
    return view


class NelboCurve(TrainerCallback):
    """Measures the NELBO per answer token in several views, every `eval_steps` steps.

    Fields:
        rows: {"step": int, "train_seconds": of this process, measuring left out, name of the view: nats} for each
            measurement.
    """

    def __init__(self, views: dict[str, type], samples, eval_steps: int):
        self.views, self.samples, self.eval_steps, self.rows = views, samples, eval_steps, []
        self.start = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.process_time()

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step % self.eval_steps == 0:
            now = time.process_time()
            row = {"step": state.global_step, "train_seconds": round(now - self.start, 1)}
            for name, cls in self.views.items():
                trainer = bd3lm.BD3LMTrainer(model=view_of(model, cls), args=args, data_collator=collate)
                row[name] = trainer.evaluate(self.samples)["eval_loss"]
            self.rows.append(row)
            print(row, flush=True)
            self.start += time.process_time() - now


def train_options(args: AblationArguments, seed: int) -> list[str]:
    """Return the options of train_bd3lm.py: those of nano/build.py, for fewer and smaller steps."""
    line = (
        f"--seed {seed} --max_steps {args.max_steps} --learning_rate 2e-3 --lr_scheduler_type cosine --warmup_steps 50"
        " --max_grad_norm 1.0 --per_device_train_batch_size 16 --gradient_accumulation_steps 1"
        " --per_device_eval_batch_size 32 --gradient_checkpointing false --use_cpu true --report_to none"
        " --logging_steps 50 --save_strategy no --disable_tqdm true"
    )
    paths = {
        "--model_name_or_path": "converted",
        "--train_file": "train.jsonl",
        "--eval_file": "nelbo.jsonl",
        "--output_dir": "trainer",
    }
    return [*line.split(), *(part for key, name in paths.items() for part in (key, f"{args.work_dir}/{name}"))]


def train(
    options: list[str],
    cls: type[ArcLMForDiffusionLM],
    views: dict[str, type],
    args: AblationArguments,
    make_trainer: Callable[..., bd3lm.BD3LMTrainer] = bd3lm.BD3LMTrainer,
    **config,
) -> tuple[bd3lm.BD3LMTrainer, NelboCurve]:
    """Train the converted model, loaded as `cls` with fields of its configuration changed, on one thread."""
    torch.set_num_threads(1)
    data_args, train_args = bd3lm.parse_args(options)
    tokenizer = AutoTokenizer.from_pretrained(data_args.model_name_or_path)
    model = cls.from_pretrained(data_args.model_name_or_path, dtype=torch.float32, **config)
    samples, _ = bd3lm.load_data(data_args, train_args, tokenizer, model.config)
    curve = NelboCurve(views, samples["eval"].sort("length"), args.eval_steps)
    trainer = make_trainer(
        model=model,
        args=train_args,
        train_dataset=samples["train"],
        processing_class=tokenizer,
        data_collator=collate,
        callbacks=[curve],
    )
    trainer.train()
    return trainer, curve


def earlier_result(file: Path, args: AblationArguments) -> dict | None:
    """Return what an earlier call wrote, if it did."""
    if not file.exists():
        return None
    record = json.loads(file.read_text(encoding="utf-8"))
    if record["settings"] != args.settings():
        raise ValueError(f"{file} was made with {record['settings']}. Use these, or another work_dir.")
    return record


def exact_match(model: ArcLMForDiffusionLM, tokenizer: Tokenizer, args: AblationArguments) -> dict[str, dict]:
    """Return the exact match on held-out tasks by tokens per step."""
    tasks = tasks_per_family("test", EXACT_MATCH_SEED, args.tasks_per_family)
    knobs = {key: value for key, value in decodings(model.config.block_size).items() if key != "dynamic"}
    return {key: accuracies(evaluate(model, tokenizer, tasks, **value)) for key, value in knobs.items()}


def run(trained: str, seed: int, args: AblationArguments) -> dict:
    """Train one model and measure it; take the result of an earlier call where there is one."""
    file = Path(args.work_dir, f"{trained.replace(' ', '_')}-{seed}.json")
    if record := earlier_result(file, args):
        return record
    start = time.perf_counter()
    trainer, curve = train(train_options(args, seed), TRAINED[trained], VIEWS[trained], args)
    train_seconds = time.perf_counter() - start
    views = {name: view_of(trainer.model, cls) for name, cls in SAMPLED.items()}
    matches = {name: exact_match(view, trainer.processing_class, args) for name, view in views.items()}
    record = {
        "trained": trained,
        "seed": seed,
        "settings": args.settings(),
        "train_seconds": round(train_seconds),
        "seconds": round(time.perf_counter() - start),
        "loss": [row for row in trainer.state.log_history if "loss" in row],
        "nelbo": curve.rows,
        "exact_match": matches,
    }
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def accuracies(result: dict) -> dict[str, float]:
    """Return the exact match of all families together and of each, and tokens per forward, of an `evaluate` result."""
    row = {"all": result["all"]["accuracy"]} | {name: result["families"][name]["accuracy"] for name in FAMILIES}
    rate = result["all"].get("tokens_per_forward")
    return row | ({"tokens_per_forward": rate} if rate else {})


# ---- All runs


def prepare(args: AblationArguments) -> None:
    """Convert the parent, write the tasks, and tokenize them once for all runs; what exists is kept."""
    work_dir = Path(args.work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    convert = f"convert_a2d.py --model_name_or_path {PARENT} --output_dir {work_dir}/converted"
    train = f"nano/world.py --output_file {work_dir}/train.jsonl --num_tasks {16 * args.max_steps} --seed 1"
    nelbo = f"nano/world.py --output_file {work_dir}/nelbo.jsonl --num_tasks {args.nelbo_tasks} --seed {NELBO_SEED}"
    commands = {
        "converted": convert + " --block_size 16 --right_shift_logits true",
        "train.jsonl": train + f" --reasoning_weight {args.reasoning_weight}",
        "nelbo.jsonl": nelbo + " --split test",
    }
    for name, command in commands.items():
        if not (work_dir / name).exists():
            subprocess.run([sys.executable, *command.split()], cwd=ROOT, check=True)
    data_args, train_args = bd3lm.parse_args(train_options(args, SEEDS[0]))
    tokenizer = AutoTokenizer.from_pretrained(data_args.model_name_or_path)
    model = ArcLMForDiffusionLM.from_pretrained(data_args.model_name_or_path)
    bd3lm.print_table(bd3lm.load_data(data_args, train_args, tokenizer, model.config)[1])


def measure_parent(args: AblationArguments) -> dict[str, float]:
    """Return the exact match of the autoregressive parent on the same tasks, token by token."""
    torch.set_num_threads(1)
    parent = AutoModelForCausalLM.from_pretrained(PARENT, dtype=torch.float32)
    tasks = tasks_per_family("test", EXACT_MATCH_SEED, args.tasks_per_family)
    return accuracies(evaluate(parent, AutoTokenizer.from_pretrained(PARENT), tasks))


def spread(values: list[float]) -> dict:
    """Mean, sample standard deviation and the values themselves, one for each seed."""
    return {"mean": round(mean(values), 4), "stdev": round(stdev(values), 4), "values": values}


def summarize(records: list[dict]) -> list[dict]:
    """One row for each way to train and to read: NELBO over the steps, exact match at the end."""
    rows = []
    for trained, views in VIEWS.items():
        runs = [record for record in records if record["trained"] == trained]
        for view in views:
            nelbo = {
                steps[0]["step"]: spread([row[view] for row in steps])
                for steps in zip(*(record["nelbo"] for record in runs), strict=True)
            }
            row = {"trained": trained, "read": view, "nelbo": nelbo}
            if view in SAMPLED:
                settings = [record["exact_match"][view] for record in runs]
                row["exact_match"] = {
                    tokens: {name: spread([s[tokens][name] for s in settings]) for name in settings[0][tokens]}
                    for tokens in settings[0]
                }
            rows.append(row)
    return rows


# ---- Table and plot


def print_table(rows: list[dict], parent: dict[str, float]) -> None:
    """Print NELBO and exact match, mean and standard deviation over the seeds."""
    table = Table("trained", "read with", "NELBO", "tokens per step", "exact match", *FAMILIES)
    table.add_row("parent", "-", "-", "1", *(f"{parent[name]:.1%}" for name in ("all", *FAMILIES)))
    for row in rows:
        nelbo = list(row["nelbo"].values())[-1]
        head = [row["trained"], row["read"], f"{nelbo['mean']:.3f} ± {nelbo['stdev']:.3f}"]
        for tokens, cells in row.get("exact_match", {"-": {}}).items():
            cells = [cells.get(name) for name in ("all", *FAMILIES)]
            cells = [f"{100 * cell['mean']:.1f} ± {100 * cell['stdev']:.1f} %" if cell else "-" for cell in cells]
            table.add_row(*head, tokens, *cells)
            head = ["", "", ""]
    console = Console()
    console.width = max(console.width, 120)
    console.print(table)


def plot(rows: list[dict], parent: dict[str, float], file: Path) -> None:
    """Draw NELBO over steps and exact match over tokens per step; bands and bars show all seeds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    colors = {"boundary state": "tab:blue", "one scan": "tab:red"}
    styles = {"clean state": "-", "state dropped": "--", "training view": ":"}
    for row in rows:
        look = {"color": colors[row["trained"]], "linestyle": styles[row["read"]], "marker": "o", "markersize": 4}
        label = f"{row['trained']}, {row['read']}"
        draw_nelbo(left, [int(step) for step in row["nelbo"]], list(row["nelbo"].values()), label=label, **look)
        if "exact_match" in row:
            draw_exact_match(right, row["exact_match"], label=label, **look)
    label_axes(left, right, parent)
    figure.savefig(file, dpi=120)


def draw_nelbo(axes: Axes, x: list[float], cells: list[dict], *, color: str, **look) -> None:
    """Draw the mean over the seeds, and a band from the lowest to the highest."""
    axes.plot(x, [cell["mean"] for cell in cells], color=color, **look)
    low, high = ([bound(cell["values"]) for cell in cells] for bound in (min, max))
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def draw_exact_match(axes: Axes, by_tokens: dict[str, dict], **look) -> None:
    """Draw the mean over the seeds, and a bar from the lowest to the highest."""
    cells = [cell["all"] for cell in by_tokens.values()]
    means = [100 * cell["mean"] for cell in cells]
    bars = [
        [m - 100 * min(cell["values"]) for m, cell in zip(means, cells, strict=True)],
        [100 * max(cell["values"]) - m for m, cell in zip(means, cells, strict=True)],
    ]
    axes.errorbar([int(tokens) for tokens in by_tokens], means, bars, capsize=3, **look)


def label_axes(left: Axes, right: Axes, parent: dict[str, float]) -> None:
    """Name what the NELBO on the left and the exact match on the right are drawn against."""
    right.axhline(100 * parent["all"], color="gray", linewidth=1, label="parent, token by token")
    left.set(xlabel="training steps", ylabel="NELBO (nats per answer token)", yscale="log", title="NELBO")
    right.set(xlabel="tokens per step", xticks=[1, 2, 4], ylabel="exact match (%)", ylim=(0, 100), title="Exact match")
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)


def main() -> None:
    """Run what is missing, print, draw, write."""
    args = HfArgumentParser(AblationArguments).parse_args_into_dataclasses()[0]
    prepare(args)
    with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
        # both ways of a seed before the next seed: what an interruption leaves is comparable
        runs = [pool.submit(run, trained, seed, args) for seed, trained in product(SEEDS, TRAINED)]
        parent = pool.submit(measure_parent, args)
        records, parent = [run.result() for run in runs], parent.result()
    rows = summarize(records)
    record = {
        "what": "arcLM-nano's parent, converted and trained in two ways, read in up to three. NELBO: nats per answer "
        "token. exact_match: by tokens per step, greedy, static strategy. stdev: over the seeds.",
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, no GPU, float32",
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "accelerate", "datasets", "tokenizers")},
        "seeds": SEEDS,
        "settings": args.settings(),
        "parent_exact_match": parent,
        "rows": rows,
        "runs": records,
    }
    output_file = Path(args.output_file)
    output_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    plot(rows, parent, output_file.with_suffix(".png"))
    print_table(rows, parent)
    print(f"Wrote {output_file}")


if __name__ == "__main__":
    main()
