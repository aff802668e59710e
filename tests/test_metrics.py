import math
import pickle
import socket

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from transformers import EvalPrediction

from hf_distill.metrics import compute_metrics_for, load_metric, preprocess_logits_for
from hf_distill.metrics.modules import METRICS
from hf_distill.metrics.scores import kl_to_teacher
from hf_distill.metrics.spans import best_span, entity_spans
from hf_distill.metrics.tasks import TASKS

LANGUAGE_MODELS = ("masked_lm", "causal_lm", "seq2seq_lm")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a metric reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def evaluation(predictions, label_ids):
    return EvalPrediction(predictions=predictions, label_ids=label_ids)


def one_hot_logits(classes, number, height=4.0):
    return height * np.eye(number, dtype=np.float32)[np.asarray(classes)]


def test_single_label_scores_are_scikit_learns_and_skip_rows_without_label(rng):
    logits, labels = rng.normal(size=(101, 5)).astype(np.float32), rng.integers(0, 5, 101)
    labels[::7] = -100
    kept = labels != -100
    scores = compute_metrics_for("single_label_classification")(evaluation(logits, labels))
    chosen = logits.argmax(-1)[kept]
    assert scores["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(labels[kept], chosen))
    for average in ("macro", "micro", "weighted"):
        f1 = sklearn_metrics.f1_score(labels[kept], chosen, average=average)
        precision = sklearn_metrics.precision_score(labels[kept], chosen, average=average, zero_division=0)
        recall = sklearn_metrics.recall_score(labels[kept], chosen, average=average, zero_division=0)
        assert scores[f"f1_{average}"] == pytest.approx(f1)
        assert scores[f"precision_{average}"] == pytest.approx(precision)
        assert scores[f"recall_{average}"] == pytest.approx(recall)
    assert len(scores) == 10


def test_single_label_reads_the_logits_of_a_tuple_of_outputs():
    logits = one_hot_logits([0, 1, 1], 2)
    scores = compute_metrics_for("single_label_classification")(
        evaluation((logits, np.zeros((3, 9, 4))), np.array([0, 1, 0]))
    )
    assert scores["accuracy"] == pytest.approx(2 / 3)


def test_multi_label_threshold_decides_on_probabilities():
    logits = np.array([[2.0, -2.0], [0.5, 0.5], [-3.0, 3.0]])
    labels = np.array([[1.0, 0.0], [1.0, 0.0], [math.nan, math.nan]])
    at_half = compute_metrics_for("multi_label_classification")(evaluation(logits, labels))
    assert at_half["accuracy"] == pytest.approx(0.5)
    assert at_half["precision_micro"] == pytest.approx(2 / 3)
    assert at_half["recall_micro"] == pytest.approx(1.0)
    # sigmoid(0.5) = 0.62 is below 0.7, so the second row now has nothing.
    strict = compute_metrics_for("multi_label_classification", threshold=0.7)(evaluation(logits, labels))
    assert strict["precision_micro"] == pytest.approx(1.0)
    assert strict["recall_micro"] == pytest.approx(0.5)


def test_a_row_of_many_labels_counts_only_if_all_of_them_are_there():
    logits, labels = np.array([[2.0, -2.0], [2.0, -2.0]]), np.array([[1.0, 0.0], [0.0, math.nan]])
    assert compute_metrics_for("multi_label_classification")(evaluation(logits, labels))["accuracy"] == 1


def test_regression_skips_nan_and_takes_a_trailing_dimension():
    predictions = np.array([[1.0], [2.0], [4.0], [9.0]], dtype=np.float32)
    labels = np.array([1.0, 3.0, 2.0, math.nan], dtype=np.float32)
    scores = compute_metrics_for("regression")(evaluation(predictions, labels))
    assert scores["mse"] == pytest.approx((0 + 1 + 4) / 3)
    assert scores["pearson"] == pytest.approx(np.corrcoef([1, 2, 4], [1, 3, 2])[0, 1])
    assert scores["spearman"] == pytest.approx(0.5)  # ranks 1 2 3 against 1 3 2: 1 - 6 * 2 / (3 * 8)


def test_regression_averages_correlations_over_targets(rng):
    predictions, labels = rng.normal(size=(20, 2)), rng.normal(size=(20, 2))
    scores = compute_metrics_for("regression")(evaluation(predictions, labels))
    by_target = [np.corrcoef(predictions[:, i], labels[:, i])[0, 1] for i in range(2)]
    assert scores["pearson"] == pytest.approx(np.mean(by_target))
    assert scores["mse"] == pytest.approx(((predictions - labels) ** 2).mean())


def test_token_classification_skips_ignored_tokens():
    logits = one_hot_logits([[0, 1, 2, 0], [1, 1, 0, 0]], 3)
    labels = np.array([[-100, 1, 2, 1], [1, 0, -100, -100]])
    scores = compute_metrics_for("token_classification")(evaluation(logits, labels))
    wanted, chosen = [1, 2, 1, 1, 0], [1, 2, 0, 1, 1]
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["f1_macro"] == pytest.approx(sklearn_metrics.f1_score(wanted, chosen, average="macro"))
    assert set(scores) == {"accuracy", "f1_macro", "f1_micro", "f1_weighted"}


def test_token_classification_with_names_scores_whole_entities():
    names = ["O", "B-PER", "I-PER", "B-LOC"]
    labels = np.array([[1, 2, 0, 3, -100], [1, 0, 0, -100, -100]])  # PER(0-1) LOC(3); PER(0)
    chosen = np.array([[1, 2, 0, 1, 3], [1, 2, 0, 3, 3]])  # PER(0-1) PER(3); PER(0-1): one right of three
    scores = compute_metrics_for("token_classification", label_names=names)(
        evaluation(one_hot_logits(chosen, 4), labels)
    )
    assert scores["entity_precision"] == pytest.approx(1 / 3)
    assert scores["entity_recall"] == pytest.approx(1 / 3)
    assert scores["entity_f1"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        (["O", "O"], set()),
        (["B-A", "I-A", "B-A"], {("A", 0, 1), ("A", 2, 2)}),
        (["B-A", "I-B"], {("A", 0, 0), ("B", 1, 1)}),
        (["O", "I-A", "I-A"], {("A", 1, 2)}),
        (["B-A-x", "I-A-x", "O"], {("A-x", 0, 1)}),
    ],
)
def test_entity_spans_follow_iob2(tags, spans):
    assert entity_spans(tags) == spans


