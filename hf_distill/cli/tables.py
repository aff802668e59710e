"""Numbers in two columns: a table on a terminal, lines elsewhere."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def print_values(values: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints names and their values, numbers to four digits.

    Args:
        values: by name.
        console: None: standard output.
    """
    console = console or Console()
    shown = {name: f"{value:.4g}" if isinstance(value, float) else f"{value}" for name, value in values.items()}
    if not console.is_terminal:
        for name, value in shown.items():
            print(f"{name}: {value}", file=console.file)
        return
    table = Table("metric", "value", box=box.SIMPLE_HEAD)
    table.columns[1].justify = "right"
    for name, value in shown.items():
        table.add_row(name, value)
    console.print(table)
