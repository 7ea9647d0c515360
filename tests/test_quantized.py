"""Weight-only int8 through torchao: loads through AutoModel, answers as float32 does, and comes back from a save."""

from pathlib import Path

import pytest
import torch
from conftest import MASK, tiny_model, tokens
from safetensors import safe_open
from torch import nn
from transformers import AutoModel, AutoTokenizer, TorchAoConfig

from arclm.modeling_arclm import ArcLMForDiffusionLM
from arclm.nano.evaluate import answer, judge
from arclm.nano.world import tasks_per_family


pytest.importorskip("torchao")
import quantized
from torchao.quantization import Int4WeightOnlyConfig, Int8Tensor, Int8WeightOnlyConfig


NANO = Path(__file__).resolve().parents[1] / "nano" / "arclm-nano"
FLOAT32 = ("A_log", "linear_attn.norm.weight")


def load(path: Path = NANO, dtype: torch.dtype = torch.float32, **kwargs):
    """Load what a user loads: a directory, through AutoModel, with the code that is in it."""
    return AutoModel.from_pretrained(path, trust_remote_code=True, dtype=dtype, **kwargs)


@pytest.fixture(scope="module")
def plain():
    """arcLM-nano in float32."""
    return load()


@pytest.fixture(scope="module")
def int8():
    """arcLM-nano in int8, the rest in float32."""
    return load(quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))


