"""Data of train_bd3lm.py: rows of any known format -> chats (`chats_bd3lm.py`) -> samples -> batches.

Every assistant turn becomes one sample: the chat before it with the generation prompt, and the response. A row that
cannot be used is counted in the table with its reason, and never fatal. The file reads in this order: where rows come
from, chats to samples, samples to batches.
"""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError
from datasets.fingerprint import Hasher
from jinja2 import TemplateError
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig as Config
from transformers import PreTrainedTokenizerBase as Tokenizer

from arclm import chats_bd3lm
from arclm.chats_bd3lm import (
    FORMATS,
    BadRowError,
    decode_message,
    find_format,
    parse_line,
    parse_literal,
    to_chat,
    without_none,
)


IGNORE = -100
# What `make_samples` returns: said, because a first batch of dropped rows alone does not tell the type of its lists.
RECORD = Features(
    {"input_ids": List(Value("int64")), "labels": List(Value("int64"))}
    | {name: Value("int64") for name in ("length", "response_tokens")}
    | {"outcome": Value("string")}
)


class InputError(ValueError):
    """What the user gave cannot be used; the message says what came, what is allowed and what to do."""


# ---- Where rows come from


class Source(NamedTuple):
    """A Hub dataset, or a directory in the place of one; its configurations are read in this order up to `limit`."""

    name: str
    split: str = "train"
    limit: int | None = None
    configs: tuple[str | None, ...] = (None,)


# configurations of the Hermes set, whose default is the first and has fewer than 2,000 rows
TOOL_CALLS = ("func_calling_singleturn", "func_calling", "glaive_func_calling")
JSON_MODE = ("json_mode_agentic", "json_mode_singleturn")

# The model card's mixture. Which columns each set has, and so how it is read, `FORMATS` knows.
MIXTURE = (
    Source("tatsu-lab/alpaca", limit=8000),
    Source("HuggingFaceH4/ultrachat_200k", split="train_sft", limit=5000),
    Source("NousResearch/hermes-function-calling-v1", limit=5000, configs=(*TOOL_CALLS, *JSON_MODE)),
    Source("Jofthomas/hermes-function-calling-thinking-V1"),
    Source("open-thoughts/OpenThoughts-114k", limit=5000),
    Source("simplescaling/s1K"),
)


def hub_names(file: str | None, dataset_name: str | None) -> list[str]:
    """Return the Hub ids of what `read_rows` reads."""
    if dataset_name is not None:
        return [] if Path(dataset_name).is_dir() else [dataset_name]
    return [source.name for source in MIXTURE] if file is None else []


class Rows(NamedTuple):
    """A set of rows as it was read."""

    name: str  # with the slice, for the table
    rows: Dataset
    available: int  # rows before the slice


def read_rows(
    file: str | None, dataset_name: str | None = None, split: str = "train", config: str | None = None
) -> list[Rows]:
    """Open a JSONL file, a Hub dataset, or the mixture where neither is given."""
    if file is not None and dataset_name is not None:
        raise InputError(f"Both {file} and {dataset_name} were given to train on. Give a file or a dataset.")
    if dataset_name is not None:
        return [read_source(Source(dataset_name, split, configs=(config,)))]
    if (split, config) != ("train", None):
        raise InputError("--dataset_split and --dataset_config are of --dataset_name, which was not given.")
    return [read_source(source) for source in MIXTURE] if file is None else [read_file(file)]


def read_file(file: str) -> Rows:
    """Open a JSONL file as one column `line`, so that broken rows are rows too."""
    if not Path(file).is_file():
        what = "is no file" if Path(file).exists() else "does not exist"
        raise InputError(f"{file} {what}. Give a JSONL file with one chat per line.")
    with open(file, "rb") as stream:
        lines = [line for line in stream if line.strip()]
    columns = set()
    for line in lines:
        try:
            columns |= set(row := parse_line(line))
        except BadRowError:
            continue
        if find_format(row):
            break
    else:
        if columns:
            raise unknown_columns(file, columns)
        if lines:
            raise InputError(
                f"No line of {file} is a JSON object. JSONL has one chat per line; a list becomes that by jq -c '.[]'."
            )
    return Rows(file, Dataset.from_dict({"line": lines}), len(lines))


def open_source(source: Source) -> list[Dataset]:
    """Open a dataset through `datasets`, which takes a directory of that name before the one on the Hub."""
    name, split, _, configs = source
    try:
        return [load_dataset(name, config, split=split) for config in configs]
    except OSError as error:
        raise InputError(
            f"The dataset {name} cannot be reached ({error}). Connect to the Hub, or start in a directory with a "
            f"copy: hf download {name} --repo-type dataset --local-dir {name}"
        ) from error
    except (ValueError, RuntimeError, DatasetsError) as error:  # RuntimeError: a dataset that is a script
        reason = error.__cause__ or error
        if "Config name is missing" in str(error):
            reason = f"{str(error).splitlines()[1]}, by --dataset_config."  # the lines are about Python
        raise InputError(f"The split {split} of {name} cannot be read: {reason}") from error


