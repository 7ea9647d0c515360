"""What the card's mixture becomes: samples, tokens, blocks with loss, and the padding of two ways to make batches.

    cd DIR && python PATH/benchmarks/mixture.py --tokenizer_name_or_path NAME

DIR holds the six sets as directories under their Hub names, or the Hub is at hand. Padding: share of the tokens of an
epoch that are there because another row of the batch is longer, with the rows shuffled or grouped by length, as
train_bd3lm.py does with the card's 16 rows per optimizer step. Fill: end tokens that fill up the last block of a
response, which are supervised.

Results: benchmarks/results/mixture.json.
"""

from dataclasses import dataclass
from pathlib import Path

import common
import torch
from transformers import AutoTokenizer, HfArgumentParser
from transformers.hf_argparser import HfArg
from transformers.trainer_pt_utils import LengthGroupedSampler

from arclm.configuration_arclm import ArcLMConfig
from arclm.data_bd3lm import load_samples, print_table, read_rows


SEEDS = (1, 2, 3)
BATCH_SIZES = (1, 2, 8)  # rows padded to the longest of them
ROWS_PER_STEP = 16  # which are sorted together


@dataclass
class MixtureArguments:
    """What to count."""

    tokenizer_name_or_path: str = HfArg(default="Qwen/Qwen3.5-0.8B", help="Tokenizer with Qwen3.5's chat template.")
    max_length: int = HfArg(default=2048, help="Tokens after which a sample is cut.")
    output_file: str = HfArg(default=str(common.RESULTS / "mixture.json"), help="Result file.")


def padding(lengths: torch.Tensor, order: list[int], batch_size: int) -> float:
    """Return the share of padding when rows of these lengths [N] are batched in that order."""
    batches = lengths[order].split(batch_size)
    read = sum(len(batch) * batch.max().item() for batch in batches)
    return 1 - lengths.sum().item() / read


def main() -> None:
    """Count, print, write."""
    args = HfArgumentParser(MixtureArguments).parse_args_into_dataclasses()[0]
    tokenizer, config = AutoTokenizer.from_pretrained(args.tokenizer_name_or_path), ArcLMConfig()
    tokenizer.add_tokens("<|mask|>", special_tokens=True)
    config.mask_token_id = tokenizer.convert_tokens_to_ids("<|mask|>")
    samples, counts = load_samples(read_rows(None), tokenizer, config, max_length=args.max_length)
    print_table(counts)

    lengths = torch.tensor(samples["length"][:])
    rows = []
    for batch_size in BATCH_SIZES:
        row = {"batch": batch_size, "shuffled": [], "grouped": []}
        for seed in SEEDS:
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(lengths), generator=generator).tolist()
            row["shuffled"].append(padding(lengths, order, batch_size))
            grouped = list(LengthGroupedSampler(ROWS_PER_STEP, lengths=lengths.tolist(), generator=generator))
            row["grouped"].append(padding(lengths, grouped, batch_size))
        rows.append(row)
    shown = [{k: v if k == "batch" else f"{100 * sum(v) / len(v):.1f} %" for k, v in row.items()} for row in rows]
    common.print_table("Padding, mean over the seeds", shown)

    end = tokenizer.eos_token_id
    filled = sum(_trailing(ids, end) - 1 for ids in samples["input_ids"])
    response = sum(samples["response_tokens"][:])
    print(f"fill: {filled / lengths.sum().item():.1%} of all tokens, {filled / response:.1%} of those with loss")
    record = common.start_record("The card's mixture as samples; padding by batch size, one value per seed.", "cpu")
    settings = {"tokenizer": Path(args.tokenizer_name_or_path).name, "max_length": args.max_length, "seed": SEEDS}
    fill = {"tokens": filled, "of_all": filled / lengths.sum().item(), "of_response": filled / response}
    common.write_record(record | settings | {"data": counts, "padding": rows, "fill": fill}, args.output_file)


def _trailing(ids: list[int], token_id: int) -> int:
    """Return how many times a row ends with a token."""
    return next((i for i, token in enumerate(reversed(ids)) if token != token_id), len(ids))


if __name__ == "__main__":
    main()
