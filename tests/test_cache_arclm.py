"""The cache: what it takes, that it is not copied, and that it survives what users do to it."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from conftest import noisy, tiny_model, tokens
from reference import error

from arclm.configuration_arclm import ArcLMConfig


pytestmark = pytest.mark.usefixtures("no_grad")
ROOT = Path(__file__).resolve().parents[1]


def test_a_pass_over_the_context_does_not_copy_it():
    model, block = tiny_model(block_size=4), noisy(tokens(2, 4))
    cache = model(tokens(2, 40), use_cache=True).past_key_values
    model(noisy_input_ids=block, past_key_values=cache)  # moves the context to a place with room
    places = [key.data_ptr() for key in cache.keys if key is not None]
    model(tokens(2, 4), past_key_values=cache)
    model(tokens(2, 4), noisy_input_ids=block, past_key_values=cache)
    assert [key.data_ptr() for key in cache.keys if key is not None] == places
    assert cache.get_seq_length() == cache.keys[1].shape[2] == 48


def cache_memory(config, itemsize: int) -> tuple[int, int]:
    """Bytes per token and per row, by the docstring of ArcLMCache."""
    full = config.layer_types.count("full_attention")
    linear = config.num_hidden_layers - full
    keys, values = config.linear_key_head_dim, config.linear_value_head_dim
    conv_dim = 2 * config.linear_num_key_heads * keys + config.linear_num_value_heads * values
    state = config.linear_num_value_heads * keys * values
    per_row = linear * (4 * state + itemsize * (config.linear_conv_kernel_dim - 1) * conv_dim)
    return full * 2 * config.num_key_value_heads * config.head_dim * itemsize, per_row


def test_the_cache_of_the_0_8b_model_takes_what_the_docstring_says():
    per_token, per_row = cache_memory(ArcLMConfig.from_pretrained(ROOT), 2)
    assert per_token == 12_288
    assert round(per_row / 1e6, 1) == 19.5


@pytest.mark.parametrize("length", [8, 40, 200])
def test_the_cache_takes_the_memory_that_its_docstring_says(length):
    model = tiny_model(block_size=4)
    cache = model(tokens(2, length), use_cache=True).past_key_values

    def size(*parts) -> int:
        return sum(x.untyped_storage().nbytes() for x in itertools.chain(*parts) if x is not None)

    per_token, per_row = cache_memory(model.config, 4)
    assert size(cache.keys, cache.values) == 2 * length * per_token
    assert size(cache.conv_states, cache.recurrent_states) == 2 * per_row
    model(tokens(2, 4), past_key_values=cache)
    assert cache.keys[1].untyped_storage().nbytes() <= 1.25 * cache.keys[1].nbytes  # with its room


def test_a_cache_survives_copying_gradients_and_inference_mode():
    model, block = tiny_model(block_size=4), noisy(tokens(2, 4))
    with torch.inference_mode():
        cache = model(tokens(2, 40), use_cache=True).past_key_values
        model(tokens(2, 4, seed=1), past_key_values=cache)  # leaves room for the passes below
    twin = copy.deepcopy(cache)
    expected = model(tokens(2, 4, seed=2), noisy_input_ids=block, past_key_values=cache).logits
    assert error(model(tokens(2, 4, seed=2), noisy_input_ids=block, past_key_values=twin).logits, expected) < 1e-5
    with torch.enable_grad():
        for _ in range(2):  # the second pass must not meet the graph of the first
            model.zero_grad()
            logits = model(noisy_input_ids=block, past_key_values=cache).logits
            logits.sum().backward()
    assert error(logits, expected) < 1e-5
    assert model.model.layers[1].self_attn.k_proj.weight.grad.abs().sum() > 0
    assert not cache.keys[1].requires_grad
