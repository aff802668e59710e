"""BERT's weights as DistilBERT: the same function where there are no token types, reported where it is not."""

import pytest
import torch
import transformers as hf

from hf_distill.models.student import Origin, build_student
from tests.tiny import VOCABULARY, bert, llama, roberta


def inputs(padding=0):
    ids = torch.randint(5, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, padding), "attention_mask": mask}


def shaken(model):
    """All weights random, so that none can be left out unseen."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def difference(first, second, mask):
    return float(((first - second) * mask[..., None]).abs().max())


@pytest.mark.parametrize("head", ["SequenceClassification", "MaskedLM", "TokenClassification", "MultipleChoice"])
def test_bert_as_distilbert_has_the_same_hidden_states(head):
    teacher, batch = shaken(bert(head, layers=12)), inputs()
    student = build_student(teacher, architecture="distilbert").model
    assert type(student).__name__ == f"DistilBertFor{head}"
    with torch.no_grad():
        expected = teacher.bert(**batch, output_hidden_states=True).hidden_states
        found = student.distilbert(**batch, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == 13
    assert max(difference(*pair, batch["attention_mask"]) for pair in zip(found, expected, strict=True)) <= 1e-5


@pytest.mark.parametrize("head", ["MaskedLM", "TokenClassification"])
@pytest.mark.parametrize("make", [bert, "roberta"])
def test_heads_on_tokens_have_the_same_logits(make, head):
    if make == "roberta":
        config = roberta().config
        config.layer_norm_eps = 1e-12
        teacher, batch = getattr(hf, f"RobertaFor{head}")(config), inputs(padding=1)
    else:
        teacher, batch = make(head), inputs()
    built = build_student(shaken(teacher), architecture="distilbert")
    with torch.no_grad():
        logits = [model(**batch).logits for model in (built.model, teacher)]
    assert difference(*logits, batch["attention_mask"]) <= 1e-5
    assert not built.report.names("new")


@pytest.mark.parametrize("make", [bert, roberta])
def test_a_pooled_classifier_is_copied_and_called_approximate(make):
    teacher = shaken(make())
    built = build_student(teacher, architecture="distilbert")
    old = teacher.bert.pooler.dense if make is bert else teacher.classifier.dense
    assert torch.equal(built.model.pre_classifier.weight, old.weight)
    assert built.model.config.id2label == teacher.config.id2label
    assert any("tanh" in note for note in built.report.notes)
    assert built.report.names(Origin.MERGED) == ("distilbert.embeddings.position_embeddings.weight",)


def test_distilbert_is_made_of_six_of_twelve_layers(tmp_path):
    teacher = shaken(bert("MaskedLM", layers=12))
    built = build_student(teacher, architecture="distilbert", layers=6)
    layers = built.model.distilbert.transformer.layer
    assert built.report.layers == {"": (0, 2, 4, 7, 9, 11)}
    assert torch.equal(layers[3].ffn.lin1.weight, teacher.bert.encoder.layer[7].intermediate.dense.weight)
    built.model.save_pretrained(tmp_path)
    again, info = hf.AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs()).logits, built.model(**inputs()).logits)


def test_another_layout_can_be_narrower_too():
    built = build_student(bert("MaskedLM", layers=4), architecture="distilbert", layers=2, hidden_size=16)
    assert (built.model.config.n_layers, built.model.config.dim, built.model.config.n_heads) == (2, 16, 2)
    assert "distilbert.embeddings.position_embeddings.weight" in built.report.names("cut")


def causal_bert():
    return hf.BertForMaskedLM(hf.BertConfig(**{**bert().config.to_dict(), "is_decoder": True}))


@pytest.mark.parametrize(
    ("teacher", "architecture", "match"),
    [
        (llama, "distilbert", "bert -> distilbert"),
        (bert, "electra", "bert -> distilbert"),
        (lambda: bert("NextSentencePrediction"), "distilbert", "DistilBertForNextSentencePrediction"),
        (causal_bert, "distilbert", "causal attention, which does not exist"),
    ],
)
def test_what_has_no_rule_is_refused(teacher, architecture, match):
    with pytest.raises(ValueError, match=match):
        build_student(teacher(), architecture=architecture)
