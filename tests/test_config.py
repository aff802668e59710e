"""Terms: what fits together, what is filled in, and what is refused with its remedy."""

import dataclasses
import pickle
import re

import pytest

from hf_distill.config import DistillationConfig, LayerMap, LogitTerm, MatchTerm, Projection, TaskTerm
from hf_distill.features import parse_feature
from hf_distill.losses import LOSSES

# For every kind of loss a reference that it compares.
REFERENCES = {
    "hidden": "hidden[*]",
    "attention": "attention_scores[*]",
    "relation": "query[-1]",
    "tokens": "hidden[*]",
    "batch": "pooled(mean)@hidden[-1]",
    "domain": "pooled(cls)@hidden[-1]",
}
LAYER_LOSSES = [name for name in LOSSES if LOSSES.get(name).feature != "logits"]


def match(student="hidden[*]", loss="hidden_mse", name="some", **options):
    """A match from written references."""
    for side in {"teacher"} & {*options}:
        options[side] = parse_feature(options[side])
    if LOSSES.get(loss).feature == "domain":
        options.setdefault("domain", "is_target")
    return MatchTerm(name, parse_feature(student), loss, **options)


def test_every_registered_loss_has_a_term_that_takes_it():
    for name in LOSSES:
        feature = LOSSES.get(name).feature
        needed = {"k": 4} if name == "top_k_kl" else {}
        term = LogitTerm(loss=name, options=needed) if feature == "logits" else match(REFERENCES[feature], name)
        assert term.loss == name


def test_a_teacher_left_out_is_the_students_feature_with_the_layer_left_to_the_map():
    assert match("encoder.hidden[2]").teacher == parse_feature("encoder.hidden")
    assert match("pooled(cls)@hidden[*]").teacher == parse_feature("pooled(cls)@hidden")
    assert match("module:bert.pooler").teacher == parse_feature("module:bert.pooler")


def test_all_ways_to_leave_the_layers_open_are_the_same_match():
    written = [match("hidden", teacher="hidden[*]"), match("hidden[*]"), match("hidden[*]", teacher="hidden")]
    assert len({*written}) == 1
    assert written[0].map == LayerMap("uniform")


def test_the_mask_of_pairs_is_that_of_their_tokens():
    assert match("attention_scores[*]", "attention_mse", mask="pairs").mask == "tokens"


def test_only_a_loss_of_two_domains_asks_no_teacher():
    asking = {name for name in LAYER_LOSSES if match(REFERENCES[LOSSES.get(name).feature], name).asks_teacher}
    assert {*LAYER_LOSSES} - asking == {"mmd", "coral"}


@pytest.mark.parametrize("loss", LAYER_LOSSES)
def test_a_loss_refuses_references_that_it_does_not_compare(loss):
    feature = LOSSES.get(loss).feature
    wrong = {
        "hidden": ["attention_scores[1]", "query[1]"],
        "attention": ["hidden[*]", "value[-1]"],
        "relation": ["attention_probs[*]", "hidden[-1]"],
        "tokens": ["pooled(cls)@hidden[*]", "query[1]"],
        "batch": ["hidden[-1]", "value[1]"],
        "domain": ["hidden[-1]", "attention_scores[1]"],
    }[feature]
    for reference in wrong:
        with pytest.raises(
            ValueError, match=rf"Match 'some': student is .*, but {loss} compares {feature} features: "
        ):
            match(reference, loss)


def test_a_module_may_be_compared_as_it_is_or_pooled():
    match("module:bert.pooler", "rkd_distance")
    match("pooled(mean)@module:bert.encoder", "hidden_mse")
    match("module:bert.pooler", "hidden_mse", teacher="pooled(cls)@hidden[-1]")


@pytest.mark.parametrize("name", ["", "two words", "1st", "a-b", "task", "kd", 3, None])
def test_a_match_has_a_name_under_which_it_can_be_logged(name):
    with pytest.raises(ValueError, match=r"letters, digits and underscores other than task and kd"):
        match(name=name)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"weight": -1}, r"weight=-1, .*number >= 0"),
        ({"weight": "1e-3"}, r"weight='1e-3'.*write 1\.0e-3"),
        ({"weight": True}, r"weight=True"),
        ({"weight": float("inf")}, r"weight=inf"),
        ({"active": (0.5, 0.5)}, r"active=\(0\.5, 0\.5\).*0 <= start < end <= 1"),
        ({"active": (0, 1.5)}, r"active=\(0, 1\.5\)"),
        ({"active": [0, 1]}, r"active=\[0, 1\]"),
        ({"mask": "token"}, r"mask='token' is unknown\. Did you mean 'tokens'\? Known: tokens, content, cls"),
        ({"mask": "pairs"}, r"mask='pairs' is unknown"),
        ({"mask": "batch:"}, r"names no column"),
        ({"heads": "mean"}, r"heads is read by losses of attention and relation features, but hidden_mse"),
        ({"heads": "max"}, r"heads='max' is unknown.*strict, mean, relation"),
        ({"length": "cut"}, r"length='cut' is unknown"),
        ({"reduction": "mean"}, r"reduction='mean' is unknown.*token_mean"),
        ({"domain": "is_target"}, r"domain is read by losses of domain features"),
        ({"options": {"relation_heads": 4}}, r"hidden_mse takes no 'relation_heads'.*takes none"),
        ({"options": 3}, r"options=3 is no mapping"),
        ({"loss": "hidden_mes"}, r"Unknown loss 'hidden_mes'.*Did you mean 'hidden_mse'"),
        ({"loss": "forward_kl"}, r"forward_kl compares logits, which have a term of their own"),
        ({"map": "uniform"}, r"map='uniform' is no LayerMap"),
        ({"projection": None}, r"projection=None is no Projection"),
        ({"teacher": "pooled(cls)@hidden"}, r"Only one of 'hidden\[\*\]' and 'pooled\(cls\)@hidden' is pooled"),
        ({"teacher": "hidden[3]"}, r"Leave both open and write the pairs, map: \[\[1, 3\], \[2, 3\]\]"),
        ({"teacher": "module:a.b"}, r"a module is one, so name one layer"),
        ({"map": LayerMap("attention")}, r"weighs pooled vectors\. Write pooled\(cls\)@hidden\[\*\]"),
    ],
)
def test_a_match_is_refused_with_its_name_and_the_remedy(options, complaint):
    loss = options.pop("loss", "hidden_mse")
    with pytest.raises(ValueError, match=complaint) as error:
        MatchTerm("some", parse_feature("hidden[*]"), loss, **_parsed(options))
    assert str(error.value).startswith("Match 'some': ")


def _parsed(options):
    return {key: parse_feature(value) if key == "teacher" else value for key, value in options.items()}


