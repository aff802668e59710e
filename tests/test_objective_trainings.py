"""Trainings whose logit term changes over time or from item to item: what they log, weigh and refuse."""

import math
import warnings

import pytest
import torch
from transformers import DataCollatorForTokenClassification  # pads labels as they are
from transformers.trainer_utils import HPSearchBackend

from hf_distill import DistillationTrainer, DistillationTrainingArguments
from hf_distill.config import LogitTerm
from hf_distill.presets import load_preset
from hf_distill.schedules import Schedule
from hf_distill.temperature import AdaptiveTemperature, ScheduledTemperature
from hf_distill.weighting import PhraseWeights
from tests import tiny
from tests.invariants.objective_cases import LANGUAGES, weighted_rows
from tests.test_phrases import CORPUS, byte_bpe, wordpiece
from tests.training import SILENT, arguments, logged, make_trainer

TEXTS = ["the patient had a heart attack last night", "art is in the heart", "a heart", "last night a heart attack"]
PHRASES = [{"by": "phrases", "phrases": ["heart attack", "attack last"], "boost": 0.3}]


def text_trainer(folder, tokenizer, make, texts=TEXTS, **options):
    """A trainer on texts that are tokenized as a user would, with the text kept."""
    rows = [{**tokenizer(text), "text": text} for text in texts]
    for row in rows:
        row.pop("token_type_ids", None)
        row["labels"] = [*row["input_ids"]]
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(make(vocab_size=len(tokenizer)))
    options = {"task_weight": 0.0, "max_steps": 1, "learning_rate": 0.0, **options}
    return DistillationTrainer(
        models[0],
        DistillationTrainingArguments(
            output_dir=str(folder), **{**SILENT, "per_device_train_batch_size": len(texts), **options}
        ),
        teacher_model=models[1],
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=DataCollatorForTokenClassification(tokenizer),
    )


def head_gradient(trainer):
    """The gradient that arrives at what the student's head reads, (batch, length, width): linear in the logits'."""
    gradients = []

    def keep(module, inputs):
        if inputs[0].requires_grad:  # not in the forward that looks at the head before the training
            inputs[0].register_hook(lambda gradient: gradients.append(gradient.detach().clone()))

    handle = trainer.model.get_output_embeddings().register_forward_pre_hook(keep)
    trainer.train()
    handle.remove()
    return gradients[-1]


@pytest.mark.parametrize(
    ("tokenizer", "make", "shift"), [(byte_bpe, tiny.llama, 1), (wordpiece, lambda **c: tiny.bert("MaskedLM", **c), 0)]
)
@pytest.mark.parametrize("kd_loss", ["forward_kl", "jsd", "logit_mse"])
def test_a_token_of_a_phrase_has_1_3_times_the_gradient_before_normalisation(
    tokenizer, make, shift, kd_loss, tmp_path
):
    tokenizer = tokenizer()
    runs = [
        text_trainer(tmp_path, tokenizer, make, kd_loss=kd_loss, **options)
        for options in ({}, {"item_weights": PHRASES})
    ]
    plain, weighted = (head_gradient(trainer) for trainer in runs)
    tokens = [[*tokenizer(text)["input_ids"]] for text in TEXTS]
    covered = []
    for text, ids in zip(TEXTS, tokens, strict=True):
        spans = [(text.find(p), text.find(p) + len(p)) for p in ("heart attack", "attack last") if p in text]
        offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        covered.append([any(s < end and start < e for s, e in spans) and start < end for start, end in offsets])
        assert len(offsets) == len(ids)
    weights = torch.zeros(plain.shape[:2])
    for row, cover in enumerate(covered):
        for place, inside in enumerate(cover[shift:]):
            weights[row, place] = 1.3 if inside else 1.0
    kept = weights > 0
    assert {1.0, 1.3} == {round(w, 6) for w in weights[kept].tolist()}
    expected = plain * (weights * kept.sum() / weights.sum()).unsqueeze(-1)
    torch.testing.assert_close(weighted[kept], expected[kept], rtol=1e-5, atol=1e-9)


def test_phrases_that_are_nowhere_warn_once_and_change_nothing(tmp_path):
    weights = [{"by": "phrases", "phrases": ["no such words"]}]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = text_trainer(tmp_path, byte_bpe(), tiny.llama, item_weights=weights)
        weighted = head_gradient(trainer)
    assert sum("holds any of the phrases" in str(warning.message) for warning in caught) == 1
    torch.testing.assert_close(weighted, head_gradient(text_trainer(tmp_path, byte_bpe(), tiny.llama)))


