"""Denoising under CUDA graphs: a step is two launches instead of about two thousand, with the same results.

A graph replays kernels on the addresses it was captured with. So the context is copied into static buffers once per
block, and a denoising step replays the layers (`DenoisingGraphs`). The buffers have a power of two of columns; those
behind the context are masked. What is captured is `ArcLMModel.read`, embedding and layers: checks, masks and rotary
embedding come before, once per block.

There are two passes over a static context: a denoising step, and the commit of a block with the first step on the
block after it. `key_of` says what a captured pass depends on, and where there is none.

After the pass comes the choice, `denoising_bd3lm.choose`, the second graph: head, proposals, acceptance. It changes a
static block in place, whose ids the next pass reads. It computes logits for all positions of the block, as a graph has
fixed shapes: the same weights are read, and the kernel skips what is not masked. `key_of_head` says what it depends
on. Where it is not captured, the head comes eagerly, for what is masked only.
"""

import threading
import weakref
from collections.abc import Callable
from copy import copy, deepcopy
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils import logging

from .cache_arclm import ArcLMCache, append
from .denoising_bd3lm import Block, choose
from .layers_arclm import runs_as_written
from .streams_arclm import Streams, check_inputs


logger = logging.get_logger(__name__)

# Powers of two from here on: a conversation captures few times as it grows. Columns in vain cost little, for at 0.8B a
# step's layers read 1 GB of weights and 12 KB per column.
MIN_COLUMNS = 1024
# What a call may hold in static buffers, over all rows: 0.8 GB at 0.8B. Denoising beyond it is not captured.
MAX_COLUMNS = 65_536
# Positions of the blocks that a call may hold in captured choices, over all of them: each keeps logits for every
# position, 0.5 GB at 0.8B. A choice for more is not captured: that computes logits for what is masked only.
MAX_ROWS = 1024
# What `choose` depends on beside the tensors that a block holds.
CHOICE_KNOBS = ("remasking_strategy", "max_denoising_steps", "confidence_threshold", "entropy_bound")
CHOICE_KNOBS += ("mask_token_id", "temperature")
# What a cache holds for each layer.
LAYERWISE = ("keys", "values", "conv_states", "recurrent_states")
# PyTorch captures one graph at a time, and the wait for the device before one would invalidate another.
_ONE_CAPTURE = threading.Lock()


class CudaCapture:
    """Records functions over static tensors as CUDA graphs, all on one stream of `device`."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Return what replays `function`, and its outputs, which every replay overwrites."""
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        try:
            with torch.cuda.stream(self.stream):  # `graph` does not leave its stream where a capture was invalidated
                for _ in range(2):  # libraries and Triton kernels set themselves up at first, which a capture forbids
                    function()
                graph = torch.cuda.CUDAGraph()
                # thread_local: another thread may launch work and allocate meanwhile. One that waits for the whole
                # device invalidates the capture all the same.
                with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                    outputs = function()
        except Exception:
            # There a capture that was invalidated leaves the generator in capture mode, where it refuses to draw. A
            # copy of its state is not, and goes on with the same numbers.
            if torch.__version__ < (2, 13):
                generator = torch.cuda.default_generators[self.stream.device_index]
                generator.graphsafe_set_state(generator.clone_state())
            raise
        return graph.replay, outputs


# By type of device. On the others nothing is captured.
CAPTURES: dict[str, Callable] = {"cuda": CudaCapture}


class Desk(NamedTuple):
    """What the captured passes over blocks of one shape share.

    Fields:
        ids: [B, L] the noisy block, read by denoising steps.
        hidden_states: [B, L, D], written by all passes: those that the logits of the noisy block come from.
    """

    ids: torch.Tensor
    hidden_states: torch.Tensor


