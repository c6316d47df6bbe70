"""Device, BLAS, memory and precision policy: the one place that knows what machine this is.

Importing it puts OpenBLAS in front of the reference BLAS that MLX's Linux wheel links to (about
30 times faster). So the package's `__init__` imports it before `mlx.core`.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from threadpoolctl import threadpool_limits

from hjepa_mlx.config import Config

GB = 1e9
# The oldest NVIDIA driver for mlx[cuda13]: ml-explore.github.io/mlx/build/html/install.html
DRIVER = 580
# Each backend's wheel brings its own libmlx.so, so only one of them may be installed.
INSTALL = "pip uninstall -y mlx-cpu mlx-cuda-13; pip install 'mlx[{}]'"


def _put_openblas_first() -> ctypes.CDLL | None:
    """Load OpenBLAS into the global symbol scope, so that MLX's BLAS calls reach it.

    mlx-data looks for OpenBLAS once, when it makes its first stream. Where it finds one, its
    prefetch threads set it to one thread around every sample, for the whole process: matmuls get
    slower, and their last bits depend on timing. So a stream is made before OpenBLAS is loaded.
    """
    if sys.platform != "linux":
        return None
    if "mlx.core" in sys.modules:
        warnings.warn(
            "mlx.core was imported before hjepa_mlx: MLX uses its reference BLAS, about 30 times "
            "slower than OpenBLAS. Import hjepa_mlx first.",
            stacklevel=3,
        )
        return None
    import mlx.data

    mlx.data.buffer_from_vector([{"first": 0}]).ordered_prefetch(1, 0)
    with _openblas_kernels():
        for name in ("libopenblas.so.0", "libopenblasp.so.0", "libopenblas.so"):
            try:
                return ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue
    return None


@contextmanager
def _openblas_kernels() -> Iterator[None]:
    """Have an OpenBLAS that is loaded inside use AVX-512 where an Intel processor has it.

    An OpenBLAS older than the processor takes its kernels for a Pentium 4: 0.3.21 on an Emerald
    Rapids multiplies 5 to 8 times slower.
    """
    name, cpu = "OPENBLAS_CORETYPE", Path("/proc/cpuinfo")
    words = set(cpu.read_text().split()) if cpu.is_file() else set()
    set_here = name not in os.environ and {"GenuineIntel", "avx512vl", "avx512dq"} <= words
    if set_here:
        os.environ[name] = "SkylakeX"
    yield
    if set_here:
        del os.environ[name]


def nvidia_gpu() -> str:
    """Name, driver and memory of the first NVIDIA GPU, as nvidia-smi tells; empty without one."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total"]
    command.append("--format=csv,noheader")
    try:
        found = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    cards = [line.split(", ") for line in found.stdout.splitlines() if not found.returncode]
    return "{}, driver {}, {}".format(*cards[0]) if cards and len(cards[0]) == 3 else ""


def _no_backend(error: ImportError) -> str:
    if "libmlx.so: cannot open" in str(error):
        return (
            "MLX has no backend here. Install one: pip install 'hjepa-mlx[cpu]', or for an NVIDIA "
            f"GPU 'hjepa-mlx[cuda]' (driver {DRIVER} or newer)."
        )
    return (
        f"MLX does not start ({error}). Its CUDA backend needs an NVIDIA GPU and driver {DRIVER} "
        f"or newer; nvidia-smi finds {nvidia_gpu() or 'none'}. To use the CPU: "
        f"{INSTALL.format('cpu')}"
    )


_openblas = _put_openblas_first()

try:
    import mlx.core as mx
except ImportError as error:
    if sys.platform != "linux":
        raise
    # no exception that a command could catch: the package itself is being imported
    sys.exit(f"hjepa-mlx: {_no_backend(error)}")


def blas_name() -> str:
    """The BLAS behind MLX's CPU matmul, in words."""
    if sys.platform == "darwin":
        return "Accelerate"
    if _openblas is None:
        return "Netlib reference (slow)"
    _openblas.openblas_get_config.restype = ctypes.c_char_p
    return _openblas.openblas_get_config().decode().strip()


def cpu_count() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def device() -> str:
    """What MLX computes on: metal (an Apple GPU), cuda (an NVIDIA GPU) or cpu."""
    if mx.default_device() != mx.gpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def on_gpu() -> bool:
    """Whether MLX computes on a GPU."""
    return device() != "cpu"


def unused_gpu() -> str:
    """What to do about an NVIDIA GPU that MLX does not use; empty if there is none."""
    gpu = "" if on_gpu() else nvidia_gpu()
    return gpu and (
        f"MLX has only its CPU backend, so this NVIDIA GPU is not used: {gpu}. With driver "
        f"{DRIVER} or newer: {INSTALL.format('cuda13')}"
    )


def memory_gb() -> float:
    """Memory of the machine, or of the NVIDIA GPU that computes, GB (10^9 bytes)."""
    if device() == "cuda":
        return int(mx.device_info()["total_memory"]) / GB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB


def step_memory_gb() -> float:
    """Memory that a training step may take, GB.

    On a Mac, macOS's limit for the GPU; on an NVIDIA GPU 90 % of what no other process holds; on a
    CPU 70 % of it all.
    """
    if device() == "metal":
        return int(mx.device_info()["max_recommended_working_set_size"]) / GB
    if device() == "cuda":
        free = int(mx.device_info()["free_memory"])
        return 0.9 * (free + mx.get_active_memory() + mx.get_cache_memory()) / GB
    return 0.7 * memory_gb()


def chip() -> str:
    """The name of what computes, e.g. 'Apple M1 Max'; with CUDA, the GPU's."""
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return str(mx.device_info().get("device_name", platform.processor()))


@contextmanager
def computing_threads() -> Iterator[int]:
    """The number of threads that should compute at once on this machine, each on its own task.

    One keeps a GPU busy. On a CPU MLX does most things on one core, so several threads, each with
    a BLAS of one core, are faster than one thread whose matmuls use all cores.
    """
    if on_gpu():
        yield 1
        return
    import scipy.linalg  # noqa: F401  (only a BLAS that is loaded can be limited; this is scipy's)

    with threadpool_limits(1, "blas"):
        yield min(cpu_count(), 8)


def set_memory_limits() -> None:
    """Keep freed buffers for the next step, and on a GPU stay inside what a step may take.

    The CPU allocator keeps only 32 MiB by default, which costs a page fault per page and step.
    """
    if on_gpu():
        allowed = int(step_memory_gb() * GB)
        mx.set_memory_limit(allowed)
        mx.set_cache_limit(allowed // 4)
    else:
        mx.set_cache_limit(int(min(4 * GB, memory_gb() * GB / 4)))


def can_compile() -> bool:
    """Whether `mx.compile` fuses kernels here: on a Linux CPU only with g++."""
    return on_gpu() or sys.platform == "darwin" or shutil.which("g++") is not None


def precision(config: Config) -> str:
    """The dtype that a step computes in: float32 until `auto` is settled by a measurement."""
    return "float32" if config.precision == "auto" else config.precision


def compiles(config: Config) -> bool:
    """Whether `config.compile` asks for compiled functions; `auto` on a GPU is not yet settled."""
    return can_compile() and not on_gpu() if config.compile == "auto" else config.compile