def test_chinese_phrases_weigh_their_characters(tmp_path):
    weights = [{"by": "phrases", "phrases": ["心肌梗死"], "boost": 1.0}]
    texts = [CORPUS[2], CORPUS[2]]
    make = lambda **config: tiny.bert("MaskedLM", **config)  # noqa: E731
    plain, weighted = (
        head_gradient(text_trainer(tmp_path, wordpiece(), make, texts, **options))
        for options in ({}, {"item_weights": weights})
    )
    ratio = (weighted.norm(dim=-1) / plain.norm(dim=-1))[0]
    assert sorted({round(value, 3) for value in (ratio / ratio.min()).tolist()}) == [1.0, 2.0]
    assert int((ratio / ratio.min() > 1.5).sum()) == 4


@pytest.mark.parametrize("policy", ["linear", "cosine", "exponential"])
def test_a_scheduled_temperature_is_logged_as_it_was(policy, tmp_path):
    trainer = make_trainer(tmp_path, temperature=8.0, temperature_schedule=policy, temperature_final=2.0, max_steps=4)
    trainer.train()
    half = {"linear": 5.0, "cosine": 5.0, "exponential": 4.0}[policy]
    temperatures = logged(trainer, "temperature")
    assert temperatures[0] == 8.0
    assert temperatures[2] == pytest.approx(half)
    assert temperatures == sorted(temperatures, reverse=True)


def test_weights_that_change_are_logged_and_the_loss_follows_them(tmp_path):
    linear = {"kind": "linear", "from": 1, "to": 0}
    trainer = make_trainer(
        tmp_path, max_steps=4, kd_weight=2.0, weight_schedules={"kd": linear, "task": "warmup"}, learning_rate=0.0
    )
    trainer.train()
    for step, log in enumerate(log for log in trainer.state.log_history if "loss" in log):
        kd, task = 2.0 * (1 - step / 4), 0.5 * min(1, step / 4 / 0.1)
        assert log["loss"] == pytest.approx(kd * log["loss_kd"] + task * log.get("loss_task", 0.0), rel=1e-5)
    assert logged(trainer, "weight_kd") == pytest.approx([2.0, 1.5, 1.0, 0.5])


def test_weights_of_groups_follow_their_latest_losses(tmp_path):
    rows = weighted_rows("bert", 12)
    settings = [{"by": "group", "column": "language", "follow": "loss", "power": 2}]
    trainer = make_trainer(
        tmp_path, item_weights=settings, train_dataset=rows, eval_dataset=rows, eval_strategy="steps", eval_steps=1
    )
    trainer.train()
    last = [log for log in trainer.state.log_history if "eval_loss_en" in log][-1]
    losses = [last[f"eval_loss_{name}"] for name in LANGUAGES]
    counts = [sum(row["language"] == name for row in rows) for name in LANGUAGES]
    average = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert average == pytest.approx(last["eval_loss"], rel=1e-5)
    mean = sum(losses) / len(losses)
    factors = trainer._item_weights.factors()
    assert factors == pytest.approx({n: (v / mean) ** 2 for n, v in zip(LANGUAGES, losses, strict=True)})


def test_an_evaluation_weighs_nothing_and_takes_the_last_temperature(tmp_path):
    rows = weighted_rows("bert")
    weights = [{"by": "column", "column": "distill_weight"}]
    schedule = {"temperature": 9.0, "temperature_schedule": "linear", "temperature_final": 3.0}
    trainers = [
        make_trainer(tmp_path, item_weights=weights, train_dataset=rows, eval_dataset=rows, **schedule),
        make_trainer(tmp_path, temperature=3.0),
    ]
    first, second = (trainer.evaluate()["eval_kd"] for trainer in trainers)
    assert first == pytest.approx(second, rel=1e-6)


def test_rows_without_the_weights_column_serve_an_evaluation(tmp_path):
    weights = [{"by": "column", "column": "distill_weight"}]
    trainer = make_trainer(
        tmp_path, item_weights=weights, train_dataset=weighted_rows("bert"), eval_dataset=tiny.rows("sequence")
    )
    assert math.isfinite(trainer.evaluate()["eval_kd"])


@pytest.mark.parametrize("by", [{"by": "teacher"}, {"by": "column", "column": "distill_weight"}])
def test_items_may_be_weighed_in_a_term_that_is_on_for_a_part_of_the_training(by, tmp_path):
    config = {"task": {}, "logits": {"active": [0.5, 1], "item_weights": [by]}}
    trainer = make_trainer(
        tmp_path, distillation_config=config, train_dataset=weighted_rows("bert"), eval_dataset=None, max_steps=4
    )
    trainer.train()
    assert len(logged(trainer, "loss")) == 4
    assert len(logged(trainer, "loss_kd")) == 2


