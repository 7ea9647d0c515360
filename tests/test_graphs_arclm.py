"""Captured passes: the same logits and text as eager ones, and never a replay of what was captured for something else.

On a CPU, `Traced` stands for a CUDA graph (`captures.py`). On a GPU: `test_graphs_gpu.py`.
"""

import copy
import gc
import threading
import time
import weakref

import pytest
import torch
from captures import L, Rerun, Traced, block, cache_error, graphs_of, new_memory, prefilled
from conftest import tiny_model, tokens
from reference import error

from arclm import graphs_arclm
from arclm.graphs_arclm import StaticContext, borrow_graphs, key_of


# tracing takes time
SMALL = {"block_size": L, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}


@pytest.fixture(autouse=True)
def small_columns(monkeypatch):
    """Contexts of a few blocks cross several powers of two."""
    monkeypatch.setattr(graphs_arclm, "MIN_COLUMNS", 2 * L)
    with torch.no_grad():
        yield


@pytest.fixture
def traced(monkeypatch):
    """Have `generate` capture on a CPU."""
    monkeypatch.setitem(graphs_arclm.CAPTURES, "cpu", Traced)
    monkeypatch.setattr(Traced, "captures", 0)


@pytest.fixture
def rerun(traced, monkeypatch):
    """The same with the quicker stand-in."""
    monkeypatch.setitem(graphs_arclm.CAPTURES, "cpu", Rerun)


# The same results


@pytest.mark.parametrize(
    ("context", "shift", "lengths"),
    [("block_causal", False, (8, 4)), ("block_causal", True, (4,)), ("causal", False, (4,)), ("causal", True, (8, 4))],
)
def test_steps_and_commits_over_several_blocks_equal_eager_ones(traced, context, shift, lengths):
    layers = {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
    model = tiny_model(block_size=L, context_attention=context, right_shift_logits=shift, **layers)
    batch, graphs = len(lengths), graphs_of(model)
    eager, cache = prefilled(model, *lengths), prefilled(model, *lengths)
    for n in range(4):  # 4 to 20 columns
        for seed in (10 * n, 10 * n + 1):
            expected = model(noisy_input_ids=block(seed, batch), past_key_values=eager).logits
            logits = model(noisy_input_ids=block(seed, batch), past_key_values=cache, graphs=graphs).logits
            assert error(logits, expected) < 1e-5
        mask = None
        if n == 2:  # the first row goes on, the last one has ended
            mask = torch.ones(batch, L, dtype=torch.long)
            mask[1:] = 0
        inputs = {"attention_mask": mask, "noisy_input_ids": block(10 * n + 2, batch)}
        expected = model(tokens(batch, L, n), **inputs, past_key_values=eager).logits
        logits = model(tokens(batch, L, n), **inputs, past_key_values=cache, graphs=graphs).logits
        assert error(logits, expected) < 1e-5
        assert cache_error(cache, eager) < 1e-5
    assert not graphs.failed
    assert [columns for _, _, columns in graphs.contexts] == ([8, 16] if batch == 1 else [8, 16, 32])
    assert Traced.captures == 2 * len(graphs.contexts)


def test_before_the_first_commit_there_is_an_empty_context(traced):
    model = tiny_model(**SMALL, right_shift_logits=True)
    graphs = graphs_of(model)
    for seed in (1, 2):
        expected = model(noisy_input_ids=block(seed)).logits
        assert error(model(noisy_input_ids=block(seed), graphs=graphs).logits, expected) < 1e-5
    assert Traced.captures == 1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("knobs", [{}, {"block_size": 3, "max_denoising_steps": 2}, {"right_shift_logits": True}])
def test_the_text_is_the_same(rerun, attention, knobs):
    model = tiny_model(
        **SMALL, attn_implementation=attention, right_shift_logits=knobs.pop("right_shift_logits", False)
    )
    ids = tokens(3, 13)
    ids[0, :7] = ids[1, :1] = 0
    inputs = {"attention_mask": (ids != 0).long(), "max_new_tokens": 11, "return_dict_in_generate": True, **knobs}
    eos = [1, *range(2, 12)]  # some rows end early, the others go on
    for sampling in ({"do_sample": False}, {"do_sample": True, "temperature": 1.5}):
        texts = []
        for use in (False, True):
            torch.manual_seed(3)
            texts.append(model.generate(ids, **inputs, **sampling, eos_token_id=eos, use_cuda_graphs=use))
        assert torch.equal(texts[0].sequences, texts[1].sequences)
        assert texts[0].nfe == texts[1].nfe
        assert all(torch.equal(*pair) for pair in zip(texts[0].history, texts[1].history, strict=True))
        assert cache_error(texts[0].past_key_values, texts[1].past_key_values) < 1e-5
    assert Traced.captures > 0


def test_a_second_turn_over_the_cache_uses_what_the_first_has_captured(rerun):
    model = tiny_model(**SMALL)
    knobs = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True, "eos_token_id": []}
    first = model.generate(tokens(1, 33), **knobs)
    captures = Traced.captures
    longer = torch.cat((first.sequences, tokens(1, 2, seed=5)), 1)
    second = model.generate(longer, past_key_values=first.past_key_values, **knobs)
    assert Traced.captures == captures
    assert torch.equal(second.sequences, model.generate(longer, use_cuda_graphs=False, **knobs).sequences)


