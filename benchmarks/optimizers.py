"""What another optimizer, or LoRA, saves: seconds and peak memory of a training step, and what it has learned.

    python benchmarks/optimizers.py

All are options of train_bd3lm.py: --optim with a name of transformers' TrainingArguments, and --lora_rank. Those of
packages that are not installed are left out: adamw_8bit is of bitsandbytes, adamw_torch_8bit of torchao (its first
step compiles). A step is of one row of random tokens, all of them response. What is learned is seen on arcLM-nano's
parent, converted with blocks of 16 and shifted logits: the mean loss of the last tenth of a short run, the same tasks
with the same noise for all.

Results: benchmarks/results/optimizers_cpu.json (or _gpu.json).
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import NamedTuple

import common
import torch
from ablation import PARENT, ROOT
from train_speed import arclm_loss, random_rows, training_step
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from arclm import train_bd3lm as bd3lm


LORA_RANK = 16


class Row(NamedTuple):
    """One line of the table: an optimizer, the package it is in, and the learning rate of the run on nano."""

    optim: str
    package: str = "torch"
    lora_rank: int = 0
    learning_rate: float = 2e-3


ROWS = {
    "AdamW, fused (the default)": Row("adamw_torch_fused"),
    "AdamW": Row("adamw_torch"),
    "AdamW, 8-bit state (bitsandbytes)": Row("adamw_8bit", "bitsandbytes"),
    "AdamW, 8-bit state (torchao)": Row("adamw_torch_8bit", "torchao"),
    f"LoRA of rank {LORA_RANK}, AdamW, fused": Row("adamw_torch_fused", lora_rank=LORA_RANK, learning_rate=1e-2),
}


@dataclass
class OptimizersArguments:
    """What to measure."""

    device: str = HfArg(default_factory=common.default_device, help="cpu or cuda.")
    shape: str | None = HfArg(default=None, help="Among nano, hidden256, 0.8b. CPU: hidden256; GPU: 0.8b.")
    length: int | None = HfArg(default=None, help="Tokens of the row. CPU: 512; GPU: 2048.")
    repeats: int = HfArg(default=9, help="Recorded rounds, of which the median counts.")
    max_steps: int = HfArg(default=150, help="Optimizer steps of 16 tasks on nano.")
    output_file: str | None = HfArg(default=None, help="Result file.")


def prepare(row: Row, shape: str | dict, length: int, device: str) -> Callable[[], float]:
    """Return the training step of one line."""
    model = common.make_arclm(shape, device, torch.float32)
    loss_model = bd3lm.add_lora(model, row.lora_rank) if row.lora_rank else model
    _, args = bd3lm.parse_args(["--optim", row.optim, "--report_to", "none", "--output_dir", gettempdir()])
    optimizer = bd3lm.BD3LMTrainer(model=loss_model, args=args).create_optimizer()
    x_0, labels = random_rows(model.config, 1, length, 1.0, device)
    return training_step(loss_model, arclm_loss(loss_model, x_0, labels), device, optimizer)


def learn(row: Row, max_steps: int, folder: Path) -> float:
    """Train nano's parent; return the mean loss of the last tenth of the steps."""
    line = (
        f"--model_name_or_path {folder}/converted --train_file {folder}/train.jsonl --output_dir {folder}/out"
        f" --optim {row.optim} --lora_rank {row.lora_rank} --learning_rate {row.learning_rate} --max_steps {max_steps}"
        " --lr_scheduler_type cosine --warmup_steps 20 --max_grad_norm 1.0 --per_device_train_batch_size 16"
        " --gradient_accumulation_steps 1 --gradient_checkpointing false --report_to none --logging_steps 1"
        " --save_strategy no --disable_tqdm true --answer_steps 0 --seed 1"
    )
    bd3lm.main(line.split())
    history = json.loads((folder / "out" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


def make_task_files(max_steps: int, folder: Path) -> None:
    """Convert nano's parent and write its tasks."""
    for command in (
        f"convert_a2d.py --model_name_or_path {PARENT} --output_dir {folder}/converted --block_size 16"
        " --right_shift_logits true",
        f"nano/world.py --output_file {folder}/train.jsonl --num_tasks {16 * max_steps} --seed 1",
    ):
        subprocess.run([sys.executable, *command.split()], cwd=ROOT, check=True)


def main() -> None:
    """Measure, print, write."""
    args = HfArgumentParser(OptimizersArguments).parse_args_into_dataclasses()[0]
    is_gpu = args.device == "cuda"
    shape, length = args.shape or ("0.8b" if is_gpu else "hidden256"), args.length or (2048 if is_gpu else 512)
    rows = {name: row for name, row in ROWS.items() if find_spec(row.package)}
    for name in ROWS.keys() - rows.keys():
        print(f"{name} is left out: {ROWS[name].package} is not installed.")
    lines = []
    with TemporaryDirectory() as folder:
        make_task_files(args.max_steps, Path(folder))
        for name, row in rows.items():
            # one after the other: all of them at once need more memory than a consumer's GPU has
            step = prepare(row, shape, length, args.device)
            seconds = common.interleave({name: lambda step=step: common.timed(step, args.device)}, args.repeats)[name]
            del step
            line = {"row": name, **row._asdict(), "step_s": common.median(seconds), "peak_mb": None}
            if seconds:  # it fits into the memory
                peak = common.peak_memory(args.device, prepare, row, shape, length, args.device)
                line["peak_mb"] = peak / common.MB
            lines.append(line | {"loss_on_nano": learn(row, args.max_steps, Path(folder))})
            print(lines[-1], flush=True)
    for line in lines:
        line["step_over_default"] = common.ratio(line["step_s"], lines[0]["step_s"])
        line["peak_over_default"] = common.ratio(line["peak_mb"], lines[0]["peak_mb"])
    record = common.start_record("Optimizers: a training step, medians, and the loss of a short run.", args.device)
    settings = {"shape": shape, "length": length, "repeats": args.repeats, "max_steps": args.max_steps}
    common.print_table("Optimizers", lines)
    common.write_record(
        record | settings | {"rows": lines}, args.output_file or common.default_output("optimizers", args.device)
    )


if __name__ == "__main__":
    main()