REFUSED = [
    ("bert-multi-label", {"kd_loss": "reverse_kl"}, "none. Take forward_kl, which means binary_forward_kl there"),
    ("bert-regression", {"kd_loss": "jsd"}, "which means logit_mse there"),
    ("bert-regression", {"temperature": {"policy": "adaptive"}}, "has no temperature"),
    ("bert-regression", {"kd_loss": "margin_mse"}, "needs 2 classes or more"),
    ("llama", {"kd_loss": "dist"}, "compares the rows of a batch"),
    ("wav2vec2-ctc", {"kd_loss": "dkd"}, "no single one per item"),
    ("bert", {"kd_loss": "jsd", "temperature": {"policy": "learned"}}, "for forward_kl alone"),
    ("bert-multi-label", {"temperature": {"policy": "learned"}}, "which forward_kl means for multi label"),
    ("bert", {"kd_loss": "logit_mse", "temperature_squared": False}, "nobody would read temperature_squared"),
    ("bert", {"item_weights": [{"by": "group", "column": "language", "follow": "loss"}]}, "eval_strategy is 'no'"),
    ("bert", {"kd_loss": "nkd", "temperature_squared": False}, "of nkd only a part"),
    ("bert", {"item_weights": [{"by": "column", "column": "no_such"}]}, "'no_such'"),
    ("bert-regression", {"item_weights": [{"by": "teacher"}]}, "plain numbers"),
    ("wav2vec2-ctc", {"item_weights": [{"by": "teacher", "signal": "correctness"}]}, "needs a label of each item"),
]


@pytest.mark.parametrize(("name", "settings", "complaint"), REFUSED)
def test_what_cannot_work_is_refused_before_the_first_step(name, settings, complaint, tmp_path):
    rows = [{**row, "language": "en"} for row in tiny.rows(tiny.ZOO[name][1])]
    with pytest.raises(ValueError, match=complaint):
        make_trainer(tmp_path, name, train_dataset=rows, eval_dataset=rows, **settings)


@pytest.mark.parametrize(
    "settings", [{"kd_loss": "dkd"}, {"kd_loss": "nkd"}, {"kd_loss": "dist"}, {"logit_transform": "standardize"}]
)
def test_two_classes_are_refused_where_they_make_a_term_constant(settings, tmp_path):
    models = (tiny.bert(num_labels=2), tiny.bert(num_labels=2))
    rows = [{**row, "labels": row["labels"] % 2} for row in tiny.rows("sequence")]
    with pytest.raises(ValueError, match=r"3 classes or more|\+-0\.71"):
        make_trainer(tmp_path, models=models, train_dataset=rows, eval_dataset=rows, **settings)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"kd_weight": 0.0, "kd_loss": "jsd", "kd_options": {"beta": 0.1}}, "kd_weight is 0"),
        ({"kd_weight": 0.0, "item_weights": [{"by": "column"}]}, "kd_weight is 0"),
        ({"temperature_schedule": "linear"}, "from one number to another"),
        ({"temperature_final": 2.0}, "from one number to another"),
        ({"temperature": "linear"}, r"Write \{policy: linear, from: "),
        ({"temperature": [8, 2]}, r"or a policy such as \{policy: linear"),
        ({"temperature": "{'policy': 'adaptive'}"}, "temperature=.*is no JSON.*double quotes"),
        ({"item_weights": "[{'by': 'teacher'}]"}, "item_weights=.*is no JSON"),
        ({"kd_weight": 0.0, "temperature": {"policy": "adaptive"}}, "kd_weight is 0"),
        ({"kd_loss": "jsd", "kd_options": {"beta": 1.5}}, r"kd_options \(options\) of jsd: beta is 1.5"),
        ({"kd_loss": "top_k_kl", "kd_options": {"k": 0}}, "of top_k_kl"),
        ({"distillation_config": {"kd": {}}}, "is called logits"),
        ({"temperature_schedule": "lienar", "temperature_final": 1.0}, "mean 'linear'"),
        ({"temperature": "adaptiv"}, "adaptive"),
        ({"kd_loss": "jsd", "kd_options": {"bta": 0.1}}, "Did you mean 'beta'"),
        ({"kd_loss": "jsd", "kd_options": {"beta": "half"}}, "beta='half'"),
        ({"kd_options": {"beta": 0.1}}, "takes no 'beta'"),
        ({"weight_schedules": {"hidden": "warmup"}}, "weight_schedules='hidden' is unknown"),
        ({"weight_schedules": {"kd": {"kind": "linear", "from": 1, "to": -1}}}, "must be >= 0"),
        ({"logit_transform": "zscore"}, "standardize"),
        ({"teacher_scale": 0}, "must stay > 0"),
        ({"loss_balance": "uncertainty", "task_weight": 0.0}, "there is one only"),
        ({"loss_balance": "magnitude", "kd_weight": 0.0, "hidden_weight": 1.0}, "whose weight is 0"),
        ({"loss_balance": {"kind": "magnitude", "learning_rate_factor": 3.0}}, "is read by uncertainty"),
        ({"loss_balance": "gradnorm"}, "gradnorm"),
    ],
)
def test_settings_that_nobody_reads_or_nobody_knows_are_refused(settings, complaint, tmp_path):
    with pytest.raises(ValueError, match=complaint):
        arguments(tmp_path, **settings)