class CapturedPass:
    """`ArcLMModel.read` over a static context: a denoising step, or a commit and a denoising step.

    Fields:
        ids: [B, columns] static, the noisy block, then in a commit the clean one.
        streams: how they are read, static.
        stamp: that of the context when `streams` was made.
        committed: static, the last hidden states [B, L, D] of the clean block, and for each layer the new convolution
            states and recurrent states; empty in a denoising step.
    """

    def __init__(
        self, model: nn.Module, context: "StaticContext", ids: torch.Tensor, streams: Streams, desk: "Desk", capture
    ):
        commit = streams.num_noisy < ids.shape[1]
        self.ids, self.stamp = ids.clone() if commit else desk.ids, None
        self.streams = deepcopy(streams)

        def read() -> tuple:
            cache = copy(context.cache)
            for name in LAYERWISE:  # a commit replaces elements of these lists
                setattr(cache, name, list(getattr(cache, name)))
            output = model.read(self.ids, self.streams, cache, commit=commit)
            desk.hidden_states.copy_(output.predictive_hidden_state)
            return (output.clean_last_hidden_state, cache.conv_states, cache.recurrent_states) if commit else ()

        with _ONE_CAPTURE:
            self.replay, self.committed = capture(read)

    def lay_out(self, streams: Streams, stamp: torch.Tensor | None) -> None:
        """Copy streams of the same shapes in."""
        for buffer, content in zip(self.streams.tensors(), streams.tensors(), strict=True):
            buffer.copy_(content)
        self.stamp = stamp


class StaticContext:
    """A context at fixed addresses, and the passes captured over it.

    Memory, for Qwen3.5-0.8B in bfloat16: 12,288 bytes per column and 39 MB per row, and what the kernels of the two
    passes need, as much as those of an eager one each.

    Fields:
        cache: `num_columns` columns, the context first; its `token_mask` says how far it goes.
        keys, values: per full-attention layer [B, Hkv, num_columns + 2 L, head_dim]: what `cache` shows, and behind it
            the room for a clean and a noisy block.
        stamp: `lengths` of the cache that was copied in: a commit makes a new tensor of it.
        passes: the captured ones, by whether they commit.
    """

    def __init__(self, model: nn.Module, batch: int, block_size: int, num_columns: int):
        block = torch.zeros(batch, block_size, dtype=torch.long, device=model.device)
        cache = model(block, use_cache=True, block_size=block_size).past_key_values  # its tensors are the right ones
        self.keys, self.values = (
            [None if x is None else x.new_zeros(*x.shape[:2], num_columns + 2 * block_size, x.shape[3]) for x in kept]
            for kept in (cache.keys, cache.values)
        )
        cache.keys, cache.values = (
            [None if x is None else x[:, :, :num_columns] for x in whole] for whole in (self.keys, self.values)
        )
        cache.num_columns, cache.token_ids = num_columns, None
        cache.token_mask = torch.zeros(batch, num_columns, dtype=torch.bool, device=block.device)
        self.cache, self.stamp, self.passes = cache, (), {}

    def load(self, cache: ArcLMCache) -> None:
        """Copy a context of at most `num_columns` columns in."""
        for name in ("keys", "values"):
            for buffer, content in zip(getattr(self.cache, name), getattr(cache, name), strict=True):
                if buffer is not None:
                    _put(buffer, content, 2)
        for name in ("conv_states", "recurrent_states"):
            _copy_all(getattr(self.cache, name), getattr(cache, name))
        tokens = cache.token_mask
        if tokens is None:
            tokens = self.cache.token_mask.new_ones(len(self.cache.token_mask), cache.num_columns)
        _put(self.cache.token_mask, tokens, 1)
        _put(self.cache.lengths, cache.lengths, 0)
        _put(self.cache.last_hidden_state, cache.last_hidden_state, 0)
        self.stamp = cache.lengths

    def append_to(
        self, cache: ArcLMCache, committed: tuple, clean_ids: torch.Tensor, token_mask: torch.Tensor | None
    ) -> None:
        """Have `cache`, which was copied in, keep the clean block [B, L] that a pass has `committed`."""
        hidden_states, conv_states, recurrent_states = committed
        new = slice(self.cache.num_columns, self.cache.num_columns + clean_ids.shape[1])
        for i, keys in enumerate(self.keys):
            if keys is not None:
                cache.keys[i] = append(cache.keys[i], keys[:, :, new])
                cache.values[i] = append(cache.values[i], self.values[i][:, :, new])
        for name, states in (("conv_states", conv_states), ("recurrent_states", recurrent_states)):
            setattr(cache, name, [None if x is None else torch.empty_like(x) for x in states])
            _copy_all(getattr(cache, name), states)
        cache.advance(token_mask, clean_ids, hidden_states, block_size=clean_ids.shape[1])


