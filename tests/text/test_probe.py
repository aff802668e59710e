import pytest
import torch

from hf_distill.text.collation import FlatteningCollator, PackedCollator
from hf_distill.text.probe import check_keeps_apart
from tests.text.models import FAMILIES, MIXING, make

COLLATORS = pytest.mark.parametrize("collator", [FlatteningCollator(), PackedCollator(0)], ids=["flat", "packed"])


@COLLATORS
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", FAMILIES)
def test_models_that_keep_texts_apart_pass(name, implementation, collator):
    model = make(name)
    if implementation == "eager" or model._supports_sdpa:
        model.set_attn_implementation(implementation)
    check_keeps_apart(model, collator, role="student")


@COLLATORS
@pytest.mark.parametrize("name", MIXING)
def test_models_that_mix_texts_are_refused_by_name(name, collator):
    model = make(name)
    with pytest.raises(ValueError, match=rf"The teacher \({type(model).__name__}\) .* padding_free=False"):
        check_keeps_apart(model, collator, role="teacher")


def test_bfloat16_is_allowed_its_rounding_and_no_mixing():
    check_keeps_apart(make("llama").bfloat16(), FlatteningCollator(), role="student")
    with pytest.raises(ValueError, match="mixes the texts"):
        check_keeps_apart(make("lfm2").bfloat16(), FlatteningCollator(), role="student")


def test_positions_that_are_not_the_texts_own_are_refused():
    model = make("gpt2")
    model.transformer.wpe.register_forward_pre_hook(lambda _, args: (torch.arange(args[0].shape[-1])[None],))
    with pytest.raises(ValueError, match="mixes the texts"):
        check_keeps_apart(model, FlatteningCollator(), role="student")


def test_logits_that_are_no_numbers_are_refused():
    model = make("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="mixes the texts"):
        check_keeps_apart(model, FlatteningCollator(), role="student")


def test_the_model_and_the_random_numbers_stay_as_they_were():
    model = make("gpt2").train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    check_keeps_apart(model, FlatteningCollator(), role="student")
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