def test_question_answering_scores_positions_and_skips_rows_without_answer():
    length = 6
    starts, ends = np.array([1, 2, -100, 6]), np.array([2, 4, -100, 6])  # the last lies beyond the sequence
    start_logits, end_logits = np.full((4, length), -5.0), np.full((4, length), -5.0)
    for row, (start, end) in enumerate([(1, 2), (3, 5), (0, 0), (0, 0)]):
        start_logits[row, start], end_logits[row, end] = 5.0, 5.0
    scores = compute_metrics_for("question_answering")(evaluation((start_logits, end_logits), (starts, ends)))
    assert scores["exact_match"] == pytest.approx(0.5)
    assert scores["f1"] == pytest.approx((1 + 2 * 2 / (3 + 3)) / 2)  # positions 3-4 of 3-5 and 2-4 are shared


def test_best_span_is_ordered_and_short():
    start_logits, end_logits = np.array([0.0, 0.0, 3.0, 0.0]), np.array([4.0, 0.0, 0.0, 1.0])
    assert best_span(start_logits, end_logits, max_tokens=4) == (0, 0)  # 2 to 0 would score 7, but runs backwards
    assert best_span(np.array([5.0, 0, 0, 0]), np.array([0, 1.0, 0, 5.0]), max_tokens=2) == (0, 1)
    assert best_span(np.array([5.0, 0, 0, 0]), np.array([0, 1.0, 0, 5.0]), max_tokens=3) == (0, 1)
    assert best_span(np.array([5.0, 0, 0, 0]), np.array([0, 1.0, 0, 5.0]), max_tokens=4) == (0, 3)


def test_max_answer_tokens_reaches_the_span():
    logits = (np.array([[5.0, 0, 0, 0]]), np.array([[0, 1.0, 0, 5.0]]))
    answer = (np.array([0]), np.array([3]))
    assert compute_metrics_for("question_answering")(evaluation(logits, answer))["exact_match"] == 1
    short = compute_metrics_for("question_answering", max_answer_tokens=2)
    assert short(evaluation(logits, answer))["exact_match"] == 0


def test_multiple_choice_scores_the_chosen():
    scores = compute_metrics_for("multiple_choice")(
        evaluation(one_hot_logits([0, 1, 3, 2], 4), np.array([0, 1, 2, -100]))
    )
    assert scores == {"accuracy": pytest.approx(2 / 3)}


