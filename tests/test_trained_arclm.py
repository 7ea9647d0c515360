"""Which layers take the kernels with gradients. What these compute: `gradients_in_interpreter.py`, `test_gpu.py`."""

import pytest
import torch
from conftest import tiny_model, tokens
from peft import LoraConfig, get_peft_model

from arclm import fused_arclm, modeling_arclm, trained_arclm
from arclm.trained_arclm import use_trained_layer


@pytest.fixture
def asked(monkeypatch):
    """Take a CPU for a GPU, and collect what `usable` is asked; layers are the real ones."""
    questions = []
    monkeypatch.setattr(trained_arclm, "DEVICE", "cpu")
    monkeypatch.setattr(trained_arclm, "usable", lambda *question: questions.append(question) or True)
    return questions


def answers(model, monkeypatch, *, noisy: bool = True, **knobs) -> list[bool]:
    """What each layer is told in a pass over one stream or two."""
    told, x = [], tokens(1, 40)

    def ask(*args) -> None:
        told.append(use_trained_layer(*args))

    monkeypatch.setattr(modeling_arclm, "use_trained_layer", ask)
    model(x, **({"noisy_input_ids": x, "labels": x} if noisy else {}), **knobs)
    return told


def in_bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


def test_two_streams_in_bfloat16_take_them(asked, monkeypatch):
    model = tiny_model(block_size=16)
    with in_bfloat16():  # as the Trainer
        assert answers(model, monkeypatch) == [True] * 5
    assert answers(model.bfloat16().train(), monkeypatch) == [True] * 5
    with torch.no_grad():  # evaluation
        assert answers(model, monkeypatch) == [True] * 5
    name, _, dtype, block_size, *kind = asked[0]
    assert (name, dtype, block_size) == ("trained_layer", torch.bfloat16, 16)
    assert tuple(kind) == fused_arclm.kind_of(model.model.layers[0])


def test_other_passes_do_not(asked, monkeypatch):
    model = tiny_model(block_size=16)
    assert not any(answers(model, monkeypatch))  # float32
    with torch.autocast("cpu", torch.float16):
        assert not any(answers(model, monkeypatch))
    with in_bfloat16():
        assert not any(answers(model, monkeypatch, noisy=False))
        assert not any(answers(model, monkeypatch, block_size=8))
    assert not asked


CHANGES = {
    "a hook on a norm": lambda layer: layer.input_layernorm.register_forward_hook(lambda *_: None),
    "a hook on the MLP": lambda layer: layer.mlp.register_forward_pre_hook(lambda *_: None),
    "a hook on gradients": lambda layer: layer.mlp.register_full_backward_hook(lambda *_: None),
    "a wrapped convolution": lambda layer: setattr(layer.linear_attn.conv1d, "forward", torch.relu),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_somebody_changed_does_not(asked, monkeypatch, change):
    model = tiny_model(block_size=16)
    assert model.model.layers[0].is_linear
    CHANGES[change](model.model.layers[0])
    monkeypatch.setattr(modeling_arclm.ArcLMDecoderLayer, "forward", lambda self, x, *rest: told(self, x, *rest))
    results = []

    def told(layer, x, streams, *_):
        results.append(use_trained_layer(layer, x, streams))
        return x

    with in_bfloat16():
        model(tokens(1, 40), noisy_input_ids=tokens(1, 40))
    assert results == [False, True, True, True, True]


def test_adapters_and_hooks_on_the_products_go_on(asked, monkeypatch):
    """The products are called as they are: their adapters and hooks run."""
    model = get_peft_model(tiny_model(block_size=16), LoraConfig(target_modules=["down_proj", "q_proj"], r=2))
    base = model.get_base_model()
    base.model.layers[0].linear_attn.out_proj.register_forward_hook(lambda *_: None)
    with in_bfloat16():
        assert answers(base, monkeypatch) == [True] * 5
