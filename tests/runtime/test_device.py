"""The device, its precision and its memory."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from cifarlab.errors import UserError
from cifarlab.runtime.device import conditions, precision, set_up
from tests.conftest import REPO, MakeTrain

pytestmark = pytest.mark.usefixtures("restored_torch")


@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_explicit_precision_is_used_on_any_hardware(
    train_params: MakeTrain, monkeypatch: pytest.MonkeyPatch, asked: str, device: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": asked == "float32"})
    assert precision(train_params(precision=asked), torch.device(device)) == getattr(torch, asked)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({}, torch.float32),
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"avx512_bf16": True, "amx_bf16": False, "cpu_name": "AMD EPYC 9R45"}, torch.bfloat16),
        ({"avx512_bf16": True, "amx_bf16": False, "cpu_name": "Intel Xeon"}, torch.float32),
        ({"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, torch.bfloat16),
    ],
)
def test_auto_is_bfloat16_where_the_processor_is_faster_at_it(
    train_params: MakeTrain,
    monkeypatch: pytest.MonkeyPatch,
    capabilities: dict[str, bool],
    expected: torch.dtype,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert precision(train_params(precision="auto"), torch.device("cpu")) == expected


@pytest.mark.parametrize("native", [True, False])
def test_auto_is_bfloat16_where_the_gpu_has_it(
    train_params: MakeTrain, monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": not native})
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: native or including_emulation,
    )
    assert precision(train_params(precision="auto"), torch.device("cuda")) == (
        torch.bfloat16 if native else torch.float32
    )


def test_cuda_is_refused_where_there_is_none(
    train_params: MakeTrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"train\.device = cuda: .* use train\.device: auto or cpu"):
        set_up(train_params(device="cuda"))


@pytest.mark.parametrize(
    ("device", "available", "expected"),
    [("auto", False, "cpu"), ("cpu", False, "cpu"), ("cpu", True, "cpu"), ("auto", True, "cuda")],
)
def test_device(
    train_params: MakeTrain,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    available: bool,
    expected: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert set_up(train_params(device=device)).type == expected


@pytest.mark.parametrize(("threads", "expected"), [(2, 2), ("auto", 1)])
def test_threads(train_params: MakeTrain, threads: int | str, expected: int) -> None:
    set_up(train_params(threads=threads))
    assert torch.get_num_threads() == expected


@pytest.mark.parametrize(
    "setting",
    [
        "ATEN_CPU_CAPABILITY=avx2",
        "CUBLASLT_WORKSPACE_SIZE=3",
        "DNNL_DEFAULT_FPMATH_MODE=BF16",
        "GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX2",
        "KMP_DETERMINISTIC_REDUCTION=1",
        "MKL_CBWR=COMPATIBLE",
        "MKL_DOMAIN_NUM_THREADS=1",
        "MKL_ENABLE_INSTRUCTIONS=SSE4_2",
        "NPY_DISABLE_CPU_FEATURES=AVX2",
        "NVIDIA_TF32_OVERRIDE=0",
        "OMP_THREAD_LIMIT=1",
        "ONEDNN_MAX_CPU_ISA=AVX2",
        "OPENBLAS_CORETYPE=HASWELL",
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1",
        "TORCH_CUDNN_V8_API_DISABLED=1",
    ],
)
def test_a_variable_that_changes_arithmetic_is_a_condition(
    train_params: MakeTrain, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    plain = conditions(train_params(), torch.device("cpu"))
    name, _, value = setting.partition("=")
    monkeypatch.setenv(name, value)
    assert conditions(train_params(), torch.device("cpu")) == plain | {"environment": setting}


def test_other_variables_are_no_conditions(
    train_params: MakeTrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = conditions(train_params(), torch.device("cpu"))
    assert plain.keys() == {"device", "threads", "precision", "torch"}
    for setting in (
        "CUBLAS_WORKSPACE_CONFIG=:16:8",  # the stages set it themselves
        "CUDNN_VERSION=9.1",
        "GLIBC_TUNABLES=glibc.malloc.check=3",
        "KMP_AFFINITY=compact",
        "MKL_CBWR=",
        "MKL_NUM_THREADS=3",
        "OMP_NUM_THREADS=3",
        "ONEDNN_VERBOSE=1",
        "TORCH_HOME=/tmp",
    ):
        name, _, value = setting.partition("=")
        monkeypatch.setenv(name, value)
    assert conditions(train_params(), torch.device("cpu")) == plain


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_kept_memory_is_reused_without_the_kernel() -> None:
    code = """if True:
        import resource, torch
        from cifarlab.runtime.device import keep_memory
        keep_memory()
        def blocks():
            return [torch.ones(6 << 20) for _ in range(4)]  # 24 MiB each
        for _ in range(4):  # alignment splits the first blocks again
            blocks()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    env = os.environ | {"PYTHONPATH": str(REPO / "src")}
    printed = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        check=True,
        timeout=60,
        capture_output=True,
        text=True,
    ).stdout
    assert int(printed) < 1000  # of 24,576 pages


def test_more_processes_than_gpus_are_refused(
    train_params: MakeTrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"train\.processes = 3: GPUs found: 2"):
        set_up(train_params(processes=3, device="auto"))


def test_processes_that_the_parameters_do_not_name_are_refused(
    train_params: MakeTrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody typed `torchrun -m stages.train`: the training key would not know."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "error")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"train\.processes = 1: torchrun started others"):
        set_up(train_params())
