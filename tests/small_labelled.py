"""Tables of labelled pictures and sounds, and of both with texts, that are small enough for tests."""

import io
from pathlib import Path

import datasets
import numpy as np
import soundfile
from PIL import Image


def labelled_folders(folder: Path) -> dict[str, Path]:
    """Folders of tables: pictures that are brighter on the left or on the right, sounds that are high or low."""
    random = np.random.default_rng(0)
    pictures, sounds, labels = [], [], [0, 1] * 20
    for label in labels:
        pixels = random.integers(0, 90, (8, 8, 3))
        pixels[:, 4 * label : 4 * label + 4] += 150
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
        pictures.append({"bytes": file.getvalue(), "path": None})
        time, file = np.arange(random.integers(1200, 2000)) / 8000, io.BytesIO()
        tone = np.sin(2 * np.pi * (400 + 900 * label) * time) + 0.1 * random.standard_normal(len(time))
        soundfile.write(file, 0.5 * tone, 8000, format="WAV")
        sounds.append({"bytes": file.getvalue(), "path": None})
    for name, files, feature in (("image", pictures, datasets.Image), ("audio", sounds, datasets.Audio)):
        (folder / name).mkdir()
        rows = {name: files, "label": labels, "speaker": ["ann", "bob"] * 20}
        table = datasets.Dataset.from_dict(rows).cast_column(name, feature(decode=False))
        table = table.cast_column("label", datasets.ClassLabel(names=["first", "second"]))
        table.select(range(28)).to_parquet(folder / name / "train.parquet")
        table.select(range(28, 40)).to_parquet(folder / name / "test.parquet")
    return {name: folder / name for name in ("image", "audio")}


def scenes_table(path: Path) -> Path:
    """A table of pictures, sounds and texts, of which each tells the class; every fifth text is missing."""
    random, rows = np.random.default_rng(0), []
    for number in range(40):
        label = number % 2
        file, sound = io.BytesIO(), io.BytesIO()
        Image.new("RGB", (8, 8), (60 + 120 * label,) * 3).save(file, "PNG")
        tone = np.sin(2 * np.pi * (400 + 900 * label) * np.arange(random.integers(1000, 1600)) / 8000)
        soundfile.write(sound, 0.5 * tone, 8000, format="WAV")
        text = None if number % 5 == 4 else ("dark", "light")[label]
        media = {name: {"bytes": one.getvalue(), "path": None} for name, one in (("image", file), ("audio", sound))}
        rows.append({**media, "text": text, "label": ("night", "day")[label]})
    table = datasets.Dataset.from_list(rows)
    table = table.cast_column("image", datasets.Image(decode=False)).cast_column("audio", datasets.Audio(decode=False))
    table.to_parquet(path)
    return path