@pytest.mark.parametrize(
    ("student", "loss", "options", "complaint"),
    [
        (
            "hidden[1]",
            "hidden_mse",
            {"teacher": "hidden[2]", "map": LayerMap("last")},
            r"one pair of layers\. Drop map",
        ),
        ("hidden[1]", "hidden_mse", {"map": LayerMap("explicit", ((1, 2),))}, r"names its layer already"),
        ("query[1]", "minilmv2_relations", {"teacher": "key[1]"}, r"Relate query to query"),
        ("query[1]", "minilmv2_relations", {"options": {"relation_head": 4}}, r"Did you mean 'relation_heads'\?"),
        ("query[1]", "minilmv2_relations", {"options": {"relation_heads": 0}}, r"whole number >= 1"),
        (
            "query[1]",
            "minilmv2_relations",
            {"projection": Projection("mlp")},
            r"projection is read by losses of hidden",
        ),
        ("value[1]", "minilm_values", {"heads": "mean"}, r"relations have their own heads\. Use heads: relation"),
        ("hidden[*]", "ckd_angles", {"options": {"windows": 21}}, r"takes no 'windows'\. Did you mean 'window'\?"),
        ("hidden[*]", "ckd_angles", {"options": {"window": "21"}}, r"window='21', but it must be a number such as 21"),
        ("hidden[*]", "ckd_pairs", {"projection": Projection("mlp")}, r"vectors of any width: project them by when"),
        ("hidden[*]", "ckd_pairs", {"options": {"tokens": 3}}, r"ckd_pairs takes no 'tokens'"),
        ("pooled(cls)@hidden[*]", "hidden_mse", {"length": "interpolate"}, r"is about positions, but"),
        ("pooled(cls)@hidden[-1]", "mmd", {"domain": ""}, r"give domain, the batch's column"),
        ("pooled(cls)@hidden[-1]", "mmd", {"teacher": "pooled(cls)@hidden[-1]"}, r"and no teacher"),
        ("pooled(cls)@hidden[-1]", "mmd", {"map": LayerMap("last")}, r"a domain loss has no teacher"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(student, loss, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        match(student, loss, **options)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"strategy": "uniforn"}, r"Did you mean 'uniform'\?"),
        ({"strategy": "explicit"}, r"needs at least one"),
        ({"pairs": ((1, 2),)}, r"a list of layer pairs is an explicit map"),
        ({"strategy": "explicit", "pairs": ((1, 2, 3),)}, r"a pair is \(student layer, teacher layer\)"),
        ({"strategy": "explicit", "pairs": ((1, 2.0),)}, r"whole numbers"),
        ({"strategy": "explicit", "pairs": ((1, 2), (1, 2))}, r"holds something twice"),
        ({"candidates": (1, 2)}, r"which does not choose.*argmin, attention, emd, random"),
        ({"strategy": "emd", "seed": 3}, r"draws nothing"),
    ],
)
def test_a_layer_map_is_refused_with_the_remedy(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        LayerMap(**options)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"kind": "liner"}, r"kind='liner' is unknown\. Did you mean 'linear'\?"),
        ({"init": "zeros"}, r"Known: default, orthogonal"),
        ({"share": "layer"}, r"Known: pair, all"),
        ({"when": "never"}, r"Known: mismatch, always"),
        ({"bias": 1}, r"true or false"),
        ({"learning_rate_factor": 0}, r"never learns"),
        ({"learning_rate_factor": -1}, r"number > 0"),
    ],
)
def test_a_projection_is_refused_with_the_remedy(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        Projection(**options)


def test_the_loss_of_the_logits_compares_logits():
    with pytest.raises(
        ValueError, match=r"kd_loss='hidden_mse' compares hidden, not logits.*take one of .*forward_kl"
    ):
        LogitTerm(loss="hidden_mse")


@pytest.mark.parametrize("temperature", [0, -1, float("nan"), [8, 2], True, None])
def test_the_temperature_is_a_positive_number(temperature):
    with pytest.raises(ValueError, match=rf"temperature={re.escape(repr(temperature))}.*positive number"):
        LogitTerm(temperature=temperature)


def test_a_config_without_a_weight_is_refused():
    for nothing in ({}, {"matches": (match(weight=0),)}, {"task": TaskTerm(0), "logits": LogitTerm(weight=0)}):
        with pytest.raises(ValueError, match=r"All weights are zero.*or the weight of a match"):
            DistillationConfig(**nothing)


def test_two_matches_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"Two matches are called some"):
        DistillationConfig(matches=(match(), match("hidden[1]"), match(name="other")))


def test_terms_left_out_are_off_and_all_are_found_by_the_name_in_the_log():
    config = DistillationConfig(matches=[match(name="a"), match(name="b")])
    assert {name: term.weight for name, term in config.terms.items()} == {"task": 0, "kd": 0, "a": 1, "b": 1}


def test_a_config_cannot_be_changed_and_travels_between_processes():
    config = DistillationConfig(matches=(match("hidden[*]", "ckd_angles", options={"window": 5}),))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.matches[0].weight = 2.0
    again = pickle.loads(pickle.dumps(config))
    assert again == config
    assert hash(again) == hash(config)
