"""The rule that accepts tokens, and what the sampler says to bad input."""

import re

import pytest
import torch
from captures import Rerun
from conftest import tiny_model, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StoppingCriteriaList, SuppressTokensLogitsProcessor, TextStreamer

from arclm import graphs_arclm
from arclm.denoising_bd3lm import Block, Proposal, accept_tokens, static_schedule, static_schedules
from arclm.sampling_bd3lm import REMASKING_STRATEGIES, SuppressTokens, draw


@settings(max_examples=200, deadline=None)
@given(
    confidence=st.lists(st.floats(0, 1), min_size=1, max_size=9),
    steps=st.integers(1, 9),
    threshold=st.floats(0, 1),
    strategy=st.sampled_from(REMASKING_STRATEGIES),
)
def test_every_position_is_accepted_once_within_the_steps(confidence, steps, threshold, strategy):
    scores = torch.tensor([confidence])
    is_masked = torch.ones_like(scores, dtype=torch.bool)
    knobs = {"max_denoising_steps": steps, "remasking_strategy": strategy, "confidence_threshold": threshold}
    knobs["entropy_bound"] = threshold
    others = {"can_end": is_masked, "share_of": torch.tensor([len(confidence)]), "end_tokens": torch.tensor([False])}
    for step in range(steps):
        if not is_masked.any():
            break
        block = Block.of(0 * is_masked, is_masked, knobs, **others, row_steps=None, is_suppressed=None)
        sureness = scores.masked_fill(~is_masked, -1.0), (1 - scores).masked_fill(~is_masked, torch.inf)
        proposal = Proposal(0 * is_masked, *sureness, torch.ones_like(is_masked))
        accepted = accept_tokens(block._replace(step=torch.tensor([step])), proposal, knobs)
        assert not (accepted & ~is_masked).any()
        assert accepted.any()
        is_masked = is_masked & ~accepted
    assert not is_masked.any()


def test_the_static_schedule_is_dllms():
    """Where the rounding of ties shows; benchmarks/dllm_parity.py runs dLLM itself."""
    assert static_schedule(16, 4) == [4] * 4
    assert static_schedule(4, 3) == [1, 1, 2]
    assert static_schedule(16, 11) == [1, 2, 1, 2, 1, 1, 2, 2, 1, 1, 2]
    for block_size in range(1, 65):
        for steps in range(1, block_size + 1):
            assert sum(static_schedule(block_size, steps)) == block_size
            assert len(static_schedule(block_size, steps)) <= steps
    table = static_schedules(16, 11, torch.device("cpu"))
    assert table.shape == (17, 11)
    assert table[16].tolist() == static_schedule(16, 11)
    assert table[4].tolist() == static_schedule(4, 11) + [0] * 7


# Suppressed tokens


def test_suppressed_tokens_are_those_of_transformers_to_the_bit():
    scores = torch.randn(5, 97).masked_fill(torch.rand(5, 97) < 0.1, -torch.inf)
    scores[1, 3:40:4] = torch.nan
    ids = torch.tensor([5, 7, 7, 96, 97, 500, -1])  # some of them outside the vocabulary
    fast = SuppressTokens(ids, 97, torch.device("cpu"))(None, scores)
    expected = SuppressTokensLogitsProcessor(ids)(None, scores)
    assert torch.equal(fast.view(torch.int32), expected.view(torch.int32))
    assert fast[:, [5, 7, 96]].isneginf().all()


