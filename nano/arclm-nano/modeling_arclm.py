"""arcLM: Qwen3.5 that denoises blocks of tokens.

Just like `transformers.models.qwen3_5`, with three differences:

1. A token is read in one of two streams. The clean stream x_0 holds settled tokens and is Qwen3.5's own, but for
   `context_attention="block_causal"`, where a token also attends to the rest of its block. The noisy stream x_t holds
   blocks being denoised: a noisy token attends to its own noisy block in both directions and to the CLEAN tokens of
   earlier blocks (`Streams`).
2. In a linear-attention layer every noisy block starts from its boundary state: what the clean tokens before the block
   leave in the recurrence and in the convolution. No noisy token ever enters the state (`ArcLMGatedDeltaNet`).
3. The cache is written by commits, passes over clean tokens, and only read by denoising steps (`ArcLMCache`).

Everything else, names of weights included, is Qwen3.5's: a converted checkpoint differs by one embedding row.
Sampling is in `generation_bd3lm.py`, noise and training in `train_bd3lm.py`, layers in few kernels in `fused_arclm.py`
and, with gradients, in `trained_arclm.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5MLP, Qwen3_5RMSNorm
from transformers.utils import ModelOutput, can_return_tuple

from .attention_arclm import ArcLMAttention
from .cache_arclm import ArcLMCache, CacheAccess, last_tokens
from .configuration_arclm import ArcLMConfig
from .fused_arclm import fused_layer, use_fused_layer
from .gated_delta_rule import DeltaRuleInputs, gated_delta_rule
from .generation_bd3lm import BD3LMGenerationMixin
from .layers_arclm import ArcLMConv1d, ArcLMRMSNormGated, use_arclm_linear
from .linear_cross_entropy import linear_cross_entropy, weight_of
from .streams_arclm import Streams, check_inputs, clean_targets, shift_right
from .trained_arclm import trained_layer, use_trained_layer


class ArcLMGatedDeltaNet(nn.Module):
    """Gated DeltaNet mixer with the weights of `Qwen3_5GatedDeltaNet`; the caller owns the state."""

    def __init__(self, config: ArcLMConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_k_dim, self.head_v_dim = config.linear_key_head_dim, config.linear_value_head_dim
        self.key_dim = self.head_k_dim * config.linear_num_key_heads
        self.value_dim = self.head_v_dim * config.linear_num_value_heads
        self.kernel = config.linear_conv_kernel_dim
        conv_dim = 2 * self.key_dim + self.value_dim
        self.conv1d = ArcLMConv1d(conv_dim, conv_dim, self.kernel, groups=conv_dim, bias=False)
        self.dt_bias = nn.Parameter(torch.ones(config.linear_num_value_heads))
        self.A_log = nn.Parameter(torch.zeros(config.linear_num_value_heads))
        self.norm = ArcLMRMSNormGated(self.head_v_dim, config.rms_norm_eps)
        self.in_proj_qkv = nn.Linear(config.hidden_size, conv_dim, bias=False)
        self.in_proj_z = nn.Linear(config.hidden_size, self.value_dim, bias=False)
        self.in_proj_b = nn.Linear(config.hidden_size, config.linear_num_value_heads, bias=False)
        self.in_proj_a = nn.Linear(config.hidden_size, config.linear_num_value_heads, bias=False)
        self.out_proj = nn.Linear(self.value_dim, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor, streams: Streams, access: CacheAccess | None) -> torch.Tensor:
        """Mix the columns [B, columns, D] of one or both streams; commits write the boundary state to the cache."""
        mixed, (beta, g) = self.in_proj_qkv(hidden_states), self.gates(hidden_states, streams)
        if streams.noisy_blocks is not None:
            output = self._two_streams(mixed, beta, g, streams)
        else:
            output = self._after_context(mixed, beta, g, streams, access)
        gate = self.in_proj_z(hidden_states).unflatten(-1, (-1, self.head_v_dim))
        return self.out_proj(self.norm(output, gate).flatten(2))

    def gates(self, hidden_states: torch.Tensor, streams: Streams) -> tuple[torch.Tensor, torch.Tensor]:
        """beta and g of `DeltaRuleInputs`, [B, columns, H]."""
        beta = self.in_proj_b(hidden_states).sigmoid()
        # float32: exp(A_log) and the sum of many small g lose too much in bfloat16
        g = -self.A_log.float().exp() * F.softplus(self.in_proj_a(hidden_states).float() + self.dt_bias.float())
        if streams.token_mask is not None and streams.num_noisy < beta.shape[1]:  # padding leaves the state alone
            is_token = F.pad(streams.token_mask, (streams.num_noisy, 0), value=True)[..., None]
            beta, g = beta * is_token, g * is_token
        return beta, g

    def _after_context(self, mixed, beta, g, streams: Streams, access: CacheAccess | None) -> torch.Tensor:
        """Clean tokens after the context in the cache, then one noisy block after these, or one of the two."""
        cache, split, outputs = None if access is None else access.cache, streams.num_noisy, []
        history = None if cache is None else cache.conv_states[self.layer_idx]
        state = None if cache is None else cache.recurrent_states[self.layer_idx]
        if history is None:
            history = mixed.new_zeros(mixed.shape[0], self.kernel - 1, mixed.shape[-1])

        def read(columns: slice, need_final: bool) -> tuple[torch.Tensor, torch.Tensor]:
            """Read columns from `history` and `state` on; returns the convolution's inputs and the new state."""
            padded = torch.cat((history, mixed[:, columns]), 1)
            inputs = self._heads(self.conv1d(padded), beta[:, columns], g[:, columns])
            output, new_state, _ = gated_delta_rule(inputs, state, need_final=need_final)
            outputs.append(output)
            return padded, new_state

        if split < mixed.shape[1]:
            padded, state = read(slice(split, None), need_final=True)
            history = last_tokens(padded, self.kernel - 1, streams.token_mask)
        if split:
            read(slice(split), need_final=False)
        if access is not None and access.commit:
            cache.conv_states[self.layer_idx], cache.recurrent_states[self.layer_idx] = history, state
        return torch.cat(outputs[::-1], 1) if outputs[1:] else outputs[0]

    def _two_streams(self, mixed, beta, g, streams: Streams) -> torch.Tensor:
        """The clean stream, then the noisy blocks as a batch of their own, each from its boundary state."""
        split, block_size, history = streams.num_noisy, streams.block_size, self.kernel - 1
        padded = F.pad(mixed[:, split:], (0, 0, history, 0))
        inputs = self._heads(self.conv1d(padded), beta[:, split:], g[:, split:])
        clean_output, _, states = gated_delta_rule(inputs, None, block_size, need_final=False)  # [B, N, H, K, Vd]

        def of_blocks(x: torch.Tensor) -> torch.Tensor:
            """[B, N, ...] -> [B * M, ...], the noisy blocks that are read."""
            index = streams.noisy_blocks.expand(len(x), -1)
            return x[torch.arange(len(x), device=x.device)[:, None], index].flatten(0, 1)

        def blocks(x: torch.Tensor) -> torch.Tensor:
            """[B, num_noisy, D] -> [B * M, L, D]."""
            return x[:, :split].unflatten(1, (-1, block_size)).flatten(0, 1)

        # the `history` clean rows before each block: row n * block_size of `padded` is the first of block n's
        before = [of_blocks(padded.unfold(1, history, block_size).mT)] if history else []
        inputs = self._heads(self.conv1d(torch.cat((*before, blocks(mixed)), 1)), blocks(beta), blocks(g))
        noisy_output, _, _ = gated_delta_rule(inputs, of_blocks(states), need_final=False)
        return torch.cat((noisy_output.unflatten(0, (len(mixed), -1)).flatten(1, 2), clean_output), 1)

    def _heads(self, mixed: torch.Tensor, beta: torch.Tensor, g: torch.Tensor) -> DeltaRuleInputs:
        q, k, v = mixed.split((self.key_dim, self.key_dim, self.value_dim), -1)
        k_heads, v_heads = (-1, self.head_k_dim), (-1, self.head_v_dim)
        return DeltaRuleInputs(q.unflatten(-1, k_heads), k.unflatten(-1, k_heads), v.unflatten(-1, v_heads), g, beta)


