"""The Triton kernels run on a CPU by Triton's interpreter. `test_kernels_arclm.py` starts this file.

It needs a process of its own: TRITON_INTERPRET=1 counts when Triton is imported, and other tests want the compiler.
"""

import pytest
import torch
from conftest import tiny_model, tokens

from arclm import kernels_arclm as kernels
from arclm.gated_delta_rule import AffineScan, DeltaRuleInputs, gated_delta_rule


V, MASK = 211, 101


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """A vocabulary of 211 fills three tiles and a part of a fourth."""
    monkeypatch.setattr(kernels, "VOCABULARY_TILE", 64)


# key and value dimensions below, at and above the tiles of 16, and no power of 2
@pytest.mark.parametrize(("chunks", "key_dim", "value_dim"), [(4, 10, 14), (1, 16, 33), (3, 24, 16), (2, 128, 128)])
def test_affine_scan_and_its_gradient_equal_pytorch(monkeypatch, chunks, key_dim, value_dim):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, chunks, 3, key_dim, key_dim), (2, chunks, 3, key_dim, value_dim), (2, 3, key_dim, value_dim)]
    inputs = [torch.randn(shape, generator=generator) * key_dim**-0.5 for shape in shapes]
    # transposed in memory: the kernel must not take strides for granted
    inputs = [x.mT.contiguous().mT.requires_grad_() for x in inputs]
    weights = torch.randn(2, chunks + 1, *shapes[2][1:], generator=generator)
    results, grads, asked = [], [], []
    for by_kernel in (True, False):
        monkeypatch.setattr(kernels, "usable", lambda *problem, answer=by_kernel: asked.append(answer) or answer)
        results.append(AffineScan.apply(*inputs))
        grads.append(torch.autograd.grad(results[-1], inputs, weights))
    assert asked == [True, True, False, False]
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)
    for grad, expected in zip(*grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def logits_of(rows: int, *, scale: float = 3.0, vocabulary: int = V) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(1)) * scale


def suppressed(*tokens: int, vocabulary: int = V) -> torch.Tensor:
    return torch.isin(torch.arange(vocabulary), torch.tensor([MASK, *tokens]))


