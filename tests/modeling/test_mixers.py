"""What the mixers of HSN compute, against sums over all pairs of tokens; and that both directions know the order."""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_holo import HolographicMixer, HsnConfig, HsnForMaskedLM, HsnForSequenceClassification
from hf_holo.modeling import binding, phases

LENGTH, DIM = 37, 24


def mixer(**options) -> HolographicMixer:
    """In float64 and without its filter, with parameters moved away from where they start."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": DIM, "num_heads": 2, "num_hidden_layers": 1}
    made = HolographicMixer(HsnConfig(**sizes | {"gate_placement": "sublayer"} | options)).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def hidden() -> torch.Tensor:
    return torch.randn(2, LENGTH, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def fading(log_decay: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What is left at t of a token at s, from s to t: `[B, H, T, S]` for s ≤ t, and for s ≥ t; from [B, H, T]."""
    total = log_decay.cumsum(-1)
    past = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
    total = log_decay.flip(-1).cumsum(-1).flip(-1)
    future = (total[..., :, None] - total[..., None, :]).triu().exp().triu()
    return past, future


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_dynamic_binding_hears_phases_at_signed_distances(causal):
    """y_t = Σ_s fading · P^-½ Σ_p cos(θq_t - θk_s + ω_p (t - s)) · √(1 - λ_s) v_s, on both sides of t alike."""
    made, x = mixer(causal=causal), hidden()
    heads = [z(x).unflatten(-1, (2, -1)).transpose(1, 2) for z in (made.q_proj, made.k_proj, made.v_proj)]
    theta_q, theta_k, v = heads
    decay = (made.decay_proj(x) + made.decay_bias).transpose(1, 2)
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)  # t - s
    turned = distance[None, :, :, None] * made.drift.omega()[:, None, None]  # [H, T, S, P]
    interference = torch.cos(theta_q[:, :, :, None] - theta_k[:, :, None] + turned).sum(-1) / math.sqrt(made.phases)
    past, future = fading(-F.softplus(decay))
    left = past if causal else past + future  # the token itself is heard both ways
    y = (left * interference) @ ((1 - torch.exp(-F.softplus(decay))).sqrt()[..., None] * v)
    y = F.layer_norm(y, (made.head_dim,), eps=made.norm_eps).transpose(1, 2).flatten(2) * made.norm_weight
    torch.testing.assert_close(made(x), made.out_proj(y * F.silu(made.gate_proj(x))), rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("write", ["bundle", "cancel"])
def test_every_token_turns_what_was_written_before_it(causal, write):
    """Phases that are turned by hand before they are bound: those of each token by its sum of the turns so far."""
    made, x = mixer(causal=causal, write=write, drift="data", num_heads=4, num_key_heads=2), hidden()
    plain = mixer(causal=causal, write=write, num_heads=4, num_key_heads=2)
    plain.load_state_dict({name: value for name, value in made.state_dict().items() if "turn_proj" not in name})
    turns = torch.remainder(phases.whole_turns(made.turn_proj(x), [2, 3]).cumsum(1), 2 * math.pi)  # [B, T, H]
    assert turns.std() > 0.5
    for projection, heads in ((plain.q_proj, 4), (plain.k_proj, 2)):
        per_phase = turns.repeat_interleave(heads // 2, 2).repeat_interleave(plain.phases, 2)
        projection.register_forward_hook(lambda module, args, theta, angle=per_phase: theta + angle)
    torch.testing.assert_close(made(x), plain(x), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_part_of_the_phases_drifts():
    """With none, tokens are heard at any distance alike: a row can be written in any order, and is read the same."""
    assert [mixer(drift_share=share).drift.omega().count_nonzero(1).tolist() for share in (0, 0.5, 1)] == [
        [0, 0],
        [3, 3],
        [6, 6],
    ]
    made, x = mixer(drift_share=0, memory=[1e9, 1e9]), hidden()
    made.decay_proj.weight.zero_()
    made.decay_bias.fill_(-20.0)
    shuffled = torch.cat([x[:, :-1].flip(1), x[:, -1:]], 1)
    torch.testing.assert_close(made(shuffled)[:, -1], made(x)[:, -1], rtol=1e-6, atol=1e-8)


@torch.no_grad()
def test_memories_start_evenly_between_the_shortest_and_the_longest():
    made = mixer(num_heads=3, memory=[2, 20_000])
    made.reset_parameters()
    torch.testing.assert_close(
        1 / made.decay_bias.sigmoid(), torch.tensor([20_000.0, 200.0, 2.0]).double(), rtol=1e-4, atol=0
    )


@torch.no_grad()
def test_a_cancelling_write_starts_as_strong_as_asked_and_reaches_its_range():
    made = mixer(write="cancel", write_range=2.0, write_start=0.05)
    made.reset_parameters()
    betas = [made._write(None, logit.view(1, 1, -1)) for logit in (made.write_proj.bias, torch.tensor([-60.0, 60.0]))]
    torch.testing.assert_close(torch.cat(betas).flatten(), torch.tensor([0.05, 0.05, 0.0, 2.0]).double())


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_static_binding_spreads_and_gathers(causal):
    """y = corr(EMA(x ⊛ k), u), with a memory for every head; on the way back the keys change places."""
    made, x = mixer(causal=causal, binding="static"), hidden()
    log_decay = -F.softplus(made.decay_bias)
    past, future = fading(log_decay[None, :, None].expand(1, -1, LENGTH))  # [1, H, T, S]
    expected = 0
    for left, first, second in [(past, made.bind_key, made.unbind_key), (future, made.unbind_key, made.bind_key)]:
        bound = binding.bind_naive(x, first).unflatten(-1, (2, -1)).transpose(1, 2)
        kept = left @ bound * (1 - log_decay.exp())[:, None, None]
        expected = expected + binding.unbind_naive(kept.transpose(1, 2).flatten(2), second)
        if causal:
            break
    torch.testing.assert_close(made(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("placement", ["mixer", "sublayer"])
def test_neither_static_key_can_be_replaced(placement):
    """The rank of the derivative by all parameters falls without either key: no other parameter takes its part."""
    made, x = mixer(binding="static", gate_placement=placement), hidden()
    parameters = dict(made.named_parameters())
    outputs = made(x).flatten()
    outputs = outputs[torch.randperm(len(outputs))[: 2 * sum(p.numel() for p in parameters.values())]]
    rows = [torch.autograd.grad(y, list(parameters.values()), retain_graph=True) for y in outputs]
    columns = {name: torch.stack([row[i].flatten() for row in rows]) for i, name in enumerate(parameters)}

    def rank(without: str = "") -> int:
        kept = [block for name, block in columns.items() if name != without]
        return int(torch.linalg.matrix_rank(torch.cat(kept, 1), rtol=1e-9))

    # one number says how much of both; between two keys nothing else can be moved
    assert [rank() - rank(without=key) for key in ("bind_key", "unbind_key")] == [DIM - 1, DIM - 1]


def test_static_binding_has_keys_in_place_of_projections():
    assert sum(p.numel() for p in mixer(binding="static").parameters()) == 2 * DIM + 2


@torch.no_grad()
@pytest.mark.parametrize("bias", [-4.0, -11.0, -14.0, -20.0])
def test_slow_heads_keep_their_precision(bias):
    """The weight √(1 - λ) of one token, in float32, however near to 1 λ is."""
    made = mixer(norm_eps=1.0).float()
    made.decay_proj.weight.zero_()
    token, values, outputs = torch.randn(3, 1, DIM), made.v_proj.weight.clone(), []
    for decay in (-1.0, bias):
        weight = torch.sigmoid(torch.tensor(decay, dtype=torch.float64)).sqrt().float()  # 1 - σ(-d) = σ(d)
        made.decay_bias.fill_(decay)
        made.v_proj.weight.copy_(values / weight)
        outputs.append(made(token))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------- order
SIZES = {"vocab_size": 20, "hidden_size": 32, "num_heads": 2, "num_hidden_layers": 2, "pad_token_id": 0}
KINDS = {
    "bundle": {},
    "cancel": {"write": "cancel"},
    "static": {"binding": "static"},
    "static, sublayer": {"binding": "static", "gate_placement": "sublayer"},
    "attention": {"mixer_types": ["attention"] * 2, "rotary_base": 100.0},
    "window": {"mixer_types": ["window"] * 2, "window": 5},
    "shared keys": {"num_heads": 4, "num_key_heads": 2},
}


@torch.no_grad()
@pytest.mark.parametrize("head", [HsnForMaskedLM, HsnForSequenceClassification])
@pytest.mark.parametrize("taps", [1, 4, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_is_told_from_its_mirror_image(kind, taps, head):
    torch.manual_seed(0)
    model = head(HsnConfig(**SIZES | KINDS[kind], gate_taps=taps, causal=False)).eval().double()
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    ids = torch.randint(1, 20, (4, 33))
    text, mirror = model(ids).logits, model(ids.flip(1)).logits
    mirror = mirror.flip(1) if mirror.dim() == 3 else mirror
    assert (text - mirror).abs().max() > 1e-3 * text.abs().max()


def test_a_model_that_could_not_see_the_order_is_refused():
    blind = {"mixer_types": ["attention"] * 2}
    with pytest.raises(ValueError, match="cannot tell before from after"):
        HsnConfig(**SIZES, **blind, causal=False)
    with pytest.raises(ValueError, match="cannot tell before from after"):
        HsnForMaskedLM(HsnConfig(**SIZES, **blind))  # which needs no `causal` in the config
    HsnConfig(**SIZES, **blind)  # causal, what a token cannot see tells the order