class ArcLMDecoderLayer(GradientCheckpointingLayer):
    """Qwen3.5's layer: a mixer (linear or full attention), then an MLP, each with its norm and residual."""

    def __init__(self, config: ArcLMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.is_linear = config.layer_types[layer_idx] == "linear_attention"
        if self.is_linear:
            self.linear_attn = ArcLMGatedDeltaNet(config, layer_idx)
        else:
            self.self_attn = ArcLMAttention(config, layer_idx)
        self.mlp = Qwen3_5MLP(config, config.intermediate_size)
        self.input_layernorm = Qwen3_5RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3_5RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, hidden_states: torch.Tensor, streams: Streams, access: CacheAccess | None, keep: int | None = None
    ) -> torch.Tensor:
        """Map hidden states [B, columns, D] to hidden states of the same shape, or of the first `keep` columns."""
        if keep is None and use_fused_layer(self, hidden_states, streams):
            return fused_layer(self, hidden_states, streams, access)
        if use_trained_layer(self, hidden_states, streams):
            return trained_layer(self, hidden_states, streams, keep)
        normed = self.input_layernorm(hidden_states)
        if self.is_linear:
            mixed = self.linear_attn(normed, streams, access)
        else:
            mixed = self.self_attn(normed, (streams.cos, streams.sin), streams.attention, access)
        hidden_states = hidden_states[:, :keep] + mixed[:, :keep]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


