"""The weights of a batch's items: in their shape, where each task has them, from columns and from the teacher."""

import math

import pytest
import torch

from hf_distill.batches import Batch
from hf_distill.collator import DistillationCollator
from hf_distill.item_weights import ItemWeights, largest_probability
from hf_distill.items import LABEL_MASK, find_items
from hf_distill.losses import forward_kl
from hf_distill.row_weights import RowWeights
from hf_distill.signals import Task
from hf_distill.weighting import ITEM_GROUP, ITEM_WEIGHT, ColumnWeights, GroupWeights, PhraseWeights, TeacherWeights
from tests.test_phrases import byte_bpe

COLUMN = (ColumnWeights("w"),)
FOLLOWED = (GroupWeights("g", follow="loss", power=2.0),)
SIZES = {"g": {"en": 0, "de": 0, "sw": 0}}


def batch_of(task, inputs, extras=(), frames=None):
    labels = {name: value for name, value in inputs.items() if name != LABEL_MASK}
    return Batch(labels, labels, find_items(task, inputs, frames=frames), LABEL_MASK not in inputs, dict(extras))


def labelled(*labels):
    return {"input_ids": torch.ones(len(labels), 3, dtype=torch.long), "labels": torch.tensor(labels)}


def test_nothing_asked_for_is_no_weight():
    weights = ItemWeights((), task=Task.MASKED_LM)
    assert weights.is_plain
    assert weights(batch_of(Task.MASKED_LM, labelled([1, 2, 3]))) is None


def test_rows_weigh_all_their_positions_and_nothing_weighs_beside_the_items():
    batch = batch_of(Task.MASKED_LM, labelled([1, -100, 3], [-100, 2, -100]), {ITEM_WEIGHT: torch.tensor([2.0, 0.5])})
    made = ItemWeights(COLUMN, task=Task.MASKED_LM)(batch)
    assert made.dtype == torch.float32
    assert made.tolist() == [[2, 0, 2], [0, 0.5, 0]]


@pytest.mark.parametrize("name", ["labels", "shift_labels"])
def test_a_causal_models_item_weighs_as_the_token_that_it_predicts(name):
    tokens = torch.tensor([[5, 6, 7, 8]])
    labels = tokens if name == "labels" else torch.tensor([[6, 7, 8, -100]])
    batch = batch_of(
        Task.CAUSAL_LM, {"input_ids": tokens, name: labels}, {ITEM_WEIGHT: torch.tensor([[50.0, 60.0, 70.0, 80.0]])}
    )
    assert ItemWeights(COLUMN, task=Task.CAUSAL_LM)(batch).tolist() == [[60, 70, 80, 0]]


@pytest.mark.parametrize("task", [Task.MASKED_LM, Task.SEQ2SEQ_LM, Task.TOKEN_CLASSIFICATION])
def test_other_tokens_weigh_where_they_are(task):
    batch = batch_of(task, labelled([1, 2, -100]), {ITEM_WEIGHT: torch.tensor([[0.5, 2.0, 3.0]])})
    assert ItemWeights(COLUMN, task=task)(batch).tolist() == [[0.5, 2, 0]]


def test_frames_weigh_as_their_row():
    frames = torch.tensor([[True, True, False], [True, True, True]])
    inputs = {"input_values": torch.ones(2, 8), "labels": torch.tensor([[1], [2]])}
    batch = batch_of(Task.CTC, inputs, {ITEM_WEIGHT: torch.tensor([2.0, 3.0])}, frames)
    assert ItemWeights(COLUMN, task=Task.CTC)(batch).tolist() == [[2, 2, 0], [3, 3, 3]]


