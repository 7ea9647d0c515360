"""Attention in parts: what the parts show is the whole mask, and the results are those of one part."""

from types import SimpleNamespace

import pytest
import torch
from conftest import noisy, tiny_model, tokens
from reference import error

from arclm import streams_arclm
from arclm.streams_arclm import Streams


LENGTHS = (67, 50, 3)  # none is a multiple of a block


def set_part_size(monkeypatch, part_size: int) -> None:
    """Cut passes into parts of this many queries, as many as it takes."""
    monkeypatch.setattr(streams_arclm, "PART_SIZE", part_size)
    monkeypatch.setattr(streams_arclm, "MAX_PARTS", 10**6)


def padded(length: int) -> torch.Tensor:
    """An attention mask [3, length] of rows of unequal lengths, padded on the left."""
    return (torch.arange(length) >= length - torch.tensor(LENGTHS)[:, None]).long()


def two_streams(block_size: int) -> tuple:
    x_0 = tokens(3, 67)
    needed = torch.zeros(3, 67, dtype=torch.bool)
    needed[0, [5, 40]] = needed[1, 60:] = needed[2, -2:] = True
    return x_0, noisy(x_0), padded(67), needed


def two_whole_streams(block_size: int) -> tuple:
    x_0 = tokens(2, 66)
    return x_0, noisy(x_0), None, None


def clean(block_size: int) -> tuple:
    return tokens(3, 67), None, padded(67), None


def denoising_after_a_commit(block_size: int) -> tuple:
    # whole blocks, as many as fit into 60 columns, and fewer in two of the rows
    blocks = 60 // block_size
    mask = (torch.arange(blocks * block_size) < block_size * torch.tensor([[blocks], [1], [0]])).long()
    return tokens(3, blocks * block_size), tokens(3, block_size, 9), mask, None


SCENARIOS = [
    (two_streams, False),
    (two_whole_streams, False),
    (clean, False),
    (clean, True),
    (denoising_after_a_commit, True),
]


def laid_out(model, scenario, has_cache: bool, part_size: int, monkeypatch) -> tuple[Streams, int]:
    """The layout of a pass in parts of that size, and how many columns its context has."""
    set_part_size(monkeypatch, part_size)
    size, cache = model.config.block_size, None
    if has_cache:
        cache = model(tokens(3, 2 * size), use_cache=True).past_key_values
        more = (torch.arange(size) < size * torch.tensor([[1], [0], [1]])).long()
        cache = model(tokens(3, size), attention_mask=more, past_key_values=cache).past_key_values
    input_ids, noisy_input_ids, mask, needed = scenario(size)
    _, streams = Streams.of(input_ids, noisy_input_ids, mask, block_size=size, cache=cache, needed=needed)
    return streams.for_layers(model.config, cache, torch.float32), 0 if cache is None else cache.num_columns


def dense(streams: Streams, keys: int) -> torch.Tensor:
    """[B or 1, columns, keys] bool, what all parts together show."""
    columns = streams.position_ids.shape[1]
    rows = max(len(part.mask) for part in streams.attention)
    whole = torch.zeros(rows, columns, keys, dtype=torch.bool)
    index = torch.arange(keys)
    for part in streams.attention:
        seen = torch.cat([index[s] for s in part.keys])
        assert len(seen.unique()) == len(seen)
        whole[:, part.queries] = whole[:, part.queries].index_copy(2, seen, part.mask[:, 0].expand(rows, -1, -1))
    return whole


@pytest.mark.parametrize("context_attention", ["block_causal", "causal"])
@pytest.mark.parametrize("block_size", [1, 4, 6])
@pytest.mark.parametrize(("scenario", "has_cache"), SCENARIOS, ids=lambda v: getattr(v, "__name__", str(v)))
@pytest.mark.usefixtures("no_grad")
def test_the_parts_show_what_one_part_shows(scenario, has_cache, block_size, context_attention, monkeypatch):
    model = tiny_model(block_size=block_size, context_attention=context_attention)
    whole, context = laid_out(model, scenario, has_cache, 1000, monkeypatch)
    parts, _ = laid_out(model, scenario, has_cache, 16, monkeypatch)
    keys = context + whole.position_ids.shape[1]
    assert len(whole.attention) == 1
    assert len(parts.attention) > 3
    assert torch.equal(dense(parts, keys), dense(whole, keys))
    assert dense(parts, keys).any(-1).all()  # a softmax over nothing is NaN in some kernels
    assert sum(part.mask.numel() for part in parts.attention) < 0.95 * whole.attention[0].mask.numel()
    columns = torch.cat([torch.arange(keys)[part.queries] for part in parts.attention])
    assert columns.tolist() == list(range(keys - context))  # the outputs are joined in this order


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_parts_change_no_loss_and_no_gradient(implementation, monkeypatch):
    model = tiny_model(block_size=4, right_shift_logits=True)
    model.set_attn_implementation(implementation)
    x_0 = tokens(3, 67)
    x_t = noisy(x_0)
    inputs = {"attention_mask": padded(67), "noisy_input_ids": x_t, "labels": x_0.masked_fill(x_t == x_0, -100)}
    results = []
    for part_size in (1000, 16):
        set_part_size(monkeypatch, part_size)
        model.zero_grad()
        loss = model(x_0, **inputs).loss
        loss.backward()
        results.append([loss.detach(), *(weight.grad.clone() for weight in model.parameters())])
    for one, other in zip(*results, strict=True):
        assert error(one, other) < 1e-5


@pytest.mark.usefixtures("no_grad")
def test_a_long_context_read_in_parts_leaves_the_same_cache(monkeypatch):
    model, ids, block = tiny_model(block_size=4), tokens(2, 60), tokens(2, 4, 9)
    logits = []
    for part_size in (1000, 8):
        set_part_size(monkeypatch, part_size)
        cache = model(ids[:, :20], use_cache=True).past_key_values
        logits.append(model(ids[:, 20:], noisy_input_ids=block, past_key_values=cache).logits)
        logits.append(model(noisy_input_ids=block, past_key_values=cache).logits)
    assert error(logits[0], logits[2]) < 1e-5
    assert error(logits[1], logits[3]) < 1e-5


def test_training_at_the_length_of_the_card_has_no_dense_mask():
    ids = torch.zeros(1, 2048, dtype=torch.long)
    _, streams = Streams.of(ids, ids, None, block_size=64)
    config = SimpleNamespace(
        **{"head_dim": 8, "context_attention": "block_causal", "_attn_implementation": "sdpa"},
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    parts = streams.for_layers(config, None, torch.float32).attention
    assert len(parts) == streams_arclm.MAX_PARTS
    assert sum(part.mask.numel() for part in parts) < 0.4 * (2 * 2048) ** 2
    assert max(part.mask.numel() for part in parts) < 0.1 * (2 * 2048) ** 2
