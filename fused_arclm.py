"""Layers of a pass without gradients on a GPU in bfloat16, in a few Triton kernels each.

A denoising step reads 1.5 GB of weights in half a millisecond, but launches some 1,600 operations in plain PyTorch,
and each costs 2 us however small it is. Here a layer is some ten launches (`fused_layer`), and the delta rule of a
block is matrix products instead of 64 steps one after the other (`delta_rule`).
"""

from operator import attrgetter
from typing import Any

import torch
from torch import nn

from .attention_kernels_arclm import attention, query_key
from .cache_arclm import ArcLMCache, CacheAccess, last_tokens
from .configuration_arclm import ArcLMConfig
from .delta_kernels_arclm import convolution, delta_rule, gated_norm
from .kernels_arclm import CHECKS, normal_numbers, relative_error, usable
from .layers_arclm import ArcLMLinear, runs_as_written
from .linear_kernels_arclm import linear, rms_norm, silu_mul
from .streams_arclm import Streams


DEVICE = "cuda"  # the type that they run on
MAX_QUERIES = 256  # of a row; more fill a GPU by themselves, as PyTorch's attention reads them
# Contexts and blocks of the self-check: several splits of the keys, several chunks of the delta rule in a block,
# few rows and more.
CHECK_LENGTHS = (192, 32), (192, 64)
FEW_ROWS = 64  # up to here a product waits for its weights, and is faster in one launch with what stands around it
# What the kernels are compiled for.
FIELDS = (
    "hidden_size",
    "intermediate_size",
    "hidden_act",
    "rms_norm_eps",
    "head_dim",
    "num_attention_heads",
    "num_key_value_heads",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_value_head_dim",
)


def fused_layer(
    layer: nn.Module, hidden_states: torch.Tensor, streams: Streams, access: CacheAccess | None
) -> torch.Tensor:
    """`ArcLMDecoderLayer` without gradients: hidden states [B, columns, D] to hidden states."""
    batch, mlp, norm = len(hidden_states), layer.mlp, layer.post_attention_layernorm
    x = hidden_states.flatten(0, 1).contiguous()
    with torch.cuda.device_of(x):  # where Triton launches
        normed = rms_norm(x, layer.input_layernorm)
        if layer.is_linear:
            mixed, project = _delta_net(layer.linear_attn, normed, batch, streams, access), layer.linear_attn.out_proj
        else:
            mixed, project = _attend(layer.self_attn, normed, batch, streams, access), layer.self_attn.o_proj
        if len(x) <= FEW_ROWS:
            x, scaled = linear(mixed, [project], residual=x, next_norm=norm)
            x = linear(linear(scaled, [mlp.gate_proj, mlp.up_proj], gated=True), [mlp.down_proj], residual=x)
        else:
            x = torch.addmm(x, mixed, project.weight.T)
            normed = rms_norm(x, norm)
            x = torch.addmm(x, silu_mul(mlp.gate_proj(normed), mlp.up_proj(normed)), mlp.down_proj.weight.T)
    return x.view(hidden_states.shape)


def _delta_net(net: nn.Module, x: torch.Tensor, batch: int, streams: Streams, access) -> torch.Tensor:
    """`ArcLMGatedDeltaNet` up to `out_proj`, of its normed input; x and the result [B * columns, ...]."""
    layers = [net.in_proj_qkv, net.in_proj_z, net.in_proj_b, net.in_proj_a]
    mixed, gate, b, a = (y.unflatten(0, (batch, -1)) for y in _products(x, layers))
    cache, split, outputs = None if access is None else access.cache, streams.num_noisy, []
    history = None if cache is None else cache.conv_states[net.layer_idx]
    state = None if cache is None else cache.recurrent_states[net.layer_idx]
    heads, key_heads = len(net.A_log), net.key_dim // net.head_k_dim
    if history is None:
        history = mixed.new_zeros(batch, net.kernel - 1, mixed.shape[-1])
        state = mixed.new_zeros(batch, heads, net.head_k_dim, net.head_v_dim, dtype=torch.float32)
    # the kernels read dense rows, and rows of a cache may have been cut out of others
    history, state = history.contiguous(), state.contiguous()

    def read(columns: slice, token_mask: torch.Tensor | None, need_final: bool) -> torch.Tensor | None:
        of_heads = {"head_dim": net.head_k_dim, "num_keys": 2 * key_heads}
        qkv = convolution(mixed[:, columns], history, net.conv1d.weight, **of_heads)
        gates, decay = (b[:, columns], a[:, columns]), (net.A_log, net.dt_bias)
        output, final = delta_rule(qkv, gates, decay, state, token_mask, key_heads=key_heads, need_final=need_final)
        outputs.append(output)
        return final

    if split < mixed.shape[1]:
        state = read(slice(split, None), streams.token_mask, need_final=True)
        clean = mixed[:, split:]
        if streams.token_mask is None:  # then no more of it can be kept
            clean = clean[:, 1 - net.kernel :]
        history = last_tokens(torch.cat((history, clean), 1), net.kernel - 1, streams.token_mask)
    if split:
        read(slice(split), None, need_final=False)
    if access is not None and access.commit:
        cache.conv_states[net.layer_idx], cache.recurrent_states[net.layer_idx] = history, state
    output = torch.cat(outputs[::-1], 1) if outputs[1:] else outputs[0]
    return gated_norm(output.flatten(0, 1), gate.flatten(0, 1), net.norm).flatten(1)


