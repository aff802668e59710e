"""Methods from papers: each loads, says whom to cite, and becomes one training where that is possible."""

import re

import pytest
from transformers import TrainingArguments

from hf_distill.config import DistillationConfig, LogitTerm, MatchTerm, TaskTerm
from hf_distill.features import parse_feature
from hf_distill.presets import Preset, PresetStage, load_preset, preset_names

STAGED = ("tinybert", "minilmv2", "mobilebert", "fitnets")


def preset(*stages):
    shares = [1 / len(stages)] * len(stages)
    parts = [PresetStage(f"s{i}", config, share) for i, (config, share) in enumerate(zip(stages, shares, strict=True))]
    return Preset("mine", "Mine", "Me 2026, arXiv:2601.00001", "", tuple(parts))


HIDDEN = MatchTerm("hidden", parse_feature("hidden[*]"), "hidden_mse")


def test_the_published_methods_are_there():
    assert {*preset_names()} == {
        *("hinton", "distilbert", "pkd", "minilm", "rkd", "ckd", "alp", "emd", "distil_whisper"),
        *("dkd", "dist", "lskd", "ctkd", "annealing_kd", "distillm", "akl"),
        *STAGED,
    }


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_names_its_paper_and_its_terms(name):
    found = load_preset(name)
    assert found.name == name
    assert re.fullmatch(r".+ (19|20)\d\d, arXiv:\d{4}\.\d{4,5}", found.paper)
    assert len(found.notes) > 60
    assert len(found.stages) == (2 if name in STAGED else 1)
    arguments = {field for field in TrainingArguments.__dataclass_fields__}
    assert all({*stage.training} <= arguments for stage in found.stages)


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_written_down_is_the_same_training(name):
    config = load_preset(name).config()
    assert DistillationConfig.from_yaml(config.to_yaml()) == config


@pytest.mark.parametrize("name", preset_names())
def test_the_whole_training_of_a_preset_has_a_term(name):
    windows = sorted(term.active for term in load_preset(name).config().terms.values() if term.weight > 0)
    reached = 0.0
    for start, end in windows:
        assert start <= reached
        reached = max(reached, end)
    assert reached == 1


def test_a_stage_is_on_in_its_share_of_the_training():
    config = load_preset("tinybert").config()
    assert [match.active for match in config.matches] == [(0.0, 0.5), (0.0, 0.5)]
    assert config.logits.active == (0.5, 1.0)
    assert config.task.weight == 0


def test_a_term_of_several_stages_is_on_in_all_of_them():
    first = DistillationConfig(TaskTerm(1.0), matches=(HIDDEN,))
    second = DistillationConfig(TaskTerm(1.0), LogitTerm(active=(0.5, 1.0)))
    config = preset(first, second).config()
    assert {name: term.active for name, term in config.terms.items()} == {
        "task": (0.0, 1.0),
        "kd": (0.75, 1.0),
        "hidden": (0.0, 0.5),
    }


@pytest.mark.parametrize(
    "stages",
    [
        [DistillationConfig(TaskTerm(1.0)), DistillationConfig(TaskTerm(2.0))],
        [DistillationConfig(TaskTerm(1.0)), DistillationConfig(matches=(HIDDEN,)), DistillationConfig(TaskTerm(1.0))],
    ],
    ids=["changes", "pauses"],
)
def test_a_term_that_one_training_cannot_have_needs_stages(stages):
    with pytest.raises(ValueError, match=r"'task' of 'mine' changes or pauses.*Run the stages one by one"):
        preset(*stages).config()


def test_shares_add_up_to_the_training():
    stages = (PresetStage("a", DistillationConfig(TaskTerm(1.0)), 0.5),)
    with pytest.raises(ValueError, match=r"\[0\.5\]; they must be > 0 and add up to 1"):
        Preset("mine", "", "", "", stages)


def test_an_unknown_preset_is_refused_with_the_nearest_name():
    with pytest.raises(
        ValueError, match=r"preset='tinbert' is unknown\. Did you mean 'tinybert'\? Known: akl, alp, annealing_kd, ckd"
    ):
        load_preset("tinbert")


def test_the_papers_relations_are_those_of_one_layer_regrouped():
    matches = load_preset("minilmv2").config().matches
    assert [str(match.student) for match in matches] == ["query[-1]", "key[-1]", "value[-1]"]
    assert all(match.options == {"relation_heads": 48} and match.reduction == "reference" for match in matches)
