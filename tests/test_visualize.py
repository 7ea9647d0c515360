"""The picture of a denoised answer."""

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoTokenizer

from arclm import visualize


MODEL = str(Path(__file__).resolve().parents[1] / "nano" / "arclm-nano")
PROMPT = "Repeat 4 times the word kateto."


def traced(**knobs) -> list[visualize.Settled]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL, trust_remote_code=True)
    model = AutoModel.from_pretrained(MODEL, trust_remote_code=True, dtype=torch.float32)
    messages = [{"role": "user", "content": PROMPT}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    return visualize.trace(model, tokenizer, inputs["input_ids"], **knobs)


def test_every_token_has_the_step_it_settled_in_and_its_confidence():
    tokens = traced(max_new_tokens=64)
    assert "".join(token.text for token in tokens) == (
        "Here is the word 4 times: kateto kateto kateto kateto.<|im_end|>"
    )
    # one token a step, so every step from 0 on has one
    assert sorted(token.step for token in tokens) == list(range(len(tokens)))
    assert all(0.2 < token.confidence <= 1 for token in tokens)


def test_confidence_is_what_the_dynamic_strategy_saw():
    threshold = 0.9
    tokens = traced(max_new_tokens=64, remasking_strategy="low_confidence_dynamic", confidence_threshold=threshold)
    by_step: dict[int, list[float]] = {}
    for token in tokens:
        by_step.setdefault(token.step, []).append(token.confidence)
    assert len(by_step) < len(tokens)
    # a step accepts all above the threshold, or the best one alone
    assert all(len(values) == 1 or min(values) > threshold for values in by_step.values())


def test_a_smaller_block_and_a_prompt_that_cannot_be_drawn():
    tokens = traced(max_new_tokens=64, block_size=4)
    assert sorted(token.step for token in tokens) == list(range(len(tokens)))
    assert all(0.2 < token.confidence <= 1 for token in tokens)
    model = AutoModel.from_pretrained(MODEL, trust_remote_code=True)
    with pytest.raises(ValueError, match="The prompt holds mask tokens"):
        visualize.trace(model, None, torch.tensor([[5, model.config.mask_token_id]]))


@pytest.mark.parametrize("name", ["answer.png", "answer.gif"])
def test_it_writes_a_picture_or_a_frame_for_every_step(name, tmp_path, monkeypatch):
    path = tmp_path / name
    argv = [
        "--model_name_or_path",
        MODEL,
        "--prompt",
        PROMPT,
        "--output_file",
        str(path),
        "--max_denoising_steps",
        "4",
    ]
    monkeypatch.setattr(sys, "argv", ["visualize.py", *argv])
    visualize.main()
    with Image.open(path) as image:
        assert image.width > 300
        steps = {token.step for token in traced(max_new_tokens=128, max_denoising_steps=4)}
        assert getattr(image, "n_frames", 1) == (1 if name.endswith("png") else len(steps))


def test_a_parent_is_refused(tmp_path, monkeypatch):
    argv = ["--model_name_or_path", f"{MODEL}-base", "--prompt", PROMPT, "--output_file", str(tmp_path / "a.png")]
    monkeypatch.setattr(sys, "argv", ["visualize.py", *argv])
    with pytest.raises(ValueError, match=r"arclm-nano-base is not an arcLM model\. convert_a2d\.py makes one"):
        visualize.main()


@pytest.mark.parametrize(
    ("file", "sentence"),
    [("answer.jpg", r"answer\.jpg ends in neither \.png nor \.gif"), ("nowhere/a.png", "nowhere is no directory")],
)
def test_a_file_that_cannot_be_is_refused_before_the_model_is_loaded(file, sentence, monkeypatch):
    argv = ["--model_name_or_path", "absent", "--prompt", "", "--output_file", file]
    monkeypatch.setattr(sys, "argv", ["visualize.py", *argv])
    with pytest.raises(ValueError, match=sentence):
        visualize.main()