def _attend(layer: nn.Module, x: torch.Tensor, batch: int, streams: Streams, access) -> torch.Tensor:
    """`ArcLMAttention` up to `o_proj`, of its normed input; x and the result [B * columns, ...]."""
    products = _products(x, [layer.q_proj, layer.k_proj, layer.v_proj])
    query_gate, key, value = (y.unflatten(0, (batch, -1)) for y in products)
    queries, keys = query_key(query_gate, key, (streams.cos, streams.sin), layer)
    values = value.unflatten(2, (-1, layer.head_dim)).transpose(1, 2)
    if access is not None:
        keys, values = access.update(keys, values, layer.layer_idx)
    (part,) = streams.attention
    return attention(queries, keys, values, part.mask, query_gate, layer.scaling).flatten(0, 1)


def _products(x: torch.Tensor, layers: list[nn.Linear]) -> list[torch.Tensor]:
    """The products of x [rows, D] with several weights, each [rows, N], the last dimension contiguous."""
    if len(x) <= FEW_ROWS:
        return list(linear(x, layers).split([layer.out_features for layer in layers], 1))
    return [layer(x) for layer in layers]


def use_fused_layer(layer: nn.Module, hidden_states: torch.Tensor, streams: Streams) -> bool:
    """Whether `fused_layer` takes these hidden states [B, columns, D]: bfloat16, no gradients, and nothing changed.

    Not float16: rows on their way through a norm (`Scaled`) may go beyond its range.
    """
    device = hidden_states.device
    if device.type != DEVICE or hidden_states.dtype != torch.bfloat16 or streams.noisy_blocks is not None:
        return False
    if torch.is_grad_enabled() or layer.training or torch.is_autocast_enabled(device.type):
        return False
    is_short = hidden_states.shape[1] <= MAX_QUERIES and len(streams.attention) == 1
    if not layer.is_linear and not (is_short and layer.config._attn_implementation == "sdpa"):
        return False
    return _is_plain(layer, device) and usable("fused_layer", device, torch.bfloat16, *kind_of(layer))


def kind_of(layer: nn.Module) -> tuple:
    """What kernels in place of a layer are compiled for: the classes that it is made of, its mixer, the shapes."""
    fields = (getattr(layer.config, name) for name in FIELDS)
    return tuple(map(type, [layer, *own_modules(layer)])), layer.is_linear, *fields


def own_modules(layer: nn.Module) -> tuple[nn.Module, ...]:
    """The modules of a layer that kernels stand in for, beside its products; none where one is missing."""
    names = ["input_layernorm", "post_attention_layernorm", "mlp", "mlp.act_fn"]
    if layer.is_linear:
        names += ["linear_attn", "linear_attn.conv1d", "linear_attn.norm"]
    else:
        names += ["self_attn", "self_attn.q_norm", "self_attn.k_norm"]
    try:
        return attrgetter(*names)(layer)
    except AttributeError:
        return ()