def in_pytorch(logits: torch.Tensor, is_suppressed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens, confidence and entropy as `_propose` computes them."""
    scores = logits.float()
    scores[:, MASK] = -torch.inf
    probs = scores.softmax(-1)
    tokens = scores.masked_fill(is_suppressed, -torch.inf).argmax(-1)
    return tokens, probs.gather(1, tokens[:, None]).squeeze(1), torch.special.entr(probs).sum(-1)


def assert_equal_to_pytorch(logits: torch.Tensor, is_suppressed: torch.Tensor) -> None:
    tokens, confidence, entropy, is_finite = kernels.sample_rows(logits, is_suppressed, MASK)
    expected = in_pytorch(logits, is_suppressed)
    assert is_finite.all()
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(confidence, expected[1], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(entropy, expected[2], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
def test_greedy_rows_equal_pytorch(dtype, scale):
    logits = logits_of(5, scale=scale).to(dtype)
    logits[:3, MASK] = 300
    best = logits[3].argmax()
    # a suppressed token is not proposed and still has its probability
    assert_equal_to_pytorch(logits, suppressed(int(best), 7))


def test_tiles_of_the_real_size(monkeypatch):
    monkeypatch.undo()
    assert_equal_to_pytorch(logits_of(3, vocabulary=10_007), suppressed(vocabulary=10_007))


def test_of_equal_logits_the_first_token_is_proposed():
    logits = logits_of(7, scale=0.7).round()
    assert ((logits == logits.amax(1, keepdim=True)).sum(1) > 1).all()
    assert_equal_to_pytorch(logits, suppressed())
    # in different tiles
    logits = torch.zeros(1, V)
    logits[0, [70, 140, 200]] = 1
    assert kernels.sample_rows(logits, suppressed(), MASK)[0] == 70


def test_a_tile_of_the_mask_token_alone_and_extreme_logits():
    vocabulary = MASK + 1  # tiles of 64: 0 to 63, and 64 to 101
    logits = logits_of(4, vocabulary=vocabulary)
    logits[0, 64:MASK] = torch.finfo(torch.float32).min
    logits[1] = torch.finfo(torch.float32).min
    logits[2] = -1e30
    logits[3, 5] = 1e4
    assert_equal_to_pytorch(logits, suppressed(vocabulary=vocabulary))


def test_a_tile_without_any_token_to_propose(monkeypatch):
    monkeypatch.setattr(kernels, "VOCABULARY_TILE", 2)
    logits = logits_of(2, vocabulary=MASK + 1)  # the last tile: 100, suppressed, and the mask token
    assert_equal_to_pytorch(logits, suppressed(*range(90, MASK), vocabulary=MASK + 1))


def test_rows_with_a_stride():
    assert_equal_to_pytorch(logits_of(3, vocabulary=V + 6)[:, :V], suppressed())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [3, V - 1])
def test_a_row_without_probabilities_is_reported(value, column):
    logits = logits_of(4)
    logits[1, column] = value
    logits[2] = -torch.inf
    *_, is_finite = kernels.sample_rows(logits, suppressed(), MASK)
    assert is_finite.tolist() == [True, False, False, True]


def test_impossible_tokens_and_whatever_the_mask_token_has():
    logits = logits_of(3)
    logits[0, 5] = logits[1, :100] = -torch.inf
    logits[2, MASK] = torch.nan
    assert_equal_to_pytorch(logits, suppressed())


def draw(logits: torch.Tensor, is_suppressed: torch.Tensor, seed: int = 0, **more) -> torch.Tensor:
    return kernels.sample_rows(logits, is_suppressed, 0, temperature=0.5, seed=torch.tensor([seed]), **more)[0]


def test_samples_follow_the_softmax_of_logits_over_temperature(monkeypatch):
    monkeypatch.setattr(kernels, "VOCABULARY_TILE", 8)
    probs = torch.tensor([0.0, 20.0, 3.0, 0.0, 8.0]) / 31  # the mask token and a suppressed one have none
    logits = (0.5 * probs.log()).clamp(min=-9).masked_fill(probs == 0, 9.0)
    counts = draw(logits.expand(600, -1), probs == 0).bincount(minlength=5)
    assert counts[probs == 0].sum() == 0
    # 2 degrees of freedom: above 14 once in a thousand seeds; noise that is uniform, not exponential, has 20
    assert ((counts - 600 * probs).square() / (600 * probs))[probs > 0].sum() < 14


def test_the_seed_and_the_place_decide_the_sample():
    logits, is_suppressed = torch.zeros(6, V), suppressed()
    draws = [draw(logits, is_suppressed, seed) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert len(draws[0].unique()) > 3  # of 6 rows with the same logits
    # two thirds; noise that comes again in every tile would leave all ties to the first
    assert (torch.cat(draws[1:]) >= 64).float().mean() > 0.5
    some = draw(logits[:3], is_suppressed, places=torch.tensor([5, 1, 4]))
    assert torch.equal(some, draws[0][[4, 0, 3]])


@pytest.mark.parametrize("temperature", [None, 0.5])
def test_rows_without_a_place_are_not_read(temperature):
    logits, places, seed = logits_of(5), torch.tensor([1, 0, 3, 0, 5]), torch.tensor([7])
    expected = kernels.sample_rows(logits, suppressed(), MASK, temperature=temperature, seed=seed)
    logits[1] = torch.nan
    results = kernels.sample_rows(logits, suppressed(), MASK, temperature=temperature, seed=seed, places=places)
    for result, whole, nothing in zip(results, expected, (MASK, -1.0, torch.inf, True), strict=True):
        assert torch.equal(result, whole.where(places > 0, torch.tensor(nothing, dtype=whole.dtype)))


def test_a_sample_has_the_confidence_of_temperature_1():
    logits = logits_of(5)
    seed = torch.tensor([1])
    tokens, confidence, *_ = kernels.sample_rows(logits, suppressed(), MASK, temperature=5.0, seed=seed)
    logits[:, MASK] = -torch.inf
    torch.testing.assert_close(confidence, logits.softmax(-1).gather(1, tokens[:, None]).squeeze(1))


def test_the_self_checks_pass(monkeypatch):
    monkeypatch.setattr(kernels, "VOCABULARY_TILE", 16)
    for name, problem in (("affine_scan", (10, 14)), ("sample_rows", ())):
        check, bound = kernels.CHECKS[name]
        assert check(torch.device("cpu"), *problem) < bound / 10


@pytest.fixture
def called(monkeypatch):
    """Take the Triton kernels on the CPU, and note which were taken."""
    names = []
    monkeypatch.setattr(kernels, "usable", lambda name, *problem: names.append(name) or True)
    return names


@pytest.mark.parametrize("block_size", [None, 16, 64, 128])
def test_the_delta_rule_over_chunks_equals_pytorch(called, monkeypatch, block_size):
    generator = torch.Generator().manual_seed(0)
    shapes = [(150, 2, 10), (150, 2, 10), (150, 4, 14), (150, 4), (150, 4)]
    q, k, v, g, beta = (torch.randn(2, *shape, generator=generator) for shape in shapes)
    inputs = DeltaRuleInputs(*(x.requires_grad_() for x in (q, k, v, -g.exp(), beta.sigmoid())))
    state = torch.randn(2, 4, 10, 14, generator=generator).requires_grad_()
    results = []
    for answer in (True, False):
        monkeypatch.setattr(kernels, "usable", lambda name, *problem, answer=answer: called.append(name) or answer)
        outputs = [x for x in gated_delta_rule(inputs, state, block_size) if x is not None]
        loss = sum((x * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() for x in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, [*inputs, state])])
    assert called == ["affine_scan"] * 4
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


def test_greedy_text_is_that_of_pytorch(called, monkeypatch):
    model, ids = tiny_model(), tokens(2, 85)  # more than a chunk to prefill
    knobs = {"do_sample": False, "max_new_tokens": 16, "steps": 4, "remasking_strategy": "entropy_bound"}
    text = model.generate(ids, suppress_tokens=[5, 6], entropy_bound=9.0, **knobs)
    assert set(called) == {"affine_scan", "sample_rows"}
    monkeypatch.setattr(kernels, "usable", lambda *problem: False)
    expected = model.generate(ids, suppress_tokens=[5, 6], entropy_bound=9.0, **knobs)
    assert torch.equal(text, expected)


def test_sampled_text_is_repeatable_and_other_processors_are_left_to_pytorch(called):
    model, ids = tiny_model(), tokens(1, 16)
    knobs = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 8, "steps": 2}
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(model.generate(ids, top_k=0, **knobs))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
    assert not (texts[0] == 96).any()
    assert "sample_rows" in called
    called.clear()
    model.generate(ids, top_k=3, **knobs)
    assert "sample_rows" not in called


def test_logits_that_are_not_finite_stop_the_run(called):
    model = tiny_model()
    model.lm_head.weight.data[5, 0] = torch.inf
    with pytest.raises(FloatingPointError, match=r"not finite\. Check the weights"):
        model.generate(tokens(1, 21), do_sample=False, max_new_tokens=8)
