"""What a model directory takes along to the Hub: its card, and how it gets there."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData, errors
from yaml import YAMLError


TAGS = ["arclm", "bd3lm", "block-diffusion", "custom_code"]
CARD = """---
{metadata}
---

# {title}

A block-diffusion language model, made from `{base_model}` with arcLM: it fills up to {block_size} tokens at a time
by iterative denoising. {status}

## Use

```python
{imports}

path = "{name}"
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
model = {load}
messages = [{{"role": "user", "content": "Which is larger, 9.9 or 9.11?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```
"""


def write_model_card(
    folder: Path,
    name: str,
    base_model: str,
    *,
    block_size: int,
    status: str,
    datasets: Sequence[str] = (),
    is_adapter: bool = False,
) -> None:
    """Write README.md: the metadata that the Hub reads, what the model is, and how it is loaded.

    Args:
        folder: where the model is.
        name: by which it will be loaded, a Hub id or a directory.
        base_model: what it was made from: a Hub id, or a directory, whose own base the metadata then name.
        block_size: of the model.
        status: whether it is trained, and how.
        datasets: Hub ids of what it was trained on.
        is_adapter: whether it is an adapter of peft for `base_model`.
    """
    on_hub = base_model_on_hub(base_model)
    metadata = ModelCardData(
        base_model=on_hub,
        datasets=list(datasets) or None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
    )
    imports, path = "from transformers import AutoModel, AutoTokenizer", f'"{base_model}"' if is_adapter else "path"
    load = f'AutoModel.from_pretrained({path}, trust_remote_code=True, dtype="auto")'
    if is_adapter:
        imports, load = f"from peft import PeftModel\n{imports}", f"PeftModel.from_pretrained({load}, path)"
    text = CARD.format(
        metadata=metadata.to_yaml(),
        title=name.rstrip("/").rpartition("/")[2],
        base_model=on_hub or Path(base_model).resolve().name,
        block_size=block_size,
        status=status,
        imports=imports,
        name=name,
        load=load,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def base_model_on_hub(name: str) -> str | None:
    """Return the Hub id of a model, for a directory the one that its card names, if the card is one of these."""
    if not Path(name).is_dir():
        return name
    try:
        data = ModelCard.load(Path(name, "README.md")).data
    except (OSError, ValueError, YAMLError):  # no card, or one that cannot be read
        return None
    return data.base_model if "arclm" in (data.tags or []) else None


def upload(folder: Path | str, repo_id: str, **options) -> None:
    """Upload a finished directory with `HfApi.upload_folder`; an OSError says what is left to do if that fails."""
    try:
        HfApi().create_repo(repo_id, exist_ok=True)
        HfApi().upload_folder(repo_id=repo_id, folder_path=folder, **options)
    except (OSError, errors.HTTPError) as error:
        left_out = "".join(f' --exclude "{pattern}"' for pattern in options.get("ignore_patterns", ()))
        raise OSError(
            f"{folder} is complete, but its upload to {repo_id} failed ({error}). Log in with `hf auth login`, then "
            f"run `hf upload {repo_id} {folder}{left_out}`."
        ) from None
