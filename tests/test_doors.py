"""The ways in that users know from transformers: pipeline and streamers, on arcLM-nano."""

import re
from pathlib import Path
from threading import Thread

import pytest
import torch
from transformers import TextDiffusionStreamer, TextIteratorStreamer, TextStreamer, pipeline


MODEL = Path(__file__).resolve().parents[1] / "nano" / "arclm-nano"
REVERSE = [{"role": "user", "content": "Reverse the letters f h k j."}]
REVERSED = "The reversed letters are j k h f."
SORT = [{"role": "user", "content": "Sort the digits 85996."}]
SORTED = "The sorted digits are 56899."


@pytest.fixture(scope="module")
def generator():
    return pipeline("text-generation", model=str(MODEL), trust_remote_code=True, dtype=torch.float32)


def contents(outputs) -> list[str]:
    return [output[0]["generated_text"][-1]["content"] for output in outputs]


def test_pipeline_answers_a_chat_and_a_batch_of_chats(generator):
    assert contents([generator(REVERSE, do_sample=False)]) == [REVERSED]
    assert contents(generator([REVERSE, SORT], batch_size=2, do_sample=False)) == [REVERSED, SORTED]


def test_pipeline_takes_a_string_and_our_knobs(generator):
    prompt = generator.tokenizer.apply_chat_template(SORT, tokenize=False, add_generation_prompt=True)
    knobs = {"do_sample": False, "remasking_strategy": "low_confidence_dynamic", "confidence_threshold": 0.8}
    assert generator(prompt, return_full_text=False, **knobs) == [{"generated_text": SORTED}]
    assert generator(prompt, do_sample=False)[0]["generated_text"] == prompt + SORTED


def test_pipeline_stops_at_a_stop_sequence(generator):
    assert contents([generator(REVERSE, do_sample=False, stop_sequence=" k")]) == ["The reversed letters are j k"]


def test_streamers_get_the_answer_block_by_block(generator, capsys):
    generator(REVERSE, do_sample=False, streamer=TextStreamer(generator.tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == REVERSED + "<|im_end|>"

    streamer = TextIteratorStreamer(generator.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    thread = Thread(target=generator, args=(REVERSE,), kwargs={"do_sample": False, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == REVERSED
    assert len([piece for piece in pieces if piece]) > 1


def test_the_diffusion_streamer_shows_drafts_and_leaves_the_text(generator, capsys):
    streamer = TextDiffusionStreamer(generator.tokenizer, skip_prompt=True)
    generator(REVERSE, do_sample=False, max_denoising_steps=4, streamer=streamer)
    printed = capsys.readouterr().out
    draft = re.compile("\0337\033\\[33m(.*?)\033\\[0m", re.DOTALL)  # save the cursor, yellow text, reset
    drafts = draft.findall(printed)
    assert len(drafts) > 2
    assert "<|mask|>" in drafts[0]
    assert draft.sub("", printed).replace("\0338\033[J", "").strip() == REVERSED + "<|im_end|>"