class CapturedChoice:
    """What follows the layers in a denoising step, over a static block; a replay takes a step with it.

    Fields:
        block: static, its ids those that the captured passes read.
    """

    def __init__(self, head: nn.Module, block: Block, knobs: dict[str, Any], desk: Desk, capture: Callable):
        self.block = block = Block(*(x.clone() for x in block))._replace(ids=desk.ids)
        knobs = dict(knobs)
        with _ONE_CAPTURE:
            self.replay, _ = capture(lambda: choose(head, desk.hidden_states, block, knobs))

    def load(self, block: Block) -> Block:
        """Copy a block of the same shape in; returns the static one."""
        for buffer, content in zip(self.block, block, strict=True):
            buffer.copy_(content)
        return self.block


def _copy_all(targets: list[torch.Tensor | None], sources: list[torch.Tensor | None]) -> None:
    """Copy tensors of equal shapes in a few launches for all of them, 0 where there is no source."""
    pairs = [pair for pair in zip(targets, sources, strict=True) if pair[1] is not None]
    if pairs:
        torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))
    for target, source in zip(targets, sources, strict=True):
        if target is not None and source is None:
            target.zero_()


def static_columns(cache: ArcLMCache) -> int:
    """Columns of the static context for a cache."""
    return max(MIN_COLUMNS, 1 << (cache.num_columns - 1).bit_length())


def _put(buffer: torch.Tensor, content: torch.Tensor | None, dim: int) -> None:
    """Copy `content` to the beginning of `buffer` along `dim`, and 0 behind it: no mask holds back an old NaN."""
    size = 0 if content is None else content.shape[dim]
    if size:
        buffer.narrow(dim, 0, size).copy_(content)
    buffer.narrow(dim, size, buffer.shape[dim] - size).zero_()