def _is_plain(layer: nn.Module, device: torch.device) -> bool:
    """Whether a layer has the plain products, in bfloat16, and does nothing else: no hook, no adapter."""
    for module in layer.modules():
        if not runs_as_written(module):
            return False
        if isinstance(module, nn.Linear) and (
            type(module).forward not in (nn.Linear.forward, ArcLMLinear.forward)
            or type(module.weight) is not nn.Parameter
            or not module.weight.is_contiguous()
            or (module.weight.dtype, module.weight.device, module.bias) != (torch.bfloat16, device, None)
        ):
            return False
    return True


def _fits(config: Any) -> bool:
    """Whether the kernels have tiles for these shapes."""
    powers = (config.head_dim, config.linear_key_head_dim, config.linear_value_head_dim)
    return (
        config.hidden_act == "silu"
        and all(16 <= x <= 256 and x & (x - 1) == 0 for x in powers)
        and config.linear_key_head_dim == config.linear_value_head_dim <= 128
        and all(x % 16 == 0 for x in (config.hidden_size, config.intermediate_size))
    )


def random_layer(
    device: torch.device, classes: tuple[type, ...], is_linear: bool, *fields
) -> tuple[nn.Module, ArcLMConfig]:
    """A float32 layer of a kind for a self-check, with weights that no caller's random numbers made, and its config.

    Raises:
        ValueError: there are no kernels for such a layer.
    """
    kind = "linear_attention" if is_linear else "full_attention"
    config = ArcLMConfig(**dict(zip(FIELDS, fields, strict=True)), num_hidden_layers=1, layer_types=[kind])
    if not _fits(config):
        raise ValueError("there are no tiles for the shapes of this model")
    config._attn_implementation, normal = "sdpa", normal_numbers(device)
    with torch.device("meta"):  # without its random numbers
        layer = classes[0](config, 0)
    if tuple(map(type, own_modules(layer))) != classes[1:]:
        raise ValueError("somebody put other modules into its layers")
    layer = layer.to_empty(device=device)
    for name, parameter in layer.named_parameters():
        parameter.data.copy_(normal(*parameter.shape) * (parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3))
        if name.endswith("A_log"):  # decays by a few percent per token: a state that is lost shows
            parameter.data -= 4
    return layer, config


def as_loaded(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The layer in a dtype but for what stays in float32, as `from_pretrained` leaves it."""
    layer.to(dtype)
    if layer.is_linear:
        layer.linear_attn.norm.float()
        layer.linear_attn.A_log.data = layer.linear_attn.A_log.float()
    return layer


def _check_fused_layer(device: torch.device, dtype: torch.dtype, *kind) -> float:
    layer, config = random_layer(device, *kind)
    return max(_error(layer.to(dtype).eval(), config, *lengths, dtype) for lengths in CHECK_LENGTHS)


def _error(layer: nn.Module, config: ArcLMConfig, context: int, block: int, dtype: torch.dtype) -> float:
    """A long commit, one of a block with a denoising step, and another step, against the layer in float32."""
    device, normal, results = next(layer.parameters()).device, normal_numbers(next(layer.parameters()).device), []
    inputs = [normal(2, columns, config.hidden_size).to(dtype) for columns in (context, 2 * block, block)]
    for run, cast in ((fused_layer, dtype), (type(layer).forward, torch.float32)):
        cache, layer = ArcLMCache(1), as_loaded(layer, cast)
        mask = torch.ones(2, block, dtype=torch.long, device=device)
        mask[1] = 0
        for x, (clean, noisy) in zip(inputs, ((context, 0), (block, block), (0, block)), strict=True):
            ids = [torch.zeros(2, n, dtype=torch.long, device=device) if n else None for n in (clean, noisy)]
            cache.lengths = torch.full((2,), cache.num_columns, device=device) if cache.num_columns else None
            padding = mask if clean == noisy else None
            _, streams = Streams.of(*ids, padding, block_size=block, cache=cache)
            streams = streams.for_layers(config, cache, cast)
            access = CacheAccess(cache, streams.num_noisy, clean > 0)
            results.append(run(layer, x.to(cast), streams, access).float())
            cache.num_columns += clean
            if clean == noisy:
                cache.token_mask = torch.ones(2, cache.num_columns, dtype=torch.bool, device=device)
        results += [x.float() for x in (cache.keys + cache.recurrent_states) if x is not None]
    half = len(results) // 2
    return relative_error(tuple(results[:half]), tuple(results[half:]))


CHECKS["fused_layer"] = (_check_fused_layer, 3e-2)
