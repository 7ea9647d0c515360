"""Weight-only int8: exact match of arcLM-nano, the time of a denoising step, and memory, against float32 and bfloat16.

    python benchmarks/quantized.py

needs torchao (`pip install -e ".[quantize]"`) and writes benchmarks/results/quantized.json. "accuracy": the same
held-out tasks for every variant, greedy, with 1, 2 and 4 tokens per step; `difference` to float32 has the standard
error `error`, from the tasks on which the two disagree (`lost`, `gained`), and counts as noise up to twice that.
"steps": one denoising step, batch 1, after four blocks of context, the variants in turn, as ratios of medians.
`held` is what a process holds at most that loads the variant as saved and does steps, where this is large enough to
tell. nano is the trained model; the other shapes have random weights. bitsandbytes and optimum-quanto, which also have
int8, take part where they are installed.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from common import (
    MB,
    RESULTS,
    SHAPES,
    give_back_memory,
    interleave,
    make_arclm,
    median,
    peak_memory,
    print_table,
    random_ids,
    start_record,
    timed,
    write_record,
)
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torchao.quantization import Int8WeightOnlyConfig
from transformers import (
    AutoModel,
    AutoTokenizer,
    BitsAndBytesConfig,
    HfArgumentParser,
    PreTrainedModel,
    QuantoConfig,
    TorchAoConfig,
)
from transformers.hf_argparser import HfArg

from arclm.nano.evaluate import answer, decodings, judge
from arclm.nano.world import FAMILIES, Task, tasks_per_family


CONTEXT_BLOCKS = 4
HELD_FROM_MB = 100  # what the allocator keeps is some 10 MB more or less: nothing can be said of smaller models


@dataclass
class QuantizedArguments:
    """What to measure."""

    shapes: list[str] = field(
        default_factory=lambda: list(SHAPES), metadata={"help": "Whose steps: among nano, hidden256, 0.8b."}
    )
    tasks_per_family: int = HfArg(default=200, help="Held-out tasks of every family.")
    seed: int = HfArg(default=31, help="Seed of the tasks, one that no training or choice of settings has used.")
    repeats: int = HfArg(default=7, help="Recorded rounds of steps, of which the median counts.")
    output_file: str = HfArg(default=str(RESULTS / "quantized.json"), help="Result file.")


class Variant(NamedTuple):
    """How a model is loaded.

    Fields:
        dtype: of activations and of the weights that are not quantised.
        quantization: makes the `quantization_config`; `None` for a model as it is.
    """

    dtype: torch.dtype
    quantization: Callable[[], Any] | None = None


def torchao_int8(but: list[str] | None = None) -> TorchAoConfig:
    """Return weight-only int8, a scale per row, for all linear layers but the head and those named by regexes."""
    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=but and ["lm_head", *but])


VARIANTS = {
    "float32": Variant(torch.float32),
    "bfloat16": Variant(torch.bfloat16),
    "int8, float32": Variant(torch.float32, torchao_int8),
    "int8, bfloat16": Variant(torch.bfloat16, torchao_int8),
}
# the projections to one number per head, of which decay and step of the delta rule are made
BUT_GATES = {"int8 but gates": Variant(torch.float32, lambda: torchao_int8([".*in_proj_a", ".*in_proj_b"]))}
PEERS = {
    "bitsandbytes": Variant(torch.float32, lambda: BitsAndBytesConfig(load_in_8bit=True)),
    "optimum.quanto": Variant(torch.float32, lambda: QuantoConfig(weights="int8")),
}


def load(path: str | Path, variant: Variant) -> PreTrainedModel:
    """Load an arcLM directory as a variant."""
    quantization = {} if variant.quantization is None else {"quantization_config": variant.quantization()}
    return AutoModel.from_pretrained(path, dtype=variant.dtype, **quantization)


def weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of the weights, scales and zero points included, tied weights once."""
    tensors = []
    for weight in model.parameters():
        # a quantised weight claims the size that it had; what it holds are the tensors it is made of
        parts = weight.__tensor_flatten__()[0] if is_traceable_wrapper_subclass(weight) else []
        tensors += [getattr(weight, part) for part in parts] or [weight]
    return sum(x.nbytes for x in tensors)


# ---- Accuracy


def compare(base: list[tuple[bool, list[int]]], other: list[tuple[bool, list[int]]]) -> dict:
    """Compare (is right, generated ids) of two models, task by task."""
    outcomes = Counter((a, b) for (a, _), (b, _) in zip(base, other, strict=True))
    lost, gained, tasks = outcomes[True, False], outcomes[False, True], len(base)
    difference, error = (gained - lost) / tasks, (gained + lost) ** 0.5 / tasks
    return {
        "lost": lost,
        "gained": gained,
        "difference": difference,
        "error": error,
        "is_noise": abs(difference) <= 2 * error,
        "same_answer": sum(a == b for (_, a), (_, b) in zip(base, other, strict=True)) / tasks,
    }


