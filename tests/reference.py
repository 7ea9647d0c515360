"""The slow and obviously right twins of what the package does fast: token by token, block by block, Python loops."""

import torch
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from arclm.gated_delta_rule import DeltaRuleInputs, l2norm


def delta_rule_steps(
    inputs: DeltaRuleInputs, state: torch.Tensor, positions: range
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Run the recurrence of the module docstring over `positions`; returns outputs [B, H, Vd] each, and the state."""
    repeat = inputs.v.shape[2] // inputs.q.shape[2]
    q = l2norm(inputs.q).repeat_interleave(repeat, 2) * inputs.q.shape[-1] ** -0.5
    k = l2norm(inputs.k).repeat_interleave(repeat, 2)
    outputs = []
    for t in positions:
        state = state * inputs.g[:, t].exp()[..., None, None]
        written = inputs.beta[:, t, :, None] * (inputs.v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t]))
        state = state + k[:, t, :, :, None] * written[:, :, None]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return outputs, state


def two_stream_delta_rule(clean: DeltaRuleInputs, noisy: DeltaRuleInputs, block_size: int, state: torch.Tensor):
    """Noisy block n starts from the clean state after block n - 1; what it writes is thrown away."""
    tokens = clean.q.shape[1]
    clean_outputs, noisy_outputs = [], []
    for start in range(0, tokens, block_size):
        block = range(start, min(start + block_size, tokens))
        noisy_outputs += delta_rule_steps(noisy, state, block)[0]
        outputs, state = delta_rule_steps(clean, state, block)
        clean_outputs += outputs
    return torch.stack(clean_outputs, 1), torch.stack(noisy_outputs, 1), state


def blockwise_logits(model, x_0: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
    """Noisy logits [B, T, V] as generation computes them: denoise a block over the cache, commit it clean, go on."""
    block_size, cache, logits = model.config.block_size, None, []
    for start in range(0, x_0.shape[1], block_size):
        block = slice(start, start + block_size)
        logits.append(model(noisy_input_ids=x_t[:, block], past_key_values=cache).logits)
        if start + block_size < x_0.shape[1]:
            cache = model(x_0[:, block], past_key_values=cache, use_cache=True).past_key_values
    return torch.cat(logits, 1)


def parent_of(model) -> Qwen3_5ForCausalLM:
    """Qwen3.5 with the weights of `model`."""
    ours = {"block_size", "mask_token_id", "context_attention", "right_shift_logits", "model_type", "auto_map"}
    config = Qwen3_5TextConfig(**{k: v for k, v in model.config.to_dict().items() if k not in ours})
    parent = Qwen3_5ForCausalLM(config).eval()
    parent.load_state_dict(model.state_dict())
    return parent


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference."""
    return float((a - b).abs().max())