class DenoisingGraphs:
    """The captured passes of one model, used by one call of `generate` at a time."""

    def __init__(self, capture: Callable):
        self.capture, self.key, self.failed = capture, None, False
        self.contexts: dict[tuple[int, int, int], StaticContext] = {}  # by batch, L, columns; the last used is last
        self.desks: dict[tuple[int, int], Desk] = {}  # by batch, L
        self.choices: dict[tuple, CapturedChoice] = {}  # by batch and all else they depend on; the last used is last

    def renew(self, key: tuple) -> None:
        """Forget what was captured under another key."""
        if key != self.key:
            self._clear()
            self.key, self.failed = key, False

    def _clear(self) -> None:
        for captured in (self.contexts, self.choices, self.desks):
            captured.clear()

    def __call__(
        self,
        model: nn.Module,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        *,
        noisy_input_ids: torch.Tensor | None,
        past_key_values: ArcLMCache | None,
        block_size: int | None,
    ) -> torch.Tensor | None:
        """Run a denoising step, or a commit and a denoising step, of an `ArcLMModel` by replay.

        Returns:
            Hidden states [B, L, D] that the logits come from, overwritten by the next call; `None`, with nothing
            done, where the inputs are others or too many, under autocast, and where a capture failed.
        """
        # asked at every pass: the Trainer's autocast begins within the outer model. A graph would go on reading the
        # casts of the weights that autocast kept.
        if torch.is_autocast_enabled(model.device.type):
            return None
        commit, noisy = input_ids is not None, noisy_input_ids
        block_size = model.config.block_size if block_size is None else block_size
        cache = ArcLMCache(len(model.layers)) if past_key_values is None else past_key_values
        if self.failed or noisy is None or noisy.shape[1:] != (block_size,) or noisy.device != model.device:
            return None
        if (not cache.num_columns or input_ids.shape != noisy.shape) if commit else attention_mask is not None:
            return None
        num_columns = static_columns(cache)
        if len(noisy) * num_columns > MAX_COLUMNS:
            logger.warning_once(
                f"CUDA graphs hold {MAX_COLUMNS:,} columns of context, rows times the next power of two above the "
                "longest. Denoising steps over more run without, slower with the same results."
            )
            return None
        key, ids, token_mask = (len(noisy), block_size, num_columns), noisy, None
        context = self.contexts.get(key)
        captured = None if context is None else context.passes.get(commit)
        # a commit is always of something new, and since the last step another cache may have been copied in
        is_fresh = not commit and captured is not None and captured.stamp is context.stamp is cache.lengths
        if not is_fresh:
            check_inputs(input_ids, noisy, cache, None, use_cache=None, config=model.config, block_size=block_size)
            try:
                with torch.inference_mode(False), torch.no_grad():  # what is written later must not be of that mode
                    context = self._context(model, key, cache)
                    ids, streams = Streams.of(
                        input_ids, noisy, attention_mask, block_size=block_size, cache=context.cache
                    )
                    token_mask = streams.token_mask
                    captured = self._pass(model, context, ids, streams)
            except Exception as error:
                self._give_up(error)
                return None
        if captured.ids is not ids:
            captured.ids.copy_(ids)
        captured.replay()
        if commit:
            context.append_to(cache, captured.committed, ids[:, block_size:], token_mask)
        return self._desk(model, noisy).hidden_states

    def choice(
        self, model: nn.Module, block: Block, knobs: dict[str, Any], cache: ArcLMCache | None
    ) -> CapturedChoice | None:
        """The captured choice for an `ArcLMForDiffusionLM` and a block of that shape; for the knobs see `choose`.

        `None` where it would have too many rows, or the passes over `cache` too many columns, under autocast, where
        the head or the class around it is not what this package makes of them (`key_of_head`), and where a capture
        failed.
        """
        head_key = key_of_head(model)
        if self.failed or head_key is None or torch.is_autocast_enabled(model.device.type):
            return None
        if block.ids.numel() > MAX_ROWS or block.ids.device != model.device:
            return None
        if cache is not None and len(block.ids) * static_columns(cache) > MAX_COLUMNS:
            return None
        key = (*block.ids.shape, head_key, *(knobs[name] for name in CHOICE_KNOBS))
        choice = self.choices.pop(key, None)
        if choice is None:
            while sum(batch * length for batch, length, *_ in (*self.choices, key)) > MAX_ROWS:
                del self.choices[next(iter(self.choices))]
            try:
                with torch.inference_mode(False), torch.no_grad():
                    desk = self._desk(model.model, block.ids)
                    choice = CapturedChoice(model.lm_head, block, knobs, desk, self.capture)
            except Exception as error:
                self._give_up(error)
                return None
        self.choices[key] = choice
        return choice

    def _desk(self, model: nn.Module, noisy: torch.Tensor) -> Desk:
        """The desk for noisy blocks [B, L] of this shape."""
        key = tuple(noisy.shape)
        if key not in self.desks:
            in_use = {captured[:2] for captured in (*self.contexts, *self.choices)}
            self.desks = {shape: desk for shape, desk in self.desks.items() if shape in in_use}
            hidden_states = model.embed_tokens.weight.new_zeros(*key, model.config.hidden_size)
            self.desks[key] = Desk(torch.zeros(key, dtype=torch.long, device=noisy.device), hidden_states)
        return self.desks[key]

    def _context(self, model: nn.Module, key: tuple[int, int, int], cache: ArcLMCache) -> StaticContext:
        """The static context of that key, with `cache` in it."""
        context = self.contexts.pop(key, None)
        if context is None:
            columns = [batch * num_columns for batch, _, num_columns in (*self.contexts, key)]
            while sum(columns) > MAX_COLUMNS:
                del self.contexts[next(iter(self.contexts))], columns[0]
            context = StaticContext(model, *key)
        self.contexts[key] = context
        if context.stamp is not cache.lengths:
            context.load(cache)
        return context

    def _pass(self, model: nn.Module, context: StaticContext, ids: torch.Tensor, streams: Streams) -> CapturedPass:
        """The captured pass over `context` that reads `ids` [B, columns], laid out by `streams`."""
        commit = streams.num_noisy < ids.shape[1]
        streams = streams.for_layers(model.config, context.cache, model.embed_tokens.weight.dtype)
        if commit and streams.token_mask is None:
            streams = streams._replace(token_mask=torch.ones_like(ids[:, streams.num_noisy :], dtype=torch.bool))
        streams = streams._replace(order=None)  # the caller's order
        if commit not in context.passes:
            desk = self._desk(model, ids[:, : streams.num_noisy])
            context.passes[commit] = CapturedPass(model, context, ids, streams, desk, self.capture)
        context.passes[commit].lay_out(streams, context.stamp)
        return context.passes[commit]

    def _give_up(self, error: Exception) -> None:
        self._clear()
        self.failed = True
        reason = str(error).partition("\n")[0]
        logger.warning_once(
            f"No CUDA graph could be captured ({type(error).__name__}: {reason}). Denoising steps run without, slower "
            "with the same results; use_cuda_graphs=False does not try."
        )


