"""Stopping criteria and stop strings: in the middle of a block, in rows of different phases."""

import pytest
import torch
from conftest import tokens
from scripted import PAD, greedy, scripted
from tokenizers import Tokenizer, decoders, models
from transformers import (
    EosTokenCriteria,
    MaxLengthCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)


class StopAfter(StoppingCriteria):
    """Stops a row after a token, and keeps the contexts it was shown."""

    def __init__(self, token: int):
        self.token, self.seen = token, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids)
        return input_ids[:, -1] == self.token


def test_stopping_criteria_end_a_row_in_the_middle_of_a_block_whatever_its_phase():
    model, prompts = scripted([10, 11, 12, 13, 14, 15]), [tokens(1, n, seed=n)[0] for n in (2, 5, 8)]
    ids = torch.stack([torch.cat((torch.zeros(8 - len(row), dtype=torch.long), row)) for row in prompts])
    stop = StopAfter(14)
    output = model.generate(
        ids,
        attention_mask=(ids != 0).long(),
        max_new_tokens=13,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([stop]),
    )
    expected = [[12, 13, 14], [15, 10, 11, 12, 13, 14], [12, 13, 14]]  # position p holds script[p % 6]
    assert [[t for t in row if t != PAD] for row in output[:, 8:].tolist()] == expected
    # as in transformers: the caller's prompts, then one more token at every call
    assert [seen.shape[1] for seen in stop.seen] == list(range(9, 9 + len(stop.seen)))
    assert all(torch.equal(seen[:, :8], ids) for seen in stop.seen)


@pytest.mark.parametrize(("stop", "new"), [(MaxLengthCriteria(7), [11, 12]), (EosTokenCriteria(13), [11, 12, 13])])
def test_criteria_of_the_caller_count_beside_those_of_the_config(stop, new):
    model = scripted([5, 5, 5, 5, 5, 11, 12, 13, 14])
    output = model.generate(tokens(1, 5), max_new_tokens=9, do_sample=False, stopping_criteria=[stop])
    assert output[0, 5:].tolist() == new


def test_a_cache_that_goes_beyond_a_criterions_end_is_not_returned():
    model, ids = scripted([10, 11, 12, 13]), torch.tensor([[PAD, 5, 6, 7], [5, 6, 7, 8]])

    class SecondRow(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([False, input_ids.shape[1] == 6])

    knobs = {"attention_mask": (ids != PAD).long(), "max_new_tokens": 9}
    assert greedy(model, ids, **knobs).past_key_values.lengths.tolist() == [8, 12]
    output = greedy(model, ids, stopping_criteria=StoppingCriteriaList([SecondRow()]), **knobs)
    assert output.sequences[1, 4:].tolist() == [10, 11] + [PAD] * 7
    assert output.past_key_values is None


def test_max_time_ends_rows_with_their_blocks():
    model, ids = scripted([10, 11, 12, 13, 14]), torch.tensor([[PAD, 5, 6, 7], [5, 6, 7, 8]])
    output = greedy(model, ids, attention_mask=(ids != PAD).long(), max_new_tokens=9, max_time=1e-9)
    assert output.sequences[:, 4:].tolist() == [[13, PAD, PAD, PAD], [14, 10, 11, 12]]  # blocks of 4


def test_no_time_is_over_before_there_is_an_answer():
    model, ids = scripted([10, 11, 12, 13, 14]), tokens(1, 8)
    ids[0, 1] = model.config.mask_token_id
    output = greedy(model, ids, max_new_tokens=9, max_time=1e-9)
    assert output.sequences[0, 1] == 11
    assert output.sequences[0, 8:].tolist() == [13, 14, 10, 11]


def test_stop_strings_are_read_with_the_tokenizer():
    words = {chr(97 + i): i for i in range(26)} | {f"token{i}": i for i in range(26, 97)}
    backend = Tokenizer(models.BPE(words, merges=[]))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    model = scripted([10, 11, 12, 13, 14, 15])  # k l m n o p
    knobs = {"max_new_tokens": 12, "do_sample": False, "stop_strings": ["no"]}
    assert model.generate(tokens(1, 4), tokenizer=tokenizer, **knobs)[0, 4:].tolist() == [14, 15, 10, 11, 12, 13, 14]
    with pytest.raises(ValueError, match="pass the model's tokenizer to the `tokenizer` argument"):
        model.generate(tokens(1, 4), **knobs)