@pytest.fixture(scope="module")
def noisy_ids() -> torch.Tensor:
    """[3, 37] ids, about half of them masked."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(20, 500, (3, 37), generator=generator)
    return ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.5, 574)


def test_every_linear_layer_but_the_head_is_int8_and_close_to_what_it_was(plain, int8):
    before = dict(plain.named_modules())
    linear = {name: module for name, module in int8.named_modules() if isinstance(module, nn.Linear)}
    head = linear.pop("lm_head")
    assert head.weight is int8.model.embed_tokens.weight
    assert len(linear) == 6 * 8 + 2 * 7
    for name, module in linear.items():
        weight = module.weight
        assert isinstance(weight, Int8Tensor), name
        assert weight.qdata.dtype == torch.int8, name
        assert weight.scale.shape == (len(weight), 1), name
        error = (weight.dequantize() - before[name].weight).abs()
        assert (error <= 0.501 * weight.scale).all(), f"{name} is off by more than rounding"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_else_keeps_dtype_and_value(dtype):
    before = dict(load(dtype=dtype).named_parameters())
    model = load(dtype=dtype, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    assert not model.training
    rest = {name: weight for name, weight in model.named_parameters() if not isinstance(weight, Int8Tensor)}
    assert sum(name.endswith(FLOAT32) for name in rest) == 2 * 6
    for name, weight in rest.items():
        assert weight.dtype == (torch.float32 if name.endswith(FLOAT32) else dtype), name
        assert torch.equal(weight, before[name]), name


def test_its_weights_take_less_than_a_third(plain, int8):
    # a scale in float32 and a zero point in int8 per row
    expected = sum(
        weight.numel() + 5 * len(weight) if isinstance(weight, Int8Tensor) else weight.nbytes
        for weight in int8.parameters()
    )
    assert quantized.weight_bytes(int8) == expected
    assert quantized.weight_bytes(plain) == 4 * sum(weight.numel() for weight in plain.parameters())
    assert expected < quantized.weight_bytes(plain) / 3


def test_it_answers_held_out_tasks_as_float32_does(plain, int8):
    tokenizer = AutoTokenizer.from_pretrained(NANO, trust_remote_code=True)
    tasks = tasks_per_family("test", seed=32, count=8)
    first, second = (
        [(judge(tokenizer, task, ids)[0], ids) for task, ids, _ in answer(model, tokenizer, tasks, steps=32)]
        for model in (plain, int8)
    )
    result = quantized.compare(first, second)
    assert sum(is_right for is_right, _ in first) >= 0.8 * len(tasks)
    assert abs(result["difference"]) <= 1 / len(tasks)
    assert result["same_answer"] >= 0.9


@torch.no_grad()
def test_one_pass_is_still_block_by_block(int8, noisy_ids):
    clean = noisy_ids.roll(1, 0).masked_fill(noisy_ids.roll(1, 0) == 574, 30)
    both = int8(clean, noisy_input_ids=noisy_ids).logits
    cache = int8(clean[:, :32], use_cache=True).past_key_values
    step = int8(noisy_input_ids=noisy_ids[:, 32:], past_key_values=cache).logits
    assert torch.allclose(both[:, 32:], step, atol=1e-3)


@torch.no_grad()
def test_its_loss_is_that_of_float32(plain, int8, noisy_ids):
    labels = torch.full_like(noisy_ids, 40)
    losses = [model(noisy_ids, noisy_input_ids=noisy_ids, labels=labels).loss.item() for model in (plain, int8)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_saved_it_is_small_and_loads_again_to_the_bit(int8, noisy_ids, tmp_path):
    int8.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert isinstance(again.model.layers[0].mlp.up_proj.weight, Int8Tensor)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again(noisy_ids).logits, int8(noisy_ids).logits)
    assert torch.equal(*(m.generate(noisy_ids[:1, :20], max_new_tokens=5, do_sample=False) for m in (again, int8)))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert stored == quantized.weight_bytes(int8)


def test_layers_are_left_out_by_a_regex_and_an_untied_head_becomes_int8_unless_it_is_named(tmp_path):
    tiny_model(tie_word_embeddings=False).save_pretrained(tmp_path)

    def kinds(but: list[str] | None) -> dict[str, bool]:
        options = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=but)
        model = ArcLMForDiffusionLM.from_pretrained(tmp_path, quantization_config=options)
        ids = tokens(1, 32)
        loss = model(ids, noisy_input_ids=ids.where(ids % 2 == 0, MASK), labels=ids).loss
        assert 0 < loss < 20
        mixer = model.model.layers[0].linear_attn
        modules = {"a": mixer.in_proj_a, "b": mixer.in_proj_b, "qkv": mixer.in_proj_qkv, "head": model.lm_head}
        return {name: isinstance(module.weight, Int8Tensor) for name, module in modules.items()}

    assert kinds(None) == {"a": True, "b": True, "qkv": True, "head": False}
    gates = [".*in_proj_a", ".*in_proj_b"]
    assert kinds(gates) == {"a": False, "b": False, "qkv": True, "head": True}
    assert kinds(quantized.torchao_int8(gates).modules_to_not_convert)["head"] is False


def test_a_scheme_that_this_machine_cannot_run_is_refused():
    if torch.cuda.is_available():
        pytest.skip("a GPU may have this scheme")
    with pytest.raises(ValueError, match=r"cannot be quantised in this way.*Int8WeightOnlyConfig\(\)\) needs no GPU"):
        load(dtype=torch.bfloat16, quantization_config=TorchAoConfig(Int4WeightOnlyConfig()))


def test_the_benchmark_counts_what_changed():
    right, wrong = (True, [1, 2]), (False, [3])
    result = quantized.compare([right, right, right, wrong, wrong], [right, wrong, wrong, right, wrong])
    assert (result["lost"], result["gained"]) == (2, 1)
    assert result["difference"] == pytest.approx(-0.2)
    assert result["error"] == pytest.approx(3**0.5 / 5)
    assert result["same_answer"] == pytest.approx(0.4)
    assert result["is_noise"]
    assert not quantized.compare([right] * 5, [wrong] * 5)["is_noise"]


def test_the_benchmark_measures_every_variant():
    tokenizer = AutoTokenizer.from_pretrained(NANO, trust_remote_code=True)
    rows = quantized.measure_steps(NANO, quantized.VARIANTS, repeats=1)
    assert [row["variant"] for row in rows] == ["float32", "bfloat16", "int8, float32", "int8, bfloat16"]
    sizes = [row["weights_mb"] for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    assert all(row["step_over_float32"] > 0 for row in rows)

    models = {"float32": quantized.load(NANO, quantized.VARIANTS["float32"])}
    models |= {name: quantized.load(NANO, variant) for name, variant in quantized.BUT_GATES.items()}
    assert type(models["int8 but gates"].model.layers[0].linear_attn.in_proj_a.weight) is nn.Parameter
    rows = quantized.accuracy(models, tokenizer, tasks_per_family("test", seed=33, count=1))
    assert [row["tokens_per_step"] for row in rows] == [1, 1, 2, 2, 4, 4]
    assert all(row["same_answer"] == 1 for row in rows[::2])
