"""The sampler: on random models for exactness, on a model of fixed logits where it matters what it says."""

import pytest
import torch
import torch.nn.functional as F
from conftest import MASK, tiny_model, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import EOS, PAD, greedy, scripted
from transformers import (
    GenerationConfig,
)

from arclm.sampling_bd3lm import REMASKING_STRATEGIES


# Exactness


@pytest.mark.parametrize("context", ["block_causal", "causal"])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_e4_greedy_text_does_not_depend_on_the_batch(context, shift, block_size):
    model = tiny_model(block_size=block_size, context_attention=context, right_shift_logits=shift)
    rows = [tokens(1, n, seed=n)[0] for n in (7, 33, 16, 1)]
    width = max(map(len, rows))
    ids = torch.stack([torch.cat((torch.zeros(width - len(row), dtype=torch.long), row)) for row in rows])
    batch = greedy(model, ids, attention_mask=(ids != 0).long(), max_new_tokens=21)
    assert torch.equal(batch.sequences[:, :width], ids)
    for row, sequence, speed in zip(rows, batch.sequences, batch.tokens_per_forward, strict=True):
        alone = greedy(model, row[None], max_new_tokens=21)
        new = alone.sequences[0, len(row) :]
        assert torch.equal(sequence[width : width + len(new)], new)
        assert (sequence[width + len(new) :] == PAD).all()
        assert torch.allclose(alone.tokens_per_forward[0], speed)


def test_one_token_per_step_of_block_one_is_the_parents_greedy_text():
    """With block 1, causal context and shifted logits, block diffusion is autoregression."""
    model = tiny_model(block_size=1, context_attention="causal", right_shift_logits=True)
    ids = tokens(2, 9)
    expected = ids
    for _ in range(12):
        logits = model(expected).logits[:, -1]
        logits[:, MASK] = -torch.inf
        expected = torch.cat((expected, logits.argmax(-1, keepdim=True)), 1)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=[]), expected)


def test_a_second_turn_over_the_cache_equals_a_fresh_run():
    model = tiny_model(block_size=4)
    first = greedy(model, tokens(2, 11), max_new_tokens=9)
    longer = torch.cat((first.sequences, tokens(2, 6, seed=3)), 1)
    fresh = greedy(model, longer, max_new_tokens=10)
    second = greedy(model, longer, max_new_tokens=10, past_key_values=first.past_key_values)
    assert torch.equal(second.sequences, fresh.sequences)
    assert second.nfe <= fresh.nfe


def test_pad_tokens_without_an_attention_mask_are_padding_as_in_transformers():
    model = tiny_model(block_size=4)
    ids = torch.cat((torch.zeros(1, 3, dtype=torch.long), tokens(1, 6)), 1)
    expected = greedy(model, ids, attention_mask=(ids != PAD).long(), max_new_tokens=8).sequences
    assert torch.equal(greedy(model, ids, max_new_tokens=8).sequences, expected)
    as_text = greedy(model, ids, attention_mask=torch.ones_like(ids), max_new_tokens=8).sequences
    assert not torch.equal(as_text, expected)
    # where the end token pads, it cannot be told from text
    same = greedy(model, ids, max_new_tokens=8, eos_token_id=PAD).sequences
    assert torch.equal(
        same, greedy(model, ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, eos_token_id=PAD).sequences
    )


def test_prompts_of_int32_give_the_same_text():
    model = tiny_model(block_size=4)
    expected = greedy(model, tokens(2, 7), max_new_tokens=6).sequences
    assert torch.equal(greedy(model, tokens(2, 7).int(), max_new_tokens=6).sequences, expected)


def test_prefill_in_pieces_changes_nothing(monkeypatch):
    model = tiny_model(block_size=4)
    expected = greedy(model, tokens(1, 39), max_new_tokens=8)
    monkeypatch.setattr("arclm.generation_bd3lm.PREFILL_TOKENS", 8)
    pieces = greedy(model, tokens(1, 39), max_new_tokens=8)
    assert torch.equal(pieces.sequences, expected.sequences)
    assert pieces.nfe == expected.nfe + 4  # 36 prompt tokens: 5 pieces of 8 instead of one


