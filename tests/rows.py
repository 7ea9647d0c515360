"""Rows in the schemas of the datasets that the model card names, and directories that hold such rows."""

from pathlib import Path

from conftest import write_lines


def user(text: str) -> dict:
    """Return a user turn."""
    return {"role": "user", "content": text}


def assistant(text: str, **fields) -> dict:
    """Return an assistant turn."""
    return {"role": "assistant", "content": text, **fields}


def make_dataset(folder: Path, files: dict[str, list], card: str = "") -> None:
    """Write a directory that `load_dataset` reads, a JSONL file for each split or configuration."""
    folder.mkdir(parents=True)
    for name, rows in files.items():
        write_lines(folder / f"{name}.jsonl", rows)
    if card:
        (folder / "README.md").write_text(f"---\nconfigs:\n{card}---\n")


CALL_TEXT = (
    "<tool_call>\n<function=get_time>\n<parameter=city>\nRome\n</parameter>\n<parameter=count>\n3\n</parameter>\n"
    "</function>\n</tool_call><|im_end|>"
)
TOOL_SYSTEM = (
    "You are a function calling AI model. You are provided with function signatures within <tools> </tools> XML tags. "
    "Don't make assumptions.\n<tools>\n[{'type': 'function', 'function': {'name': 'get_time', 'parameters': "
    "{'type': 'object', 'properties': {}, 'strict': True}}}]\n</tools>\nFor each call return a json object within "
    "<tool_call> </tool_call> tags:\n<tool_call>\n{'arguments': <args-dict>, 'name': <function-name>}\n</tool_call>\n"
)
CALL_LITERAL = "<tool_call>\n{'name': 'get_time', 'arguments': {'city': 'Rome', 'count': 3}}\n</tool_call>"
THINKING_TURNS = [
    {"role": "system", "content": TOOL_SYSTEM},
    {"role": "human", "content": "The time?"},
    {"role": "model", "content": f"<think>\nAsk <tool_call>.\n</think>\n{CALL_LITERAL}"},
    {"role": "tool", "content": "<tool_response>\n12\n</tool_response>"},
    {"role": "model", "content": "<think>\nIt says 12.\n</think>\nTwelve."},
]
HERMES_TURNS = [
    {"from": "system", "value": TOOL_SYSTEM},
    {"from": "human", "value": "The time?"},
    {"from": "gpt", "value": CALL_LITERAL},
]
OPEN_THOUGHTS = {
    "system": "Your thoughts go between <|begin_of_thought|> and <|end_of_thought|>.",
    "conversations": [
        {"from": "user", "value": "Add 1 and 2."},
        {
            "from": "assistant",
            "value": "<|begin_of_thought|>\n\n1+2=3\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n"
            "The sum is 3.\n\n<|end_of_solution|>",
        },
    ],
}
S1K = {"question": "Add 1 and 2.", "thinking_trajectories": ["1+2=3", "no"], "attempt": "The sum is 3.", "cot": None}
ALPACA = {"instruction": "Add the numbers.", "input": "1 and 2", "output": "3", "text": "Below is an instruction."}
