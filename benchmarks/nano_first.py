"""Exact match of arcLM-nano against tokens per forward, beside its parent's, on held-out tasks.

    python benchmarks/nano_first.py

measures nano/arclm-nano-base and nano/arclm-nano, both greedy, and writes benchmarks/results/nano_first.json. Under
"arclm", "1", "2" and "4" are the tokens that the static strategy accepts at each denoising step; "dynamic" accepts all
above the default threshold.
"""

import time
from dataclasses import dataclass

import torch
from common import RESULTS, ROOT, SHAPES, start_record, write_record
from rich.console import Console
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from transformers.hf_argparser import HfArg

from arclm.nano.evaluate import decodings, evaluate, print_table
from arclm.nano.world import FAMILIES, tasks_per_family


@dataclass
class NanoFirstArguments:
    """What to measure."""

    parent: str = HfArg(default=str(ROOT / "nano" / "arclm-nano-base"), help="Directory of the parent.")
    model: str = HfArg(default=str(SHAPES["nano"]), help="Directory of the converted, trained model.")
    tasks_per_family: int = HfArg(default=400, help="Held-out tasks of every family.")
    seed: int = HfArg(default=8, help="Seed of the tasks, one that no training or choice of settings has used.")
    output_file: str = HfArg(default=str(RESULTS / "nano_first.json"), help="Result file.")


def main() -> None:
    """Measure, print, write."""
    args = HfArgumentParser(NanoFirstArguments).parse_args_into_dataclasses()[0]
    record = start_record(
        "Exact match on held-out tasks, greedy. tpf: generated tokens up to and with the end token per denoising "
        "step, mean over tasks; below the number in the name where a block ends with less than that.",
        "cpu",
        seed=args.seed,
    )
    console, start = Console(), time.perf_counter()
    tasks = tasks_per_family("test", args.seed, args.tasks_per_family)
    tokenizer = AutoTokenizer.from_pretrained(args.parent)
    parent = AutoModelForCausalLM.from_pretrained(args.parent, dtype=torch.float32)
    results = {"parent": evaluate(parent, tokenizer, tasks, progress=True)}

    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
    model = AutoModel.from_pretrained(args.model, trust_remote_code=True, dtype=torch.float32)
    for name, knobs in decodings(model.config.block_size).items():
        results[name] = evaluate(model, tokenizer, tasks, progress=True, **knobs)
    for name, result in results.items():
        console.rule(name)
        print_table(result, console)

    families = {}
    for family in FAMILIES:
        rows = {name: result["families"][family] for name, result in results.items()}
        arclm = {name: row["accuracy"] for name, row in rows.items() if name != "parent"}
        arclm["dynamic"] = {"accuracy": arclm["dynamic"], "tpf": rows["dynamic"]["tokens_per_forward"]}
        families[family] = {"parent": rows["parent"]["accuracy"], "arclm": arclm}
    record |= {
        "tasks_per_family": args.tasks_per_family,
        "block_size": model.config.block_size,
        "parameters": model.num_parameters(),
        "seconds": round(time.perf_counter() - start),
        "families": families,
        "details": results,
    }
    write_record(record, args.output_file)


if __name__ == "__main__":
    main()