@pytest.mark.parametrize("do_sample", [False, True])
def test_logits_that_are_not_finite_are_named_at_the_end_of_the_block(rerun, do_sample):
    model = tiny_model(**SMALL)
    model.model.norm.weight.data[3] = torch.nan
    for use in (False, True):
        with pytest.raises(FloatingPointError, match=r"not finite\. Check the weights"):
            model.generate(tokens(1, 5), max_new_tokens=6, do_sample=do_sample, use_cuda_graphs=use)


# Never a replay for something else


def test_every_batch_block_size_and_number_of_columns_is_captured_by_itself(traced):
    model = tiny_model(**SMALL, context_attention="causal")  # a cache of any block size
    graphs, caches = graphs_of(model), {}
    ways = [(1, 4, 4), (2, 4, 4), (3, 4, 4), (2, 2, 4), (2, 4, 12), (2, 1, 4)]
    for captures, (batch, length, context) in enumerate(ways, 1):
        cache = caches.setdefault((batch, context), prefilled(model, *[context] * batch))
        ids = block(batch, batch, length)
        expected = model(noisy_input_ids=ids, past_key_values=cache, block_size=length).logits
        for _ in range(2):
            logits = model(noisy_input_ids=ids, past_key_values=cache, block_size=length, graphs=graphs).logits
            assert error(logits, expected) < 1e-5
            assert Traced.captures == captures


def test_contexts_that_take_turns_are_not_confused(traced):
    model = tiny_model(**SMALL)
    graphs, caches = graphs_of(model), [prefilled(model, n, n) for n in (4, 8, 8)]
    caches.append(prefilled(model, 8, 4))
    for turn in range(3):
        for cache in caches:
            expected = model(noisy_input_ids=block(turn, 2), past_key_values=cache).logits
            logits = model(noisy_input_ids=block(turn, 2), past_key_values=cache, graphs=graphs).logits
            assert error(logits, expected) < 1e-5
    assert Traced.captures == 1
    # a commit to one leaves the others as they were
    before = copy.deepcopy(caches[1:])
    for seed in (1, 2):
        model(tokens(2, L, seed), noisy_input_ids=block(seed, 2), past_key_values=caches[0], graphs=graphs)
        expected = copy.deepcopy(caches[0])
        model(tokens(2, L, seed), noisy_input_ids=block(seed, 2), past_key_values=caches[1], graphs=graphs)
        assert cache_error(caches[0], expected) == 0
    assert all(cache_error(*pair) == 0 for pair in zip(before[1:], caches[2:], strict=True))
    # an eager commit, of which the graphs know nothing
    model(tokens(2, L), past_key_values=caches[0])
    expected = model(noisy_input_ids=block(7, 2), past_key_values=caches[0]).logits
    assert error(model(noisy_input_ids=block(7, 2), past_key_values=caches[0], graphs=graphs).logits, expected) < 1e-5


