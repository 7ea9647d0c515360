"""Build arcLM-nano's tokenizer: a byte-level BPE of the world's text with Qwen3.5's special tokens and chat format.

`python nano/build_tokenizer.py --output_dir DIR` writes it; `nano/pretrain.py` calls `build_tokenizer` itself.
"""

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import HfArgumentParser, PreTrainedTokenizerFast

from arclm.nano.world import Task, generate_tasks


# As in Qwen3.5, tokens that stand in an answer's text are not "special": skip_special_tokens keeps them.
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
TEXT_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip

# Words with the space before them, every digit alone, JSON and XML punctuation with the spaces inside it as one piece.
PIECES = (
    r" ?[\p{L}\p{M}_]+"
    r"|\p{N}"
    r"|[ \n]?[^\s\p{L}\p{M}\p{N}_]+(?:\s[^\s\p{L}\p{M}\p{N}_]+)*\n?"
    r"|\s*\n+|\s+(?!\S)|\s+"
)
CUT = "\x00"
VOCABULARY = 574  # with the 2 unused rows of the embedding a multiple of 64


def build_tokenizer(num_tasks: int = 20_000, seed: int = 0) -> PreTrainedTokenizerFast:
    """Train the tokenizer on train tasks.

    Args:
        num_tasks: tasks whose text is counted.
        seed: seed of the tasks.

    Returns:
        A tokenizer of `VOCABULARY` tokens. Any text round-trips, since every byte is a token.
    """
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    added = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    added += [AddedToken(token, special=False, normalized=False) for token in TEXT_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(added),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    template = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
    # rendering needs a tokenizer, so an untrained one renders the text that the real one is trained on
    renderer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    renderer.chat_template = template
    tasks = islice(generate_tasks("train", seed), num_tasks)
    backend.train_from_iterator((training_pieces(task, renderer) for task in tasks), trainer)
    backend.add_tokens(added)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    tokenizer.chat_template = template
    return tokenizer


def training_pieces(task: Task, renderer: PreTrainedTokenizerFast) -> list[str]:
    """Cut a rendered task into the pieces that the BPE counts.

    Added tokens are left out, as the BPE never sees them. Made-up words are cut between syllables, so that merges
    inside a syllable are learned and merges across syllables are not: every word is then the same tokens wherever it
    stands.
    """
    text = renderer.apply_chat_template(task.messages, tools=task.tools, tokenize=False)
    for token in SPECIAL_TOKENS + TEXT_TOKENS:
        text = text.replace(token, CUT)
    syllables = []
    for value_kind, value in task.values:
        if value_kind in ("word", "name"):
            parts = [value[i : i + 2] for i in range(0, len(value), 2)]
            text = text.replace(value, CUT.join(parts))
            syllables += [" " + parts[0], *parts]
    # counted more often, so that every syllable is a token before any word of the requests takes its letters
    return text.split(CUT) + syllables * 2


@dataclass
class TokenizerArguments:
    """Where to write."""

    output_dir: str = field(metadata={"help": "Directory for tokenizer.json, tokenizer_config.json and the template."})
    num_tasks: int = field(default=20_000, metadata={"help": "Number of train tasks that the BPE is trained on."})
    seed: int = field(default=0, metadata={"help": "Seed of these tasks."})


def main() -> None:
    """Build and save."""
    args = HfArgumentParser(TokenizerArguments).parse_args_into_dataclasses()[0]
    build_tokenizer(args.num_tasks, args.seed).save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
