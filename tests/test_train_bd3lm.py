"""Trainer of train_bd3lm.py, and small runs of the whole script."""

import json
import os
import shutil
import sys
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import get_args, get_type_hints
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import chat, tiny_model, tokens, write_lines
from huggingface_hub.errors import HTTPError
from reference import parent_of
from safetensors import safe_open
from trainers import make_inputs, make_samples, make_trainer
from transformers import AutoModel, AutoTokenizer, TrainingArguments
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig

from arclm import train_bd3lm as bd3lm
from arclm.data_bd3lm import IGNORE, load_samples, read_rows
from arclm.logging_bd3lm import RateBuckets
from arclm.noise_bd3lm import NOISE_SCHEDULES, make_loss_inputs


ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.usefixtures("datasets_cache")


# ---- Trainer


@pytest.fixture(scope="module")
def samples(nano_tokenizer, config, tmp_path_factory):
    return make_samples(tmp_path_factory.mktemp("data"), config, nano_tokenizer)


def loss_by_hand(model, samples, config, key, schedule="linear", ar_loss_weight=0.0) -> torch.Tensor:
    """The NELBO per response token, and the AR loss, from full logits, one row at a time."""
    total, response_tokens = 0.0, 0
    for i, sample in enumerate(samples):
        x_0, labels = torch.tensor([sample["input_ids"]]), torch.tensor([sample["labels"]])
        noise = make_loss_inputs(x_0, labels, config, key, [i], schedule)
        logits = model(input_ids=x_0, noisy_input_ids=noise["noisy_input_ids"]).logits
        is_masked = noise["noisy_input_ids"] != x_0
        nll = F.cross_entropy(logits[is_masked], x_0[is_masked], reduction="none")
        total = total + (nll * noise["loss_weights"][is_masked]).sum()
        if ar_loss_weight:
            clean = F.cross_entropy(model(x_0).logits[0, :-1], labels[0, 1:], reduction="sum")
            total = total + ar_loss_weight * clean
        response_tokens += (labels != IGNORE).sum().item()
    return total / response_tokens


def causal(config):
    """The same model with a clean stream that reads from left to right."""
    return type(config)(**(config.to_diff_dict() | {"context_attention": "causal"}))


@pytest.mark.parametrize(
    ("batch", "accumulation", "schedule", "ar_loss_weight"),
    [
        (8, 1, "linear", 0.0),
        (2, 4, "linear", 0.0),
        (3, 3, "linear", 0.0),
        (2, 4, "cosine", 0.0),
        (2, 4, "clipped", 0.0),
        (8, 1, "clipped", 0.0),
        (8, 1, "linear", 0.5),
        (2, 4, "cosine", 0.5),
    ],
)
def test_gradients_do_not_depend_on_how_a_step_is_divided(
    config, samples, tmp_path, batch, accumulation, schedule, ar_loss_weight
):
    options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "seed": 5}
    if ar_loss_weight:
        config = causal(config)
    trainer = make_trainer(config, samples, tmp_path, **options)
    trainer.noise_schedule, trainer.ar_loss_weight = schedule, ar_loss_weight
    reference = tiny_model(**config.to_diff_dict())
    loss = loss_by_hand(reference, samples, config, (5, 0), schedule, ar_loss_weight)
    loss.backward()
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    assert trainer.train().training_loss == pytest.approx(loss.item(), rel=1e-5)
    for name, expected in reference.named_parameters():
        gradient = before[name] - trainer.model.get_parameter(name).detach()
        torch.testing.assert_close(gradient, expected.grad, rtol=1e-5, atol=1e-6)


def test_the_rows_of_each_process_are_numbered_in_the_order_of_the_sampler(config, samples, tmp_path, monkeypatch):
    trainer = make_trainer(config, samples, tmp_path, per_device_train_batch_size=2)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    monkeypatch.setattr(TrainingArguments, "process_index", 1)
    monkeypatch.setattr(trainer.accelerator, "gather", lambda x: x)
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, torch.device("cpu"))
    assert [batch["row"].tolist() for batch in batches] == [[2, 3], [6, 7]]


