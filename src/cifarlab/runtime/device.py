"""The device to train on, and the conditions that decide the exact bits of a training."""

import contextlib
import ctypes
import itertools
import os
import platform
import re
import resource
import sys
from pathlib import Path

import psutil
import torch
from filelock import FileLock, Timeout

from cifarlab.errors import UserError
from cifarlab.params.sections import TrainParams
from cifarlab.runtime import processes

# NAME=value of what chooses the instructions, algorithms or threads of a library. Most cannot be
# asked what they chose. How many threads there are is a condition of its own.
CHOICES = re.compile(
    r"(ATEN|BLIS|CUBLAS|CUBLASLT|CUDNN|DNNL|HIPBLASLT|MIOPEN|MKL|NPY|NVIDIA_TF32|ONEDNN|OPENBLAS"
    r"|PYTORCH_TUNABLEOP|ROCBLAS|TORCH_(ALLOW_TF32|BLAS|CUDNN|LINALG|MKLDNN))_"
    r"|(KMP|OMP)_\w*(DYNAMIC|LIMIT|REDUCTION|ALL_THREADS)"
    r"|DISABLE_ADDMM_|GLIBC_TUNABLES=.*\bcpu\b"
)
HARMLESS = re.compile(
    r"(MKL|BLIS|OPENBLAS)_NUM_THREADS|CUBLAS_WORKSPACE_CONFIG"  # the stages set the last one
    r"|\w*_(VERBOSE|LOG\w*|DUMP|PROFILE|CACHE|LRU|VERSION|HOME|ROOT|PATH|DIR|LIB|INCLUDE)(_|$)"
)


def set_up(params: TrainParams) -> torch.device:
    """Make this process deterministic, set its threads, and return the device to train on.

    Raises
    ------
    UserError
        CUDA was asked for, but there is none, or train.processes does not fit.
    """
    available = torch.cuda.is_available()
    if params.device == "cuda" and not available:
        raise UserError("train.device = cuda: no CUDA device found; use train.device: auto or cpu")
    wrong, gpus = f"train.processes = {params.processes}", torch.cuda.device_count()
    if params.device != "cpu" and 0 < gpus < params.processes:
        raise UserError(f"{wrong}: GPUs found: {gpus}; lower it, or set train.device=cpu")
    if processes.started() and os.environ["WORLD_SIZE"] != str(params.processes):
        raise UserError(f"{wrong}: torchrun started others; set it, and type `dvc repro` instead")
    torch.use_deterministic_algorithms(True)
    # This code never reads memory that it has not written: no need to fill it first.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False  # train.precision: float32 means it
    keep_memory()
    if params.threads != "auto":
        torch.set_num_threads(params.threads)
    return torch.device("cuda" if params.device != "cpu" and available else "cpu")


def take_gpu(locks: Path, count: int) -> FileLock:
    """Wait for a GPU that no other training with the same folder `locks` uses, and make it current.

    Returns its lock, which holds the GPU until it is released or the process ends in any way.
    """
    locks.mkdir(parents=True, exist_ok=True)
    for attempt in itertools.count():
        lock = FileLock(locks / f"gpu-{attempt % count}.lock")
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=0.5)
            torch.cuda.set_device(attempt % count)
            return lock
        if attempt == count - 1:
            print("every GPU trains another experiment; this one waits for its turn", flush=True)
    raise AssertionError


def free_memory(device: torch.device, processes: int = 1) -> int:
    """Return the bytes that each process may use: what is free on the device and in main memory.

    The limits of `ulimit -d` and of the control groups of a container (version 2) count, too.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    free = [psutil.virtual_memory().available, *([limit] if limit >= 0 else [])]
    groups, tree = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
    text = groups.read_text() if groups.exists() else ""
    group = tree / text.rpartition("0::/")[2].strip()
    for folder in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError):  # it says "max", or there is none
            free.append(int((folder / "memory.max").read_text()))
    on_device = [torch.cuda.mem_get_info(device)[0]] if device.type == "cuda" else []
    return min([min(free) // processes, *on_device])


def precision(params: TrainParams, device: torch.device) -> torch.dtype:
    """Return the dtype for convolutions and matrix products.

    "auto" gives bfloat16 where the hardware is faster at it, else float32.
    """
    if params.precision != "auto":
        fast = params.precision == "bfloat16"
    elif device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Intel's AVX-512 is not faster at bfloat16 than at float32, and conversions cost time, too.
        # Intel's AMX is faster.
        cpu = torch.cpu.get_capabilities()
        avx512 = cpu.get("avx512_bf16") and "Intel" not in str(cpu.get("cpu_name"))
        fast = bool(cpu.get("amx_bf16") or avx512)
    return torch.bfloat16 if fast else torch.float32


def processor() -> str:
    """Return the name of the CPU and of the vector instructions that PyTorch uses on it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)", info.read_text(), re.M) if info.exists() else None
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def conditions(params: TrainParams, device: torch.device) -> dict[str, str]:
    """Return what decides the bits of a training's outputs, apart from the train stage's inputs.

    `environment` is there only if a variable is set that may change arithmetic.
    """
    chosen = [f"{k}={v}" for k, v in sorted(os.environ.items()) if v and not HARMLESS.match(k)]
    chosen = [choice for choice in chosen if CHOICES.match(choice)]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": str(torch.get_num_threads()),
        "precision": str(precision(params, device)).removeprefix("torch."),
        "torch": str(torch.__version__),
    } | ({"environment": " ".join(chosen)} if chosen else {})


def keep_memory() -> None:
    """Let glibc keep large blocks that were freed, for the next batch.

    Otherwise it returns them to the kernel, which hands them out again page by page.
    """
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of mallopt(3)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # Older versions of glibc refuse more than 32 MiB.
    if mallopt and (mallopt(mmap_threshold, 1 << 30) or mallopt(mmap_threshold, 1 << 25)):
        mallopt(trim_threshold, 2**31 - 1)
