"""The language of recipes: YAML, JSON and plain values, and back."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_distill.config import DistillationConfig, LayerMap, LogitTerm, MatchTerm, Projection, TaskTerm, read_map
from hf_distill.features import parse_feature

FULL = """
task:    {weight: 0.5}
logits:  {loss: forward_kl, weight: 0.5, temperature: {policy: constant, value: 4}}
matches:
  - {name: hidden, student: "hidden[*]", teacher: hidden, map: uniform, loss: hidden_mse, mask: tokens,
     projection: {kind: linear, share: pair, when: mismatch}, weight: 1.0}
  - {name: attention, student: "attention_scores[*]", map: uniform_last, loss: attention_mse, mask: pairs, weight: 1.0}
  - {name: relations, student: "query[-1]", teacher: "query[21]", loss: minilmv2_relations,
     options: {relation_heads: 48}}
  - {name: any, student: "hidden[*]", map: {strategy: emd, candidates: [3, 6, 9, 12]}, loss: hidden_mse}
  - {name: pkd, student: "pooled(cls)@hidden[*]", map: skip, loss: hidden_normalized_mse, active: [0, 0.5]}
  - {name: domain, student: "pooled(mean)@hidden[-1]", loss: mmd, domain: "domain"}
"""


def test_a_recipe_says_what_its_terms_are():
    config = DistillationConfig.from_yaml(FULL)
    assert config.task == TaskTerm(weight=0.5)
    assert config.logits == LogitTerm(temperature=4)
    hidden, attention, relations, emd, pkd, domain = config.matches
    assert hidden == MatchTerm("hidden", parse_feature("hidden[*]"), "hidden_mse", mask="tokens")
    assert (attention.map, attention.mask) == (LayerMap("uniform_last"), "tokens")
    assert (relations.teacher, relations.options) == (parse_feature("query[21]"), {"relation_heads": 48})
    assert emd.map == LayerMap("emd", candidates=(3, 6, 9, 12))
    assert pkd.active == (0, 0.5)
    assert (domain.domain, domain.teacher) == ("domain", None)


def test_what_is_written_is_on_and_what_is_left_out_is_off():
    matches = [{"name": "hidden", "student": "hidden[*]", "loss": "hidden_mse"}]
    assert weights({"matches": matches}) == (0, 0, 1)
    assert weights({"logits": {}, "matches": matches}) == (0, 0.5, 1)
    assert weights({"task": {}, "logits": {"temperature": 3}}) == (0.5, 0.5)
    assert weights({"task": {"weight": 2}}) == (2, 0)
    with pytest.raises(ValueError, match="All weights are zero"):
        DistillationConfig.from_dict({})


def weights(values):
    return tuple(term.weight for term in DistillationConfig.from_dict(values).terms.values())


LAYERS = st.integers(-12, 12)
WINDOWS = st.tuples(st.floats(0, 0.5), st.floats(0.5625, 1))
WEIGHTS = st.one_of(st.integers(0, 100), st.floats(0, 1e6))
MAPS = st.one_of(
    st.sampled_from(["uniform", "uniform_last", "last", "first", "skip", "argmin", "emd"]).map(LayerMap),
    st.lists(st.tuples(LAYERS, LAYERS), min_size=1, max_size=4, unique=True).map(
        lambda pairs: LayerMap("explicit", tuple(pairs))
    ),
    st.builds(
        LayerMap,
        st.just("random"),
        candidates=st.lists(LAYERS, max_size=3, unique=True).map(tuple),
        seed=st.integers(0, 9),
    ),
)
PROJECTIONS = st.builds(
    Projection,
    kind=st.sampled_from(["linear", "mlp"]),
    init=st.sampled_from(["default", "orthogonal"]),
    share=st.sampled_from(["pair", "all"]),
    when=st.sampled_from(["mismatch", "always"]),
    bias=st.booleans(),
    learning_rate_factor=st.floats(0.001, 100),
)
COMMON = {
    "weight": WEIGHTS,
    "active": WINDOWS,
    "reduction": st.sampled_from(["token_mean", "sample_mean", "reference"]),
    "mask": st.sampled_from([None, "tokens", "content", "cls", "task", "batch:mine"]),
}
MATCHES = st.one_of(
    st.builds(
        MatchTerm,
        name=st.just("open"),
        student=st.sampled_from(["hidden", "decoder.hidden[*]", "pooled(max)@hidden[*]"]).map(parse_feature),
        loss=st.sampled_from(["hidden_mse", "hidden_cosine"]),
        map=MAPS,
        projection=PROJECTIONS,
        **COMMON,
    ),
    st.builds(
        MatchTerm,
        name=st.just("fixed"),
        student=st.builds(lambda layer: parse_feature(f"encoder.value[{layer}]"), st.integers(1, 9)),
        teacher=st.builds(lambda layer: parse_feature(f"value[{layer}]"), st.integers(-9, -1)),
        loss=st.sampled_from(["minilm_values", "minilmv2_relations"]),
        heads=st.sampled_from(["strict", "relation"]),
        options=st.dictionaries(st.just("relation_heads"), st.integers(1, 64)),
        **COMMON,
    ),
    st.builds(
        MatchTerm,
        name=st.just("module"),
        student=st.sampled_from(["module:bert.pooler", "pooled(mean)@module:a.b.0"]).map(parse_feature),
        loss=st.sampled_from(["mmd", "coral"]),
        domain=st.text(min_size=1, max_size=5),
        **COMMON,
    ),
)
CONFIGS = st.builds(
    DistillationConfig,
    task=st.builds(TaskTerm, st.floats(0.5, 9), WINDOWS),
    logits=st.builds(LogitTerm, st.sampled_from(["forward_kl", "logit_mse"]), WEIGHTS, st.floats(0.01, 100), WINDOWS),
    matches=st.lists(MATCHES, max_size=3, unique_by=lambda match: match.name).map(tuple),
)


@given(CONFIGS)
def test_a_config_comes_back_from_yaml_json_and_plain_values_as_it_was(config):
    assert DistillationConfig.from_yaml(config.to_yaml()) == config
    assert DistillationConfig.from_json(json.dumps(config.to_dict())) == config
    assert DistillationConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("suffix", ["yaml", "yml", "json"])
def test_a_file_a_mapping_and_a_config_load_alike(suffix, tmp_path):
    config = DistillationConfig.from_yaml(FULL)
    file = tmp_path / f"recipe.{suffix}"
    file.write_text(json.dumps(config.to_dict()) if suffix == "json" else config.to_yaml())
    for value in (file, str(file), config.to_dict(), config):
        assert DistillationConfig.load(value) == config


def test_a_file_that_is_not_there_or_not_right_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.yaml' is no file"):
        DistillationConfig.load(tmp_path / "none.yaml")
    for name, text in (
        ("a.yaml", "task: {weight: ["),
        ("b.json", "{"),
        ("c.yaml", "task: {weight: -1}"),
        ("d.yml", ""),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name}: "):
            DistillationConfig.load(tmp_path / name)


def test_a_recipe_runs_no_code(tmp_path):
    (tmp_path / "evil.yaml").write_text("task: !!python/object/apply:os.getcwd []")
    with pytest.raises(ValueError, match=r"evil\.yaml: could not determine a constructor"):
        DistillationConfig.load(tmp_path / "evil.yaml")


MATCH = {"name": "hidden", "student": "hidden[*]", "loss": "hidden_mse"}


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"tasks": {}}, r"^tasks: unknown key\. Did you mean 'task'\? Known: task, logits, matches"),
        ({"task": {"wieght": 1}}, r"^task\.wieght: unknown key\. Did you mean 'weight'\?"),
        (
            {"logits": {"temperature": {"value": 2, "polizy": 1}}},
            r"^logits\.temperature: unknown key 'polizy'.*mean 'policy'\?",
        ),
        (
            {"matches": [MATCH, {**MATCH, "projektion": {}}]},
            r"^matches\[1\]\.projektion: .*Did you mean 'projection'\?",
        ),
        (
            {"matches": [{**MATCH, "projection": {"kin": 1}}]},
            r"^matches\[0\]\.projection\.kin: .*Did you mean 'kind'\?",
        ),
        ({"matches": [{**MATCH, "map": {"strategy": "emd", "candidate": []}}]}, r"\.map\.candidate: .*'candidates'\?"),
    ],
)
def test_an_unknown_key_at_any_depth_is_refused_with_its_path_and_the_nearest_one(values, complaint):
    with pytest.raises(ValueError, match=complaint):
        DistillationConfig.from_dict(values)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ([], r"The recipe is \[\]; expected a mapping with task, logits, matches"),
        ({"task": 0.5}, r"task is 0\.5; expected a mapping"),
        ({"task": None}, r"task is None; expected a mapping"),
        ({"matches": MATCH}, r"matches is .*expected a list"),
        ({"matches": ["hidden"]}, r"matches\[0\] is 'hidden'; expected a mapping"),
        ({"matches": [{"name": "a"}]}, r"matches\[0\] lacks student and loss"),
        ({"matches": [{**MATCH, "student": "hiden[1]"}]}, r"matches\[0\]\.student: 'hiden\[1\]' refers to no feature"),
        ({"matches": [{**MATCH, "student": 3}]}, r"matches\[0\]\.student=3 is no reference"),
        ({"matches": [{**MATCH, "map": "unifrom"}]}, r"matches\[0\]\.map: strategy='unifrom'.*Did you mean 'uniform'"),
        ({"matches": [{**MATCH, "map": 3}]}, r"matches\[0\]\.map is 3; expected a mapping"),
        ({"matches": [{**MATCH, "map": {1: "x"}}]}, r"matches\[0\]\.map: .*whole numbers"),
        ({"matches": [{**MATCH, "projection": "line"}]}, r"matches\[0\]\.projection: kind='line'"),
        ({"matches": [{**MATCH, "weight": None}]}, r"Match 'hidden': weight=None"),
        ({"logits": {"temperature": {"policy": "linear", "value": 2}}}, r"a constant has a `value`"),
        ({"logits": {"temperature": {"policy": "constant"}}}, r"write the number alone"),
    ],
)
def test_a_recipe_that_is_wrong_says_where(values, complaint):
    with pytest.raises(ValueError, match=complaint):
        DistillationConfig.from_dict(values)


def test_a_key_written_twice_is_refused():
    with pytest.raises(ValueError, match=r"'weight' is written twice.*line 1"):
        DistillationConfig.from_yaml("task: {weight: 1, weight: 2}")


@pytest.mark.parametrize(
    "written",
    [
        {1: 3, -1: 6},
        {"1": 3, "-1": 6},
        [[1, 3], [-1, 6]],
        ((1, 3), (-1, 6)),
        "[[1, 3], [-1, 6]]",
        '{"1": 3, "-1": 6}',
        {"strategy": "explicit", "pairs": [[1, 3], [-1, 6]]},
    ],
)
def test_pairs_of_layers_may_be_written_as_a_mapping_or_a_list(written):
    assert read_map(written) == LayerMap("explicit", ((1, 3), (-1, 6)))


def test_a_projection_may_be_its_kind_alone():
    config = DistillationConfig.from_dict({"matches": [{**MATCH, "projection": "mlp"}]})
    assert config.matches[0].projection == Projection("mlp")