@dataclass
class ArcLMModelOutput(ModelOutput):
    """Hidden states [B, T, D] of one forward pass.

    Fields:
        last_hidden_state: of the noisy stream where there is one, else of the clean stream.
        clean_last_hidden_state: of the clean stream; `None` in a denoising step.
        predictive_hidden_state: what the logits come from: `last_hidden_state`, one position earlier in the noisy
            stream under `right_shift_logits`.
        past_key_values: the cache, where one was given or asked for.
        hidden_states: with `output_hidden_states`, the input of each layer and the last hidden state, of the stream
            that `last_hidden_state` belongs to.
    """

    last_hidden_state: torch.Tensor | None = None
    clean_last_hidden_state: torch.Tensor | None = None
    predictive_hidden_state: torch.Tensor | None = None
    past_key_values: ArcLMCache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class ArcLMOutput(ModelOutput):
    """What `ArcLMForDiffusionLM` returns.

    Fields:
        loss: [] float32, where `labels` were given.
        logits: [B, T, V], or what `logits_to_keep` asks for; `None` with `labels`, because they would not fit.
        past_key_values, hidden_states: see `ArcLMModelOutput`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: ArcLMCache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


class ArcLMPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by the classes below."""

    config_class = ArcLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ArcLMDecoderLayer"]
    _skip_keys_device_placement = ["access", "past_key_values"]
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["A_log", "linear_attn.norm"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ArcLMGatedDeltaNet):
            init.ones_(module.dt_bias)
            # decays e^-0.01 to e^-16 per token, as Qwen3.5; away from 0, whose logarithm is -inf
            init.copy_(module.A_log, torch.empty_like(module.A_log).uniform_(0.01, 16).log_())
        elif isinstance(module, Qwen3_5RMSNorm):
            init.zeros_(module.weight)  # it multiplies by 1 + weight

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs) -> Any:
        """Load as `PreTrainedModel.from_pretrained`, and refuse a checkpoint that does not hold every weight.

        Raises:
            ValueError: weights are missing: the parent would fill them with random numbers and only warn. Or they
                cannot be quantised as asked.
        """
        path, kwargs["output_loading_info"] = pretrained_model_name_or_path, True
        try:
            model, info = super().from_pretrained(path, *args, **kwargs)
        except RuntimeError as error:
            if kwargs.get("quantization_config") is None:
                raise
            raise ValueError(
                f"{path} cannot be quantised in this way on this machine: the report above gives the reason for each "
                "weight. TorchAoConfig(Int8WeightOnlyConfig()) needs no GPU and no other package."
            ) from error
        if info["missing_keys"]:
            raise ValueError(
                f"{path} lacks {len(info['missing_keys'])} weights of {cls.__name__}, among them "
                f"{min(info['missing_keys'])}. Convert a Qwen3.5 checkpoint with convert_a2d.py first."
            )
        use_arclm_linear(model)  # what a quantization_config has left
        return (model, info) if output_loading_info else model