def test_a_search_tries_numbers_as_they_are_and_policies_too(tmp_path):
    trainer = make_trainer(tmp_path, temperature=4, kd_weight=1, task_weight=1)
    trainer.hp_search_backend = HPSearchBackend.RAY  # whose trial is the values
    tried = [
        {"temperature": 3.79, "kd_weight": 0.723},
        {"temperature": {"policy": "adaptive"}, "kd_loss": "jsd", "kd_options": {"beta": 0.2}},
        {"temperature": 2.5},
    ]
    for values in tried:
        trainer._hp_search_setup({**values})
        assert {name: getattr(trainer.args, name) for name in values} == values
        assert trainer.args.distillation.logits.weight == 0.723
    assert trainer.args.distillation.logits.temperature == 2.5


def test_options_beside_a_presets_change_those_that_are_given(tmp_path):
    args = arguments(tmp_path, preset="dist", kd_options={"inter": 3})
    assert args.distillation.logits.options == {**load_preset("dist").config().logits.options, "inter": 3}
    assert len(args.distillation.logits.options) == 2


def test_one_policy_may_be_written_in_many_ways():
    schedule = Schedule("linear", 8, 2)
    policies = [
        schedule,
        ScheduledTemperature(schedule),
        {"policy": "linear", "from": 8, "to": 2},
        {"kind": "linear", "from": 8, "to": 2},
    ]
    assert len({LogitTerm(temperature=policy) for policy in policies}) == 1
    assert LogitTerm(temperature="adaptive").temperature == AdaptiveTemperature()
    weights = [PhraseWeights(phrases=("heart",)), {"by": "phrases", "phrases": ["heart"]}]
    assert LogitTerm(item_weights=weights[0]) == LogitTerm(item_weights=[weights[1]])


def test_the_mean_weight_of_the_items_is_logged(tmp_path):
    rows = weighted_rows("bert")
    weights = [{"by": "column", "column": "distill_weight"}]
    trainer = make_trainer(tmp_path, train_dataset=rows, item_weights=weights, max_steps=1)
    trainer.train()
    expected = sum(row["distill_weight"] for row in rows[:4]) / 4
    assert logged(trainer, "item_weight") == pytest.approx([expected])


def test_a_temperature_that_the_loss_does_not_have_is_not_logged(tmp_path):
    trainer = make_trainer(tmp_path, kd_loss="logit_mse")
    trainer.train()
    assert logged(trainer, "temperature") == []
    assert len(logged(trainer, "loss_kd")) == 2


def test_schedules_that_leave_a_part_of_the_training_without_a_term_are_refused(tmp_path):
    off = {"kind": "linear", "from": 1, "to": 0, "end": 0.5}
    with pytest.raises(ValueError, match="No term is active between 50% and 100%"):
        make_trainer(tmp_path, task_weight=0.0, weight_schedules={"kd": off})


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_an_annealed_teacher_is_scaled_by_the_progress(name, tmp_path):
    scale = {"kind": "linear", "from": 0.25, "to": 1}
    options = {"kd_loss": "logit_mse", "learning_rate": 0.0, "task_weight": 0.0}
    trainer = make_trainer(tmp_path, name, teacher_scale=scale, max_steps=4, **options)
    trainer.train()
    fixed = []
    for step, progress in enumerate((0, 0.25, 0.5, 0.75), 1):
        other = make_trainer(tmp_path, name, teacher_scale=0.25 + 0.75 * progress, max_steps=step, **options)
        other.train()
        fixed.append(logged(other, "loss_kd")[-1])
    assert logged(trainer, "loss_kd") == pytest.approx(fixed, rel=1e-5)
