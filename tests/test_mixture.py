"""The mixture of the model card: in small, as directories in the schemas of the Hub, and where it lies, for real."""

import json
import sys
from pathlib import Path

import mixture
import pytest
import torch
from conftest import chat
from datasets import load_dataset
from rows import ALPACA, CALL_TEXT, HERMES_TURNS, OPEN_THOUGHTS, S1K, THINKING_TURNS, make_dataset

from arclm import data_bd3lm as data
from arclm.data_bd3lm import load_samples, read_rows


HUB = Path(__file__).resolve().parents[2] / "shared" / "data" / "hub"

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture
def small_hub(tmp_path, monkeypatch):
    """The six sets as directories that shadow the names of the Hub: 2 rows each, Hermes 2 + 3 + 1 + 1 + 1."""
    make_dataset(tmp_path / "tatsu-lab/alpaca", {"train": [ALPACA] * 2})
    make_dataset(
        tmp_path / "HuggingFaceH4/ultrachat_200k",
        {
            name: [{"prompt": "Hi.", "prompt_id": "0", **chat("Hi.", "Hello.")}] * 2
            for name in ("train_sft", "test_sft")
        },
        "- config_name: default\n  data_files:\n  - split: train_sft\n    path: train_sft.jsonl\n"
        "  - split: test_sft\n    path: test_sft.jsonl\n",
    )
    row = {"id": "0", "conversations": HERMES_TURNS, "category": "c", "subcategory": "s"}
    schema = [{"from": "human", "value": "As JSON?"}, {"from": "gpt", "value": "{}"}]
    files = {"func_calling_singleturn": [row | {"task": "t"}] * 2, "func_calling": [row | {"task": "t"}] * 3}
    files |= {"glaive_func_calling": [row | {"task": "t", "tools": "[]"}]}
    files |= {name: [row | {"conversations": schema, "schema": "{}"}] for name in data.JSON_MODE}
    card = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in files)
    make_dataset(tmp_path / "NousResearch/hermes-function-calling-v1", files, card)
    folder = tmp_path / "Jofthomas/hermes-function-calling-thinking-V1"
    make_dataset(folder, {"train": [{"conversations": THINKING_TURNS}] * 2})
    make_dataset(tmp_path / "open-thoughts/OpenThoughts-114k", {"train": [OPEN_THOUGHTS] * 2})
    make_dataset(tmp_path / "simplescaling/s1K", {"train": [S1K] * 2})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_mixture_is_that_of_the_card():
    assert [(source.name, source.split, source.limit) for source in data.MIXTURE] == [
        ("tatsu-lab/alpaca", "train", 8000),
        ("HuggingFaceH4/ultrachat_200k", "train_sft", 5000),
        ("NousResearch/hermes-function-calling-v1", "train", 5000),
        ("Jofthomas/hermes-function-calling-thinking-V1", "train", None),
        ("open-thoughts/OpenThoughts-114k", "train", 5000),
        ("simplescaling/s1K", "train", None),
    ]


def test_the_mixture_in_small_becomes_samples(small_hub, tokenizer, config, monkeypatch):
    # slices of 1 row, and for Hermes of 4 over its configurations
    limits = (1, 1, 4, None, 1, None)
    small = [source._replace(limit=limit) for source, limit in zip(data.MIXTURE, limits, strict=True)]
    monkeypatch.setattr(data, "MIXTURE", small)
    monkeypatch.setattr(config, "mask_token_id", tokenizer.convert_tokens_to_ids("<|mask|>"))
    samples, counts = load_samples(read_rows(None), tokenizer, config, max_length=2048)
    keys = ("rows", "of", "samples", "dropped")
    expected = [(1, 2, 1, 0), (1, 2, 1, 0), (4, 8, 4, 0), (2, 2, 4, 0), (1, 2, 1, 0), (2, 2, 2, 0)]
    assert [tuple(count[key] for key in keys) for count in counts] == expected
    assert [count["data"].split()[1] for count in counts][2:4] == ["train[:4]", "train"]
    assert samples["row"][:] == list(range(13))
    responses = [
        tokenizer.decode(ids[len(ids) - count :]).partition("<|im_end|>")[0]
        for ids, count in zip(samples["input_ids"], samples["response_tokens"], strict=True)
    ]
    call = CALL_TEXT.removesuffix("<|im_end|>")
    thinking = [f"Ask <tool_call>.\n</think>\n\n{call}", "It says 12.\n</think>\n\nTwelve."]
    thoughts = "1+2=3\n</think>\n\nThe sum is 3."
    assert responses == ["3", "Hello.", *[call] * 4, *thinking * 2, *[thoughts] * 3]
    prompts = [tokenizer.decode(ids) for ids in samples["input_ids"][2:10]]
    # the tools stand where the template puts them, and the text of the dataset that explains them is gone
    assert all(prompt.count('"name": "get_time"') == 1 and "function calling AI" not in prompt for prompt in prompts)


def test_the_mixture_of_the_real_schemas(qwen_tokenizer, config, monkeypatch):
    if not HUB.is_dir():
        pytest.skip(f"{HUB} is absent: it is not part of the repository")
    monkeypatch.chdir(HUB)
    assert len(load_dataset("tatsu-lab/alpaca", split="train[:8000]")) == 8000
    sources = [source._replace(limit=40) for source in data.MIXTURE]
    monkeypatch.setattr(data, "MIXTURE", sources)
    monkeypatch.setattr(config, "mask_token_id", qwen_tokenizer.convert_tokens_to_ids("<|mask|>"))
    samples, counts = load_samples(read_rows(None), qwen_tokenizer, config, max_length=2048)
    assert [count["rows"] for count in counts] == [40] * 6
    assert counts[0]["of"] == 9229
    whys = [count.pop("why dropped") for count in counts]
    assert whys[2] == "1 tool call without a name"  # it stands among the arguments
    assert set(whys[:2] + whys[4:]) == {""}
    assert len(samples) == sum(count["samples"] for count in counts)


def test_padding_is_what_a_longer_row_of_the_batch_costs():
    lengths = torch.tensor([4, 2, 2, 8, 1])
    assert mixture.padding(lengths, [0, 1, 2, 3, 4], 2) == pytest.approx(1 - 17 / 25)  # 2 x 4 + 2 x 8 + 1
    assert mixture.padding(lengths, [1, 2, 0, 3, 4], 2) == pytest.approx(1 - 17 / 21)
    assert mixture.padding(lengths, [3, 1, 0, 2, 4], 1) == 0


def test_the_benchmark_of_the_mixture_writes_what_it_counts(small_hub, tokenizer, tmp_path, monkeypatch):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = ["--tokenizer_name_or_path", str(tmp_path / "tokenizer"), "--output_file", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["mixture.py", *options])
    mixture.main()
    record = json.loads((tmp_path / "out.json").read_text())
    assert [line["rows"] for line in record["data"]] == [2, 2, 8, 2, 2, 2]
    assert record["padding"][0] == {"batch": 1, "shuffled": [0, 0, 0], "grouped": [0, 0, 0]}
    assert 0 < min(record["padding"][1]["grouped"]) < 1
    response = sum(line["response tokens"] for line in record["data"])
    assert 0 < record["fill"]["tokens"] < response
