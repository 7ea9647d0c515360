"""The whole path in minutes on a CPU: convert arcLM-nano's parent, train it, load it, measure it, watch it denoise.

    make demo                          (or: python demo.py)

It runs the commands that a user would type, prints them, and leaves the model in outputs/demo/arclm-nano. The kept
nano/arclm-nano was made by the same commands with more steps (nano/build.py).
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from transformers.hf_argparser import HfArg

from arclm.nano.build import BuildArguments, build
from arclm.nano.evaluate import decodings, evaluate, render_prompt
from arclm.nano.world import FAMILIES, tasks_per_family


ROOT = Path(__file__).resolve().parent
PARENT, KEPT = ROOT / "nano" / "arclm-nano-base", ROOT / "nano" / "arclm-nano"
OUT = "outputs/demo"


@dataclass
class DemoArguments:
    """The whole path in minutes on a CPU."""

    max_steps: int = HfArg(default=200, help="Optimizer steps of training, 32 samples each.")
    tasks_per_family: int = HfArg(default=20, help="Held-out tasks per family to measure on.")


def measure(console: Console, model_dir: Path, count: int) -> None:
    """Print exact match on held-out tasks: the parent, the model just trained, and the kept arcLM-nano."""
    tasks = tasks_per_family("test", seed=0, count=count)
    table = Table("model", "decoding", *FAMILIES, "tokens per forward", "seconds", title="Exact match, held-out tasks")

    def add(name: str, decoding: str, model, tokenizer, **knobs) -> None:
        start = time.perf_counter()
        result = evaluate(model, tokenizer, tasks, batch_size=len(tasks), **knobs)
        rates = [f"{result['families'][family]['accuracy']:.0%}" for family in FAMILIES]
        rate = f"{result['all'].get('tokens_per_forward', 1):.2f}"
        table.add_row(name, decoding, *rates, rate, f"{time.perf_counter() - start:.0f}")

    with console.status("measuring"):
        tokenizer = AutoTokenizer.from_pretrained(PARENT)
        add("parent", "token by token", AutoModelForCausalLM.from_pretrained(PARENT, dtype=torch.float32), tokenizer)
        for name, directory in (("trained just now", model_dir), ("kept arclm-nano", KEPT)):
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
            model = AutoModel.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32)
            for decoding, knobs in decodings(model.config.block_size).items():
                label = f"{decoding} per step" if decoding.isdigit() else decoding
                add(name, label, model, tokenizer, **knobs)
    console.print(table)


def show_denoising(console: Console, model_dir: Path) -> None:
    """Print one held-out task of every family and, line by line, what each denoising step settled."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=True)
    model = AutoModel.from_pretrained(model_dir, trust_remote_code=True, dtype=torch.float32)
    mask_token_id = model.config.mask_token_id
    for task in tasks_per_family("test", seed=1, count=1):
        prompt = render_prompt(tokenizer, task)
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        output = model.generate(
            **inputs, max_new_tokens=128, do_sample=False, max_denoising_steps=8, return_dict_in_generate=True
        )
        console.rule(f"{task.family}: {task.prompt[-1]['content']}")
        before = None
        for block in output.history:
            line = Text()
            for i, token in enumerate(block[0].tolist()):
                piece = "░" if token == mask_token_id else tokenizer.decode([token]).replace("\n", "⏎")
                # a block begins with the end of the prompt or with mask tokens only
                is_new = before is not None and before[i] == mask_token_id and token != mask_token_id
                line.append(piece, style="bold green" if is_new else "dim" if token == mask_token_id else "")
            console.print(line)
            before = block[0].tolist()
        answer = tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        speed = f"{output.tokens_per_forward[0]:.1f} tokens per forward, {output.nfe} forward passes"
        console.print(Text(answer, style="cyan"), f"[dim]({speed})", sep="\n")


def main() -> None:
    """Convert, train, measure, show."""
    args = HfArgumentParser(DemoArguments).parse_args_into_dataclasses()[0]
    console, trained = Console(), ROOT / OUT / "arclm-nano"
    shutil.rmtree(ROOT / OUT, ignore_errors=True)
    num_tasks = 32 * args.max_steps  # no task twice
    build(BuildArguments(f"{OUT}/arclm-nano", f"{OUT}/work", args.max_steps, more_steps=0, num_tasks=num_tasks))
    measure(console, trained, args.tasks_per_family)
    show_denoising(console, trained)
    console.print(f"\nThe model just trained is in {trained}. README.md says how to load it, and what was measured.")


if __name__ == "__main__":
    main()