@pytest.mark.parametrize("length", [4, None])
def test_a_commit_to_another_context_between_two_steps(length):
    model = tiny_model(**SMALL)
    graphs, other = graphs_of(model), prefilled(model, 8)
    step = {"noisy_input_ids": block(1), "past_key_values": length and prefilled(model, length)}
    expected = model(**step).logits
    for _ in range(2):  # over 8 columns, then over 16
        assert error(model(**step, graphs=graphs).logits, expected) < 1e-5
        model(tokens(1, L), noisy_input_ids=block(2), past_key_values=other, graphs=graphs)
    assert error(model(**step, graphs=graphs).logits, expected) < 1e-5


def test_other_inputs_are_left_to_the_eager_path(traced, monkeypatch):
    model = tiny_model(**SMALL)
    graphs, cache = graphs_of(model), prefilled(model, 4)
    others = [
        {"input_ids": tokens(1, L), "use_cache": True},
        {"noisy_input_ids": block(1, length=3), "past_key_values": cache},
        {"noisy_input_ids": block(1), "attention_mask": torch.ones(1, L).long(), "past_key_values": cache},
        {"input_ids": tokens(1, 2 * L), "noisy_input_ids": block(1), "past_key_values": cache},
        {"input_ids": tokens(1, L), "noisy_input_ids": block(1)},
    ]
    for inputs in others:
        expected = model(**copy.deepcopy(inputs)).logits
        assert torch.equal(model(**inputs, graphs=graphs).logits, expected)
    monkeypatch.setattr(graphs_arclm, "MAX_COLUMNS", 15)
    said = []
    monkeypatch.setattr(graphs_arclm.logger, "warning_once", said.append)
    cache = prefilled(model, 4, 4)
    assert model(noisy_input_ids=block(1, 2), past_key_values=cache, graphs=graphs).logits is not None
    assert "CUDA graphs hold 15 columns of context" in said[0]
    assert not graphs.contexts
    assert not graphs.failed


def test_what_does_not_fit_is_named_as_without_graphs(traced):
    model = tiny_model(**SMALL, context_attention="causal")
    graphs, cache = graphs_of(model), prefilled(model, 4)
    with pytest.raises(ValueError, match="past_key_values holds 1 rows, the input 2"):
        model(noisy_input_ids=block(1, 2), past_key_values=cache, graphs=graphs)
    with pytest.raises(ValueError, match=r"block_size=5 is outside \[1, 4\]"):
        model(noisy_input_ids=block(1, length=5), past_key_values=cache, block_size=5, graphs=graphs)
    with pytest.raises(ValueError, match=r"The cache holds \[4\] tokens per row, not multiples of block_size=3"):
        model(noisy_input_ids=block(1, length=3), past_key_values=cache, block_size=3, graphs=graphs)
    assert not graphs.failed


