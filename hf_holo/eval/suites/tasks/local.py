"""Questions from a local folder, for the tasks next to this file: JSON lines or parquet, one question a row."""

from pathlib import Path

from datasets import Dataset, load_dataset

LOADERS = {".jsonl": "json", ".parquet": "parquet"}


def questions(file: str, zero_shot_data: str | None = None, **_: object) -> dict[str, Dataset]:
    """The questions of a file as the split "test".

    Args:
        file: its name.
        zero_shot_data: the folder, from lm-eval's `--metadata '{"zero_shot_data": "FOLDER"}'`.

    Raises:
        FileNotFoundError: the folder is not given, or the file is not there.
    """
    path = Path(zero_shot_data or "", file)
    if zero_shot_data is None or not path.is_file():
        raise FileNotFoundError(f"zero_shot_data: {zero_shot_data!r} holds no {file}; name the folder of the questions")
    return {"test": load_dataset(LOADERS[path.suffix], data_files=str(path), split="train")}
