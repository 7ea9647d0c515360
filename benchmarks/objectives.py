"""Which objective trains best: options of BD3LM training against the baseline, on arcLM-nano, three seeds each.

    python benchmarks/objectives.py

trains nano/arclm-nano-base, converted as nano/build.py does, on the same tasks in the same order for the same steps:

- baseline: as nano/build.py, so blocks of 16, shifted logits, rates of the linear schedule;
- unshifted logits: a masked token is predicted from its own position;
- complementary masks: every task with a mask and with its complement. 8 tasks a step in place of 16, so a step has as
  many noisy tokens and costs as much; both streams come as rows of a batch, and the clean one is read for each;
- causal context: the clean stream is causal inside a block too. The control of the next one;
- AR loss: with causal context, 0.5 times the parent's loss on the clean stream is added, in the same pass;
- cosine, clipped: other noise schedules;
- AR loss, clipped: the two that did best alone, together; added after the others were known.

NELBO: nats per answer token on held-out tasks, linear schedule, the same masks for all. Exact match: greedy, static
strategy, 1, 2 and 4 tokens per step. Clean NLL: what the clean stream knows of the next token (causal context only,
else it has read it). Seconds: of the processor for the training steps, what measuring takes left out.

Decided before the run: an option helps if in every seed its last NELBO is below that of its control with the same
seed, by more on average than the control spreads over the seeds, and no mean exact match is 3 points lower. Expected:

- unshifted logits are much worse, as in the first comparison (LOG.md: 0.49 against 0.32);
- complementary masks: no difference that shows. The two masks of a task vary against each other, but half as many
  tasks are seen;
- causal context: no difference; AR loss: a lower clean NLL, the same NELBO;
- cosine and clipped: a few per cent less NELBO (BD3-LM, arXiv:2503.09573, table 8, blocks of 16: perplexity 31.4 and
  31.1 against 31.7), and clipped not better in exact match, since generation begins where it never trains;
- AR loss, clipped: better than either at 1 and 2 tokens per step, at 4 no better than clipped.

Results: benchmarks/results/objectives.json and objectives.png. Each training writes its result into `work_dir` when it
is done, and a second call only makes up for those that are missing. (What came out is in LOG.md.)
"""

import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import common
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from ablation import (
    ROOT,
    SEEDS,
    AblationArguments,
    draw_exact_match,
    draw_nelbo,
    earlier_result,
    exact_match,
    label_axes,
    measure_parent,
    prepare,
    spread,
    train,
    train_options,
)
from datasets import Dataset
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from arclm.data_bd3lm import IGNORE, collate
from arclm.modeling_arclm import ArcLMForDiffusionLM
from arclm.noise_bd3lm import T_MIN
from arclm.train_bd3lm import BD3LMTrainer


# The parent starts at the minimum of this loss (0.02 nats), the NELBO at 6: less than 1, so as not to lead, and not
# much less, so as to hold the clean stream there.
AR_WEIGHT = 0.5


# ---- Variants


class ComplementaryTrainer(BD3LMTrainer):
    """Trains on every row twice, with a mask and with its complement: each response token is predicted once."""

    def add_noise(self, batch: dict[str, torch.Tensor], is_training: bool) -> dict[str, torch.Tensor]:
        inputs = super().add_noise(batch, is_training)
        if not is_training:
            return inputs
        x_0, labels = batch["input_ids"], batch["labels"]
        is_rest = (labels != IGNORE) & (inputs["labels"] == IGNORE)
        rate = (1 - inputs["masking_rate"]).clamp(min=T_MIN)
        rest = {
            "input_ids": x_0,
            "attention_mask": batch["attention_mask"],
            "noisy_input_ids": x_0.masked_fill(is_rest, self.model.config.mask_token_id),
            "labels": labels.masked_fill(~is_rest, IGNORE),
            "loss_weights": 1 / rate,
            "masking_rate": rate,
        }
        both = {name: torch.cat((inputs[name], rest[name])) for name in rest}
        # 1 - t is uniform as t is, so both rows estimate the same NELBO
        return both | {"loss_weights": both["loss_weights"] / 2}


class Variant(NamedTuple):
    """How a model is trained, where it differs from the baseline.

    Fields:
        config: fields of the converted model's configuration, which no weight depends on.
        trainer, trainer_options: what trains.
        options: of train_bd3lm.py.
        control: the variant that it is compared with.
    """

    config: dict = {}
    trainer: type[BD3LMTrainer] = BD3LMTrainer
    trainer_options: dict = {}
    options: str = ""
    control: str = "baseline"


