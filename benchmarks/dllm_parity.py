"""The same tokens as the peer: arcLM's sampler against dLLM's BD3LMSampler on the same weights.

    python benchmarks/dllm_parity.py --dllm PATH

PATH is a checkout of github.com/ZHZisZZ/dllm. It runs transformers' Qwen3.5 with a block mask, so the comparison is on
configurations with attention layers only; prompts are multiples of the block, as dLLM left-pads all others. Random
weights, temperature 0, the static strategy. Writes benchmarks/results/dllm_parity.json.
"""

import itertools
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from common import load_dllm, versions
from transformers import HfArgumentParser, Qwen3_5ForCausalLM, Qwen3_5TextConfig
from transformers.hf_argparser import HfArg

from arclm.configuration_arclm import ArcLMConfig
from arclm.modeling_arclm import ArcLMForDiffusionLM


ROOT = Path(__file__).resolve().parents[1]
VOCABULARY, MASK, PAD = 211, 210, 209
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "layer_types": ["full_attention"] * 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
}


@dataclass
class ParityArguments:
    """Where the peer is."""

    dllm: str = HfArg(help="Directory of a dLLM checkout.")
    output_file: str = HfArg(default=str(ROOT / "benchmarks" / "results" / "dllm_parity.json"), help="Result file.")


def compare(peer: ModuleType, block_size: int, steps: int, shift: bool, seed: int) -> bool:
    """Generate three blocks after two of prompt, two rows, with both samplers; say whether all tokens are equal."""
    torch.manual_seed(seed)
    model = ArcLMForDiffusionLM(
        ArcLMConfig(**SHAPE, block_size=block_size, mask_token_id=MASK, right_shift_logits=shift)
    ).eval()
    parent = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**SHAPE)).eval()
    parent.load_state_dict(model.state_dict())
    prompts = torch.randint(PAD, (2, 2 * block_size))
    ours = model.generate(
        prompts, max_new_tokens=3 * block_size, max_denoising_steps=steps, do_sample=False, eos_token_id=[]
    )
    tokenizer = SimpleNamespace(mask_token_id=MASK, bos_token_id=None, pad_token_id=PAD, eos_token_id=None)
    theirs = peer.BD3LMSampler(model=Masked(parent), tokenizer=tokenizer).sample(
        list(prompts),
        max_new_tokens=3 * block_size,
        block_size=block_size,
        steps_per_block=steps,
        temperature=0.0,
        right_shift_logits=shift,
    )
    return torch.equal(ours, theirs)


class Masked:
    """The parent as a masked diffusion model: its scores for the mask token are -inf, as in arcLM's sampler."""

    def __init__(self, parent: Qwen3_5ForCausalLM):
        self.parent, self.device = parent, parent.device

    def __call__(self, *args, **kwargs):
        output = self.parent(*args, **kwargs)
        output.logits[..., MASK] = -torch.inf
        return output


def main() -> None:
    """Compare over block sizes, steps that divide the block and that do not, both shifts, three seeds."""
    args = HfArgumentParser(ParityArguments).parse_args_into_dataclasses()[0]
    peer, rows = load_dllm(args.dllm, "dllm.core.samplers.bd3lm"), []
    for block_size, steps, shift in itertools.product((4, 16, 64), (1, 3, 4, 10, 16, 25, 64), (False, True)):
        if steps <= block_size:
            equal = sum(compare(peer, block_size, steps, shift, seed) for seed in range(3))
            rows.append({"block_size": block_size, "steps": steps, "shifted": shift, "equal": equal, "runs": 3})
            print(rows[-1], flush=True)
    record = {
        "what": "runs in which every token equals that of dLLM's BD3LMSampler; 2 rows, 2 blocks of prompt, 3 new ones",
        "hardware": f"CPU, {platform.machine()}, float32",
        "versions": versions(args.dllm),
        "equal": sum(row["equal"] for row in rows),
        "runs": sum(row["runs"] for row in rows),
        "rows": rows,
    }
    Path(args.output_file).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{record['equal']} of {record['runs']} runs equal. Wrote {args.output_file}")


if __name__ == "__main__":
    main()