def test_a_token_of_a_phrase_has_1_3_times_the_gradient():
    tokens = byte_bpe()
    text = "the heart attack 心肌梗死"
    settings = (PhraseWeights(("heart attack", "心肌梗死"), boost=0.3),)
    ids = tokens(text)["input_ids"]
    collator = DistillationCollator(
        lambda rows: {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")},
        task=Task.CAUSAL_LM,
        row_weights=RowWeights(settings, task=Task.CAUSAL_LM, tokenizer=tokens),
    )
    inputs = collator([{"input_ids": ids, "labels": ids, "text": text}])
    extras = {ITEM_WEIGHT: inputs.pop(ITEM_WEIGHT)}
    weights = ItemWeights(settings, task=Task.CAUSAL_LM)(batch_of(Task.CAUSAL_LM, inputs, extras))
    student = torch.randn(1, len(ids), 11, requires_grad=True)
    teacher = torch.randn(1, len(ids), 11)
    (plain,) = torch.autograd.grad(forward_kl(student, teacher).sum(), student)
    (weighed,) = torch.autograd.grad((weights * forward_kl(student, teacher)).sum(), student)
    covered = [False] + [bool(extras[ITEM_WEIGHT][0, i] > 1) for i in range(1, len(ids))]
    assert covered.count(True) > 13, "twelve bytes of Chinese and some of English"
    for position in range(len(ids) - 1):
        ratio = 1.3 if covered[position + 1] else 1.0
        torch.testing.assert_close(weighed[0, position], ratio * plain[0, position])
    assert not weighed[0, -1].any()


def test_the_largest_probability_is_that_of_the_softmax_for_any_dtype_and_strides():
    logits = 5 * torch.randn(3, 7, 11)
    logits[0, 0, 3] = -math.inf
    expected = logits.double().softmax(-1).amax(-1)
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 1e-6), (torch.bfloat16, 0.1)):
        made = largest_probability(logits.to(dtype))
        torch.testing.assert_close(made.double(), expected, rtol=tolerance, atol=tolerance)
    cut = logits[:, 1:]
    torch.testing.assert_close(largest_probability(cut), expected[:, 1:].float())


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("threshold", [0.0, 0.6])
def test_confidence_is_a_power_of_the_largest_probability_above_a_threshold(power, threshold):
    batch = batch_of(Task.MASKED_LM, labelled([1, -100, 0], [0, 0, 1]))
    logits = 2 * torch.randn(2, 3, 4)
    logits[0, 1] = math.nan  # no item
    made = ItemWeights([TeacherWeights(power=power, threshold=threshold)], task=Task.MASKED_LM)(batch, (logits,))
    for row in range(2):
        for place in range(3):
            p = max(math.exp(z) for z in logits[row, place]) / sum(math.exp(z) for z in logits[row, place])
            expected = p**power if p >= threshold else 0.0
            assert made[row, place].item() == pytest.approx(0 if (row, place) == (0, 1) else expected, rel=1e-5)


def test_a_power_of_zero_keeps_or_drops():
    batch = batch_of(Task.SEQUENCE_CLASSIFICATION, labelled(0, 1))
    logits = torch.tensor([[3.0, 0.0], [0.1, 0.0]])
    weights = ItemWeights([TeacherWeights(power=0, threshold=0.9)], task=Task.SEQUENCE_CLASSIFICATION)
    assert weights(batch, (logits,)).tolist() == [1, 0]


def spans():
    return {
        "input_ids": torch.ones(3, 4, dtype=torch.long),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]),
        "start_positions": torch.tensor([1, 0, -100]),
        "end_positions": torch.tensor([2, 3, -100]),
    }


def test_both_ends_of_an_answer_make_its_confidence_and_correctness_and_padding_has_no_part():
    start, end = torch.randn(3, 4), torch.randn(3, 4)
    start[0], end[0] = torch.tensor([0.0, 5.0, 0.0, 99.0]), torch.tensor([0.0, 0.0, 5.0, 99.0])
    start[1], end[1] = torch.tensor([5.0, 0.0, 0.0, 0.0]), torch.tensor([5.0, 0.0, 0.0, 0.0])
    batch = batch_of(Task.QUESTION_ANSWERING, spans())
    confidence = ItemWeights([TeacherWeights()], task=Task.QUESTION_ANSWERING)(batch, (start, end))
    of_first = math.exp(5) / (math.exp(5) + 2)
    of_last = start[2].softmax(-1).max() * end[2].softmax(-1).max()
    assert confidence[[0, 2]].tolist() == pytest.approx([of_first**2, of_last.item()], rel=1e-5)
    right = ItemWeights([TeacherWeights("correctness", wrong=0.25)], task=Task.QUESTION_ANSWERING)
    assert right(batch, (start, end)).tolist() == [1, 0.25, 1]


def test_what_the_teacher_misses_weighs_less_and_what_has_no_label_weighs_one():
    logits = torch.tensor([[3.0, 0.0], [3.0, 0.0], [3.0, 0.0]])
    inputs = {**labelled(0, 1, -100), LABEL_MASK: torch.tensor([True, True, False])}
    batch = batch_of(Task.SEQUENCE_CLASSIFICATION, inputs)
    for wrong in (0.0, 0.5):
        weights = ItemWeights([TeacherWeights("correctness", wrong=wrong)], task=Task.SEQUENCE_CLASSIFICATION)
        assert weights(batch, (logits,)).tolist() == [1, wrong, 1]
    unlabelled = batch_of(Task.SEQUENCE_CLASSIFICATION, {"input_ids": inputs["input_ids"]})
    assert weights(unlabelled, (logits,)).tolist() == [1, 1, 1]


