"""Layers over two streams on a GPU, whose products are bfloat16, in a few Triton kernels with gradients.

For 2,048 tokens of Qwen3.5-0.8B a linear-attention layer takes some 700 operations of PyTorch forward and backward,
which move 20 GB; here it is the products, 17 kernels and some 30 small operations (`trained_layer`). They compute what
the PyTorch layer does: `_check_trained_layer` compares outputs and all gradients before they are used.
"""

import torch
from torch import nn

from .attention_gradients_arclm import rotated
from .delta_gradients_arclm import CHUNK, Layout, two_stream_delta_rule
from .fused_arclm import DEVICE, as_loaded, kind_of, own_modules, random_layer
from .kernels_arclm import CHECKS, normal_numbers, relative_error, usable
from .layer_gradients_arclm import gated_norm, rms_norm, swiglu, two_stream_convolution
from .layers_arclm import product_dtype, runs_as_written
from .streams_arclm import Streams


CHECK_TOKENS = 300  # per row in the self-check


def trained_layer(layer: nn.Module, hidden_states: torch.Tensor, streams: Streams, keep: int | None) -> torch.Tensor:
    """`ArcLMDecoderLayer` over two streams: hidden states [B, columns, D] to those of the first `keep` columns."""
    mlp, dtype = layer.mlp, product_dtype(hidden_states)
    with torch.cuda.device_of(hidden_states):  # where Triton launches
        normed = rms_norm(hidden_states, layer.input_layernorm, dtype)
        if layer.is_linear:
            mixed = _delta_net(layer.linear_attn, normed, streams)
        else:
            mixed = _attend(layer.self_attn, normed, streams)
        hidden_states = hidden_states[:, :keep] + mixed[:, :keep]
        normed = rms_norm(hidden_states, layer.post_attention_layernorm, dtype)
        return hidden_states + mlp.down_proj(swiglu(mlp.gate_proj(normed), mlp.up_proj(normed)))


def _delta_net(net: nn.Module, x: torch.Tensor, streams: Streams) -> torch.Tensor:
    """`ArcLMGatedDeltaNet` over the two streams [B, columns, D]."""
    layout = Layout.of(streams.num_noisy, streams.block_size, streams.noisy_blocks, x.shape[1])
    key_heads = net.key_dim // net.head_k_dim
    heads = {"head_dim": net.head_k_dim, "num_keys": 2 * key_heads}
    qkv = two_stream_convolution(net.in_proj_qkv(x), net.conv1d.weight, layout, **heads)
    beta, g = (gate.float() for gate in net.gates(x, streams))
    output = two_stream_delta_rule(qkv, g, beta, layout, key_heads=key_heads, dim=net.head_k_dim)
    gate = net.in_proj_z(x).unflatten(-1, (-1, net.head_v_dim))
    return net.out_proj(gated_norm(output, gate, net.norm).flatten(2))


def _attend(layer: nn.Module, x: torch.Tensor, streams: Streams) -> torch.Tensor:
    """`ArcLMAttention` over the two streams [B, columns, D]."""
    query, key, gate = rotated(layer.q_proj(x), layer.k_proj(x), (streams.cos, streams.sin), layer)
    value = layer.v_proj(x).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)
    return layer.attend(query, key, value, gate, streams.attention)


def use_trained_layer(layer: nn.Module, hidden_states: torch.Tensor, streams: Streams) -> bool:
    """Whether `trained_layer` takes these hidden states [B, columns, D]: two streams, bfloat16, and nothing changed.

    Any layer may stand where the products do, one with an adapter or quantised too.
    """
    device = hidden_states.device
    if device.type != DEVICE or streams.noisy_blocks is None or product_dtype(hidden_states) != torch.bfloat16:
        return False
    if streams.block_size % CHUNK or layer.config.linear_conv_kernel_dim > CHUNK:
        return False
    if not all(map(runs_as_written, own_modules(layer))):
        return False
    return usable("trained_layer", device, torch.bfloat16, streams.block_size, *kind_of(layer))


def _check_trained_layer(device: torch.device, dtype: torch.dtype, block_size: int, *kind) -> float:
    """Outputs and all gradients of a row with padding and one without, against the layer in float32."""
    layer, config = random_layer(device, *kind)
    tokens = max(CHECK_TOKENS, block_size + CHUNK)  # a block that starts from a state is among them
    normal, ids = normal_numbers(device), torch.zeros(2, tokens, dtype=torch.long, device=device)
    mask, needed = torch.ones_like(ids), torch.ones_like(ids, dtype=torch.bool)
    mask[1, tokens // 2 :] = 0
    needed[0, :block_size], needed[1, block_size : 2 * block_size] = False, False
    _, streams = Streams.of(ids, ids, mask, block_size=block_size, needed=needed)
    inputs = normal(2, streams.position_ids.shape[1], config.hidden_size).to(dtype)
    weights, results = normal(*inputs.shape), []
    # padding is read as it comes: neither run has to give it the same
    weights[:, streams.num_noisy :] *= streams.token_mask[..., None]
    for run, cast in ((trained_layer, dtype), (type(layer).forward, torch.float32)):
        as_loaded(layer, cast).zero_grad()
        x = inputs.clone().to(cast).requires_grad_()
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            output = run(layer, x, streams.for_layers(config, None, cast), None)
            (output.float() * weights).sum().backward()
        grads = [x.grad, *(parameter.grad for parameter in layer.parameters())]
        results.append([y.float() for y in (output.detach() * (weights != 0), *grads)])
    return relative_error(*results)


# the gradients of the few decays of a layer vary most in bfloat16, those of PyTorch too
CHECKS["trained_layer"] = (_check_trained_layer, 8e-2)
