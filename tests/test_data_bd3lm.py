"""data_bd3lm.py: rows of every format, samples, the table, and what is said where data cannot be used."""

import json
from collections import Counter

import pytest
from conftest import chat, write_lines
from datasets import Dataset
from rows import ALPACA, CALL_TEXT, OPEN_THOUGHTS, S1K, THINKING_TURNS, TOOL_SYSTEM, assistant, make_dataset, user

from arclm import data_bd3lm as data
from arclm.data_bd3lm import (
    IGNORE,
    BadRowError,
    InputError,
    collate,
    load_samples,
    make_sample,
    read_rows,
    split_turns,
    to_chat,
)
from arclm.nano.world import generate_tasks, to_row


pytestmark = pytest.mark.usefixtures("datasets_cache")


CALL = {"type": "function", "function": {"name": "get_time", "arguments": '{"city": "Rome", "count": 3}'}}
TOOLS = [{"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}]
CALLING = [{"role": "user", "content": "The time?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]


# ---- Rows to chats

HELLO = [user("Hi."), assistant("Hello.")]
FIELDS = [user("Hi."), assistant("<think>", reasoning_content="a")]
SUM = [user("Add 1 and 2."), assistant("The sum is 3.", reasoning_content="1+2=3")]
FORMATS = {
    "messages": ({"messages": HELLO, "id": 3}, HELLO),
    "roles of ShareGPT": (
        {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]},
        HELLO,
    ),
    "texts": ({"prompt": "Hi.", "completion": "Hello."}, HELLO),
    "lists of turns": ({"prompt": HELLO[:1], "completion": HELLO[1:]}, HELLO),
    "messages before prompt": ({"prompt": "Hi.", "messages": HELLO}, HELLO),
    "alpaca": (ALPACA, [user("Add the numbers.\n\n1 and 2"), assistant("3")]),
    "alpaca, empty input": (ALPACA | {"input": ""}, [user("Add the numbers."), assistant("3")]),
    "alpaca, no input": ({"instruction": "Hi.", "output": "Hello."}, HELLO),
    "s1K": (S1K, SUM),
    "OpenThoughts": (OPEN_THOUGHTS, SUM),
    "thoughts in the text": (chat("Add 1 and 2.", "<think>\n1+2=3\n</think>\n\nThe sum is 3."), SUM),
    "no thoughts in the text": (
        chat("Hi.", "<think>\n\n</think>\n\nHello."),
        [HELLO[0], HELLO[1] | {"reasoning_content": ""}],
    ),
    "fields before tags": ({"messages": FIELDS}, FIELDS),
    "reasoning": (
        {"messages": [HELLO[0], assistant("Hello.", reasoning="So.")]},
        [HELLO[0], assistant("Hello.", reasoning_content="So.")],
    ),
}


@pytest.mark.parametrize("case", FORMATS)
def test_rows_of_every_format_become_messages(case):
    row, expected = FORMATS[case]
    assert to_chat(row) == {"messages": expected}


def test_tools_and_enable_thinking_come_along():
    row = {"prompt": "Hi.", "completion": "Hello.", "tools": "[]", "enable_thinking": False, "task": "t"}
    assert to_chat(row) == {"messages": HELLO, "tools": "[]", "enable_thinking": False}


def test_tools_and_calls_of_hermes_rows_are_taken_out_of_the_text():
    found = to_chat({"conversations": THINKING_TURNS})
    (tool,) = found["tools"]
    assert tool["function"]["parameters"]["strict"] is True  # a Python literal, and not the empty <tools> before it
    call = {"function": {"name": "get_time", "arguments": {"city": "Rome", "count": 3}}}
    assert found["messages"] == [
        user("The time?"),
        assistant("", reasoning_content="Ask <tool_call>.", tool_calls=[call]),
        {"role": "tool", "content": "12"},
        assistant("Twelve.", reasoning_content="It says 12."),
    ]


def system_of(text: str) -> str:
    """The system text that is left."""
    first = to_chat({"messages": [{"role": "system", "content": text}, *HELLO]})["messages"][0]
    return first["content"] if first["role"] == "system" else ""


def test_only_what_explains_the_tools_is_cut_from_a_system_text():
    assert system_of(TOOL_SYSTEM) == ""
    assert system_of("You are Bob. You speak French.\n" + TOOL_SYSTEM) == "You are Bob. You speak French."
    json_mode = "Answer in JSON. Here's the schema:\n<schema>\n{'type': 'object'}\n</schema>\nUse no tool."
    assert system_of(json_mode) == json_mode


def test_the_last_list_of_tools_counts_where_no_column_has_one():
    text = "<tools>['old']</tools> Between <tools> tags: <tools>[{'name': 'new'}]</tools> <tools> </tools>"
    turns = [{"role": "system", "content": text}, *HELLO]
    for empty in ({}, {"tools": None}, {"tools": ""}, {"tools": []}):
        assert to_chat({"messages": turns, **empty}) == {"messages": HELLO, "tools": [{"name": "new"}]}
    assert to_chat({"messages": turns, "tools": TOOLS})["tools"] == TOOLS


CALLS = {
    "JSON": ('<tool_call>{"name": "f", "arguments": {"a": true}}</tool_call>', "", [{"a": True}]),
    "arguments as a string": (
        """<tool_call>{"name": "f", "arguments": "{'a': None}"}</tool_call>""",
        "",
        [{"a": None}],
    ),
    "two and a text": ("One moment.\n" + "<tool_call>\n{'name': 'f'}\n</tool_call>\n" * 2, "One moment.", [{}, {}]),
    "written line breaks": (
        r'<tool_call>\n{"name": "f", "arguments": {"a": "x\n"}}\n</tool_call>',
        "",
        [{"a": "x\n"}],
    ),
    "no end": ("<tool_call>\n{'name': 'f', 'arguments': {}}", "", [{}]),
    "in Qwen's format": (CALL_TEXT, CALL_TEXT, []),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls_are_read_as_json_or_python(case):
    text, content, expected = CALLS[case]
    message = data.decode_message(to_chat(chat("Hi.", text))["messages"][1])
    assert message["content"] == content
    assert [call["function"]["arguments"] for call in message.get("tool_calls", [])] == expected


def test_answers_to_parallel_calls_are_messages_of_their_own():
    answers = "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"
    messages = to_chat({"conversations": [*HELLO, {"from": "tool", "value": answers}]})["messages"]
    assert messages[2:] == [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]


# ---- Chats to samples


def test_the_last_block_is_filled_with_the_end_token():
    sample = make_sample([1, 2, 3], [4, 5, 6, 99], block_size=5, max_length=20, end_token_id=99)
    assert sample["input_ids"] == [1, 2, 3, 4, 5, 6, 99, 99, 99, 99]
    assert sample["labels"] == [IGNORE] * 3 + [4, 5, 6, 99, 99, 99, 99]
    assert (sample["length"], sample["response_tokens"], sample["outcome"]) == (10, 7, "whole")
    # one that ends with its block gets none
    assert make_sample([1], [4, 5, 6, 99], 5, 5, 99)["input_ids"] == [1, 4, 5, 6, 99]


def test_a_cut_sample_has_no_end_token():
    sample = make_sample([1, 2, 3], [4, 5, 6, 99], 3, 6, 99)
    expected = ([1, 2, 3, 4, 5, 6], [IGNORE] * 3 + [4, 5, 6], "truncated")
    assert (sample["input_ids"], sample["labels"], sample["outcome"]) == expected
    with pytest.raises(BadRowError, match="prompt over max_length"):
        make_sample([1, 2, 3], [4, 99], 3, 3, 99)


SPLITS = {
    "no thinking": (chat("Hi.", "Hello."), False, "Hello.<|im_end|>"),
    "thinking": ({"messages": SUM}, True, "1+2=3\n</think>\n\nThe sum is 3.<|im_end|>"),
    "thinking in the text": (chat("Hi.", "<think>\na\n</think>\n\nHello."), True, "a\n</think>\n\nHello.<|im_end|>"),
    "said to think": (chat("Hi.", "Hello.", enable_thinking=True), True, "\n</think>\n\nHello.<|im_end|>"),
    "call": ({"messages": CALLING, "tools": json.dumps(TOOLS)}, False, CALL_TEXT),
}


@pytest.mark.parametrize("case", SPLITS)
def test_prompt_and_response_are_what_generate_sees(tokenizer, case):
    row, thinking, expected = SPLITS[case]
    ((prompt, response),) = split_turns(row, tokenizer)
    assert response == expected
    options = {"tools": TOOLS if "tools" in row else None, "enable_thinking": thinking, "return_dict": True}
    seen = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, **options)
    assert tokenizer(prompt, add_special_tokens=False).input_ids == seen["input_ids"]
    assert prompt.endswith("<|im_start|>assistant\n<think>\n" + ("" if thinking else "\n</think>\n\n"))


def test_every_assistant_turn_is_a_sample(tokenizer):
    messages = chat("Hi.", "Hello.", "Bye.", "See you.", "Left over.")["messages"]
    turns = split_turns({"messages": messages}, tokenizer)
    assert [response for _, response in turns] == ["Hello.<|im_end|>", "See you.<|im_end|>"]
    for count, (prompt, _) in zip([1, 3], turns, strict=True):
        assert prompt == tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=True)


def test_rows_of_the_nano_world_are_read_back_as_their_text(nano_tokenizer, config, tmp_path):
    tasks = [task for task, _ in zip(generate_tasks("train", 3), range(40), strict=False)]
    rows = read_rows(write_lines(tmp_path / "train.jsonl", [to_row(task) for task in tasks]))
    samples, (counts,) = load_samples(rows, nano_tokenizer, config, max_length=512)
    assert (counts["samples"], counts["dropped"], counts["truncated"]) == (40, 0, 0)
    for task, sample in zip(tasks, samples, strict=True):
        assert len(sample["input_ids"]) == len(sample["labels"]) == sample["length"]
        text = nano_tokenizer.apply_chat_template(task.messages, tools=task.tools, tokenize=False)
        read = nano_tokenizer.decode(sample["input_ids"])
        # after the last end token the template has a newline, the sample as many end tokens as the block takes
        assert read.startswith(text.rstrip("\n"))
        assert set(read[len(text.rstrip("\n")) :].split("<|im_end|>")) <= {""}


BAD_CALL = {"name": "f", "arguments": "{broken"}
BAD_ROWS = [
    (b"{broken", "not JSON"),
    (b'{"messages": "\xff"}', "not JSON"),
    (b"[" * 100_000, "not JSON"),
    ([1, 2], "no JSON object"),
    ({"text": "Hi."}, "columns not understood"),
    ({"messages": None}, "columns not understood"),
    ({"messages": ["Hi."]}, "no list of messages"),
    ({"prompt": HELLO, "completion": ["Hi."]}, "no list of messages"),
    (ALPACA | {"instruction": 5}, "malformed"),
    (S1K | {"thinking_trajectories": []}, "malformed"),
    ({"messages": [{"role": ["user"], "content": "Hi."}]}, "malformed"),
    ({"messages": [HELLO[0], assistant("", tool_calls=5)]}, "malformed"),
    (b'{"prompt": "Hi.", "completion": "\\ud800"}', "malformed"),
    (chat("Hi."), "no assistant turn"),
    ({"messages": HELLO[1:]}, "malformed"),
    ({"messages": [*SUM, {"role": "system", "content": "Late."}, *SUM]}, "refused by the chat template"),
    ({"messages": CALLING, "tools": "[broken"}, "tools neither JSON nor Python"),
    ({"conversations": [{"from": "system", "value": "<tools>[5]</tools>"}, *HELLO]}, "tools that are no objects"),
    (chat("Hi.", "<tool_call>{broken}</tool_call>"), "tool call neither JSON nor Python"),
    ({"messages": [HELLO[0], assistant("", tool_calls=[BAD_CALL])]}, "tool call neither JSON nor Python"),
    (chat("Hi.", "<tool_call>{'arguments': {}}</tool_call>"), "tool call without a name"),
    (chat("Hi.", "<tool_call>" + " " * 200_000), "tool call neither JSON nor Python"),  # minutes, were it quadratic
    (chat("Hi.", "<think>\nSo"), "thoughts without an end"),
    (chat("Hi.", ""), "empty response"),
    ({"messages": SUM, "enable_thinking": False}, "turn without the generation prompt"),
    (chat("Hi.", "Say <|mask|>."), "contains the mask token"),
    (chat("Hi." * 99, "Hello."), "prompt over max_length"),
]


def test_malformed_rows_are_counted_and_never_fatal(nano_tokenizer, config, tmp_path):
    rows = [row for row, _ in BAD_ROWS]
    file = write_lines(tmp_path / "train.jsonl", [*rows, chat("Hi.", "Hello."), b"", chat("Hi.", "Hello. " * 99)])
    samples, (counts,) = load_samples(read_rows(file), nano_tokenizer, config, max_length=67)
    assert (counts["rows"], counts["of"]) == (len(rows) + 2, len(rows) + 2)
    assert (counts["samples"], counts["truncated"]) == (2, 1)
    reasons = Counter(reason for _, reason in BAD_ROWS)
    assert set(counts["why dropped"].split(", ")) == {f"{count} {reason}" for reason, count in reasons.items()}
    assert counts["dropped"] == len(rows)
    assert max(samples["length"]) == 64  # 67 rounded down to whole blocks
    assert samples["row"][:] == [0, 1]


def test_a_first_batch_of_dropped_rows_does_not_decide_the_columns(nano_tokenizer, config, tmp_path):
    file = write_lines(tmp_path / "train.jsonl", [*[chat("Hi.", "")] * 1000, chat("Hi.", "Hello.")])
    samples, (counts,) = load_samples(read_rows(file), nano_tokenizer, config, max_length=64)
    assert (counts["samples"], counts["dropped"], len(samples)) == (1, 1000, 1)


def test_keys_that_arrow_filled_with_none_do_not_reach_the_template(nano_tokenizer, config, tmp_path):
    call = {"function": {"name": "get_time", "arguments": {"city": "Rome"}}}
    other = {"function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    rows = [{"messages": [CALLING[0], {"role": "assistant", "tool_calls": [c]}]} for c in (call, other)]
    rows = Dataset.from_list([*rows, chat("Hi.", "Hello.")])
    samples, _ = load_samples([data.Rows("rows", rows, 3)], nano_tokenizer, config, max_length=512)
    texts = [nano_tokenizer.decode(ids) for ids in samples["input_ids"]]
    assert len(texts) == 3
    assert not any("None" in text or "null" in text for text in texts)
    rows.to_json(tmp_path / "rows.jsonl")  # which writes them as null
    again, _ = load_samples(read_rows(str(tmp_path / "rows.jsonl")), nano_tokenizer, config, max_length=512)
    assert again["input_ids"][:] == samples["input_ids"][:]


def test_the_table_says_what_became_of_each_set(nano_tokenizer, config, tmp_path, capsys):
    files = [
        write_lines(tmp_path / "a.jsonl", [*[chat("Hi. " * count, "One.", "Bye.", "Two.") for count in (1, 9)], b"{"]),
        write_lines(tmp_path / "b.jsonl", [chat("Hi.", "word " * count) for count in (1, 199)]),
    ]
    sets = [rows for file in files for rows in read_rows(file)]
    samples, counts = load_samples(sets, nano_tokenizer, config, max_length=128)
    parts = samples.select(range(4)), samples.select(range(4, 6))
    for part, count in zip(parts, counts, strict=True):
        labels = [labels[i : i + 8] for labels in part["labels"] for i in range(0, len(labels), 8)]
        assert count["tokens"] == 8 * len(labels)
        assert count["response tokens"] == sum(label != IGNORE for block in labels for label in block)
        share = sum(set(block) != {IGNORE} for block in labels) / len(labels)
        assert count["blocks with loss"] == f"{share:.1%}" != "100.0%"
    data.print_table([count | {"data": name} for count, name in zip(counts, ("first", "second"), strict=True)])
    out = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert [row[:6] for row in cells] == [["first", "3", "3", "4", "0", "1"], ["second", "2", "2", "2", "1", "0"]]
    assert "dropped of first: 1 not JSON" in out


def test_data_is_tokenized_once(nano_tokenizer, config, tmp_path, monkeypatch):
    file = write_lines(tmp_path / "train.jsonl", [chat("Hi.", "Hello once.")])
    make_dataset(tmp_path / "chats", {"train": [chat("Hi.", "Hello twice.")]})
    sources = [(file,), (None, str(tmp_path / "chats"), "train")]
    load = [
        lambda length=64, source=source: load_samples(read_rows(*source), nano_tokenizer, config, max_length=length)
        for source in sources
    ]
    first = [load_one() for load_one in load]
    make_samples, calls = data.make_samples, []
    monkeypatch.setattr(data, "make_samples", lambda *args, **kwargs: calls.append(1) or make_samples(*args, **kwargs))
    for load_one, (samples, counts) in zip(load, first, strict=True):
        again = load_one()
        assert not calls
        assert (again[0][:], again[1]) == (samples[:], counts)
        load_one(32)
        assert calls.pop()


def test_unusable_data_is_said_in_a_sentence(nano_tokenizer, config, tmp_path):
    with pytest.raises(InputError, match=r"absent\.jsonl does not exist\. Give a JSONL file"):
        read_rows(str(tmp_path / "absent.jsonl"))
    with pytest.raises(InputError, match=r" is no file\. Give a JSONL file"):
        read_rows(str(tmp_path))
    with pytest.raises(InputError, match=r"Both a\.jsonl and x/y were given to train on\. Give a file or a dataset\."):
        read_rows("a.jsonl", "x/y", "train")
    rows = read_rows(write_lines(tmp_path / "bad.jsonl", [b"{", chat("Hi.")]))
    with pytest.raises(InputError, match=r"Nothing in .*bad\.jsonl can be used: 1 not JSON, 1 no assistant turn\."):
        load_samples(rows, nano_tokenizer, config, max_length=64)
    with pytest.raises(InputError, match=r"No line of .*list\.json is a JSON object\. JSONL has one chat per line"):
        read_rows(write_lines(tmp_path / "list.json", [[chat("Hi.")], b"{"]))
    empty = read_rows(write_lines(tmp_path / "empty.jsonl", []))
    with pytest.raises(InputError, match=r"Nothing in .*empty\.jsonl can be used: it is empty"):
        load_samples(empty, nano_tokenizer, config, max_length=64)
    with pytest.raises(InputError, match=r"max_length=7 is shorter than a block\. Give --max_length 8 or more"):
        load_samples(rows, nano_tokenizer, config, max_length=7)


def test_wrong_columns_are_named_beside_those_that_are_understood(tmp_path):
    known = r"Understood are messages \| conversations \| prompt, completion \| .* \| instruction, output\. Rename"
    file = write_lines(tmp_path / "a.jsonl", [b"{", {"query": "Hi."}, {"reply": "Hello."}])
    with pytest.raises(InputError, match=rf"a\.jsonl has the columns query, reply\. {known}"):
        read_rows(file)
    assert len(read_rows(write_lines(tmp_path / "b.jsonl", [{"query": "Hi."}, chat("Hi.")]))[0].rows) == 2
    make_dataset(tmp_path / "c", {"train": [{"query": "Hi.", "reply": "Hello."}]})
    with pytest.raises(InputError, match=rf"c has the columns query, reply\. {known}"):
        read_rows(None, str(tmp_path / "c"), "train")


def test_a_slice_that_asks_for_more_than_there_is_shows_in_the_table(tmp_path):
    make_dataset(tmp_path / "chats", {"train": [chat("Hi.", "Hello.")] * 3})
    for split, count in [("train[:2]", 2), ("train[:5000]", 3)]:
        (rows,) = read_rows(None, str(tmp_path / "chats"), split)
        assert (len(rows.rows), rows.available) == (count, 3)
        assert rows.name.endswith(split)


def test_one_of_several_configurations_is_chosen(tmp_path):
    files = {"one": [chat("Hi.", "One.")], "two": [chat("Hi.", "Two.")] * 2}
    card = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in files)
    make_dataset(tmp_path / "several", files, card)
    with pytest.raises(InputError, match=r"several cannot be read: Please pick one .*'two'\], by --dataset_config\."):
        read_rows(None, str(tmp_path / "several"))
    (rows,) = read_rows(None, str(tmp_path / "several"), config="two")
    assert len(rows.rows) == 2
    for split, config in [("train[:2]", None), ("train", "two")]:
        with pytest.raises(InputError, match="--dataset_split and --dataset_config are of --dataset_name"):
            read_rows("a.jsonl", None, split, config)


def test_a_dataset_that_cannot_be_read_is_named_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy = "Connect to the Hub, or start in a directory with a copy: hf download tatsu-lab/alpaca --repo-type dataset"
    with pytest.raises(InputError, match=rf"The dataset tatsu-lab/alpaca cannot be reached \(.+\)\. {copy}"):
        read_rows(None)
    make_dataset(tmp_path / "chats", {"train": [chat("Hi.", "Hello.")]})
    with pytest.raises(InputError, match=r"The split test of chats cannot be read: Unknown split .*\['train'\]"):
        read_rows(None, "chats", "test")
    make_dataset(tmp_path / "broken", {"train": [b"{"]})
    with pytest.raises(InputError, match=r"The split train of broken cannot be read: .*JSON"):
        read_rows(None, "broken", "train")
    make_dataset(tmp_path / "script", {"train": [chat("Hi.", "Hello.")]})
    (tmp_path / "script/script.py").touch()
    with pytest.raises(InputError, match=r"The split train of script cannot be read: Dataset scripts are no longer"):
        read_rows(None, "script", "train")


# ---- Samples to batches


def test_collate_pads_on_the_right_outside_attention_and_loss():
    samples = [make_sample(prompt, [*end, 99], 2, 8, 99) for prompt, end in [([1], [4]), ([1, 2], []), ([1], [])]]
    batch = collate([sample | {"row": i} for i, sample in enumerate(samples)])
    assert batch["input_ids"][:2].tolist() == [[1, 4, 99, 99], [1, 2, 99, 99]]
    assert batch["input_ids"][2, :2].tolist() == [1, 99]
    assert batch["attention_mask"].tolist() == [[1] * 4, [1] * 4, [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 4, 99, 99], [IGNORE] * 2 + [99] * 2, [IGNORE, 99, IGNORE, IGNORE]]
    assert batch["row"].tolist() == [0, 1, 2]
