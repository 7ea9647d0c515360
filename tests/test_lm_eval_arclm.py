"""Log-likelihoods in lm-evaluation-harness: against a loop over tokens, against the parent, and on arcLM-nano."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import MASK, tiny_model, tokens
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from reference import parent_of

from arclm.lm_eval_arclm import ArcLMEval


ROOT = Path(__file__).resolve().parents[1]
NANO = ROOT / "nano" / "arclm-nano"
KINDS = list(itertools.product(["block_causal", "causal"], [False, True]))
# (context, continuation) in tokens, for blocks of 8: inside a block, up to its end, from its start, over several
LENGTHS = [(3, 2), (3, 5), (3, 6), (1, 8), (8, 1), (7, 1), (16, 3), (19, 25), (40, 11)]
BLOCK_SIZE = 8


@pytest.fixture
def evaluator(nano_tokenizer):
    """Put a model into the harness."""
    return lambda model, **options: ArcLMEval(model, tokenizer=nano_tokenizer, **options)


def make_requests(lengths: list[tuple[int, int]], seed: int = 0) -> list[tuple]:
    """One request per pair of lengths, each with tokens of its own."""
    rows = [tokens(1, sum(pair), seed=seed + i)[0].tolist() for i, pair in enumerate(lengths)]
    return [(None, row[:context], row[context:]) for row, (context, _) in zip(rows, lengths, strict=True)]


def reference(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Token by token: commit the blocks before it, then read its block, masked from it on."""
    ids, block_size = torch.tensor([context + continuation]), model.config.block_size
    log_prob, is_greedy = 0.0, True
    for position in range(len(context), ids.shape[1]):
        start = position // block_size * block_size
        cache = model(ids[:, :start], use_cache=True).past_key_values if start else None
        masks = torch.full((1, start + block_size - position), MASK)
        noisy = torch.cat((ids[:, start:position], masks), 1)
        scores = model(noisy_input_ids=noisy, past_key_values=cache).logits[0, position - start]
        scores[MASK] = -torch.inf
        log_prob += float(scores.log_softmax(-1)[ids[0, position]])
        is_greedy &= bool(scores.argmax() == ids[0, position])
    return log_prob, is_greedy


def log_probs(results: list[tuple[float, bool]]) -> torch.Tensor:
    return torch.tensor([log_prob for log_prob, _ in results])


@pytest.mark.parametrize(("context_attention", "right_shift_logits"), KINDS)
@torch.no_grad()
def test_log_likelihoods_are_those_of_a_loop_over_tokens(evaluator, context_attention, right_shift_logits):
    model = tiny_model(
        block_size=BLOCK_SIZE, context_attention=context_attention, right_shift_logits=right_shift_logits
    )
    requests = make_requests(LENGTHS)
    results = evaluator(model, batch_size=4)._loglikelihood_tokens(requests, disable_tqdm=True)
    expected = [reference(model, context, continuation) for _, context, continuation in requests]
    assert (log_probs(results) - log_probs(expected)).abs().max() < 1e-3
    assert [is_greedy for _, is_greedy in results] == [is_greedy for _, is_greedy in expected]


def test_batches_of_1_and_4_give_the_same(evaluator):
    model = tiny_model(block_size=BLOCK_SIZE)
    requests = make_requests(LENGTHS, seed=20)
    one, four = (evaluator(model, batch_size=size)._loglikelihood_tokens(requests, True) for size in (1, 4))
    assert (log_probs(one) - log_probs(four)).abs().max() < 1e-4


@pytest.mark.parametrize("context", [7, 8, 12])
def test_the_probabilities_of_all_tokens_sum_to_1_without_the_mask_token(evaluator, context):
    model = tiny_model(block_size=BLOCK_SIZE)
    ids = tokens(1, context)[0].tolist()
    requests = [(None, ids, [token]) for token in range(model.config.vocab_size)]
    results = evaluator(model, batch_size=97)._loglikelihood_tokens(requests, True)
    probs = log_probs(results).exp()
    assert probs.sum().item() == pytest.approx(1, abs=1e-5)
    assert probs[MASK] == 0
    assert [is_greedy for _, is_greedy in results] == (probs == probs.max()).tolist()


@pytest.mark.parametrize("right_shift_logits", [False, True])
def test_greedy_is_what_generate_writes_from_left_to_right(evaluator, right_shift_logits):
    model = tiny_model(block_size=BLOCK_SIZE, right_shift_logits=right_shift_logits, eos_token_id=None)
    prompt = tokens(1, 13)
    output = model.generate(prompt, max_new_tokens=15, do_sample=False, remasking_strategy="sequential")
    continuation = output[0, 13:].tolist()
    requests = [(None, prompt[0].tolist(), continuation)]
    for i in (0, 7, 14):
        changed = [*continuation[:i], continuation[i] % 90 + 2, *continuation[i + 1 :]]
        requests.append((None, prompt[0].tolist(), changed))
    results = evaluator(model)._loglikelihood_tokens(requests, True)
    assert [is_greedy for _, is_greedy in results] == [True, False, False, False]


