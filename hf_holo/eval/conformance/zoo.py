"""The zoo: every causal language model class of the installed transformers under the kit, as a tiny random model.

`hf-holo check --transformers [NAME ...]` builds each class, runs the quick checks in a process of its own with a time
limit, and tells in one table what came of it. A failed check is a reason to look, not a verdict on a model: what the
kit says is confirmed in plain transformers before it is published.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...errors import HoloError, first_line, unknown
from ...files import write_text
from ...registry import architectures
from ..markdown import filled, markdown_table
from .checks import run_check, select
from .quiet import quiet
from .subject import Subject

NOTHING_SEEN = "nothing seen"  # what the scripts say then
LIMIT = 120.0  # seconds for a class
LARGEST = 10_000_000  # parameters of a model that counts as tiny
# Fields of configs by their usual names, and what a tiny model has there. Only those that a config has are given.
TINY: Mapping[str, Any] = {
    "vocab_size": 97,
    "vocab_size_per_layer_input": 97,
    "unpadded_vocab_size": 97,
    "n_words": 97,
    "pronunciation_vocab_size": 97,
    "shape_vocab_size": 97,
    "hidden_size": 32,
    "hidden_size_per_layer_input": 8,
    "d_model": 32,
    "n_embd": 32,
    "embedding_size": 32,
    "embedding_dim": 32,
    "emb_dim": 32,
    "word_embed_proj_dim": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "ffn_hidden_size": 48,
    "block_auto_adjust_ff_dim": False,
    "bidirectional": False,
    "use_mamba_kernels": False,
    "ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "d_ff": 48,
    "d_inner": 48,
    "lru_width": 32,
    "attention_hidden_size": 32,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 8,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    "d_kv": 8,
    "kv_channels": 8,
    "global_head_dim": 8,
    "swa_head_dim": 8,
    "v_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "index_topk": 16,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 8,
    "mamba_head_dim": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_d_ssm": 64,
    "mamba_chunk_size": 16,
    "ssm_state_size": 8,
    "state_size": 8,
    "n_groups": 1,
    "time_step_rank": 4,
    "mamba_dt_rank": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "chunk_size": 16,
    "block_size": 16,
    "max_position_embeddings": 1024,
    "n_positions": 1024,
    "num_local_experts": 4,
    "num_experts": 4,
    "moe_num_experts": 4,
    "n_routed_experts": 4,
    "zero_expert_num": 2,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "sliding_window": 16,
    "attention_window_size": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
DEPTHS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "encoder_layers",
    "num_decoder_layers",
)
DEEPEST = 9  # layers, among which every kind of a hybrid should occur
KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")  # fields that name the kind of each layer
EVEN_IF_NONE = ("num_key_value_heads", "num_experts_per_tok", "pad_token_id", "bos_token_id", "eos_token_id", "time_step_rank")
OWN: Mapping[str, Mapping[str, Any]] = {  # what some cannot do without; with two layers, unless it says
    "bamba": {"attn_layer_indices": [1]},
    "dory": {"num_hidden_layers": 4, "n_input_layers": 1, "n_output_layers": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [32, 32]},
    "xmod": {"default_language": "en_XX"},
}
ALWAYS = {"is_decoder": True, "is_encoder_decoder": False}  # encoders with a causal head look back only as decoders
COLUMNS: Mapping[str, tuple[str, ...]] = {  # of the table, and the checks or groups that it sums up
    "sees no later token": ("causality",),
    "cache": (
        "any chunking",
        "greedy decoding",
        "sampling from the cache",
        "continuation from a returned cache",
        "generation from embeddings",
    ),
    "beams": ("beam search from the cache",),
    "taking back": ("assisted decoding", "prompt lookup", "taking tokens back"),
    "padding": (
        "left padding",
        "right padding",
        "padding anywhere",
        "rows with different padding",
        "continuation after padding",
        "second turns of different length",
        "left padded batch",
    ),
    "precision": ("half precision", "autocast"),
    "saving": ("persistence",),
}


@dataclass(frozen=True)
class Animal:
    """What came of a class.

    Attributes:
        model_type, model_class: its names.
        parameters: of the tiny model; 0 if it was not built.
        results: records of the checks, see [`Result`](checks.Result).
        trouble: why it could not be built or was not finished; empty if all went well.
        confirmed: of columns with failures, what the script in plain transformers saw; empty if it saw nothing.
    """

    model_type: str
    model_class: str
    parameters: int = 0
    results: list[dict[str, Any]] = field(default_factory=list)
    trouble: str = ""
    confirmed: dict[str, str] = field(default_factory=dict)

    def failed(self, column: str) -> list[str]:
        """Names of the failed checks of a column."""
        return [r["check"] for r in self._of(column) if r["status"] == "failed"]

    def cell(self, column: str) -> str:
        """✓ if all that apply have passed, ✗ and the failed checks if a script has shown it (? and they if none was
        asked, ? if it saw nothing), – if none applies."""
        failed = ", ".join(self.failed(column))
        if failed and column not in self.confirmed:
            return f"? {failed}"
        if failed:
            return f"✗ {failed}" if self.confirmed[column] else "?"
        return "✓" if any(r["status"] == "passed" for r in self._of(column)) else "–"

    def _of(self, column: str) -> list[dict[str, Any]]:
        wanted = COLUMNS[column]
        return [r for r in self.results if r["check"] in wanted or r["group"] in wanted]


def classes() -> dict[str, str]:
    """The model types of transformers with a causal language model, and the name of its class; each class once."""
    own, public = architectures(), set(dir(transformers))  # which imports nothing
    named = ((kind, names) for kind, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if kind not in own)
    single = {kind: names if isinstance(names, str) else names[0] for kind, names in named}
    first = {single[kind]: kind for kind in sorted(single, key=len, reverse=True)}  # of several types the shortest
    return {kind: name for kind, name in single.items() if name in public and first[name] == kind}


def chosen(names: Sequence[str]) -> dict[str, str]:
    """Those of the classes that are named by model type or class; all without names.

    Raises:
        HoloError: there is none of a name.
    """
    known = classes()
    for name in names:
        if name not in known and name not in known.values():
            raise unknown("model of transformers", name, [*known, *known.values()])
    return {kind: name for kind, name in known.items() if not names or kind in names or name in names}


def visit(names: Sequence[str], folder: Path, limit: float = LIMIT) -> Iterator[Animal]:
    """Check classes one after another, each in a process of its own; what is in the folder is not done again.

    Args:
        names: model types or classes; all if empty.
        folder: of the records, one file for each class; those of another transformers belong elsewhere.
        limit: seconds for a class.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(chosen(names).items(), desc="classes", unit="class", leave=False) as progress:
        for kind, name in progress:
            progress.set_postfix_str(name)
            record = folder / f"{kind}.jsonl"
            lines = _lines(record)
            if not lines or "finished" not in lines[-1]:
                lines = _in_own_process(kind, record, limit)
            yield _animal(kind, name, lines)


