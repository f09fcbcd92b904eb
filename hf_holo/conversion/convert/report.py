"""What every conversion leaves next to the model: report.json, sample.txt and README.md."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Score:
    """How well one model predicts the held-out part of a text."""

    text: str
    windows: int
    perplexity: float


@dataclass(frozen=True)
class Outcome:
    """Everything that a conversion found out.

    Attributes:
        name: of the result.
        teacher: folder or Hub name.
        auto_class: that loads both.
        recipe: the options.
        figures: what became of the layers, for report.json.
        summary: the same as a sentence.
        lesson: the recipe of `hf-holo distill` for the student, or None if none can teach it.
        advice: a sentence on what that brings.
        numbers: values in the whole checkpoint, "teacher" and "student".
        before, after: perplexities of teacher and student on each text.
        samples: a text of each, or nothing.
        seconds: by part.
        peak_memory_gib: of the process.
    """

    name: str
    teacher: str
    auto_class: str
    recipe: dict[str, Any]
    figures: dict[str, Any]
    summary: str
    lesson: str | None
    advice: str
    numbers: dict[str, int]
    before: list[Score]
    after: list[Score]
    samples: dict[str, str]
    seconds: dict[str, float]
    peak_memory_gib: float

    @property
    def texts(self) -> list[dict[str, Any]]:
        return [
            {
                "text": old.text,
                "windows": old.windows,
                "teacher_perplexity": old.perplexity,
                "student_perplexity": new.perplexity,
                "ratio": new.perplexity / old.perplexity,
            }
            for old, new in zip(self.before, self.after, strict=True)
        ]

    def next_step(self, teacher: str, student: str) -> str:
        """The advice and its command; nothing where no recipe fits."""
        if self.lesson is None:
            return ""
        command = f"hf-holo distill {self.lesson} --teacher {teacher} --student {student} --train_file TEXT"
        return f"{self.advice}\n\n```bash\n{command}\n```\n"


def print_scores(outcome: Outcome) -> None:
    """Print what became of the layers, and the perplexities."""
    console = Console()
    console.print(outcome.summary, highlight=False)
    if outcome.texts:
        table = Table("held-out text", "windows", "teacher", "student", "ratio", title="perplexity")
        for row in outcome.texts:
            table.add_row(
                row["text"],
                str(row["windows"]),
                f"{row['teacher_perplexity']:.2f}",
                f"{row['student_perplexity']:.2f}",
                f"{row['ratio']:.3f}",
            )
        console.print(table)


def write_report(folder: Path, outcome: Outcome) -> None:
    """Write all files of the report into the folder of the result."""
    values = asdict(outcome)
    for key in ("figures", "summary", "lesson", "advice", "before", "after", "samples"):
        del values[key]
    values |= {**outcome.figures, "texts": outcome.texts}
    (folder / "report.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if outcome.samples:
        parts = [f"--- {who}\n{text}\n" for who, text in outcome.samples.items()]
        (folder / "sample.txt").write_text("\n".join(parts), encoding="utf-8")
    (folder / "README.md").write_text(model_card(outcome), encoding="utf-8")


BRINGS_CODE = "Where hf_holo is not installed, the code in this folder does, with `trust_remote_code=True`."
NEEDS_HF_HOLO = "The code of the architecture is in this folder; hf_holo must be installed."
CARD = """---
library_name: transformers
base_model: {teacher}
model_name: {name}
tags: [hf-holo, holographic]
---
# {name}

Made of {teacher} by `hf-holo convert`: {summary}. The whole checkpoint went from {before:,} to {after:,} values.

{scores}
To load it:

```python
import hf_holo  # registers what is holographic in it
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{name}"{trust})
```

{without_hf_holo}

{next_step}
`layers.csv` shows each layer, `sample.txt` (if a text was given) what both models write, `report.json` the figures.
Limits and licence are those of {teacher}.

## Recipe

```yaml
{recipe}```
"""


def model_card(outcome: Outcome) -> str:
    """The README of the result, with the recipe in it."""
    scores = "No held-out text was measured.\n"
    if outcome.texts:
        lines = ["| held-out text | windows | teacher | student | ratio |", "|---|---|---|---|---|"]
        for row in outcome.texts:
            numbers = f"{row['teacher_perplexity']:.2f} | {row['student_perplexity']:.2f} | {row['ratio']:.3f}"
            lines.append(f"| {row['text']} | {row['windows']} | {numbers} |")
        scores = "Perplexity:\n\n" + "\n".join(lines) + "\n"
    brought = outcome.recipe.get("trust_remote_code", False)
    teacher = Path(outcome.teacher).name if Path(outcome.teacher).is_dir() else outcome.teacher
    return CARD.format(
        teacher=teacher,
        name=outcome.name,
        summary=outcome.summary,
        before=outcome.numbers["teacher"],
        after=outcome.numbers["student"],
        scores=scores,
        auto_class=outcome.auto_class,
        trust=", trust_remote_code=True" if brought else "",
        without_hf_holo=NEEDS_HF_HOLO if brought else BRINGS_CODE,
        next_step=outcome.next_step(teacher, outcome.name),
        recipe=yaml.safe_dump(outcome.recipe, sort_keys=False, allow_unicode=True),
    )