def test_a_causal_teacher_is_right_about_the_next_token():
    inputs = {"input_ids": torch.tensor([[0, 1, 2]]), "labels": torch.tensor([[0, 1, 2]])}
    logits = torch.eye(3)[None, [1, 0, 0]]
    made = ItemWeights([TeacherWeights("correctness")], task=Task.CAUSAL_LM)(
        batch_of(Task.CAUSAL_LM, inputs), (logits,)
    )
    assert made.tolist() == [[1, 0, 0]]


def test_many_labels_are_right_together_and_confident_on_average():
    problem = {"task": Task.SEQUENCE_CLASSIFICATION, "problem_type": "multi_label_classification"}
    logits = torch.tensor([[2.0, -2.0], [2.0, 2.0], [0.0, 1.0]])
    inputs = labelled([1.0, 0.0], [1.0, 0.0], [math.nan, math.nan])
    batch = batch_of(Task.SEQUENCE_CLASSIFICATION, {**inputs, LABEL_MASK: torch.tensor([True, True, False])})
    right = ItemWeights([TeacherWeights("correctness")], **problem)
    assert right(batch, (logits,)).tolist() == [1, 0, 1]
    assert right(batch_of(Task.SEQUENCE_CLASSIFICATION, {"input_ids": inputs["input_ids"]}), (logits,)).tolist() == [
        *[1] * 3
    ]
    confident = ItemWeights([TeacherWeights()], **problem)(batch, (logits,))
    s = 1 / (1 + math.exp(-2))
    assert confident.tolist() == pytest.approx([s, s, (0.5 + 1 / (1 + math.exp(-1))) / 2], rel=1e-5)


def test_heads_whose_teacher_says_nothing_about_an_item_are_refused():
    regression = {"task": Task.SEQUENCE_CLASSIFICATION, "problem_type": "regression"}
    for setting in (TeacherWeights(), TeacherWeights("correctness")):
        with pytest.raises(ValueError, match=r"need classes, and the heads predict plain numbers. Weigh by a column"):
            ItemWeights([setting], **regression)
    with pytest.raises(ValueError, match=r"'correctness' needs a label of each item, which ctc does not have. Take"):
        ItemWeights([TeacherWeights("correctness")], task=Task.CTC)
    assert ItemWeights([TeacherWeights()], task=Task.CTC).needs_teacher
    assert not ItemWeights(COLUMN, task=Task.CTC).needs_teacher


def grouped(*groups):
    return batch_of(Task.SEQUENCE_CLASSIFICATION, labelled(*[0] * len(groups)), {ITEM_GROUP: torch.tensor(groups)})


def followed():
    return ItemWeights(FOLLOWED, task=Task.SEQUENCE_CLASSIFICATION, group_sizes=SIZES)


def test_groups_weigh_one_before_the_first_evaluation_and_then_as_their_loss():
    weights = followed()
    assert weights.group_names == {"de": "de", "en": "en", "sw": "sw"}
    assert weights(grouped(0, 1, 2, 3)).tolist() == [1, 1, 1, 1]
    assert weights.update({"eval_loss": 9.0, "eval_loss_de": 1.0, "eval_loss_en": 2.0, "eval_loss_sw": 3.0})
    assert weights(grouped(0, 1, 2, 3)).tolist() == [0.25, 1, 2.25, 1]
    assert weights.factors() == {"de": 0.25, "en": 1.0, "sw": 2.25}


def test_the_weights_are_those_of_the_last_metrics_whatever_came_before():
    last = {"eval_loss_de": 1.0, "eval_loss_sw": 3.0}
    weights, resumed = followed(), followed()
    weights.update({"eval_loss_de": 5.0, "eval_loss_en": 0.5, "eval_loss_sw": 3.0})
    weights.update(last)
    assert weights.update({"eval_loss": 1.0, "loss": 2.0}) is False, "other metrics say nothing"
    resumed.update({**last, "eval_loss": 7.0})
    assert weights.factors() == resumed.factors() == {"de": 0.25, "en": 1.0, "sw": 2.25}


def test_a_resumed_training_weighs_as_the_latest_logged_evaluation_says():
    weights = followed()
    evaluations = [{"eval_loss_de": 5.0, "eval_loss_en": 1.0}, {"eval_loss_de": 1.0, "eval_loss_sw": 3.0}]
    weights.replay([evaluations[0], {"loss": 1.0}, evaluations[1], {"loss": 0.5, "loss_kd": 2.0}])
    assert weights.factors() == {"de": 0.25, "en": 1.0, "sw": 2.25}
    weights.replay([{"loss": 1.0}])
    assert weights.factors() == {"de": 1.0, "en": 1.0, "sw": 1.0}, "a training that starts anew"


