"""What a run learns: `train.py` asks a task for data, a model's values, the parts of a Trainer, and the results."""

from pathlib import Path
from typing import Any, ClassVar

from transformers import PretrainedConfig, PreTrainedModel, TrainerCallback

from .arguments import Run
from .trainer import HoloTrainer, Scores


class Task:
    """One task of one run.

    Args:
        run: its arguments.
        config: of the preset or the checkpoint that it names.

    Attributes:
        auto_class: of the models that can learn it.
        unit: what the examples are called.
        loss_unit: of the loss.
        processor: what prepares inputs, and is saved with the model; after [`load`].
        train, validation: examples; after [`load`].
    """

    auto_class: ClassVar[Any]
    unit: ClassVar[str] = "examples"
    loss_unit: ClassVar[str] = "nats"
    processor: Any
    train: Any
    validation: Any

    def __init__(self, run: Run, config: PretrainedConfig) -> None:
        self.run, self.config = run, config

    def load(self, checkpoint: Path | None) -> None:
        """Read the data and what prepares it, that of the checkpoint if there is one.

        Raises:
            HoloError: something is missing or damaged.
        """
        raise NotImplementedError

    def model_values(self) -> dict[str, Any]:
        """Config values of a new model that follow from the data."""
        return {}

    def config_values(self) -> dict[str, Any]:
        """Config values of a new model: those of [`model_values`], and those that the run names."""
        return {**self.model_values(), **self.run.model_overrides}

    def loading_options(self) -> dict[str, Any]:
        """Options for `from_pretrained` of a model that is trained further."""
        return {}

    def check_model(self, model: PreTrainedModel) -> None:
        """Raise HoloError for a model that does not fit the data."""

    def scores(self) -> Scores:
        """What is measured on the held-out examples."""
        raise NotImplementedError

    def collator(self) -> Any:
        """What makes batches."""
        raise NotImplementedError

    def callbacks(self) -> list[TrainerCallback]:
        """What watches the training."""
        return []

    def description(self) -> list[str]:
        """Lines that say what is learned from and scored."""
        raise NotImplementedError

    def model_knows(self) -> str:
        """What ends the line that describes the model."""
        raise NotImplementedError

    def score_more(self, trainer: HoloTrainer) -> None:
        """Score what [`write_results`] reports besides the metrics: here, every process takes part."""

    def write_results(self, trainer: HoloTrainer, metrics: dict[str, float]) -> None:
        """Leave the results in the folder of the run and say them.

        Args:
            metrics: of the final weights.
        """
        raise NotImplementedError

    def name_of_data(self) -> str:
        """The files or the dataset, as the user named them."""
        return self.run.data.dataset_name or ", ".join(self.run.data.train_file)