# What the knobs do


def test_static_accepts_the_same_number_of_tokens_at_every_step_the_most_confident_first():
    model = scripted([10, 11, 12, 13], confidence=(1.0, 4.0, 2.0, 3.0))
    output = greedy(model, tokens(1, 4), max_new_tokens=4, max_denoising_steps=2)
    assert [block.tolist() for block in output.history] == [[[MASK, 11, MASK, 13]], [[10, 11, 12, 13]]]
    assert output.tokens_per_forward.tolist() == [2.0]


def test_static_takes_fewer_steps_for_a_block_that_begins_with_the_prompt():
    model = scripted([10, 11, 12, 13])
    output = greedy(model, tokens(1, 6), max_new_tokens=6, max_denoising_steps=2)
    assert [int((block == MASK).sum()) for block in output.history] == [0, 2, 0]


@pytest.mark.parametrize(
    ("prompt", "new", "steps", "expected"),
    [
        (4, 3, 3, 3),
        (4, 2, 1, 1),
        (4, 6, 6, 5),
        (6, 1, 1, 1),
        (6, 2, 2, 2),
        (6, 7, 8, 7),
        (4, 12, 2, 3),
        (6, 4, 2, 2),
        (6, 16, 8, 8),
    ],
)
def test_static_takes_the_steps_asked_for_where_a_block_is_cut_short(prompt, new, steps, expected):
    """ceil(steps / blocks) per block, at most one per token; a block of 4 that is cut short spreads what it has."""
    model = scripted([10, 11, 12, 13])
    assert len(greedy(model, tokens(1, prompt), max_new_tokens=new, steps=steps).history) == expected


def test_dynamic_accepts_what_is_above_the_threshold_and_always_one():
    model = scripted([10, 11, 12, 13], confidence=(1.0, 9.0, 2.0, 9.5))
    output = greedy(
        model, tokens(1, 4), max_new_tokens=4, remasking_strategy="low_confidence_dynamic", confidence_threshold=0.9
    )
    expected = [[MASK, 11, MASK, 13], [MASK, 11, 12, 13], [10, 11, 12, 13]]
    assert [block.tolist()[0] for block in output.history] == expected


def test_entropy_bound_accepts_the_most_certain_tokens_together():
    # one token at score s against 95 at 0: entropies of 2.4, 2.4, 4.5 and 0.003 nats
    model = scripted([10, 11, 12, 13], confidence=(5.0, 5.0, 1.0, 13.0))
    output = greedy(model, tokens(1, 4), max_new_tokens=4, remasking_strategy="entropy_bound", entropy_bound=0.1)
    # the sum without the largest: 0 for one token, 0.003 for two, 2.4 for three
    expected = [[10, MASK, MASK, 13], [10, 11, MASK, 13], [10, 11, 12, 13]]
    assert [block.tolist()[0] for block in output.history] == expected


def test_sequential_goes_from_left_to_right_and_random_in_an_order_of_its_own():
    model = scripted([10, 11, 12, 13], confidence=(1.0, 4.0, 2.0, 3.0))
    output = greedy(model, tokens(1, 4), max_new_tokens=4, remasking_strategy="sequential")
    assert [(block == MASK).sum().item() for block in output.history] == [3, 2, 1, 0]
    assert output.history[1].tolist() == [[10, 11, MASK, MASK]]
    first = set()
    for seed in range(8):
        torch.manual_seed(seed)
        output = greedy(model, tokens(1, 4), max_new_tokens=4, remasking_strategy="random")
        first.add(output.history[0].argmin().item())
        assert output.sequences[0, 4:].tolist() == [10, 11, 12, 13]
    assert len(first) > 1


@pytest.mark.parametrize(
    ("knobs", "steps"),
    [
        ({}, 12),
        ({"steps": 3}, 3),
        ({"steps": 5}, 6),  # ceil(5 / 3 blocks) = 2 per block
        ({"max_denoising_steps": 2}, 6),
        ({"steps": 12, "max_denoising_steps": 1}, 3),
        ({"block_size": 2, "steps": 6}, 6),
        ({"steps": 1000}, 12),
    ],
)
def test_steps_are_divided_among_the_blocks_as_dllm_does(knobs, steps):
    model = scripted([10, 11, 12, 13])
    output = greedy(model, tokens(1, 4), max_new_tokens=12, **knobs)
    assert sum("denoise" in call for call in model.calls) == steps
    assert model.calls.count("commit") == 1  # the prompt
    assert output.nfe == len(model.calls) == 1 + steps
    assert output.sequences.shape == (1, 16)


def test_the_card_snippet_runs():
    model = tiny_model(block_size=16)
    output = model.generate(tokens(1, 5), max_new_tokens=32, steps=32, block_size=16, temperature=0.6, do_sample=True)
    assert 5 < output.shape[1] <= 37


# End of text


def test_a_row_stops_at_an_end_token_in_the_middle_of_a_block():
    model = scripted([10, 11, 12, 13, 14, EOS, 15, 16])
    output = greedy(model, tokens(1, 8), max_new_tokens=16)
    assert output.sequences[0, 8:].tolist() == [10, 11, 12, 13, 14, EOS]
    assert output.nfe == 1 + 4 + 2  # prefill, block, two steps up to the end token, the first with the commit
    assert model.calls[5] == "commit and denoise"


@pytest.mark.parametrize("strategy", ["low_confidence_static", "low_confidence_dynamic", "entropy_bound"])
def test_the_end_tokens_that_fill_a_block_cost_no_step(strategy):
    """They come for nothing with the first one, even where the model is surest of the last."""
    text, confidence = [10, 11] + [EOS] * 6, (3.0, 2.0, 1.0, 5.0, 6.0, 7.0, 8.0, 9.0)
    output = greedy(
        scripted(text, confidence, block_size=8), tokens(1, 8), max_new_tokens=20, remasking_strategy=strategy
    )
    assert output.sequences[0, 8:].tolist() == [10, 11, EOS]
    assert [int((block == MASK).sum()) for block in output.history] == [7, 6, 0]


def test_an_end_token_does_not_stop_before_everything_in_front_of_it_is_settled():
    model = scripted([10, 11, EOS, 13], confidence=(1.0, 2.0, 9.0, 3.0))
    output = greedy(model, tokens(1, 4), max_new_tokens=12)
    assert output.sequences[0, 4:].tolist() == [10, 11, EOS]
    # what follows a settled end token is filled with it, as the last block is in training, and costs no step
    assert output.history[0].tolist() == [[MASK, MASK, EOS, EOS]]
    assert output.tokens_per_forward.tolist() == [1.0]


def test_an_end_token_of_the_prompt_does_not_stop_the_row():
    model = scripted([10])
    prompt = torch.tensor([[5, EOS, 6, 7, EOS, 8]])
    assert model.generate(prompt, max_new_tokens=3, do_sample=False).tolist() == [[5, EOS, 6, 7, EOS, 8, 10, 10, 10]]


def test_rows_that_ended_are_padded_and_the_others_go_on():
    model = scripted([10, EOS, 12, 13, 14, 15])
    ids = torch.tensor([[0, 0, 5, 6], [5, 6, 7, 8]])  # the end token stands at position 7 of both rows
    output = greedy(model, ids, attention_mask=(ids != 0).long(), max_new_tokens=6)
    assert output.sequences[:, 4:].tolist() == [[12, 13, 14, 15, 10, EOS], [14, 15, 10, EOS, PAD, PAD]]


def test_the_mask_token_can_not_be_produced():
    model = scripted([MASK])
    assert MASK not in model.generate(tokens(1, 3), max_new_tokens=6, do_sample=False)


# Inputs and outputs


def test_mask_tokens_in_the_prompt_are_filled_in_place():
    model = scripted([10, 11, 12, 13])
    prompt = torch.tensor([[5, MASK, 6, 7, 8, 9, MASK, 5]])
    assert model.generate(prompt, max_new_tokens=2, do_sample=False).tolist() == [[5, 11, 6, 7, 8, 9, 12, 5, 10, 11]]


