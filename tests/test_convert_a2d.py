"""convert_a2d.py on tiny checkpoints of every layout, and the sentence of every bad input."""

import json
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from unittest.mock import Mock, call

import pytest
import torch
from conftest import tiny_config
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2Tokenizer
from transformers.models.qwen3_5 import Qwen3_5ForCausalLM, Qwen3_5TextConfig, Qwen3_5Tokenizer

from arclm import convert_a2d as module
from arclm import hub_arclm
from arclm.convert_a2d import convert_a2d


ROOT = Path(__file__).resolve().parents[1]
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
WEIGHTS = "model.safetensors"
LETTER_WITH_MARK = "हि"
END, PAD, REAL, VOCAB = 263, 264, 266, 293  # ids of the end tokens; tokens (256 bytes, 7 merges, 3 special) and rows
HIDDEN = tiny_config().hidden_size
TEXT_CONFIG = {key.name: getattr(tiny_config(), key.name) for key in fields(Qwen3_5TextConfig)}
TEXT_CONFIG |= {"vocab_size": VOCAB, "dtype": "bfloat16", "eos_token_id": PAD, "mtp_num_hidden_layers": 1}
LAYOUTS = {
    "multimodal": {"multimodal": True, "shards": 3, "prefix": "model.language_model."},
    "text": {},
    "text from multimodal": {"prefix": "model.language_model.", "shards": 2},
    "untied": {"multimodal": True, "tied": False, "shards": 2, "prefix": "model.language_model."},
}


def tiny_tokenizer() -> Qwen3_5Tokenizer:
    """Return a byte-level tokenizer with a token that a pre-tokenizer splitting words at marks can never give."""
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    a, b, c, _, _, d = alphabet.pre_tokenize_str(LETTER_WITH_MARK)[0][0]  # both characters start with bytes a and b
    merges = [("t", "h"), ("th", "e"), ("i", "n"), (a, b), (a + b, c), (a + b, d), (a + b + c, a + b + d)]
    vocab = {token: i for i, token in enumerate([*sorted(alphabet.alphabet()), *map("".join, merges)])}
    tokenizer = Qwen3_5Tokenizer(vocab=vocab, merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}"
    return tokenizer


