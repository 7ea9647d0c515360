"""Peak memory and speed of train_bd3lm.py with the card's settings at the shapes of Qwen3.5-0.8B.

    python benchmarks/train_memory.py

Random weights, rows of 2,048 tokens of which almost all are response, batch 1, gradient checkpointing, AdamW, and
bfloat16 where the GPU has it: the script itself trains for two steps, each of 2 rows one after the other; the card's
are of 16, which takes longer and no more memory. On a GPU it may take no more than 24 GB, as much as an RTX 4090 has,
and is to take at most 22 GB. On a CPU it is float32, and what the process holds at most.

Results: benchmarks/results/train_memory_cpu.json (or _gpu.json).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import common
import torch
from transformers import AutoTokenizer, HfArgumentParser
from transformers.hf_argparser import HfArg

from arclm import train_bd3lm as bd3lm


CARD_MEMORY = 24 * 10**9
TARGETS = {"peak_mb": 22_000.0}  # at most, on a GPU
ACCUMULATION = 2  # rows of an optimizer step, one after the other
NUM_ROWS = 8


@dataclass
class TrainMemoryArguments:
    """What to train."""

    shape: str = HfArg(default="0.8b", help="Among nano, hidden256, 0.8b.")
    max_length: int = HfArg(default=2048, help="Tokens per row.")
    max_steps: int = HfArg(default=2, help="Optimizer steps of two rows. The first one is left out of the time.")
    output_file: str | None = HfArg(default=None, help="Result file.")


def make_inputs(shape: str, max_length: int, folder: Path) -> None:
    """Write a model with random weights, nano's tokenizer, and rows of `max_length` tokens."""
    model = common.make_arclm(shape, "cpu", torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(common.SHAPES["nano"])
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    # a word is a token or more, and what is too long is cut
    messages = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "one " * max_length}]
    line = json.dumps({"messages": messages}) + "\n"
    (folder / "train.jsonl").write_text(NUM_ROWS * line, encoding="utf-8")


def train(args: TrainMemoryArguments, folder: Path) -> list[dict]:
    """Train as the card does, and return what the run logged at its steps."""
    line = (
        f"--model_name_or_path {folder}/model --train_file {folder}/train.jsonl --output_dir {folder}/out"
        f" --max_length {args.max_length} --max_steps {args.max_steps} --gradient_accumulation_steps {ACCUMULATION}"
        " --logging_steps 1 --save_strategy no --answer_steps 0 --report_to none --disable_tqdm true"
    )
    bd3lm.main(line.split())
    history = json.loads((folder / "out" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry for entry in history if "loss" in entry]


def main() -> None:
    """Train, print, write."""
    args, device = HfArgumentParser(TrainMemoryArguments).parse_args_into_dataclasses()[0], common.default_device()
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CARD_MEMORY / total))
    with TemporaryDirectory() as name:
        make_inputs(args.shape, args.max_length, Path(name))
        steps = train(args, Path(name))
    tokens = steps[-1]["num_input_tokens_seen"] - steps[0]["num_input_tokens_seen"]
    seconds = steps[-1]["train_runtime"] - steps[0]["train_runtime"]
    row = {"shape": args.shape, "length": args.max_length, "peak_mb": steps[-1]["memory_gib"] * 2**30 / common.MB}
    row |= {"tokens_per_s": tokens / seconds, "loss": [step["loss"] for step in steps]}
    if device == "cuda":
        row = common.check_targets(row, TARGETS)
    record = common.start_record("train_bd3lm.py with the card's settings: peak memory, tokens per second.", device)
    shown = {key: value for key, value in row.items() if key != "loss"}
    common.print_table("Training with the card's settings", [shown])
    common.write_record(
        record | {"max_steps": args.max_steps, "gradient_accumulation_steps": ACCUMULATION, "rows": [row]},
        args.output_file or common.default_output("train_memory", device),
    )


if __name__ == "__main__":
    main()
