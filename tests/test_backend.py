import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.data as dx
import pytest

from hjepa_mlx import backend

with_openblas = pytest.mark.skipif(backend._openblas is None, reason="OpenBLAS is not installed")


@with_openblas
def test_prefetch_threads_leave_openblas_its_cores():
    threads = backend._openblas.openblas_get_num_threads
    seen = []
    buffer = dx.buffer_from_vector([{"i": i} for i in range(50)])
    looking = buffer.sample_transform(lambda sample: seen.append(threads()) or sample)
    list(looking.ordered_prefetch(4, 2))
    assert set(seen) == {threads()}


@with_openblas
def test_openblas_does_not_take_this_processor_for_a_pentium():
    if not {"avx2", "fma"} <= set(Path("/proc/cpuinfo").read_text().split()):
        pytest.skip("an old processor, or not of this kind")
    backend._openblas.openblas_get_corename.restype = ctypes.c_char_p
    assert backend._openblas.openblas_get_corename() not in (b"Prescott", b"Katmai")


LIMITED = """
import json
from hjepa_mlx.backend import computing_threads
with computing_threads():
    import scipy.linalg
    from threadpoolctl import threadpool_info
    print(json.dumps([[lib["filepath"], lib["num_threads"]] for lib in threadpool_info()]))
"""


@pytest.mark.skipif(backend.on_metal(), reason="a GPU needs no limit")
def test_a_blas_that_is_first_needed_while_threads_compute_has_one_thread_as_well():
    environment = {k: v for k, v in os.environ.items() if k != "OPENBLAS_NUM_THREADS"}
    command = [sys.executable, "-c", LIMITED]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    threads = dict(json.loads(done.stdout))
    assert any("scipy" in library for library in threads)
    assert set(threads.values()) == {1}
