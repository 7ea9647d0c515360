"""Which fast path is taken, what is said where none is, and the kernels through Triton's interpreter and compiler."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from arclm import kernels_arclm as kernels
from arclm.gated_delta_rule import AffineScan, DeltaRuleInputs, gated_delta_rule


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
RECURRENT, CHUNKED = "fused_recurrent_gated_delta_rule", "chunk_gated_delta_rule"
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


@pytest.fixture
def fla(monkeypatch):
    """Put a flash-linear-attention in place whose functions are arcLM's own delta rule."""
    modules = {name: ModuleType(name) for name in ("fla", "fla.ops", "fla.ops.gated_delta_rule")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    modules["fla"].__version__, modules["fla"].ops = "0.6.3", modules["fla.ops"]
    modules["fla.ops"].gated_delta_rule = module = modules["fla.ops.gated_delta_rule"]
    module.calls = []

    def imitate(name: str):
        def rule(q, k, v, *, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel):
            assert use_qk_l2norm_in_kernel
            assert g.dtype == torch.float32
            module.calls.append(name)
            return gated_delta_rule(DeltaRuleInputs(q, k, v, g, beta), initial_state)[:2]  # fla's always has a final

        setattr(module, name, rule)

    imitate(RECURRENT)
    imitate(CHUNKED)
    modules["fla"].rules = module
    return modules["fla"]


def set_check(monkeypatch, name: str, check) -> None:
    monkeypatch.setitem(kernels.CHECKS, name, (check, 1e-4))


def test_a_kernel_that_computes_right_is_usable_and_checked_once(warnings, monkeypatch):
    checked = []
    set_check(monkeypatch, "affine_scan", lambda *problem: checked.append(problem) or 1e-6)
    assert all(kernels.usable("affine_scan", GPU, 10, 14) for _ in range(3))
    assert checked == [(GPU, 10, 14)]
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


@pytest.mark.parametrize("name", [RECURRENT, CHUNKED])
def test_flash_linear_attention_is_checked_for_presence_and_version(warnings, fla, name, monkeypatch):
    problem = (torch.float16, 2, 4, 10, 14)
    monkeypatch.setattr(torch, "Generator", lambda device, real=torch.Generator: real())
    monkeypatch.setattr(
        torch, "randn", lambda shape, real=torch.randn, **kwargs: real(shape, **{**kwargs, "device": CPU})
    )
    assert kernels.usable(name, GPU, *problem)
    assert fla.rules.calls == [name]
    assert not warnings

    kernels.usable.cache_clear()
    fla.__version__ = "0.7.0"
    assert not kernels.usable(name, GPU, *problem)
    assert "flash-linear-attention is 0.7.0, and 0.6 is the tested one" in warnings[0]

    kernels.usable.cache_clear()
    monkeypatch.setitem(sys.modules, "fla", None)
    assert not kernels.usable(name, GPU, *problem)
    assert "flash-linear-attention is not installed (pip install" in warnings[1]
    assert len(fla.rules.calls) == 1


def delta_rule_inputs(tokens: int, dtype=torch.bfloat16) -> DeltaRuleInputs:
    generator = torch.Generator().manual_seed(0)
    q, k, v, g, beta = (
        torch.randn(3, tokens, *shape, generator=generator) for shape in ((2, 10), (2, 10), (4, 14), (4,), (4,))
    )
    return DeltaRuleInputs(q.to(dtype), k.to(dtype), v.to(dtype), -g.exp(), beta.sigmoid().to(dtype))


def test_flash_linear_attention_takes_what_is_in_16_bits_and_needs_no_gradient(monkeypatch):
    asked = []
    monkeypatch.setattr(kernels, "usable", lambda *question: asked.append(question) or True)
    inputs = delta_rule_inputs(64)
    assert kernels.use_fla(inputs, None)
    assert kernels.use_fla(delta_rule_inputs(65, torch.float16), torch.zeros(3, 4, 10, 14))
    assert asked == [(RECURRENT, CPU, torch.bfloat16, 2, 4, 10, 14), (CHUNKED, CPU, torch.float16, 2, 4, 10, 14)]

    assert not kernels.use_fla(delta_rule_inputs(64, torch.float32), None)
    assert not kernels.use_fla(inputs._replace(v=torch.zeros(3, 64, 4, 257, dtype=torch.bfloat16)), None)
    with_gradient = inputs._replace(beta=inputs.beta.clone().requires_grad_())
    assert not kernels.use_fla(with_gradient, None)
    assert not kernels.use_fla(inputs, torch.zeros(3, 4, 10, 14, requires_grad=True))
    with torch.no_grad():
        assert kernels.use_fla(with_gradient, None)


@pytest.mark.parametrize(("tokens", "name"), [(64, RECURRENT), (65, CHUNKED)])
@pytest.mark.parametrize("need_final", [True, False])
def test_fla_gated_delta_rule_returns_what_gated_delta_rule_does(fla, tokens, name, need_final):
    inputs, state = delta_rule_inputs(tokens), torch.randn(3, 4, 10, 14)
    output, final, boundary_states = kernels.fla_gated_delta_rule(inputs, state, need_final=need_final)
    expected = gated_delta_rule(inputs, state, need_final=need_final)
    assert fla.rules.calls == [name]
    assert torch.equal(output, expected[0])
    assert boundary_states is None
    assert torch.equal(final, expected[1]) if need_final else final is None


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


def test_the_self_check_of_the_delta_rule_sees_a_lost_decay(fla):
    problem = RECURRENT, torch.bfloat16, 2, 4, 10, 14
    assert kernels._check_fla(CPU, *problem) < 1e-2
    right = fla.rules.fused_recurrent_gated_delta_rule
    fla.rules.fused_recurrent_gated_delta_rule = lambda *args, g, **kwargs: right(*args, g=g * 0.9, **kwargs)
    assert kernels._check_fla(CPU, *problem) > 2e-2


def test_self_checks_leave_the_random_numbers_alone(fla, monkeypatch):
    monkeypatch.setattr(kernels, "affine_scan", scan)
    monkeypatch.setattr(kernels, "sample_rows", rows)
    state = torch.get_rng_state()
    kernels._check_affine_scan(CPU, 10, 14)
    kernels._check_sample_rows(CPU)
    kernels._check_fla(CPU, RECURRENT, torch.bfloat16, 2, 4, 10, 14)
    assert torch.equal(torch.get_rng_state(), state)


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "kernels_in_interpreter.py"]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": "", "PYTEST_XDIST_WORKER": ""}
    run = subprocess.run(command, cwd=Path(__file__).parent, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(autouse=True)
def triton_cache(tmp_path, monkeypatch):
    """Compile anew, and leave nothing in the home directory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_for(capability: int, kernel, signature: dict, constants: dict):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(kernel, triton.JITFunction):
        pytest.skip("TRITON_INTERPRET is set: there is no compiler")
    signature = signature | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, type_ in enumerate(signature.values()) if type_[0] == "*"}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8, "num_stages": 2})


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
