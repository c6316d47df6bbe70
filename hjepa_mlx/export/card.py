"""The model card of an export or a pushed run: README.md of its folder, from card.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hjepa_mlx.data.catalog import CATALOG
from hjepa_mlx.models.hjepa import HJEPA


def card(
    model: HJEPA, to: str, encoder: str, scores: Mapping[str, Any], licence: str = "unknown"
) -> str:
    """The card as Markdown, with the metadata that Hugging Face reads.

    to: a format, or "run" for all networks. scores: eval.json's, shown if of this checkpoint.
    """
    text, *uses = (Path(__file__).parent / "card.md").read_text().split("=== ")
    library = to if to in ("timm", "transformers", "onnx", "coreml") else "mlx"
    use = dict(part.split("\n", 1) for part in uses)[library].rstrip()
    config, origin = model.config, model.origin
    grid, learned = config.position_grid, config.model.positions == "learned"
    levels = enumerate(zip(model.level_blocks, config.model.level_pool, strict=True))
    parts = config.data.name.split("+")
    data = [f"{row.title}. {row.terms}" for part in parts if (row := CATALOG.get(part))]
    return text.format(
        config=config,
        own=config.model,
        licence=licence,
        library=library,
        what=f"The {encoder} encoder" if encoder else "All networks",
        positions=f"{'learned' if learned else 'sin-cos'} table of {grid}×{grid} patches",
        levels="; ".join(
            f"{number}: block {block}, {'mean over' if pool == 'image' else 'pooled by'} {pool}"
            for number, (block, pool) in levels
        ),
        trained=f"{origin.step:,} steps, {origin.epoch:g} epochs" if origin else "not told",
        data="; ".join(data) or "the trainer's own pictures",
        scores=_scores(scores, origin.step if origin else None),
        use=use,
    )


def _scores(scores: Mapping[str, Any], step: int | None) -> str:
    probe, knn = scores.get("linear_probe"), scores.get("knn")
    if not probe or not knn or scores["trained"]["step"] != step:
        return "These weights were not evaluated with labels."
    on = f"Accuracy in % on {scores['protocol']['data']}, frozen target encoder:"
    rows = [
        f"| {level.replace('_', ' ')} | {knn[level]:.1f} | {probe[level]:.1f} |" for level in knn
    ]
    return "\n".join([on, "", "| features | k-NN | linear probe |", "|---|---|---|", *rows])
