"""Logits processors: each position has a history of its own, whatever the padding of the batch."""

import itertools

import torch
from conftest import tiny_model, tokens
from scripted import EOS, PAD, greedy, scripted
from transformers import LogitsProcessor, LogitsProcessorList


def test_processors_see_the_history_of_each_position():
    """The model wants 10 11 10 11 ... and an end token at position 9; prompts have 3 and 5 tokens."""
    text = [10, 11] * 4 + [10, EOS]
    ids = torch.tensor([[PAD, PAD, 5, 6, 7], [5, 6, 7, 8, 9]])
    knobs = {"attention_mask": (ids != PAD).long(), "max_new_tokens": 12, "remasking_strategy": "sequential"}

    def answers(**more) -> list[list[int]]:
        return greedy(scripted(text), ids, **knobs, **more).sequences[:, 5:].tolist()

    assert [row.index(EOS) for row in answers()] == [6, 4]
    # at least as many new tokens in each row, whatever its prompt
    long = answers(min_new_tokens=6)
    assert long[0].index(EOS) == 6
    assert EOS not in long[1][:6]
    assert all((a, b) != (10, 11) for row in answers(bad_words_ids=[[10, 11]]) for a, b in itertools.pairwise(row))
    for row in answers(no_repeat_ngram_size=2):
        pairs = list(itertools.pairwise(t for t in row if t != PAD))
        assert len(pairs) == len(set(pairs))
    forced = greedy(scripted([10, 11]), ids, **knobs, forced_eos_token_id=EOS).sequences[:, 5:]
    assert (forced == EOS).nonzero().tolist() == [[0, 11], [1, 11]]


def test_a_processor_gets_what_transformers_would_give_it():
    seen = []

    class Spy(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.extend(input_ids.tolist())
            return scores

    ids = torch.tensor([[PAD, PAD, 5, 6, 7], [5, 6, 7, 8, 9]])
    knobs = {"attention_mask": (ids != PAD).long(), "max_new_tokens": 3, "remasking_strategy": "sequential"}
    model = scripted([10, 11, 12, 13, 14, 15, 16, 17])
    greedy(model, ids, logits_processor=LogitsProcessorList([Spy()]), **knobs)
    # position p of a row holds text[p]: after prompts of 3 and 5 tokens come 13 14 15 and 15 16 17
    prompts = ids.tolist()
    for n in range(3):
        assert prompts[0] + [13, 14, 15][:n] in seen
        assert prompts[1] + [15, 16, 17][:n] in seen
    assert {len(history) for history in seen} == {5, 6, 7}


def test_padding_before_a_prompt_is_not_repeated():
    """The model wants the pad token everywhere, and token 10 almost as much."""
    model = scripted([PAD])
    model.scores = torch.tensor([2.0])
    say = model.forward

    def forward(*args, **kwargs):
        output = say(*args, **kwargs)
        if kwargs.get("noisy_input_ids") is not None:
            output.logits[..., 10] = 1.9
        return output

    model.forward = forward
    knobs = {"max_new_tokens": 8, "repetition_penalty": 1.5, "eos_token_id": []}
    alone = greedy(model, torch.tensor([[5, 6, 7]]), **knobs).sequences[0, 3:]
    ids = torch.tensor([[PAD, PAD, 5, 6, 7], [5, 6, 7, 8, 9]])
    padded = greedy(model, ids, attention_mask=(ids != PAD).long(), **knobs).sequences[0, 5:]
    assert torch.equal(alone, padded)
    assert set(alone.tolist()) == {PAD, 10}


def test_no_pad_token_is_needed_where_nothing_is_padded():
    model, knobs = tiny_model(pad_token_id=None, eos_token_id=None), {"do_sample": False, "repetition_penalty": 1.5}
    without = model.generate(tokens(1, 5), max_new_tokens=8, **knobs)
    assert torch.equal(without, model.generate(tokens(1, 5), max_new_tokens=8, pad_token_id=0, **knobs))
