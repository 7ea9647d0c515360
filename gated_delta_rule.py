"""The gated delta rule over one stream, and over a clean and a noisy stream, in PyTorch.

Per head, with L2-normalised q and k, log decay g <= 0 and write strength beta in (0, 1)
(Gated DeltaNet, arXiv:2412.06464, eq. 10; S is stored [K, Vd], the transpose of the paper's):

    S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - exp(g_t) S_{t-1}^T k_t))^T        o_t = S_t^T q_t / sqrt(K)

The clean stream is that recurrence. Block n of the noisy stream is the same recurrence, started from the clean state
at the end of block n - 1; what it writes is thrown away.

Tokens are cut into chunks. With G the decay accumulated since the start of a chunk and S the state there, the values
that a chunk really writes solve one unit lower triangular system (the WY form):

    (I + tril(beta k k^T e^{G_i - G_j}, -1)) v_new = beta v - beta e^G (k S)

so all is matrix products over all chunks at once, except the clean state from chunk to chunk (`AffineScan`). exp is
taken of non-positive differences of G only: nothing overflows however strong the decay.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F


CHUNK_SIZE = 64


class DeltaRuleInputs(NamedTuple):
    """One stream's inputs to the delta rule.

    Fields:
        q, k: [B, T, Hk, K] queries and keys, not yet normalised; Hk divides H.
        v: [B, T, H, Vd] values.
        g: [B, T, H] log decay, <= 0.
        beta: [B, T, H] write strength, in [0, 1]. A token with beta = g = 0 leaves the state as it is.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor


def gated_delta_rule(
    inputs: DeltaRuleInputs, initial_state: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence over T tokens.

    Args:
        inputs: see `DeltaRuleInputs`. bfloat16 and float16 are computed in float32.
        initial_state: [B, H, K, Vd], zero if `None`.

    Returns:
        Outputs [B, T, H, Vd] in the dtype of v, and the final state [B, H, K, Vd], float32 (float64 for float64).
    """
    tokens = inputs.q.shape[1]
    chunk = _Chunk.of(inputs, min(CHUNK_SIZE, tokens), tokens)
    state = chunk.zero_state() if initial_state is None else initial_state.to(chunk.v.dtype)

    if chunk.v.shape[1] == 1:  # a single chunk needs no scan, and its system one right-hand side of Vd columns only
        v_new = chunk.solve(chunk.residual(state[:, None]))
        output = chunk.read(state[:, None], v_new)
        return chunk.to_tokens(output, inputs.v), chunk.next_state(state[:, None], v_new)[:, 0]

    states, v_new = _scan_chunks(chunk, state)
    return chunk.to_tokens(chunk.read(states[:, :-1], v_new), inputs.v), states[:, -1]


def two_stream_gated_delta_rule(
    clean: DeltaRuleInputs, noisy: DeltaRuleInputs, block_size: int, initial_state: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the recurrence over the clean stream, and over each noisy block from its clean boundary state.

    Args:
        clean: the stream of x_0, see `DeltaRuleInputs`.
        noisy: the stream of x_t, of the same shapes.
        block_size: tokens per block, counted from the first token, any number >= 1. The last block may be shorter.
        initial_state: [B, H, K, Vd] state before the first block, zero if `None`.

    Returns:
        Outputs of both streams, [B, T, H, Vd] each in the dtype of v, and the final clean state [B, H, K, Vd].
    """
    tokens = clean.q.shape[1]
    chunk_size = _chunk_size(block_size, tokens)
    padded = -(-tokens // max(block_size, chunk_size)) * max(block_size, chunk_size)
    c = _Chunk.of(clean, chunk_size, padded)
    n = _Chunk.of(noisy, chunk_size, padded)
    states, c_new = _scan_chunks(c, c.zero_state() if initial_state is None else initial_state.to(c.v.dtype))
    start = states[:, :-1]  # [B, N, H, K, Vd], the clean state before each chunk
    clean_output = c.to_tokens(c.read(start, c_new), clean.v)

    if block_size < chunk_size:
        noisy_output = _read_blocks_inside_chunk(c, n, start, c_new, block_size)
    else:
        noisy_output = _read_blocks_of_chunks(n, start, block_size // chunk_size)
    return clean_output, n.to_tokens(noisy_output, noisy.v), states[:, -1]


def _chunk_size(block_size: int, tokens: int) -> int:
    """Tokens per chunk: a multiple of small blocks, a divisor of large ones, and no longer than T needs."""
    if block_size <= CHUNK_SIZE:
        return block_size * min(CHUNK_SIZE // block_size, -(-tokens // block_size))
    return max(size for size in range(1, CHUNK_SIZE + 1) if block_size % size == 0)


class _Chunk(NamedTuple):
    """One stream cut into N chunks of C tokens, in the compute dtype, and its products within chunks.

    Fields:
        q, k, v: [B, N, H, C, K or Vd], q and k normalised, q scaled.
        beta: [B, N, H, C, 1].
        g: [B, N, H, C] log decay of each token.
        decay: [B, N, H, C], G, the log decay accumulated from the start of the chunk to each token, inclusive.
        visible: [C, C] bool, which token of the chunk (column) a token (row) has read.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    beta: torch.Tensor
    g: torch.Tensor
    decay: torch.Tensor
    visible: torch.Tensor

    @classmethod
    def of(cls, inputs: DeltaRuleInputs, chunk_size: int, padded_tokens: int) -> "_Chunk":
        dtype = torch.float64 if inputs.v.dtype == torch.float64 else torch.float32
        heads = inputs.v.shape[2]
        num_chunks = -(-padded_tokens // chunk_size)
        pad = num_chunks * chunk_size - inputs.q.shape[1]

        def cut(x: torch.Tensor) -> torch.Tensor:
            """[B, T, H, D] -> [B, N, H, C, D]. Padding is inert: its k, beta and g are 0."""
            x = F.pad(x, (0, 0, 0, 0, 0, pad)) if pad else x
            return x.unflatten(1, (num_chunks, chunk_size)).transpose(2, 3)

        def qk(x: torch.Tensor) -> torch.Tensor:
            x = l2norm(x.to(dtype))
            return cut(x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2))

        q, k = qk(inputs.q) * inputs.q.shape[-1] ** -0.5, qk(inputs.k)
        v, beta, g = cut(inputs.v.to(dtype)), cut(inputs.beta.to(dtype)[..., None]), cut(inputs.g.to(dtype)[..., None])
        g = g.squeeze(-1)
        visible = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=v.device).tril()
        return cls(q, k, v, beta, g, g.cumsum(-1), visible)

    def zero_state(self) -> torch.Tensor:
        batch, _, heads, _, key_dim = self.k.shape
        return self.v.new_zeros(batch, heads, key_dim, self.v.shape[-1])

    def weights(self, rows: torch.Tensor, other: "_Chunk | None" = None, visible=None) -> torch.Tensor:
        """[B, N, H, C, C]: rows (q or beta k) times the keys of `other`, decayed from key to row; 0 if not visible."""
        other = self if other is None else other
        difference = self.decay.unsqueeze(-1) - other.decay.unsqueeze(-2)
        # masked before exp: above the diagonal the difference is positive and could overflow
        decay = difference.masked_fill(~(self.visible if visible is None else visible), float("-inf")).exp()
        return (rows @ other.k.mT) * decay

    def solve(self, rhs: torch.Tensor) -> torch.Tensor:
        """(I + tril(beta k k^T e^{G_i - G_j}, -1))^{-1} rhs; the solver takes the diagonal as 1."""
        return torch.linalg.solve_triangular(self.weights(self.beta * self.k), rhs, upper=False, unitriangular=True)

    def residual(self, state: torch.Tensor) -> torch.Tensor:
        """beta v - beta e^G (k S): what the chunk would write if its tokens did not see each other."""
        return self.beta * (self.v - self.decay.exp().unsqueeze(-1) * (self.k @ state))

    def read(self, state: torch.Tensor, v_new: torch.Tensor) -> torch.Tensor:
        return self.decay.exp().unsqueeze(-1) * (self.q @ state) + self.weights(self.q) @ v_new

    def keys_at_end(self) -> torch.Tensor:
        """Keys decayed to the end of the chunk, transposed: [B, N, H, K, C]."""
        return (self.k * (self.decay[..., -1:] - self.decay).exp().unsqueeze(-1)).mT

    def total_decay(self) -> torch.Tensor:
        """[B, N, H, 1, 1] factor by which the chunk shrinks the state."""
        return self.decay[..., -1].exp()[..., None, None]

    def next_state(self, state: torch.Tensor, v_new: torch.Tensor) -> torch.Tensor:
        return self.total_decay() * state + self.keys_at_end() @ v_new

    def to_tokens(self, output: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """[B, N, H, C, Vd] -> [B, T, H, Vd] without the padding, in the dtype of `like` [B, T, H, Vd]."""
        return output.transpose(2, 3).flatten(1, 2)[:, : like.shape[1]].to(like.dtype)


def _scan_chunks(c: _Chunk, initial_state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """States at the N + 1 chunk boundaries [B, N + 1, H, K, Vd], and the values each chunk writes [B, N, H, C, Vd].

    A chunk maps the state affinely: v_new = u - w S, so S' = (total_decay I - k^T w) S + k^T u.
    """
    u, w = c.solve(torch.cat((c.beta * c.v, c.beta * c.decay.exp().unsqueeze(-1) * c.k), -1)).split(
        (c.v.shape[-1], c.k.shape[-1]), -1
    )
    keys = c.keys_at_end()
    transition = c.total_decay() * torch.eye(c.k.shape[-1], dtype=c.k.dtype, device=c.k.device) - keys @ w
    states = AffineScan.apply(transition, keys @ u, initial_state)
    return states, u - w @ states[:, :-1]


def _read_blocks_of_chunks(n: _Chunk, start: torch.Tensor, chunks_per_block: int) -> torch.Tensor:
    """Outputs of noisy blocks of one or more chunks: from the boundary state of the block, chunk after chunk."""
    group = [x.unflatten(1, (-1, chunks_per_block)).unbind(2) for x in n[:-1]]
    state = start.unflatten(1, (-1, chunks_per_block))[:, :, 0]
    outputs = []
    for fields in zip(*group, strict=True):
        chunk = _Chunk(*fields, n.visible)
        v_new = chunk.solve(chunk.residual(state))
        outputs.append(chunk.read(state, v_new))
        if len(outputs) < chunks_per_block:
            state = chunk.next_state(state, v_new)
    return torch.stack(outputs, 2).flatten(1, 2)


def _read_blocks_inside_chunk(
    c: _Chunk, n: _Chunk, start: torch.Tensor, c_new: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Outputs of noisy blocks shorter than a chunk.

    A noisy token reads the state at the start of the chunk, the clean values of earlier blocks of the chunk and the
    noisy values of its own block. Its decay runs over the clean tokens up to its block, then over noisy ones.
    """
    chunk_size = n.v.shape[3]
    block = torch.arange(chunk_size, device=n.v.device) // block_size
    own = n.visible & (block[:, None] == block)
    earlier = block[:, None] > block
    inside = n.g.unflatten(-1, (-1, block_size)).cumsum(-1)
    before = F.pad(
        c.decay[..., block_size - 1 :: block_size][..., :-1], (1, 0)
    )  # clean G at the end of the last block
    n = n._replace(decay=(inside + before.unsqueeze(-1)).flatten(-2), visible=own)

    from_clean = n.weights(n.beta * n.k, c, earlier) @ c_new
    n_new = n.solve(n.residual(start) - from_clean)
    return n.read(start, n_new) + n.weights(n.q, c, earlier) @ c_new


class AffineScan(torch.autograd.Function):
    """S_{n+1} = P_n S_n + E_n over N chunks, the only sequential part of the delta rule.

    One autograd node instead of 3N: its backward is the same scan, transposed and in reverse.
    """

    @staticmethod
    def forward(ctx, transition: torch.Tensor, update: torch.Tensor, initial_state: torch.Tensor) -> torch.Tensor:
        """States S_0 .. S_N, [B, N + 1, H, K, Vd], from P [B, N, H, K, K], E [B, N, H, K, Vd], S_0 [B, H, K, Vd]."""
        states = [initial_state]
        for p, e in zip(transition.unbind(1), update.unbind(1), strict=True):
            states.append(e + p @ states[-1])
        states = torch.stack(states, 1)
        ctx.save_for_backward(transition, states)
        return states

    @staticmethod
    def backward(ctx, grad_states: torch.Tensor):
        transition, states = ctx.saved_tensors
        grad = [grad_states[:, -1]]
        for p, grad_state in zip(transition.unbind(1)[::-1], grad_states.unbind(1)[-2::-1], strict=True):
            grad.append(grad_state + p.mT @ grad[-1])
        grad_update = torch.stack(grad[-2::-1], 1)  # [B, N, H, K, Vd], gradient of S_1 .. S_N
        return grad_update @ states[:, :-1].mT, grad_update, grad[-1]


def l2norm(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Normalise the last dimension to length 1; eps as in flash-linear-attention and transformers."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)