def test_evaluation_is_exact_and_its_masks_are_fixed(config, samples, tmp_path):
    expected = loss_by_hand(tiny_model(**config.to_diff_dict()), samples, config, (0, 0)).item()
    for size, seed, schedule in [(3, 1, "linear"), (8, 2, "clipped")]:
        trainer = make_trainer(config, samples, tmp_path, per_device_eval_batch_size=size, seed=seed)
        trainer.noise_schedule = schedule  # of training alone
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_a_masked_token_leaves_the_weights_alone(config, samples, tmp_path, monkeypatch):
    def nothing_masked(key, rows, num_blocks, block_size):
        return torch.full((len(rows),), 0.999), torch.full((len(rows), num_blocks, 1 + block_size), 0.9999)

    monkeypatch.setattr("arclm.noise_bd3lm.draw_uniforms", nothing_masked)
    trainer = make_trainer(config, samples.select([0]), tmp_path, per_device_train_batch_size=1)
    before = trainer.model.lm_head.weight.detach().clone()
    assert trainer.train().training_loss == 0
    assert torch.equal(before, trainer.model.lm_head.weight)


def test_an_unknown_schedule_is_named():
    with pytest.raises(
        bd3lm.InputError, match=r'noise_schedule="log" is unknown\. Choose linear or cosine or clipped\.'
    ):
        bd3lm.BD3LMTrainer(noise_schedule="log")


def test_a_loss_that_is_no_nelbo_is_not_called_one(tmp_path):
    model, args = tiny_model(context_attention="causal"), TrainingArguments(tmp_path)
    names = {
        bd3lm.BD3LMTrainer(model, args, noise_schedule=schedule, ar_loss_weight=weight).loss_name
        for schedule, weight in [("linear", 0), ("cosine", 0.5), ("clipped", 0), ("clipped", 0.5)]
    }
    assert names == {"NELBO", "NELBO + AR", "loss", "loss + AR"}


def test_an_ar_loss_that_cannot_be_is_refused(config, samples, tmp_path):
    args = TrainingArguments(tmp_path)
    for options, weight, message in [
        ({}, 0.5, r"reads from left to right.*=\"block_causal\": convert it with --context_attention causal"),
        ({"context_attention": "causal"}, -1.0, r"ar_loss_weight=-1\.0 is not a factor >= 0"),
        ({"context_attention": "causal"}, float("nan"), r"ar_loss_weight=nan is not a factor >= 0"),
    ]:
        with pytest.raises(bd3lm.InputError, match=message):
            bd3lm.BD3LMTrainer(tiny_model(**options), args, ar_loss_weight=weight)


def test_the_log_has_the_ar_loss_of_the_clean_stream(config, samples, tmp_path):
    config = causal(config)
    trainer = make_trainer(config, samples, tmp_path, logging_steps=1, per_device_train_batch_size=2)
    trainer.ar_loss_weight = 0.5
    model, total, count = tiny_model(**config.to_diff_dict()), 0.0, 0
    trainer.train()
    for row in samples.select(range(2)):  # those of the first step
        logits, labels = model(torch.tensor([row["input_ids"]])).logits[0, :-1], torch.tensor(row["labels"])
        total += F.cross_entropy(logits, labels[1:], reduction="sum").item()
        count += (labels != IGNORE).sum().item()
    assert trainer.state.log_history[0]["nll_clean"] == pytest.approx(total / count, rel=1e-4)


def test_cross_entropies_are_sorted_by_rate_not_by_weight():
    buckets, losses = RateBuckets(), torch.tensor([[1.0, 2.0, 3.0, 5.0, 7.0]])
    weights, rates = torch.full((1, 5), 3.0), torch.tensor([[0.1, 0.5, 0.55, 1.0, 0.9]])
    buckets.watch(weights, torch.tensor([[True, True, True, True, False]]), 0.5, rates)
    (weights * losses * 0.5)[:, :4].sum().backward()
    assert buckets.sums.tolist() == [[1, 0, 5, 0, 5, 0], [1, 0, 2, 0, 1, 0]]


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
    assert args.train_sampling_strategy == "group_by_length"
    assert bd3lm.parse_args(["--gradient_checkpointing", "false"])[1].gradient_checkpointing is False
    assert (data_args.noise_schedule, data_args.ar_loss_weight) == ("linear", 0)
    assert get_args(get_type_hints(bd3lm.DataArguments)["noise_schedule"]) == tuple(NOISE_SCHEDULES)
    assert args.use_cpu == (not torch.accelerator.is_available())  # or torchrun would train a model per process


