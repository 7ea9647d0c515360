"""Data of train_bd3lm.py: rows of any known format -> chats -> samples -> batches.

Every assistant turn becomes one sample: the chat before it with the generation prompt, and the response. A row that
cannot be used is counted in the table with its reason, and never fatal. The file reads in this order: where rows come
from, rows to chats, chats to samples, samples to batches.
"""

import ast
import json
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from datasets import Dataset, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError
from datasets.fingerprint import Hasher
from jinja2 import TemplateError
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig as Config
from transformers import PreTrainedTokenizerBase as Tokenizer


IGNORE = -100


class InputError(ValueError):
    """What the user gave cannot be used; the message says what came, what is allowed and what to do."""


class BadRowError(ValueError):
    """A row of data cannot be used; the message is the reason that is counted."""


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


class Rows(NamedTuple):
    """A set of rows as it was read."""

    name: str  # with the slice, for the table
    rows: Dataset
    available: int  # rows before the slice


def read_rows(file: str | None, dataset_name: str | None, dataset_split: str) -> list[Rows]:
    """Open a JSONL file, a Hub dataset, or the mixture where neither is given."""
    if file is not None and dataset_name is not None:
        raise InputError(f"Both {file} and {dataset_name} were given to train on. Give a file or a dataset.")
    if file is not None:
        return [read_file(file)]
    sources = MIXTURE if dataset_name is None else [Source(dataset_name, dataset_split)]
    return [read_source(source) for source in sources]


def read_file(file: str) -> Rows:
    """Open a JSONL file as one column `line`, so that broken rows are rows too."""
    if not Path(file).is_file():
        raise InputError(f"{file} does not exist. Give a JSONL file with one chat per line.")
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
    return Rows(file, Dataset.from_dict({"line": lines}), len(lines))


def read_source(source: Source) -> Rows:
    """Open a dataset through `datasets`, which takes a directory of that name before the one on the Hub."""
    name, split, limit, configs = source
    try:
        parts = [load_dataset(name, config, split=split) for config in configs]
    except OSError as error:
        raise InputError(
            f"The dataset {name} cannot be reached ({error}). Connect to the Hub, or start in a directory with a "
            f"copy: hf download {name} --repo-type dataset --local-dir {name}"
        ) from error
    except (ValueError, DatasetsError) as error:
        raise InputError(f"The split {split} of {name} cannot be read: {error.__cause__ or error}") from error
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


# ---- Rows to chats

ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}

# datasets that were made with other templates write into the text what Qwen's template takes apart
THOUGHTS = re.compile(r"\s*(?:<think>|<\|begin_of_thought\|>)(.*?)(</think>|<\|end_of_thought\|>|\Z)", re.DOTALL)
SOLUTION_MARKS = re.compile(r"<\|(?:begin|end)_of_solution\|>")
# some rows have the two characters \n for a line break; a call in Qwen's own format stays in the text
CALL = re.compile(r"<tool_call>(?!\s*<function=)(?:\s|\\n)*(.*?)(?:\s|\\n)*(?:</tool_call>|\Z)", re.DOTALL)
RESPONSE = re.compile(r"<tool_response>(.*?)</tool_response>", re.DOTALL)
# without another <tools> inside: the text before the list names the tag
TOOLS = re.compile(r"<tools>((?:(?!<tools>).)*)</tools>", re.DOTALL)


def prompt_turns(row: dict) -> list:
    """Read `prompt` and `completion`, each a text or a list of turns."""
    prompt, completion = row["prompt"], row["completion"]
    prompt = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    return prompt + (completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}])


def s1k_turns(row: dict) -> list[dict]:
    """Read a question and an answer with the first of its trajectories of thought."""
    thoughts = row["thinking_trajectories"]
    thoughts = thoughts[0] if isinstance(thoughts, list) else thoughts
    answer = {"role": "assistant", "reasoning_content": thoughts, "content": row["attempt"]}
    return [{"role": "user", "content": row["question"]}, answer]


def alpaca_turns(row: dict) -> list[dict]:
    """Read an instruction, the input that some have, and the output."""
    prompt = "\n\n".join(text for text in (row["instruction"], row.get("input") or "") if text.strip())
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": row["output"]}]


# The columns that a row needs, and how its turns are read from them; the first that fits. Other columns are left out,
# but for `tools` and `enable_thinking`.
FORMATS: dict[tuple[str, ...], Callable[[dict], list]] = {
    ("messages",): lambda row: row["messages"],
    ("conversations",): lambda row: row["conversations"],
    ("prompt", "completion"): prompt_turns,
    ("question", "thinking_trajectories", "attempt"): s1k_turns,
    ("instruction", "output"): alpaca_turns,
}


def find_format(columns: Any) -> Callable[[dict], list] | None:
    """Return how the turns of a row with these columns are read, or None."""
    return next((read for needed, read in FORMATS.items() if set(needed) <= set(columns)), None)


