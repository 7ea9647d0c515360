"""The captured choice: the same text as eager steps, and never a replay of what was captured for something else.

On a CPU, `Traced` stands for a CUDA graph and `captures.sample_rows` for the kernel. On a GPU: `test_graphs_gpu.py`.
"""

import gc

import pytest
import torch
from captures import L, Rerun, Traced, new_memory, sample_rows
from conftest import MASK, tiny_model, tokens
from scripted import scripted
from torch.utils._python_dispatch import TorchDispatchMode

from arclm import denoising_bd3lm, generation_bd3lm, graphs_arclm
from arclm.sampling_bd3lm import REMASKING_STRATEGIES


SMALL = {"block_size": L, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
SAMPLE = {"do_sample": True, "temperature": 1.5, "top_k": 0}


@pytest.fixture(autouse=True)
def captured(monkeypatch):
    """Capture on a CPU, contexts of a few blocks, with a kernel; returns the rows of logits at each call of it."""
    rows = []

    def noted(logits, *args, **kwargs):
        rows.append(len(logits))
        return sample_rows(logits, *args, **kwargs)

    monkeypatch.setattr(graphs_arclm, "MIN_COLUMNS", 2 * L)
    monkeypatch.setitem(graphs_arclm.CAPTURES, "cpu", Rerun)
    monkeypatch.setattr(Traced, "captures", 0)
    monkeypatch.setattr(denoising_bd3lm, "sample_rows", noted)
    monkeypatch.setattr(generation_bd3lm, "use_sample_rows", lambda dtype, device: True)
    with torch.no_grad():
        yield rows


def generate(model, ids=None, **knobs):
    torch.manual_seed(3)
    knobs = {"max_new_tokens": 11, "return_dict_in_generate": True, "eos_token_id": [], **SAMPLE, **knobs}
    return model.generate(tokens(1, 5) if ids is None else ids, **knobs)


def assert_as_eager(model, ids=None, **knobs):
    """Compare two calls with captured steps, and the random numbers that they leave, with an eager one."""
    expected = generate(model, ids, use_cuda_graphs=False, **knobs)
    numbers = torch.get_rng_state()
    for _ in range(2):
        output = generate(model, ids, **knobs)
        assert torch.equal(output.sequences, expected.sequences)
        assert all(torch.equal(*pair) for pair in zip(output.history, expected.history, strict=True))
        assert torch.equal(output.tokens_per_forward, expected.tokens_per_forward)
        assert output.nfe == expected.nfe
        assert torch.equal(torch.get_rng_state(), numbers)
    return expected


def idle_graphs(model) -> graphs_arclm.DenoisingGraphs:
    (graphs,) = graphs_arclm._IDLE[model.model]
    return graphs


# The same text


@pytest.mark.parametrize("strategy", REMASKING_STRATEGIES)
@pytest.mark.parametrize("sampling", [{"do_sample": False}, SAMPLE])
def test_ragged_prompts_with_mask_tokens_get_the_same_text(monkeypatch, strategy, sampling):
    if sampling["do_sample"]:  # tracing takes time
        monkeypatch.setitem(graphs_arclm.CAPTURES, "cpu", Traced)
    model, ids = tiny_model(**SMALL), tokens(3, 13)
    ids[0, :7] = ids[1, :1] = 0
    ids[2, 3] = ids[2, 9] = MASK
    eos = [1, *range(2, 12)]  # some rows end early, the others go on
    knobs = {"attention_mask": (ids != 0).long(), "remasking_strategy": strategy, "eos_token_id": eos, **sampling}
    assert_as_eager(model, ids, steps=9, entropy_bound=4.0, confidence_threshold=0.03, **knobs)
    assert len(idle_graphs(model).choices) == 1
    assert not idle_graphs(model).failed


def test_eager_steps_compute_logits_for_masked_positions_only(captured):
    model = tiny_model(**SMALL)
    generate(model, tokens(1, 4), max_new_tokens=L, use_cuda_graphs=False)
    assert captured == [4, 3, 2, 1]
    captured.clear()
    generate(model, tokens(1, 4), max_new_tokens=L)
    assert set(captured) == {4}


@pytest.mark.parametrize("knobs", [{"right_shift_logits": True}, {"block_size": 3}, {"max_denoising_steps": 1}])
def test_blocks_of_other_shapes_and_few_steps(knobs):
    model = tiny_model(**SMALL, right_shift_logits=knobs.pop("right_shift_logits", False))
    assert_as_eager(model, tokens(2, 7), **knobs)
    assert len(idle_graphs(model).choices) == 1


def test_inference_mode_and_no_grad_take_turns(monkeypatch):
    monkeypatch.setitem(graphs_arclm.CAPTURES, "cpu", Traced)  # what runs again could know the mode
    model = tiny_model(**SMALL)
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            assert_as_eager(model)
    assert not idle_graphs(model).failed


def test_drafts_and_a_call_within_the_call():
    model, drafts = tiny_model(**SMALL), []
    expected = [generate(model, tokens(1, 5, seed), use_cuda_graphs=False) for seed in (1, 2)]

    class Nested:
        def put(self, value):
            assert torch.equal(generate(model, tokens(1, 5, 2)).sequences, expected[1].sequences)

        def put_draft(self, value):
            drafts.append(value)

        def end(self):
            pass

    output = generate(model, tokens(1, 5, 1), streamer=Nested(), do_sample=False)
    eager = generate(model, tokens(1, 5, 1), do_sample=False, use_cuda_graphs=False)
    assert torch.equal(output.sequences, eager.sequences)
    assert len(drafts) == len(eager.history)
    assert drafts[-1].tolist() == eager.sequences[0, -len(drafts[-1]) :].tolist()
    assert [int((draft == MASK).sum()) for draft in drafts[:3]] == [2, 1, 0]
    assert len(graphs_arclm._IDLE[model.model]) == 2


def test_logits_that_are_not_finite_are_named_at_the_end_of_the_block():
    model = tiny_model(**SMALL)
    model.model.norm.weight.data[3] = torch.nan
    for sampling in (SAMPLE, {"do_sample": False}):
        with pytest.raises(FloatingPointError, match=r"not finite\. Check the weights"):
            generate(model, **sampling)
        gc.collect()
    assert idle_graphs(model).choices


class Operations(TorchDispatchMode):
    """Counts operations, those of views apart, and what makes a host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.names, self.waits = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not func.is_view and name != "_local_scalar_dense":
            self.names.append(name)
        self.waits += name in ("nonzero", "_local_scalar_dense", "unique", "_unique2")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("strategy", REMASKING_STRATEGIES)
def test_the_host_does_nothing_in_a_step_but_wait_for_a_flag(monkeypatch, strategy):
    class Silent(Rerun):
        """Replays without operations that count."""

        def __call__(self, function):
            replay, outputs = super().__call__(function)

            def uncounted():
                with torch.utils._python_dispatch._disable_current_modes():
                    replay()

            return uncounted, outputs

    monkeypatch.setitem(graphs_arclm.CAPTURES, "cpu", Silent)
    model, counts = tiny_model(block_size=16), []
    for steps in (4, 16):
        knobs = {"max_new_tokens": 16, "max_denoising_steps": steps, "remasking_strategy": strategy}
        knobs |= {"return_dict_in_generate": False, "confidence_threshold": 1.0, "entropy_bound": 0.0}
        generate(model, tokens(1, 16), **knobs)
        with Operations() as counted:
            generate(model, tokens(1, 16), **knobs)
        counts.append((counted.waits, len(counted.names)))
    assert counts[1][0] - counts[0][0] == 12
    assert counts[1][1] == counts[0][1]


# Never a replay for something else


def test_another_call_with_other_tokens_needs_no_capture():
    model = tiny_model(**SMALL)
    generate(model)
    captures = Traced.captures
    for seed in (1, 2):
        knobs = {"eos_token_id": [*range(9 * seed, 40)], "suppress_tokens": [*range(40, 50 + seed)]}
        text = assert_as_eager(model, tokens(1, 4 + seed, seed), **knobs).sequences[0, 4 + seed :]
        assert not set(text.tolist()) & set(knobs["suppress_tokens"])
    assert Traced.captures == captures


def test_every_knob_and_shape_has_a_choice_of_its_own():
    model = tiny_model(**SMALL, context_attention="causal")
    others = [{}, {"do_sample": False}, {"temperature": 0.7}, {"max_denoising_steps": 2}, {"block_size": 2}]
    others += [{"remasking_strategy": strategy} for strategy in REMASKING_STRATEGIES[1:]]
    others += [{"remasking_strategy": "low_confidence_dynamic", "confidence_threshold": 0.02}]
    others += [{"remasking_strategy": "entropy_bound", "entropy_bound": 9.0}, {"num_return_sequences": 2}]
    for _ in range(2):
        for knobs in others:
            assert_as_eager(model, tokens(1, 4), **knobs)
        assert len(idle_graphs(model).choices) == len(others)


def test_a_head_in_a_new_place_is_captured_anew():
    model = tiny_model(**SMALL, tie_word_embeddings=False)
    assert_as_eager(model)
    captures = Traced.captures
    model.lm_head.weight.data = model.lm_head.weight.data.flip(0)
    assert_as_eager(model)
    assert Traced.captures == captures + 1
    model.lm_head = torch.nn.Linear(40, 97)
    assert_as_eager(model)
    assert Traced.captures == captures + 2
    model.lm_head.weight.data.mul_(-1)  # new values in the same place
    assert_as_eager(model)
    assert Traced.captures == captures + 2
    new_memory(model.model)
    assert_as_eager(model)
    assert len(idle_graphs(model).choices) == 1


def wrap_forward(model):
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)


def add_adapter_to_the_head(model):
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    model.eval()


LEFT_TO_THE_MODEL = {
    "a hook on the model": lambda model: model.register_forward_hook(lambda *_: None),
    "a hook before the head": lambda model: model.lm_head.register_forward_pre_hook(lambda *_: None),
    "an adapter on the head": add_adapter_to_the_head,
    "a forward of its own": wrap_forward,
    "a head with one": lambda model: setattr(model.lm_head, "forward", model.lm_head.forward),
    "a head of another kind of tensor": lambda model: setattr(
        model.lm_head, "weight", type("Quantised", (torch.nn.Parameter,), {})(model.lm_head.weight)
    ),
    "a head elsewhere": lambda model: model.lm_head.register_buffer("other", torch.zeros(1, device="meta")),
}


@pytest.mark.parametrize("change", LEFT_TO_THE_MODEL)
def test_where_a_replay_could_miss_something_the_model_is_called(change):
    model = tiny_model(**SMALL, tie_word_embeddings=False)
    LEFT_TO_THE_MODEL[change](model)
    assert_as_eager(model)
    assert not any(graphs.choices for graphs in graphs_arclm._IDLE.get(model.model, ()))


def test_a_class_with_another_forward_is_called():
    model = scripted([10, 11, 12], (9.0, 8.0, 7.0))
    output = generate(model, do_sample=False)
    assert output.nfe == len(model.calls)
    assert output.sequences[0, 5:].tolist() == [12, 10, 11, 12, 10, 11, 12, 10, 11, 12, 10]


@pytest.mark.parametrize("knobs", [{"top_k": 5}, {"repetition_penalty": 1.2}])
def test_processors_that_do_more_are_left_to_pytorch(captured, knobs):
    model = tiny_model(**SMALL)
    assert_as_eager(model, **knobs)
    assert not captured
    assert Traced.captures > 0
    assert not idle_graphs(model).choices


def test_autocast_turns_it_off():
    model = tiny_model(**SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        assert_as_eager(model)
    assert Traced.captures == 0


# Failure and memory


def test_more_rows_than_fit_run_eagerly_and_what_was_used_last_is_kept(captured, monkeypatch):
    monkeypatch.setattr(graphs_arclm, "MAX_ROWS", 3 * L)
    model, seen = tiny_model(**SMALL), []
    for temperature, batch in ((1.0, 1), (0.5, 1), (1.0, 1), (1.0, 2), (1.0, 4)):
        assert_as_eager(model, tokens(batch, 5), temperature=temperature)
        seen.append([(key[0], key[-1]) for key in idle_graphs(model).choices])
    assert seen[:3] == [[(1, 1.0)], [(1, 1.0), (1, 0.5)], [(1, 0.5), (1, 1.0)]]
    assert seen[3] == seen[4] == [(1, 1.0), (2, 1.0)]


def test_over_more_columns_than_fit_nothing_is_captured(captured, monkeypatch):
    monkeypatch.setattr(graphs_arclm, "MIN_COLUMNS", 4)
    monkeypatch.setattr(graphs_arclm, "MAX_COLUMNS", 7)
    model = tiny_model(**SMALL)
    assert_as_eager(model, tokens(1, 2 * L + 1), max_new_tokens=L)
    assert Traced.captures == 0
    assert not idle_graphs(model).choices


@pytest.mark.parametrize("number", [1, 3])
def test_a_capture_that_fails_is_said_once_and_the_text_is_the_same(monkeypatch, number):
    attempts, said = [], []

    class Failing(Rerun):
        def __call__(self, function):
            attempts.append(function)
            if len(attempts) == number:  # that of the choice, or of a pass after it
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().__call__(function)

    monkeypatch.setitem(graphs_arclm.CAPTURES, "cpu", Failing)
    monkeypatch.setattr(graphs_arclm.logger, "warning_once", said.append)
    model = tiny_model(**SMALL)
    assert_as_eager(model)
    assert len(attempts) == number
    assert len(said) == 1
    assert "captured (OutOfMemoryError: CUDA out of memory.). Denoising steps run without" in said[0]
    graphs = idle_graphs(model)
    assert not any((graphs.choices, graphs.contexts, graphs.desks))