def test_losses_that_say_nothing_leave_the_weight_at_one():
    weights = followed()
    assert weights.update({"eval_loss_de": math.nan, "eval_loss_en": 2.0, "eval_loss_sw": math.inf})
    assert weights.factors() == {"de": 1.0, "en": 1.0, "sw": 1.0}
    assert weights.update({"eval_loss_de": 0.0, "eval_loss_en": 0.0})
    assert weights.factors() == {"de": 1.0, "en": 1.0, "sw": 1.0}
    assert weights.update({"eval_dev_loss_de": 1.0, "eval_dev_loss_en": 3.0}, prefix="eval_dev")
    assert weights.factors() == {"de": 0.25, "en": 2.25, "sw": 1.0}
    assert ItemWeights(COLUMN, task=Task.CTC).update({"eval_loss_de": 1.0}) is False


def test_groups_are_logged_under_names_that_differ():
    named = ItemWeights(FOLLOWED, task=Task.CAUSAL_LM, group_sizes={"g": {"zh-Hans CN": 1, "中文": 1, "-1": 0}})
    assert named.group_names == {"-1": "_1", "zh-Hans CN": "zh_Hans_CN", "中文": "中文"}
    with pytest.raises(ValueError, match="groups 'a b' and 'a-b' of 'g' would both be logged as 'a_b'"):
        ItemWeights(FOLLOWED, task=Task.CAUSAL_LM, group_sizes={"g": {"a b": 1, "a-b": 1}})


def test_the_weights_of_groups_are_logged_under_the_names_of_their_losses():
    weights = ItemWeights(FOLLOWED, task=Task.CAUSAL_LM, group_sizes={"g": {"zh CN": 1, "en": 1}})
    assert weights.update({"eval_loss_zh_CN": 1.0, "eval_loss_en": 3.0})
    shown = weights.describe()
    assert shown == {"group_weight_zh_CN": shown["group_weight_zh_CN"], "group_weight_en": weights.factors()["en"]}
    assert shown["group_weight_zh_CN"] == weights.factors()["zh CN"] < 1 < shown["group_weight_en"]
    assert ItemWeights(COLUMN, task=Task.CTC).describe() == {}


def test_all_kinds_multiply():
    weights = ItemWeights(
        [*COLUMN, *FOLLOWED, TeacherWeights("correctness", wrong=0.5)],
        task=Task.SEQUENCE_CLASSIFICATION,
        group_sizes=SIZES,
    )
    weights.update({"eval_loss_de": 1.0, "eval_loss_en": 2.0, "eval_loss_sw": 3.0})
    extras = {ITEM_WEIGHT: torch.tensor([2.0, 3.0]), ITEM_GROUP: torch.tensor([2, 0])}
    batch = batch_of(Task.SEQUENCE_CLASSIFICATION, labelled(1, 1), extras)
    assert weights(batch, (torch.tensor([[3.0, 0.0], [0.0, 3.0]]),)).tolist() == [2 * 2.25 * 0.5, 3 * 0.25]


def test_what_is_missing_or_of_another_shape_is_refused():
    batch = batch_of(Task.MASKED_LM, labelled([1, 2, 3]))
    with pytest.raises(ValueError, match="batch holds no item_weight, of which items are weighed"):
        ItemWeights(COLUMN, task=Task.MASKED_LM)(batch)
    with pytest.raises(ValueError, match="pass teacher_logits"):
        ItemWeights([TeacherWeights()], task=Task.MASKED_LM)(batch)
    wrong = batch_of(Task.MASKED_LM, labelled([1, 2, 3]), {ITEM_WEIGHT: torch.ones(1, 2)})
    with pytest.raises(ValueError, match=r"weights have shape \(1, 2\), the items \(1, 3\)"):
        ItemWeights(COLUMN, task=Task.MASKED_LM)(wrong)


@pytest.mark.parametrize("signal", ["confidence", "correctness"])
def test_nothing_is_read_back_from_the_device(signal):
    weights = ItemWeights([*COLUMN, *FOLLOWED, TeacherWeights(signal)], task=Task.CAUSAL_LM, group_sizes=SIZES)
    inputs = {name: torch.ones(2, 3, dtype=torch.long, device="meta") for name in ("input_ids", "labels")}
    extras = {
        ITEM_WEIGHT: torch.ones(2, 3, device="meta"),
        ITEM_GROUP: torch.ones(2, dtype=torch.long, device="meta"),
    }
    batch = batch_of(Task.CAUSAL_LM, inputs, extras)
    assert weights(batch, (torch.ones(2, 3, 5, device="meta"),)).shape == (2, 3)
