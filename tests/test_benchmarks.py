"""The measuring functions of the speed benchmarks, on a tiny model: what they count, not how fast it is."""

import json
import subprocess
import sys
from math import isfinite
from shutil import which
from types import SimpleNamespace

import common
import generate_speed
import loss_memory
import optimizers
import pytest
import scaling
import torch
import train_memory
import train_speed
from captures import Rerun
from conftest import tiny_config, tiny_model, tokens

from arclm import graphs_arclm


SHAPE = tiny_config(layer_types=["linear_attention", "full_attention"], num_hidden_layers=2).to_dict()
BLOCK = 16


@pytest.fixture(autouse=True)
def memory_of_this_process(monkeypatch):
    """Count memory here: a process of its own takes seconds to start."""

    def peak(_, prepare, *args):
        return common.peak_resident(1, prepare, *args)

    for module in (train_speed, scaling):
        monkeypatch.setattr(module, "peak_memory", peak)


@pytest.fixture(params=[(1e9, 1e12), (1e12, 1e6)], ids=["slow arithmetic", "slow memory"])
def limits(request, monkeypatch):
    """Operations and bytes per second of a machine that is slow at one of the two."""
    monkeypatch.setattr(generate_speed, "measure_limits", lambda *_: lambda: request.param)
    return common.Limits(*request.param)


class FakeSampler:
    """Stands for dLLM's sampler: reads the prompt, then one block per step."""

    def __init__(self, model, tokenizer):
        self.model = model
        assert tokenizer.mask_token_id == SHAPE["mask_token_id"]

    @torch.no_grad()
    def sample(self, prompts, *, block_size, steps, **_):
        self.model(torch.stack(prompts))
        for _ in range(steps):
            self.model(prompts[0][None, :block_size])


def assert_positive(row: dict, but: tuple[str, ...] = ()) -> None:
    numbers = {name: value for name, value in row.items() if isinstance(value, int | float) or value is None}
    wrong = {name: value for name, value in numbers.items() if value is None or not isfinite(value) or value <= 0}
    assert set(wrong) == set(but), f"not finite and positive: {wrong}"


def test_a_row_of_generate_speed_has_every_number(limits):
    model = common.make_arclm(SHAPE, "cpu", torch.float32)
    prompts = tokens(2, 3 * BLOCK)
    peer = SimpleNamespace(BD3LMSampler=FakeSampler)
    sizes = {"new_tokens": BLOCK, "tokens_per_step": 4, "repeats": 2}
    row = generate_speed.measure(model, common.make_parent(model), prompts, peer, **sizes)
    assert_positive(row)
    assert (row["batch"], row["context"], row["steps"]) == (2, 3 * BLOCK, 4)
    assert row["arclm_step_ms"] < 1e3 * row["arclm_s"]

    # by hand: weights, and for each of 2 rows 48 columns of keys and values, a recurrent and a convolution state
    parameters = sum(weight.numel() for weight in model.parameters())
    cache = 2 * (2 * 3 * 48 * 24 + 4 * 10 * 14 + 4 * (2 * 2 * 10 + 4 * 14))
    seconds = max(2 * parameters * 2 * BLOCK / limits.flops, 4 * (parameters + cache) / limits.bandwidth)
    assert row["floor_ms"] == pytest.approx(1e3 * seconds)


def test_without_a_peer_its_numbers_are_left_out(capsys):
    assert common.load_dllm(None, "dllm.core.samplers.bd3lm") is None
    assert "dLLM is left out" in capsys.readouterr().out
    model = common.make_arclm(SHAPE, "cpu", torch.float32)
    parent, sizes = common.make_parent(model), {"new_tokens": BLOCK, "tokens_per_step": 8, "repeats": 1}
    row = generate_speed.measure(model, parent, tokens(1, BLOCK), None, **sizes)
    assert_positive(row, but=("dllm_s", "dllm_step_ms", "step_over_dllm", "s_over_dllm"))
    assert not model._forward_pre_hooks
    assert not parent._forward_pre_hooks


def test_rows_tell_what_was_captured_and_what_more_rows_cost(monkeypatch):
    monkeypatch.setitem(graphs_arclm.CAPTURES, "cpu", Rerun)
    monkeypatch.setattr(graphs_arclm, "MAX_COLUMNS", 2 * graphs_arclm.MIN_COLUMNS)
    monkeypatch.setattr(common, "SHAPES", {"tiny": SHAPE})
    knobs = {"shapes": ["tiny"], "batch_sizes": [1, 3], "contexts": [BLOCK, 2 * BLOCK], "new_tokens": 2 * BLOCK}
    args = generate_speed.SpeedArguments(device="cpu", long_row=False, repeats=1, **knobs)
    rows = list(generate_speed.measure_shape("tiny", None, args))
    # every row captures anew: the first one's graphs would do for the third. Those of three rows are too large
    assert [row["captured"] for row in rows] == [1, 0, 1, 0]
    assert [row["capture_s"] is None for row in rows] == [False, True, False, True]
    assert [row["step_over_batch_1"] == 1 for row in rows] == [True, False, True, False]
    assert rows[3]["step_over_batch_1"] == pytest.approx(rows[3]["arclm_step_ms"] / rows[2]["arclm_step_ms"])


