"""Noise and trainer of train_bd3lm.py, and one small run of the whole script."""

import json
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import chat, tiny_config, tiny_model, write_lines
from safetensors import safe_open
from trainers import ANSWERS, make_trainer
from transformers import AutoModel, AutoTokenizer, TrainingArguments
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig

from arclm import train_bd3lm as bd3lm
from arclm.data_bd3lm import IGNORE, load_samples, read_rows
from arclm.train_bd3lm import draw_uniforms, make_loss_inputs


# distinct primes: a confused dimension cannot pass by luck
B, N, L, MASK = 2, 3, 5, 11

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.usefixtures("datasets_cache")


# ---- Noise


def test_noise_of_a_row_depends_on_its_key_and_number_only():
    offset, uniforms = draw_uniforms((7, 3), [4, 0, 2], N, L)
    alone_offset, alone = draw_uniforms((7, 3), [2], N + 4, L)
    assert uniforms.shape == (3, N, 1 + L)
    assert offset[2] == alone_offset[0]
    assert torch.equal(uniforms[2], alone[0, :N])  # padding adds blocks at the end
    others = [draw_uniforms(key, [row], N, L)[1] for key, row in [((7, 4), 2), ((8, 3), 2), ((7, 3), 3), ((3, 7), 2)]]
    assert not any(torch.isclose(uniforms[2], other).any() for other in others)


def test_each_block_with_response_gets_its_own_part_of_the_rates():
    has_response = torch.tensor([[False, False, True], [False, True, True], [True, True, True]])
    offset, uniforms = draw_uniforms((0, 0), [0, 1, 2], 3, L)
    t = bd3lm.sample_t(offset, uniforms[..., 0], has_response)
    assert (t[~has_response] == 1).all()
    for row, num_parts in zip(range(3), [1, 2, 3], strict=True):
        u = (1 - t[row][has_response[row]]) / (1 - bd3lm.T_MIN)  # [0, 1) back from [T_MIN, 1]
        assert (u * num_parts).floor().sort().values.tolist() == list(range(num_parts))
        torch.testing.assert_close(u * num_parts % 1, offset[row].expand(num_parts), rtol=0, atol=1e-5)


def test_rates_of_single_blocks_are_stratified_over_the_rows_of_a_step():
    offset, uniforms = draw_uniforms((0, 5), list(range(97)), 1, L)
    t = bd3lm.sample_t(offset, uniforms[..., 0], torch.ones(97, 1, dtype=torch.bool)).flatten().sort().values
    # independent rates leave a gap of about ln(97) / 97; the golden ratio sequence none above 2.62 / 97
    assert t.diff().max() < 2.7 / 97


def test_the_rate_of_every_block_is_uniform():
    draws = [draw_uniforms((0, step), [0, 1], N, L) for step in range(2000)]
    has_response = torch.ones(B, N, dtype=torch.bool)
    t = torch.cat([bd3lm.sample_t(offset, uniforms[..., 0], has_response) for offset, uniforms in draws])
    assert t.equal(t.clamp(bd3lm.T_MIN, 1))
    shares = torch.stack([torch.histc(t[:, n], 10, 0, 1) for n in range(N)]) / len(t)
    assert (shares - 0.1).abs().max() < 0.025  # 5 standard deviations


def test_mask_tokens_uses_the_rate_of_each_block():
    rows = 400
    x_0 = torch.randint(MASK, (rows, N * L), generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.0, 0.3, 1.0]).expand(rows, N)
    uniforms = draw_uniforms((0, 0), list(range(rows)), N, L)[1][..., 1:]
    uniforms[:, 2] = 1 - 2**-24  # the largest that there is
    x_t = bd3lm.mask_tokens(x_0, t, uniforms, torch.ones_like(x_0, dtype=torch.bool), MASK)
    is_masked = x_t == MASK
    assert torch.equal(x_t[~is_masked], x_0[~is_masked])
    rates = is_masked.view(rows, N, L).float().mean((0, 2))
    assert rates[[0, 2]].tolist() == [0, 1]
    assert abs(rates[1] - 0.3) < 0.05


def test_loss_inputs_equal_the_case_by_hand(monkeypatch):
    # one row, prompt of 1 token, blocks of 2: [p a | b c | pad pad]; the first two blocks hold response
    x_0, labels = torch.tensor([[9, 1, 2, 3, 0, 0]]), torch.tensor([[IGNORE, 1, 2, 3, IGNORE, IGNORE]])
    # rank of the second block 0, of the first 1
    uniforms = torch.tensor([[[0.9, 0.0, 0.2], [0.1, 0.8, 0.7], [0.0, 0.0, 0.0]]])
    monkeypatch.setattr(bd3lm, "draw_uniforms", lambda *_: (torch.tensor([0.5]), uniforms))
    inputs = make_loss_inputs(x_0, labels, tiny_config(block_size=2, mask_token_id=MASK), (0, 0), [0])
    t = [1 - 0.999 * 0.75, 1 - 0.999 * 0.25]  # 0.25075 and 0.75025
    # 0.2 < t[0] masks a; 0.8 > t[1] keeps b; 0.7 < t[1] masks c; prompt and padding stay though their number is 0
    assert inputs["noisy_input_ids"].tolist() == [[9, MASK, 2, MASK, 0, 0]]
    assert inputs["labels"].tolist() == [[IGNORE, 1, IGNORE, 3, IGNORE, IGNORE]]
    expected = torch.tensor([[1 / t[0]] * 2 + [1 / t[1]] * 2 + [1.0] * 2])
    torch.testing.assert_close(inputs["loss_weights"], expected)


