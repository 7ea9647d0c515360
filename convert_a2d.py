"""Turn a Qwen3.5 checkpoint into an arcLM directory (A2D: autoregressive to diffusion).

    python convert_a2d.py --model_name_or_path Qwen/Qwen3.5-0.8B --output_dir arclm-0.8b

1. Check the source: what can be wrong with it is found before anything is written.
2. Write the weights under Qwen3.5's text-only names, without the vision tower and the multi-token-prediction head.
   Every tensor keeps its bits and its dtype, but for one embedding row: `<|mask|>` moves into an unused one.
3. Write the tokenizer, config.json, generation_config.json, a model card and the code files that
   `trust_remote_code=True` runs.
4. Verify: each written tensor against the source, and the logits against those of `Qwen3_5ForCausalLM`.

All of it happens in a temporary directory beside the output directory, renamed to it at the very end.
"""

import inspect
import json
import math
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, GenerationConfig, HfArgumentParser, PreTrainedTokenizerFast
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.hf_argparser import HfArg
from transformers.models.qwen3_5 import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from arclm.configuration_arclm import ArcLMConfig
from arclm.hub_arclm import upload, write_model_card
from arclm.modeling_arclm import ArcLMForDiffusionLM
from arclm.sampling_bd3lm import DEFAULT_MAX_NEW_TOKENS, KNOBS


MASK_TOKEN = "<|mask|>"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DROPPED = ("model.visual.", "mtp.")
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
# combining marks (Hindi, Thai, Arabic), digits, an emoji of several code points: what a wrong pre-tokenizer splits
SAMPLES = ("नमस्ते, हिन्दी", "ที่นี่ภาษาไทย", "السَّلَامُ عَلَيْكُمْ", "3.14159 and 2026", "👩🏽‍🚀 e\u0301", f"a\n{MASK_TOKEN} b")
DEFAULTS = ArcLMConfig()
UNTRAINED = "It was converted and not trained since: before it denoises, `train_bd3lm.py` has to train it."


@dataclass
class ConvertArguments:
    """Turn a Qwen3.5 checkpoint into an arcLM directory."""

    model_name_or_path: str = HfArg(help="Hub id or directory of a dense Qwen3.5, multimodal or text-only.")
    output_dir: str = HfArg(help="Directory to create. It appears whole, or not at all.")
    block_size: int = HfArg(default=DEFAULTS.block_size, help="Tokens denoised together; training uses the same.")
    context_attention: Literal["block_causal", "causal"] = HfArg(
        default=DEFAULTS.context_attention,
        help="A settled token attends to its whole block and all earlier ones, or as in Qwen3.5 to earlier tokens.",
    )
    right_shift_logits: bool = HfArg(
        default=DEFAULTS.right_shift_logits, help="Predict a masked token from the position before it, as in Qwen3.5."
    )
    mask_token_init: Literal["mean", "keep"] = HfArg(
        default="mean", help="Embedding of a new <|mask|>: the mean of the real rows, or what the unused row holds."
    )
    verify: bool = HfArg(default=True, help="Compare the result with the source; 4 bytes of memory a parameter.")
    push_to_hub: str | None = HfArg(default=None, help="Hub id to upload the finished directory to.")


class SourceTensor(NamedTuple):
    """Where a tensor comes from: file, name there, shape, and dtype as safetensors spells it."""

    file: Path
    name: str
    shape: list[int]
    dtype: str

    def load(self) -> torch.Tensor:
        """Return the tensor, mapped from the file."""
        with safe_open(self.file, framework="pt") as shard:
            return shard.get_tensor(self.name)


class MaskToken(NamedTuple):
    """Row of `<|mask|>`, rows that the embedding needs for it, and whether to fill the row with the mean."""

    token_id: int
    vocab_size: int
    fill: bool