class ArcLMModel(ArcLMPreTrainedModel):
    """Embedding, layers and final norm over the clean stream, the noisy stream, or both."""

    def __init__(self, config: ArcLMConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(ArcLMDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Qwen3_5RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        noisy_input_ids: torch.Tensor | None = None,
        past_key_values: ArcLMCache | None = None,
        use_cache: bool | None = None,
        block_size: int | None = None,
        needed: torch.Tensor | None = None,
        need_clean: bool = True,
        output_hidden_states: bool | None = None,
    ) -> ArcLMModelOutput:
        """Read one or both streams.

        For the arguments see `ArcLMForDiffusionLM.forward`. With both streams, `needed` [B, T] bool limits the noisy
        stream to the blocks that hold a True; the hidden states of the others are 0. Without `need_clean` those of the
        clean stream may be left out.
        """
        block_size = self.config.block_size if block_size is None else block_size
        cache = past_key_values
        if use_cache and cache is None and noisy_input_ids is None:
            cache = ArcLMCache(len(self.layers))
        check_inputs(
            input_ids, noisy_input_ids, cache, needed, use_cache=use_cache, config=self.config, block_size=block_size
        )
        if cache is not None and self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            raise ValueError(
                "A cache does not go with gradient checkpointing: it would be written twice. Use no_grad."
            )
        commit = cache is not None and input_ids is not None and use_cache is not False
        ids, streams = Streams.of(
            input_ids, noisy_input_ids, attention_mask, block_size=block_size, cache=cache, needed=needed
        )
        streams = streams.for_layers(self.config, cache, self.embed_tokens.weight.dtype)
        noisy_alone = not (need_clean or output_hidden_states or commit or self.config.right_shift_logits)
        keep = streams.num_noisy if noisy_alone and streams.num_noisy else None
        output = self.read(ids, streams, cache, commit=commit, keep=keep, output_hidden_states=output_hidden_states)
        to_caller = partial(streams.to_caller, noisy=bool(streams.num_noisy))
        output.last_hidden_state = to_caller(output.last_hidden_state)
        output.predictive_hidden_state = to_caller(output.predictive_hidden_state)
        if (clean := output.clean_last_hidden_state) is not None:
            output.clean_last_hidden_state = streams.to_caller(clean, noisy=False)
        if output_hidden_states:
            output.hidden_states = tuple(map(to_caller, output.hidden_states))
        return output

    def read(
        self,
        ids: torch.Tensor,
        streams: Streams,
        cache: ArcLMCache | None,
        *,
        commit: bool,
        keep: int | None = None,
        output_hidden_states: bool | None = None,
    ) -> ArcLMModelOutput:
        """Embedding, layers and norm over ids [B, columns] as `streams` lays them out; hidden states in its columns.

        With `keep`, after the last mixer the first columns alone go on: nothing asks for the others any more. All that
        asks the host comes before this function or after it: `graphs_arclm.py` captures it.
        """
        access = None if cache is None else CacheAccess(cache, streams.num_noisy, commit)
        hidden_states = self.embed_tokens(ids)
        own_columns, layer_inputs = slice(0, streams.num_noisy or None), []
        for layer in self.layers:
            if output_hidden_states:
                layer_inputs.append(hidden_states[:, own_columns].to(ids.device))
            hidden_states = layer(hidden_states, streams, access, keep if layer is self.layers[-1] else None)
        hidden_states = self.norm(hidden_states).to(ids.device)  # layers may be spread over several devices

        noisy, clean = hidden_states[:, : streams.num_noisy], hidden_states[:, streams.num_noisy :]
        if commit:
            cache.advance(streams.token_mask, ids[:, streams.num_noisy :], clean, streams.block_size)
        own = noisy if streams.num_noisy else clean
        shifted = self.config.right_shift_logits and streams.num_noisy
        return ArcLMModelOutput(
            last_hidden_state=own,
            clean_last_hidden_state=clean if clean.shape[1] else None,
            predictive_hidden_state=shift_right(noisy, clean, streams, cache) if shifted else own,
            past_key_values=cache,
            hidden_states=(*layer_inputs, own) if output_hidden_states else None,
        )


class ArcLMForDiffusionLM(BD3LMGenerationMixin, ArcLMPreTrainedModel, GenerationMixin):
    """arcLM with its language-model head: the class that `AutoModel.from_pretrained` returns.

    - `input_ids`: the clean stream. Logits at position i predict token i + 1, as the parent's.
    - `input_ids, noisy_input_ids`: both streams in one pass. Noisy logits at position i predict token i.
    - `input_ids, past_key_values` (or `use_cache=True`): prefill or commit; appends to the cache.
    - `noisy_input_ids, past_key_values`: a denoising step on the block after the context; changes nothing.
    - all three: a commit, and a denoising step on the block after it.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    # the loss is a sum divided by `num_items_in_batch`, so the Trainer must not divide it again
    accepts_loss_kwargs = True

    def __init__(self, config: ArcLMConfig):
        super().__init__(config)
        self.model = ArcLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if getattr(config, "quantization_config", None) is None:  # bitsandbytes replaces what is exactly nn.Linear
            use_arclm_linear(self)
        self.post_init()

    @property
    def init_continuous_batching(self):
        """Tell `transformers serve` that it has to call `generate`."""
        raise AttributeError("Block diffusion does not go with the continuous batching of transformers.")

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        noisy_input_ids: torch.Tensor | None = None,
        past_key_values: ArcLMCache | None = None,
        use_cache: bool | None = None,
        labels: torch.Tensor | None = None,
        loss_weights: torch.Tensor | None = None,
        clean_loss_weights: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        block_size: int | None = None,
        logits_to_keep: int | torch.Tensor | tuple[torch.Tensor, ...] = 0,
        output_hidden_states: bool | None = None,
        graphs: Callable[..., torch.Tensor | None] | None = None,
        **kwargs,
    ) -> ArcLMOutput | tuple:
        """Read the clean stream, the noisy stream, or both: the five passes of the class.

        Args:
            input_ids: [B, T] clean token ids, x_0.
            attention_mask: [B, T] or [B, context + T], 1 for tokens; positions and blocks count from the first one.
            noisy_input_ids: [B, T] noisy token ids, x_t; at most one block without `input_ids` or with a cache.
            past_key_values: the context, changed in place by a commit.
            use_cache: make a cache of `input_ids` alone (`True`), or leave the given one unchanged (`False`).
            labels: [B, T] target ids, -100 for no target, compared with the logits at the same position.
            loss_weights: [B, T] float factor of each position's cross-entropy, 1 if `None`.
            clean_loss_weights: [B, T] float, adds an AR loss: the factor of predicting token i + 1 from clean token i.
            num_items_in_batch: what each sum is divided by, the number of its targets if `None`.
            block_size: tokens per block, the trained size if `None`.
            logits_to_keep: how many last columns get logits, 0 for all; or M positions: [B, T] bool, or two indices.
            output_hidden_states: as in transformers, those of the stream that the logits come from.
            graphs: captured passes, used instead of the layers where one fits (`graphs_arclm.py`).
            kwargs: switches of other transformers models, accepted when they are off.

        Raises:
            ValueError, TypeError: the inputs do not fit together, or an argument is unknown.
        """
        if unknown := sorted(name for name, value in kwargs.items() if value is not None and value is not False):
            raise TypeError(f"forward() got unknown arguments {', '.join(unknown)}.")
        inputs = {"noisy_input_ids": noisy_input_ids, "past_key_values": past_key_values, "block_size": block_size}
        hidden = None if graphs is None else graphs(self.model, input_ids, attention_mask, **inputs)
        if hidden is not None:
            return ArcLMOutput(logits=self.lm_head(_kept(hidden, logits_to_keep)), past_key_values=past_key_values)
        targets = clean_targets(clean_loss_weights, input_ids, noisy_input_ids, labels, self.config)
        inputs |= {"needed": None if labels is None else labels != -100, "use_cache": use_cache}
        inputs |= {"need_clean": labels is None or targets is not None, "output_hidden_states": output_hidden_states}
        outputs = self.model(input_ids, attention_mask, **inputs)
        output = ArcLMOutput(past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states)
        hidden = outputs.predictive_hidden_state
        if labels is None:
            output.logits = self.lm_head(_kept(hidden, logits_to_keep))
        else:
            weight = weight_of(self.lm_head)
            output.loss = linear_cross_entropy(hidden, weight, labels, loss_weights, num_items_in_batch)
        if targets is not None:
            clean = (outputs.clean_last_hidden_state, weight, targets, clean_loss_weights, num_items_in_batch)
            output.loss += linear_cross_entropy(*clean)
        return output


def _kept(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor | tuple) -> torch.Tensor:
    """The last columns of [B, T, D], 0 for all, or what an index of [B, T] names as [M, D]."""
    is_count = isinstance(logits_to_keep, int)
    return hidden_states[:, -logits_to_keep:] if is_count else hidden_states[logits_to_keep]


ArcLMForDiffusionLM.register_for_auto_class("AutoModel")
if __package__ == "arclm":
    AutoModel.register(ArcLMConfig, ArcLMForDiffusionLM, exist_ok=True)
    AutoModelForCausalLM.register(ArcLMConfig, ArcLMForDiffusionLM, exist_ok=True)