def test_on_a_gpu_the_cards_rows_come_first_with_their_targets():
    knobs = {"batch_sizes": [1, 16], "contexts": [64]}
    args = generate_speed.SpeedArguments(device="cuda", **knobs)
    card = generate_speed.CARD_TARGETS
    cases = generate_speed.cases_of("0.8b", args)
    assert cases[:3] == [(1, 1024, 256, 1, card[1, 1]), (1, 1024, 256, 4, card[1, 4]), (16, 1024, 256, 4, card[16, 4])]
    assert [case[:3] for case in cases[3:]] == [(1, 64, 64), (16, 64, 64), (1, 4096, 256)]
    assert not any(case[-1] for case in cases[3:] + generate_speed.cases_of("hidden256", args))
    cases = generate_speed.cases_of("hidden256", generate_speed.SpeedArguments(device="cpu", **knobs))
    assert [case[-1]["s_over_dllm"] for case in cases] == [1.0, 1.0, 1 / 3]


def test_the_first_call_costs_imports_and_what_it_is_slower_by():
    found = generate_speed.measure_first_call(SHAPE, "cpu")
    assert found["import_s"] > 0.5  # torch and transformers
    assert found["cost_s"] == pytest.approx(found["import_s"] + found["first_s"] - found["second_s"])
    assert found["make_s"] < found["import_s"]


def test_a_directory_without_dllm_is_named(tmp_path):
    with pytest.raises(SystemExit, match="is no checkout of dLLM: dllm/core is not there"):
        common.load_dllm(str(tmp_path), "dllm.core.samplers.bd3lm")


def test_an_unknown_shape_is_named():
    with pytest.raises(SystemExit, match=r"shape '8b' is unknown\. Choose among nano, hidden256, 0\.8b"):
        common.make_config("8b")


def test_the_parent_has_the_weights_and_the_function_of_the_model():
    model = tiny_model(context_attention="causal")
    parent = common.make_parent(model)
    assert parent.model.embed_tokens.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert parent.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    x = tokens(2, 37)
    with torch.no_grad():
        assert (parent(x).logits - model(x).logits).abs().max() < 1e-4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_row_of_train_speed_has_every_number(checkpointing):
    row = train_speed.measure(SHAPE, (2, 3 * BLOCK, 0.5), "cpu", None, repeats=2, checkpointing=checkpointing)
    assert row.pop("gradient_checkpointing") is checkpointing
    left_out = ("dllm_s", "dllm_tokens_per_s", "dllm_peak_mb", "s_over_dllm", "peak_over_dllm")
    assert_positive(row, but=left_out)
    assert row["arclm_tokens_per_s"] == pytest.approx(2 * 3 * BLOCK / row["arclm_s"])
    assert row["arclm_utilisation"] < 1
    assert row["s_over_floor"] == pytest.approx(1 / row["arclm_utilisation"])


@pytest.mark.parametrize(
    ("row", "targets"),
    [
        (("0.8b", 1, 2048, "cuda"), {"s_over_dllm": 1 / 2}),
        (("0.8b", 4, 2048, "cuda"), {"s_over_floor": 2.5}),
        (("0.8b", 1, 512, "cuda"), {}),
        (("hidden256", 1, 2048, "cuda"), {}),
        (("hidden256", 4, 512, "cpu"), {"s_over_dllm": 2 / 3}),
        (("0.8b", 1, 2048, "cpu"), {}),
    ],
)
def test_rows_of_train_speed_with_targets(row, targets):
    assert train_speed.targets_of(*row) == targets


