"""Check the hours that were promised for 100 epochs of each data set, on this machine.

python benchmarks/estimates.py

Measures step and pipeline together for every recipe (on made-up images if the data set is not on
this machine), and keeps results/estimates.json. `hjepa-mlx bench` does so for one recipe only; for
the others it takes the slower of step and pipeline.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

import hjepa_mlx as hj
from hjepa_mlx.bench import machine
from hjepa_mlx.bench.estimates import RECIPES, estimate
from hjepa_mlx.bench.run import Bench
from hjepa_mlx.files import write_json
from hjepa_mlx.tables import hour_span, hours, table

RESULTS = Path(__file__).parent / "results" / "estimates.json"


def main() -> None:
    """Print the table and keep the figures."""
    configs = {name: hj.load_config(name) for name in RECIPES}
    rows = [estimate(name, config, Bench(config).rate(config)) for name, config in configs.items()]
    about = machine.describe()
    write_json(RESULTS, {"machine": about, "estimates": rows})
    shown = (
        [row["recipe"], epoch, whole, hour_span(row["promised_hours"]), row["verdict"]]
        for row in rows
        for epoch, whole in [(hours(row["hours_per_epoch"]), hours(row["hours_100_epochs"]))]
    )
    columns = ["recipe", "an epoch", "100 epochs", "promised", "verdict"]
    Console().print(table(f"100 epochs on {about['chip']}", columns, shown))


if __name__ == "__main__":
    main()
