"""Check the hours that were promised for 100 epochs of each data set, on this machine.

python benchmarks/estimates.py

Measures every recipe's compiled step and pipeline together (made-up images where a data set is not
here), and keeps results/estimates.json. `hjepa-mlx bench` measures one so, and of the others the
slower of the two.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

import hjepa_mlx as hj
from hjepa_mlx.bench import machine
from hjepa_mlx.bench.estimates import RECIPES, estimate
from hjepa_mlx.bench.run import Bench
from hjepa_mlx.files import write_json
from hjepa_mlx.timing import settle

RESULTS = Path(__file__).parent / "results" / "estimates.json"


def main() -> None:
    """Print the table and keep the figures."""
    rows = []
    for name in RECIPES:
        config = hj.load_config(name)
        settle(config)
        rows.append(estimate(name, config, Bench(config).rate))
    table = Table(title=f"100 epochs on {machine.describe()['chip']}")
    for column in ("recipe", "minutes an epoch", "hours", "promised hours", "verdict"):
        table.add_column(column)
    for row in rows:
        promised = "–".join(f"{hours:g}" for hours in row.promised_hours or ())
        minutes, hours = f"{60 * row.hours_per_epoch:.1f}", f"{row.hours_100_epochs:.1f}"
        table.add_row(row.recipe, minutes, hours, promised, row.verdict)
    Console().print(table)
    facts = {"machine": machine.describe(), "estimates": [asdict(row) for row in rows]}
    write_json(RESULTS, facts)


if __name__ == "__main__":
    main()
