"""Make arcLM-nano from its parent with the commands that a user types: convert, write data, train.

    python nano/build.py

It writes nano/arclm-nano and, beside the weights, training.json with the commands, seed, versions and time. The data
and the converted, untrained model stay in outputs/nano.
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
WORK = Path("outputs") / "nano"


@dataclass
class BuildArguments:
    """How to train. The defaults made the kept checkpoint."""

    output_dir: str = HfArg(default="nano/arclm-nano", help="Directory to write; an older one is replaced.")
    block_size: int = HfArg(default=16, help="Tokens denoised together.")
    max_steps: int = HfArg(default=4000, help="Optimizer steps.")
    num_tasks: int = HfArg(default=100_000, help="Training tasks.")
    seed: int = HfArg(default=1, help="Seed of the tasks and of the training.")


def commands(args: BuildArguments) -> list[list[str]]:
    """Return the three commands, as arguments of `python` in the repository."""
    converted, data, trained = str(WORK / "converted"), str(WORK / "train.jsonl"), str(WORK / "trained")
    parent = "nano/arclm-nano-base"
    convert = ["convert_a2d.py", "--model_name_or_path", parent, "--output_dir", converted]
    convert += ["--block_size", str(args.block_size)]
    world = ["nano/world.py", "--output_file", data, "--num_tasks", str(args.num_tasks), "--seed", str(args.seed)]
    # one process per core: at this size faster than one process with several threads
    train = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "train_bd3lm.py"]
    train += [
        "--model_name_or_path",
        converted,
        "--train_file",
        data,
        "--output_dir",
        trained,
        "--seed",
        str(args.seed),
    ]
    train += ["--max_steps", str(args.max_steps), "--per_device_train_batch_size", "16"]
    train += ["--gradient_accumulation_steps", "1", "--gradient_checkpointing", "false", "--ddp_backend", "gloo"]
    train += ["--learning_rate", "2e-3", "--lr_scheduler_type", "cosine", "--warmup_steps", "50"]
    train += ["--max_grad_norm", "1.0", "--logging_steps", "50", "--report_to", "none"]
    return [convert, world, train]


def main() -> None:
    """Run the commands, move the result to its place, write training.json."""
    args = HfArgumentParser(BuildArguments).parse_args_into_dataclasses()[0]
    shutil.rmtree(ROOT / WORK, ignore_errors=True)
    (ROOT / WORK).mkdir(parents=True)
    record = {"commands": [], "seconds": []}
    for command in commands(args):
        line = f"python {shlex.join(command)}"
        print(f"\n$ {line}", flush=True)
        start = time.perf_counter()
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, env=environment)
        record["commands"].append(line)
        record["seconds"].append(round(time.perf_counter() - start))
    record |= {
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, no GPU, float32",
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "accelerate", "datasets", "tokenizers")},
    }
    output_dir = ROOT / args.output_dir
    shutil.rmtree(output_dir, ignore_errors=True)
    shutil.copytree(ROOT / WORK / "trained", output_dir, ignore=shutil.ignore_patterns("checkpoint-*", "runs"))
    (output_dir / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
