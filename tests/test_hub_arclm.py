"""The card of a directory: what the Hub reads in it, and whether its lines of Python run."""

import pytest
import torch
from conftest import tiny_model
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model

from arclm.hub_arclm import write_model_card


OPTIONS = {"block_size": 8, "status": "It was made for a test."}


@pytest.fixture
def card_of(tmp_path):
    """Write a card and read it as the Hub does."""

    def write_and_read(base_model: str, name: str = "me/mine", **options) -> ModelCard:
        write_model_card(tmp_path, name, base_model, **OPTIONS, **options)
        return ModelCard.load(tmp_path / "README.md")

    return write_and_read


def run_card(card: ModelCard, capsys) -> str:
    """Run the Python of a card; return what it prints."""
    (code,) = card.text.split("```python\n")[1:]
    torch.manual_seed(0)
    exec(code.split("```")[0], {})
    return capsys.readouterr().out


def test_the_metadata_name_base_and_datasets(card_of):
    card = card_of("Qwen/Qwen3.5-0.8B", datasets=["a/b", "c/d"])
    assert card.data.to_dict() == {
        "base_model": "Qwen/Qwen3.5-0.8B",
        "datasets": ["a/b", "c/d"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["arclm", "bd3lm", "block-diffusion", "custom_code"],
    }
    assert card.text.lstrip().startswith("# mine\n\nA block-diffusion language model, made from `Qwen/Qwen3.5-0.8B`")
    assert "up to 8 tokens at a time\nby iterative denoising. It was made for a test.\n" in card.text


def test_a_directory_stands_for_what_its_own_card_names(card_of, tmp_path):
    local = tmp_path / "secret" / "converted"
    local.mkdir(parents=True)
    for foreign in (None, "---\nbase_model: x/y\n---\n", "---\nbase_model: [\n---\n", "no metadata\n"):
        if foreign is not None:
            (local / "README.md").write_text(foreign)
        card = card_of(str(local))
        assert (card.data.base_model, card.data.datasets) == (None, None)
        assert "made from `converted` with" in card.text
    write_model_card(local, "converted", "Qwen/Qwen3.5-0.8B", **OPTIONS)
    card = card_of(str(local))
    assert card.data.base_model == "Qwen/Qwen3.5-0.8B"
    assert "secret" not in card.content


def test_the_python_of_a_card_runs(nano_tokenizer, config, card_of, tmp_path, monkeypatch, capsys):
    model = tiny_model(**config.to_diff_dict())
    for folder in ("model", "adapter"):
        nano_tokenizer.save_pretrained(tmp_path / folder)
    model.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    plain = run_card(card_of("Qwen/Qwen3.5-0.8B", "model"), capsys)
    assert plain.startswith("user\nWhich is larger")
    adapter = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    adapter.save_pretrained(tmp_path / "adapter")
    card = card_of("model", "adapter", is_adapter=True)
    assert card.data.library_name == "peft"
    adapted = run_card(card, capsys)
    assert adapted.startswith("user\nWhich is larger")
    assert adapted != plain