@pytest.mark.parametrize("task", LANGUAGE_MODELS)
def test_language_model_scores_are_the_same_from_logits_and_from_two_numbers_a_token(task):
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 7, 11), torch.randint(0, 11, (3, 7))
    labels[0, :3] = -100
    labels[2] = -100
    if task == "causal_lm":
        wanted_logits, wanted = logits[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1)
    else:
        wanted_logits, wanted = logits.reshape(-1, 11), labels.reshape(-1)
    kept = wanted != -100
    nll = -wanted_logits[kept].double().log_softmax(-1).gather(1, wanted[kept][:, None])
    accuracy = (wanted_logits[kept].argmax(-1) == wanted[kept]).double().mean().item()
    compute = compute_metrics_for(task)
    small = tuple(part.numpy() for part in preprocess_logits_for(task)(logits, labels))
    assert sum(part.size for part in small) == 2 * labels.numel()
    for predictions in (small, logits.numpy(), (logits.numpy(), np.zeros((3, 2)))):
        scores = compute(evaluation(predictions, labels.numpy()))
        assert scores["accuracy"] == pytest.approx(accuracy)
        assert scores["perplexity"] == pytest.approx(math.exp(nll.mean().item()), rel=1e-6)


@pytest.mark.parametrize("task", LANGUAGE_MODELS)
def test_padding_between_batches_changes_no_language_model_score(task):
    torch.manual_seed(1)
    logits, labels = torch.randn(2, 4, 5), torch.randint(0, 5, (2, 4))
    parts = preprocess_logits_for(task)(logits, labels)
    plain = compute_metrics_for(task)(evaluation(tuple(part.numpy() for part in parts), labels.numpy()))
    # Trainer pads predictions and labels of shorter batches with -100 on the right.
    widen = lambda array: np.pad(np.asarray(array), ((0, 0), (0, 3)), constant_values=-100)  # noqa: E731
    padded = compute_metrics_for(task)(evaluation(tuple(widen(part) for part in parts), widen(labels)))
    assert padded == plain


def test_language_model_half_precision_logits_give_float32_likelihoods():
    logits, labels = torch.randn(2, 3, 50, dtype=torch.bfloat16), torch.randint(0, 50, (2, 3))
    _, nll = preprocess_logits_for("masked_lm")(logits, labels)
    assert nll.dtype == torch.float32
    expected = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(nll, expected)


def test_language_model_refuses_generated_ids():
    compute = compute_metrics_for("seq2seq_lm")
    with pytest.raises(ValueError, match="predict_with_generate=False"):
        compute(evaluation(np.zeros((2, 3), dtype=int), np.zeros((2, 3), dtype=int)))


def test_language_model_refuses_logits_of_other_positions():
    with pytest.raises(ValueError, match="do not match labels"):
        preprocess_logits_for("masked_lm")(torch.zeros(2, 1, 9), torch.zeros(2, 5, dtype=torch.long))


def test_unknown_task_and_option_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="causal_lm"):
        compute_metrics_for("casual_lm")
    with pytest.raises(ValueError, match="causal_lm"):
        preprocess_logits_for("casual_lm")
    with pytest.raises(TypeError, match="threshold"):
        compute_metrics_for("multi_label_classification", treshold=0.3)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_refuses_a_set_without_labels_and_survives_pickling(task):
    compute = pickle.loads(pickle.dumps(compute_metrics_for(task)))
    shapes = {
        "multi_label_classification": ((2, 3), (2, 3)),
        "regression": ((2, 1), (2,)),
        "token_classification": ((2, 4, 3), (2, 4)),
        "masked_lm": ((2, 4, 3), (2, 4)),
        "causal_lm": ((2, 4, 3), (2, 4)),
        "seq2seq_lm": ((2, 4, 3), (2, 4)),
    }
    logits_shape, labels_shape = shapes.get(task, ((2, 3), (2,)))
    logits, labels = np.zeros(logits_shape, dtype=np.float32), np.full(labels_shape, -100)
    if task == "question_answering":
        logits, labels = (logits, logits), (labels, labels)
    with pytest.raises(ValueError, match="No item"):
        compute(evaluation(logits, labels))


def test_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(rows, classes\)"):
        compute_metrics_for("single_label_classification")(evaluation(np.zeros((2, 3, 4)), np.zeros(2)))


