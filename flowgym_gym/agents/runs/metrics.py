"""CSV files of a run: one row for each interval of training, or for each evaluation."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from flowgym_gym.agents.runs.files import UNREADABLE, sync, whole_file
from flowgym_gym.errors import CheckpointError

Row = dict[str, float | int | None]
METRICS = "metrics.csv"


class Metrics:
    """A CSV file such as ``metrics.csv``: one row per interval of training, or per evaluation.

    Args:
        path: The file.
        columns: Its columns; the first is ``timesteps``.
        needed: Those that every row has a number in.
    """

    def __init__(
        self, path: Path, columns: Iterable[str], needed: Sequence[str] = ("timesteps",)
    ) -> None:
        self.path = path
        self.columns, self._needed = list(columns), needed

    def start(self, timesteps: int = 0) -> list[Row]:
        """Begin the file, or go on after the row of ``timesteps``: later rows belong to work that
        was lost.

        Returns:
            The rows that are there.
        """
        kept = (
            [
                row
                for row in read_metrics(self.path, self._needed)
                if (row["timesteps"] or 0) <= timesteps
            ]
            if timesteps
            else []
        )
        with whole_file(self.path) as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)
        return kept

    def append(self, row: Row) -> None:
        """Add a row."""
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self.columns, extrasaction="ignore").writerow(row)

    def sync(self) -> None:
        """Wait until the rows are on the disk."""
        sync(self.path)


def read_metrics(path: Path, columns: Sequence[str] = ("timesteps",)) -> list[Row]:
    """Rows of a ``metrics.csv``; empty cells are None. A last line that was cut off is left out.

    Args:
        path: The file.
        columns: Those that must be there, with a number in every row.

    Raises:
        CheckpointError: If another line is damaged, or such a column is missing.
    """
    if not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            text = file.read()
        lines = io.StringIO(text[: text.rfind("\n") + 1], newline="")
        rows = list(csv.DictReader(lines, strict=True))
        if any(None in row or None in row.values() for row in rows):
            raise ValueError("a line has not as many cells as there are columns")
        found = [{k: _number(v) for k, v in row.items()} for row in rows]
        for row in found:
            if missing := [name for name in columns if row.get(name) is None]:
                raise ValueError(f"a row has no {missing[0]}")
            if type(row["timesteps"]) is not int or row["timesteps"] < 0:
                raise ValueError(f"timesteps is {row['timesteps']}, expected a count")
        return found
    except UNREADABLE as error:
        raise CheckpointError(
            f"{path} is damaged: {type(error).__name__}: {error}; repair it, or move it away to go "
            "on without its rows"
        ) from error


def _number(text: str) -> float | int | None:
    if not text:
        return None
    return int(text) if text.lstrip("-").isdigit() else float(text)
