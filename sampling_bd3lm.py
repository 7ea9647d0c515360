"""The knobs of block-diffusion sampling, its logits processors, and what it says to bad input."""

from numbers import Integral, Real
from typing import Any

import torch
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .cache_arclm import check_context


# Knobs of block diffusion that transformers' GenerationConfig does not know, with their defaults.
KNOBS = {
    "block_size": None,
    "steps": None,
    "max_denoising_steps": None,
    "remasking_strategy": "low_confidence_static",
    "confidence_threshold": 0.9,
    "entropy_bound": 0.1,
    "use_cuda_graphs": True,
}
KINDS = {
    "max_new_tokens": Integral,
    "max_length": Integral,
    "num_return_sequences": Integral,
    "block_size": Integral,
    "steps": Integral,
    "max_denoising_steps": Integral,
    "confidence_threshold": Real,
    "entropy_bound": Real,
    "use_cuda_graphs": bool,
}
REMASKING_STRATEGIES = ("low_confidence_static", "low_confidence_dynamic", "entropy_bound", "sequential", "random")
DEFAULT_MAX_NEW_TOKENS = 256
# Modes of transformers' `generate` that this one has not.
OTHER_MODES = ("num_beams", "guidance_scale", "output_scores", "output_logits", "prompt_lookup_num_tokens", "use_mtp")
OTHER_MODES += ("force_words_ids", "constraints", "penalty_alpha", "dola_layers", "assistant_early_exit")


def draw(probs: torch.Tensor) -> torch.Tensor:
    """Draw a token for each row of probabilities [M, V], float32; returns [M, 1] int64.

    The first token at which the accumulated probability reaches a random number in (0, 1]: it has a probability above
    zero. torch.multinomial draws V random numbers per row instead, which on a CPU takes 40 times as long. On a GPU,
    where sums are not accumulated in order, this does the same, without the checks: they wait for the device, and end
    the process where a probability is NaN.
    """
    if probs.device.type != "cpu":
        return (probs / torch.empty_like(probs).exponential_()).argmax(-1, keepdim=True)
    accumulated = probs.cumsum(-1)
    return torch.searchsorted(accumulated, (1 - torch.rand(len(probs), 1)) * accumulated[:, -1:])


class SuppressTokens(SuppressTokensLogitsProcessor):
    """Just like its parent, with one difference: it finds the tokens once. The parent sorts [V] ids at every call.

    Fields:
        is_suppressed: [V] bool.
    """

    def __init__(self, suppress_tokens: torch.Tensor, vocab_size: int, device: torch.device):
        self.is_suppressed = torch.isin(torch.arange(vocab_size, device=device), suppress_tokens.to(device))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(self.is_suppressed, -torch.inf)


# What these do to the scores of a position depends on nothing before it.
WITHOUT_HISTORY = (MinPLogitsWarper, SuppressTokens, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)


def fast_processors(processors: list, do_sample: bool, config, device: torch.device) -> tuple:
    """The processors with `SuppressTokens` in the place of its parent, and what `sample_rows` does of them.

    Returns:
        The processors in their order; for `sample_rows` `is_suppressed` [V], `None` if a processor does more than set
        this or the temperature, and `temperature`.
    """
    processors = LogitsProcessorList(
        SuppressTokens(x.suppress_tokens, config.vocab_size, device) if type(x) is SuppressTokensLogitsProcessor else x
        for x in processors
    )
    is_suppressed = torch.zeros(config.vocab_size, dtype=torch.bool, device=device)
    is_suppressed[config.mask_token_id] = True
    temperature = 1.0
    for processor in processors:
        if type(processor) is TemperatureLogitsWarper:
            temperature *= processor.temperature
        elif type(processor) is SuppressTokens:
            is_suppressed |= processor.is_suppressed
    if is_suppressed.all():
        raise ValueError("suppress_tokens leaves no token but the mask token, if that. Leave some of them out.")
    if not all(type(x) in (SuppressTokens, TemperatureLogitsWarper) for x in processors):
        return processors, None, None
    return processors, is_suppressed, temperature if do_sample else None


def check_modes(generation_config) -> None:
    """Raise a ValueError where a mode of transformers' `generate` is on that this one has not."""
    for mode in OTHER_MODES:
        value = getattr(generation_config, mode, None)
        if value is True or value not in (None, False, 1):
            raise ValueError(f"{mode}={value} does not go with block diffusion. Leave it out.")


