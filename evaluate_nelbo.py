"""Measure the NELBO per token and the perplexity of an arcLM model on texts or chats.

    python evaluate_nelbo.py --model_name_or_path DIR --file wiki.txt
    python evaluate_nelbo.py --model_name_or_path DIR --file chats.jsonl          (its responses)
    python evaluate_nelbo.py --model_name_or_path DIR --dataset_name ORG/NAME     (column `text`, or chats)

The NELBO is an upper bound of the negative log-likelihood, so exp(NELBO) is one of the perplexity. With blocks of 1,
causal context and shifted logits there is nothing to bound: both are those of the autoregressive parent, exactly.
"""

import json
import math
import sys
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor
from tqdm.auto import tqdm
from transformers import HfArgumentParser
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.hf_argparser import HfArg

from arclm.chats_bd3lm import find_format
from arclm.checkpoints_bd3lm import load_model
from arclm.data_bd3lm import (
    IGNORE,
    InputError,
    Source,
    collate,
    load_samples,
    open_source,
    print_table,
    read_rows,
    to_rows,
)
from arclm.noise_bd3lm import T_MIN, draw_uniforms, sample_t


def draw_masks(labels: LongTensor, block_size: int, key: tuple[int, int], rows: list[int]) -> tuple[Tensor, Tensor]:
    """Draw which tokens of each block are masked: the share t of training, rounded up to a number of tokens.

    With t uniform, k = ceil(t n) is uniform on 1 ... n for a block of n response tokens, and n / k times the
    cross-entropy of k masked tokens estimates the same NELBO as 1 / t times that of a binomial number (LLaDA,
    arXiv:2502.09992), with less variance and without the cut at T_MIN. For n = 1 nothing is random.

    Args:
        labels: [B, T] response tokens, -100 elsewhere; T a multiple of `block_size`.
        block_size: L.
        key: see `draw_uniforms`.
        rows: see `draw_uniforms`.

    Returns:
        is_masked [B, T] bool and loss_weights [B, T] float.
    """
    is_response = (labels != IGNORE).unflatten(1, (-1, block_size))  # [B, N, L]
    offset, uniforms = (u.to(labels.device) for u in draw_uniforms(key, rows, is_response.shape[1], block_size))
    t = sample_t(offset, uniforms[..., 0], is_response.any(-1))
    count = is_response.sum(-1)
    num_masked = ((t - T_MIN) / (1 - T_MIN) * count).ceil().clamp(min=1).minimum(count.clamp(min=1))
    rank = uniforms[..., 1:].masked_fill(~is_response, torch.inf).argsort(-1).argsort(-1)
    is_masked = is_response & (rank < num_masked[..., None])
    return is_masked.flatten(1), (count / num_masked).repeat_interleave(block_size, dim=-1)


def pad_to_blocks(batch: dict[str, Tensor], block_size: int, device: torch.device | str) -> tuple[Tensor, ...]:
    """Return input_ids, labels and attention_mask, [B, T] each, T a multiple of the block, on the device."""
    fill = (0, -batch["labels"].shape[1] % block_size)
    values = {"input_ids": 0, "labels": IGNORE, "attention_mask": 0}
    return tuple(F.pad(batch[key], fill, value=value).to(device) for key, value in values.items())


def check_knobs(num_draws: int, batch_size: int, seed: int, block_size: int, trained_block_size: int) -> None:
    """Raise an InputError that says which knob of `evaluate_nelbo` is out of range."""
    if num_draws < 2:
        raise InputError(f"num_draws={num_draws} gives no standard error. Give 2 or more.")
    if batch_size < 1 or seed < 0:
        raise InputError(f"batch_size={batch_size} must be at least 1, and seed={seed} at least 0.")
    if not 1 <= block_size <= trained_block_size:
        raise InputError(f"block_size={block_size} is outside [1, {trained_block_size}], up to the trained size.")


