"""The two models that `ablation.py` compares arcLM with: arcLM's weights, another way through the linear layers.

- `OneScanForDiffusionLM`, to train: what a framework written for attention does with Qwen3.5. A row [x_t ; x_0] is one
  sequence for convolution and recurrence, the noisy half first. So noisy block n reads what the NOISY blocks before it
  left, and the clean half reads what the whole noisy half left, later blocks included.
- `DroppedStateForDiffusionLM`, to sample: what transformers 5.2.0 to 5.6.2 do when more than one token is fed with a
  cache. Convolution and recurrence of a denoised block start from nothing; attention sees the cache.

Attention layers, masks, logits and loss are arcLM's in both, and so are the names of the weights.
"""

import torch
import torch.nn.functional as F

from arclm.cache_arclm import CacheAccess
from arclm.gated_delta_rule import gated_delta_rule
from arclm.modeling_arclm import ArcLMForDiffusionLM, ArcLMGatedDeltaNet, ArcLMModel
from arclm.streams_arclm import Streams


class OneScanGatedDeltaNet(ArcLMGatedDeltaNet):
    """Gated DeltaNet mixer that scans both streams as one sequence."""

    def _two_streams(self, mixed, beta, g, streams: Streams) -> torch.Tensor:
        """[x_t ; x_0] from left to right; columns that are no tokens go to the end, where nothing reads them."""
        order = self._tokens_first(mixed, streams)[..., None]  # [B, columns, 1]
        mixed, beta, g = (x.gather(1, order.expand(-1, -1, x.shape[-1])) for x in (mixed, beta, g))
        inputs = self._heads(self.conv1d(F.pad(mixed, (0, 0, self.kernel - 1, 0))), beta, g)
        output, _, _ = gated_delta_rule(inputs)
        return output.gather(1, order.argsort(1)[..., None].expand_as(output))

    @staticmethod
    def _tokens_first(mixed: torch.Tensor, streams: Streams) -> torch.Tensor:
        """[B, columns] order of the columns: the tokens of x_t, those of x_0, then the padding of both."""
        clean = mixed.new_ones(len(mixed), mixed.shape[1] - streams.num_noisy, dtype=torch.bool)
        if streams.token_mask is not None:
            clean = streams.token_mask
        noisy = streams.position_ids[:, : streams.num_noisy] < clean.sum(1, keepdim=True)
        is_token = torch.cat((noisy, clean), 1)
        return is_token.int().argsort(dim=1, descending=True, stable=True)


class DroppedStateGatedDeltaNet(ArcLMGatedDeltaNet):
    """Gated DeltaNet mixer whose noisy blocks start from no state; the clean stream is arcLM's."""

    def _two_streams(self, mixed, beta, g, streams: Streams) -> torch.Tensor:
        split, size = streams.num_noisy, streams.block_size
        blocks = (x[:, :split].unflatten(1, (-1, size)).flatten(0, 1) for x in (mixed, beta, g))
        noisy = self._from_nothing(*blocks, streams).unflatten(0, (len(mixed), -1)).flatten(1, 2)
        clean = self._from_nothing(mixed[:, split:], beta[:, split:], g[:, split:], streams)
        return torch.cat((noisy, clean), 1)

    def _after_context(self, mixed, beta, g, streams: Streams, access: CacheAccess | None) -> torch.Tensor:
        split, outputs = streams.num_noisy, []
        if split:
            outputs.append(self._from_nothing(mixed[:, :split], beta[:, :split], g[:, :split], streams))
        if split < mixed.shape[1]:
            clean = (mixed[:, split:], beta[:, split:], g[:, split:])
            outputs.append(super()._after_context(*clean, streams._replace(num_noisy=0), access))
        return torch.cat(outputs, 1)

    def _from_nothing(self, mixed, beta, g, streams: Streams) -> torch.Tensor:
        """Read columns as arcLM reads the start of a row, without a cache."""
        return super()._after_context(mixed, beta, g, streams._replace(num_noisy=0, token_mask=None), None)


class OneScanModel(ArcLMModel):
    """The layers over [x_t ; x_0] with every noisy block, needed for the loss or not: the scan goes through all."""

    def forward(self, *args, needed: torch.Tensor | None = None, **kwargs):
        return super().forward(*args, **kwargs)


class OneScanForDiffusionLM(ArcLMForDiffusionLM):
    """arcLM with both streams in one scan; passes over one stream are arcLM's."""

    def __init__(self, config):
        super().__init__(config)
        # subclasses without fields of their own: all weights stay where they are
        self.model.__class__ = OneScanModel
        change_mixers(self, OneScanGatedDeltaNet)


class DroppedStateForDiffusionLM(ArcLMForDiffusionLM):
    """arcLM that denoises with an empty memory in its linear-attention layers."""

    def __init__(self, config):
        super().__init__(config)
        change_mixers(self, DroppedStateGatedDeltaNet)


def change_mixers(model: ArcLMForDiffusionLM, mixer: type[ArcLMGatedDeltaNet]) -> None:
    """Give every linear-attention layer of a model another class, which adds no fields."""
    for layer in model.model.layers:
        if layer.is_linear:
            layer.linear_attn.__class__ = mixer