def test_a_model_that_is_absent_or_not_converted_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        bd3lm.InputError, match=r"The model arclm-0\.8b cannot be loaded.*make it: python convert_a2d\.py"
    ):
        bd3lm.main([])
    (tmp_path / "other").mkdir()
    for files, message in {
        '{"model_type": "unheard_of"}': "The model other cannot be loaded: .*unheard_of",
        '{"model_type": "arclm"}': r"The model other cannot be loaded: it has no tokenizer\. Save that",
        "adapter": r"other is an adapter\. Give the model it was trained on, or merge it .*merge_and_unload",
    }.items():
        (tmp_path / "other" / ("adapter_config.json" if files == "adapter" else "config.json")).write_text(files)
        with pytest.raises(bd3lm.InputError, match=message):
            bd3lm.main(["--model_name_or_path", "other"])
    Qwen3_5TextConfig(num_hidden_layers=1).save_pretrained(tmp_path / "ar")
    file = write_lines(tmp_path / "train.jsonl", [chat("Hi.", "Hello.")])
    argv = ["--model_name_or_path", str(tmp_path / "ar"), "--train_file", file, "--output_dir", str(tmp_path / "out")]
    with pytest.raises(bd3lm.InputError, match=r'model of type "qwen3_5_text", not a converted one.*convert_a2d\.py'):
        bd3lm.main(argv)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--lora_rank -1", "--lora_rank -1 is less than 0"),
        ("--per_device_train_batch_size 0", "--per_device_train_batch_size 0 is less than 1"),
        ("--eval_strategy steps", "eval_dataset"),
        ("--report_to no_such_thing", "no_such_thing"),
        ("--dataset_split test", "--dataset_split and --dataset_config are of --dataset_name, which was not given"),
        ("--fp16 true", "--fp16: float16 is too narrow for the states of this model. Leave it out"),
        ("--remove_unused_columns true", "it would remove what the batches are made of"),
        ("--use_liger_kernel true", "its kernels do not know this model"),
        ("--label_smoothing_factor 0.1", "label_smoothing_factor would replace the loss"),
    ],
)
def test_options_that_cannot_be_are_a_sentence(options, message, nano_tokenizer, config, tmp_path):
    argv = [*make_inputs(tmp_path, config, nano_tokenizer), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(bd3lm.InputError, match=message):
        bd3lm.main([*argv, *options.split()])
    assert not (tmp_path / "out/model.safetensors").exists()


@pytest.mark.parametrize(("optimizer", "package"), [("adamw_8bit", "bitsandbytes"), ("adamw_torch_8bit", "torchao")])
def test_an_optimizer_without_its_package_is_a_sentence(optimizer, package, config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.optim", None)
    args = TrainingArguments(tmp_path, optim=optimizer)
    with pytest.raises(bd3lm.InputError, match=package):
        bd3lm.make_trainer(model=tiny_model(), args=args)


def test_with_blocks_of_one_and_all_masked_the_loss_is_the_parents(monkeypatch):
    """At every masking rate its mean is, see `test_noise_bd3lm.py`."""
    monkeypatch.setattr("arclm.noise_bd3lm.sample_t", lambda offset, uniforms, has_response: torch.ones_like(uniforms))
    model = tiny_model(block_size=1, context_attention="causal", right_shift_logits=True)
    parent = parent_of(model)
    ids = tokens(3, 21)
    labels = ids.masked_fill(torch.arange(21) < 1, IGNORE)
    noise = make_loss_inputs(ids, labels, model.config, (0, 0), [0, 1, 2])
    assert noise.pop("masking_rate").eq(1).all()
    loss, expected = model(ids, **noise).loss, parent(ids, labels=labels).loss
    expected.backward()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    weights = dict(model.named_parameters())
    for name, weight in parent.named_parameters():
        torch.testing.assert_close(weights[name].grad, weight.grad, rtol=1e-4, atol=1e-5)


def test_a_run_with_another_schedule_measures_on_the_rows_it_was_not_trained_on(
    nano_tokenizer, config, tmp_path, monkeypatch, capsys
):
    argv, calls = make_inputs(tmp_path, config, nano_tokenizer), []
    monkeypatch.setattr(bd3lm, "make_loss_inputs", lambda *args: calls.append(args) or make_loss_inputs(*args))
    options = f"--noise_schedule cosine --eval_rows 3 --max_steps 2 --output_dir {tmp_path / 'out'}"
    argv += options.split()
    bd3lm.main([*argv, "--per_device_train_batch_size", "5", "--gradient_accumulation_steps", "1"])
    lengths = {"cosine": [], "linear": []}
    for _, labels, _, _, rows, schedule in calls:
        lengths[schedule] += (labels != IGNORE).sum(1).tolist()
        assert len(rows) == (5 if schedule == "cosine" else 3)
    every = [(sample["labels"] != IGNORE).sum().item() for sample in all_samples(tmp_path, nano_tokenizer, config)]
    held_out = [every[i] for i in (0, 2, 5)]
    assert sorted(lengths["linear"]) == sorted(held_out)
    assert sorted(lengths["cosine"]) == sorted(2 * [every[i] for i in (1, 3, 4, 6, 7)])
    assert "held" in capsys.readouterr().out  # in the data table, where lines may break
    assert json.loads((tmp_path / "out/eval_results.json").read_text())["eval_loss"] > 0
    argv[-1] += "-again"
    with pytest.raises(bd3lm.InputError, match=r"--eval_rows 8 is outside \[1, 7\]: .*train.jsonl has 8 rows"):
        bd3lm.main([*argv, "--eval_rows", "8"])
    with pytest.raises(bd3lm.InputError, match=r"--eval_file and --eval_rows were given\. Give one"):
        bd3lm.main([*argv, "--eval_file", str(tmp_path / "train.jsonl")])


def all_samples(folder: Path, tokenizer, config):
    rows = read_rows(str(folder / "train.jsonl"))
    return load_samples(rows, tokenizer, config, max_length=64)[0].with_format("torch")


@pytest.mark.parametrize("error", [None, OSError("401"), HTTPError("401")])  # the last one where there is no network
def test_push_to_hub_uploads_whole_models(error, nano_tokenizer, config, tmp_path, monkeypatch):
    argv, out, pushed = make_inputs(tmp_path, config, nano_tokenizer), tmp_path / "out", []

    def upload(self, *, folder_path, ignore_patterns, commit_message, run_as_future=False, delete_patterns=(), **_):
        assert ("training_args.bin" in delete_patterns) == (commit_message == "End of training")
        assert os.environ["HF_TOKEN"] == "hf_secret"
        copy = tmp_path / f"copy{len(pushed)}"
        shutil.copytree(folder_path, copy, ignore=shutil.ignore_patterns(*ignore_patterns))
        pushed.append((commit_message, copy))
        if error and not run_as_future:
            raise error
        return Mock()

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: Mock(repo_id="me/arclm"))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    monkeypatch.setenv("HF_TOKEN", "")  # what the run sets ends with this test
    argv += [
        "--push_to_hub",
        "true",
        "--hub_token=hf_secret",
        "--max_steps",
        "2",
        "--save_steps",
        "1",
        "--output_dir",
        str(out),
    ]
    message = r"out is complete, but its upload to me/arclm failed \(401\)\. "
    message += r'.*`hf upload me/arclm .*out --exclude "_\*" --exclude "checkpoint-\*" --exclude "training_args\.bin"`'
    with pytest.raises(OSError, match=message) if error else nullcontext():
        bd3lm.main(argv)
    assert [message for message, _ in pushed][::2] == ["Training in progress, step 1", "End of training"]
    code = {"modeling_arclm.py", *(Path(file).name for file in get_relative_import_files(ROOT / "modeling_arclm.py"))}
    for _, copy in (pushed[0], pushed[-1]):
        assert AutoModel.from_pretrained(copy, trust_remote_code=True).config.auto_map["AutoModel"]
        assert AutoTokenizer.from_pretrained(copy).chat_template
        files = {file.name for file in copy.iterdir()}
        assert {"generation_config.json", *code} <= files
    assert {"README.md", "training.md", "training.png"} <= files
    assert 'path = "me/arclm"' in (out / "README.md").read_text()
    assert not files & {"training_args.bin", "checkpoint-2"}
    everything = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not [file for file in everything if b"hf_secret" in file.read_bytes()]
    assert "--hub_token=TOKEN" in (out / "training.md").read_text()


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
    options |= {"per_device_train_batch_size": 2, "optim": "adamw_torch", "learning_rate": 1e-2, "logging_steps": 2}
    keys = []
    monkeypatch.setattr(bd3lm, "make_loss_inputs", lambda *args: keys.append(args[3]) or make_loss_inputs(*args))
    whole = make_trainer(config, samples, tmp_path, **options)
    whole.train()
    resumed = make_trainer(config, samples, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert keys == [(42, 0), (42, 1), (42, 2), (42, 3), (42, 3)]
    for expected, weight in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(expected, weight)
    logged = [
        [(log["step"], log["loss"]) for log in run.state.log_history if "loss" in log] for run in (whole, resumed)
    ]
    assert [step for step, _ in logged[0]] == [2, 3, 4]
    assert logged[0] == logged[1]
