"""Which fast path is taken, what is said where none is, and the kernels through Triton's interpreter and compiler."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from arclm import (
    attention_gradients_arclm,
    attention_kernels_arclm,
    delta_gradients_arclm,
    delta_kernels_arclm,
    layer_gradients_arclm,
    linear_kernels_arclm,
    loss_kernels_arclm,
)
from arclm import kernels_arclm as kernels
from arclm.gated_delta_rule import AffineScan


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
RTX_4090_SHARED_MEMORY = 101_376


@pytest.fixture
def warnings(monkeypatch):
    """Pretend to have a GPU and Triton, and collect what `usable` says."""
    said = []
    monkeypatch.setattr(kernels.logger, "warning_once", said.append)
    monkeypatch.setattr(kernels, "triton", ModuleType("triton"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    kernels.usable.cache_clear()
    yield said
    kernels.usable.cache_clear()


def set_check(monkeypatch, name: str, check) -> None:
    monkeypatch.setitem(kernels.CHECKS, name, (check, 1e-4))


def test_a_kernel_that_computes_right_is_usable_and_checked_once(warnings, monkeypatch):
    checked, told = [], []
    monkeypatch.setattr(kernels.logger, "info", told.append)
    set_check(monkeypatch, "affine_scan", lambda *problem: checked.append(problem) or 1e-6)
    assert all(kernels.usable("affine_scan", GPU, 10, 14) for _ in range(3))
    assert checked == [(GPU, 10, 14)]
    assert told == ["affine_scan is used on cuda:0: its self-check passed."]
    assert kernels.usable("affine_scan", GPU, 10, 18)  # another compilation
    assert len(checked) == 2
    assert not warnings


def test_a_cpu_is_no_reason_to_warn(warnings):
    assert not kernels.usable("affine_scan", CPU, 10, 14)
    assert not warnings


@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_a_kernel_that_computes_wrong_is_not_used(warnings, monkeypatch, error):
    set_check(monkeypatch, "sample_rows", lambda device: error)
    assert not any(kernels.usable("sample_rows", GPU) for _ in range(2))
    assert len(warnings) == 1
    assert f"sample_rows is not used on cuda:0: its self-check is off by {error:.1e}, and 1e-04" in warnings[0]
    assert "PyTorch gives the same results, slower." in warnings[0]


def test_a_kernel_that_raises_is_not_used(warnings, monkeypatch):
    def check(device):
        raise RuntimeError("out of resource: shared memory\nand a page of source code")

    set_check(monkeypatch, "sample_rows", check)
    assert not kernels.usable("sample_rows", GPU)
    assert "its self-check raised RuntimeError: out of resource: shared memory. PyTorch" in warnings[0]


def check_with_gradients(device) -> float:
    with torch.enable_grad():
        x = torch.ones(3, requires_grad=True)
        (x * x).sum().backward()
    return 0.0


def test_a_self_check_has_gradients_whoever_asks(warnings, monkeypatch):
    set_check(monkeypatch, "sample_rows", check_with_gradients)
    with torch.inference_mode():
        assert kernels.usable("sample_rows", GPU)
    assert not warnings


def test_what_a_self_check_saves_is_no_part_of_a_checkpointed_pass(warnings, monkeypatch):
    def asking(x):
        return (x * x).sin() if kernels.usable("sample_rows", GPU) else x

    set_check(monkeypatch, "sample_rows", check_with_gradients)
    x = torch.arange(3.0, requires_grad=True)
    torch.utils.checkpoint.checkpoint(asking, x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, 2 * x * (x * x).cos())
    assert not warnings


def test_an_old_gpu_is_named(warnings, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not kernels.usable("sample_rows", GPU)
    assert "its compute capability is 7.5, and 8.0 is the least" in warnings[0]


def test_without_triton_the_module_loads_and_says_so(warnings, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it fails
    spec = importlib.util.spec_from_file_location("kernels_without_triton", kernels.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.logger, "warning_once", warnings.append)
    assert not module.usable("affine_scan", CPU, 10, 14)
    assert not module.usable("affine_scan", GPU, 10, 14)
    assert len(warnings) == 1
    assert "Triton is not installed (pip install triton)" in warnings[0]


def test_the_affine_scan_takes_float32_and_at_most_128_keys(monkeypatch):
    monkeypatch.setattr(kernels, "usable", lambda *question: question == ("affine_scan", CPU, 128, 14))
    assert kernels.use_affine_scan(torch.zeros(1, 2, 3, 128, 14))
    assert not kernels.use_affine_scan(torch.zeros(1, 2, 3, 128, 14, dtype=torch.float64))
    monkeypatch.setattr(kernels, "usable", lambda *question: True)
    assert not kernels.use_affine_scan(torch.zeros(1, 2, 3, 129, 14))


def scan(transition, update, state, *, reverse=False, transpose=True):
    """`affine_scan` in PyTorch; without `transpose` its reverse is wrong."""
    if not reverse:
        return AffineScan.apply(transition, update, state)
    transition = transition.mT if transpose else transition
    return AffineScan.apply(transition.flip(1), update.flip(1), state).flip(1)


def test_the_self_check_of_the_scan_sees_a_wrong_gradient(monkeypatch):
    monkeypatch.setattr(kernels, "affine_scan", scan)
    assert kernels._check_affine_scan(CPU, 10, 14) < 1e-6
    monkeypatch.setattr(kernels, "affine_scan", lambda *args, **kwargs: scan(*args, **kwargs, transpose=False))
    assert kernels._check_affine_scan(CPU, 10, 14) > 1e-2


def rows(logits, is_suppressed, mask_token_id, *, temperature=None, seed=None, wrong=None):
    """`sample_rows` in PyTorch, right or wrong in one respect."""
    column = torch.arange(logits.shape[1])
    probs = logits.masked_fill(column == (-1 if wrong == "mask" else mask_token_id), -torch.inf).softmax(-1)
    tokens = probs.argmax(-1) if wrong != "ties" else len(column) - 1 - probs.flip(1).argmax(-1)
    if temperature is not None:
        scores = logits / (1.0 if wrong == "temperature" else temperature)
        tokens = scores.softmax(-1).multinomial(1, generator=torch.Generator().manual_seed(int(seed))).squeeze(1)
    entropy = torch.special.entr(probs).sum(-1) * (1.001 if wrong == "entropy" else 1)
    return tokens, probs.gather(1, tokens[:, None]).squeeze(1), entropy, probs[:, 0].isfinite()


def test_the_self_check_of_the_sampler_sees_what_is_wrong(monkeypatch):
    monkeypatch.setattr(kernels, "sample_rows", rows)
    assert kernels._check_sample_rows(CPU) < 1e-5
    for wrong in ("mask", "ties", "temperature", "entropy"):
        monkeypatch.setattr(
            kernels, "sample_rows", lambda *args, wrong=wrong, **kwargs: rows(*args, wrong=wrong, **kwargs)
        )
        assert not kernels._check_sample_rows(CPU) < 1e-4, wrong


def test_self_checks_leave_the_random_numbers_alone(monkeypatch):
    monkeypatch.setattr(kernels, "affine_scan", scan)
    monkeypatch.setattr(kernels, "sample_rows", rows)
    state = torch.get_rng_state()
    kernels._check_affine_scan(CPU, 10, 14)
    kernels._check_sample_rows(CPU)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("what", ["kernels", "layers", "gradients"])
def test_kernels_in_the_interpreter(what):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{what}_in_interpreter.py"]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": "", "PYTEST_XDIST_WORKER": ""}
    run = subprocess.run(command, cwd=Path(__file__).parent, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(autouse=True)
def triton_cache(tmp_path, monkeypatch):
    """Compile anew, and leave nothing in the home directory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_for(capability: int, kernel, signature: dict, constants: dict, **options):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(kernel, triton.JITFunction):
        pytest.skip("TRITON_INTERPRET is set: there is no compiler")
    signature = signature | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, type_ in enumerate(signature.values()) if type_[0] == "*"}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": 8, "num_stages": 2} | options)


