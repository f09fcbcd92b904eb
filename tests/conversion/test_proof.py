"""Surgery proves itself: the converted model runs and loads, or it is as it was before."""

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Llama4TextConfig,
    PretrainedConfig,
    PreTrainedModel,
    RecurrentGemmaConfig,
    RwkvConfig,
)

from hf_holo import HoloError, HoloLinear, HoloSurgeryConfig, apply_surgery
from hf_holo.conversion.surgery.proof import all_or_nothing, untouched
from hf_holo.modeling.quantizer import holo_layers

SIZES = {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "head_dim": 8}
RECURRENT = {"num_hidden_layers": 3, "lru_width": 32, "head_dim": 8, "attention_window_size": 16}
IDS = torch.randint(5, 80, (2, 12), generator=torch.Generator().manual_seed(1))


def make(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS).logits


def everything(model: nn.Module) -> dict:
    """All that could change: identities of modules, attributes, parameters; configs; values."""
    seen = {f"{name}: class": type(module) for name, module in model.named_modules()}
    for name, module in model.named_modules():
        plain = (bool, int, float, str, type(None))
        seen |= {f"{name}.{key}": value for key, value in vars(module).items() if isinstance(value, plain)}
        seen[f"{name}: itself"] = id(module)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        seen[f"{name}: tensor"] = (id(tensor), tensor.requires_grad, tensor.tolist())
    return seen | {"config": repr(model.config.to_dict())}


def refused(model: PreTrainedModel, message: str, **options) -> None:
    before = everything(model)
    with pytest.raises(HoloError, match=message):
        apply_surgery(model, HoloSurgeryConfig(**{"harmonics": 4, **options}))
    assert everything(model) == before


@pytest.mark.parametrize(
    ("config", "converted"),
    [
        (Llama4TextConfig(**HEADS, **EXPERTS), {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}),
        (FalconConfig(**HEADS), {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
        (RecurrentGemmaConfig(**{**HEADS, **RECURRENT}), {"linear_x", "linear_y", "linear_out", "q_proj"}),
    ],
    ids=["a router that is a linear layer by class", "a linear layer with a forward of its own", "init of children"],
)
def test_what_is_reported_runs_and_loads(config, converted, tmp_path):
    model = make(config)
    if transformers.__version__ >= "5" and isinstance(config, RecurrentGemmaConfig):
        pytest.skip("transformers 5 cannot run the dense model on the processor")
    report = apply_surgery(model, HoloSurgeryConfig(harmonics=4))
    names = {row["module"].rpartition(".")[2] for row in report.converted}
    assert converted <= names and not names & {"router", "gate"}
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(model))


@pytest.mark.parametrize("run", [False, True], ids=["fresh", "after a forward pass"])
def test_a_model_that_writes_to_its_weights_is_refused(run):
    """RWKV divides some in its first forward pass in evaluation mode."""
    model = make(RwkvConfig(**SIZES, attention_hidden_size=32, context_length=64))
    before = logits(model) if run else None
    refused(model, "model: converted, this RwkvForCausalLM does not run .*cannot be changed in place.*exclude=")
    assert before is None or torch.equal(logits(model), before)
    excluded = HoloSurgeryConfig(harmonics=4, exclude=[r"attention\.output", r"feed_forward\.value"])
    assert len(apply_surgery(model, excluded).converted) == 2 * 5
    assert logits(model).isfinite().all()


def test_a_model_converted_while_it_is_loaded_is_tried_too(tmp_path):
    make(RwkvConfig(**SIZES, attention_hidden_size=32, context_length=64)).save_pretrained(tmp_path)
    with pytest.raises(HoloError, match="model: converted, this RwkvForCausalLM does not run"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=HoloSurgeryConfig(harmonics=4))
    config = HoloSurgeryConfig(harmonics=4, exclude=[r"attention\.output", r"feed_forward\.value"])
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)).isfinite().all()


