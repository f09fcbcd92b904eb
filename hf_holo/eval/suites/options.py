"""What a user can say to the suites; each suite reads what concerns it."""

from dataclasses import dataclass
from typing import Any

from ...data.documents import read_documents
from ...data.senses import Question

LENGTHS = (128, 512, 2048, 8192)
QUICK = {"eval_windows": 16, "block_size": 256, "lengths": (128, 512), "repeats": 3, "limit": 50}


@dataclass(frozen=True)
class Options:
    """Attributes:
    eval_file: files or folders to score: texts, or labelled pictures, sounds or both; None: the dataset.
    dataset_name: built-in or Hub dataset of texts that is scored where no file is named.
    text_column, image_column, audio_column, label_column: of tables; None: the only one of its kind.
    image_data, audio_data, question: digits of three senses in place of `eval_file`, see [`load_digits`].
    block_size: tokens in a window.
    eval_windows: windows scored, at equal distances; 0: all.
    batch_size: windows at a time.
    lengths: in tokens, for the suites long and speed.
    repeats: of every timing.
    peers: models of equal size to be timed in turns with those given.
    zero_shot_data: folder with the questions of the suite zero-shot.
    limit: questions of a task, or labelled examples; 0: all.
    seed: of weights, inputs and choices.
    timed: whether a part may be cut short, because there is a budget: then it is another measurement.
    """

    eval_file: str | tuple[str, ...] | None = None
    dataset_name: str = "python-help"
    text_column: str = "text"
    image_column: str | None = None
    audio_column: str | None = None
    label_column: str | None = None
    image_data: str | None = None
    audio_data: str | None = None
    question: Question = "digit"
    block_size: int = 512
    eval_windows: int = 0
    batch_size: int = 4
    lengths: tuple[int, ...] = LENGTHS
    repeats: int = 5
    peers: tuple[str, ...] = ("llama", "gpt2", "mamba")
    zero_shot_data: str | None = None
    limit: int = 0
    seed: int = 0
    timed: bool = False

    def documents(self) -> list[str]:
        """The texts to score.

        Raises:
            HoloError: they are not there, or cannot be read.
        """
        if self.eval_file:
            files = [self.eval_file] if isinstance(self.eval_file, str) else list(self.eval_file)
            return read_documents(files, text_column=self.text_column)
        return read_documents(None, self.dataset_name, text_column=self.text_column)

    def chosen(self, *names: str) -> dict[str, Any]:
        """Those options that a part depends on."""
        return {name: getattr(self, name) for name in (*names, "seed", "timed")}