def test_max_length_counts_the_prompt_and_beats_the_file():
    model = scripted([10])
    model.generation_config.max_new_tokens = 50
    assert model.generate(tokens(1, 3), max_length=10, do_sample=False).shape == (1, 10)
    assert model.generate(tokens(1, 3), do_sample=False).shape == (1, 53)


def test_the_nearest_config_that_names_a_length_decides():
    model = scripted([10, 11, 12, 13])
    model.generation_config.max_length = 9
    assert model.generate(tokens(1, 3), do_sample=False).shape[1] == 9
    config = GenerationConfig(max_new_tokens=2, do_sample=False)
    assert model.generate(tokens(1, 3), generation_config=config).shape[1] == 5
    assert model.generate(tokens(1, 3), generation_config=config, max_length=7).shape[1] == 7
    model.generation_config = GenerationConfig(max_new_tokens=2)
    config = GenerationConfig(max_length=10, do_sample=False)
    assert model.generate(tokens(1, 3), generation_config=config).shape[1] == 10


def test_a_cache_goes_with_the_block_size_it_was_made_with():
    """With `context_attention="causal"` no token of the context saw the rest of its block, so any size goes."""
    for context in ("block_causal", "causal"):
        model, ids = tiny_model(block_size=4, context_attention=context), tokens(1, 8)
        first = greedy(model, ids, max_new_tokens=8)
        more = {"past_key_values": first.past_key_values, "max_new_tokens": 4, "block_size": 2}
        if context == "causal":
            expected = greedy(model, first.sequences, max_new_tokens=4, block_size=2)
            assert torch.equal(greedy(model, first.sequences, **more).sequences, expected.sequences)
        else:
            with pytest.raises(ValueError, match="made with block_size=4, and this call has 2"):
                greedy(model, first.sequences, **more)


def test_sampling_follows_the_seed_and_the_processors():
    model = tiny_model(block_size=4)
    ids = tokens(1, 6)

    def sample(seed, **kwargs):
        torch.manual_seed(seed)
        return model.generate(ids, max_new_tokens=24, do_sample=True, eos_token_id=[], **kwargs)

    assert torch.equal(sample(0, temperature=1.0), sample(0, temperature=1.0))
    assert not torch.equal(sample(0, temperature=1.0), sample(1, temperature=1.0))
    assert torch.equal(sample(0, top_k=1), model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=[]))
    few = set(range(2, 60))
    assert not few & set(sample(0, suppress_tokens=sorted(few))[0, 6:].tolist())


def test_num_return_sequences_repeats_every_row():
    model = tiny_model(block_size=4)
    ids = torch.tensor([[0, 5, 6], [7, 8, 9]])
    output = model.generate(
        ids, attention_mask=(ids != 0).long(), num_return_sequences=3, max_new_tokens=2, do_sample=True
    )
    assert output[:, :3].tolist() == [[0, 5, 6]] * 3 + [[7, 8, 9]] * 3


class Recorder:
    """A streamer that remembers what it was given."""

    def __init__(self):
        self.puts, self.drafts, self.ended = [], [], False

    def put(self, value):
        self.puts.append(value.tolist())

    def put_draft(self, value):
        self.drafts.append(value.tolist())

    def end(self):
        self.ended = True


def test_the_streamer_gets_the_prompt_then_each_block_and_the_drafts():
    model, streamer = scripted([10, 11, 12, 13, 14, EOS, 15, 16]), Recorder()
    output = model.generate(tokens(1, 10), max_new_tokens=16, do_sample=False, streamer=streamer)
    # the first block begins with two tokens of the prompt: they are not given again
    assert streamer.puts == [tokens(1, 10).tolist(), [12, 13], [14, EOS]]
    assert streamer.ended
    assert [draft for draft in streamer.drafts if MASK not in draft] == [[12, 13], [14, EOS, EOS, EOS]]
    assert len(streamer.drafts) == 2 + 2
    assert output[0, 10:].tolist() == [12, 13, 14, EOS]


