"""The gated delta rule in PyTorch: outputs, the final state, and the states at block boundaries.

Per head, with L2-normalised q and k, log decay g <= 0 and write strength beta in (0, 1)
(Gated DeltaNet, arXiv:2412.06464, eq. 10; S is stored [K, Vd], the transpose of the paper's):

    S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - exp(g_t) S_{t-1}^T k_t))^T        o_t = S_t^T q_t / sqrt(K)

The clean stream is that recurrence. A noisy block is the same recurrence over its own tokens, started from the clean
state at its boundary; what it writes is thrown away. So training, which gives all noisy blocks of a row to one call as
a batch, and a denoising step, which gives it one block, run the same code.

Tokens are cut into chunks. With G the decay accumulated since the start of a chunk and S the state there, the values
that a chunk really writes solve one unit lower triangular system (the WY form):

    (I + tril(beta k k^T e^{G_i - G_j}, -1)) v_new = beta v - beta e^G (k S)

so all is matrix products over all chunks at once, except the state from chunk to chunk (`AffineScan`). exp is taken of
non-positive differences of G only: nothing overflows however strong the decay.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .kernels_arclm import affine_scan, use_affine_scan


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
    inputs: DeltaRuleInputs,
    initial_state: torch.Tensor | None = None,
    block_size: int | None = None,
    *,
    need_final: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Run the recurrence over T tokens.

    Args:
        inputs: see `DeltaRuleInputs`. bfloat16 and float16 are computed in float32.
        initial_state: [B, H, K, Vd], zero if `None`.
        block_size: any number >= 1; asks for the states at the boundaries of blocks counted from the first token.
        need_final: whether to compute the final state, which a noisy block would throw away.

    Returns:
        Outputs [B, T, H, Vd] in the dtype of v; the final state [B, H, K, Vd], float32 (float64 for float64), `None`
        without `need_final`; the N = ceil(T / block_size) states before each block [B, N, H, K, Vd], `None` without
        `block_size`.
    """
    # autocast, as the Trainer's bf16, would round every product, and generation, without it, none
    with torch.autocast(inputs.v.device.type, enabled=False):
        return _gated_delta_rule(inputs, initial_state, block_size, need_final)


