"""What came of a comparison, for a person: :mod:`benchmarks.papers` says what its results are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table


def agreeing(some: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> str:
    """How many tokens are equal from the start of each sequence on, of how many both have."""
    equal = total = 0
    for one, other in zip(some, others, strict=True):
        pairs = list(zip(one, other, strict=False))
        equal += next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
        total += len(pairs)
    return f"{equal} of {total}"


def table_of(model: str, results: Mapping[str, Any], batches: Sequence[int]) -> Table:
    """A line for each side. Imbalance: rows of a layer's busiest expert over the
    mean, of the prompts."""
    table = Table("side", title=f"{model}: TPOT in ms", title_justify="left")
    for column in (
        "prefill tok/s",
        *(f"at {batch}" for batch in batches),
        "imbalance",
        "tokens equal",
    ):
        table.add_column(column, justify="right")
    for side, found in results.items():
        if "failed" in found:
            table.add_row(side, escape(found["failed"]))
            continue
        tpots = [f"{found['tpot_ms'][str(batch)]:.2f}" for batch in batches]
        imbalance = f"{found['imbalance']:.2f}" if "imbalance" in found else ""
        agree = found.get("batch_tokens_agree", found.get("tokens_agree", ""))
        table.add_row(side, f"{found['prefill_tokens_per_s']:,.0f}", *tpots, imbalance, agree)
    return table


def panels(rows: int) -> tuple[Any, Any]:
    """A figure, and its axes: two a row."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, 2, figsize=(10, 3.2 * rows), squeeze=False, layout="constrained")


def plot(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Prefill and TPOT of each side beside the floor: a row for each model."""
    figure, axes = panels(len(results))
    for (model, sides), (prefill, tpot) in zip(results.items(), axes, strict=True):
        found = {side: one for side, one in sides.items() if "failed" not in one}
        names = list(found)
        rates = [one["prefill_tokens_per_s"] for one in found.values()]
        colors = ["lightgray" if name == "floor" else f"C{n}" for n, name in enumerate(names)]
        prefill.barh(names, rates, color=colors)
        prefill.invert_yaxis()
        prefill.set_xlabel(f"{model}: prefill, tokens/s")
        for name, one, color in zip(names, found.values(), colors, strict=True):
            times = one["tpot_ms"]
            tpot.plot(list(times), list(times.values()), marker="o", color=color, label=name)
        tpot.set_yscale("log")
        tpot.set_ylabel("TPOT, ms")
        tpot.set_xlabel("sequences")
        tpot.grid(which="both", alpha=0.3)
        tpot.legend(fontsize=8)
    figure.savefig(path, dpi=100)