def test_with_blocks_of_one_token_all_is_as_in_the_harness_on_the_parent(evaluator, nano_tokenizer):
    """Empty contexts, contexts that are too long and rolling windows included."""
    sizes = {"vocab_size": len(nano_tokenizer) + 3, "mask_token_id": nano_tokenizer.convert_tokens_to_ids("<|mask|>")}
    model = tiny_model(block_size=1, context_attention="causal", right_shift_logits=True, **sizes)
    parent = parent_of(model)

    def drop_mask_token(module, args, output):
        output.logits[..., model.config.mask_token_id] = -torch.inf

    parent.register_forward_hook(drop_mask_token)
    options = {"batch_size": 3, "max_length": 23}
    ours, theirs = evaluator(model, **options), HFLM(parent, tokenizer=nano_tokenizer, **options)
    text = "Start with 4. Win 3. Win 4. Lose 1. How many? "
    pairs = [
        (text * 2, " The count is 10."),
        ("", "The sum is 3."),
        ("What is 1 plus 1?", " 2"),
        ("Add 1 and 2.", " a"),
    ]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    results, expected = (lm.loglikelihood(requests, disable_tqdm=True) for lm in (ours, theirs))
    assert (log_probs(results) - log_probs(expected)).abs().max() < 1e-3
    assert [is_greedy for _, is_greedy in results] == [is_greedy for _, is_greedy in expected]
    texts = [Instance("loglikelihood_rolling", {}, (text * n,), n) for n in (1, 3)]
    assert ours.loglikelihood_rolling(texts, True) == pytest.approx(
        theirs.loglikelihood_rolling(texts, True), abs=1e-3
    )


def test_a_context_that_is_too_long_loses_its_beginning_and_a_warning_says_so(evaluator, caplog):
    lm = evaluator(tiny_model(block_size=BLOCK_SIZE), max_length=20)
    (_, context, continuation), *_ = make_requests([(31, 5)])
    cut = lm._loglikelihood_tokens([(None, context, continuation)], True)
    assert "A context of 31 tokens is too long" in caplog.text
    caplog.clear()
    assert cut == lm._loglikelihood_tokens([(None, context[-16:], continuation)], True)
    assert not caplog.text


@pytest.mark.parametrize("options", [{}, {"mixed_precision_dtype": "bfloat16"}])
def test_bfloat16_comes_close(evaluator, options):
    model = tiny_model(block_size=BLOCK_SIZE)
    requests = make_requests(LENGTHS)
    expected = log_probs(evaluator(model)._loglikelihood_tokens(requests, True))
    if not options:
        model = model.to(torch.bfloat16)
    results = log_probs(evaluator(model, **options)._loglikelihood_tokens(requests, True))
    assert 0 < ((results - expected) / expected).abs().max() < 0.05


def test_results_are_kept_for_use_cache(evaluator, monkeypatch):
    lm = evaluator(tiny_model(block_size=BLOCK_SIZE))
    kept = []
    monkeypatch.setattr(lm.cache_hook, "add_partial", lambda *args: kept.append(args))
    (_, context, continuation), window = make_requests([(5, 4), (9, 2)])
    results = lm._loglikelihood_tokens([(("a", "b"), context, continuation), window], True)
    assert kept == [("loglikelihood", ("a", "b"), results[0])]


def test_an_adapter_around_the_model_counts(evaluator):
    from peft import LoraConfig, get_peft_model

    requests = make_requests(LENGTHS[:2])
    model = tiny_model(block_size=BLOCK_SIZE)
    without = evaluator(model)._loglikelihood_tokens(requests, True)
    lora = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    assert (log_probs(evaluator(lora)._loglikelihood_tokens(requests, True)) - log_probs(without)).abs().min() > 1e-4


def test_other_models_are_sent_to_hf(evaluator):
    parent = parent_of(tiny_model())
    with pytest.raises(ValueError, match=r'is for models of type "arclm".*type "qwen3_5_text".*--model hf'):
        evaluator(parent)


@pytest.mark.parametrize("batch_size", ["auto", "auto:4"])
def test_an_automatic_batch_size_is_refused(evaluator, batch_size):
    with pytest.raises(ValueError, match=r"batch_size=auto measures.*Give a number"):
        evaluator(tiny_model(), batch_size=batch_size)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [((0, 3), "0 tokens of context and 3 of"), ((4, 0), "4 .* 0 of"), ((4, 21), "at most max_len")],
)
def test_a_request_that_cannot_be_scored_says_why(evaluator, lengths, message):
    with pytest.raises(ValueError, match=message):
        evaluator(tiny_model(), max_length=20)._loglikelihood_tokens(make_requests([lengths]), True)


def test_multiple_choice_on_the_command_line(tmp_path):
    """The script as a user starts it, but for the harness' own tasks, thousands of files to read."""
    start = (
        "import functools, runpy, sys, lm_eval.tasks as tasks;"
        "tasks.TaskManager = functools.partial(tasks.TaskManager, include_defaults=False);"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    options = {
        "--model": "arclm",
        "--model_args": f"pretrained={NANO},trust_remote_code=True,dtype=float32,enable_thinking=False",
        "--tasks": "nano_choice",
        "--include_path": str(ROOT / "benchmarks" / "lm_eval_tasks"),
        "--device": "cpu",
        "--batch_size": "16",
        "--limit": "4",
        "--output_path": str(tmp_path / "result.json"),
    }
    argv = [str(ROOT / "lm_eval_arclm.py"), *itertools.chain(*options.items()), "--apply_chat_template"]
    command = [sys.executable, "-c", f"import sys; sys.argv = {argv}; {start}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["results"]["nano_choice"]["acc,none"] == 1
