"""The benchmark of a denoising step on a CPU, where `captures.py` stands for CUDA graphs."""

import common
import denoising_step
import pytest
import torch
from captures import Rerun
from conftest import MASK, tiny_config, tokens

from arclm import denoising_bd3lm, generation_bd3lm, graphs_arclm


SHAPE = tiny_config(layer_types=["linear_attention", "full_attention"], num_hidden_layers=2).to_dict()
BLOCK = 16


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(denoising_step, "measure_limits", lambda *_: lambda: (1e9, 1e12))
    return common.make_arclm(SHAPE, "cpu", torch.float32)


def test_a_row_has_what_a_cpu_has(model):
    row = denoising_step.measure(model, tokens(2, 2 * BLOCK), new_tokens=BLOCK, repeats=1)
    assert row["step_ms"] > 0
    assert row["tokens_per_s"] > 0
    assert row["floor_ms"] > 0
    assert row["layers_ms"] is row["choice_ms"] is row["num_kernels"] is None


def test_a_row_has_the_captured_parts_of_its_own_batch(model, monkeypatch):
    def rows(logits, is_suppressed, mask_token_id, **_):  # `sample_rows`, greedy
        probs = logits.index_fill(1, torch.tensor([mask_token_id]), -torch.inf).softmax(-1)
        best = probs.max(-1)
        return best.indices, best.values, torch.zeros_like(best.values), best.values.isfinite()

    monkeypatch.setitem(graphs_arclm.CAPTURES, "cpu", Rerun)
    monkeypatch.setattr(generation_bd3lm, "use_sample_rows", lambda *_: True)
    monkeypatch.setattr(denoising_bd3lm, "sample_rows", rows)
    replayed = []
    monkeypatch.setattr(denoising_step, "kernels", lambda replay: replayed.append(replay) or [{"count": 3, "us": 1.0}])
    assert model.config.mask_token_id == MASK
    for batch in (1, 2):
        row = denoising_step.measure(model, tokens(batch, 2 * BLOCK), new_tokens=BLOCK, repeats=1)
        assert row["batch"] == batch
        assert row["layers_ms"] > 0
        assert row["choice_ms"] > 0
        assert row["num_kernels"] == 6
        assert list(row["kernels"]) == ["layers", "choice"]
    assert len(set(replayed)) == 4


def test_the_commit_of_a_checkout_within_another_repository_is_not_that_ones(tmp_path):
    assert common.versions(str(common.ROOT / "tests"))["dllm"] == "unknown"
    assert common.versions(str(tmp_path))["dllm"] == "unknown"
    if (common.ROOT / ".git").exists():
        assert len(common.versions(str(common.ROOT))["dllm"]) == 40