def test_a_block_that_needs_no_step_is_committed_all_the_same():
    """Masks in block 0, none in block 1, new tokens in block 2: no step takes the commit of block 0 along."""
    model = scripted([10, 11, 12, 13])
    prompt = tokens(1, 9).index_fill(1, torch.tensor([2]), MASK)
    output = greedy(model, prompt, max_new_tokens=3)
    assert model.calls == ["denoise", "commit", "commit and denoise", "denoise", "denoise"]
    assert output.sequences[0, 2:].tolist() == [12, *tokens(1, 9)[0, 3:].tolist(), 11, 12, 13]
    assert output.past_key_values.row_token_ids(0).tolist() == output.sequences[0, :8].tolist()

    # the same one block later, over a cache: the commit of block 1 waited for a step of block 2
    model = scripted([10, 11, 12, 13])
    prompt = tokens(1, 13).index_fill(1, torch.tensor([6]), MASK)
    output = greedy(model, prompt, max_new_tokens=3)
    assert model.calls == ["commit", "denoise", "commit", "commit and denoise", "denoise", "denoise"]
    assert output.past_key_values.row_token_ids(0).tolist() == output.sequences[0, :12].tolist()


# Progress, on many inputs


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_prompt_and_knobs_give_the_right_shape_and_no_mask_token(data):
    model = MODELS[data.draw(st.sampled_from(sorted(MODELS)))]
    lengths = data.draw(st.lists(st.integers(1, 13), min_size=1, max_size=3))
    new = data.draw(st.integers(1, 13))
    width = max(lengths) + data.draw(st.integers(0, 2))
    pads = [data.draw(st.integers(0, width - n)) for n in lengths]  # on the left, the rest on the right
    ids = torch.stack([F.pad(tokens(1, n, seed=n)[0], (p, width - n - p)) for n, p in zip(lengths, pads, strict=True)])
    is_token = ids != PAD
    ids[data.draw(st.lists(st.booleans(), min_size=width, max_size=width).map(torch.tensor)) & is_token] = MASK
    knobs = {
        "block_size": data.draw(st.integers(1, model.config.block_size)),
        "remasking_strategy": data.draw(st.sampled_from(REMASKING_STRATEGIES)),
        "entropy_bound": data.draw(st.floats(0, 9)),
        "confidence_threshold": data.draw(st.floats(0, 1)),
        "max_denoising_steps": data.draw(st.none() | st.integers(1, 9)),
        "steps": data.draw(st.none() | st.integers(13, 99)),
        "do_sample": data.draw(st.booleans()),
        "temperature": data.draw(st.floats(0.1, 2)),
        "repetition_penalty": data.draw(st.sampled_from([1.0, 1.3])),
        "eos_token_id": data.draw(st.sampled_from([EOS, list(range(1, 50))])),
    }
    output = model.generate(
        ids, attention_mask=is_token.long(), max_new_tokens=new, return_dict_in_generate=True, **knobs
    )
    given_ids = ids != MASK
    assert torch.equal(output.sequences[:, :width][given_ids], ids[given_ids])
    assert width < output.sequences.shape[1] <= width + new
    assert not (output.sequences == MASK).any()
    for row in output.sequences[:, width:].tolist():
        ends = [i for i, token in enumerate(row) if token in torch.tensor(knobs["eos_token_id"]).view(-1).tolist()]
        assert all(token == PAD for token in row[ends[0] + 1 :]) if ends else len(row) == new
    # at most one pass for the complete blocks of the prompts, then the steps, and a commit where there are none
    blocks = -(-(max(lengths) + new) // knobs["block_size"])
    assert output.nfe <= 1 + blocks * min(knobs["block_size"], knobs["max_denoising_steps"] or 99)
    assert ((output.tokens_per_forward > 0) & (output.tokens_per_forward <= knobs["block_size"])).all()
    assert output.past_key_values is None or (output.past_key_values.lengths % knobs["block_size"] == 0).all()


MODELS = {
    block_size: tiny_model(
        block_size=block_size, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"]
    )
    for block_size in (1, 5, 8)
}


def test_knobs_in_a_generation_config_object_count():
    model = scripted([10, 11, 12, 13])
    config = GenerationConfig(max_new_tokens=4, steps=2, do_sample=False, return_dict_in_generate=True)
    assert len(model.generate(tokens(1, 4), generation_config=config).history) == 2
