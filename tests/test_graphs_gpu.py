"""Captured passes on a GPU, where nothing stands for the graph. Run by `make gpu`."""

import warnings

import pytest
import torch
from captures import block, cache_error, new_memory
from conftest import MASK, tiny_model, tokens
from reference import error

from arclm import graphs_arclm
from arclm.graphs_arclm import borrow_graphs
from arclm.sampling_bd3lm import REMASKING_STRATEGIES, draw


pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("no_grad", "small_columns")]


@pytest.fixture
def small_columns(monkeypatch):
    """Contexts of a few blocks cross several powers of two."""
    monkeypatch.setattr(graphs_arclm, "MIN_COLUMNS", 32)


def gpu_model(dtype=torch.float32, **changes):
    return tiny_model(**changes).to("cuda", dtype)


@pytest.mark.parametrize("context", ["block_causal", "causal"])
@pytest.mark.parametrize("shift", [False, True])
def test_replayed_text_equals_eager_text_on_a_gpu(context, shift):
    model = gpu_model(context_attention=context, right_shift_logits=shift)
    ids = tokens(3, 37)
    ids[0, :20] = 0
    inputs = {"attention_mask": (ids != 0).long().cuda(), "max_new_tokens": 70, "return_dict_in_generate": True}
    for sampling in ({"do_sample": False}, {"do_sample": True, "temperature": 1.5, "top_k": 50}):
        outputs = []
        for use in (False, True, True):
            torch.manual_seed(3)
            outputs.append(model.generate(ids.cuda(), **inputs, **sampling, use_cuda_graphs=use))
        for output in outputs[1:]:
            assert torch.equal(output.sequences, outputs[0].sequences)
            assert output.nfe == outputs[0].nfe
            assert cache_error(output.past_key_values, outputs[0].past_key_values) < 1e-3
    (graphs,) = graphs_arclm._IDLE[model.model]
    assert not graphs.failed
    assert all(set(context.passes) == {False, True} for context in graphs.contexts.values())


@pytest.mark.parametrize("strategy", REMASKING_STRATEGIES)
@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True, "temperature": 1.5, "top_k": 0}])
def test_the_captured_choice_gives_the_eager_text_on_a_gpu(strategy, sampling):
    model, ids = gpu_model(), tokens(3, 37)
    ids[0, :20] = 0
    ids[2, 3] = ids[2, 20] = MASK
    knobs = {"attention_mask": (ids != 0).long().cuda(), "max_new_tokens": 70, "return_dict_in_generate": True}
    knobs |= {"remasking_strategy": strategy, "entropy_bound": 4.0, "confidence_threshold": 0.03, **sampling}
    knobs |= {"eos_token_id": [1, *range(2, 6)], "suppress_tokens": [*range(20, 40)]}
    outputs, numbers = [], []
    for use in (False, True, True):
        torch.manual_seed(3)
        outputs.append(model.generate(ids.cuda(), **knobs, use_cuda_graphs=use))
        numbers.append(torch.rand(1, device="cuda"))
    for output in outputs[1:]:
        assert torch.equal(output.sequences, outputs[0].sequences)
        assert output.nfe == outputs[0].nfe
        assert torch.equal(output.tokens_per_forward, outputs[0].tokens_per_forward)
        assert all(torch.equal(*pair) for pair in zip(output.history, outputs[0].history, strict=True))
    assert torch.equal(numbers[0], numbers[1])
    (graphs,) = graphs_arclm._IDLE[model.model]
    assert not graphs.failed
    assert len(graphs.choices) == 1


def test_many_calls_with_other_knobs_each_give_their_text_on_a_gpu():
    model, x = gpu_model(), tokens(2, 20).cuda()
    others = [{}, {"temperature": 0.7}, {"max_denoising_steps": 1}, {"block_size": 4}, {"do_sample": False}]
    for _ in range(2):
        for more in others:
            knobs = {"max_new_tokens": 40, "do_sample": True, "top_k": 0, "eos_token_id": [], **more}
            texts = []
            for use in (False, True):
                torch.manual_seed(5)
                texts.append(model.generate(x, **knobs, use_cuda_graphs=use))
            assert torch.equal(*texts), more
    (graphs,) = graphs_arclm._IDLE[model.model]
    assert len(graphs.choices) == len(others)


