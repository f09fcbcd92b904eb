"""Tiny teachers with their students, and recipes that distil them in seconds."""

import yaml
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from hf_holo.conversion.surgery.apply import apply_surgery
from hf_holo.conversion.surgery.plan import HoloSurgeryConfig
from hf_holo.conversion.surgery.transfer import transfer_to_hsn
from hf_holo.data.tokenizers import make_tokenizer

TEXT = "the wave binds a key to a value, and the key recalls it from the noise; again and again. " * 40
QUICK = {
    "block_size": 16,
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "save_steps": 2,
    "logging_steps": 1,
    "sample_tokens": 0,
    "use_cpu": True,
    "disable_tqdm": True,
}
SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
TOKENIZER = make_tokenizer("characters", [TEXT])


def make_teacher(kind: str):
    if kind == "surgery":
        return LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), **SHAPE)).eval()
    return Phi3ForCausalLM(Phi3Config(vocab_size=len(TOKENIZER), original_max_position_embeddings=64, **SHAPE)).eval()


def make_student(kind: str, teacher):
    if kind == "hsn":
        return transfer_to_hsn(teacher)
    student = LlamaForCausalLM(teacher.config)
    student.load_state_dict(teacher.state_dict())
    apply_surgery(student, HoloSurgeryConfig(harmonics=6, folded=True))
    return student


def write_models(kind, folder):
    """A folder with a teacher, its student and a text."""
    teacher = make_teacher(kind)
    teacher.save_pretrained(folder / "teacher")
    TOKENIZER.save_pretrained(folder / "teacher")
    make_student(kind, teacher).save_pretrained(folder / "student")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


def arguments(folder, stages, *flags, out="out", **changes) -> list[str]:
    """The command line for a recipe with these stages."""
    models = {"teacher": str(folder / "teacher"), "student": str(folder / "student")}
    recipe = {**models, "train_file": str(folder / "text.txt"), **QUICK, **changes, "stages": stages}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in recipe.items() if value is not None}))
    return [str(path), "--output_dir", str(folder / out), *flags]
