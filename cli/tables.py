"""Tables for a terminal: the plan, and anything else that is counted per expert."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from rich.table import Table

from mesh.plan import ExpertId

NOBODY = "[bold red]-[/]"


def plain_table(*columns: str) -> Table:
    """Without lines, and no narrower than what is in it."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def short_names(worker_ids: Iterable[str]) -> dict[str, str]:
    """The last part of each id, where that tells them apart; else the id."""
    tails = {worker_id: worker_id.rpartition("-")[2] for worker_id in worker_ids}
    return tails if len(set(tails.values())) == len(tails) else {name: name for name in tails}


def expert_tables(
    experts: Iterable[ExpertId], cell: Callable[[ExpertId], str], width: int
) -> Iterator[Table]:
    """Layers down, experts across, as many tables as ``width`` characters need."""
    known = set(experts)
    layers = sorted({expert.layer for expert in known})
    indices = sorted({expert.index for expert in known})
    cells = {expert: cell(expert) for expert in known}
    widest = max((len(text) for text in cells.values()), default=1)
    columns = max(1, (width - 7) // (max(widest, 2) + 2))
    for start in range(0, len(indices), columns):
        table = plain_table("layer")
        for index in indices[start : start + columns]:
            table.add_column(str(index), justify="right", no_wrap=True)
        for layer in layers:
            row = (ExpertId(layer, index) for index in indices[start : start + columns])
            table.add_row(str(layer), *(cells.get(expert, NOBODY) for expert in row))
        yield table