_IDLE: "weakref.WeakKeyDictionary[nn.Module, list[DenoisingGraphs]]" = weakref.WeakKeyDictionary()


def borrow_graphs(model: nn.Module, borrower: Any) -> DenoisingGraphs | None:
    """Graphs of an `ArcLMModel` for `borrower` alone, until it is garbage; `None` where nothing can be captured.

    So two threads that generate at the same time do not write into the same buffers.
    """
    key = key_of(model)
    if key is None:
        return None
    idle = _IDLE.setdefault(model, [])
    try:
        graphs = idle.pop()
    except IndexError:  # asked first and popped then, another thread could come between
        graphs = DenoisingGraphs(CAPTURES[model.device.type](model.device))
    graphs.renew(key)
    weakref.finalize(borrower, idle.append, graphs)
    return graphs


def key_of(model: nn.Module) -> tuple | None:
    """What captured passes depend on: modules, places of the weights, and settings; not the values of the weights.

    `None` where no pass is captured: where the device has no graphs, the model is spread over devices, quantised or in
    training, and with hooks or adapters, which are Python that a replay does not run. (The class around an
    `ArcLMModel` may have hooks: it is called as ever.)
    """
    device, config = model.device, model.config
    if device.type not in CAPTURES or model.training:
        return None
    places = _places(model, device)
    return None if places is None else (places, config._attn_implementation, config.right_shift_logits)


def key_of_head(model: nn.Module) -> tuple | None:
    """The same of a captured choice, which does not call the class around an `ArcLMModel` but its head alone.

    `None` also where that class has hooks or another `forward` than in this package.
    """
    is_ours = type(model).forward.__module__ == type(model.model).__module__
    return _places(model.lm_head, model.device) if is_ours and runs_as_written(model) else None


def _places(model: nn.Module, device: torch.device) -> tuple | None:
    """The modules and where their weights are, `None` if they do something else than their class says."""
    modules = list(model.modules())
    # asked at every call of generate: model.parameters() takes four times as long
    kept = (held for module in modules for held in (module._parameters, module._buffers))
    tensors = [x for held in kept for x in held.values() if x is not None]
    if any(type(x) not in (torch.Tensor, nn.Parameter) or x.device != device for x in tensors):
        return None
    if not all(map(runs_as_written, modules)):
        return None
    return tuple((x.data_ptr(), x.dtype, x.device, x.shape, x.stride()) for x in tensors), tuple(map(id, modules))
