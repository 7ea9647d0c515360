"""Logits processors: each position has a history of its own, whatever the padding of the batch."""

import itertools

import pytest
import torch
from conftest import MASK, tiny_model, tokens
from scripted import EOS, PAD, greedy, scripted
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
)


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


def test_a_processor_gets_what_transformers_would_give_it_but_mask_tokens_for_padding():
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
    prompts = ids.masked_fill(ids == PAD, MASK).tolist()
    for n in range(3):
        assert prompts[0] + [13, 14, 15][:n] in seen
        assert prompts[1] + [15, 16, 17][:n] in seen
    assert {len(history) for history in seen} == {5, 6, 7}


def test_a_processor_of_another_class_gets_the_history_whatever_it_inherits():
    seen = []

    class Spy(TemperatureLogitsWarper):
        def __call__(self, input_ids, scores):
            seen.extend(input_ids.tolist())
            return scores

    greedy(scripted([10]), tokens(1, 5), max_new_tokens=1, logits_processor=[Spy(0.5)])
    assert seen == tokens(1, 5).tolist()


def test_a_penalty_of_the_caller_keeps_its_options():
    model, ids = tiny_model(block_size=4), tokens(1, 12)
    penalty = RepetitionPenaltyLogitsProcessor(5.0, prompt_ignore_length=12)

    def text(**more) -> list[int]:
        return greedy(model, ids, max_new_tokens=12, eos_token_id=[], **more).sequences[0, 12:].tolist()

    assert text(logits_processor=[penalty]) == text(logits_processor=[lambda ids, scores: penalty(ids, scores)])
    assert text(logits_processor=[penalty]) != text(repetition_penalty=5.0)


@pytest.mark.parametrize("do_sample", [False, True])
def test_processors_that_allow_no_token_are_an_error(do_sample):
    def nothing(input_ids, scores):
        return torch.full_like(scores, -torch.inf)

    knobs = {"max_new_tokens": 2, "do_sample": do_sample}
    with pytest.raises(FloatingPointError, match="or those that the processors left, are not finite"):
        tiny_model().generate(tokens(1, 5), logits_processor=[nothing], **knobs)
    for kept in ([], [MASK]):
        with pytest.raises(ValueError, match="suppress_tokens leaves no token but the mask token, if that"):
            tiny_model().generate(tokens(1, 5), suppress_tokens=sorted({*range(97)} - {*kept}), **knobs)


@pytest.mark.parametrize(("knobs", "distinct"), [({"repetition_penalty": 1.5}, 2), ({"no_repeat_ngram_size": 1}, 8)])
def test_padding_before_a_prompt_is_not_repeated(knobs, distinct):
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
    knobs = {"max_new_tokens": 8, "eos_token_id": [], **knobs}
    alone = greedy(model, torch.tensor([[5, 6, 7]]), **knobs).sequences[0, 3:]
    ids = torch.tensor([[PAD, PAD, 5, 6, 7], [5, 6, 7, 8, 9]])
    padded = greedy(model, ids, attention_mask=(ids != PAD).long(), **knobs).sequences[0, 5:]
    assert torch.equal(alone, padded)
    assert {PAD, 10} <= set(alone.tolist())
    assert len(set(alone.tolist())) == distinct


def test_no_pad_token_is_needed_where_nothing_is_padded():
    model, knobs = tiny_model(pad_token_id=None, eos_token_id=None), {"do_sample": False, "repetition_penalty": 1.5}
    without = model.generate(tokens(1, 5), max_new_tokens=8, **knobs)
    assert torch.equal(without, model.generate(tokens(1, 5), max_new_tokens=8, pad_token_id=0, **knobs))
