"""The tokenizer class of all families: whatever `tokenizers` can express, loadable by transformers 4.57 and 5.x."""

from transformers import PreTrainedTokenizerFast


class HoloTokenizer(PreTrainedTokenizerFast):
    """A `tokenizers` tokenizer under a class name of its own.

    transformers 5.x saves a plain `PreTrainedTokenizerFast` under a class name that 4.57 does not know; a subclass that
    is registered with `AutoTokenizer` keeps its name and loads in both. `hf_holo.data.tokenizers` makes instances.
    """

    _auto_class = "AutoTokenizer"  # its code goes with a checkpoint
    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    slow_tokenizer_class = None