def make_checkpoint(path: Path, *, multimodal=False, tied=True, shards=1, prefix="model.", **changes) -> Path:
    """Write a random checkpoint, bfloat16 but for the two kinds of tensors that Qwen3.5 keeps in float32."""
    text = {**TEXT_CONFIG, "tie_word_embeddings": tied, **changes}
    config = {**text, "architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text"}
    weights = {}
    torch.manual_seed(0)
    for name, tensor in Qwen3_5ForCausalLM(Qwen3_5TextConfig(**text)).state_dict().items():
        is_float32 = name.endswith(("A_log", "linear_attn.norm.weight"))
        noisy = (tensor + 0.01 * torch.randn_like(tensor)).to(torch.float32 if is_float32 else torch.bfloat16)
        weights |= {} if tied and name == HEAD else {name.replace("model.", prefix, 1): noisy}
    if multimodal:
        weights |= {"model.visual.patch_embed.proj.weight": torch.randn(6, 3, 2), "mtp.fc.weight": torch.randn(4, 8)}
        config = {"model_type": "qwen3_5", "text_config": config, "vision_config": {"depth": 2}, "image_token_id": 7}
    files = [f"model-{i:05}-of-{shards:05}.safetensors" for i in range(1, shards + 1)] if shards > 1 else [WEIGHTS]
    weight_map = {name: files[i % shards] for i, name in enumerate(sorted(weights))}
    path.mkdir()
    for file in files:
        shard = {name: tensor for name, tensor in weights.items() if weight_map[name] == file}
        save_file(shard, path / file, metadata={"format": "pt"})
    if shards > 1:
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps(config))
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """One checkpoint for each layout. Tests that change one take a copy, as `src` is."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: make_checkpoint(folder / name, **layout) for name, layout in LAYOUTS.items()}


@pytest.fixture(scope="session")
def converted(checkpoints, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("converted")
    return {name: convert_a2d(src, folder / name) for name, src in checkpoints.items()}


@pytest.fixture
def src(checkpoints, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoints["text"], tmp_path / "src"))


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def load_config(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(path: Path, changes: dict[str, torch.Tensor | None]) -> None:
    weights = {name: tensor for name, tensor in (load_weights(path) | changes).items() if tensor is not None}
    save_file(weights, path / "model.safetensors")


def refused(src: Path, message: str, *, error=ValueError, **options) -> None:
    """Convert into a folder that does not exist yet, expect one sentence, and nothing new around the source."""
    before = sorted(src.parent.rglob("*"))
    with pytest.raises(error, match=message) as caught:
        convert_a2d(src, src.parent / "new" / "out", **options)
    assert "\n" not in str(caught.value)
    assert sorted(src.parent.rglob("*")) == before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_kept_tensor_arrives_bit_for_bit_under_its_text_only_name(layout, checkpoints, converted):
    before, after = load_weights(checkpoints[layout]), load_weights(converted[layout])
    dropped = ("model.visual", "mtp")
    kept = {name.replace("language_model.", ""): t for name, t in before.items() if not name.startswith(dropped)}
    assert after.keys() == kept.keys()
    for name, tensor in kept.items():
        rows = [row for row in range(len(tensor)) if row != REAL] if name in (EMBEDDING, HEAD) else slice(None)
        assert_close(after[name][rows], tensor[rows], rtol=0, atol=0)
    for name in after.keys() & {EMBEDDING, HEAD}:
        assert torch.equal(after[name][REAL], after[name][:REAL].double().mean(0).bfloat16())
    if (index := converted[layout] / "model.safetensors.index.json").exists() or layout != "text":
        shards = {name: file.name for file in index.parent.glob("*.safetensors") for name in load_file(file)}
        assert json.loads(index.read_text())["weight_map"] == shards


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_result_computes_what_the_parent_computes(layout, auto_class, checkpoints, converted):
    model = auto_class.from_pretrained(converted[layout], trust_remote_code=True, dtype=torch.float32)
    parent = Qwen3_5ForCausalLM.from_pretrained(checkpoints[layout], dtype=torch.float32)
    model.config.context_attention = "causal"
    tokens = torch.randint(REAL, (2, 37), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, error = parent(tokens).logits, model(tokens).logits - parent(tokens).logits
    assert error[..., [row for row in range(VOCAB) if row != REAL]].abs().max() < 1e-4  # <|mask|>'s head row is new
    assert expected.std() > 0.3


def test_a_mask_token_that_is_there_keeps_its_id_and_its_row(src, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(src)
    tokenizer.add_tokens(["<|mask|>", "<|later|>"])
    tokenizer.save_pretrained(src)
    out = convert_a2d(src, tmp_path / "out")
    assert load_config(out)["mask_token_id"] == REAL
    assert REAL in AutoTokenizer.from_pretrained(out, trust_remote_code=True).all_special_ids
    assert torch.equal(load_weights(out)[EMBEDDING], load_weights(src)[EMBEDDING])


@pytest.mark.parametrize("tied", [True, False])
def test_the_embedding_grows_to_a_multiple_of_64_only_where_no_row_is_free(tied, tmp_path):
    full = make_checkpoint(tmp_path / "full", tied=tied, vocab_size=REAL)
    refused(full, rf"keep needs an unused row, all {REAL} are taken. Choose mean", mask_token_init="keep")
    out = convert_a2d(full, tmp_path / "out")
    assert (load_config(out)["vocab_size"], load_config(out)["mask_token_id"]) == (320, REAL)
    before, after = load_weights(full), load_weights(out)
    for name in after.keys() & {EMBEDDING, HEAD}:
        assert torch.equal(after[name][:REAL], before[name])
        assert torch.equal(after[name][REAL:], before[name].double().mean(0).bfloat16().expand(320 - REAL, -1))
    out = convert_a2d(make_checkpoint(tmp_path / "last", tied=tied, vocab_size=REAL + 1), tmp_path / "last row")
    assert load_config(out)["vocab_size"] == REAL + 1


def test_the_copy_of_a_tied_head_is_dropped_whichever_part_of_the_config_ties_it(src, tmp_path):
    text_config = {key: value for key, value in TEXT_CONFIG.items() if key != "tie_word_embeddings"}
    edit_json(src / "config.json", model_type="qwen3_5", text_config=text_config, tie_word_embeddings=True)
    edit_weights(src, {HEAD: load_weights(src)[EMBEDDING].clone()})
    assert HEAD not in load_weights(convert_a2d(src, tmp_path / "out"))


def test_config_holds_what_the_weights_were_made_for(converted):
    config = load_config(converted["multimodal"])
    assert (config["model_type"], config["architectures"]) == ("arclm", ["ArcLMForDiffusionLM"])
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    kept = [key for key in TEXT_CONFIG if key.endswith(("vocab_size", "hidden_size", "_dim", "_heads", "_types"))]
    for key in (*kept, "intermediate_size", "rope_parameters", "dtype", "tie_word_embeddings"):
        assert config[key] == TEXT_CONFIG[key], key
    assert (config["mask_token_id"], config["eos_token_id"], config["pad_token_id"]) == (REAL, END, PAD)
    assert (config["block_size"], config["context_attention"], config["right_shift_logits"]) == (64, "block_causal", 0)
    assert not [key for key in config if key.startswith(("mtp_", "vision", "text_", "image_"))]


def test_options_reach_the_result(src, tmp_path):
    options = {"block_size": 7, "context_attention": "causal", "right_shift_logits": True}
    edit_json(src / "config.json", dtype=None)
    out = convert_a2d(src, tmp_path / "out", mask_token_init="keep", **options)
    assert {key: load_config(out)[key] for key in options} == options
    assert load_config(out)["dtype"] == "bfloat16"  # where the source names none: that of the embedding
    assert_close(load_weights(out), load_weights(src), rtol=0, atol=0)  # the unused row is kept as it is


def test_generation_config_names_every_knob_so_that_generate_takes_it(converted):
    knobs = json.loads((converted["text"] / "generation_config.json").read_text())
    del knobs["transformers_version"]
    expected = module.KNOBS | {"do_sample": True, "temperature": 0.6, "top_k": 0, "max_new_tokens": 256}
    tokens = {"eos_token_id": [END, PAD], "pad_token_id": PAD, "suppress_tokens": [*range(REAL + 1, VOCAB)]}
    assert knobs == expected | tokens
    assert not GenerationConfig.from_pretrained(converted["text"]).update(**knobs)


def test_the_tokenizer_comes_back_the_same_with_a_mask_token(src, tmp_path):
    (src / "chat_template.jinja").write_bytes(b"{{ messages[0].content }}\r\n\n")
    out = convert_a2d(src, tmp_path / "out")
    before, after = AutoTokenizer.from_pretrained(src), AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert (type(after), after.mask_token_id) == (Qwen3_5Tokenizer, REAL)
    assert after.get_vocab() == {**before.get_vocab(), "<|mask|>": REAL}
    assert after.decode([REAL, 5], skip_special_tokens=True) == after.decode([5])
    assert (out / "chat_template.jinja").read_bytes() == b"{{ messages[0].content }}\r\n\n"


@pytest.mark.parametrize("declared", ["Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast", None])
@pytest.mark.parametrize("layout", ["text", "multimodal"])
def test_the_pre_tokenizer_survives_whatever_class_is_declared(layout, declared, checkpoints, tmp_path):
    src = Path(shutil.copytree(checkpoints[layout], tmp_path / "src"))
    edit_json(src / "tokenizer_config.json", tokenizer_class=declared)
    out = convert_a2d(src, tmp_path / "out", verify=False)
    loaded = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    regex = Tokenizer.from_file(str(src / "tokenizer.json")).pre_tokenizer.__getstate__()
    assert loaded.backend_tokenizer.pre_tokenizer.__getstate__() == regex
    assert len(loaded.encode(LETTER_WITH_MARK)) == 1
    assert len(Qwen2Tokenizer.from_pretrained(src).encode(LETTER_WITH_MARK)) == 2  # what would go wrong


def test_real_text_is_tokenized_as_before(shared_tokenizer, tmp_path):
    src = make_checkpoint(tmp_path / "src", vocab_size=151_700)
    shutil.copytree(shared_tokenizer, src, copy_function=shutil.copyfile, dirs_exist_ok=True)
    out = convert_a2d(src, tmp_path / "out", verify=False)
    before = Tokenizer.from_file(str(src / "tokenizer.json"))
    after = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert (type(after), after.mask_token_id) == (Qwen3_5Tokenizer, 151_676)
    for text in ("हिन्दी में लिखा हुआ", "ภาษาไทยที่นี่", "السَّلَامُ عَلَيْكُمْ", "2026 + 3.14", "👩🏽‍🚀", "don't\n\n  x"):
        assert after.encode(text) == before.encode(text).ids


def test_the_code_files_are_copies_and_run_without_the_package(converted, tmp_path):
    out = Path(shutil.copytree(converted["multimodal"], tmp_path / "elsewhere"))
    assert not [copy.name for copy in out.glob("*.py") if copy.read_bytes() != (ROOT / copy.name).read_bytes()]
    code = f"""import sys; sys.modules["arclm"] = None  # `import arclm` fails, installed or not