def check_knobs(knobs: dict[str, Any], trained_block_size: int) -> None:
    """Raise a ValueError or TypeError that names the knob or field, its value and what is allowed."""
    for name, kind in KINDS.items():
        if knobs[name] is not None and not isinstance(knobs[name], kind):
            word = {Integral: "a whole number", Real: "a number", bool: "True or False"}[kind]
            raise TypeError(f"{name}={knobs[name]!r} must be {word}.")
    if knobs["remasking_strategy"] not in REMASKING_STRATEGIES:
        raise ValueError(
            f"remasking_strategy={knobs['remasking_strategy']!r} is unknown. "
            f"Choose one of {', '.join(REMASKING_STRATEGIES)}."
        )
    if not 1 <= knobs["block_size"] <= trained_block_size:
        raise ValueError(
            f"block_size={knobs['block_size']} is outside [1, {trained_block_size}], up to the trained size."
        )
    for name in ("steps", "max_denoising_steps", "num_return_sequences"):
        if knobs[name] is not None and knobs[name] < 1:
            raise ValueError(f"{name}={knobs[name]} must be at least 1.")
    if not 0 <= knobs["confidence_threshold"] <= 1:
        raise ValueError(
            f"confidence_threshold={knobs['confidence_threshold']} is outside [0, 1]. "
            "It is a probability: 0.9 is safe, lower is faster."
        )
    if not knobs["entropy_bound"] >= 0:
        raise ValueError(f"entropy_bound={knobs['entropy_bound']} must be at least 0 (nats).")


def check_logits(is_finite: torch.Tensor) -> None:
    """Raise if a position has had no probabilities: what was drawn from them means nothing."""
    if not is_finite.all():
        raise FloatingPointError(
            "The logits, or those that the processors left, are not finite. Check the weights and the processors; in "
            "float16 they may have overflowed: load it with dtype=torch.bfloat16 or torch.float32."
        )


def check_prompt(input_ids: Any, config) -> None:
    """Raise a TypeError or ValueError unless `input_ids` are [B, P] ids of the vocabulary."""
    if input_ids is not None and (not isinstance(input_ids, torch.Tensor) or input_ids.is_floating_point()):
        got = getattr(input_ids, "dtype", type(input_ids).__name__)
        raise TypeError(f"input_ids must be a tensor of whole numbers, got {got}. Call generate(**tokenizer(...)).")
    if input_ids is None or input_ids.ndim != 2 or not input_ids.numel():
        got = "None" if input_ids is None else list(input_ids.shape)
        raise ValueError(f"input_ids must be [batch, tokens] with at least one token, got {got}.")
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"input_ids has the id {low if low < 0 else high}, outside the vocabulary [0, {config.vocab_size}). "
            "Use the tokenizer of this model."
        )


def check_attention_mask(attention_mask: Any, input_ids: torch.Tensor) -> None:
    """Raise a TypeError or ValueError unless it is of the shape of `input_ids` and every row has a token."""
    if not isinstance(attention_mask, torch.Tensor):
        raise TypeError(f"attention_mask must be a tensor like input_ids, got {type(attention_mask).__name__}.")
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must be {list(input_ids.shape)} like input_ids, got {list(attention_mask.shape)}."
        )
    if not attention_mask.any(1).all():
        row = int(attention_mask.any(1).int().argmin())
        raise ValueError(f"The prompt of row {row} is all padding. Give every prompt at least one token.")


def check_cache(cache, ids: torch.Tensor, starts: torch.Tensor, config, block_size: int) -> torch.Tensor:
    """Return how many tokens of each row are cached, [B]; a ValueError unless they begin the prompt.

    Args:
        cache: what was passed as `past_key_values`.
        ids: [B, W] prompts, aligned left.
        starts: [B] tokens in the complete blocks of each prompt.
        config: of the model.
        block_size: tokens per block of this run.
    """
    check_context(cache, len(ids), config, block_size)
    if cache.lengths is None:
        return torch.zeros_like(starts)
    if (cache.lengths > starts).any():
        raise ValueError(
            f"past_key_values holds {cache.lengths.tolist()} tokens per row, the complete blocks of the prompts only "
            f"{starts.tolist()}. Pass a prompt that continues the cached text."
        )
    for row, length in enumerate(cache.lengths.tolist()):
        if not torch.equal(cache.row_token_ids(row), ids[row, :length]):
            raise ValueError(
                f"past_key_values holds other tokens than the prompt of row {row} begins with. Pass a prompt that "
                "continues the cached text, or no cache."
            )
    return cache.lengths
