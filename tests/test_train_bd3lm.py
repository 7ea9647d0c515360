"""Noise, data and trainer of train_bd3lm.py, and one small run of the whole script."""

import json
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config, tiny_model
from datasets import Dataset
from safetensors import safe_open
from transformers import AutoModel, AutoTokenizer, TrainingArguments
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig

from arclm import train_bd3lm as bd3lm
from arclm.nano.build_tokenizer import build_tokenizer
from arclm.nano.world import generate_tasks, to_row
from arclm.train_bd3lm import IGNORE, collate, draw_uniforms, load_samples, make_loss_inputs, make_sample, read_rows


# distinct primes: a confused dimension cannot pass by luck
B, N, L, MASK = 2, 3, 5, 11
QWEN = Path(__file__).resolve().parents[2] / "shared" / "data" / "tokenizer_qwen3_5_like"


@pytest.fixture(scope="module")
def nano_tokenizer():
    tokenizer = build_tokenizer(num_tasks=100)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|mask|>"]})
    return tokenizer


@pytest.fixture(scope="module", params=["nano", "qwen"])
def tokenizer(request, nano_tokenizer):
    if request.param == "nano":
        return nano_tokenizer
    if not QWEN.is_dir():
        pytest.skip(f"{QWEN} is absent: it is not part of the repository")
    return AutoTokenizer.from_pretrained(QWEN)


@pytest.fixture(scope="module")
def config(nano_tokenizer):
    ids = {"mask_token_id": nano_tokenizer.convert_tokens_to_ids("<|mask|>")}
    ids |= {"eos_token_id": nano_tokenizer.eos_token_id, "pad_token_id": nano_tokenizer.pad_token_id}
    layers = {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2}
    return tiny_config(vocab_size=len(nano_tokenizer) + 3, block_size=8, **ids, **layers)


def chat(*turns: str, **row) -> dict:
    """A row of user and assistant turns in alternation."""
    roles = ["user", "assistant"] * len(turns)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)], **row}


def write_lines(path: Path, rows: list) -> str:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


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


# ---- Data


def test_the_last_block_is_filled_with_the_end_token():
    sample = make_sample([1, 2, 3], [4, 5, 6, 99], block_size=5, max_length=20, end_token_id=99)
    assert sample["input_ids"] == [1, 2, 3, 4, 5, 6, 99, 99, 99, 99]
    assert sample["labels"] == [IGNORE] * 3 + [4, 5, 6, 99, 99, 99, 99]
    assert (sample["length"], sample["response_tokens"], sample["outcome"]) == (10, 7, "whole")
    # one that ends with its block gets none
    assert make_sample([1], [4, 5, 6, 99], 5, 5, 99)["input_ids"] == [1, 4, 5, 6, 99]


def test_a_cut_sample_has_no_end_token():
    sample = make_sample([1, 2, 3], [4, 5, 6, 99], 3, 6, 99)
    expected = ([1, 2, 3, 4, 5, 6], [IGNORE] * 3 + [4, 5, 6], "cut")
    assert (sample["input_ids"], sample["labels"], sample["outcome"]) == expected
    with pytest.raises(bd3lm.BadRowError, match="prompt over max_length"):
        make_sample([1, 2, 3], [4, 99], 3, 3, 99)


def test_collate_pads_on_the_right_outside_attention_and_loss():
    samples = [make_sample(prompt, [*end, 99], 2, 8, 99) for prompt, end in [([1], [4]), ([1, 2], []), ([1], [])]]
    batch = collate([sample | {"row": i} for i, sample in enumerate(samples)], pad_token_id=7)
    assert batch["input_ids"].tolist() == [[1, 4, 99, 99], [1, 2, 99, 99], [1, 99, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1] * 4, [1] * 4, [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 4, 99, 99], [IGNORE] * 2 + [99] * 2, [IGNORE, 99, IGNORE, IGNORE]]
    assert batch["row"].tolist() == [0, 1, 2]


