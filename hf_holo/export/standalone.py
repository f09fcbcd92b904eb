"""Write text with the exported model in this folder. Needs numpy, onnxruntime and tokenizers, nothing else.

python generate.py "To be, or" --max_new_tokens 100 --temperature 0.8 --seed 0
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession
from tokenizers import Tokenizer

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
STATE, NEXT = "past_key_values.", "present."  # how names of states begin, going in and coming out


class Model:
    """A language model in an ONNX file, and the state of the text that it has read.

    Args:
        file: the ONNX file.
        batch: number of texts that are read side by side.
    """

    def __init__(self, file: Path, batch: int = 1) -> None:
        self.session = InferenceSession(file, providers=["CPUExecutionProvider"])
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.read = 0
        self.state = {
            entry.name: np.zeros(
                [batch, *(size if isinstance(size, int) else 0 for size in entry.shape[1:])], DTYPES[entry.type]
            )
            for entry in self.session.get_inputs()
            if entry.name.startswith(STATE)
        }

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """Read more of the text, `[B, T]` ids; gives the scores of what follows each, `[B, T, vocabulary]`."""
        self.read += ids.shape[1]
        known = {"input_ids": ids, "attention_mask": np.ones((len(ids), self.read), np.int64), **self.state}
        known["position_ids"] = np.arange(self.read, dtype=np.int64)[None, -ids.shape[1] :].repeat(len(ids), 0)
        inputs = {entry.name: known[entry.name] for entry in self.session.get_inputs()}
        outputs = dict(zip(self.outputs, self.session.run(self.outputs, inputs), strict=True))
        self.state = {name: outputs[name.replace(STATE, NEXT, 1)] for name in self.state}
        return outputs["logits"]


def generate(model: Model, ids: list[int], tokens: int, temperature: float, seed: int, end: set[int]) -> Iterator[int]:
    """Up to `tokens` ids that follow `ids`, until one in `end`; the most likely ones if the temperature is 0."""
    random = np.random.default_rng(seed)
    for _ in range(tokens):
        scores = model(np.array([ids], np.int64))[0, -1].astype(np.float64)
        if temperature > 0:  # the largest of scores with Gumbel noise is a sample of their softmax
            scores = scores / temperature + random.gumbel(size=scores.shape)
        ids = [int(scores.argmax())]
        if ids[0] in end:
            return
        yield ids[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token each time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="of the exported model")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
    config = json.loads((args.folder / "config.json").read_text(encoding="utf-8"))
    end = config.get("eos_token_id")
    end = set(end) if isinstance(end, list) else {end}
    prompt = tokenizer.encode(args.prompt).ids
    new = generate(Model(args.folder / "model.onnx"), prompt, args.max_new_tokens, args.temperature, args.seed, end)
    print(tokenizer.decode(prompt + list(new)))


if __name__ == "__main__":
    main()