def test_weights_of_masked_tokens_count_each_response_token_once_on_average():
    labels = torch.full((B, N * L), IGNORE)
    labels[0, 4:], labels[1, 7:12] = 1, 1
    x_0, config, total = torch.ones_like(labels), tiny_config(block_size=L, mask_token_id=MASK), 0.0
    for step in range(2000):
        inputs = make_loss_inputs(x_0, labels, config, (1, step), [0, 1])
        total += inputs["loss_weights"][inputs["labels"] != IGNORE].sum().item()
    assert total / 2000 / (labels != IGNORE).sum().item() == pytest.approx(1, abs=0.05)


def test_loss_inputs_name_the_length_that_would_fit():
    x_0 = torch.zeros(1, 14, dtype=torch.long)
    with pytest.raises(ValueError, match=r"x_0 has 14 tokens.*block_size=5.*Pad it to 15"):
        make_loss_inputs(x_0, x_0, tiny_config(block_size=5), (0, 0), [0])


# ---- Trainer


@pytest.fixture(scope="module")
def samples(nano_tokenizer, config, tmp_path_factory):
    rows = [chat("Write.", answer) for answer in ANSWERS]
    file = write_lines(tmp_path_factory.mktemp("data") / "train.jsonl", rows)
    return load_samples(read_rows(file, None, ""), nano_tokenizer, config, max_length=256)[0]


def loss_by_hand(model, samples, config, key) -> torch.Tensor:
    """The NELBO per response token from full logits, one row at a time."""
    total, response_tokens = 0.0, 0
    for i, sample in enumerate(samples):
        x_0, labels = torch.tensor([sample["input_ids"]]), torch.tensor([sample["labels"]])
        noise = make_loss_inputs(x_0, labels, config, key, [i])
        logits = model(input_ids=x_0, noisy_input_ids=noise["noisy_input_ids"]).logits
        is_masked = noise["noisy_input_ids"] != x_0
        nll = F.cross_entropy(logits[is_masked], x_0[is_masked], reduction="none")
        total = total + (nll * noise["loss_weights"][is_masked]).sum()
        response_tokens += (labels != IGNORE).sum().item()
    return total / response_tokens


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (2, 4), (3, 3)])
def test_gradients_do_not_depend_on_how_a_step_is_divided(config, samples, tmp_path, batch, accumulation):
    options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "seed": 5}
    trainer = make_trainer(config, samples, tmp_path, **options)
    reference = tiny_model(**config.to_diff_dict())
    loss = loss_by_hand(reference, samples, config, (5, 0))
    loss.backward()
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    assert trainer.train().training_loss == pytest.approx(loss.item(), rel=1e-5)
    for name, expected in reference.named_parameters():
        gradient = before[name] - trainer.model.get_parameter(name).detach()
        torch.testing.assert_close(gradient, expected.grad, rtol=1e-4, atol=1e-5)


def test_the_rows_of_each_process_are_numbered_in_the_order_of_the_sampler(config, samples, tmp_path, monkeypatch):
    trainer = make_trainer(config, samples, tmp_path, per_device_train_batch_size=2)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    monkeypatch.setattr(TrainingArguments, "process_index", 1)
    monkeypatch.setattr(trainer.accelerator, "gather", lambda x: x)
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, torch.device("cpu"))
    assert [batch["row"].tolist() for batch in batches] == [[2, 3], [6, 7]]


def test_evaluation_is_exact_and_its_masks_are_fixed(config, samples, tmp_path):
    expected = loss_by_hand(tiny_model(**config.to_diff_dict()), samples, config, (0, 0)).item()
    for size, seed in [(3, 1), (8, 2)]:
        trainer = make_trainer(config, samples, tmp_path, per_device_eval_batch_size=size, seed=seed)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_a_masked_token_leaves_the_weights_alone(config, samples, tmp_path, monkeypatch):
    def nothing_masked(key, rows, num_blocks, block_size):
        return torch.full((len(rows),), 0.999), torch.full((len(rows), num_blocks, 1 + block_size), 0.9999)

    monkeypatch.setattr(bd3lm, "draw_uniforms", nothing_masked)
    trainer = make_trainer(config, samples.select([0]), tmp_path, per_device_train_batch_size=1)
    before = trainer.model.lm_head.weight.detach().clone()
    assert trainer.train().training_loss == 0
    assert torch.equal(before, trainer.model.lm_head.weight)


# ---- Main


