"""Make arcLM-nano from its parent with the commands that a user types: convert, write data, train.

    python nano/build.py --output_dir nano/arclm-nano

Beside the weights it writes training.json with the commands, versions and time. The data and the converted, untrained
model stay in outputs/nano. It runs on two cores, one process on each: at this size faster than one process on both.
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg


ROOT = Path(__file__).resolve().parent.parent


@dataclass
class BuildArguments:
    """How to train. The defaults made the kept checkpoint."""

    output_dir: str = HfArg(help="Directory to create.")
    work_dir: str = HfArg(default="outputs/nano", help="Directory for what is made on the way; emptied first.")
    max_steps: int = HfArg(default=3600, help="Optimizer steps of 32 samples with clipped masking rates.")
    more_steps: int = HfArg(default=1400, help="Then steps with all rates and reasoning four times as often; 0: none.")
    num_tasks: int = HfArg(default=120_000, help="Tasks of the first run.")
    seed: int = HfArg(default=1, help="Seed of the tasks and of the training.")


def commands(args: BuildArguments) -> tuple[list[list[str]], str]:
    """Return the commands, as arguments of `python` in the repository, and the directory of the result."""
    model, data, trained = (f"{args.work_dir}/{name}" for name in ("converted", "train.jsonl", "trained"))
    convert = f"convert_a2d.py --model_name_or_path nano/arclm-nano-base --output_dir {model}"
    convert += " --block_size 16 --right_shift_logits true --context_attention causal"
    world = f"nano/world.py --output_file {data} --num_tasks {args.num_tasks} --seed {args.seed}"
    lines = [convert, world, train_command(model, data, trained, "clipped", args.max_steps, args.seed, "2e-3")]
    if args.more_steps:
        model, data, trained = trained, f"{args.work_dir}/more.jsonl", f"{args.work_dir}/trained_more"
        seed, num_tasks = args.seed + 1, 32 * args.more_steps
        world = f"nano/world.py --output_file {data} --num_tasks {num_tasks} --seed {seed} --reasoning_weight 4"
        lines += [world, train_command(model, data, trained, "linear", args.more_steps, seed, "1e-3")]
    return [line.split() for line in lines], trained


def train_command(model: str, data: str, output_dir: str, schedule: str, steps: int, seed: int, rate: str) -> str:
    """Return the command of a run."""
    return (
        "-m torch.distributed.run --nproc_per_node 2 train_bd3lm.py --use_cpu true"
        f" --model_name_or_path {model} --train_file {data} --output_dir {output_dir}"
        " --per_device_train_batch_size 16 --gradient_accumulation_steps 1 --gradient_checkpointing false"
        " --lr_scheduler_type cosine --warmup_steps 50 --max_grad_norm 1.0"
        f" --noise_schedule {schedule} --ar_loss_weight 0.5"
        " --logging_steps 50 --report_to none --save_strategy no --answer_steps 0"
        f" --seed {seed} --max_steps {steps} --learning_rate {rate}"
    )


def build(args: BuildArguments) -> None:
    """Run the commands and make `output_dir` of the result."""
    output_dir, work_dir = ROOT / args.output_dir, ROOT / args.work_dir
    if output_dir.exists():
        raise FileExistsError(f"{output_dir} exists. Choose another output_dir, or remove it.")
    shutil.rmtree(work_dir, ignore_errors=True)
    work_dir.mkdir(parents=True)
    record = {"commands": [], "seconds": []}
    lines, trained = commands(args)
    for command in lines:
        record["commands"].append(f"python {shlex.join(command)}")
        print(f"\n$ {record['commands'][-1]}", flush=True)
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        record["seconds"].append(round(time.perf_counter() - start))
    record |= {
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, no GPU, float32",
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "accelerate", "datasets", "tokenizers")},
    }
    (ROOT / trained / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for name in ("README.md", "training.md", "training.png"):  # training.json tells of all commands
        (ROOT / trained / name).unlink()
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    (ROOT / trained).rename(output_dir)


def main() -> None:
    """Run from the command line."""
    try:
        build(HfArgumentParser(BuildArguments).parse_args_into_dataclasses()[0])
    except FileExistsError as error:
        sys.exit(f"build.py: {error}")


if __name__ == "__main__":
    main()
