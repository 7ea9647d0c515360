"""NELBO and perplexity: against the parent's own loss, an exact sum over all masks, and from the command line."""

import json
from itertools import combinations
from math import exp
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import chat, tiny_model, tokens, write_lines
from reference import parent_of
from rows import make_dataset
from transformers import Qwen3_5TextConfig

from arclm import evaluate_nelbo as script
from arclm.data_bd3lm import IGNORE, InputError
from arclm.evaluate_nelbo import draw_masks, evaluate_nelbo, text_samples


pytestmark = pytest.mark.usefixtures("datasets_cache")


def text(length: int, given: int = 1, seed: int = 0) -> dict:
    ids = tokens(1, length, seed)[0].tolist()
    return {"input_ids": ids, "labels": [IGNORE] * given + ids[given:]}


def test_blocks_of_one_give_the_loss_of_the_parent():
    model = tiny_model(context_attention="causal", right_shift_logits=True)
    parent = parent_of(model)
    samples = [text(length, seed=length) for length in (37, 11, 23)]
    total = 0.0
    for sample in samples:
        ids = torch.tensor([sample["input_ids"]])
        total += parent(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    result = evaluate_nelbo(model, samples, block_size=1, num_draws=2, batch_size=2)
    assert result["tokens"] == 36 + 10 + 22
    assert result["nelbo"] == pytest.approx(total / 68, rel=1e-5)
    assert result["perplexity"] == pytest.approx(exp(total / 68), rel=1e-4)
    assert result["standard_error"] < 1e-6


def exact_nelbo(model, sample: dict, block_size: int) -> float:
    """Sum over every set of masked tokens of a block: n / k times the mean cross-entropy of k masked, over k."""
    x_0, labels = torch.tensor([sample["input_ids"]]), sample["labels"]
    total = 0.0
    for start in range(0, len(labels), block_size):
        response = [i for i in range(start, min(start + block_size, len(labels))) if labels[i] != IGNORE]
        for k in range(1, len(response) + 1):
            sets = list(combinations(response, k))
            for masked in map(list, sets):
                x_t = x_0.clone()
                x_t[0, masked] = model.config.mask_token_id
                logits = model(input_ids=x_0, noisy_input_ids=x_t, block_size=block_size).logits[0, masked]
                total += F.cross_entropy(logits, x_0[0, masked], reduction="sum").item() / k / len(sets)
    return total / sum(label != IGNORE for label in labels)


@torch.no_grad()
def test_the_estimate_is_that_of_all_masks_within_its_error():
    model = tiny_model()
    sample = text(8, given=2)  # blocks of 3: 1, 3 and 2 tokens
    expected = exact_nelbo(model, sample, 3)
    few, many = (evaluate_nelbo(model, [sample], block_size=3, num_draws=draws) for draws in (16, 256))
    assert 0 < many["standard_error"] < few["standard_error"] / 2
    assert abs(many["nelbo"] - expected) < 4 * many["standard_error"]
    assert many["standard_error"] < 0.02 * expected


def test_every_number_of_masked_tokens_is_as_frequent():
    labels = torch.full((2, 10), 1)
    labels[:, :2] = IGNORE  # blocks of 5: 3 and 5 tokens
    counts = torch.zeros(2, 6)
    for draw in range(600):
        is_masked, weights = draw_masks(labels, 5, (0, draw), [0, 1])
        assert not (is_masked & (labels == IGNORE)).any()
        assert weights[0, 2] * is_masked[0, :5].sum() == 3
        for block, number in enumerate(is_masked[0].view(2, 5).sum(-1)):
            counts[block, number] += 1 / 600
    torch.testing.assert_close(counts[0], torch.tensor([0, 1, 1, 1, 0, 0]) / 3, rtol=0, atol=0.1)
    torch.testing.assert_close(counts[1], torch.tensor([0, 1, 1, 1, 1, 1]) / 5, rtol=0, atol=0.1)


def test_the_result_depends_on_the_seed_and_not_on_the_batches():
    model, samples = tiny_model(), [text(length, seed=length) for length in (9, 40, 21)]
    alone, together, other = (
        evaluate_nelbo(model, samples, num_draws=2, batch_size=size, seed=seed)["nelbo"]
        for size, seed in [(1, 0), (3, 0), (3, 1)]
    )
    assert alone == pytest.approx(together, rel=1e-5)
    assert abs(alone - other) > 1e-3


def test_a_model_in_training_is_measured_without_dropout():
    model, samples = tiny_model(attention_dropout=0.5), [text(40)]
    expected = evaluate_nelbo(model, samples)
    assert evaluate_nelbo(model.train(), samples) == expected
    assert model.training


def test_windows_of_text_do_not_overlap(nano_tokenizer):
    ids = nano_tokenizer("Sort the digits 85996.", add_special_tokens=False).input_ids
    samples = text_samples(["Sort the digits 85996.", "a"], nano_tokenizer, 4)
    assert [i for sample in samples for i in sample["input_ids"]] == ids[: len(ids) - (len(ids) % 4 == 1)]
    assert all(sample["labels"] == [IGNORE, *sample["input_ids"][1:]] for sample in samples)


@pytest.mark.parametrize(
    ("knobs", "labels", "message"),
    [
        ({"num_draws": 1}, 5, r"num_draws=1 gives no standard error"),
        ({"block_size": 32}, 5, r"block_size=32 is outside \[1, 16\]"),
        ({}, IGNORE, "There is no token to predict"),
        ({"batch_size": 0}, 5, "batch_size=0 must be at least 1"),
        ({"seed": -1}, 5, "seed=-1 at least 0"),
    ],
)
def test_what_cannot_be_measured_is_a_sentence(knobs, labels, message):
    with pytest.raises(InputError, match=message):
        evaluate_nelbo(tiny_model(), [{"input_ids": [5, 5], "labels": [IGNORE, labels]}], **knobs)


def test_the_script_reads_texts_chats_and_datasets(nano_tokenizer, config, tmp_path, monkeypatch, capsys):
    tiny_model(**config.to_diff_dict()).save_pretrained(tmp_path / "model")
    nano_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("Sort the digits 85996. " * 5)
    write_lines(tmp_path / "chats.jsonl", [chat("Hi.", "Hello."), b"{"])
    texts = ["Sort.", " ", None, "Sort the digits."]
    make_dataset(tmp_path / "org/texts", {"test": [{"text": text} for text in texts]})
    row = {"text": "Both.", "instruction": "Hi.", "output": "Hello."}  # as alpaca has them
    make_dataset(tmp_path / "org/chats", {"test": [row]})
    monkeypatch.chdir(tmp_path)
    found = []
    shown = ""
    files = ["--file text.txt --max_length 20", "--file chats.jsonl"]
    for source in (*files, "--dataset_name org/texts", "--dataset_name org/chats"):
        script.main(["--model_name_or_path", "model", "--num_draws", "2", *source.split()])
        captured = capsys.readouterr()
        found.append(json.loads(captured.out))
        shown += captured.err
    assert "dropped of chats.jsonl: 1 not JSON" in shown
    lengths = [len(nano_tokenizer(text).input_ids) for text in ("Sort.", "Sort the digits.")]
    assert found[2]["tokens"] == sum(lengths) - 2
    assert found[3] == found[1]
    assert found[1]["tokens"] % config.block_size != 0  # the response and the fill of its last block, after a prompt
    assert all(2 < result["nelbo"] < 20 and result["block_size"] == 8 for result in found)
    Qwen3_5TextConfig(num_hidden_layers=1).save_pretrained("ar")
    Path("latin.txt").write_bytes("Größe".encode("latin-1"))
    for options, message in {
        "--model_name_or_path model": "one of --file and --dataset_name",
        "--model_name_or_path ar --file text.txt": r'type "qwen3_5_text", not a converted one.*convert_a2d\.py',
        "--model_name_or_path model --dataset_name org/no_texts": "org/no_texts cannot be reached .* hf download",
        "--model_name_or_path model --file latin.txt": r"latin\.txt is not text in UTF-8",
        "--model_name_or_path model --file text.txt --max_length 0": "max_length=0 leaves nothing to predict",
    }.items():
        with pytest.raises(InputError, match=message):
            script.main(options.split())
