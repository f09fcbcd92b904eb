"""Instructions in the Alpaca format, with the loss on the responses only."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..errors import HoloError
from ..modeling.losses import IGNORED
from .documents import TABLE_FORMATS, find_files, name_of_source, read_hub, read_table
from .windows import Splits, TokenDataset, token_ids

RESPONSE_MARK = "### Response:\n"


def read_records(
    train_file: str | Sequence[str] | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
) -> list[dict[str, str]]:
    """Read instruction data in the Alpaca format: rows with `instruction`, `output` and, where there is one, `input`.

    Raises:
        HoloError: nothing is there, or a column is missing.
    """
    source = name_of_source(train_file, dataset_name)
    if dataset_name:
        tables = [read_hub(dataset_name, dataset_config_name)]
    else:
        tables = [read_table(file) for file in find_files(train_file) if file.suffix in TABLE_FORMATS]
    records = [row for table in tables for row in table]
    if not records:
        raise HoloError(f"{source} contains no instruction data; give a parquet, JSON or JSON-lines file")
    needed = ("instruction", "output")
    missing = [name for name in needed if name not in records[0]]
    if missing:
        raise HoloError(f"{source} has no column {', '.join(missing)}; the Alpaca format is needed")
    for number, record in enumerate(records):
        if not all(isinstance(record[name], str) for name in needed):
            raise HoloError(f"{source}: record {number} has no text as its {' or its '.join(needed)}: {record}"[:300])
    return records


def alpaca_prompt(record: dict[str, str]) -> str:
    """The text in front of the response. `input` may be missing or empty."""
    parts = ["### Instruction:\n" + record["instruction"]]
    if record.get("input"):
        parts.append("### Input:\n" + record["input"])
    return "\n\n".join([*parts, RESPONSE_MARK])


class Responses(TokenDataset):
    """Prompt and response of each record, with labels on the response and its end token only.

    Responses are cut at `block_size` tokens; records whose prompt leaves no room for a response are left out.
    """

    def __init__(self, records: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, block_size: int) -> None:
        if tokenizer.eos_token_id is None:
            raise HoloError("tokenizer: it has no end-of-sequence token, which ends a response")
        self.rows: list[tuple[list[int], list[int]]] = []
        self.records: list[dict[str, str]] = []
        self.characters = 0  # in all scored responses together
        for record in records:
            prompt, response = token_ids(tokenizer, [alpaca_prompt(record), record["output"]])
            response = [*response, tokenizer.eos_token_id][: max(block_size - len(prompt), 0)]
            if response:
                self.rows.append((prompt, response))
                self.records.append(record)
                self.characters += len(tokenizer.decode(response, skip_special_tokens=True))
        if not self.rows:
            raise HoloError(f"block_size: no prompt among {len(records)} records is shorter than {block_size} tokens")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        prompt, response = self.rows[index]
        return {
            "input_ids": torch.tensor(prompt + response),
            "labels": torch.tensor([IGNORED] * len(prompt) + response),
        }


def instruction_splits(
    records: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, block_size: int, fraction: float
) -> Splits:
    """Hold out a `fraction` of the records, drawn with a fixed seed: such data is often sorted by task.

    Raises:
        HoloError: one of the two parts would be empty.
    """
    held_out = round(len(records) * fraction)
    if not 0 < held_out < len(records):
        raise HoloError(f"validation_fraction: {fraction} of {len(records)} records leaves one part empty")
    order = np.random.default_rng(0).permutation(len(records))
    train = Responses([records[i] for i in order[held_out:]], tokenizer, block_size)
    validation = Responses([records[i] for i in order[:held_out]], tokenizer, block_size)
    train_tokens, tokens = (sum(len(response) for _, response in part.rows) for part in (train, validation))
    return Splits(
        train, validation, train_tokens, tokens, validation.characters, prompt=alpaca_prompt(validation.records[0])
    )
