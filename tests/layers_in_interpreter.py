"""Layers in few Triton kernels, run on a CPU by Triton's interpreter. `test_kernels_arclm.py` starts this file."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import layer_with_tiles, tiny_model, tokens
from reference import error

from arclm import attention_kernels_arclm
from arclm import fused_arclm as fused
from arclm.cache_arclm import CacheAccess
from arclm.streams_arclm import Streams


CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """The interpreter takes seconds for what a GPU does in microseconds."""
    monkeypatch.setattr(fused, "CHECK_LENGTHS", ((40, 20),))


def check(**kind) -> float:
    with torch.no_grad():
        return fused._check_fused_layer(CPU, torch.float32, *fused.kind_of(layer_with_tiles(**kind)))


@pytest.mark.parametrize("is_linear", [True, False])
def test_layers_in_few_kernels_are_the_layers(is_linear):
    assert check(is_linear=is_linear) < 1e-5


def without_decay(delta_rule, qkv, gates, decay, *rest, **knobs):
    return delta_rule(qkv, gates, (decay[0] - 9, decay[1]), *rest, **knobs)


def without_mask(attention, queries, keys, values, mask, *rest):
    return attention(queries, keys, values, None, *rest)


@pytest.mark.parametrize(
    ("is_linear", "name", "wrong"), [(True, "delta_rule", without_decay), (False, "attention", without_mask)]
)
def test_the_self_check_of_layers_sees_what_is_wrong(monkeypatch, is_linear, name, wrong):
    monkeypatch.setattr(fused, name, partial(wrong, getattr(fused, name)))
    assert check(is_linear=is_linear) > 0.1


def test_tiles_that_do_not_fit_say_so():
    with pytest.raises(ValueError, match="no tiles for the shapes"):
        check(is_linear=True, linear_value_head_dim=24)


@pytest.mark.parametrize("name", ["norm", "conv1d"])
def test_layers_with_other_parts_are_refused(name):
    layer = layer_with_tiles(is_linear=True)
    for other in (torch.nn.Identity(), None):
        setattr(layer.linear_attn, name, other)
        with pytest.raises(ValueError, match="other modules"):
            fused.random_layer(CPU, *fused.kind_of(layer))
    del layer.mlp.act_fn
    assert fused.own_modules(layer) == ()


@torch.no_grad()
def test_a_layer_reads_states_that_were_cut_out_of_others():
    dims = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "hidden_size": 32, "intermediate_size": 32}
    model = tiny_model(**dims, block_size=8)
    layer = model.model.layers[0]
    assert layer.is_linear
    steps = []
    for run in (layer, partial(fused.fused_layer, layer)):
        cache = model(tokens(2, 72), use_cache=True).past_key_values
        for states in (cache.recurrent_states, cache.conv_states):
            states[0] = states[0].repeat_interleave(2, 0)[::2]
        x, streams = Streams.of(None, tokens(2, 8, 1), None, block_size=8, cache=cache)
        streams = streams.for_layers(model.config, cache, torch.float32)
        steps.append(run(model.model.embed_tokens(x), streams, CacheAccess(cache, 8, False)))
    assert error(*steps) < 1e-5


@pytest.mark.parametrize(("groups", "tokens_", "columns"), [(1, 1, 200), (4, 16, 150), (2, 5, 33)])
def test_attention_over_several_splits_of_the_keys(groups, tokens_, columns):
    normal, heads, dim = partial(torch.randn, generator=torch.Generator().manual_seed(0)), 2, 16
    queries = normal(2, heads, groups * tokens_, dim)
    # strided: rows with room behind them
    keys, values = (normal(2, heads, columns + 7, dim)[:, :, :columns] for _ in range(2))
    mask = normal(2, 1, tokens_, columns) > 0
    mask[0, 0, :, : columns // 2] = False  # splits in which nothing is visible
    query_gate = normal(2, tokens_, heads * groups * 2 * dim)
    result = attention_kernels_arclm.attention(queries, keys, values, mask, query_gate, 0.3)
    expected = F.scaled_dot_product_attention(queries, keys, values, mask.repeat(1, 1, groups, 1), scale=0.3)
    expected = expected.unflatten(2, (groups, tokens_)).flatten(1, 2).transpose(1, 2)  # [B, L, H, D]
    gate = query_gate.unflatten(2, (-1, 2 * dim))[..., dim:]
    assert error(result, (expected * gate.sigmoid()).flatten(2)) < 1e-5
