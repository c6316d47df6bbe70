"""Models on Hugging Face, both ways (extra `hub`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hjepa_mlx.errors import HJEPAError, UsageError, required

WANTED = ["config.json", "config.yaml", "*/state.json", "*model*.safetensors"]


def download(name: str) -> Path:
    """The folder with weights and config of hf:USER/NAME; what is here already is not fetched."""
    client, repository = required("huggingface_hub", "hub"), name.removeprefix("hf:")
    with asking(repository, f"Getting {name}"):
        return Path(client.snapshot_download(repository, allow_patterns=WANTED))


def upload(repository: str, files: Mapping[str, bytes | Path], private: bool) -> str:
    """Put `files` into a repository, made if need be, in one commit; returns its address.

    Checkpoints that are not among them are deleted: the repository holds one.
    """
    client = required("huggingface_hub", "hub")
    api = client.HfApi()
    with asking(repository, f"Pushing to {repository}"):
        api.create_repo(repository, private=private, exist_ok=True)
        old = {name for name in api.list_repo_files(repository) if name.startswith("checkpoints/")}
        operations = [client.CommitOperationDelete(name) for name in sorted(old - files.keys())]
        operations += [client.CommitOperationAdd(name, what) for name, what in files.items()]
        api.create_commit(repository, operations, commit_message="hjepa-mlx push")
    return f"{api.endpoint}/{repository}"


@contextmanager
def asking(repository: str, what: str, advice: str = "") -> Iterator[None]:
    """Whatever a repository answers wrong, as one line, with `advice` at its end."""
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise UsageError(f"'{repository}' is no repository: write it as USER/NAME.")
    try:
        yield
    except HJEPAError:
        raise
    except Exception as error:  # the hub's client has errors of its own, others in each version
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise HJEPAError(f"{what} failed: {lines[0].rstrip('.')}.{advice}") from error
