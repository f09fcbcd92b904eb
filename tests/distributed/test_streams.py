"""Streaming data sets in several processes: one of them reads each example, once, also where a run is resumed."""

import json
import os

import pytest
import torch
from datasets import load_dataset
from safetensors.torch import load_file
from several_processes import in_processes
from small_models import new_model

from hf_holo.data.windows import Collator
from hf_holo.training.arguments import HoloTrainingArguments
from hf_holo.training.trainer import HoloTrainer

EXAMPLES, LENGTH, ROWS = 40, 8, 2


class NotingCollator(Collator):
    """Writes down the numbers of the examples that come."""

    def __init__(self, notes):
        super().__init__(pad_token_id=0)
        self.notes = notes

    def __call__(self, examples):
        with self.notes.open("a") as file:
            file.writelines(f"{int(example['number'])}\n" for example in examples)
        return super().__call__(examples)


def write_examples(folder, files=4):
    """Numbered examples, in several files, as large data sets are."""
    generator = torch.Generator().manual_seed(0)
    for part in range(files):
        with (folder / f"part-{part}.jsonl").open("w") as file:
            for number in range(part, EXAMPLES, files):
                ids = torch.randint(1, 60, (LENGTH,), generator=generator).tolist()
                file.write(json.dumps({"number": number, "input_ids": ids, "labels": ids}) + "\n")


def train(folder, out, steps, dispatch, resume=None):
    torch.manual_seed(0)
    files = sorted(map(str, folder.glob("part-*.jsonl")))
    stream = load_dataset("json", data_files=files, split="train", streaming=True, cache_dir=str(folder / "cache"))
    stream = stream.shuffle(seed=3, buffer_size=8).with_format("torch")
    args = HoloTrainingArguments(
        output_dir=str(folder / out),
        use_cpu=True,
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=ROWS,
        lr_scheduler_type="constant",
        disable_tqdm=True,
        remove_unused_columns=False,
        accelerator_config={"dispatch_batches": dispatch},
    )
    notes = folder / f"{out}-{steps}-of-{os.environ['RANK']}.notes"
    collator = NotingCollator(notes)
    trainer = HoloTrainer(new_model("hsn"), args, train_dataset=stream, data_collator=collator)
    trainer.train(resume_from_checkpoint=resume)
    if trainer.is_world_process_zero():
        trainer.model.save_pretrained(folder / out)
    return 0


def in_two(folder, *args):
    codes, said = in_processes(2, folder, train, folder, *args)
    assert codes == [0, 0], "\n".join(said)


def read(folder, run):
    """The numbers that the processes of a run have read, each in their order."""
    return [[int(line) for line in path.read_text().split()] for path in sorted(folder.glob(f"{run}-of-*.notes"))]


@pytest.mark.slow
@pytest.mark.parametrize("dispatch", [None, False], ids=["the first reads for all", "each reads for itself"])
@pytest.mark.parametrize("steps", [6, 13], ids=["within an epoch", "over its end"])
def test_a_resumed_run_reads_on_where_it_was_cut_off(steps, dispatch, tmp_path):
    write_examples(tmp_path)
    in_two(tmp_path, "whole", steps, dispatch)
    in_two(tmp_path, "cut", 4, dispatch)
    in_two(tmp_path, "cut", steps, dispatch, True)
    whole, cut = (load_file(tmp_path / out / "model.safetensors") for out in ("whole", "cut"))
    torch.testing.assert_close(cut, whole, rtol=0, atol=0)
    notes = read(tmp_path, f"whole-{steps}")
    assert len(notes) == (1 if dispatch is None else 2)
    trained = [numbers[: 2 * steps * ROWS // len(notes)] for numbers in notes]  # without what was read ahead
    numbers = [number for some in trained for number in some]
    most = -(-len(numbers) // EXAMPLES)  # epochs
    assert max(map(numbers.count, numbers)) == most, "an example was read twice in an epoch"
    again = read(tmp_path, f"cut-{steps}")
    assert [some[: len(all)] for some, all in zip(again, trained, strict=True)] == trained
