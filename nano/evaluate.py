"""Measure exact match on the world of arcLM-nano, for an autoregressive or a block-diffusion model.

python nano/evaluate.py --model_name_or_path nano/arclm-nano-base --tasks_per_family 300 --output_file result.json
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from arclm.nano.world import Task, check, tasks_per_family


def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: list[Task], **options) -> dict:
    """Generate an answer to every task and count the exact matches.

    An answer counts only where the model also ended it: a generation without the end token is wrong. For the arguments
    see `answer`.

    Returns:
        {"all": row, "families": {family: row | {"kinds": {kind: row}}}}. A row has `accuracy` in [0, 1], `tasks`,
        `answer_tokens` (mean, end token included) and, if the model reports it, `tokens_per_forward` (mean over
        tasks).
    """
    records = []
    for task, ids, rate in answer(model, tokenizer, tasks, **options):
        records.append((task, *judge(tokenizer, task, ids), rate))
    return summarize(records)


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[Task],
    *,
    batch_size: int = 64,
    progress: bool = False,
    **generate_kwargs,
) -> Iterator[tuple[Task, list[int], float | None]]:
    """Yield each task, sorted by the length of its prompt, with the generated ids and their tokens per forward.

    Args:
        model: anything whose `generate` takes a left-padded batch and returns prompt and generation.
        tokenizer: with the chat template; the prompts are rendered with it.
        tasks: the tasks, answered in batches of about the same prompt length.
        batch_size: rows per batch.
        progress: show a progress bar.
        generate_kwargs: passed to `generate` over the defaults (greedy, at most 128 new tokens).
    """
    generate_kwargs = {"do_sample": False, "max_new_tokens": 128} | generate_kwargs
    prompts = [render_prompt(tokenizer, task) for task in tasks]
    order = sorted(range(len(tasks)), key=lambda index: len(prompts[index]))
    starts = range(0, len(order), batch_size)
    for start in track(starts, description="evaluating") if progress else starts:
        indices = order[start : start + batch_size]
        # without the tasks' own special tokens: the prompts hold them already
        inputs = tokenizer(
            [prompts[i] for i in indices],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        )
        output = model.generate(
            input_ids=inputs["input_ids"].to(model.device),
            attention_mask=inputs["attention_mask"].to(model.device),
            return_dict_in_generate=True,
            **generate_kwargs,
        )
        rows = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        rates = getattr(output, "tokens_per_forward", None)
        rates = [None] * len(rows) if rates is None else torch.as_tensor(rates).expand(len(rows)).tolist()
        yield from zip([tasks[i] for i in indices], rows, rates, strict=True)


def render_prompt(tokenizer: PreTrainedTokenizerBase, task: Task) -> str:
    """Render everything up to the generation prompt."""
    return tokenizer.apply_chat_template(
        task.prompt,
        tools=task.tools,
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=task.enable_thinking,
    )


def judge(tokenizer: PreTrainedTokenizerBase, task: Task, generated: list[int]) -> tuple[bool, int]:
    """Check generated ids up to the end token.

    Returns:
        whether the answer is right, and its number of tokens with the end token.
    """
    if tokenizer.eos_token_id not in generated:
        return False, len(generated)
    end = generated.index(tokenizer.eos_token_id)
    # special tokens stay: a mask or pad token inside an answer makes it wrong
    return check(task, tokenizer.decode(generated[:end], skip_special_tokens=False)), end + 1


def degeneration(tokenizer: PreTrainedTokenizerBase, task: Task, generated: list[int]) -> str | None:
    """Name what makes a generation degenerate, `None` for one that is merely right or wrong.

    - "no end": it does not stop.
    - "special tokens": special tokens stand before the end token. A right answer has none.
    - "repeated span": a span comes three or more times in a row, at least 8 tokens in all and more than in the right
      answer (there are tasks to repeat something).
    """
    if tokenizer.eos_token_id not in generated:
        return "no end"
    generated = generated[: generated.index(tokenizer.eos_token_id)]
    if set(generated) & set(tokenizer.all_special_ids):
        return "special tokens"
    texts = [task.answer.get("reasoning_content") or "", task.answer.get("content") or ""]
    reference = max(repeated_tokens(tokenizer(text, add_special_tokens=False).input_ids) for text in texts)
    return "repeated span" if repeated_tokens(generated) >= max(8, reference + 1) else None


def repeated_tokens(ids: list[int], most: int = 16) -> int:
    """The most tokens that one span of up to `most` tokens covers by coming three or more times in a row."""
    covered = 0
    for span in range(1, most + 1):
        equal = 0  # consecutive positions that agree with the one a span earlier
        for i in range(span, len(ids)):
            equal = equal + 1 if ids[i] == ids[i - span] else 0
            if equal >= 2 * span:
                covered = max(covered, (equal // span + 1) * span)
    return covered


def summarize(records: list[tuple[Task, bool, int, float | None]]) -> dict:
    """Average (task, correct, answer tokens, tokens per forward) per family and kind."""
    groups = defaultdict(list)
    for task, *record in records:
        for key in ((), (task.family,), (task.family, task.kind)):
            groups[key].append(record)

    def row(key: tuple[str, ...]) -> dict:
        correct, tokens, rates = zip(*groups[key], strict=True)
        count = len(correct)
        means = {
            "accuracy": round(sum(correct) / count, 4),
            "tasks": count,
            "answer_tokens": round(sum(tokens) / count, 2),
        }
        if None not in rates:
            means["tokens_per_forward"] = round(sum(rates) / count, 3)
        return means

    families = {}
    for key in sorted(groups):
        if len(key) == 1:
            families[key[0]] = row(key) | {"kinds": {}}
        elif len(key) == 2:
            families[key[0]]["kinds"][key[1]] = row(key)
    return {"all": row(()), "families": families}


def decodings(block_size: int) -> dict[str, dict]:
    """Name the ways to generate that are compared, with their knobs: 1, 2, 4 tokens per step, and by confidence."""
    static = {"remasking_strategy": "low_confidence_static"}
    return {str(k): static | {"max_denoising_steps": -(-block_size // k)} for k in (1, 2, 4)} | {
        "dynamic": {"remasking_strategy": "low_confidence_dynamic"}
    }


def print_table(results: dict, console: Console) -> None:
    """Print the result of `evaluate` as a table."""
    table = Table("family", "kind", "exact match", "tasks", "answer tokens", "tokens per forward")

    def add(family: str, kind: str, row: dict, style: str | None = None) -> None:
        rate = row.get("tokens_per_forward")
        cells = (
            f"{row['accuracy']:.1%}",
            str(row["tasks"]),
            f"{row['answer_tokens']:.1f}",
            f"{rate:.2f}" if rate else "-",
        )
        table.add_row(family, kind, *cells, style=style)

    for family, row in results["families"].items():
        for kind, kind_row in row["kinds"].items():
            add(family, kind, kind_row)
        add(family, "all", row, style="bold")
    console.print(table)


@dataclass
class EvaluateArguments:
    """What to measure."""

    model_name_or_path: str = field(metadata={"help": "Model directory or Hub id, with its tokenizer."})
    tasks_per_family: int = field(default=300, metadata={"help": "Held-out tasks of every family."})
    seed: int = field(default=1, metadata={"help": "Seed of the tasks."})
    split: str = field(default="test", metadata={"help": "test (held-out values) or train."})
    batch_size: int = field(default=64, metadata={"help": "Rows per call of generate."})
    generate_kwargs: str = field(default="{}", metadata={"help": "JSON dict for generate, such as '{\"steps\": 64}'."})
    output_file: str | None = field(default=None, metadata={"help": "JSON file for the result."})


def main() -> None:
    """Load a model, measure it, print the table, write the file."""
    args = HfArgumentParser(EvaluateArguments).parse_args_into_dataclasses()[0]
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, trust_remote_code=True, dtype="auto").eval()
    tasks = tasks_per_family(args.split, args.seed, args.tasks_per_family)
    kwargs = json.loads(args.generate_kwargs)
    results = evaluate(model, tokenizer, tasks, batch_size=args.batch_size, progress=True, **kwargs)
    print_table(results, Console())
    if args.output_file:
        record = {"model": args.model_name_or_path, "split": args.split, "seed": args.seed, "generate_kwargs": kwargs}
        Path(args.output_file).write_text(json.dumps(record | results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
