"""Kernels with gradients, run on a CPU by Triton's interpreter. `test_kernels_arclm.py` starts this file."""

import pytest
import torch

from arclm import loss_kernels_arclm
from arclm import trained_arclm as trained
from arclm.modeling_arclm import ArcLMDecoderLayer


CPU = torch.device("cpu")
SHAPES = (64, 96, "silu", 1e-6, 32, 4, 2, 4, 16, 2, 4, 16)  # as `fused_arclm.FIELDS`


def check(monkeypatch, is_linear: bool, block_size: int, tokens: int) -> float:
    monkeypatch.setattr(trained, "CHECK_TOKENS", tokens)
    with torch.no_grad():
        return trained._check_trained_layer(CPU, ArcLMDecoderLayer, torch.float32, block_size, is_linear, *SHAPES)


# whole blocks of one chunk; a last block that goes beyond the row, blocks of several chunks
@pytest.mark.parametrize(("is_linear", "block_size", "tokens"), [(True, 16, 48), (True, 48, 100), (False, 16, 24)])
def test_outputs_and_gradients_are_those_of_the_layer(monkeypatch, is_linear, block_size, tokens):
    assert check(monkeypatch, is_linear, block_size, tokens) < 1e-5


def test_the_self_check_sees_a_gradient_that_is_lost(monkeypatch):
    """That of the states from which the noisy blocks start."""
    delta_rule = trained.two_stream_delta_rule

    def without(qkv, g, beta, layout, **sizes):
        return delta_rule(qkv, g, beta, layout._replace(places=torch.full_like(layout.places, -1)), **sizes)

    monkeypatch.setattr(trained, "two_stream_delta_rule", without)
    assert check(monkeypatch, True, 16, 40) > 0.1


def test_cross_entropy_over_pieces_of_the_vocabulary(monkeypatch):
    monkeypatch.setattr(loss_kernels_arclm, "TILE", 64)
    assert loss_kernels_arclm._check_cross_entropy(CPU, torch.float16) < 1e-5