@torch.inference_mode()
def evaluate_nelbo(
    model: Model,
    samples: list[dict[str, Any]],
    *,
    block_size: int | None = None,
    num_draws: int = 8,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, float]:
    """Estimate the NELBO per response token by Monte Carlo, with masking rates stratified over blocks and rows.

    Args:
        model: arcLM; on any device.
        samples: `input_ids` and `labels` each, lists of equal length; labels are -100 where a token is given.
        block_size: at most the trained one, which is the default.
        num_draws: M >= 2 independent draws of all masks.
        batch_size: rows in a pass; does not change the result.
        seed: of the masks.

    Returns:
        nelbo in nats per token; standard_error of it over draws of masks, not over texts; perplexity, exp(nelbo);
        bits_per_token; tokens, how many were predicted; block_size, num_draws, seed.
    """
    block_size = model.config.block_size if block_size is None else block_size
    check_knobs(num_draws, batch_size, seed, block_size, model.config.block_size)
    tokens = sum(label != IGNORE for sample in samples for label in sample["labels"])
    if not tokens:
        raise InputError("There is no token to predict: every label is -100, or every text has fewer than 2 tokens.")
    totals, was_training = torch.zeros(num_draws, dtype=torch.float64), model.training
    model.eval()
    for start in tqdm(range(0, len(samples), batch_size), desc="batches", disable=None):
        rows = range(start, min(start + batch_size, len(samples)))
        batch = collate([{**samples[row], "row": row} for row in rows])
        x_0, labels, attention_mask = pad_to_blocks(batch, block_size, model.device)
        for draw in range(num_draws):
            is_masked, loss_weights = draw_masks(labels, block_size, (seed, draw), list(rows))
            loss = model(
                input_ids=x_0,
                attention_mask=attention_mask,
                noisy_input_ids=x_0.masked_fill(is_masked, model.config.mask_token_id),
                labels=labels.masked_fill(~is_masked, IGNORE),
                loss_weights=loss_weights,
                num_items_in_batch=1,
                block_size=block_size,
            ).loss
            totals[draw] += loss.item()
    model.train(was_training)
    draws = totals / tokens
    nelbo = draws.mean().item()
    return {
        "nelbo": nelbo,
        "standard_error": draws.std().item() / math.sqrt(num_draws),
        "perplexity": math.exp(nelbo),
        "bits_per_token": nelbo / math.log(2),
        "tokens": tokens,
        "block_size": block_size,
        "num_draws": num_draws,
        "seed": seed,
    }


def text_samples(texts: list[str], tokenizer: Tokenizer, max_length: int) -> list[dict[str, list[int]]]:
    """Cut texts into windows of `max_length` tokens; the first token of a window is given, as to the parent."""
    if max_length < 2:
        raise InputError(f"max_length={max_length} leaves nothing to predict. Give 2 or more.")
    samples = []
    for ids in tokenizer(texts, add_special_tokens=False).input_ids:
        windows = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
        samples += [{"input_ids": ids, "labels": [IGNORE, *ids[1:]]} for ids in windows if len(ids) > 1]
    return samples


@dataclass
class EvaluateArguments:
    """Which model to measure on what."""

    model_name_or_path: str = HfArg(help="Model that convert_a2d.py or train_bd3lm.py made: a directory or a Hub id.")
    file: str | None = HfArg(default=None, help="Chats if it ends in .jsonl, as for train_bd3lm.py; else plain text.")
    dataset_name: str | None = HfArg(default=None, help="Hub dataset, or its directory: a column text, or chats.")
    dataset_config: str | None = HfArg(default=None, help="Configuration of dataset_name, where it has several.")
    dataset_split: str = HfArg(default="test", help="Split of dataset_name, or a slice such as test[:100].")
    max_length: int = HfArg(default=2048, help="Tokens of a window of text; tokens after which a chat is cut.")
    block_size: int | None = HfArg(default=None, help="Tokens per block, at most the trained number, the default.")
    num_draws: int = HfArg(default=8, help="Draws of masks, at least 2.")
    batch_size: int = HfArg(default=8, help="Rows in a pass.")
    seed: int = HfArg(default=0, help="Seed of the masks.")


def read_samples(args: EvaluateArguments, tokenizer: Tokenizer, config: Any) -> list[dict[str, list[int]]]:
    """Read texts, or the responses of chats, the last block of which is filled with the end token as in training."""
    if (args.file is None) == (args.dataset_name is None):
        raise InputError("Give one of --file and --dataset_name.")
    if args.file is not None and not args.file.endswith(".jsonl"):
        try:
            text = Path(args.file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{args.file} is not text in UTF-8: {error}. Convert it first.") from error
        return text_samples([text], tokenizer, args.max_length)
    if args.dataset_name is None:
        sets = read_rows(args.file)
    else:
        source = Source(args.dataset_name, args.dataset_split, configs=(args.dataset_config,))
        (rows,) = open_source(source)
        if "text" in rows.column_names and not find_format(rows.column_names):
            texts = [text for text in rows["text"][:] if text and text.strip()]
            return text_samples(texts, tokenizer, args.max_length)
        sets = [to_rows(source, [rows])]
    config = deepcopy(config)
    config.block_size = args.block_size or config.block_size
    samples, counts = load_samples(sets, tokenizer, config, max_length=args.max_length)
    print_table(counts, stderr=True)  # what was cut or dropped; the result alone goes to stdout
    return list(samples)


def main(argv: list[str] | None = None) -> None:
    """Load, measure, print JSON."""
    args = HfArgumentParser(EvaluateArguments, description=__doc__).parse_args_into_dataclasses(argv)[0]
    model, tokenizer = load_model(args.model_name_or_path, "auto")
    samples = read_samples(args, tokenizer, model.config)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    knobs = {name: getattr(args, name) for name in ("block_size", "num_draws", "batch_size", "seed")}
    print(json.dumps(evaluate_nelbo(model.to(device), samples, **knobs), indent=2))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate_nelbo.py: {error}")
