"""lm-evaluation-harness with the log-likelihoods of arcLM models.

    python lm_eval_arclm.py --model arclm --model_args pretrained=DIR,trust_remote_code=True --tasks NAMES [...]

takes the options of `lm_eval`. Tasks that only generate do not need it: the harness' own `--model hf` serves them.
Tasks that compare log-likelihoods (multiple choice, perplexity) do: `hf` reads them off the clean stream, where a
token sees the rest of its block, the token to predict included, and the padding of a batch.
"""

import logging

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm


logger = logging.getLogger(__name__)


@register_model("arclm")
class ArcLMEval(HFLM):
    """The harness' `hf` model, with one difference: tokens are scored by the noisy stream.

    log p(continuation | context) is the sum of log p(token | all before it) over the tokens of the continuation, the
    chain rule. For each token the noisy stream reads its block with the tokens before it as they are and mask tokens
    from it on, to the end of the block; earlier blocks are clean. Blocks are counted from the first token of the row,
    and the mask token has no probability. So the probabilities of all continuations of one length sum to 1, and each
    is the probability with which `generate` draws it by `remasking_strategy="sequential"`, one token per step, up to
    its end token.

    Noisy blocks do not see each other, so one pass can serve all blocks of a row, masked from the same offset on. A
    batch takes min(longest continuation, block_size) passes, each over the row as the clean stream and over the noisy
    blocks that have a token to score. (Over a cache of the context a pass would read one block only, but each token
    would need its own pass and each row its own place in the cache.)
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.config.model_type != "arclm":
            raise ValueError(
                f'--model arclm is for models of type "arclm", and this one is of type "{self.config.model_type}". '
                "Use --model hf for it."
            )
        if self.batch_size == "auto":
            raise ValueError(
                "--model arclm cannot find a batch size by itself: batch_size=auto measures a pass of another kind. "
                "Give a number."
            )

    def _loglikelihood_tokens(
        self, requests: list[tuple], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Score requests of ((context, continuation) or None, context ids, continuation ids), in any order.

        `override_bs` is at most `batch_size`, as that is a number, and changes nothing.

        Returns:
            for each request the log-probability of the continuation in nats, and whether each of its tokens is the
            most probable one.

        Raises:
            ValueError: there is nothing to score, nothing before it, or more than the model can read.
        """
        rows = []
        for _, context, continuation in requests:
            if not context or not 1 <= len(continuation) <= self.max_length:
                raise ValueError(
                    f"A request has {len(context)} tokens of context and {len(continuation)} of continuation. At "
                    f"least one of each is needed, and at most max_length={self.max_length} of the second. Change the "
                    "task."
                )
            # as in the parent: the last token is only predicted, so max_length tokens are read
            ids = (context + continuation)[-self.max_length - 1 :]
            if len(ids) < len(context) + len(continuation):
                logger.warning(f"A context of {len(context)} tokens is too long: its beginning is left out.")
            rows.append((ids, len(continuation)))
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index][0]))  # the largest batch first
        results = [None] * len(rows)
        for start in tqdm(range(0, len(rows), self.batch_size), disable=disable_tqdm or self.rank != 0):
            indices = order[start : start + self.batch_size]
            for index, result in zip(indices, self._score([rows[index] for index in indices]), strict=True):
                results[index] = result
                if requests[index][0] is not None:  # None: a window of loglikelihood_rolling, which stores their sum
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], result)
        return results

    @torch.inference_mode()
    def _score(self, rows: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Score the last `count` tokens of each row (ids, count) of a batch."""
        block_size, mask_token_id = self.config.block_size, self.config.mask_token_id
        ends = torch.tensor([[len(ids)] for ids, _ in rows], device=self.device)  # [B, 1]
        starts = ends - torch.tensor([[count] for _, count in rows], device=self.device)
        # whole blocks and no attention_mask: a masked block has its full length, or it would tell where the text ends
        width = -(-int(ends.max()) // block_size) * block_size
        column = torch.arange(width, device=self.device)
        x_0 = torch.full((len(rows), width), mask_token_id, device=self.device)
        for row, (ids, _) in zip(x_0, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        is_scored = (column >= starts) & (column < ends)  # [B, width]
        log_probs = torch.zeros(x_0.shape, device=self.device)
        is_best = torch.ones_like(is_scored)
        # of the model itself, where an adapter is around it
        model, head = self.model.get_decoder(), self.model.get_output_embeddings()
        for step in range(min(block_size, int((ends - starts).max()))):
            hidden_from = (starts + step) % block_size  # [B, 1], the offset in every block of the row
            now = is_scored & (column % block_size == hidden_from)
            x_t = x_0.masked_fill(column % block_size >= hidden_from, mask_token_id)
            with torch.autocast(
                self.device.type, self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
            ):
                scores = head(model(x_0, noisy_input_ids=x_t, needed=now).predictive_hidden_state[now]).float()
            scores[:, mask_token_id] = -torch.inf
            log_probs[now] = scores.log_softmax(-1).gather(1, x_0[now][:, None])[:, 0]
            is_best[now] = scores.argmax(-1) == x_0[now]
        return list(zip(log_probs.sum(1).tolist(), is_best.all(1).tolist(), strict=True))


if __name__ == "__main__":
    cli_evaluate()