def _gated_delta_rule(
    inputs: DeltaRuleInputs, initial_state: torch.Tensor | None, block_size: int | None, need_final: bool
) -> tuple:
    tokens = inputs.q.shape[1]
    chunk = _Chunk.of(inputs, _chunk_size(block_size, tokens))
    state = chunk.zero_state() if initial_state is None else initial_state.to(chunk.v.dtype)
    if chunk.v.shape[1] == 1:  # one chunk needs no scan, and its system has Vd right-hand sides instead of K + Vd
        start = state[:, None]
        v_new = chunk.solve(chunk.residual(start))
        final = chunk.next_state(start, v_new)[:, 0] if need_final else None
    else:
        states, v_new = _scan_chunks(chunk, state)
        # a view would keep the states of all chunks in memory
        start, final = states[:, :-1], states[:, -1].clone() if need_final else None
    output = chunk.to_tokens(chunk.read(start, v_new), inputs.v)
    boundary_states = None
    if block_size is not None:
        boundary_states = _boundary_states(chunk, start, v_new, block_size)[:, : -(-tokens // block_size)]
    return output, final, boundary_states


def _chunk_size(block_size: int | None, tokens: int) -> int:
    """Tokens per chunk: a multiple of small blocks, a divisor of large ones, and no longer than T needs."""
    if block_size is None:
        return min(CHUNK_SIZE, tokens)
    if block_size <= CHUNK_SIZE:
        return block_size * min(CHUNK_SIZE // block_size, -(-tokens // block_size))
    return max(size for size in range(1, CHUNK_SIZE + 1) if block_size % size == 0)


def _boundary_states(chunk: "_Chunk", start: torch.Tensor, v_new: torch.Tensor, block_size: int) -> torch.Tensor:
    """States before each block of all chunks, [B, N', H, K, Vd], from those before each chunk, `start`."""
    chunk_size = chunk.v.shape[3]
    if block_size >= chunk_size:
        return start[:, :: block_size // chunk_size]
    # inside a chunk: e^{G_b} S + sum over the tokens i before the boundary b of e^{G_b - G_i} k_i v_new_i^T
    ends = torch.arange(block_size - 1, chunk_size - 1, block_size, device=start.device)
    decay = chunk.decay[..., ends]  # [B, N, H, boundaries]
    before = torch.arange(chunk_size, device=start.device) <= ends[:, None]
    fade = (decay.unsqueeze(-1) - chunk.decay.unsqueeze(-2)).masked_fill(~before, float("-inf")).exp()
    written = (fade.unsqueeze(-1) * chunk.k.unsqueeze(-3)).mT @ v_new.unsqueeze(-3)  # [B, N, H, boundaries, K, Vd]
    inner = decay.exp()[..., None, None] * start.unsqueeze(-3) + written
    return torch.cat((start.unsqueeze(-3), inner), -3).transpose(2, 3).flatten(1, 2)


class _Chunk(NamedTuple):
    """One stream cut into N chunks of C tokens, in the compute dtype, and its products within chunks.

    Fields:
        q, k, v: [B, N, H, C, K or Vd], q and k normalised, q scaled.
        beta: [B, N, H, C, 1].
        decay: [B, N, H, C], G, the log decay accumulated from the start of the chunk to each token, inclusive.
        fade: [B, N, H, C, C], e^{G_i - G_j} from key j to row i; 0 for keys after the row.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    beta: torch.Tensor
    decay: torch.Tensor
    fade: torch.Tensor

    @classmethod
    def of(cls, inputs: DeltaRuleInputs, chunk_size: int) -> "_Chunk":
        dtype = torch.float64 if inputs.v.dtype == torch.float64 else torch.float32
        heads, tokens = inputs.v.shape[2], inputs.q.shape[1]
        num_chunks = -(-tokens // chunk_size)
        pad = num_chunks * chunk_size - tokens

        def cut(x: torch.Tensor) -> torch.Tensor:
            """[B, T, H, D] -> [B, N, H, C, D]. Padding is inert: its k, beta and g are 0."""
            x = F.pad(x, (0, 0, 0, 0, 0, pad)) if pad else x
            return x.unflatten(1, (num_chunks, chunk_size)).transpose(2, 3)

        def qk(x: torch.Tensor) -> torch.Tensor:
            x = l2norm(x.to(dtype))
            return cut(x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2))

        q, k = qk(inputs.q) * inputs.q.shape[-1] ** -0.5, qk(inputs.k)
        v, beta, g = cut(inputs.v.to(dtype)), cut(inputs.beta.to(dtype)[..., None]), cut(inputs.g.to(dtype)[..., None])
        decay = g.squeeze(-1).cumsum(-1)
        # the first tril is before exp: above the diagonal the difference is positive and could overflow
        fade = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).tril().exp().tril()
        return cls(q, k, v, beta, decay, fade)

    def zero_state(self) -> torch.Tensor:
        batch, _, heads, _, key_dim = self.k.shape
        return self.v.new_zeros(batch, heads, key_dim, self.v.shape[-1])

    def weights(self, rows: torch.Tensor) -> torch.Tensor:
        """[B, N, H, C, C]: rows (q or beta k) times keys, decayed from key to row; 0 for keys after the row."""
        return (rows @ self.k.mT) * self.fade

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


class AffineScan(torch.autograd.Function):
    """S_{n+1} = P_n S_n + E_n over N chunks, the only sequential part of the delta rule.

    One autograd node instead of 3N: its backward is the same scan, transposed and in reverse.
    """

    @staticmethod
    def forward(ctx, transition: torch.Tensor, update: torch.Tensor, initial_state: torch.Tensor) -> torch.Tensor:
        """States S_0 .. S_N, [B, N + 1, H, K, Vd], from P [B, N, H, K, K], E [B, N, H, K, Vd], S_0 [B, H, K, Vd]."""
        states = _scan(transition, update, initial_state)
        ctx.save_for_backward(transition, states)
        return states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_states: torch.Tensor) -> tuple:
        transition, states = ctx.saved_tensors
        grad = _scan(transition, grad_states[:, :-1], grad_states[:, -1], reverse=True)
        grad_update = grad[:, 1:]  # [B, N, H, K, Vd], gradient of S_1 .. S_N
        return grad_update @ states[:, :-1].mT, grad_update, grad[:, 0]


def _scan(
    transition: torch.Tensor, update: torch.Tensor, state: torch.Tensor, *, reverse: bool = False
) -> torch.Tensor:
    """S_0 .. S_N of S_{n+1} = P_n S_n + E_n, or in reverse, from S_N down, of S_n = P_n^T S_{n+1} + E_n."""
    if use_affine_scan(update):
        return affine_scan(transition, update, state, reverse=reverse)
    step = -1 if reverse else 1
    states = [state]
    for p, e in zip(transition.unbind(1)[::step], update.unbind(1)[::step], strict=True):
        states.append(e + (p.mT if reverse else p) @ states[-1])
    return torch.stack(states[::step], 1)


def l2norm(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Normalise the last dimension to length 1; eps as in flash-linear-attention and transformers."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)
