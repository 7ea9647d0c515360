"""Configuration of arcLM: Qwen3.5's text configuration and what block diffusion adds to it."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig


CONTEXT_ATTENTION = ("block_causal", "causal")
ROPE_TYPES = ("default", "linear", "yarn", "llama3")  # the others change with the length of the text


@strict
class ArcLMConfig(Qwen3_5TextConfig):
    r"""Configuration of an arcLM model.

    Every field of `Qwen3_5TextConfig` keeps its meaning; arcLM adds four, all of them properties of the weights.

    Args:
        block_size (`int`, *optional*, defaults to 64):
            Tokens denoised together, >= 1. `generate` may use a smaller block, never a larger one.
        mask_token_id (`int`, *optional*):
            Id of the token that stands for "not generated yet", inside the vocabulary.
        context_attention (`str`, *optional*, defaults to `"block_causal"`):
            What a clean token attends to: `"block_causal"`, its whole block and all earlier blocks, or `"causal"`,
            itself and all earlier tokens, exactly as in Qwen3.5.
        right_shift_logits (`bool`, *optional*, defaults to `False`):
            Whether the noisy stream predicts token i from hidden state i - 1, as the autoregressive parent does.
    """

    model_type = "arclm"

    block_size: int = 64
    mask_token_id: int | None = None
    context_attention: str = "block_causal"
    right_shift_logits: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}.")
        if self.context_attention not in CONTEXT_ATTENTION:
            raise ValueError(
                f"context_attention={self.context_attention!r} is unknown. Choose {' or '.join(CONTEXT_ATTENTION)}."
            )
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise ValueError(
                f"rope_type={rope_type!r} does not go with a cache of rotated keys. Choose {' or '.join(ROPE_TYPES)}."
            )
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"mask_token_id={self.mask_token_id} is outside the vocabulary [0, {self.vocab_size}). "
                "convert_a2d.py picks a free id and writes it into config.json."
            )
        # save_pretrained keeps only the auto class that it was loaded through; a saved arcLM opens with each of them
        self.auto_map = {
            "AutoConfig": "configuration_arclm.ArcLMConfig",
            "AutoModel": "modeling_arclm.ArcLMForDiffusionLM",
            "AutoModelForCausalLM": "modeling_arclm.ArcLMForDiffusionLM",
        }


ArcLMConfig.register_for_auto_class()
# Only the installed package registers itself: code downloaded beside one checkpoint must not serve another one.
if __package__ == "arclm":
    AutoConfig.register("arclm", ArcLMConfig, exist_ok=True)