class Waits(TorchDispatchMode):
    """Counts what makes a host wait for a GPU, and the sorts of as many numbers as the vocabulary has."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary, self.waits, self.sorts = vocabulary, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.waits += name in ("nonzero", "_local_scalar_dense", "unique", "_unique2")
        self.sorts += name in ("isin", "sort", "argsort") and args[0].numel() >= self.vocabulary
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("knobs", [{"do_sample": False}, {"top_k": 0}, {"top_k": 9, "top_p": 1.0}, {"min_p": 0.1}])
def test_a_step_waits_once_and_looks_for_no_suppressed_token(knobs, monkeypatch):
    monkeypatch.setitem(graphs_arclm.CAPTURES, "cpu", Rerun)  # an eager pass waits once more, for its checks
    model, counts, texts = tiny_model(), [], []
    knobs = {"do_sample": True, "max_new_tokens": 16, "eos_token_id": [], "suppress_tokens": [*range(20, 60)], **knobs}
    for steps in (4, 16):
        with Waits(vocabulary=97) as counted:
            model.generate(tokens(1, 16), max_denoising_steps=steps, **knobs)
        counts.append((counted.waits, counted.sorts))
    assert counts[1][0] - counts[0][0] == 12
    assert counts[1][1] == counts[0][1]
    for parent in (False, True):
        if parent:
            monkeypatch.setattr(SuppressTokens, "__call__", SuppressTokensLogitsProcessor(range(20, 60)).__call__)
        torch.manual_seed(3)
        texts.append(model.generate(tokens(1, 16), **knobs))
    assert torch.equal(*texts)
    assert not set(texts[0][0, 16:].tolist()) & set(range(20, 60))


@pytest.mark.parametrize("strategy", [name for name in REMASKING_STRATEGIES if name != "random"])
def test_greedy_runs_draw_no_random_numbers(strategy):
    model, before = tiny_model(), torch.get_rng_state()  # the model has set the seed
    model.generate(tokens(1, 8), max_new_tokens=16, do_sample=False, remasking_strategy=strategy)
    assert torch.equal(torch.get_rng_state(), before)


# Bad input

BAD = {
    r"remasking_strategy='best' is unknown": {"remasking_strategy": "best"},
    r"block_size=17 is outside \[1, 16\]": {"block_size": 17},
    r"block_size=0 is outside \[1, 16\]": {"block_size": 0},
    "steps=0 must be at least 1": {"steps": 0},
    "num_return_sequences=0 must be at least 1": {"num_return_sequences": 0},
    "num_beams=3 does not go with block diffusion": {"num_beams": 3},
    "output_scores=True does not go with block diffusion": {"output_scores": True},
    "prompt_lookup_num_tokens=5 does not go with block diffusion": {"prompt_lookup_num_tokens": 5},
    r"force_words_ids=\[\[5\]\] does not go with block diffusion": {"force_words_ids": [[5]]},
    "guidance_scale=2.0 does not go with block diffusion": {"guidance_scale": 2.0},
    "past_key_values is a DynamicCache. Pass one that": {"past_key_values": DynamicCache()},
    "entropy_bound=-1 must be at least 0": {"entropy_bound": -1},
    r"confidence_threshold=1.5 is outside \[0, 1\]": {"confidence_threshold": 1.5},
    "leaves no room after a prompt of 8 tokens": {"max_length": 8},
    "8 tokens and 4089 new ones reach beyond the 4096 positions": {"max_new_tokens": 4089},
    r"attention_mask must be \[2, 8\]": {"attention_mask": torch.ones(2, 7)},
    "The prompt of row 1 is all padding": {"attention_mask": torch.tensor([[1] * 8, [0] * 8])},
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_knobs_get_a_sentence(sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny_model().generate(tokens(2, 8), **BAD[sentence])


def test_a_cache_must_fit_the_prompt():
    model = tiny_model(block_size=4)
    first = model.generate(tokens(2, 8), max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat((first.sequences, tokens(2, 3)), 1)
    with pytest.raises(ValueError, match="past_key_values holds 2 rows, the input 3"):
        model.generate(longer[[0, 1, 1]], past_key_values=first.past_key_values)
    other = longer.clone()
    other[1, 5] = (other[1, 5] + 1) % 90
    with pytest.raises(ValueError, match="holds other tokens than the prompt of row 1 begins with"):
        model.generate(other, past_key_values=first.past_key_values)
    with pytest.raises(ValueError, match="Pass a prompt that continues the cached text"):
        model.generate(tokens(2, 4), past_key_values=first.past_key_values)


def test_rows_that_stop_at_different_lengths_need_a_pad_token():
    model = tiny_model(pad_token_id=None, eos_token_id=None)
    stop = StoppingCriteriaList([lambda ids, scores, **kwargs: ids.shape[1] > 9])
    with pytest.raises(ValueError, match="need padding, and pad_token_id is not set"):
        model.generate(tokens(2, 8), stopping_criteria=stop)
    assert model.generate(tokens(1, 8), stopping_criteria=stop, max_new_tokens=9).shape == (1, 10)


def test_a_streamer_shows_one_row():
    with pytest.raises(ValueError, match="A streamer shows one row, this call has 2"):
        tiny_model().generate(tokens(1, 8), num_return_sequences=2, do_sample=True, streamer=TextStreamer(None))


def test_knobs_of_another_type_are_refused():
    with pytest.raises(TypeError, match=r"steps=2\.5 must be a whole number"):
        tiny_model().generate(tokens(1, 8), steps=2.5)
    with pytest.raises(TypeError, match=r"max_new_tokens=10\.0 must be a whole number"):
        tiny_model().generate(tokens(1, 4), max_new_tokens=1e1)
    with pytest.raises(TypeError, match="confidence_threshold='high' must be a number"):
        tiny_model().generate(tokens(1, 8), confidence_threshold="high")


def test_misspelled_knobs_are_refused():
    with pytest.raises(TypeError, match="unknown arguments blok_size"):
        tiny_model().generate(tokens(1, 8), blok_size=4)


def test_a_prompt_is_needed():
    with pytest.raises(ValueError, match=r"input_ids must be .* got None"):
        tiny_model().generate()
    for shape in ((1, 0), (0, 4), (4,)):
        with pytest.raises(ValueError, match=rf"input_ids must be .* got {re.escape(str(list(shape)))}"):
            tiny_model().generate(torch.ones(shape, dtype=torch.long))
    with pytest.raises(ValueError, match="The prompt of row 0 is all padding"):
        tiny_model().generate(torch.zeros(1, 5, dtype=torch.long))


@pytest.mark.parametrize(
    ("prompt", "got"), [([[1, 2]], "list"), ("Hello", "str"), (torch.ones(1, 4), "torch.float32"), ({}, "dict")]
)
def test_a_prompt_is_a_tensor_of_ids(prompt, got):
    with pytest.raises(TypeError, match=rf"tensor of whole numbers, got {got}\. Call generate\(\*\*tokenizer"):
        tiny_model().generate(prompt)
    with pytest.raises(TypeError, match=r"attention_mask must be a tensor like input_ids, got list"):
        tiny_model().generate(tokens(1, 2), [[1, 1]])


@pytest.mark.parametrize("bad", [-1, 97])
def test_an_id_outside_the_vocabulary_is_named(bad):
    ids = tokens(2, 8)
    ids[1, 3] = bad
    with pytest.raises(ValueError, match=rf"has the id {bad}, outside the vocabulary \[0, 97\)"):
        tiny_model().generate(ids)


def test_logits_that_are_not_finite_are_not_sampled_from():
    model = tiny_model()
    model.model.norm.weight.data[3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"not finite\. Check the weights"):
        model.generate(tokens(1, 8), max_new_tokens=4)


def test_a_missing_mask_token_id_is_named():
    with pytest.raises(ValueError, match=r"mask_token_id is missing from config\.json"):
        tiny_model(mask_token_id=None).generate(tokens(1, 8))


def test_draws_follow_the_probabilities_and_never_take_an_impossible_token():
    torch.manual_seed(0)
    probs = torch.tensor([0.0, 0.1, 0.0, 0.25, 0.65, 0.0]).repeat(20_000, 1)
    counts = draw(probs).flatten().bincount(minlength=6)
    assert counts[[0, 2, 5]].tolist() == [0, 0, 0]
    expected = 20_000 * probs[0][[1, 3, 4]]
    assert ((counts[[1, 3, 4]] - expected) ** 2 / expected).sum() < 13.8  # chi-square, 2 degrees of freedom, 0.1 %


@pytest.mark.parametrize("number", [0.0, 1 - 2**-24])
def test_draws_at_both_ends_of_the_random_numbers(number, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape: torch.full(shape, number))
    assert draw(torch.tensor([[0.0, 0.5, 0.5, 0.0]])).item() == (2 if number == 0 else 1)