def test_the_operations_of_a_training_step_by_hand():
    model = tiny_model(**SHAPE)
    weights = sum(weight.numel() for weight in model.parameters()) - SHAPE["vocab_size"] * SHAPE["hidden_size"] * (
        1 if SHAPE["tie_word_embeddings"] else 2
    )
    head, pair = SHAPE["vocab_size"] * SHAPE["hidden_size"], 2 * SHAPE["num_attention_heads"] * SHAPE["head_dim"]
    # 40 clean tokens, 10 noisy ones of which 5 are masked; those at 30 to 39 meet the keys before them once more
    pairs = sum(range(40)) + 20 + sum(range(30, 40)) + 5
    needed = weights * 50 + head * 5 + pair * pairs
    # without shifted logits nothing asks for what the last MLP makes of the clean tokens
    mlp = sum(weight.numel() for weight in model.model.layers[-1].mlp.parameters())
    for shift, operations in ((False, needed - mlp * 40), (True, needed)):
        model.config.right_shift_logits = shift
        assert train_speed.model_flops(model, (3, 40, 0.25)) == pytest.approx(6 * 3 * operations)


def test_the_card_run_in_small_is_weighed(tmp_path, monkeypatch):
    options = ["--shape", "nano", "--max_length", "64", "--output_file", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["train_memory.py", *options])
    train_memory.main()
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert 100 < row["peak_mb"] < 20_000
    assert row["tokens_per_s"] > 1
    assert len(row["loss"]) == 2
    assert all(3 < loss < 20 for loss in row["loss"])


def test_both_losses_are_the_same_and_weighed(monkeypatch):
    for name, value in {"TARGETS": 32, "HIDDEN": 16, "VOCABULARY": 500}.items():
        monkeypatch.setattr(loss_memory, name, value)
    for dtype, bound in (("float32", 1e-6), ("bfloat16", 1e-2)):
        rows = {name: loss_memory.measure(name, dtype)["loss"] for name in loss_memory.LOSSES}
        assert rows["plain"] == pytest.approx(rows["linear_cross_entropy"], rel=bound)
    sizes = {"plain": 45, "linear_cross_entropy": 10}
    rows = {name: {"peak_mb": peak, "gradient_mb": 5} for name, peak in sizes.items()}
    assert (loss_memory.ratio(rows), loss_memory.ratio(rows, "gradient_mb")) == (4.5, 8)


@pytest.mark.parametrize("name", [name for name, row in optimizers.ROWS.items() if row.package == "torch"])
def test_every_optimizer_and_lora_takes_a_step(name):
    step = optimizers.prepare(optimizers.ROWS[name], SHAPE, 2 * BLOCK, "cpu")
    first = step()
    assert isfinite(first)
    assert isfinite(step())


def test_the_training_step_trains_on_the_response_alone():
    config = tiny_config()
    x_0, labels = train_speed.random_rows(config, 3, 40, 0.25, "cpu")
    assert (labels[:, :30] == -100).all()
    assert torch.equal(labels[:, 30:], x_0[:, 30:])
    model = tiny_model()
    before = [weight.clone() for weight in model.parameters()]
    step = train_speed.training_step(model, train_speed.arclm_loss(model, x_0[:, :32], x_0[:, :32]), "cpu")
    assert isfinite(step())
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_rows_of_scaling_have_every_number(monkeypatch):
    monkeypatch.setattr(scaling, "BASE", {kind: {"context": 32, "batch": 1} for kind in scaling.PREPARE})
    args = scaling.ScalingArguments(contexts=[32, 48], lengths=[32, 48], batch_sizes=[1, 3], repeats=1, device="cpu")
    result, saved = {}, []
    scaling.measure_shape(SHAPE, args, result, lambda: saved.append(len(result["rows"])))
    values = {"context": [32, 48], "batch": [1, 3], "block": [4, 8, 16]}
    for kind, but in (("denoise", ()), ("train", ("cache_mb",))):
        for axis in scaling.AXES:
            rows = [row for row in result["rows"] if (row["step"], row["axis"]) == (kind, axis)]
            assert [row[axis] for row in rows] == values[axis]
            for row in rows:
                assert_positive(row, but)
            if (kind, axis) == ("denoise", "batch"):
                assert rows[1]["cache_mb"] == pytest.approx(3 * rows[0]["cache_mb"])
    assert saved == [2, 4, 7, 9, 11, 14]
    assert len(result["exponents"]) == 6


def test_exponents_of_known_laws():
    n = [64, 256, 1024, 4096]
    assert common.exponent(n, [3 * x**2 for x in n]) == pytest.approx(2.0)
    rows = [{"step": "denoise", "axis": "context", "context": x} for x in n]
    # a constant, then proportional
    rows = [row | {"step_ms": max(1024, row["context"]), "peak_mb": 5, "cache_mb": None} for row in rows]
    fits = scaling.fit(rows)
    assert 0.29 < fits["step_ms"] < fits["step_ms_upper"] < 1
    assert fits["peak_mb"] == pytest.approx(0)
    assert fits["cache_mb"] is None