@pytest.mark.parametrize(
    ("name", "inputs", "options", "expected"),
    [
        ("accuracy", {"predictions": [1, 0, 1, 2], "references": [1, 1, 1, -100]}, {}, 2 / 3),
        ("accuracy", {"predictions": [1, 0], "references": [1, 1]}, {"sample_weight": [3.0, 1.0]}, 3 / 4),
        ("precision", {"predictions": [1, 1, 0, 1], "references": [1, 0, 1, -100]}, {}, 1 / 2),
        ("recall", {"predictions": [1, 1, 0, 1], "references": [1, 0, 0, 1]}, {}, 1.0),
        (
            "recall",
            {"predictions": [0, 0, 1], "references": [0, 0, 0]},
            {"average": "macro", "zero_division": 1.0},
            5 / 6,
        ),
        ("f1", {"predictions": [0, 2, 1], "references": [0, 1, 2]}, {"average": "macro"}, 1 / 3),
        ("f1", {"predictions": [0, 2, 1], "references": [0, 1, 2]}, {"average": "micro"}, 1 / 3),
        ("f1", {"predictions": [0, 0, 1], "references": [0, 0, 0]}, {"average": "weighted", "zero_division": 0}, 0.8),
        ("agreement", {"predictions": [1, 0, 2], "references": [1, 1, 2]}, {}, 2 / 3),
        ("perplexity", {"nll": [math.log(8), 0.0], "tokens": [1, 2]}, {}, 2.0),
        (
            "kl_to_teacher",
            {"predictions": [[0.0, 0.0]], "references": [[math.log(3), 0.0]]},
            {},
            0.75 * math.log(1.5) + 0.25 * math.log(0.5),
        ),
        (
            "expected_calibration_error",
            # Confidence 0.75 twice, right once: a gap of 0.25 in one bin; confidence 0.9, right: 0.1 in another.
            {"predictions": [[math.log(3), 0], [math.log(3), 0], [0, math.log(9)]], "references": [0, 1, 1]},
            {"bins": 10},
            2 / 3 * 0.25 + 1 / 3 * 0.1,
        ),
        (
            "expected_calibration_error",
            # Confidence 0.4, right, in the second of three bins; confidence 0.3, wrong, in the first.
            {"predictions": np.log([[0.4, 0.3, 0.2, 0.1], [0.3, 0.25, 0.25, 0.2]]), "references": [0, 1]},
            {"bins": 3},
            (0.6 + 0.3) / 2,
        ),
    ],
)
def test_metric_by_name_gives_the_value_worked_out_by_hand(name, inputs, options, expected):
    metric = load_metric(name, keep_in_memory=True)
    assert metric.compute(**inputs, **options) == {name: pytest.approx(expected, rel=1e-6)}


def test_every_metric_by_name_is_tried_above():
    (mark,) = (
        mark
        for mark in test_metric_by_name_gives_the_value_worked_out_by_hand.pytestmark
        if mark.name == "parametrize"
    )
    assert {case[0] for case in mark.args[1]} == set(METRICS)


def test_metric_adds_batches_and_combines(tmp_path):
    import evaluate

    metric = load_metric("accuracy", cache_dir=str(tmp_path))
    metric.add_batch(predictions=np.array([1, 0]), references=np.array([1, 1]))
    metric.add(prediction=1, reference=1)
    assert metric.compute() == {"accuracy": pytest.approx(2 / 3)}
    both = evaluate.combine(
        [load_metric("accuracy", keep_in_memory=True), load_metric("agreement", keep_in_memory=True)]
    )
    assert both.compute(predictions=[1, 0], references=[1, 1]) == {"accuracy": 0.5, "agreement": 0.5}


def test_metric_in_its_multilabel_configuration():
    metric = load_metric("f1", "multilabel", keep_in_memory=True)
    scores = metric.compute(predictions=[[1, 0], [1, 1]], references=[[1, 1], [0, 1]], average="macro")
    assert scores == {"f1": pytest.approx(2 / 3)}
    with pytest.raises(ValueError, match="no configuration"):
        load_metric("perplexity", "multilabel")


def test_a_metric_in_a_folder_is_loaded_by_evaluate(tmp_path):
    folder = tmp_path / "always_one"
    folder.mkdir()
    (folder / "always_one.py").write_text(
        "import datasets\nimport evaluate\n\n"
        "class AlwaysOne(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        features = datasets.Features({n: datasets.Value('int64') for n in ('predictions', 'references')})\n"
        "        return evaluate.MetricInfo(description='', citation='', inputs_description='', features=features)\n\n"
        "    def _compute(self, predictions, references):\n"
        "        return {'one': 1.0}\n"
    )
    assert load_metric(str(folder), keep_in_memory=True).compute(predictions=[0], references=[1]) == {"one": 1.0}


def test_kl_to_teacher_is_zero_at_equality_and_ignores_a_shift(rng):
    student, teacher = rng.normal(size=(5, 7)), rng.normal(size=(5, 7))
    assert kl_to_teacher(teacher, teacher) == pytest.approx(0, abs=1e-12)
    assert kl_to_teacher(student + 3, teacher - 2) == pytest.approx(kl_to_teacher(student, teacher))
    assert kl_to_teacher(student, teacher, temperature=2) == pytest.approx(kl_to_teacher(student / 2, teacher / 2))
    with pytest.raises(ValueError, match="temperature"):
        kl_to_teacher(student, teacher, temperature=0)
