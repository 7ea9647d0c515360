"""A model of fixed logits, for tests of the sampler where it matters what the model says."""

import torch
from conftest import tiny_model

from arclm.modeling_arclm import ArcLMForDiffusionLM, ArcLMOutput


EOS, PAD = 1, 0


class Scripted(ArcLMForDiffusionLM):
    """Says `script[p]` at position p with a confidence of its own, and counts its forward passes."""

    def script(self, text: list[int], confidence: list[float]) -> "Scripted":
        self.text, self.calls = text, []
        self.scores = torch.tensor(confidence)
        return self

    def forward(self, input_ids=None, noisy_input_ids=None, past_key_values=None, logits_to_keep=0, **kwargs):
        names = {"commit": input_ids, "denoise": noisy_input_ids}
        self.calls.append(" and ".join(name for name, ids in names.items() if ids is not None))
        output = super().forward(input_ids, noisy_input_ids=noisy_input_ids, past_key_values=past_key_values, **kwargs)
        if noisy_input_ids is None:
            return output
        batch, block = noisy_input_ids.shape
        starts = torch.zeros(batch, dtype=torch.long) if past_key_values is None else past_key_values.lengths
        logits = torch.zeros(batch, block, self.config.vocab_size)
        for row, start in enumerate(starts.tolist()):
            for i in range(block):
                token = self.text[(start + i) % len(self.text)]
                logits[row, i, token] = self.scores[(start + i) % len(self.scores)]
        return ArcLMOutput(logits=logits[logits_to_keep], past_key_values=output.past_key_values)


def scripted(text: list[int], confidence: tuple = (9.0,), **changes) -> Scripted:
    torch.manual_seed(0)
    model = tiny_model(**{"block_size": 4, **changes})
    model.__class__ = Scripted
    return model.script(text, list(confidence))


def greedy(model, ids, **kwargs):
    return model.generate(ids, do_sample=False, return_dict_in_generate=True, **kwargs)