CAUSAL = {"context_attention": "causal"}
VARIANTS = {
    "baseline": Variant(),
    "unshifted logits": Variant({"right_shift_logits": False}),
    "complementary masks": Variant(trainer=ComplementaryTrainer, options="--per_device_train_batch_size 8"),
    "causal context": Variant(CAUSAL),
    "AR loss": Variant(CAUSAL, trainer_options={"ar_loss_weight": AR_WEIGHT}, control="causal context"),
    "cosine": Variant(trainer_options={"noise_schedule": "cosine"}),
    "clipped": Variant(trainer_options={"noise_schedule": "clipped"}),
    "AR loss, clipped": Variant(
        CAUSAL, trainer_options={"ar_loss_weight": AR_WEIGHT, "noise_schedule": "clipped"}, control="AR loss"
    ),
}


@dataclass
class ObjectivesArguments(AblationArguments):
    """How to train and what to measure."""

    max_steps: int = HfArg(default=300, help="Optimizer steps of 16 rows; every task is seen once.")
    eval_steps: int = HfArg(default=100, help="Steps between two measurements of the NELBO.")
    nelbo_tasks: int = HfArg(default=64, help="Held-out tasks, of all kinds equally, for the NELBO.")
    tasks_per_family: int = HfArg(default=60, help="Held-out tasks of every family for exact match.")
    variants: list[str] = field(
        default_factory=lambda: list(VARIANTS), metadata={"help": "Which to train, with their controls."}
    )
    work_dir: str = HfArg(default=str(ROOT / "outputs" / "objectives"), help="Directory for what is made on the way.")
    output_file: str = HfArg(
        default=str(common.RESULTS / "objectives.json"), help="Result file; the plot is beside it."
    )

    def __post_init__(self):
        if unknown := [name for name in self.variants if name not in VARIANTS]:
            raise SystemExit(f"The variant {unknown[0]!r} is unknown. Choose among {', '.join(VARIANTS)}.")
        wanted = {"baseline", *self.variants}
        wanted |= {VARIANTS[name].control for name in wanted}
        wanted |= {VARIANTS[name].control for name in wanted}  # a control may have one
        self.variants = [name for name in VARIANTS if name in wanted]


# ---- One run: train, measure


@torch.no_grad()
def clean_nll(model: ArcLMForDiffusionLM, samples: Dataset) -> float:
    """Return nats per response token of the clean stream, which has causal context."""
    total, tokens = 0.0, 0
    for start in range(0, len(samples), 32):
        batch = collate([samples[i] for i in range(start, min(start + 32, len(samples)))])
        logits, labels = model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1], batch["labels"][:, 1:]
        total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum").item()
        tokens += (labels != IGNORE).sum().item()
    return total / tokens


def run(name: str, seed: int, args: ObjectivesArguments) -> dict:
    """Train one variant and measure it; take the result of an earlier call where there is one."""
    file = Path(args.work_dir, f"{name.replace(' ', '_')}-{seed}.json")
    if record := earlier_result(file, args):
        return record
    start, variant = time.perf_counter(), VARIANTS[name]
    options = [*train_options(args, seed), *variant.options.split()]
    make_trainer = partial(variant.trainer, **variant.trainer_options)
    arclm = ArcLMForDiffusionLM
    trainer, curve = train(options, arclm, {"nelbo": arclm}, args, make_trainer, **variant.config)
    model = trainer.model.eval()
    is_causal = model.config.context_attention == "causal"
    record = {
        "variant": name,
        "seed": seed,
        "settings": args.settings(),
        "loss": [row for row in trainer.state.log_history if "loss" in row],
        "nelbo": curve.rows,
        "clean_nll": clean_nll(model, curve.samples) if is_causal else None,
        "exact_match": exact_match(model, trainer.processing_class, args),
        "seconds": round(time.perf_counter() - start),
    }
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


# ---- All runs


