"""A run of suites in one folder: what is measured is saved at once, and not measured again."""

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ...errors import HoloError, first_line
from ...files import write_csv, write_text
from ..machine import machine, versions

Row = dict[str, Any]
Tables = dict[str, list[Row]]
MEASURED = "parts"  # folder of what is finished


@dataclass(frozen=True)
class Part:
    """One measurement of a suite.

    Attributes:
        table: that its rows belong to.
        name: of the measurement, in words.
        settings: all that its rows depend on, models included; other settings are another measurement.
        measure: makes the rows, in about the seconds that it is given (None: as long as it takes).
    """

    table: str
    name: str
    settings: Mapping[str, Any]
    measure: Callable[[float | None], list[Row]]

    def file(self, suite: str) -> str:
        """Where it is saved: its name, and what tells it from the same with other settings."""
        identity = json.dumps([suite, self.table, self.name, self.settings], sort_keys=True, default=str)
        words = re.sub(r"[^\w.]+", "-", f"{suite} {self.table} {self.name}").strip("-")[:80]
        return f"{words}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}.json"


@dataclass
class Outcome:
    """What came of a suite: its tables, the seconds that they took in all, and what is not in them, with the reason."""

    tables: Tables = field(default_factory=dict)
    seconds: float = 0.0
    left_out: dict[str, str] = field(default_factory=dict)


class Run:
    """Measures parts into a folder.

    Args:
        folder: of the results.
        budget: seconds for all suites together; None: no limit.
    """

    def __init__(self, folder: Path, budget: float | None = None) -> None:
        self.folder = folder
        self._end = None if budget is None else time.monotonic() + budget

    def measure(self, suite: str, parts: Sequence[Part], share: float = 1.0) -> Outcome:
        """All parts of a suite, from the folder where they are there.

        Args:
            suite: its name.
            parts: its measurements. One that fails is named in the outcome, and does not stop the others.
            share: of the time that is left, for this suite.
        """
        outcome, records = Outcome(), [self._saved(suite, part) for part in parts]
        missing = records.count(None)
        end = None if self._end is None else time.monotonic() + share * max(0.0, self._end - time.monotonic())
        with tqdm(parts, desc=suite, unit="part", leave=False) as progress:
            for part, record in zip(progress, records, strict=True):
                progress.set_postfix_str(part.name)
                if record is None:
                    seconds = None if end is None else (end - time.monotonic()) / missing
                    missing -= 1
                    record = self._measure(suite, part, seconds, outcome)
                if record is not None:
                    outcome.tables.setdefault(part.table, []).extend(record["rows"])
                    outcome.seconds += record["seconds"]
        return outcome

    def _saved(self, suite: str, part: Part) -> dict[str, Any] | None:
        path = self.folder / MEASURED / part.file(suite)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def _measure(self, suite: str, part: Part, seconds: float | None, outcome: Outcome) -> dict[str, Any] | None:
        if seconds is not None and seconds <= 0:
            outcome.left_out[part.name] = "the budget was used up"
            return None
        start = time.monotonic()
        try:
            rows = part.measure(seconds)
        except HoloError:
            raise
        except Exception as error:
            outcome.left_out[part.name] = f"{type(error).__name__}: {first_line(error)}"
            return None
        record = {"part": part.name, "settings": part.settings, "seconds": time.monotonic() - start, "rows": rows}
        path = self.folder / MEASURED / part.file(suite)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(record, indent=2, default=str) + "\n")
        return record

    def write(self, suite: str, outcome: Outcome) -> None:
        """`SUITE.json` with everything, and `SUITE_TABLE.csv` for every table."""
        record = {"suite": suite, "seconds": round(outcome.seconds, 1), "left_out": outcome.left_out}
        record |= {"machine": machine(), "versions": versions(), "tables": outcome.tables}
        write_text(self.folder / f"{suite}.json", json.dumps(record, indent=2) + "\n")
        for table, rows in outcome.tables.items():
            if not rows:  # no part applied
                continue
            columns = dict.fromkeys(name for row in rows for name in row)
            write_csv([{name: row.get(name) for name in columns} for row in rows], self.folder / f"{suite}_{table}.csv")


def affordable(seconds_each: float, seconds: float | None, wanted: int) -> int:
    """How many of the wanted repetitions fit into the seconds; at least one."""
    return wanted if seconds is None else max(1, min(wanted, int(seconds / max(seconds_each, 1e-9))))