def _in_own_process(kind: str, record: Path, limit: float) -> list[dict[str, Any]]:
    """Let a process write its results line by line, so that those before its end are known whatever ends it."""
    record.unlink(missing_ok=True)
    command = [sys.executable, "-m", __name__, kind, str(record)]
    trouble = ""
    try:
        process = subprocess.run(command, timeout=limit, capture_output=True, text=True, check=False)
        if process.returncode:
            last = process.stderr.strip().rpartition("\n")[2]
            trouble = f"its process ended with status {process.returncode}: {last}"
    except subprocess.TimeoutExpired:
        trouble = f"not finished in {limit:.0f} s"
    with record.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"finished": not trouble, "trouble": trouble}) + "\n")
    return _lines(record)


def _lines(record: Path) -> list[dict[str, Any]]:
    if not record.is_file():
        return []
    return [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def _animal(kind: str, name: str, lines: list[dict[str, Any]]) -> Animal:
    results = [line for line in lines if "check" in line]
    parameters = next((line["parameters"] for line in lines if "parameters" in line), 0)
    trouble = next((line["trouble"] for line in lines if line.get("trouble")), "")
    return Animal(kind, name, parameters, results, trouble)


# In the process of one class ------------------------------------------------------------------------------------------
def tiny_config(model_class: type[PreTrainedModel]) -> PretrainedConfig:
    """A config of this class whose sizes are tiny, its parts included."""
    return model_class.config_class(**tiny_arguments(model_class.config_class))


def tiny_arguments(config_class: type[PretrainedConfig], usual: PretrainedConfig | None = None) -> dict[str, Any]:
    """What makes a config tiny, as it can be written to JSON; `usual`: what it is by default."""
    usual = usual or config_class()
    fields = vars(usual)
    known = {name for name, value in fields.items() if value is not None or name in EVEN_IF_NONE}
    arguments = {name: _no_more(name, value, fields[name]) for name, value in TINY.items() if name in known}
    if "kv_lora_rank" in known:
        arguments["num_key_value_heads"] = TINY["num_attention_heads"]  # its keys are made for every head
    for name, part in fields.items():
        if isinstance(part, PretrainedConfig):
            arguments[name] = {"model_type": part.model_type} | tiny_arguments(type(part), part)
    own = OWN.get(usual.model_type, {})

    def of_layers(count: int) -> dict[str, Any]:
        return {**arguments, **ALWAYS, **{name: count for name in DEPTHS if name in known}, **own}

    if own:
        return of_layers(2)
    return of_layers(_until_all_are_seen(_kinds_of_layers(config_class(**of_layers(DEEPEST)))))


def _no_more(name: str, tiny: Any, usual: Any) -> Any:
    """A size that is smaller than the tiny one by default means something: no part of that kind, one choice only."""
    is_size = isinstance(usual, int) and not isinstance(tiny, bool) and not name.endswith("_id")
    return min(tiny, usual) if is_size else tiny


def _kinds_of_layers(config: PretrainedConfig) -> list[Any]:
    """What the config says of each layer, where it says it."""
    return next((kinds for name in KINDS if isinstance(kinds := getattr(config, name, None), list)), [])


def _until_all_are_seen(kinds: list[Any]) -> int:
    """The depth at which every kind of layer has occurred; 2 at least."""
    return max([2, *(kinds.index(kind) + 1 for kind in set(kinds))])


def tiny_model(kind: str) -> PreTrainedModel:
    """A model of this type with random weights.

    Raises:
        HoloError: it cannot be built, is not that small, or does not run.
    """
    model_class = getattr(transformers, classes()[kind])
    try:
        config = tiny_config(model_class)
        with torch.device("meta"):
            size = sum(p.numel() for p in model_class(config).parameters())
        if size > LARGEST:
            raise HoloError(f"{size:,} parameters with tiny sizes: its config names more of them than we know")
        torch.manual_seed(0)
        model = model_class(config).eval()
        with torch.no_grad():
            model(torch.arange(3, 83).reshape(2, 40))
    except HoloError:
        raise
    except Exception as error:
        raise HoloError(f"{type(error).__name__}: {first_line(error)}") from error
    return model


def check_class(kind: str, record: Path) -> None:
    """Build a model and write what each check says of it, a line each."""
    with record.open("w", encoding="utf-8", buffering=1) as file:

        def write(**values: Any) -> None:
            file.write(json.dumps(values) + "\n")

        try:
            with quiet():
                model = tiny_model(kind)
                model.config.modalities = ["text"]  # pictures and sounds have layouts of their own
                subject = Subject(model)
        except HoloError as error:
            write(trouble=f"not built: {error}")
            return
        write(parameters=sum(p.numel() for p in model.parameters()))
        try:
            subject.run(subject.ids(1, 9))
        except RuntimeError as error:
            write(trouble=f"not checked: in float64 it raises {type(error).__name__}: {first_line(error)}")
            return
        for check in select(None, quick=True):
            result = run_check(check, subject)
            write(check=result.check, group=result.group, status=result.status, detail=result.detail)


# What is told ---------------------------------------------------------------------------------------------------------
def table(animals: Sequence[Animal]) -> str:
    """One row for each class."""
    rows = [(f"`{a.model_class}`", *map(a.cell, COLUMNS), a.trouble) for a in animals]
    return markdown_table(("class", *COLUMNS, "remark"), rows)


def summary(animals: Sequence[Animal]) -> str:
    """How many were checked, and how many have a confirmed failure in each column."""
    built = [a for a in animals if a.results]
    counts = ", ".join(f"{column} {sum(a.cell(column).startswith('✗') for a in built)}" for column in COLUMNS)
    return (
        f"{len(built)} of {len(animals)} classes of transformers {transformers.__version__} checked; "
        f"confirmed failures: {counts}."
    )


def confirm(animals: Sequence[Animal], scripts: Path) -> list[Animal]:
    """Ask the scripts in plain transformers about every failure: a column's is called like the column.

    What they say goes to `confirmed-MAJOR.json` beside them, and the sizes of the models to `configs-MAJOR.json`.

    Args:
        animals: as [`visit`] gives them.
        scripts: the folder of the scripts, docs/zoo of the repository.
    """
    failing = {column: [a.model_class for a in animals if a.failed(column)] for column in COLUMNS}
    named = dict.fromkeys(name for names in failing.values() for name in names)
    sizes = {name: tiny_arguments(getattr(transformers, name).config_class) for name in named}
    major = transformers.__version__.partition(".")[0]
    write_text(scripts / f"configs-{major}.json", json.dumps(sizes, indent=1) + "\n")
    said: dict[str, dict[str, str]] = {name: {} for name in named}
    for column, names in failing.items():
        for name, sentence in _ask(scripts / f"{column.replace(' ', '_')}.py", names):
            said[name][column] = sentence
    write_text(scripts / f"confirmed-{major}.json", json.dumps(said, indent=1) + "\n")
    return [replace(a, confirmed=said.get(a.model_class, {})) for a in animals]


def _ask(script: Path, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What a script says of each class; nothing where it sees nothing."""
    if not names:
        return
    command = [sys.executable, str(script), *names]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = dict(line.split(": ", 1) for line in process.stdout.splitlines())
    if set(lines) != set(names):
        raise HoloError(f"{script} ended before it was done: {process.stderr.strip().rpartition(chr(10))[2]}")
    yield from ((name, "" if said == NOTHING_SEEN else said) for name, said in lines.items())


def write_page(animals: Sequence[Animal], page: Path) -> list[Animal]:
    """Put the table of this major version of transformers between its marks on a page, after asking the scripts in the
    folder that is called like the page.

    Raises:
        HoloError: the page has no such marks, or a script did not run.
    """
    major = transformers.__version__.partition(".")[0]
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    filled(text, f"transformers-{major}", "")  # before the scripts run
    animals = confirm(animals, page.with_suffix(""))
    write_text(page, filled(text, f"transformers-{major}", f"{summary(animals)}\n\n{table(animals)}"))
    return animals


if __name__ == "__main__":
    check_class(sys.argv[1], Path(sys.argv[2]))
