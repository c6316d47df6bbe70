"""`hjepa-mlx doctor`: machine, libraries and speed, and how to put right what is wrong."""

from __future__ import annotations

from hjepa_mlx.cli.common import JsonFile, check_writable, output_json, readable


@readable
def doctor(json_file: JsonFile = None) -> None:
    """Show machine, libraries and speed, and what to put right.

    Example: `hjepa-mlx doctor`
    """
    from rich.console import Console
    from rich.table import Table

    from hjepa_mlx.doctor import examine

    check_writable(json_file)
    facts = examine()
    output_json(facts, json_file)
    if json_file == "-":
        return
    table = Table(show_header=False, box=None)
    for key, value in facts.items():
        if key != "advice":
            table.add_row(key.replace("_", " "), str(value))
    Console().print(table)
    for line in facts["advice"] or ["Nothing to put right."]:
        print(line)