def test_a_captured_choice_names_logits_that_are_not_finite_on_a_gpu():
    model = gpu_model()
    model.generate(tokens(1, 20).cuda(), max_new_tokens=20, do_sample=False)
    model.model.norm.weight.data[3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"not finite\. Check the weights"):
        model.generate(tokens(1, 20).cuda(), max_new_tokens=20, do_sample=False)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_replayed_logits_equal_eager_logits_on_a_gpu(dtype, tolerance):
    model, lengths = gpu_model(dtype), (32, 16)
    ids = tokens(2, 32).cuda()
    mask = (torch.arange(32) >= 32 - torch.tensor(lengths)[:, None]).long().cuda()
    eager, cache = (model(ids, attention_mask=mask, use_cache=True).past_key_values for _ in range(2))
    graphs, clean = borrow_graphs(model.model, model), tokens(2, 16, 1).cuda()
    for n in range(4):  # 32 to 96 columns
        x_t = block(n, 2, 16).cuda()
        inputs = {"input_ids": clean if n else None, "noisy_input_ids": x_t}
        expected = model(**inputs, past_key_values=eager).logits
        assert error(model(**inputs, past_key_values=cache, graphs=graphs).logits, expected) < tolerance
        again = model(noisy_input_ids=x_t, past_key_values=cache, graphs=graphs).logits
        assert error(again, expected) < tolerance
        assert torch.equal(model(noisy_input_ids=x_t, past_key_values=cache, graphs=graphs).logits, again)
    assert not graphs.failed
    assert cache_error(cache, eager) < tolerance


def test_weights_changed_in_place_or_moved_on_a_gpu():
    model, knobs = gpu_model(), {"max_new_tokens": 40, "do_sample": False, "eos_token_id": []}
    x = tokens(1, 20).cuda()

    def in_place():
        for parameter in model.parameters():
            parameter.mul_(0.8)

    for change in (lambda: None, in_place, lambda: new_memory(model), lambda: model.cpu().cuda()):
        change()
        assert torch.equal(model.generate(x, **knobs), model.generate(x, **knobs, use_cuda_graphs=False))
    assert not graphs_arclm._IDLE[model.model][0].failed


@pytest.mark.parametrize("more", [{}, {"top_k": 0}, {"top_k": 0, "top_p": 0.9}])
def test_the_host_waits_once_per_step_on_a_gpu(more):
    model, x = gpu_model(), tokens(1, 16).cuda()

    def waits(steps: int) -> int:
        knobs = {"max_new_tokens": 16, "max_denoising_steps": steps, "do_sample": True, "eos_token_id": []}
        knobs |= {"suppress_tokens": list(range(20, 60)), **more}
        model.generate(x, **knobs)  # captured before the count
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model.generate(x, **knobs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)

    assert waits(16) - waits(4) == 12


def test_the_draw_on_a_gpu_is_that_of_torch_multinomial():
    probs = torch.rand(5, 1009, device="cuda").pow(9)
    probs[:, ::3] = 0
    probs /= probs.sum(-1, keepdim=True)
    for seed in range(20):
        torch.manual_seed(seed)
        drawn = draw(probs)
        torch.manual_seed(seed)
        assert torch.equal(drawn, torch.multinomial(probs, 1))
        assert (probs.gather(1, drawn) > 0).all()


FAULTS = {
    "out of memory": lambda: torch.empty(1 << 50, dtype=torch.uint8, device="cuda"),
    "invalidated": lambda: torch.ones(1, device="cuda").item(),  # the host waits, which a capture forbids
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("top_k", [0, 50])  # the choice fails, or a pass
def test_sampling_goes_on_after_a_capture_that_failed_on_a_gpu(monkeypatch, fault, top_k):
    class Failing(graphs_arclm.CudaCapture):
        def __call__(self, function):
            def fail():
                function()
                if torch.cuda.is_current_stream_capturing():
                    FAULTS[fault]()

            return super().__call__(fail)

    monkeypatch.setitem(graphs_arclm.CAPTURES, "cuda", Failing)
    model, texts, stream = gpu_model(), [], torch.cuda.current_stream()
    for use in (False, True, True):
        torch.manual_seed(3)
        knobs = {"max_new_tokens": 40, "do_sample": True, "top_k": top_k, "use_cuda_graphs": use}
        texts.append(model.generate(tokens(1, 20).cuda(), **knobs))
    assert torch.equal(texts[1], texts[0])
    assert torch.equal(texts[2], texts[0])
    assert all(graphs.failed for graphs in graphs_arclm._IDLE[model.model])
    assert torch.cuda.current_stream() == stream
    if torch.__version__ >= (2, 13):  # before, PyTorch takes an invalidated capture for one under way, and refuses
        torch.cuda.empty_cache()
