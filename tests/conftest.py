"""Tiny models, a tokenizer and rows for every test: random weights, all dimensions different, logits of scale 1."""

import json
import os
from pathlib import Path


# no test may reach the network, whatever the caller's environment
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from transformers import AutoTokenizer

from arclm.configuration_arclm import ArcLMConfig
from arclm.modeling_arclm import ArcLMForDiffusionLM
from arclm.nano.build_tokenizer import build_tokenizer


torch.set_num_threads(1)

MASK = 96
QWEN = Path(__file__).resolve().parents[2] / "shared" / "data" / "tokenizer_qwen3_5_like"


def tiny_config(**changes) -> ArcLMConfig:
    """Return a configuration in which no two dimensions are equal: a confused pair of axes cannot pass by luck."""
    values = {
        "vocab_size": 97,
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_hidden_layers": 5,
        "layer_types": ["linear_attention", "full_attention", *["linear_attention"] * 2, "full_attention"],
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 24,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 10,
        "linear_value_head_dim": 14,
        "linear_conv_kernel_dim": 5,
        "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
        "block_size": 16,
        "mask_token_id": MASK,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "initializer_range": 0.1,
    }
    return ArcLMConfig(**{**values, **changes})


def tiny_model(seed: int = 0, **changes) -> ArcLMForDiffusionLM:
    """Return a random float32 model in eval mode with `tiny_config(**changes)`."""
    torch.manual_seed(seed)
    model = ArcLMForDiffusionLM(tiny_config(**changes)).eval()
    for layer in model.model.layers:
        if layer.is_linear:  # the usual initial decays forget everything within a few tokens: a lost state must show
            layer.linear_attn.A_log.data.uniform_(0.001, 0.1).log_()
    return model


def layer_with_tiles(*, is_linear: bool, **changes) -> torch.nn.Module:
    """A tiny layer whose shapes the Triton kernels have tiles for."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16, **changes}
    layers = tiny_model(**sizes, linear_conv_kernel_dim=4).model.layers
    return next(layer for layer in layers if layer.is_linear == is_linear)


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """[batch, length] ids in [2, 96): no padding, end or mask token among them."""
    return torch.randint(2, MASK, (batch, length), generator=torch.Generator().manual_seed(seed))


def noisy(x_0: torch.Tensor, seed: int = 5) -> torch.Tensor:
    """Return a copy with about half of the tokens masked."""
    return x_0.masked_fill(torch.rand(x_0.shape, generator=torch.Generator().manual_seed(seed)) < 0.5, MASK)


@pytest.fixture
def no_grad():
    """Run a test without gradients."""
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def nan_filled_empty_tensors(request):
    """Fill torch.empty with NaN, so that uninitialised memory cannot pass for a zero."""
    on_gpu = request.node.get_closest_marker("gpu")  # whose other algorithms are not those that users run
    torch.use_deterministic_algorithms(not on_gpu, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def chat(*turns: str, **row) -> dict:
    """Return a row of user and assistant turns in alternation."""
    roles = ["user", "assistant"] * len(turns)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)], **row}


def write_lines(path: Path, rows: list) -> str:
    """Write rows as JSON, one a line; bytes as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


@pytest.fixture(scope="session")
def nano_tokenizer():
    """Build the tokenizer of arcLM-nano with a mask token."""
    tokenizer = build_tokenizer(num_tasks=100)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|mask|>"]})
    return tokenizer


@pytest.fixture(scope="session")
def shared_tokenizer() -> Path:
    """A tokenizer with Qwen3.5's merges and chat template."""
    if not QWEN.is_dir():
        pytest.skip(f"{QWEN} is absent: it is not part of the repository")
    return QWEN


@pytest.fixture(scope="session")
def qwen_tokenizer(shared_tokenizer):
    """Load that tokenizer and add a mask token."""
    tokenizer = AutoTokenizer.from_pretrained(shared_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|mask|>"]})
    return tokenizer


@pytest.fixture(params=["nano", "qwen"])
def tokenizer(request):
    """Return each of the two in turn."""
    return request.getfixturevalue(f"{request.param}_tokenizer")


@pytest.fixture(scope="session")
def config(nano_tokenizer) -> ArcLMConfig:
    """Return a configuration for `nano_tokenizer`, with blocks of 8."""
    ids = {"mask_token_id": nano_tokenizer.convert_tokens_to_ids("<|mask|>")}
    ids |= {"eos_token_id": nano_tokenizer.eos_token_id, "pad_token_id": nano_tokenizer.pad_token_id}
    layers = {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2}
    return tiny_config(vocab_size=len(nano_tokenizer) + 3, block_size=8, **ids, **layers)


@pytest.fixture(scope="session")
def datasets_cache(tmp_path_factory):
    """Keep what `datasets` prepares out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield
