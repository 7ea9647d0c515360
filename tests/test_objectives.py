"""The variants of benchmarks/objectives.py, and one of its runs in small."""

import json
from types import SimpleNamespace

import ablation
import objectives
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model, write_lines
from trainers import make_samples, make_trainer

from arclm.data_bd3lm import IGNORE, collate
from arclm.nano.world import tasks_per_family, to_row


pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture(scope="module")
def samples(nano_tokenizer, config, tmp_path_factory):
    return make_samples(tmp_path_factory.mktemp("data"), config, nano_tokenizer)


def complementary(config, samples, folder) -> objectives.ComplementaryTrainer:
    trainer = make_trainer(config, samples, folder)
    trainer.__class__ = objectives.ComplementaryTrainer  # it has no fields of its own
    return trainer


def test_complementary_masks_predict_every_response_token_once(config, samples, tmp_path):
    trainer, batch = complementary(config, samples, tmp_path), collate(list(samples))
    inputs = trainer.add_noise(batch, is_training=True)
    rows, is_response = len(samples), batch["labels"] != IGNORE
    first, second = (inputs["noisy_input_ids"] == config.mask_token_id).split(rows)
    assert torch.equal(first ^ second, is_response)
    assert not (first & second).any()
    assert first.any()
    assert second.any()
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(inputs[name], torch.cat((batch[name], batch[name])))
    assert torch.equal(inputs["labels"] != IGNORE, torch.cat((first, second)))
    torch.testing.assert_close(inputs["loss_weights"] * inputs["masking_rate"] * 2, torch.ones(inputs["labels"].shape))
    rates = inputs["masking_rate"].split(rows)
    torch.testing.assert_close(
        (rates[0] + rates[1])[is_response], torch.ones(int(is_response.sum())), atol=2e-3, rtol=0
    )
    assert len(trainer.add_noise(batch, is_training=False)["labels"]) == rows


def test_complementary_masks_estimate_the_same_nelbo(config, samples, tmp_path):
    trainer, batch = complementary(config, samples, tmp_path), collate(list(samples))
    response_tokens, counted = (batch["labels"] != IGNORE).sum().item(), 0.0
    for step in range(300):
        trainer.state.global_step = step
        inputs = trainer.add_noise(batch, is_training=True)
        counted += inputs["loss_weights"][inputs["labels"] != IGNORE].sum().item() / response_tokens
    assert counted / 300 == pytest.approx(1, abs=0.05)


def test_a_step_with_complementary_masks_takes_the_mean_of_both(config, samples, tmp_path):
    trainer, model = complementary(config, samples, tmp_path), tiny_model(**config.to_diff_dict())
    batch = collate(list(samples))
    inputs = trainer.add_noise(batch, is_training=True)
    rows, total = len(samples), 0.0
    for part in (slice(rows), slice(rows, None)):
        logits = model(inputs["input_ids"][part], noisy_input_ids=inputs["noisy_input_ids"][part]).logits
        is_masked = inputs["labels"][part] != IGNORE
        nll = F.cross_entropy(logits[is_masked], batch["input_ids"][is_masked], reduction="none")
        total += (nll / inputs["masking_rate"][part][is_masked]).sum().item() / 2
    loss = trainer.train().training_loss
    assert loss == pytest.approx(total / (batch["labels"] != IGNORE).sum().item(), rel=1e-4)


def test_clean_nll_is_the_mean_over_response_tokens(config, samples):
    model = tiny_model(**(config.to_diff_dict() | {"context_attention": "causal"}))
    total, count = 0.0, 0
    with torch.no_grad():
        for sample in samples:
            ids, labels = torch.tensor([sample["input_ids"]]), torch.tensor(sample["labels"])
            total += F.cross_entropy(model(ids).logits[0, :-1], labels[1:], reduction="sum").item()
            count += (labels != IGNORE).sum().item()
    assert objectives.clean_nll(model, samples) == pytest.approx(total / count, rel=1e-4)


@pytest.fixture
def small_run(nano_tokenizer, config, tmp_path):
    """Settings of a run on a tiny model and 12 tasks, made in `tmp_path`."""
    options = {"max_steps": 2, "eval_steps": 1, "nelbo_tasks": 3, "tasks_per_family": 1, "work_dir": str(tmp_path)}
    tiny_model(**config.to_diff_dict()).save_pretrained(tmp_path / "converted")
    nano_tokenizer.save_pretrained(tmp_path / "converted")
    for name, seed in (("train.jsonl", 1), ("nelbo.jsonl", 2)):
        tasks = tasks_per_family("train", seed, 4)
        write_lines(tmp_path / name, [to_row(task) for task in tasks])
    return objectives.ObjectivesArguments(**options)