CHANGES = {
    "weights in a new place": new_memory,
    "weights of another type": lambda model: model.double(),
    "a shift": lambda model: setattr(model.config, "right_shift_logits", True),
    "eager attention": lambda model: model.set_attn_implementation("eager"),
    "another module": lambda model: setattr(model.model.layers[0].mlp, "act_fn", torch.nn.GELU()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_after_a_change_of_the_model_everything_is_captured_anew(traced, change):
    model = tiny_model(**SMALL)
    knobs = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": []}
    model.generate(tokens(1, 5), **knobs)
    captures = Traced.captures
    model.generate(tokens(1, 5), **knobs)
    assert Traced.captures == captures
    CHANGES[change](model)
    text = model.generate(tokens(1, 5), **knobs)
    assert Traced.captures == 2 * captures
    assert torch.equal(text, model.generate(tokens(1, 5), **knobs, use_cuda_graphs=False))


def test_new_values_in_the_same_place_and_another_mask_need_no_capture(traced):
    model = tiny_model(**SMALL)
    knobs = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": []}
    before = model.generate(tokens(1, 5), **knobs)
    captures = Traced.captures
    for parameter in model.parameters():
        parameter.mul_(0.8)
    model.config.context_attention = "causal"
    after = model.generate(tokens(1, 5), **knobs)
    assert Traced.captures == captures
    assert not torch.equal(before, after)
    assert torch.equal(after, model.generate(tokens(1, 5), **knobs, use_cuda_graphs=False))


def add_adapter(model):
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(target_modules=["down_proj"], init_lora_weights=False))
    model.eval()


NOT_CAPTURED = {
    "training": lambda model: model.train(),
    "hooks": lambda model: model.model.layers[0].register_forward_hook(lambda *_: None),
    "a forward of its own": lambda model: setattr(model.model.norm, "forward", model.model.norm.forward),
    "adapters": add_adapter,
    "two devices": lambda model: model.model.norm.register_buffer("other", torch.zeros(1, device="meta")),
    "a kind of tensor of its own": lambda model: setattr(
        model.model.norm, "weight", type("Quantised", (torch.nn.Parameter,), {})(model.model.norm.weight)
    ),
}


@pytest.mark.parametrize("change", NOT_CAPTURED)
def test_where_a_replay_could_miss_something_all_runs_eagerly(traced, change):
    model = tiny_model(**SMALL)
    assert key_of(model.model) is not None
    NOT_CAPTURED[change](model)
    model.generate(tokens(1, 5), max_new_tokens=3)
    assert key_of(model.model) is None
    assert Traced.captures == 0


def test_a_hook_around_the_captured_model_still_runs(traced):
    model, passes = tiny_model(**SMALL), []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    output = model.generate(tokens(1, 5), max_new_tokens=6, return_dict_in_generate=True)
    assert Traced.captures > 0
    assert len(passes) == output.nfe


def test_autocast_and_the_knob_turn_it_off(traced):
    model = tiny_model(**SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(tokens(1, 5), max_new_tokens=3)
    model.generate(tokens(1, 5), max_new_tokens=3, use_cuda_graphs=False)
    assert Traced.captures == 0
    knobs = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": []}
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)  # as accelerate does for the Trainer
    for _ in range(2):
        text = model.generate(tokens(1, 5), **knobs)
        assert torch.equal(text, model.generate(tokens(1, 5), **knobs, use_cuda_graphs=False))
        for parameter in model.parameters():  # a graph would go on with the casts that autocast kept
            parameter.mul_(0.8)
    assert Traced.captures == 0
    with pytest.raises(TypeError, match="use_cuda_graphs=3 must be True or False"):
        model.generate(tokens(1, 5), use_cuda_graphs=3)


def test_nothing_is_captured_on_a_cpu():
    assert borrow_graphs(tiny_model(**SMALL).model, object()) is None


# Failure, memory, threads


@pytest.mark.parametrize("failure", [torch.OutOfMemoryError("CUDA out of memory."), ValueError("a kernel\nand why")])
def test_a_capture_that_fails_is_said_once_and_the_text_is_the_same(rerun, monkeypatch, failure):
    attempts = []

    class Failing(Rerun):
        def __call__(self, function):
            attempts.append(function)
            if len(attempts) == 2:  # the first pass with a commit
                raise type(failure)(*failure.args)  # a new one: its traceback keeps the call alive
            return super().__call__(function)

    monkeypatch.setitem(graphs_arclm.CAPTURES, "cpu", Failing)
    warn = []
    monkeypatch.setattr(graphs_arclm.logger, "warning_once", warn.append)
    model = tiny_model(**SMALL)
    knobs = {"max_new_tokens": 11, "do_sample": False, "eos_token_id": []}
    texts = [model.generate(tokens(1, 5), **knobs) for _ in range(2)]
    assert len(attempts) == 2
    assert len(warn) == 1
    reason = f"{type(failure).__name__}: {str(failure).splitlines()[0]}"
    assert f"captured ({reason}). Denoising steps run without" in warn[0]
    expected = model.generate(tokens(1, 5), **knobs, use_cuda_graphs=False)
    assert all(torch.equal(text, expected) for text in texts)
    assert not graphs_arclm._IDLE[model.model][0].contexts


def test_static_contexts_stay_within_their_bound(traced, monkeypatch):
    monkeypatch.setattr(graphs_arclm, "MAX_COLUMNS", 32)
    model = tiny_model(**SMALL)
    graphs, seen = graphs_of(model), []
    for batch, context in ((1, 4), (1, 12), (1, 4), (2, 4), (4, 4)):
        cache = prefilled(model, *[context] * batch)
        expected = model(noisy_input_ids=block(1, batch), past_key_values=cache).logits
        assert (
            error(model(noisy_input_ids=block(1, batch), past_key_values=cache, graphs=graphs).logits, expected) < 1e-5
        )
        seen.append([(rows, columns) for rows, _, columns in graphs.contexts])
    # what was used last is kept
    assert seen == [[(1, 8)], [(1, 8), (1, 16)], [(1, 16), (1, 8)], [(1, 8), (2, 8)], [(4, 8)]]
    assert list(graphs.desks) == [(4, L)]


def test_memory_is_as_the_docstring_says():
    config = tiny_model(**SMALL).config
    context = StaticContext(tiny_model(**SMALL).model, 3, L, 64)
    per_column = 2 * config.num_key_value_heads * config.head_dim
    assert sum(x.numel() for x in (*context.keys, *context.values) if x is not None) == 3 * (64 + 2 * L) * per_column


def test_nan_of_an_earlier_context_is_gone(traced):
    model = tiny_model(**SMALL)
    graphs, bad, good = graphs_of(model), prefilled(model, 8), prefilled(model, 4)
    for states in (bad.keys, bad.values, bad.conv_states, bad.recurrent_states):
        for state in states:
            if state is not None:
                state.fill_(torch.nan)
    assert model(noisy_input_ids=block(1), past_key_values=bad, graphs=graphs).logits.isnan().any()
    expected = model(noisy_input_ids=block(1), past_key_values=good).logits
    assert error(model(noisy_input_ids=block(1), past_key_values=good, graphs=graphs).logits, expected) < 1e-5


def test_inference_mode_and_no_grad_take_turns(traced):
    model = tiny_model(**SMALL)
    knobs = {"max_new_tokens": 11, "do_sample": False, "eos_token_id": []}
    expected = model.generate(tokens(1, 5), **knobs, use_cuda_graphs=False)
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            assert torch.equal(model.generate(tokens(1, 5), **knobs), expected)
    assert not graphs_arclm._IDLE[model.model][0].failed


def test_two_calls_at_a_time_do_not_share_buffers(rerun):
    model = tiny_model(**SMALL)
    knobs = {"max_new_tokens": 11, "do_sample": False, "eos_token_id": []}
    prompts = [tokens(1, 5, seed) for seed in (1, 2)]
    expected = [model.generate(prompt, **knobs, use_cuda_graphs=False) for prompt in prompts]
    texts = {}

    class Nested:
        """Generates another text whenever a block is done."""

        def put(self, value):
            texts[1] = model.generate(prompts[1], **knobs)

        def end(self):
            pass

    texts[0] = model.generate(prompts[0], **knobs, streamer=Nested())
    assert all(torch.equal(texts[i], expected[i]) for i in (0, 1))
    assert len(graphs_arclm._IDLE[model.model]) == 2
    threads = [
        threading.Thread(target=lambda i=i: texts.__setitem__(i, model.generate(prompts[i], **knobs))) for i in (0, 1)
    ]
    texts.clear()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(texts[i], expected[i]) for i in (0, 1))


