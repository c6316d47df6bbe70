import mlx.data as dx
import pytest

from hjepa_mlx import backend


@pytest.mark.skipif(backend._openblas is None, reason="OpenBLAS is not installed")
def test_prefetch_threads_leave_openblas_its_cores() -> None:
    assert backend._openblas is not None
    threads = backend._openblas.openblas_get_num_threads
    seen = []

    def look(sample: dict) -> dict:
        seen.append(threads())
        return sample

    buffer = dx.buffer_from_vector([{"i": i} for i in range(50)]).sample_transform(look)
    list(buffer.ordered_prefetch(4, 2))
    assert set(seen) == {threads()}