@pytest.mark.parametrize(("capability", "reverse"), [(89, False), (89, True), (90, True)])
def test_the_affine_scan_compiles_within_the_shared_memory_of_an_rtx_4090(capability, reverse):
    pytest.importorskip("triton")
    pointers = dict.fromkeys(("transition", "update", "initial_state", "states"), "*fp32")
    constants = {"K": 128, "V": 128, "K_TILE": 128, "V_TILE": 16, "REVERSE": reverse}
    compiled = compile_for(capability, kernels._affine_scan_kernel, pointers | {"N": "i32", "H": "i32"}, constants)
    assert compiled.metadata.shared <= RTX_4090_SHARED_MEMORY
    assert "cubin" in compiled.asm


@pytest.mark.parametrize(("capability", "sample"), [(89, True), (90, False)])
def test_the_sampler_compiles_and_reads_the_logits_once(capability, sample):
    pytest.importorskip("triton")
    signature = {"logits": "*bf16", "places": "*i64", "is_suppressed": "*i1", "seed": "*i64", "statistics": "*fp32"}
    signature |= {"candidates": "*i32", "row_stride": "i32", "vocabulary": "i32", "mask_token_id": "i32"}
    constants = {"SAMPLE": sample, "TILE": kernels.VOCABULARY_TILE}
    compiled = compile_for(capability, kernels._read_tiles_kernel, signature | {"temperature": "fp32"}, constants)
    assert compiled.metadata.shared <= RTX_4090_SHARED_MEMORY
    assert compiled.asm["ttir"].count("tensor<4096x!tt.ptr<bf16>>") > 0
    loads = [line for line in compiled.asm["ttir"].splitlines() if "tt.load" in line and "bf16" in line]
    assert len(loads) == 1
    assert "f64" not in compiled.asm["ttir"]