def read_source(source: Source) -> Rows:
    """Open a dataset of chats."""
    return to_rows(source, open_source(source))


def to_rows(source: Source, parts: list[Dataset]) -> Rows:
    """Check the columns of what `open_source` returned, and cut it to its limit."""
    name, split, limit, _ = source
    for part in parts:
        if not find_format(part.column_names):
            raise unknown_columns(name, part.column_names)
    rows = concatenate_datasets(parts)
    if limit is not None:
        rows, split = rows.select(range(min(limit, len(rows)))), f"{split}[:{limit}]"
    return Rows(f"{name} {split}", rows, sum(split_size(part) for part in parts))


def split_size(rows: Dataset) -> int:
    """Return how many rows there were before a slice like `train[:5000]`, which is silent where it asks for more."""
    whole = (rows.info.splits or {}).get(str(rows.split).partition("[")[0])
    return whole.num_examples if whole else len(rows)


def unknown_columns(name: str, columns: list[str] | set[str]) -> InputError:
    """Say which columns came and which are understood."""
    found, known = ", ".join(sorted(columns)), " | ".join(", ".join(needed) for needed in FORMATS)
    return InputError(f"{name} has the columns {found}. Understood are {known}. Rename the columns to one of these.")


# ---- Chats to samples


def split_turns(chat: dict, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Split a chat into (prompt, response) texts, one pair for every assistant turn, as `generate` will meet them.

    `to_chat` returns the chat; by default `enable_thinking` is whether the turn has thoughts. The prompt is the chat
    before the turn, rendered with the generation prompt. The response is what the template puts after that, up to and
    with the end token; the newline behind it belongs to the next turn.
    """
    messages = [decode_message(message) for message in chat["messages"]]
    tools = parse_literal(chat.get("tools"), "tools") or None
    turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    if not turns:
        raise BadRowError("no assistant turn")
    render = partial(tokenizer.apply_chat_template, tools=tools, tokenize=False)
    pairs = []
    for i in turns:
        thoughts = messages[i].get("reasoning_content") or "</think>" in (messages[i].get("content") or "")
        thinking = chat.get("enable_thinking", bool(thoughts))
        prompt = render(messages[:i], add_generation_prompt=True, enable_thinking=thinking)
        pairs.append((prompt, cut_response(render(messages[: i + 1]), prompt, tokenizer.eos_token)))
    return pairs


def cut_response(text: str, prompt: str, end_token: str) -> str:
    """Return what follows the prompt in `text`, up to and with the last end token."""
    response, end, rest = text.removeprefix(prompt).rpartition(end_token)
    if not text.startswith(prompt):
        raise BadRowError("turn without the generation prompt")
    if not end or rest.strip():
        raise BadRowError("turn without an end token")
    if not response.strip():
        raise BadRowError("empty response")
    return response + end


def make_sample(prompt: list[int], response: list[int], block_size: int, max_length: int, end_token_id: int) -> dict:
    """Join the ids of prompt and response and fill the last block with the end token.

    The fill is part of the response, so the model learns to stop inside a block. A sample longer than `max_length`, a
    multiple of `block_size`, is cut there and has neither end token nor fill.
    """
    if len(prompt) >= max_length:
        raise BadRowError("prompt over max_length")
    input_ids = (prompt + response)[:max_length]
    input_ids += [end_token_id] * (-len(input_ids) % block_size)
    return {
        "input_ids": input_ids,
        "labels": [IGNORE] * len(prompt) + input_ids[len(prompt) :],
        "length": len(input_ids),
        "response_tokens": len(input_ids) - len(prompt),
        "outcome": "truncated" if len(prompt) + len(response) > max_length else "whole",
    }


def make_samples(batch: dict[str, list], tokenizer: Tokenizer, config: Config, max_length: int) -> dict:
    """Turn rows (columns of `FORMATS`, or `line` with JSON) into one record per assistant turn or unusable row."""
    records, pairs = [], []
    for values in zip(*batch.values(), strict=True):
        row = dict(zip(batch, values, strict=True))
        try:
            row = without_none(parse_line(row["line"]) if list(batch) == ["line"] else row)
            turns = split_turns(to_chat(row), tokenizer)
            "".join(map("".join, turns)).encode()  # half a surrogate pair would fail with the whole batch below
            pairs += turns
        except BadRowError as error:
            records.append({"outcome": str(error)})
        except TemplateError:
            records.append({"outcome": "refused by the chat template"})
        except (TypeError, ValueError, LookupError, AttributeError, RecursionError):
            records.append({"outcome": "malformed"})
    # tokenized apart: in `generate` the prompt's tokens do not depend on what follows
    texts = [text for pair in pairs for text in pair]
    ids = iter(tokenizer(texts, add_special_tokens=False).input_ids if texts else [])
    for prompt, response in zip(ids, ids, strict=True):
        try:
            if config.mask_token_id in prompt + response:
                raise BadRowError("contains the mask token")
            records.append(make_sample(prompt, response, config.block_size, max_length, tokenizer.eos_token_id))
        except BadRowError as error:
            records.append({"outcome": str(error)})
    empty = {"input_ids": [], "labels": [], "length": 0, "response_tokens": 0}
    return {key: [(empty | record)[key] for record in records] for key in RECORD}


def tokenize(data: Rows, tokenizer: Tokenizer, config: Config, max_length: int) -> tuple[Dataset, dict[str, Any]]:
    """Return the samples of a set and its line of the table."""
    name, rows, available = data
    options = {"tokenizer": tokenizer, "config": config, "max_length": max_length}
    # tokenized once for all processes and later runs; by itself `datasets` keeps no file for rows in memory, and does
    # not see that these modules have changed
    template = (tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.eos_token)
    sizes = (config.block_size, config.mask_token_id, max_length)
    code = tuple(Path(file).read_text(encoding="utf-8") for file in (__file__, chats_bd3lm.__file__))
    fingerprint = Hasher.hash((rows._fingerprint, code, template, sizes))
    cache = Path(datasets.config.HF_DATASETS_CACHE, "arclm", f"{fingerprint}.arrow")
    cache.parent.mkdir(parents=True, exist_ok=True)
    files = {"new_fingerprint": fingerprint, "cache_file_name": str(cache), "remove_columns": rows.column_names}
    records = rows.map(make_samples, batched=True, fn_kwargs=options, desc=name, features=RECORD, **files)
    outcomes = records["outcome"][:] if len(rows) else []
    kept = [i for i, outcome in enumerate(outcomes) if outcome in ("whole", "truncated")]
    reasons = Counter(outcomes)
    whole, truncated = reasons.pop("whole", 0), reasons.pop("truncated", 0)
    why = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
    if not kept:
        raise InputError(f"Nothing in {name} can be used: {why or 'it is empty'}.")
    samples = records.select(kept).remove_columns("outcome")
    columns = samples.with_format("numpy")
    length, response = columns["length"][:], columns["response_tokens"][:]
    # the response is what a sample ends with
    no_loss = ((length - response) // config.block_size).sum() / (length // config.block_size).sum()
    counts = {"data": name, "rows": len(rows), "of": available, "samples": whole + truncated, "truncated": truncated}
    counts |= {"dropped": reasons.total(), "tokens": int(length.sum()), "response tokens": int(response.sum())}
    return samples, counts | {"blocks with loss": f"{1 - no_loss:.1%}", "why dropped": why}


def load_samples(
    sets: list[Rows], tokenizer: Tokenizer, config: Config, *, max_length: int
) -> tuple[Dataset, list[dict[str, Any]]]:
    """Tokenize sets of rows; return the samples, numbered by `row`, and a line of the table for each set."""
    block_size = config.block_size
    if max_length < block_size:
        raise InputError(f"max_length={max_length} is shorter than a block. Give --max_length {block_size} or more.")
    parts = [tokenize(data, tokenizer, config, max_length - max_length % block_size) for data in sets]
    samples = concatenate_datasets([part for part, _ in parts])
    return samples.add_column("row", range(len(samples))), [counts for _, counts in parts]


def print_table(counts: list[dict[str, Any]], *, stderr: bool = False) -> None:
    """Print what `load_samples` counted, one line for each set, and below them why anything was dropped."""
    console = Console(stderr=stderr)
    console.width = max(console.width, 120)  # a log file counts as 80 wide
    table = Table(Column("data", overflow="fold"), title="Data: every assistant turn is a sample")
    for name in list(counts[0])[1:-1]:
        table.add_column(name.replace(" ", "\n", 1), justify="right")
    for name, *values, _ in (count.values() for count in counts):
        table.add_row(name, *(value if isinstance(value, str) else f"{value:,}" for value in values))
    console.print(table)
    for count in counts:
        if count["why dropped"]:
            console.print(f"dropped of {count['data']}: {count['why dropped']}", markup=False)


# ---- Samples to batches


def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad samples on the right to the longest, itself a multiple of the block: [B, T] each, and row [B]."""
    input_ids, labels = ([torch.tensor(sample[key]) for sample in samples] for key in ("input_ids", "labels"))
    return {
        # outside attention and loss any id will do, and not every tokenizer has one for padding
        "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=0),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in input_ids], batch_first=True),
        "row": torch.tensor([sample["row"] for sample in samples]),
    }
