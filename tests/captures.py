"""Stand-ins for a CUDA graph on a CPU, and what the tests of captured passes share."""

import torch
from conftest import noisy, tokens
from reference import error
from torch.fx.experimental.proxy_tensor import make_fx

from arclm.graphs_arclm import DenoisingGraphs, key_of


L = 4


class Traced:
    """Traces a function: freezes what a CUDA graph freezes, and refuses what it refuses.

    That is every tensor operation of one run with the memory it works on, and a value that the host asks for.
    """

    captures = 0

    def __init__(self, device):
        self.device = device

    def __call__(self, function):
        Traced.captures += 1
        program = make_fx(function)()
        for name, tensor in list(vars(program).items()) + list(program._buffers.items()):
            if isinstance(tensor, torch.Tensor):  # the memory itself: `parameter.data = ...` must not reach a replay
                setattr(program, name, tensor.detach())
        return _repeat(program)


class Rerun(Traced):
    """Runs the function again: quick to capture, for tests of where the data goes."""

    def __call__(self, function):
        Traced.captures += 1
        return _repeat(function)


def _repeat(program) -> tuple:
    """What runs `program` again, and its outputs, which that overwrites."""
    outputs = program()

    def replay():
        for old, new in zip(_tensors(outputs), _tensors(program()), strict=True):
            old.copy_(new)

    return replay, outputs


def _tensors(tree) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def sample_rows(logits, is_suppressed, mask_token_id, *, temperature=None, seed=None, places):
    """Stands for the Triton kernel of that name on a CPU, with random numbers of its own."""
    column, is_read = torch.arange(logits.shape[1]), places > 0
    scores = logits.float().masked_fill(column == mask_token_id, -torch.inf)
    probs = scores.softmax(-1)
    scores = scores.masked_fill(is_suppressed, -torch.inf)
    if temperature is not None:
        phase = (places[:, None] * len(column) + column + seed % 9973).double() * 12.9898
        uniform = (phase.sin() * 43758.5453).frac().abs().clamp(1e-9, 1 - 1e-9)
        scores = scores / temperature - (-uniform.log()).log()
    tokens = torch.where(is_read, scores.argmax(-1), mask_token_id)
    confidence = torch.where(is_read, probs.gather(1, tokens[:, None]).squeeze(1), -1.0)
    entropy = torch.where(is_read, torch.special.entr(probs).sum(-1), torch.inf)
    return tokens, confidence, entropy, probs[:, 0].isfinite() | ~is_read


def graphs_of(model) -> DenoisingGraphs:
    graphs = DenoisingGraphs(Traced(model.device))
    graphs.renew(key_of(model.model))
    return graphs


def prefilled(model, *lengths: int):
    """A cache of rows of these lengths, padded where they differ."""
    ids = tokens(len(lengths), max(lengths), seed=sum(lengths))
    mask = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    return model(ids, attention_mask=mask, use_cache=True).past_key_values


def block(seed: int, batch: int = 1, length: int = L) -> torch.Tensor:
    return noisy(tokens(batch, length, seed), seed)


def cache_error(a, b) -> float:
    """The largest difference of two caches."""
    names = ("keys", "values", "conv_states", "recurrent_states")
    pairs = [pair for name in names for pair in zip(getattr(a, name), getattr(b, name), strict=True)]
    assert torch.equal(a.lengths, b.lengths)
    assert torch.equal(a.token_ids, b.token_ids)
    assert (a.token_mask is None) == (b.token_mask is None)
    assert a.token_mask is None or torch.equal(a.token_mask, b.token_mask)
    pairs.append((a.last_hidden_state, b.last_hidden_state))
    return max(error(x, y) for x, y in pairs if x is not None)


def new_memory(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1