@pytest.mark.parametrize("capability", [89, 90])
def test_what_joins_the_tiles_of_the_sampler_compiles(capability):
    pytest.importorskip("triton")
    signature = {"logits": "*bf16", "places": "*i64", "statistics": "*fp32", "candidates": "*i32", "tokens": "*i64"}
    signature |= {"confidence": "*fp32", "entropy": "*fp32", "is_finite": "*i1"}
    signature |= dict.fromkeys(("row_stride", "vocabulary", "mask_token_id", "num_tiles"), "i32")
    compiled = compile_for(capability, kernels._join_tiles_kernel, signature, {"TILES": 64})
    assert "cubin" in compiled.asm
    assert "f64" not in compiled.asm["ttir"]


# what the arguments of the kernels of a layer are; those in capitals are constants, all others bfloat16
FLOAT32 = "A_log state final_state partial statistics squares next_squares gates boundaries grad_boundaries"
FLOAT32 += " grad_initial grad_gates weight query_weight key_weight cos sin grad_weight grad_weights"
FLOAT32 += " normalizer target factor"
INT32 = "tokens rows parts columns mask_batch mask_row gate_batch gate_row chunks first per_row num_blocks num_noisy"
INT32 += " key_batch key_head key_row value_batch value_head value_row blocks_row places_row rotary_batch channels"
INT32 += " num_keys size"
TYPES = {"eps": "fp32", "scale": "fp32", "mask": "*i1", "is_token": "*i1", "blocks": "*i64", "places": "*i32"}
TYPES |= dict.fromkeys(FLOAT32.split(), "*fp32") | dict.fromkeys(INT32.split(), "i32")


def compile_for_4090(kernel, constants: dict, *, warps: int = 4, stages: int = 3, **types):
    """Compile as the functions around the kernels call them at the shapes of Qwen3.5-0.8B."""
    types = TYPES | types
    signature = {name: "constexpr" if name in constants else types.get(name, "*bf16") for name in kernel.arg_names}
    compiled = compile_for(89, kernel, signature, constants, num_warps=warps, num_stages=stages)
    assert compiled.metadata.shared <= RTX_4090_SHARED_MEMORY, kernel
    return compiled


def test_the_kernels_of_a_layer_compile_within_the_shared_memory_of_an_rtx_4090():
    pytest.importorskip("triton")
    numbers = {"H": 16, "KEY_HEADS": 16, "K": 128, "V": 128, "C": delta_kernels_arclm.CHUNK, "V_TILE": 32}
    delta_rule = delta_kernels_arclm._delta_rule_kernel, numbers | {"is_token": None, "final_state": None}, 3
    numbers = {"KEY_HEADS": 2, "D": 256, "M_TILE": 32, "N_TILE": 32}
    attention = attention_kernels_arclm._attention_kernel, numbers, 2
    numbers = {"N0": 3584, "N1": 3584, "N2": 0, "N3": 0, "D": 1024, "GATED": True}
    linear = linear_kernels_arclm._linear_kernel, numbers | {"M_TILE": 64, "N_TILE": 64, "D_TILE": 64}, 4
    numbers = {"H": 16, "KEY_HEADS": 16, "D": 128, "C": delta_gradients_arclm.CHUNK}
    walk = numbers | {"V_TILE": delta_gradients_arclm.WALK_TILE, "CHUNKS_PER_BLOCK": 4}
    forward = delta_gradients_arclm._forward_kernel, walk, 3
    backward = delta_gradients_arclm._backward_kernel, walk, 3
    numbers |= {"V_TILE": delta_gradients_arclm.GRADIENT_TILE}
    gradients = delta_gradients_arclm._chunk_gradients_kernel, numbers, 2
    for kernel, constants, stages in (delta_rule, attention, linear, forward, backward, gradients):
        compiled = compile_for_4090(kernel, constants, stages=stages)
        if kernel is not attention[0]:  # whose condition is about what it loads itself
            for region in compiled.asm["ttir"].split("scf.if")[1:]:
                assert "tt.dot" not in region.partition("scf.yield")[0], f"{kernel}: see `_delta_rule_kernel`"


def test_the_kernels_around_products_compile_with_their_gradients():
    pytest.importorskip("triton")
    layers, loss = layer_gradients_arclm, loss_kernels_arclm
    taps = {"L": 64, "D": 128, "TAPS": 4, "T_TILE": layers.CONVOLUTION_TILE}
    compile_for_4090(layers._convolution_kernel, taps)
    compile_for_4090(layers._convolution_sums_kernel, taps, warps=8)
    compile_for_4090(layers._convolution_inputs_kernel, taps)
    without_gate = {"gate": None, "grad_gate": None}
    compile_for_4090(layers._norm_gradients_kernel, without_gate | {"D": 1024, "D_TILE": 1024, "R": 1})
    compile_for_4090(layers._norm_gradients_kernel, {"D": 128, "D_TILE": 128, "R": 8})
    compile_for_4090(layers._swiglu_gradients_kernel, {"TILE": 1024})
    heads = {"H": 8, "KEY_HEADS": 2, "D": 256, "ROTARY": 64, "T_TILE": attention_gradients_arclm.TOKEN_TILE}
    compile_for_4090(attention_gradients_arclm._query_key_gradients_kernel, heads)
    for kernel in (loss._add_logits_kernel, loss._to_gradient_kernel):
        compile_for_4090(kernel, {"TILE": loss.TILE}, warps=8, places="*i64")
