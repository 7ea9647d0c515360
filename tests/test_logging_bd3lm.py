"""What a run shows and leaves: cross-entropy by masking rate, bar, answers, curves, card; and a LoRA adapter."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from peft import PeftModel
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainers import make_inputs, make_samples, make_trainer
from transformers import AutoModel

from arclm import train_bd3lm as bd3lm
from arclm.data_bd3lm import IGNORE
from arclm.logging_bd3lm import BUCKETS, draw_curves
from arclm.train_bd3lm import make_loss_inputs


pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (3, 3)])
def test_cross_entropy_by_masking_rate_is_that_of_full_logits(nano_tokenizer, config, tmp_path, batch, accumulation):
    samples = make_samples(tmp_path, config, nano_tokenizer)
    options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "logging_steps": 1}
    trainer = make_trainer(config, samples, tmp_path / "out", seed=5, **options)
    model, sums, counts = tiny_model(**config.to_diff_dict()), [0.0] * 5, [0] * 5
    for i, sample in enumerate(samples):
        x_0, labels = torch.tensor([sample["input_ids"]]), torch.tensor([sample["labels"]])
        noise = make_loss_inputs(x_0, labels, config, (5, 0), [i])
        logits = model(input_ids=x_0, noisy_input_ids=noise["noisy_input_ids"]).logits
        is_masked = noise["labels"] != IGNORE
        nll = F.cross_entropy(logits[is_masked], x_0[is_masked], reduction="none")
        for value, weight in zip(nll.tolist(), noise["loss_weights"][is_masked].tolist(), strict=True):
            bucket = min(4, int(5 / weight))
            sums[bucket], counts[bucket] = sums[bucket] + value, counts[bucket] + 1
    trainer.train()
    log = trainer.state.log_history[0]
    assert sum(count > 0 for count in counts) >= 4
    expected = {name: total / count for name, total, count in zip(BUCKETS, sums, counts, strict=True) if count}
    assert {name: log[name] for name in BUCKETS if name in log} == pytest.approx(expected, rel=1e-4)


def test_a_run_shows_and_leaves_what_it_did(nano_tokenizer, config, tmp_path, capsys):
    argv, out = make_inputs(tmp_path, config, nano_tokenizer), tmp_path / "out"
    argv = [*argv[: argv.index("--report_to")], "--max_steps", "4", "--answer_steps", "2", "--output_dir", str(out)]
    file = argv[argv.index("--train_file") + 1]
    bd3lm.main([*argv, "--eval_file", file, "--eval_strategy", "steps", "--eval_steps", "2"])
    captured = capsys.readouterr()
    lines = [line.strip() for line in captured.out.splitlines() if "step " in line]
    assert sum("NELBO" in line and "gradient" in line and "GiB" in line for line in lines) == 4
    assert sum("held-out NELBO" in line for line in lines) == 2
    answers = [line for line in lines if "Write." in line and " -> '" in line]
    assert [line.split("step ")[-1][0] for line in answers] == ["2", "2", "4", "4"]
    assert "tokens/s" in captured.err
    assert "4/4" in captured.err  # the bar, with the time left

    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    for key in ("loss", "grad_norm", "memory_gib", "train_tokens_per_second", "learning_rate"):
        assert sum(key in entry for entry in log) == 4, key
    assert 0.1 < log[0]["memory_gib"] < 20
    tensorboard = EventAccumulator(str(next(out.glob("runs/*"))))
    tensorboard.Reload()
    assert {"train/loss", "eval/loss", "train/memory_gib"} <= set(tensorboard.Tags()["scalars"])

    card = (out / "training.md").read_text()
    for text in ("train_bd3lm.py --model_name_or_path", "| data", "train.jsonl", "learning_rate: 0.01", "torch 2"):
        assert text in card
    assert f"{[entry['eval_loss'] for entry in log if 'eval_loss' in entry][-1]:.4f}"[:5] in card
    assert "![Curves of the run](training.png)" in card
    with Image.open(out / "training.png") as image:
        assert image.size[0] > 1000


def test_curves_draw_what_was_logged(tmp_path):
    history = [{"step": step, "loss": 3.0 / step, BUCKETS[2]: 1.0} for step in (1, 2, 3)]
    draw_curves(history, "NELBO", tmp_path / "some.png")
    draw_curves([], "NELBO", tmp_path / "none.png")
    colours = [len(Image.open(tmp_path / name).convert("RGB").getcolors(1 << 20)) for name in ("some.png", "none.png")]
    assert colours[0] > 2 * colours[1]  # without curves all is black, white and grey


def test_a_lora_adapter_is_trained_loaded_and_merged(nano_tokenizer, config, tmp_path):
    argv, out = make_inputs(tmp_path, config, nano_tokenizer), tmp_path / "adapter"
    bd3lm.main([*argv, "--max_steps", "8", "--lora_rank", "3", "--answer_steps", "4", "--output_dir", str(out)])
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert log[7]["loss"] < 0.8 * log[0]["loss"]
    assert not (out / "model.safetensors").exists()
    assert (out / "adapter_model.safetensors").stat().st_size < (tmp_path / "model/model.safetensors").stat().st_size

    def load():
        return AutoModel.from_pretrained(tmp_path / "model", trust_remote_code=True, dtype=torch.float32)

    ids = torch.tensor([nano_tokenizer("Write.", add_special_tokens=False).input_ids])
    x_t = torch.full_like(ids, config.mask_token_id)
    plain = load()
    adapted = PeftModel.from_pretrained(load(), out)
    with torch.no_grad():
        expected = adapted(input_ids=ids, noisy_input_ids=x_t).logits
        assert (plain(input_ids=ids, noisy_input_ids=x_t).logits - expected).abs().max() > 0.1
    answer = adapted.generate(input_ids=ids, max_new_tokens=24, do_sample=False)
    merged = adapted.merge_and_unload()
    assert type(merged).__name__ == "ArcLMForDiffusionLM"
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids, noisy_input_ids=x_t).logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.generate(input_ids=ids, max_new_tokens=24, do_sample=False), answer)

    assert f'AutoModel.from_pretrained("{tmp_path / "model"}", ' in (out / "README.md").read_text()
    (out / "README.md").write_text("Mine.")  # what the user writes there stays
    argv = [*argv, "--lora_rank", "3", "--output_dir", str(out), "--resume_from_checkpoint"]
    bd3lm.main([*argv, "--max_steps", "9"])
    assert len(json.loads((out / "trainer_state.json").read_text())["log_history"]) == len(log) + 1
    assert "Mine." in (out / "README.md").read_text()
