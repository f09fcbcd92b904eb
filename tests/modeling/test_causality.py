"""No output depends on a later input. In float64, with weights that are not the initial ones."""

import pytest
import torch

LENGTH = 140
CUTS = (1, 2, 31, 63, 64, 65, 127, 128, 129, 139)


@torch.no_grad()
@pytest.mark.parametrize("cut", CUTS)
def test_another_suffix_leaves_the_prefix_alone(model, random_ids, cut):
    ids = random_ids(1, LENGTH)
    other = ids.clone()
    other[:, cut:] = ids[:, cut:] % 60 + 1  # a different token everywhere
    before, after = model(input_ids=ids).logits, model(input_ids=other).logits
    torch.testing.assert_close(after[:, :cut], before[:, :cut], rtol=0, atol=1e-12)
    assert (after[:, cut] - before[:, cut]).abs().max() > 1e-6  # the change is visible where it may be


def test_the_jacobian_has_no_upper_triangle(model):
    """Row t of the table is the largest |∂ (a random reading of logits t) / ∂ embedding s|: exactly 0 for s > t."""
    length = 80
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, length, 32, generator=generator, dtype=torch.float64).requires_grad_()
    logits = model(inputs_embeds=x, use_cache=False).logits
    reading = torch.randn(logits.shape[-1], generator=generator, dtype=torch.float64)
    outputs = (logits @ reading)[0]
    rows = [torch.autograd.grad(y, x, retain_graph=True)[0][0].abs().amax(-1) for y in outputs]
    jacobian = torch.stack(rows)  # [output, input]
    assert jacobian.triu(1).max() == 0
    assert jacobian.diagonal().min() > 0
    assert jacobian[-1, 0] > 0  # the last output still hears the first input


@torch.no_grad()
def test_a_padded_future_is_no_information_either(model, random_ids):
    ids = random_ids(1, 70)
    mask = torch.ones_like(ids)
    mask[:, 40:] = 0
    full, masked = model(input_ids=ids).logits, model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(masked[:, :40], full[:, :40], rtol=0, atol=1e-12)