def accuracy(models: dict[str, PreTrainedModel], tokenizer, tasks: list[Task]) -> list[dict]:
    """Answer all tasks with every model, the first of which the others are compared with; one row for each."""
    rows = []
    for tokens, knobs in decodings(next(iter(models.values())).config.block_size).items():
        if tokens == "dynamic":
            continue
        base = None
        for name, model in models.items():
            right, answers = Counter(), []
            for task, ids, _ in answer(model, tokenizer, tasks, **knobs):
                is_right, length = judge(tokenizer, task, ids)
                right[task.family] += is_right
                answers.append((is_right, ids[:length]))
            base = base or answers
            families = {family: right[family] / (len(tasks) // len(FAMILIES)) for family in FAMILIES}
            row = {"tokens_per_step": int(tokens), "variant": name, "exact_match": right.total() / len(tasks)}
            rows.append({**row, **families, **compare(base, answers)})
            print(rows[-1], flush=True)
    return rows


# ---- Steps and memory


@contextmanager
def directory(shape: str) -> Iterator[Path]:
    """Give the directory of arcLM-nano, or one with random weights in another shape."""
    if shape == "nano":
        yield SHAPES[shape]
        return
    with TemporaryDirectory() as path:
        make_arclm(shape, "cpu", torch.bfloat16).save_pretrained(path)
        yield Path(path)


def make_step(model: PreTrainedModel) -> Callable[[], Any]:
    """Return a function that does a denoising step of one block after a context."""
    config = model.config
    context = random_ids(config, 1, CONTEXT_BLOCKS * config.block_size, "cpu")
    block = random_ids(config, 1, config.block_size, "cpu", seed=1)
    with torch.no_grad():
        cache = model(context, use_cache=True, logits_to_keep=1).past_key_values
    return torch.no_grad()(lambda: model(noisy_input_ids=block, past_key_values=cache))


def load_and_make_step(path: str, dtype: torch.dtype) -> Callable[[], Any]:
    """Do both, for `peak_memory`."""
    return make_step(load(path, Variant(dtype)))


def held_bytes(path: Path, variant: Variant) -> int:
    """Return what a process holds at most that loads a variant and does steps.

    It loads the variant from a file of its own: a float checkpoint that is quantised while it is loaded stays mapped,
    all of it, as long as one weight is used as it is.
    """
    with TemporaryDirectory() as saved:
        load(path, variant).save_pretrained(saved)
        give_back_memory()
        return peak_memory("cpu", load_and_make_step, saved, variant.dtype)


def measure_steps(path: Path, variants: dict[str, Variant], repeats: int) -> list[dict]:
    """Time the steps of all variants in turn; one row for each, the first of which the others are compared with."""
    models = {name: load(path, variant) for name, variant in variants.items()}
    steps = {name: make_step(model) for name, model in models.items()}
    runs = {name: lambda step=step: timed(step, "cpu") for name, step in steps.items()}
    seconds = {name: median(results) for name, results in interleave(runs, repeats).items()}
    weights = {name: weight_bytes(model) for name, model in models.items()}
    first = next(iter(models))
    return [
        {
            "variant": name,
            "step_over_float32": seconds[name] / seconds[first],
            "weights_mb": weights[name] / MB,
            "weights_over_float32": weights[name] / weights[first],
        }
        for name in models
    ]


def measure_shape(shape: str, peers: dict[str, Variant], repeats: int) -> list[dict]:
    """Measure steps and memory of one shape."""
    with directory(shape) as path:
        rows = measure_steps(path, VARIANTS | peers, repeats)
        for row in rows:
            variant = VARIANTS.get(row["variant"])
            is_told = variant is not None and row["weights_mb"] > HELD_FROM_MB
            row["held_mb"] = held_bytes(path, variant) / MB if is_told else None
    return [{"shape": shape, **row} for row in rows]


def main() -> None:
    """Measure, print, write."""
    args = HfArgumentParser(QuantizedArguments).parse_args_into_dataclasses()[0]
    peers = {name: variant for name, variant in PEERS.items() if find_spec(name.split(".")[0])}
    packages = ("torchao", *(name.replace(".", "-") for name in peers))
    what = "Weight-only int8 (torchao), see benchmarks/quantized.py."
    record = start_record(what, "cpu", seed=args.seed, packages=packages)
    record |= {"dtype": "see the name of each variant", "tasks_per_family": args.tasks_per_family}

    record["steps"] = []
    for shape in args.shapes:
        rows = measure_shape(shape, peers, args.repeats)
        print_table(shape, rows)
        record["steps"] += rows

    tokenizer = AutoTokenizer.from_pretrained(SHAPES["nano"])
    models = {name: load(SHAPES["nano"], variant) for name, variant in (VARIANTS | BUT_GATES).items()}
    tasks = tasks_per_family("test", args.seed, args.tasks_per_family)
    record["accuracy"] = accuracy(models, tokenizer, tasks)
    print_table("arcLM-nano, greedy", record["accuracy"])
    write_record(record, args.output_file)


if __name__ == "__main__":
    main()
