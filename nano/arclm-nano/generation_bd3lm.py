"""Block-diffusion sampling: `generate` fills one block of mask tokens after the other (BD3-LM, arXiv:2503.09573).

The sampler knows the model through its forward pass: `input_ids` commits tokens to the cache, `noisy_input_ids` reads
one block over it. Where both the layers and what follows them are captured, it replays these instead.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
)
from transformers.utils import ModelOutput

from .denoising_bd3lm import Block, Proposal, sample_block, take_step
from .graphs_arclm import borrow_graphs
from .kernels_arclm import use_sample_rows
from .sampling_bd3lm import (
    DEFAULT_MAX_NEW_TOKENS,
    KNOBS,
    WITHOUT_HISTORY,
    check_attention_mask,
    check_cache,
    check_knobs,
    check_logits,
    check_modes,
    check_prompt,
    draw,
    fast_processors,
)


# Prompt tokens per prefill pass: bounds its memory, whatever the length of the prompt.
PREFILL_TOKENS = 2048


@dataclass
class BD3LMGenerateOutput(ModelOutput):
    """What `generate` returns with `return_dict_in_generate=True`.

    Fields:
        sequences: [B, prompt + new] token ids, the prompt first, padded on the right after an end token.
        tokens_per_forward: [B] float, generated tokens up to and with the end token per denoising step of the row.
        nfe: all forward passes of the batch: prefill and denoising steps. A commit shares one with the first denoising
            step of the next block, but for the first commit where nothing was prefilled.
        past_key_values: the cache of all complete blocks that were committed; `None` where one goes beyond the end
            that a stopping criterion gave its row.
        history: one [B, block_size] tensor of ids per denoising step, the block after the step, on the CPU.
    """

    sequences: torch.Tensor | None = None
    tokens_per_forward: torch.Tensor | None = None
    nfe: int | None = None
    past_key_values: Any | None = None
    history: tuple[torch.Tensor, ...] | None = None


class BD3LMGenerationMixin:
    """`generate` for a model with a clean and a noisy stream."""

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        streamer: Any | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        past_key_values: Any | None = None,
        tokenizer: Any | None = None,
        **kwargs,
    ) -> torch.Tensor | BD3LMGenerateOutput:
        """Generate block by block.

        1. Align the prompts left; blocks are counted from the first token of each row.
        2. Prefill: commit the complete blocks of the prompt.
        3. Until every row has produced an end token or its number of tokens:
           a. start the block as the rest of the prompt plus mask tokens;
           b. denoise: forward, accept some tokens, until none is masked;
           c. hand the new tokens to the streamer;
           d. commit the block, if there is another one, in the pass of that one's first denoising step.

        Args:
            input_ids: [B, P] prompts, padded on the left where they differ in length. Mask tokens in a prompt are
                filled in place.
            attention_mask: [B, P], 1 for tokens. If `None`, pad tokens are padding, unless they are end tokens too.
            generation_config: knobs, see below; the model's own if `None`.
            streamer: receives the prompt, then the new tokens of each block [n], and with `put_draft` [n] after each
                denoising step, mask tokens among them. One row only.
            logits_processor: applied to the scores of masked positions, after those of the generation config.
            stopping_criteria: asked after every new token in order; a row ends with the first one they stop at, or by
                `max_time` with its block.
            past_key_values: the cache of an earlier call whose tokens begin this prompt; it grows in place.
            tokenizer: needed for `stop_strings`.
            kwargs: any field of the generation config, and
                - `block_size`: tokens per block, at most the trained one, the default.
                - `steps`: denoising steps for all blocks together; ceil(steps / blocks) per block.
                - `max_denoising_steps`: denoising steps per block, block_size by default.
                - `remasking_strategy`: `low_confidence_static` accepts the same number of tokens at every step, the
                  most confident ones; `low_confidence_dynamic` all above `confidence_threshold`; `entropy_bound` the
                  most certain ones up to `entropy_bound`; `sequential` as static, from left to right; `random` as
                  static, in random order. Each accepts at least one. (Nothing is masked again: the name is the
                  field's.)
                - `confidence_threshold`: in [0, 1], a probability. Higher is slower and safer. 0.9 by default.
                - `entropy_bound`: >= 0, in nats. Higher is faster. 0.1 by default.
                - `use_cuda_graphs`: whether a CUDA device may replay denoising steps, True by default.

        Returns:
            [B, P + new] ids, or `BD3LMGenerateOutput` with `return_dict_in_generate=True`.

        Raises:
            ValueError, TypeError: a knob or input that does not fit, with what is allowed.
        """
        config, knobs = self._generation_knobs(generation_config, kwargs)
        run = _Run(self, input_ids, attention_mask, config, knobs, past_key_values)
        run.set_callables(logits_processor, stopping_criteria, tokenizer)
        if streamer is not None:
            if len(run.ids) > 1:
                raise ValueError(f"A streamer shows one row, this call has {len(run.ids)}. Call generate for each.")
            streamer.put(run.input_ids.cpu())
        # 2. Prefill
        run.prefill()
        while True:
            # 3.a Start the block
            run.start_block()
            # 3.b Denoise
            for _ in range(knobs["max_denoising_steps"]):
                if not run.denoise():
                    break
                if config.return_dict_in_generate:
                    run.history.append(run.block.ids.clone())
                if hasattr(streamer, "put_draft"):
                    streamer.put_draft(run.new_tokens().cpu())
            # 3.c Stream
            new_tokens = run.finish_block()
            if streamer is not None:
                streamer.put(new_tokens.cpu())
            # 3.d Commit
            if run.is_done():
                break
            run.commit()
        if streamer is not None:
            streamer.end()
        return run.output() if config.return_dict_in_generate else run.sequences()

    def _generation_knobs(self, generation_config: GenerationConfig | None, kwargs: dict) -> tuple:
        """Merge arguments, generation config and defaults; returns the config and our knobs, checked."""
        ours = {name: kwargs.pop(name) for name in KNOBS if name in kwargs}
        # the first of caller, caller's config and model's config that names a length decides which of the two counts
        lengths = [
            (source.get("max_new_tokens"), source.get("max_length"))
            for source in (kwargs, vars(generation_config or GenerationConfig()), vars(self.generation_config))
        ]
        new, _ = next((pair for pair in lengths if pair != (None, None)), (DEFAULT_MAX_NEW_TOKENS, None))
        config, unknown = self._prepare_generation_config(generation_config, **kwargs)
        unknown = sorted(name for name, value in unknown.items() if value is not None)
        if unknown:
            raise TypeError(
                f"generate() got unknown arguments {', '.join(unknown)}. "
                f"Choose among the fields of GenerationConfig and {', '.join(KNOBS)}."
            )
        config.max_new_tokens = new
        check_modes(config)
        given = {name: ours.get(name, getattr(config, name, None)) for name in KNOBS}
        given = {name: value for name, value in given.items() if value is not None}
        knobs = KNOBS | {"block_size": self.config.block_size} | given
        fields = {name: getattr(config, name) for name in ("max_new_tokens", "max_length", "num_return_sequences")}
        check_knobs(knobs | fields, self.config.block_size)
        if self.config.mask_token_id is None:
            raise ValueError("mask_token_id is missing from config.json. convert_a2d.py chooses one and writes it.")
        return config, knobs


class _Run:
    """The rows of one call of `generate`, aligned left.

    Fields:
        ids: [B, W] prompts, settled tokens and mask tokens; column = position.
        prompt_lengths, limits: [B] number of prompt tokens, and of tokens after which the row stops.
        starts: [B] position of the current block in each row.
        ends: [B] number of tokens up to and with the end token, `limits` where there is none yet.
        finished: [B] bool.
        block: the current one.
        is_suppressed: [V] bool, for `sample_rows`; `None` where PyTorch proposes the tokens.
        choice: captured, what follows the layers in its denoising steps; `None` where that runs eagerly.
        checked: number of new tokens that the stopping criteria have seen.
        to_commit: inputs of the forward pass that commit the last block, {} once it is committed.
    """

    def __init__(self, model, input_ids, attention_mask, config, knobs, cache):
        self.model, self.config, self.knobs, self.cache = model, config, knobs, cache
        self.mask_token_id, self.block_size = model.config.mask_token_id, knobs["block_size"]
        check_prompt(input_ids, model.config)
        batch, prompt = input_ids.shape
        model._prepare_special_tokens(config, attention_mask is not None, device=input_ids.device, batch_size=batch)
        eos = input_ids.new_empty(0) if config._eos_token_tensor is None else config._eos_token_tensor
        if attention_mask is None:  # the parent takes pad tokens for padding where the end token is another one
            attention_mask = model._prepare_attention_mask_for_generation(input_ids, config, {})
        check_attention_mask(attention_mask, input_ids)
        self.input_ids = input_ids.repeat_interleave(config.num_return_sequences, 0)
        self.is_token = attention_mask.bool().repeat_interleave(config.num_return_sequences, 0)
        new = config.max_new_tokens if config.max_new_tokens is not None else config.max_length - prompt
        if new < 1:
            raise ValueError(
                f"max_length={config.max_length} leaves no room after a prompt of {prompt} tokens. Use max_new_tokens."
            )
        config.max_length = prompt + new  # where some processors look
        # 1. Align the prompts left
        self.order = self.is_token.int().argsort(dim=1, descending=True, stable=True)
        self.prompt_lengths = self.is_token.sum(1)
        self.limits = self.prompt_lengths + new
        if (longest := int(self.limits.max())) > model.config.max_position_embeddings:
            raise ValueError(
                f"A prompt of {longest - new} tokens and {new} new ones reach beyond the "
                f"{model.config.max_position_embeddings} positions of this model. Shorten one of them."
            )
        shape = (len(self.input_ids), max(-(-longest // self.block_size) * self.block_size, prompt))
        self.ids = torch.full(shape, self.mask_token_id, device=input_ids.device)  # int64, whatever the caller's
        self.ids[:, :prompt] = self.input_ids.gather(1, self.order)
        column = torch.arange(self.ids.shape[1], device=input_ids.device)
        self.ids[column >= self.prompt_lengths[:, None]] = self.mask_token_id
        self.was_masked = self.ids == self.mask_token_id
        self.starts = self.was_masked.int().argmax(1) // self.block_size * self.block_size
        self.ends, self.finished = self.limits.clone(), torch.zeros_like(self.limits, dtype=torch.bool)
        self.row_steps, self.nfe, self.history, self.checked = torch.zeros_like(self.limits), 0, [], 0
        self.to_commit, self.end_tokens = {}, torch.arange(model.config.vocab_size, device=input_ids.device)
        self.end_tokens = torch.isin(self.end_tokens, eos) & (self.end_tokens != self.mask_token_id)
        self.graphs = borrow_graphs(model.model, self) if knobs["use_cuda_graphs"] else None
        num_blocks, steps = -(-new // self.block_size), knobs["steps"]
        per_block = self.block_size if steps is None else -(-steps // num_blocks)
        knobs["max_denoising_steps"] = min(per_block, knobs["max_denoising_steps"] or self.block_size, self.block_size)

    def set_callables(self, logits_processor, stopping_criteria, tokenizer) -> None:
        """Join those of the caller and of the generation config; its length and end tokens are this class's own."""
        processors = self.model._get_logits_processor(
            generation_config=self.config,
            input_ids_seq_length=self.input_ids.shape[1],
            logits_processor=LogitsProcessorList() if logits_processor is None else logits_processor,
            device=self.ids.device,
        )
        more = self.config.do_sample, self.model.config, self.ids.device
        self.processors, is_suppressed, temperature = fast_processors(processors, *more)
        by_kernel = is_suppressed is not None and use_sample_rows(self.model.dtype, self.ids.device)
        self.is_suppressed = is_suppressed if by_kernel else None
        self.knobs |= {"mask_token_id": self.mask_token_id, "temperature": temperature}
        given = StoppingCriteriaList() if stopping_criteria is None else stopping_criteria
        criteria = self.model._get_stopping_criteria(self.config, stopping_criteria=given, tokenizer=tokenizer)
        self.clocks = [c for c in criteria if isinstance(c, MaxTimeCriteria)]
        asked = (c for c in criteria if c in given or not isinstance(c, MaxLengthCriteria | EosTokenCriteria))
        self.criteria = StoppingCriteriaList(c for c in asked if c not in self.clocks)
        if self.criteria and len(self.ids) > 1 and self.config._pad_token_tensor is None:
            raise ValueError("Rows that stop at different lengths need padding, and pad_token_id is not set. Pass it.")

    def columns(self) -> torch.Tensor:
        """[B, block_size] positions of the current block."""
        return self.starts[:, None] + torch.arange(self.block_size, device=self.ids.device)

    def forward(self, **inputs) -> torch.Tensor:
        self.nfe += 1
        graphs = {} if self.graphs is None else {"graphs": self.graphs}
        output = self.model(past_key_values=self.cache, block_size=self.block_size, **inputs, **graphs)
        self.cache = output.past_key_values
        return output.logits

    def prefill(self) -> None:
        cached = torch.zeros_like(self.starts)
        if self.cache is not None:
            cached = check_cache(self.cache, self.ids, self.starts, self.model.config, self.block_size)
        piece, longest = max(PREFILL_TOKENS // self.block_size, 1) * self.block_size, int((self.starts - cached).max())
        for offset in range(0, longest, piece):
            columns = cached[:, None] + torch.arange(offset, min(offset + piece, longest), device=self.ids.device)
            inside = columns < self.starts[:, None]
            ids = self.ids.gather(1, columns.clamp(max=self.ids.shape[1] - 1))
            self.forward(input_ids=ids, attention_mask=inside.long(), use_cache=True, logits_to_keep=1)

    def start_block(self) -> None:
        """Have a block of the answer denoised next, or what is left of it.

        A block that begins with the end of the prompt is filled at the pace of a whole one, in fewer steps; a last
        one takes of its steps what that left, where there is one block more than `steps` was divided by.
        """
        columns = self.columns()
        shown = columns.clamp(max=self.ids.shape[1] - 1)
        ids = self.ids.gather(1, shown)
        is_masked = (ids == self.mask_token_id) & (shown < self.ends[:, None]) & ~self.finished[:, None]
        answer = (self.limits - torch.maximum(self.starts, self.prompt_lengths)).clamp(max=self.block_size)
        least = (self.limits - self.prompt_lengths - 1) % self.block_size + 1
        block = Block.of(
            ids,
            is_masked,
            self.knobs,
            can_end=(columns >= self.prompt_lengths[:, None]) & (columns < self.limits[:, None]),
            share_of=torch.maximum(torch.maximum(answer, least), is_masked.sum(1)),
            row_steps=self.row_steps,
            end_tokens=self.end_tokens,
            is_suppressed=self.is_suppressed,
        )
        graphs = None if self.is_suppressed is None else self.graphs
        self.choice = None if graphs is None else graphs.choice(self.model, block, self.knobs, self.cache)
        self.block = block if self.choice is None else self.choice.load(block)
        self.row_steps = self.block.row_steps

    def denoise(self) -> bool:
        """Take a denoising step with the block; False, and nothing done, where no position is masked."""
        # `is_left` or `nonzero` is all that the host waits for in a step under CUDA graphs
        if self.choice is not None:
            if not self.block.is_left:
                return False
            if self._replay():
                return True
        masked = self.block.is_masked.nonzero(as_tuple=True)
        if not len(masked[0]):
            return False
        logits = self.forward(noisy_input_ids=self.block.ids, logits_to_keep=masked, **self.to_commit)
        self.to_commit = {}
        results = self._propose(logits, masked)
        take_step(self.block, Proposal.of_masked(self.block, masked, results, self.mask_token_id), self.knobs)
        return True

    def _replay(self) -> bool:
        """Take the step as two captured ones, the layers and the choice; False, and nothing done, if they cannot."""
        clean = self.to_commit.get("input_ids"), self.to_commit.get("attention_mask")
        inputs = {"noisy_input_ids": self.block.ids, "past_key_values": self.cache, "block_size": self.block_size}
        if self.graphs(self.model.model, *clean, **inputs) is None:
            return False
        self.choice.replay()
        self.nfe, self.to_commit = self.nfe + 1, {}
        return True

    def _propose(self, logits: torch.Tensor, masked: tuple) -> tuple[torch.Tensor, ...]:
        """What a `Proposal` holds, each [M], from logits [M, V]; `finish_block` raises if a row is not finite."""
        if self.is_suppressed is not None:
            return sample_block(logits, self.block, self.block.places[masked], self.knobs)
        scores = logits.float()
        scores[:, self.mask_token_id] = -torch.inf
        probs = scores.softmax(-1)
        scores = self._process(scores, self.block.ids, *masked)
        chosen = draw(scores.softmax(-1)) if self.config.do_sample else scores.argmax(-1, keepdim=True)
        chosen = chosen.clamp(max=logits.shape[-1] - 1)  # NaN draws a token beyond the last
        is_allowed = scores.gather(1, chosen).squeeze(1) > -torch.inf
        entropy = torch.full_like(probs[:, 0], torch.inf)
        if self.knobs["remasking_strategy"] == "entropy_bound":  # one more pass over [M, V] that no other asks for
            entropy = torch.special.entr(probs).sum(-1)
        # one logit that is NaN or infinite spoils all of its row
        return chosen.squeeze(1), probs.gather(1, chosen).squeeze(1), entropy, probs[:, 0].isfinite() & is_allowed

    def _process(self, scores: torch.Tensor, block: torch.Tensor, rows, offsets) -> torch.Tensor:
        """Apply the processors to scores [M, V] of masked positions, given by row [M] and offset in the block [M].

        Each position gets the history that transformers would give it: the prompt, padded on the left, and what stands
        before it. Padding and what is not settled yet are mask tokens: no other token depends on how many there are.
        """
        if all(type(processor) in WITHOUT_HISTORY for processor in self.processors):
            return self.processors(block[rows], scores)
        ids = self.ids.scatter(1, self.columns().clamp(max=self.ids.shape[1] - 1), block)
        padding = self.input_ids.shape[1] - self.prompt_lengths  # [B]
        lengths = (padding + self.starts)[rows] + offsets
        values, counts = lengths.unique(return_counts=True)
        groups = lengths.argsort(stable=True).split(counts.tolist())
        for length, chosen in zip(values.tolist(), groups, strict=True):
            columns = torch.arange(length, device=ids.device) - padding[rows[chosen], None]
            history = ids[rows[chosen]].gather(1, columns.clamp(min=0)).masked_fill(columns < 0, self.mask_token_id)
            scores[chosen] = self.processors(history, scores[chosen])
        return scores

    def finish_block(self) -> torch.Tensor:
        """Write the block back and look for an end; returns the new tokens of the first row [n]."""
        check_logits(self.block.is_finite)
        columns, block = self.columns(), self.block.ids
        writable = (columns < self.ids.shape[1]) & ~self.finished[:, None]
        rows = torch.arange(len(block), device=block.device)[:, None].expand_as(columns)
        self.ids[rows[writable], columns[writable]] = block[writable]
        is_end = self.block.ends(block) & ~self.finished[:, None]
        first = columns.masked_fill(~is_end, torch.iinfo(columns.dtype).max).min(1).values
        self.ends = torch.where(is_end.any(1), first + 1, self.ends)
        settled = self.starts + self.block_size
        before, self.finished = self.finished, self.finished | is_end.any(1) | (settled >= self.limits)
        if any(clock(self.ids, None).any() for clock in self.clocks):
            has_answer = settled > self.prompt_lengths
            self.ends = torch.where(has_answer, torch.minimum(self.ends, settled), self.ends)
            self.finished |= has_answer
        if self.criteria:
            self._ask_criteria()
        return self.new_tokens() if not before[0] else block[0][:0]

    def new_tokens(self) -> torch.Tensor:
        """[n] ids of the block that are part of the first row's answer."""
        columns = self.columns()[0]
        return self.block.ids[0][(columns >= self.prompt_lengths[0]) & (columns < self.ends[0])]

    def _ask_criteria(self) -> None:
        """End each row at the first new token that a criterion stops at.

        Criteria see what they see in transformers: the caller's prompts and the same number of new tokens in all rows.
        So a row that is ahead of the others waits for them, which costs it less than a block and changes no text.
        """
        settled = torch.where(self.finished, self.limits, self.starts + self.block_size) - self.prompt_lengths
        longest = (self.ends - self.prompt_lengths).max()
        for count in range(self.checked + 1, int(torch.minimum(settled.min(), longest)) + 1):
            stops = self.criteria(self.sequences(count), None)
            ends = torch.where(stops, self.prompt_lengths + count, self.ends)
            self.ends = torch.minimum(self.ends, ends)
            self.finished |= stops
            self.checked = count

    def is_done(self) -> bool:
        return bool(self.finished.all())

    def commit(self) -> None:
        """Have the block appended to the cache of every row that goes on, by the next forward pass."""
        self.flush()
        block = self.block.ids.clone()
        mask = None if not self.finished.any() else (~self.finished)[:, None].expand_as(block).long()
        self.to_commit = {"input_ids": block, "attention_mask": mask, "use_cache": True}
        self.starts = torch.where(self.finished, self.starts, self.starts + self.block_size)
        if self.cache is None:  # two streams without a cache are a pass over all blocks
            self.flush()

    def flush(self) -> None:
        """Commit what no denoising step followed."""
        if self.to_commit:
            self.forward(**self.to_commit, logits_to_keep=1)
            self.to_commit = {}

    def sequences(self, new: int | None = None) -> torch.Tensor:
        """[B, P + new] prompts as given, mask tokens filled, then the new tokens, padded after the end."""
        prompt = self.ids[:, : self.input_ids.shape[1]].gather(1, self.order.argsort(1))
        prompt = torch.where(self.is_token, prompt, self.input_ids)
        new = int((self.ends - self.prompt_lengths).max()) if new is None else new
        columns = self.prompt_lengths[:, None] + torch.arange(new, device=self.ids.device)
        pad = self.config._pad_token_tensor
        tokens = self.ids.gather(1, columns.clamp(max=self.ids.shape[1] - 1))
        if pad is not None:
            tokens = torch.where(columns < self.ends[:, None], tokens, pad)
        return torch.cat((prompt, tokens), 1)

    def output(self) -> BD3LMGenerateOutput:
        column = torch.arange(self.ids.shape[1], device=self.ids.device)
        generated = (self.was_masked & (column < self.ends[:, None])).sum(1)
        if self.cache is not None and self.cache.lengths is not None and (self.cache.lengths > self.ends).any():
            self.cache = None  # a row was committed before its criterion was asked
        speed, history = generated / self.row_steps.clamp(min=1), tuple(block.cpu() for block in self.history)
        return BD3LMGenerateOutput(self.sequences(), speed, self.nfe, self.cache, history)