CALL = {"type": "function", "function": {"name": "get_time", "arguments": '{"city": "Rome", "count": 3}'}}
TOOLS = [{"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}]
THINKING = [{"role": "user", "content": "Add 1 and 2."}]
THINKING.append({"role": "assistant", "reasoning_content": "1+2=3", "content": "The sum is 3."})
CALLING = [{"role": "user", "content": "The time?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
CALL_TEXT = (
    "<tool_call>\n<function=get_time>\n<parameter=city>\nRome\n</parameter>\n<parameter=count>\n3\n</parameter>\n"
    "</function>\n</tool_call><|im_end|>"
)
SPLITS = {
    "no thinking": (chat("Hi.", "Hello."), False, "Hello.<|im_end|>"),
    "thinking": ({"messages": THINKING}, True, "1+2=3\n</think>\n\nThe sum is 3.<|im_end|>"),
    "thinking in the text": (chat("Hi.", "<think>\na\n</think>\n\nHello."), True, "a\n</think>\n\nHello.<|im_end|>"),
    "said to think": (chat("Hi.", "Hello.", enable_thinking=True), True, "\n</think>\n\nHello.<|im_end|>"),
    "call": ({"messages": CALLING, "tools": json.dumps(TOOLS)}, False, CALL_TEXT),
}


@pytest.mark.parametrize("case", SPLITS)
def test_prompt_and_response_are_what_generate_sees(tokenizer, case):
    row, thinking, expected = SPLITS[case]
    ((prompt, response),) = bd3lm.split_turns(row, tokenizer)
    assert response == expected
    options = {"tools": TOOLS if "tools" in row else None, "enable_thinking": thinking, "return_dict": True}
    seen = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, **options)
    assert tokenizer(prompt, add_special_tokens=False).input_ids == seen["input_ids"]
    assert prompt.endswith("<|im_start|>assistant\n<think>\n" + ("" if thinking else "\n</think>\n\n"))


def test_every_assistant_turn_is_a_sample(tokenizer):
    messages = chat("Hi.", "Hello.", "Bye.", "See you.", "Left over.")["messages"]
    turns = bd3lm.split_turns({"messages": messages}, tokenizer)
    assert [response for _, response in turns] == ["Hello.<|im_end|>", "See you.<|im_end|>"]
    for count, (prompt, _) in zip([1, 3], turns, strict=True):
        assert prompt == tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=True)


def test_rows_of_the_nano_world_are_read_back_as_their_text(nano_tokenizer, config, tmp_path):
    tasks = [task for task, _ in zip(generate_tasks("train", 3), range(40), strict=False)]
    rows = read_rows(write_lines(tmp_path / "train.jsonl", [to_row(task) for task in tasks]), None, "")
    samples, counts = load_samples("train", rows, nano_tokenizer, config, 512)
    assert (counts["samples"], counts["dropped"], counts["cut"]) == (40, 0, 0)
    for task, sample in zip(tasks, samples, strict=True):
        assert len(sample["input_ids"]) == len(sample["labels"]) == sample["length"]
        text = nano_tokenizer.apply_chat_template(task.messages, tools=task.tools, tokenize=False)
        read = nano_tokenizer.decode(sample["input_ids"])
        # after the last end token the template has a newline, the sample as many end tokens as the block takes
        assert read.startswith(text.rstrip("\n"))
        assert set(read[len(text.rstrip("\n")) :].split("<|im_end|>")) <= {""}


BAD_ROWS = [
    (b"{broken", "not JSON"),
    (b'{"messages": "\xff"}', "not JSON"),
    ([1, 2], "no list of messages"),
    ({"text": "Hi."}, "no list of messages"),
    ({"messages": ["Hi."]}, "no list of messages"),
    (chat("Hi."), "no assistant turn"),
    ({"messages": [{"role": "assistant", "content": "Hello."}]}, "refused by the chat template"),
    ({"messages": [*THINKING, {"role": "system", "content": "Late."}, *THINKING]}, "refused by the chat template"),
    ({"messages": CALLING, "tools": "[broken"}, "refused by the chat template"),
    (chat("Hi.", ""), "empty response"),
    ({"messages": THINKING, "enable_thinking": False}, "turn without the generation prompt"),
    (chat("Hi.", "Say <|mask|>."), "contains the mask token"),
    (chat("Hi." * 99, "Hello."), "prompt over max_length"),
]


def test_malformed_rows_are_counted_and_never_fatal(nano_tokenizer, config, tmp_path):
    rows = [row for row, _ in BAD_ROWS]
    file = write_lines(tmp_path / "train.jsonl", [*rows, chat("Hi.", "Hello."), b"", chat("Hi.", "Hello. " * 99)])
    samples, counts = load_samples("train", read_rows(file, None, ""), nano_tokenizer, config, 67)
    assert (counts["rows"], counts["samples"], counts["cut"]) == (len(rows) + 2, 2, 1)
    assert counts["dropped"] == len(rows)
    reasons = Counter(reason for _, reason in BAD_ROWS)
    assert set(counts["why"].split(", ")) == {f"{count} {reason}" for reason, count in reasons.items()}
    assert max(samples["length"]) == 64  # 67 rounded down to whole blocks
    assert samples["row"][:] == [0, 1]


def test_keys_that_arrow_filled_with_none_do_not_reach_the_template(nano_tokenizer, config):
    call = {"function": {"name": "get_time", "arguments": {"city": "Rome"}}}
    other = {"function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    rows = [{"messages": [CALLING[0], {"role": "assistant", "tool_calls": [c]}]} for c in (call, other)]
    samples, _ = load_samples("train", Dataset.from_list([*rows, chat("Hi.", "Hello.")]), nano_tokenizer, config, 512)
    texts = [nano_tokenizer.decode(ids) for ids in samples["input_ids"]]
    assert len(texts) == 3
    assert not any("None" in text or "null" in text for text in texts)


def test_unusable_data_is_said_in_a_sentence(nano_tokenizer, config, tmp_path):
    with pytest.raises(bd3lm.InputError, match=r"nothing to train on\. Give --train_file .* or --dataset_name"):
        read_rows(None, None, "train")
    with pytest.raises(bd3lm.InputError, match=r"absent\.jsonl does not exist\. Give a JSONL file"):
        read_rows(str(tmp_path / "absent.jsonl"), None, "")
    rows = read_rows(write_lines(tmp_path / "bad.jsonl", [b"{", chat("Hi.")]), None, "")
    with pytest.raises(bd3lm.InputError, match="Nothing in the train data can be used: 1 not JSON, 1 no assistant"):
        load_samples("train", rows, nano_tokenizer, config, 64)
    empty = read_rows(write_lines(tmp_path / "empty.jsonl", []), None, "")
    with pytest.raises(bd3lm.InputError, match=r"Nothing in the eval data can be used: it is empty"):
        load_samples("eval", empty, nano_tokenizer, config, 64)
    with pytest.raises(bd3lm.InputError, match=r"max_length=7 is shorter than a block\. Give --max_length 8 or more"):
        load_samples("train", rows, nano_tokenizer, config, 7)


def test_a_dataset_without_messages_names_its_columns(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "alpaca").mkdir()
    write_lines(tmp_path / "alpaca" / "train.jsonl", [{"instruction": "Hi.", "output": "Hello."}])
    with pytest.raises(bd3lm.InputError, match=r"has the columns instruction, output\. A column messages"):
        read_rows(None, str(tmp_path / "alpaca"), "train")
    (tmp_path / "chats").mkdir()
    write_lines(tmp_path / "chats" / "train.jsonl", [chat("Hi.", "Hello.")] * 3)
    assert len(read_rows(None, str(tmp_path / "chats"), "train[:2]")) == 2


# ---- Trainer


def make_trainer(config, samples, folder, **options) -> bd3lm.BD3LMTrainer:
    """A trainer whose single step of plain gradient descent with rate 1 leaves the gradient as the difference."""
    step = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0}
    step |= {"train_sampling_strategy": "sequential", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    args = TrainingArguments(folder, remove_unused_columns=False, dataloader_pin_memory=False, **{**step, **options})
    collator = partial(collate, pad_token_id=config.pad_token_id)
    model = tiny_model(**config.to_diff_dict())
    return bd3lm.BD3LMTrainer(model, args, train_dataset=samples, eval_dataset=samples, data_collator=collator)


@pytest.fixture(scope="module")
def samples(nano_tokenizer, config, tmp_path_factory):
    # answers of very different lengths: a mean of means is far from the mean
    rows = [chat("Write.", " ".join(["kato"] * count)) for count in (1, 40, 2, 9, 30, 1, 3, 20)]
    file = write_lines(tmp_path_factory.mktemp("data") / "train.jsonl", rows)
    return load_samples("train", read_rows(file, None, ""), nano_tokenizer, config, 256)[0]


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


def test_the_defaults_are_the_run_of_the_card(tmp_path):
    argv = ["--model_name_or_path", "x", "--output_dir", str(tmp_path)]
    data_args, args = bd3lm.parse_args(argv)
    assert (args.learning_rate, args.warmup_steps, args.num_train_epochs, args.max_grad_norm) == (5e-5, 200, 10, 0.5)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (1, 16)
    assert (data_args.max_length, args.gradient_checkpointing) == (2048, True)
    assert args.optim.startswith("adamw")
    assert bd3lm.parse_args([*argv, "--gradient_checkpointing", "false"])[1].gradient_checkpointing is False
    assert args.use_cpu == (not torch.accelerator.is_available())  # or torchrun would train a model per process


def test_a_model_that_was_not_converted_is_named(tmp_path):
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
    nano_tokenizer.save_pretrained(source)
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
