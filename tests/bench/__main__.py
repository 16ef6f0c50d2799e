"""Run benches by name and print their figures; exits 1 when a figure misses its goal."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from tests.bench.harness import Result


def names() -> list[str]:
    return sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def table_of(results: list[Result]) -> Table:
    table = Table("bench", "case", "value", "peer", "ratio", "goal", "")
    for r in results:
        peer = f"{r.peer} {r.peer_value:.4g}" if r.peer_value is not None else r.peer
        mark = {True: "[green]ok", False: "[red]missed", None: ""}[r.ok]
        table.add_row(
            r.bench,
            r.case,
            f"{r.value:.4g} {r.unit}",
            peer,
            f"{r.ratio:.2f}" if r.ratio else "",
            r.goal,
            mark,
        )
    return table


def main(args: list[str]) -> int:
    wanted = [arg for arg in args if not arg.startswith("-")] or names()
    unknown = sorted(set(wanted) - set(names()))
    if unknown or set(args) - set(wanted) - {"--table"}:
        print(f"bench: unknown: {' '.join(unknown) or args}; there are: {' '.join(names())}", file=sys.stderr)
        return 2
    results = []
    for name in wanted:
        for result in importlib.import_module(f"tests.bench.bench_{name}").cases():
            results.append(result)
            if "--table" not in args:
                print(msgspec.json.encode(result).decode(), flush=True)
    if "--table" in args:
        Console(width=150).print(table_of(results))
    return int(any(result.ok is False for result in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