def test_a_run_is_measured_kept_and_not_repeated(small_run, tmp_path, monkeypatch):
    record = objectives.run("AR loss", 1, small_run)
    assert [row["step"] for row in record["nelbo"]] == [1, 2]
    assert 0 < record["nelbo"][0]["train_seconds"] < record["nelbo"][1]["train_seconds"] < record["seconds"] + 1
    assert 5 < record["nelbo"][-1]["nelbo"] < 12
    assert 5 < record["clean_nll"] < 12
    assert set(record["exact_match"]) == {"1", "2", "4"}
    assert json.loads((tmp_path / "AR_loss-1.json").read_text()) == record
    monkeypatch.setattr(objectives, "train", None)
    assert objectives.run("AR loss", 1, small_run) == record
    small_run.max_steps = 3
    with pytest.raises(ValueError, match=r"AR_loss-1\.json was made with .*'max_steps': 2.* Use these, or another"):
        objectives.run("AR loss", 1, small_run)


@pytest.mark.parametrize("name", objectives.VARIANTS)
def test_every_variant_trains_as_it_says(small_run, name, monkeypatch):
    seen = {}

    def train(options, cls, views, args, make_trainer, **config):
        trainer = make_trainer.func
        seen.update(options=options, cls=cls, trainer=trainer, config=config, **make_trainer.keywords)
        raise InterruptedError

    monkeypatch.setattr(objectives, "train", train)
    with pytest.raises(InterruptedError):
        objectives.run(name, 2, small_run)
    batch = [value for key, value in zip(seen["options"], seen["options"][1:], strict=False) if "train_batch" in key]
    assert batch[-1] == ("8" if name == "complementary masks" else "16")
    schedule = name.removeprefix("AR loss, ")
    assert seen.get("noise_schedule") == (schedule if schedule in ("cosine", "clipped") else None)
    assert seen.get("ar_loss_weight") == (0.5 if "AR loss" in name else None)
    assert (seen["trainer"] is objectives.ComplementaryTrainer) == (name == "complementary masks")
    assert (seen["config"].get("context_attention") == "causal") == ("AR loss" in name or name == "causal context")
    assert (seen["config"].get("right_shift_logits") is False) == (name == "unshifted logits")


def fake_run(variant: str, seed: int, nelbo: float, match: float) -> dict:
    matches = dict.fromkeys(("all", "instructions", "reasoning", "tools"), match)
    curve = [
        {"step": 5, "train_seconds": 10.0 * seed, "nelbo": 9.0},
        {"step": 9, "train_seconds": 20.0, "nelbo": nelbo},
    ]
    exact_match = dict.fromkeys(("1", "2", "4"), matches)
    return {"variant": variant, "seed": seed, "nelbo": curve, "exact_match": exact_match, "clean_nll": None}


@pytest.mark.parametrize(
    ("nelbos", "match", "expected"),
    [
        ((0.80, 0.90, 1.00), 0.48, True),
        ((0.99, 1.09, 1.19), 0.50, False),  # lower in every seed, by less than the spread
        ((0.50, 0.60, 1.21), 0.50, False),  # not in every seed
        ((0.80, 0.90, 1.00), 0.46, False),  # at the price of exact match
    ],
)
def test_the_rule_of_what_helps(nelbos, match, expected, tmp_path, capsys):
    runs = [fake_run("baseline", seed, nelbo, 0.5) for seed, nelbo in zip((1, 2, 3), (1.0, 1.1, 1.2), strict=True)]
    runs += [fake_run("cosine", seed, nelbo, match) for seed, nelbo in zip((1, 2, 3), nelbos, strict=True)]
    rows = objectives.summarize(runs)
    assert [(row["variant"], row["helps"]) for row in rows] == [("baseline", None), ("cosine", expected)]
    differences = [a - b for a, b in zip(nelbos, (1.0, 1.1, 1.2), strict=True)]
    assert rows[1]["difference"]["values"] == pytest.approx(differences)
    assert rows[0]["train_seconds"][5]["values"] == [10, 20, 30]
    objectives.print_rows(rows)
    objectives.plot(rows, {"all": 0.9}, tmp_path / "plot.png")
    assert "cosine" in capsys.readouterr().out
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_variant_brings_its_control_and_an_unknown_one_is_named():
    assert objectives.ObjectivesArguments(variants=["AR loss"]).variants == ["baseline", "causal context", "AR loss"]
    both = ["baseline", "causal context", "AR loss", "AR loss, clipped"]
    assert objectives.ObjectivesArguments(variants=both[-1:]).variants == both
    with pytest.raises(SystemExit, match=r"'shift' is unknown\. Choose among baseline, unshifted logits"):
        objectives.ObjectivesArguments(variants=["shift"])


def test_the_seconds_of_training_leave_out_what_measuring_takes(monkeypatch):
    clock = iter([10.0, 15.0, 18.0, 20.0, 29.0])  # start, then before and after each measurement
    monkeypatch.setattr(ablation.time, "process_time", lambda: next(clock))
    curve = ablation.NelboCurve({}, None, eval_steps=1)
    curve.on_train_begin(None, None, None)
    for step in (1, 2):
        curve.on_step_end(None, SimpleNamespace(global_step=step), None, None)
    assert [row["train_seconds"] for row in curve.rows] == [5, 7]
