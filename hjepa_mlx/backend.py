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


_openblas = _put_openblas_first()

import mlx.core as mx  # noqa: E402  (after OpenBLAS)


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


def memory_gb() -> float:
    """Physical memory, GB (10^9 bytes)."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB


def step_memory_gb() -> float:
    """Memory that a training step may take, GB: macOS's limit for the GPU, else 70 % of it all."""
    if on_metal():
        return int(mx.device_info()["max_recommended_working_set_size"]) / GB
    return 0.7 * memory_gb()


def on_metal() -> bool:
    """Whether MLX computes on an Apple GPU."""
    return mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu)


def chip() -> str:
    """The processor's name, e.g. 'Apple M1 Max'."""
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
    if on_metal():
        yield 1
        return
    import scipy.linalg  # noqa: F401  (only a BLAS that is loaded can be limited; this is scipy's)

    with threadpool_limits(1, "blas"):
        yield min(cpu_count(), 8)


def set_memory_limits() -> None:
    """Keep freed buffers for the next step, and on a Mac stay inside what the GPU may use.

    The CPU allocator keeps only 32 MiB by default, which costs a page fault per page and step.
    """
    if on_metal():
        allowed = int(step_memory_gb() * GB)
        mx.set_memory_limit(allowed)
        mx.set_cache_limit(allowed // 4)
    else:
        mx.set_cache_limit(int(min(4 * GB, memory_gb() * GB / 4)))


def can_compile() -> bool:
    """Whether `mx.compile` fuses kernels here: always on a Mac, on Linux only with g++."""
    return sys.platform == "darwin" or shutil.which("g++") is not None


def precision(config: Config) -> str:
    """The dtype that a step computes in: float32 until `auto` is settled by a measurement."""
    return "float32" if config.precision == "auto" else config.precision


def compiles(config: Config) -> bool:
    """Whether `config.compile` asks for compiled functions on this machine."""
    return can_compile() if config.compile == "auto" else config.compile