def test_two_threads_do_not_capture_at_once(rerun, monkeypatch):
    events = []

    class Slow(Rerun):
        def __call__(self, function):
            events.append("begin")
            time.sleep(0.1)
            events.append("end")
            return super().__call__(function)

    monkeypatch.setitem(graphs_arclm.CAPTURES, "cpu", Slow)
    model, knobs = tiny_model(**SMALL), {"max_new_tokens": 6, "eos_token_id": []}
    threads = [threading.Thread(target=model.generate, args=[tokens(1, 5)], kwargs=knobs) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert events == ["begin", "end"] * 4


def test_graphs_come_back_after_every_call_and_go_with_the_model(traced):
    model = tiny_model(**SMALL)
    for _ in range(2):
        model.generate(tokens(1, 5), max_new_tokens=3)
        assert len(graphs_arclm._IDLE[model.model]) == 1
    model.model.norm.weight.data[3] = torch.nan
    with pytest.raises(FloatingPointError):
        model.generate(tokens(1, 5), max_new_tokens=3)
    other = copy.deepcopy(model)
    assert other.model not in graphs_arclm._IDLE
    graphs_arclm._IDLE[model.model][0].contexts.clear()  # a trace holds the model, a graph does not
    graphs = weakref.ref(graphs_arclm._IDLE[model.model][0])
    del model
    gc.collect()
    assert graphs() is None