def test_the_floor_is_the_slower_of_arithmetic_and_reading():
    limits = common.Limits(flops=6, bandwidth=500)
    assert common.floor_seconds(10, 3, 1000, limits) == 10  # 2 x 10 x 3 / 6
    assert common.floor_seconds(10, 3, 10_000, limits) == 20  # 10,000 / 500


def test_contestants_take_turns_and_one_without_memory_leaves():
    calls = []

    def contestant(name):
        calls.append(name)
        if name == "b" and calls.count("b") == 2:
            raise torch.OutOfMemoryError
        return len(calls)

    results = common.interleave({name: lambda name=name: contestant(name) for name in "abc"}, 2)
    assert calls == list("abcabcac")
    assert results == {"a": [4, 7], "b": [], "c": [6, 8]}
    assert common.median(results["b"]) is None
    assert common.median([(1, 10), (3, 40), (2, 20)]) == [2, 20]


def test_the_clock_tells_a_pass_from_the_call():
    class Model(torch.nn.Module):
        def forward(self, seconds):
            generate_speed.time.sleep(seconds)

    model = Model()
    clock = generate_speed.StepClock(model, "cpu")
    seconds, step = clock.run(lambda: [model(x) for x in (0.2, 0.15, 0.02)], passes=1)
    assert 0.37 <= seconds < 0.6
    assert 0.02 <= step < 0.1


def keep_50_mb():
    """Return a function that takes 20 MB more."""
    kept = torch.ones(50 * 10**6 // 4)
    return lambda: float(torch.ones(20 * 10**6 // 4).sum() + kept[0])


def test_peak_memory_counts_what_is_kept_and_what_a_call_takes():
    assert 69e6 < common.peak_resident(1, keep_50_mb) < 80e6


def test_targets_stand_beside_the_numbers(capsys):
    row = common.check_targets(
        {"a_over_b": 0.5, "b_over_c": 3.0, "none": None}, {"a_over_b": 1, "b_over_c": 2, "none": 1}
    )
    assert row["targets"] == {"a_over_b": {"at_most": 1, "met": True}, "b_over_c": {"at_most": 2, "met": False}}
    common.print_table("title", [row])
    printed = capsys.readouterr().out
    assert "0.5 yes (<= 1)" in printed
    assert "3 NO (<= 2)" in printed


def test_result_files_have_four_digits(tmp_path):
    common.write_record({"rows": [{"x": 1234.5678, "n": 123456, "none": None}]}, tmp_path / "x.json")
    assert '"x": 1235.0' in (tmp_path / "x.json").read_text()
    record = common.start_record("what", "cpu")
    assert record["hardware"]["cores"] >= 1
    assert set(record["versions"]) == {"python", "torch", "transformers"}


# stands for Python, on a machine where the GPU tests fail and a package is missing
PYTHON = """#!/bin/sh
echo "$@" >> {log}
case "$*" in
  *pytest*) exit 1;;
  *train_memory.py\\ --help) echo Traceback; echo "ModuleNotFoundError: No module named 'datasets'"; exit 1;;
esac
"""


@pytest.mark.skipif(which("make") is None, reason="make is not installed")
def test_make_gpu_goes_on_after_a_failure(tmp_path, monkeypatch):
    monkeypatch.delenv("MAKEFLAGS", raising=False)  # those of a `make test` around this one
    (tmp_path / "Makefile").symlink_to(common.ROOT / "Makefile")
    log, python = tmp_path / "log", tmp_path / "python"
    python.write_text(PYTHON.format(log=log))
    python.chmod(0o755)
    command = ["make", "gpu", "VENV=", f"PYTHON={python}", "DLLM=../dllm", "OUT=out"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode != 0
    assert "train_memory cannot start: ModuleNotFoundError: No module named 'datasets'" in run.stdout
    scripts = [line for line in log.read_text().splitlines() if "--output_file" in line]
    assert scripts == [
        f"benchmarks/{name}.py --output_file out/{name}_gpu.json{more}"
        for name, more in [
            ("denoising_step", ""),
            *((name, " --dllm ../dllm") for name in ("generate_speed", "train_speed")),
            *((name, "") for name in ("optimizers", "scaling")),
        ]
    ]
    assert subprocess.run([*command, "GPU_SCRIPTS=scaling"], cwd=tmp_path, capture_output=True).returncode == 0


def test_make_gpu_runs_every_file_with_gpu_tests():
    paths = common.ROOT.glob("tests/test_*.py")
    files = {path.name for path in paths if "pytest.mark." + "gpu" in path.read_text(encoding="utf-8")}
    assert files == {path.name for path in common.ROOT.glob("tests/test_*gpu.py")}