from transformers import AutoModel
print(type(AutoModel.from_pretrained({str(out)!r}, trust_remote_code=True)))"""
    assert "transformers_modules" in subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, text=True)


def test_the_output_appears_in_new_parents_or_in_an_empty_directory(src, tmp_path):
    before = contents(src)
    out = convert_a2d(src, tmp_path / "a" / "b" / "out")
    (tmp_path / "empty/out").mkdir(parents=True)
    assert contents(convert_a2d(str(src), str(tmp_path / "empty/out"))) == contents(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty", "src"]
    assert out.stat().st_mode == (tmp_path / "a").stat().st_mode
    assert contents(src) == before


@pytest.mark.parametrize("taken", ["out", "out/mine.txt"])
def test_an_output_that_holds_something_is_refused_before_any_work(taken, src, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "fetch", None)
    (tmp_path / taken).parent.mkdir(exist_ok=True)
    (tmp_path / taken).write_text("precious")
    with pytest.raises(FileExistsError, match=r"out exists and is not an empty directory. Choose another output_dir"):
        convert_a2d(src, tmp_path / "out")
    assert (tmp_path / taken).read_text() == "precious"


@pytest.mark.parametrize("step", ["write_weights", "save_tokenizer", "verify_tensors", "verify_logits", "os.rename"])
def test_an_interruption_at_any_step_leaves_nothing(step, src, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{module.__name__}.{step}", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert_a2d(src, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [src]


def test_a_small_disk_or_memory_is_noticed_first(src, monkeypatch):
    monkeypatch.setattr(module, "write_weights", None)
    monkeypatch.setattr(shutil, "disk_usage", Mock(return_value=Mock(free=1000)))
    refused(src, r"0.00 GB do not fit on the disk of .*, which has 0.00 GB free. Make room", error=OSError)
    monkeypatch.setattr(module.os, "sysconf", lambda name: 64)
    refused(src, r"verify needs 0 GB of memory, there are 0. Use --verify false")
    refused(src, r"0.00 GB do not fit on the disk", error=OSError, verify=False)


@pytest.mark.parametrize("error", [OSError("[Errno 28] No space left on device"), SafetensorError("No space left")])
def test_a_disk_that_fills_up_meanwhile_gives_one_sentence(error, src, monkeypatch):
    monkeypatch.setattr(module, "save_file", Mock(side_effect=error))
    refused(src, r"GB do not fit on the disk of \S+: it is full. Make room", error=OSError)


@pytest.mark.parametrize(("name", "row"), [(EMBEDDING, REAL - 1), (EMBEDDING, REAL + 1), (NORM, 5), (NORM, None)])
def test_a_tensor_that_changes_or_is_lost_on_the_way_is_found(name, row, src, monkeypatch):
    def write_wrongly(tensors, *args, **kwargs):
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
        changed = tensors.pop(name) if row is None else tensors[name][row : row + 1]
        changed.view(torch.uint8)[..., 0] ^= 1
        save_file(tensors, *args, **kwargs)

    monkeypatch.setattr(module, "save_file", write_wrongly)
    message = "not written, or invented" if row is None else "was not written as it was read"
    refused(src, f"{name} {message}", error=RuntimeError)


@pytest.mark.parametrize(("value", "eps"), [(1.0, 1.0002e-6), (float("nan"), TEXT_CONFIG["rms_norm_eps"])])
def test_logits_that_are_not_the_parents_are_found(value, eps, src, monkeypatch):
    edit_weights(src, {NORM: torch.full([HIDDEN], value)})
    parent_config = Mock(from_dict=lambda fields: Qwen3_5TextConfig.from_dict(fields | {"rms_norm_eps": eps}))
    monkeypatch.setattr(module, "Qwen3_5TextConfig", parent_config)
    refused(src, r"does not give the logits of Qwen3.5 within (\S+e-0[34]|nan) at scale", error=RuntimeError)


@pytest.mark.parametrize("other", [Qwen2Tokenizer, module.PreTrainedTokenizerFast])
def test_a_tokenizer_that_comes_back_different_is_found(other, src, monkeypatch):
    loads = [Qwen3_5Tokenizer.from_pretrained(src), other.from_pretrained(src, mask_token="<|mask|>")]
    monkeypatch.setattr(module.AutoTokenizer, "from_pretrained", Mock(side_effect=loads))
    refused(src, rf"Qwen3_5Tokenizer comes back as a different {other.__name__}. Set tok", error=RuntimeError)


def test_a_hub_id_is_checked_before_its_weights_are_downloaded(src, tmp_path, monkeypatch):
    download = Mock(return_value=str(src))
    monkeypatch.setattr(module, "snapshot_download", download)
    convert_a2d("Qwen/tiny", tmp_path / "out", verify=False)
    edit_json(src / "config.json", model_type="qwen3_5_moe")
    with pytest.raises(ValueError, match="mixture of experts"):
        convert_a2d("Qwen/moe", tmp_path / "moe")
    asked = [(asked.args[0], asked.kwargs["allow_patterns"]) for asked in download.call_args_list]
    small = ["*.json", "*.jinja"]
    assert asked == [("Qwen/tiny", small), ("Qwen/tiny", [*small, "*.safetensors"]), ("Qwen/moe", small)]


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no/such/directory", "model.gguf"])
def test_a_source_that_is_nowhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").touch()
    message = r" is neither a directory nor a model that the Hub gives out \(.*\). Check the name"
    refused(Path(name), name + message, error=FileNotFoundError)


@pytest.mark.parametrize("error", [None, OSError("401"), hub_arclm.errors.HTTPError("401")])  # the last: no network
def test_push_to_hub_uploads_the_finished_directory_and_keeps_it(error, src, tmp_path, monkeypatch):
    hub, out = Mock(), tmp_path / "out"
    hub.create_repo.side_effect = error
    monkeypatch.setattr(hub_arclm, "HfApi", lambda: hub)
    message = r"out is complete, but its upload to me/arclm failed \(401\). .*`hf upload me/arclm .*out`"
    with pytest.raises(OSError, match=message) if error else nullcontext():
        convert_a2d(src, out, push_to_hub="me/arclm")
    calls = [call.create_repo("me/arclm", exist_ok=True), call.upload_folder(repo_id="me/arclm", folder_path=out)]
    assert hub.mock_calls == (calls[:1] if error else calls)
    AutoModel.from_pretrained(out, trust_remote_code=True)
    assert 'path = "me/arclm"' in (out / "README.md").read_text()


def bad(message: str, *, config=(), weights=(), files=(), **options):
    """Return a case: changes to a checkpoint (None removes), or options, and the sentence for it."""
    return pytest.param(dict(config), dict(weights), dict(files), options, message, id=message[:40])


FLOAT8 = torch.ones(HIDDEN).to(torch.float8_e4m3fn)
BAD_INPUT = [
    bad(r"src is not a safetensors checkpoint, it has no config.json.$", files={"config.json": None}),
    bad(r"it is a GGUF model: convert the original checkpoint.$", files={"config.json": None, "a.gguf": b""}),
    bad(r"config.json is not the configuration of a model .* Download it again", files={"config.json": b'{"model'}),
    bad(r"src is an arcLM model already. Load it as it is", config={"model_type": "arclm"}),
    bad(r'"llama", another architecture. Dense Qwen3.5 works: .*"qwen3_5" or', config={"model_type": "llama"}),
    bad(r'"qwen3_5_moe", a mixture of experts. Dense Qwen3.5 works', config={"model_type": "qwen3_5_moe"}),
    bad(r"quantized \(fp8\). Convert the original", config={"quantization_config": {"quant_method": "fp8"}}),
    bad(r"quantized \(awq\). Convert the original", config={"quantization_config": "awq"}),
    bad(r"make no valid model \(.*hidden_size.*\). Correct them", config={"hidden_size": "wide"}),
    bad(r"make no valid model \(.*dimension -40.*\). Correct them", config={"hidden_size": -40}),
    bad(r"src is not a checkpoint: no model.safetensors and no \S+index.json.$", files={WEIGHTS: None}),
    bad(r"\(\*.bin\) are not read: save it as safetensors first", files={WEIGHTS: None, "a.bin": b""}),
    bad(r"model.safetensors is truncated, or no safetensors file \(.*\). Download", files={WEIGHTS: b"x" * 99}),
    bad(r"The checkpoint lacks model.norm.weight. Download it again, or correct", weights={NORM: None}),
    bad(r"The checkpoint lacks lm_head.weight. Download it again, or correct", config={"tie_word_embeddings": False}),
    bad(r"no place for a1, a2, a3 and 1 more. Correct it, or", weights={f"a{i}": torch.ones(i) for i in (1, 2, 3, 4)}),
    bad(rf"norm.weight has shape \[3\], config.json asks for \[{HIDDEN}\]. Corr", weights={NORM: torch.ones(3)}),
    bad(r"norm.weight has dtype F8_E4M3. Convert a checkpoint in BF16, F16, F32, F64", weights={NORM: FLOAT8}),
    bad(r"norm.weight is in \S+ and in \S+. Remove one", weights={"model.language_model.norm.weight": FLOAT8}),
    bad(r"head.weight is not the embedding, but .* ties them. Set", weights={HEAD: torch.ones(VOCAB, HIDDEN)}),
    bad(r"src has no tokenizer.json. Copy the model's tokenizer there", files={"tokenizer.json": None}),
    bad(r"src has a tokenizer that cannot be read \(.*\). Download", files={"tokenizer.json": b'{"model": 3}'}),
    bad(r"has 266 tokens, more than the 200 rows of the embedding: .* Copy the right one", config={"vocab_size": 200}),
    bad(r"make no valid model \(ValueError: block_size must be at least 1, got 0", block_size=0),
    bad(r"make no valid model \(ValueError: context_attention='all' is unknown. Choose", context_attention="all"),
    bad(r"mask_token_init='zero' is unknown. Choose mean or keep", mask_token_init="zero"),
    bad(r"Repo id must be in the form 'repo_name' or 'namespace/repo_name': 'a/b/c'", push_to_hub="a/b/c"),
]


@pytest.mark.parametrize(("config", "weights", "files", "options", "message"), BAD_INPUT)
def test_bad_input_gets_one_sentence_and_leaves_nothing(config, weights, files, options, message, src):
    edit_json(src / "config.json", **config)
    edit_weights(src, weights)
    for name, content in files.items():
        (src / name).unlink() if content is None else (src / name).write_bytes(content)
    refused(src, message, error=(ValueError, FileNotFoundError), **options)


def test_a_bad_shard_or_index_is_named(tmp_path):
    src = make_checkpoint(tmp_path / "src", shards=3)
    shard, index = src / "model-00002-of-00003.safetensors", src / "model.safetensors.index.json"
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(src, rf"{shard.name} is truncated, or no safetensors file \(.*\). Download it again")
    shard.unlink()
    refused(src, rf"{index.name} names {shard.name}, not found there. Download the rest", error=FileNotFoundError)
    index.write_text('{"weight_map": 3}')
    refused(src, rf"{index.name} is not an index of shards. Download it again")


def test_the_command_line_converts_and_prints_an_error_as_one_line(src, tmp_path, monkeypatch, capsys):
    command = ["convert_a2d.py", "--output_dir", str(tmp_path / "out"), "--right_shift_logits", "true"]
    monkeypatch.setattr(sys, "argv", [*command, "--model_name_or_path", str(src)])
    module.main()
    printed, steps = capsys.readouterr(), 2 * len(load_weights(src))  # written and compared
    assert "Verified: all tensors bit by bit, logits of Qwen3.5 within" in printed.out
    assert f"Wrote {tmp_path / 'out'}" in printed.out
    assert f"{steps}/{steps}" in printed.err
    assert load_config(tmp_path / "out")["right_shift_logits"] is True
    monkeypatch.setattr(module, "convert_a2d", Mock(side_effect=ValueError("What came.\n  What to do.")))
    with pytest.raises(SystemExit, match=r"^convert_a2d.py: What came. What to do.$"):
        module.main()


@pytest.mark.slow
def test_the_shapes_of_0_8b_convert_within_the_largest_shard_and_one_gigabyte(shared_tokenizer, tmp_path):
    script = [sys.executable, str(ROOT / "benchmarks" / "convert_0_8b.py"), "--tokenizer", str(shared_tokenizer)]
    subprocess.run([*script, "--work_dir", str(tmp_path), "--output", str(tmp_path / "result.json")], check=True)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["convert"]["peak_memory_mb"] < result["source"]["largest_shard_mb"] + 1000
    assert result["convert_and_verify"]["max_logit_error"] < 1e-4 * max(1, result["convert_and_verify"]["logit_scale"])