def summarize(records: list[dict]) -> list[dict]:
    """One row for each variant, means and spreads over the seeds; differences are those of runs with the same seed."""
    by_variant = {name: [r for r in records if r["variant"] == name] for name in VARIANTS}
    last = {name: [run["nelbo"][-1]["nelbo"] for run in runs] for name, runs in by_variant.items()}
    rows = []
    for name, runs in by_variant.items():
        if not runs:
            continue
        control = VARIANTS[name].control
        settings = [run["exact_match"] for run in runs]
        curve = list(zip(*(run["nelbo"] for run in runs), strict=True))
        row = {
            "variant": name,
            "control": control,
            "nelbo": {steps[0]["step"]: spread([row["nelbo"] for row in steps]) for steps in curve},
            "train_seconds": {steps[0]["step"]: spread([row["train_seconds"] for row in steps]) for steps in curve},
            "exact_match": {
                tokens: {part: spread([s[tokens][part] for s in settings]) for part in settings[0][tokens]}
                for tokens in settings[0]
            },
        }
        if name != control:
            row["difference"] = spread([a - b for a, b in zip(last[name], last[control], strict=True)])
        if runs[0]["clean_nll"] is not None:
            row["clean_nll"] = spread([run["clean_nll"] for run in runs])
        rows.append(row)
    return [row | {"helps": helps(row, rows)} for row in rows]


def helps(row: dict, rows: list[dict]) -> bool | None:
    """Apply the rule that was set before the run; `None` for the baseline."""
    if "difference" not in row:
        return None
    control = next(other for other in rows if other["variant"] == row["control"])
    is_lower = max(row["difference"]["values"]) < 0
    is_clear = -row["difference"]["mean"] > list(control["nelbo"].values())[-1]["stdev"]
    means = [[match["all"]["mean"] for match in each["exact_match"].values()] for each in (row, control)]
    return is_lower and is_clear and all(a > b - 0.03 for a, b in zip(*means, strict=True))


def cell(values: dict | None, scale: float = 1, digits: int = 3) -> str:
    """Return mean and standard deviation as text."""
    return f"{scale * values['mean']:.{digits}f} ± {scale * values['stdev']:.{digits}f}" if values else "-"


def print_rows(rows: list[dict]) -> None:
    """Print one line for each variant."""
    table = [
        {
            "variant": row["variant"],
            "last NELBO": cell(list(row["nelbo"].values())[-1]),
            "less that of": row["control"] if "difference" in row else "-",
            "difference": cell(row.get("difference")),
            "seconds": cell(list(row["train_seconds"].values())[-1], digits=0),
            "clean NLL": cell(row.get("clean_nll")),
            **{f"exact match at {n} (%)": cell(match["all"], 100, 1) for n, match in row["exact_match"].items()},
            "helps": {True: "yes", False: "no", None: "-"}[row["helps"]],
        }
        for row in rows
    ]
    common.print_table("Objectives, mean and standard deviation over the seeds", table)


def plot(rows: list[dict], parent: dict[str, float], file: Path) -> None:
    """Draw NELBO over steps and over seconds, and exact match over tokens per step; bands and bars show all seeds."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 4.6), layout="constrained")
    for i, row in enumerate(rows):
        look = {"color": f"C{i}", "label": row["variant"], "marker": "o", "markersize": 4}
        nelbo = list(row["nelbo"].values())
        draw_nelbo(left, [int(step) for step in row["nelbo"]], nelbo, **look)
        draw_nelbo(middle, [seconds["mean"] for seconds in row["train_seconds"].values()], nelbo, **look)
        draw_exact_match(right, row["exact_match"], **look)
    label_axes(left, right, parent)
    middle.set(xlabel="seconds of one core for training", yscale="log", title="NELBO")
    middle.grid(alpha=0.3, which="both")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    """Run what is missing, print, draw, write."""
    args = HfArgumentParser(ObjectivesArguments).parse_args_into_dataclasses()[0]
    record = common.start_record(
        "arcLM-nano's parent, converted and trained with several objectives. NELBO: nats per answer token. "
        "train_seconds: of one core. exact_match: by tokens per step, greedy, static strategy. difference: to the "
        "last NELBO of the control with the same seed. stdev: over the seeds.",
        "cpu",
    )
    prepare(args)
    with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
        # all variants of a seed before the next seed: what an interruption leaves is comparable
        runs = [pool.submit(run, name, seed, args) for seed, name in product(SEEDS, args.variants)]
        parent = pool.submit(measure_parent, args)
        records, parent = [run.result() for run in runs], parent.result()
    rows = summarize(records)
    results = {"settings": args.settings(), "ar_weight": AR_WEIGHT, "parent_exact_match": parent, "rows": rows}
    common.write_record(record | {"seed": SEEDS} | results | {"runs": records}, args.output_file)
    plot(rows, parent, Path(args.output_file).with_suffix(".png"))
    print_rows(rows)


if __name__ == "__main__":
    main()
