"""Device, BLAS, memory and precision policy: the one place that knows what machine this is.

Importing this module puts OpenBLAS in front of the reference BLAS that MLX's Linux wheel links
to (about 30 times faster). It must therefore be imported before `mlx.core`, which the package's
`__init__` sees to.
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
from typing import TYPE_CHECKING

from threadpoolctl import threadpool_limits

if TYPE_CHECKING:
    from hjepa_mlx.config import Config

GB = 1e9


def _put_openblas_first() -> ctypes.CDLL | None:
    """Load OpenBLAS into the global symbol scope, so that MLX's BLAS calls reach it.

    mlx-data's prefetch threads set OpenBLAS to one thread around every sample, for the whole
    process, if they find it: matmuls would be slower and their last bits depend on timing. It is
    looked for once, when the first stream is made, so one is made here before there is any to find.
    """
    if sys.platform != "linux":
        return None
    if "mlx.core" in sys.modules:
        warnings.warn(
            "import hjepa_mlx before mlx.core: MLX has bound to its reference BLAS, whose matmul "
            "is about 30 times slower than OpenBLAS.",
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

    One that is older than the processor does not know its model and takes kernels for a Pentium 4
    of 2004: 0.3.21 on an Emerald Rapids multiplies 5 to 8 times slower.
    """
    name, cpu = "OPENBLAS_CORETYPE", Path("/proc/cpuinfo")
    described = set(cpu.read_text().split()) if cpu.is_file() else set()
    if name in os.environ or not {"GenuineIntel", "avx512vl", "avx512dq"} <= described:
        yield
        return
    os.environ[name] = "SkylakeX"
    try:
        yield
    finally:
        del os.environ[name]


_openblas = _put_openblas_first()


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
    """Memory that a training step may take, GB: what macOS lets the GPU use, or most of it all."""
    if on_metal():
        import mlx.core as mx

        return float(mx.device_info()["max_recommended_working_set_size"]) / GB
    return 0.7 * memory_gb()


def on_metal() -> bool:
    """Whether MLX computes on an Apple GPU."""
    import mlx.core as mx

    return mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu)


def chip() -> str:
    """The processor's name, e.g. 'Apple M1 Max'."""
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    import mlx.core as mx

    return str(mx.device_info().get("device_name", platform.processor()))


@contextmanager
def computing_threads() -> Iterator[int]:
    """How many threads should compute at once on this machine, each on something of its own.

    A GPU is kept busy by one. On a CPU, where MLX does most things on one core, threads with a BLAS
    that uses one core in each get more done than one after the other with all cores for matmuls.
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
    import mlx.core as mx

    if on_metal():
        working_set = int(mx.device_info()["max_recommended_working_set_size"])
        mx.set_memory_limit(working_set)
        mx.set_cache_limit(working_set // 4)
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