def parse_line(line: bytes) -> dict:
    """Read a line of JSONL."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRowError("not JSON") from error
    if not isinstance(row, dict):
        raise BadRowError("no JSON object")
    return row


def parse_literal(value: Any, what: str) -> Any:
    """Read a value that may come as a string of JSON or, in the Hermes sets, as a Python literal."""
    if not isinstance(value, str):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(value)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    raise BadRowError(f"{what} neither JSON nor Python")


def without_none(value: Any) -> Any:
    """Remove the keys that Arrow filled with None because other rows have them."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def to_chat(row: dict) -> dict:
    """Turn a row of any format into what Qwen's chat template takes.

    Returns `messages` with the roles system, user, assistant and tool, where reasoning and tool calls have their own
    fields; and `tools` and `enable_thinking` if the row has them.
    """
    read_turns = find_format(row)
    if read_turns is None:
        raise BadRowError("columns not understood")
    turns = read_turns(row)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRowError("no list of messages")
    chat = {key: row[key] for key in ("tools", "enable_thinking") if row.get(key) not in (None, "", [])}
    messages = []
    for turn in turns:
        turn = {{"from": "role", "value": "content"}.get(key, key): item for key, item in turn.items()}
        turn["role"] = ROLES.get(turn.get("role"), turn.get("role"))
        text = turn.get("content")
        if not isinstance(text, str):
            messages.append(turn)
        elif turn["role"] == "system":
            text, tools = read_system(text)
            messages += [turn | {"content": text}] if text else []
            chat = {"tools": tools} | chat if tools else chat
        elif turn["role"] == "assistant":
            messages.append(turn if {"tool_calls", "reasoning_content"} & set(turn) else turn | read_assistant(text))
        elif turn["role"] == "tool":
            # parallel calls are answered in one turn
            messages += [turn | {"content": answer.strip()} for answer in RESPONSE.findall(text) or [text]]
        else:
            messages.append(turn)
    return {"messages": messages, **chat}


def read_system(text: str) -> tuple[str, list | None]:
    """Take the last non-empty `<tools>` out of a system text.

    What the text says about them goes with them, because the template says it in its own way and for another format of
    calls: of a text with tools the sentences before the first on functions or tools are left.
    """
    lists = [found for found in TOOLS.findall(text) if found.strip()]
    if not lists:
        return text, None
    tools = parse_literal(lists[-1].strip(), "tools")
    tools = tools if isinstance(tools, list) else [tools]
    if not all(isinstance(tool, dict) for tool in tools):
        raise BadRowError("tools that are no objects")
    sentences = re.split(r"(?<=[.!?])\s+", text)
    return " ".join(takewhile(lambda sentence: not re.search("function|tool", sentence, re.I), sentences)), tools


def read_assistant(text: str) -> dict:
    """Take reasoning and tool calls out of the text of an assistant turn."""
    message = {}
    if thoughts := THOUGHTS.match(text):
        if not thoughts[2]:
            raise BadRowError("thoughts without an end")
        message["reasoning_content"], text = thoughts[1].strip(), text[thoughts.end() :]
    if calls := [parse_literal(call, "tool call") for call in CALL.findall(text)]:
        message["tool_calls"] = [{"function": call} for call in calls]
    return message | {"content": CALL.sub("", SOLUTION_MARKS.sub("", text)).strip()}


def decode_message(message: dict) -> dict:
    """Copy a message with the arguments of its tool calls as dicts, which is what chat templates take."""
    calls = [call.get("function", call) for call in message.get("tool_calls") or []]
    if not all(isinstance(call.get("name"), str) for call in calls):
        raise BadRowError("tool call without a name")
    calls = [call | {"arguments": parse_literal(call.get("arguments") or {}, "tool call")} for call in calls]
    return message | {"tool_calls": [{"type": "function", "function": call} for call in calls]} if calls else message


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
        row = without_none(dict(zip(batch, values, strict=True)))
        try:
            turns = split_turns(to_chat(parse_line(row["line"]) if list(batch) == ["line"] else row), tokenizer)
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
    return {key: [(empty | record)[key] for record in records] for key in (*empty, "outcome")}


def tokenize(data: Rows, tokenizer: Tokenizer, config: Config, max_length: int) -> tuple[Dataset, dict[str, Any]]:
    """Return the samples of a set and its line of the table."""
    name, rows, available = data
    options = {"tokenizer": tokenizer, "config": config, "max_length": max_length}
    # tokenized once for all processes and later runs; by itself `datasets` keeps no file for rows in memory, and does
    # not see that this module has changed
    template = (tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.eos_token)
    sizes = (config.block_size, config.mask_token_id, max_length)
    fingerprint = Hasher.hash((rows._fingerprint, Path(__file__).read_text(encoding="utf-8"), template, sizes))
    cache = Path(datasets.config.HF_DATASETS_CACHE, "arclm", f"{fingerprint}.arrow")
    cache.parent.mkdir(parents=True, exist_ok=True)
    files = {"new_fingerprint": fingerprint, "cache_file_name": str(cache), "remove_columns": rows.column_names}
    records = rows.map(make_samples, batched=True, fn_kwargs=options, desc=name, **files)
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


def print_table(counts: list[dict[str, Any]]) -> None:
    """Print what `load_samples` counted, one line for each set, and below them why anything was dropped."""
    console = Console()
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
