"""Layers in few Triton kernels, run on a CPU by Triton's interpreter. `test_kernels_arclm.py` starts this file."""

from functools import partial

import pytest
import torch

from arclm import fused_arclm as fused
from arclm.modeling_arclm import ArcLMDecoderLayer


CPU = torch.device("cpu")
FUSED = (64, 96, "silu", 1e-6, 32, 4, 2, 4, 16, 2, 4, 16)  # as `fused_arclm.FIELDS`


@pytest.mark.parametrize("is_linear", [True, False])
def test_layers_in_few_kernels_are_the_layers(is_linear):
    with torch.no_grad():
        assert fused._check_fused_layer(CPU, ArcLMDecoderLayer, torch.float32, is_linear, *FUSED) < 1e-5


def without_decay(delta_rule, qkv, gates, decay, *rest, **knobs):
    return delta_rule(qkv, gates, (decay[0] - 9, decay[1]), *rest, **knobs)


def without_mask(attention, queries, keys, values, mask, *rest):
    return attention(queries, keys, values, None, *rest)


@pytest.mark.parametrize(
    ("is_linear", "name", "wrong"), [(True, "delta_rule", without_decay), (False, "attention", without_mask)]
)
def test_the_self_check_of_layers_sees_what_is_wrong(monkeypatch, is_linear, name, wrong):
    monkeypatch.setattr(fused, name, partial(wrong, getattr(fused, name)))
    with torch.no_grad():
        assert fused._check_fused_layer(CPU, ArcLMDecoderLayer, torch.float32, is_linear, *FUSED) > 0.1


def test_tiles_that_do_not_fit_say_so():
    with pytest.raises(ValueError, match="no tiles for the shapes"):
        fused._check_fused_layer(CPU, ArcLMDecoderLayer, torch.float32, True, *FUSED[:-1], 24)