def convert_a2d(model_name_or_path: str | os.PathLike, output_dir: str | os.PathLike, **options) -> Path:
    """Convert a dense Qwen3.5 checkpoint into an arcLM directory.

    Args:
        model_name_or_path: Hub id or directory of the checkpoint.
        output_dir: directory to create; an empty one may exist.
        options: any other fields of `ConvertArguments`.

    Raises:
        ValueError, OSError, RuntimeError: one sentence, and nothing is left behind.
    """
    args = ConvertArguments(os.fspath(model_name_or_path), os.fspath(output_dir), **options)
    out = Path(output_dir).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty directory. Choose another output_dir, or remove it.")
    if args.mask_token_init not in ("mean", "keep"):
        raise ValueError(f"mask_token_init={args.mask_token_init!r} is unknown. Choose mean or keep.")
    if args.push_to_hub is not None:
        validate_repo_id(args.push_to_hub)
    # 1. Check the source, the small files before the weights are downloaded
    src = fetch(model_name_or_path, ["*.json", "*.jinja"])
    fields = read_text_config(src)
    config, shapes = arclm_config(src, fields, args)
    tokenizer = load_tokenizer(src)
    mask = add_mask_token(tokenizer, config.vocab_size, args.mask_token_init)
    src = fetch(model_name_or_path, ["*.json", "*.jinja", "*.safetensors"])
    tensors = read_headers(weight_files(src))
    check_tensors(tensors, shapes, tied=config.tie_word_embeddings)
    if args.verify:
        check_memory(tensors)

    config.update({"vocab_size": mask.vocab_size, "mask_token_id": mask.token_id})
    config.update({"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id})
    config.dtype = DTYPES[tensors[EMBEDDING].dtype]
    size = sum(math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize for tensor in tensors.values())
    with new_directory(out, size) as tmp:
        with tqdm(total=len(tensors) * (1 + args.verify), desc="Converting", unit="tensor") as progress:
            # 2. Write the weights
            write_weights(tensors, mask, tmp, progress)
            # 3. Write the rest
            config.save_pretrained(tmp)
            generation_config(tokenizer, mask.vocab_size).save_pretrained(tmp)
            modeling = inspect.getfile(ArcLMForDiffusionLM)
            for file in {modeling, *get_relative_import_files(modeling)}:
                shutil.copyfile(file, tmp / Path(file).name)
            save_tokenizer(tokenizer, src, tmp)
            name = args.push_to_hub or out.name
            write_model_card(tmp, name, str(model_name_or_path), block_size=config.block_size, status=UNTRAINED)
            # 4. Verify
            if args.verify:
                verify_tensors(tensors, mask, tmp, progress)
        if args.verify:
            verify_logits(Qwen3_5TextConfig.from_dict(fields | {"vocab_size": mask.vocab_size}), tmp)
    if args.push_to_hub is not None:
        upload(out, args.push_to_hub)
    return out


def fetch(model_name_or_path: str | os.PathLike, patterns: list[str]) -> Path:
    """Return the directory of the source, after downloading the files that match where it is a Hub id."""
    path = Path(model_name_or_path)
    if path.is_dir():
        return path.resolve()
    try:
        return Path(snapshot_download(str(model_name_or_path), allow_patterns=patterns))
    except (ValueError, OSError) as error:  # what huggingface_hub raises: a bad id, no such repository, no network
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        what = f"{path} is neither a directory nor a model that the Hub gives out"
        raise FileNotFoundError(f"{what} ({reason}). Check the name, the network, your access rights.") from None


def read_text_config(src: Path) -> dict:
    """Return the text model's fields of config.json, whichever layout it has, without those of dropped parts."""
    path = src / "config.json"
    if not path.is_file():
        what = "is a GGUF model: convert the original checkpoint" if any(src.glob("*.gguf")) else "has no config.json"
        raise FileNotFoundError(f"{src} is not a safetensors checkpoint, it {what}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        fields = dict(config.get("text_config", config))
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not the configuration of a model ({error}). Download it again.") from None
    model_type = config.get("model_type")
    if model_type == "arclm":
        raise ValueError(f"{src} is an arcLM model already. Load it as it is.")
    if model_type not in ("qwen3_5", "qwen3_5_text"):
        kind = "a mixture of experts" if str(model_type).startswith("qwen3_5_moe") else "another architecture"
        works = 'Dense Qwen3.5 works: model_type "qwen3_5" or "qwen3_5_text".'
        raise ValueError(f'{src} has model_type "{model_type}", {kind}. {works}')
    if quantization := config.get("quantization_config") or fields.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ValueError(f"{src} is quantized ({method}). Convert the original bf16 checkpoint instead.")
    fields.setdefault("tie_word_embeddings", config.get("tie_word_embeddings", False))
    left_out = ("architectures", "auto_map", "model_type", "transformers_version", "_name_or_path")
    return {k: v for k, v in fields.items() if k not in left_out and not k.startswith("mtp_")}


def arclm_config(src: Path, fields: dict, args: ConvertArguments) -> tuple[ArcLMConfig, dict[str, list[int]]]:
    """Return the configuration of the result, but for the tokenizer's part, and the shapes of the parent's tensors."""
    ours = {name: getattr(args, name) for name in ("block_size", "context_attention", "right_shift_logits")}
    try:
        config = ArcLMConfig.from_dict(fields | ours | {"architectures": [ArcLMForDiffusionLM.__name__]})
        with torch.device("meta"):
            return config, {name: list(t.shape) for name, t in ArcLMForDiffusionLM(config).state_dict().items()}
    except Exception as error:  # whatever a wrong value leads to
        reason = f"{type(error).__name__}: {error}".splitlines()[-1].strip()
        raise ValueError(f"{src / 'config.json'} and {ours} make no valid model ({reason}). Correct them.") from None


def load_tokenizer(src: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer, with the pre-tokenizer of its tokenizer.json."""
    path = src / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{src} has no tokenizer.json. Copy the model's tokenizer there.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(src)
        # transformers builds the pre-tokenizer anew from the declared class, which is not always the right one:
        # Qwen2Tokenizer splits words at combining marks. The file knows what the model was trained with.
        verbatim = pre_tokenizer(tokenizer) == json.loads(path.read_bytes())["pre_tokenizer"]
        return tokenizer if verbatim else PreTrainedTokenizerFast.from_pretrained(src)
    except Exception as error:
        raise ValueError(f"{src} has a tokenizer that cannot be read ({error}). Download it again.") from None


def pre_tokenizer(tokenizer: PreTrainedTokenizerFast) -> dict:
    """Return the pre-tokenizer as tokenizer.json spells it, regular expression included."""
    return json.loads(tokenizer.backend_tokenizer.pre_tokenizer.__getstate__())


def weight_files(src: Path) -> list[Path]:
    """Return the safetensors files of the checkpoint."""
    single, index = src / "model.safetensors", src / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        hint = "Pickled weights (*.bin) are not read: save it as safetensors first." if any(src.glob("*.bin")) else ""
        raise FileNotFoundError(f"{src} is not a checkpoint: no {single.name} and no {index.name}. {hint}".strip())
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{index} is not an index of shards. Download it again.") from None
    if absent := [name for name in names if not (src / name).is_file()]:
        raise FileNotFoundError(f"{index} names {listing(absent)}, not found there. Download the rest.")
    return [src / name for name in sorted(names)]


def read_headers(files: Iterable[Path]) -> dict[str, SourceTensor]:
    """Return the tensors to keep, by their name in the result."""
    tensors: dict[str, SourceTensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as shard:
                slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 (it is no dict)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is truncated, or no safetensors file ({error}). Download it again.") from None
        for name, tensor in slices.items():
            target = name.replace("model.language_model.", "model.", 1)
            if target in tensors:
                raise ValueError(f"{target} is in {tensors[target].file.name} and in {file.name}. Remove one.")
            if not name.startswith(DROPPED):
                tensors[target] = SourceTensor(file, name, tensor.get_shape(), tensor.get_dtype())
    return tensors


def check_tensors(tensors: dict[str, SourceTensor], shapes: dict[str, list[int]], *, tied: bool) -> None:
    """Compare names, shapes and dtypes with the model that config.json describes; drop the copy of a tied head."""
    if tied and HEAD not in tensors:
        shapes.pop(HEAD)
    if missing := shapes.keys() - tensors.keys():
        raise ValueError(f"The checkpoint lacks {listing(missing)}. Download it again, or correct its config.json.")
    if extra := tensors.keys() - shapes.keys():
        raise ValueError(f"The model of config.json has no place for {listing(extra)}. Correct it, or remove them.")
    for name, tensor in sorted(tensors.items()):
        if tensor.shape != shapes[name]:
            what = f"{name} has shape {tensor.shape}, config.json asks for {shapes[name]}"
            raise ValueError(f"{what}. Correct it, or download the checkpoint again.")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} has dtype {tensor.dtype}. Convert a checkpoint in {', '.join(DTYPES)}.")
    head = tensors.pop(HEAD) if tied and HEAD in tensors else None
    if head is not None and not same_bits(head.load(), tensors[EMBEDDING].load()):
        raise ValueError(f"{HEAD} is not the embedding, but config.json ties them. Set tie_word_embeddings to false.")


def check_memory(tensors: dict[str, SourceTensor]) -> None:
    """Refuse a verification that needs more memory than the machine has, before the work and not after it."""
    needed = 4 * sum(math.prod(tensor.shape) for tensor in tensors.values()) / 1e9
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9 if hasattr(os, "sysconf") else math.inf
    if needed > memory:
        raise ValueError(f"verify needs {needed:.0f} GB of memory, there are {memory:.0f}. Use --verify false.")


def listing(names: Iterable[str]) -> str:
    """Spell at most three of the names."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Say whether dtype and bytes are equal; unlike as numbers, NaN equals itself and 0.0 differs from -0.0."""
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@contextmanager
def new_directory(out: Path, size: int) -> Iterator[Path]:
    """Give a directory to fill with `size` bytes; it becomes `out` if the block ends well, and disappears if not."""
    # beside the first parent that exists: on the same disk, and no new parents are left after a failure
    parent = next(parent for parent in out.parents if parent.is_dir())
    free = shutil.disk_usage(parent).free
    what = f"{size / 1e9:.2f} GB do not fit on the disk of {parent}"
    if free < size + 2**26:  # 64 MB for the tokenizer and the code
        raise OSError(f"{what}, which has {free / 1e9:.2f} GB free. Make room.")
    # named like the result: transformers caches the code of a local model under the name of its directory
    scratch = parent / f".{out.name}.{os.getpid()}.tmp"
    tmp = scratch / out.name
    try:
        tmp.mkdir(parents=True)
        yield tmp
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.exists():
            out.rmdir()
        os.rename(tmp, out)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        raise OSError(f"{what}: it is full. Make room." if "No space left" in str(error) else str(error)) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_weights(tensors: dict[str, SourceTensor], mask: MaskToken, tmp: Path, progress: tqdm) -> None:
    """Write one shard for each source shard that holds something to keep, from file to file, without a copy."""
    files = sorted({tensor.file for tensor in tensors.values()})
    weight_map = {}
    for i, file in enumerate(files, 1):
        shard = f"model-{i:05}-of-{len(files):05}.safetensors" if len(files) > 1 else "model.safetensors"
        state = {name: tensor.load() for name, tensor in tensors.items() if tensor.file == file}
        for name in state.keys() & {EMBEDDING, HEAD} if mask.fill else ():
            state[name] = with_mask_row(state[name], mask)
        save_file(state, tmp / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(sorted(state), shard)
        progress.update(len(state))
        del state  # unmaps this shard before the next is read
    if len(files) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (tmp / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def with_mask_row(weight: torch.Tensor, mask: MaskToken) -> torch.Tensor:
    """Set the row of `<|mask|>` in `weight` [V, D] to the mean of the rows below it, those of the real tokens.

    In place, which the source does not see: its file is mapped privately. Rows that `weight` lacks are appended.

    An untied head gets the mean of its own rows: `<|mask|>` is never a target, but its logit stands in the softmax of
    the loss, where the mean adds an average logit and an untrained row any. (A tied head has the same row anyway.)
    """
    total = torch.zeros(weight.shape[1], dtype=torch.float64)
    for rows in weight[: mask.token_id].split(4096):  # by parts: the whole in float64 would take gigabytes
        total += rows.sum(0, dtype=torch.float64)
    mean = (total / mask.token_id).to(weight.dtype)
    if mask.vocab_size > len(weight):
        return torch.cat([weight, mean.expand(mask.vocab_size - len(weight), -1)])
    weight[mask.token_id] = mean
    return weight


def add_mask_token(tokenizer: PreTrainedTokenizerFast, vocab_size: int, mask_token_init: str) -> MaskToken:
    """Register `<|mask|>` at the first unused row, or at the next multiple of 64 rows where all are taken.

    A tokenizer that has the token already keeps it, and its row: it may be trained.
    """
    if len(tokenizer) > vocab_size:
        what = f"The tokenizer has {len(tokenizer)} tokens, more than the {vocab_size} rows of the embedding"
        raise ValueError(f"{what}: it belongs to another model. Copy the right one.")
    is_new = MASK_TOKEN not in tokenizer.get_vocab()
    tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
    if tokenizer.mask_token_id >= vocab_size:
        if mask_token_init == "keep":
            raise ValueError(f"mask_token_init=keep needs an unused row, all {vocab_size} are taken. Choose mean.")
        vocab_size = (tokenizer.mask_token_id // 64 + 1) * 64
    return MaskToken(tokenizer.mask_token_id, vocab_size, fill=is_new and mask_token_init == "mean")


def generation_config(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> GenerationConfig:
    """Return the defaults of `generate`; `GenerationConfig.update` takes keywords for the names in it only."""
    vocab = tokenizer.get_vocab()
    ends = [vocab[token] for token in ("<|im_end|>", "<|endoftext|>") if token in vocab] or tokenizer.eos_token_id
    knobs = KNOBS | {"max_new_tokens": DEFAULT_MAX_NEW_TOKENS, "do_sample": True, "temperature": 0.6, "top_k": 0}
    knobs |= {"eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}
    unused = {*range(vocab_size)} - {*vocab.values()}  # rows of the embedding without a token
    return GenerationConfig(**knobs, suppress_tokens=sorted(unused) or None)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, src: Path, tmp: Path) -> None:
    """Save the tokenizer and check that it comes back the same under the model_type "arclm"."""
    tokenizer.save_pretrained(tmp)
    template = "chat_template.jinja"
    if (src / template).is_file():  # as bytes: saving it as text would change line ends
        shutil.copyfile(src / template, tmp / template)
    loaded = AutoTokenizer.from_pretrained(tmp, trust_remote_code=True)
    same = type(loaded) is type(tokenizer) and pre_tokenizer(loaded) == pre_tokenizer(tokenizer)
    if not same or any(loaded.encode(text) != tokenizer.encode(text) for text in SAMPLES):
        what = f"The saved {type(tokenizer).__name__} comes back as a different {type(loaded).__name__}"
        how = f'Set tokenizer_class to "TokenizersBackend" in the tokenizer_config.json of {src}.'
        raise RuntimeError(f"{what}. {how}")


def verify_tensors(tensors: dict[str, SourceTensor], mask: MaskToken, tmp: Path, progress: tqdm) -> None:
    """Compare each written tensor with the source, all but the row of `<|mask|>`."""
    written = read_headers(tmp.glob("*.safetensors"))
    if written.keys() != tensors.keys():
        raise RuntimeError(f"{listing(written.keys() ^ tensors.keys())} not written, or invented.")
    for name, tensor in tensors.items():
        old, new = tensor.load(), written[name].load()
        parts = [slice(len(old))]
        if mask.fill and name in (EMBEDDING, HEAD):
            parts = [slice(mask.token_id), slice(mask.token_id + 1, len(old))]
        if not all(same_bits(old[part], new[part]) for part in parts):
            raise RuntimeError(f"{name} was not written as it was read. Check the disk and the memory.")
        progress.update()


@torch.no_grad()
def verify_logits(parent_config: Qwen3_5TextConfig, tmp: Path) -> None:
    """Load the result as a user does and compare its causal clean stream with `Qwen3_5ForCausalLM` (rule E3)."""
    model = AutoModel.from_pretrained(tmp, trust_remote_code=True, dtype=torch.float32).eval()
    model.config.context_attention = "causal"
    with torch.device("meta"):
        parent = Qwen3_5ForCausalLM(parent_config).eval()
    parent.load_state_dict(model.state_dict(), assign=True)  # the same tensors: memory for one model, not two
    parent.model.rotary_emb = type(parent.model.rotary_emb)(parent_config)  # computed, not loaded, so still on meta
    # a length that fills no block and no chunk
    tokens = torch.randint(parent_config.vocab_size, (1, 101), generator=torch.Generator().manual_seed(0))
    expected = parent(tokens, use_cache=False).logits
    error, scale = (model(tokens).logits - expected).abs().max().item(), expected.abs().max().item()
    result = f"logits of Qwen3.5 within {error:.1e} at scale {scale:.2g}"
    if not error < 1e-4 * max(1, scale):  # also true of NaN
        raise RuntimeError(f"The result does not give the {result}. This is a bug: report it with both versions.")
    print(f"Verified: all tensors bit by bit, {result}.")


def main() -> None:
    """Run from the command line; an error is one sentence and exit status 1."""
    try:
        args = HfArgumentParser(ConvertArguments).parse_args_into_dataclasses()[0]
        print(f"Wrote {convert_a2d(**vars(args))}")
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"convert_a2d.py: {' '.join(str(error).split())}")  # some quoted reasons have several lines


if __name__ == "__main__":
    main()
