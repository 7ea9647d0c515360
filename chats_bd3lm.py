"""Rows of any known format -> chats: messages as Qwen's chat template takes them, with reasoning, tools and calls."""

import ast
import json
import re
from collections.abc import Callable
from itertools import takewhile
from typing import Any


class BadRowError(ValueError):
    """A row of data cannot be used; the message is the reason that is counted."""


KEYS = {"from": "role", "value": "content", "reasoning": "reasoning_content"}
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}

# datasets that were made with other templates write into the text what Qwen's template takes apart
THOUGHTS = re.compile(r"\s*(?:<think>|<\|begin_of_thought\|>)(.*?)(</think>|<\|end_of_thought\|>|\Z)", re.DOTALL)
SOLUTION_MARKS = re.compile(r"<\|(?:begin|end)_of_solution\|>")
# a call in Qwen's own format stays in the text
CALL = re.compile(r"<tool_call>(?!\s*<function=)(.*?)(?:</tool_call>|\Z)", re.DOTALL)
AROUND_CALL = " \t\r\n\\n"  # some rows have the two characters \n for a line break
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
    """Remove the keys that are None: Arrow fills those that other rows have, and writes them as null into JSONL.

    An argument of a call that is meant to be null stays where the arguments are a string of JSON.
    """
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
        turn = {KEYS.get(key, key): item for key, item in turn.items()}
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
    if calls := [parse_literal(call.strip(AROUND_CALL), "tool call") for call in CALL.findall(text)]:
        message["tool_calls"] = [{"function": call} for call in calls]
    return message | {"content": CALL.sub("", SOLUTION_MARKS.sub("", text)).strip()}


def decode_message(message: dict) -> dict:
    """Copy a message with the arguments of its tool calls as dicts, which is what chat templates take."""
    calls = [call.get("function", call) for call in message.get("tool_calls") or []]
    if not all(isinstance(call.get("name"), str) for call in calls):
        raise BadRowError("tool call without a name")
    calls = [call | {"arguments": parse_literal(call.get("arguments") or {}, "tool call")} for call in calls]
    return message | {"tool_calls": [{"type": "function", "function": call} for call in calls]} if calls else message