class ToyConfig(PretrainedConfig):
    model_type = "toy_of_the_proof"

    def __init__(self, fault: str = "", **kwargs):
        super().__init__(**kwargs)
        self.fault, self.vocab_size = fault, 20


class ToyBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)


class Toy(PreTrainedModel):
    """Its forward pass changes a weight, a buffer, an attribute and the config before it comes to its fault."""

    config_class = ToyConfig

    def __init__(self, config: ToyConfig):
        super().__init__(config)
        self.embed = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(ToyBlock() for _ in range(2))
        self.register_buffer("calls", torch.zeros(2))
        self.last = 0
        self.post_init()
        if config.fault == "ties":
            self.blocks[1].first.weight = self.blocks[0].first.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    @torch.no_grad()
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        self.embed.weight[3:5].mul_(0.5)
        self.calls[1] += 1
        self.last += 1
        self.config.pad_token_id = self.last
        for block in self.blocks:
            x = block.second(block.first(x))
            if self.config.fault == "writes":
                block.second.weight.data[0] = 0
        return x


def test_a_failed_surgery_undoes_what_a_forward_pass_does():
    refused(Toy(ToyConfig(fault="writes")), r"does not run \(TypeError: the weight of a HoloLinear", exclude="first")


def test_trying_a_model_does_not_change_it():
    model = Toy(ToyConfig())
    model.train()
    before, kept = everything(model), {name: p.clone() for name, p in model.state_dict().items()}
    apply_surgery(model, HoloSurgeryConfig(harmonics=4, modules=r"blocks\.0"))
    assert all(torch.equal(model.state_dict()[name], p) for name, p in kept.items() if "blocks.0" not in name)
    assert model.training and model.last == 0 and before["config"] == repr(_dense_config(model))
    assert isinstance(model.blocks[0].first, HoloLinear) and not isinstance(model.blocks[1].first, HoloLinear)


def _dense_config(model: PreTrainedModel) -> dict:
    config = copy.deepcopy(model.config)
    del config.quantization_config
    return config.to_dict()


def test_tied_layers_are_refused():
    refused(Toy(ToyConfig(fault="ties")), r"'blocks\.0\.first' and 'blocks\.1\.first' are tied")
    model = Toy(ToyConfig(fault="ties"))
    assert len(apply_surgery(model, HoloSurgeryConfig(harmonics=4, exclude="first")).converted) == 2


def test_hooks_can_be_removed_after_a_failure():
    """What was handed out before still belongs to the model."""
    model, calls = Toy(ToyConfig()), []
    handle = model.blocks[0].first.register_forward_hook(lambda *args: calls.append(1))
    with pytest.raises(KeyError), all_or_nothing(model):
        model.blocks[0].first = nn.Linear(8, 8)
        raise KeyError
    model(IDS % 20)
    handle.remove()
    model(IDS % 20)
    assert calls == [1]


def test_untouched_restores_views_and_tables():
    model = Toy(ToyConfig())
    before = everything(model)
    with untouched(model):
        model(IDS % 20)
        model.embed.weight.data.T[2] = 7
        torch.add(model.calls, 1, out=model.calls)
        del model.blocks[1]
        model.register_buffer("new", torch.ones(1))
    assert everything(model) == before


def test_a_model_without_inputs_to_try_warns():
    class Deaf(Toy):
        def forward(self, sound: torch.Tensor) -> torch.Tensor:
            return sound

    with pytest.warns(UserWarning, match="Deaf was not run after the surgery"):
        apply_surgery(Deaf(ToyConfig()), HoloSurgeryConfig(harmonics=4))


def test_a_refusal_leaves_no_layer_on_the_meta_device():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(RwkvConfig(**SIZES, attention_hidden_size=32))
    with pytest.raises(HoloError, match="does not run"):
        apply_surgery(model.eval(), HoloSurgeryConfig(harmonics=4))
    assert not holo_layers(model)
