"""The tables of an evaluation."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from hjepa_mlx.tables import level_name, number, span, table


def evaluation(scores: dict[str, Any]) -> list[Table]:
    """The tables of an evaluation's scores: accuracies, ranks and spread, promises."""
    found = [_accuracies(scores)] if scores.get("knn") else []
    rows: list[list[str]] = []
    for network, own in _networks(scores).items():
        rows.append([network])
        for level, figures in own["features"].items():
            ranks = [
                f"{number(figures.get(rank))} ({number(figures.get(f'{rank}_percent'), 0)}%)"
                for rank in ("effective_rank", "rankme")
            ]
            rows.append([f"  {level_name(level)}", *ranks, number(figures.get("feature_std"), 2)])
    title = f"{scores['protocol']['data']}: features of the test images"
    caption = "in brackets: % of the dimension"
    found.append(table(title, ["", "eff. rank", "RankMe", "std"], rows, caption))
    return found + ([_promises(scores)] if scores.get("promises") else [])


def _networks(scores: dict[str, Any]) -> dict[str, Any]:
    baselines = {"context_encoder": "context encoder", "random_init": "random init."}
    known = scores["baselines"]
    others = {name: known[key] for key, name in baselines.items() if key in known}
    return {"target encoder": scores, **others}


def _accuracies(scores: dict[str, Any]) -> Table:
    protocol = scores["protocol"]
    few = [key for key in scores if key.startswith("few_labels")]
    networks = _networks(scores).values()
    more = {"attentive_probe": "attentive", "fine_tuned": "fine-tuned"}
    more = {kind: name for kind, name in more.items() if any(kind in own for own in networks)}
    shares = [f"{key.split('_')[2]} % labels" for key in few]
    rows: list[list[str]] = []
    for network, own in _networks(scores).items():
        rows.append([network])
        for level, knn in own["knn"].items():
            low, high = own["confidence_95"]["linear_probe"][level]
            cells = [f"{own['linear_probe'][level]:.1f} ± {(high - low) / 2:.1f}", number(knn)]
            cells += [number(own.get(kind, {}).get(level)) for kind in more]
            for key in few:
                reached = own.get(key, {}).get(level, {})
                spread = f" ± {reached['std']:.1f}" if reached.get("std") else ""
                cells.append(number(reached.get("mean")) + spread)
            rows.append([f"  {level_name(level)}", *cells])
    pixels = scores["baselines"]["pixels"]
    rows.append(["raw pixels", number(pixels["linear_probe"]), number(pixels["knn"])])
    if "knn_whitened" in pixels:  # not so before it was measured
        rows.append(["whitened pixels", "", number(pixels["knn_whitened"])])
    images = protocol["bank_images"], protocol["query_images"]
    caption = "whitened: all levels together; " * ("knn_whitened" in pixels)
    caption += "±: half of the 95 % interval" + (
        "; with few labels, deviation over draws" if few else ""
    )
    if image := scores["trained"].get("image_level"):
        caption += f". {level_name(image).capitalize()} is the image: a mean over the picture"
    if 0 < protocol.get("attentive_bank_images", 0) < images[0]:
        seen = protocol["attentive_bank_images"], protocol["attentive_query_images"]
        caption += ". Attentive: {:,} training and {:,} test images".format(*seen)
    return table(
        f"{protocol['data']}: accuracy in %, {images[0]:,} training and {images[1]:,} test images",
        ["", "linear probe", f"k-NN {protocol['k']}", *more.values(), *shares],
        rows,
        caption,
    )


def _promises(scores: dict[str, Any]) -> Table:
    measures = {
        "linear_probe": "linear probe, %",
        "knn": "k-NN, %",
        "effective_rank_percent": "effective rank, % of dim",
    }
    rows = [
        [measures[row["measure"]], level_name(row["level"]), span(row["promised"]),
         number(row.get("published")), number(row["measured"]), row["verdict"]]
        for row in scores["promises"]
    ]  # fmt: skip
    trained = f"{scores['trained']['model']} after {scores['trained']['epochs']:g} epochs"
    title = f"Promised for 100 epochs of ViT-S; this is {trained}"
    of = scores["promises"][0].get("published_of")
    caption = "Promised: by the project's founding comparison, never measured. " + (
        f"Published: {of}." if of else "Nothing near is published."
    )
    columns = ["", "level", "promised", "published", "measured", "verdict"]
    return table(title, columns, rows, caption)
