"""Images in parquet files, as Hugging Face keeps them."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hjepa_mlx.backend import cpu_count
from hjepa_mlx.data.storage import KnownFile, StorageError
from hjepa_mlx.errors import HJEPAError

KEPT_GROUPS = max(8, 2 * cpu_count())  # decoded row groups, about 10 MB each; readers have one each


class Parquet:
    """Parquet files with a column `image` of structs (bytes, path), as Hugging Face writes them.

    A read decodes a whole row group; the last ones are kept.
    """

    encoded = True

    def __init__(self, paths: Sequence[Path]) -> None:
        pq = _pyarrow()
        self.files = [KnownFile(path) for path in paths]
        groups = []
        for number, path in enumerate(paths):
            try:
                metadata = pq.read_metadata(path)
                schema = metadata.schema.to_arrow_schema()
                schema.field("image").type.field("bytes")
                schema.field("label")
            except (OSError, ValueError, LookupError) as error:
                raise StorageError(
                    f"{path} is not a whole parquet file with columns image and label "
                    f"({str(error).splitlines()[0]}). Delete it and download again."
                ) from error
            groups += [
                (number, group, metadata.row_group(group).num_rows)
                for group in range(metadata.num_row_groups)
            ]
        self.groups = [(file, group) for file, group, _ in groups]
        self.starts = np.concatenate([[0], np.cumsum([rows for *_, rows in groups])]).astype(int)
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, index: int) -> bytes:
        group = int(np.searchsorted(self.starts, index, "right")) - 1
        raw = self._column(group)[index - int(self.starts[group])]["bytes"].as_py()
        if raw is None:
            raise OSError("the row has no image bytes")
        return raw

    def _column(self, group: int) -> Any:
        """The images of a row group, decoded once for readers that come one after the other."""
        with self._lock:
            column = self._kept.pop(group, None)
        if column is None:
            column = self._read_group(*self.groups[group])
        with self._lock:
            self._kept[group] = column
            while len(self._kept) > KEPT_GROUPS:
                self._kept.popitem(last=False)
        return column

    def name(self, index: int) -> str:
        group = int(np.searchsorted(self.starts, index, "right")) - 1
        first = self.groups.index((self.groups[group][0], 0))
        return f"{self.files[self.groups[group][0]].path}[{index - int(self.starts[first])}]"

    def labels(self) -> np.ndarray:
        """The column `label`, [N] int64."""
        pq = _pyarrow()
        columns = []
        for file in self.files:
            try:
                columns.append(pq.read_table(file.path, columns=["label"])["label"])
            except (OSError, ValueError) as error:
                raise StorageError(
                    f"{file.path} cannot be read: {str(error).splitlines()[0]}"
                ) from error
        return np.concatenate([column.to_numpy() for column in columns]).astype(np.int64)

    def label_names(self) -> tuple[str, ...] | None:
        """Names of the labels, where the file says them as Hugging Face does."""
        stored = _pyarrow().read_schema(self.files[0].path).metadata or {}
        features = json.loads(stored.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        names = features.get("label", {}).get("names")
        return tuple(map(str, names)) if names else None

    def _read_group(self, number: int, group: int) -> Any:
        known = self.files[number]
        known.check()
        try:
            reader = _pyarrow().ParquetFile(known.path, memory_map=False)
            return reader.read_row_group(group, columns=["image.bytes"], use_threads=False)["image"]
        except (OSError, ValueError) as error:
            raise StorageError(f"{known.path} cannot be read: {error}") from error


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise HJEPAError(
            "Parquet files need pyarrow: pip install 'hjepa-mlx[hub]', or convert them on a "
            "machine that has it with `hjepa-mlx datasets prepare`."
        ) from None
    return pyarrow.parquet