def test_the_defaults_are_the_run_of_the_card():
    data_args, args = bd3lm.parse_args([])
    # no data named: the mixture, see test_mixture.py
    assert (data_args.train_file, data_args.dataset_name, data_args.eval_file) == (None, None, None)
    assert f"--output_dir {data_args.model_name_or_path}\n" in README  # of the command that converts
    assert Path(args.output_dir).name == "arclm-0.8b-trained"
    assert (args.learning_rate, args.warmup_steps, args.num_train_epochs, args.max_grad_norm) == (5e-5, 200, 10, 0.5)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (1, 16)
    assert (data_args.max_length, args.gradient_checkpointing) == (2048, True)
    assert args.optim.startswith("adamw")
    assert bd3lm.parse_args(["--gradient_checkpointing", "false"])[1].gradient_checkpointing is False
    assert args.use_cpu == (not torch.accelerator.is_available())  # or torchrun would train a model per process


def test_a_model_that_is_absent_or_not_converted_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        bd3lm.InputError, match=r"The model arclm-0\.8b cannot be loaded.*make it: python convert_a2d\.py"
    ):
        bd3lm.main([])
    Qwen3_5TextConfig(num_hidden_layers=1).save_pretrained(tmp_path / "ar")
    file = write_lines(tmp_path / "train.jsonl", [chat("Hi.", "Hello.")])
    argv = ["--model_name_or_path", str(tmp_path / "ar"), "--train_file", file, "--output_dir", str(tmp_path / "out")]
    with pytest.raises(bd3lm.InputError, match=r'model of type "qwen3_5_text", not a converted one.*convert_a2d\.py'):
        bd3lm.main(argv)


def dtypes_of(folder: Path) -> dict[str, str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (not a dict)


def test_training_lowers_the_loss_and_leaves_a_whole_model(nano_tokenizer, config, tmp_path, capsys):
    source, out, elsewhere = tmp_path / "source", tmp_path / "out", tmp_path / "elsewhere"
    model = tiny_model(**config.to_diff_dict()).to(torch.bfloat16)
    for name, weight in model.named_parameters():
        if name.endswith(("A_log", "linear_attn.norm.weight")):  # as in a converted checkpoint
            weight.data = weight.data.float()
    model.save_pretrained(source)
    tokenizer = deepcopy(nano_tokenizer)
    tokenizer.pad_token = None  # not every tokenizer has one
    tokenizer.save_pretrained(source)
    rows = [chat("Say it.", text) for text in ("One two three.", "One two.", "One.", "One two three four.")]
    file = write_lines(tmp_path / "train.jsonl", [*rows, b"{"])
    argv = f"--model_name_or_path {source} --train_file {file} --eval_file {file} --output_dir {out} --max_length 64"
    argv += " --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --max_steps 60 --warmup_steps 5"
    argv += " --learning_rate 1e-2 --report_to none --disable_tqdm true"
    bd3lm.main(argv.split())

    assert "not JSON" in capsys.readouterr().out  # in the data table
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    # 4 rows are learned by heart; at first each token costs about ln V
    assert losses[0] > 3
    assert sum(losses[-2:]) / 2 < losses[0] / 3
    assert json.loads((out / "eval_results.json").read_text())["eval_loss"] < losses[0] / 3

    dtypes = dtypes_of(source)
    assert set(dtypes.values()) == {"BF16", "F32"}
    assert dtypes_of(out) == dtypes
    assert not list(out.glob("*.bin"))
    shutil.rmtree(source)
    out.rename(elsewhere)
    loaded = AutoModel.from_pretrained(elsewhere, trust_remote_code=True, dtype="auto")
    assert loaded.config.use_cache is True
    tokenizer = AutoTokenizer.from_pretrained(elsewhere, trust_remote_code=True)
    assert tokenizer.chat_template == nano_tokenizer.chat_template
    assert tokenizer.convert_tokens_to_ids("<|mask|>") == loaded.config.mask_token_id

    # it has learned to stop by itself
    prompt = tokenizer.apply_chat_template(rows[0]["messages"][:1], add_generation_prompt=True, return_tensors="pt")
    answer = loaded.generate(**prompt, max_new_tokens=96, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert 0 < answer.tolist().index(tokenizer.eos_token_id) < 24


def test_a_resumed_run_ends_with_the_same_weights(config, samples, tmp_path, monkeypatch):
    options = {"max_steps": 4, "save_steps": 3, "save_strategy": "steps", "train_sampling_strategy": "random"}
    options |= {"per_device_train_batch_size": 2, "optim": "adamw_torch", "learning_rate": 1e-2}
    keys = []
    monkeypatch.setattr(bd3lm, "make_loss_inputs", lambda *args: keys.append(args[3]) or make_loss_inputs(*args))
    whole = make_trainer(config, samples, tmp_path, **options)
    whole.train()
    resumed = make_trainer(config, samples, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert keys == [(42, 0), (42, 1), (42, 2), (42, 3), (42, 3)]
    for expected, weight in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(expected, weight)
