"""Reports made by hand, of all the kinds that tables and plots must cope with."""

import math

from hf_distill.report.results import (
    BASELINE,
    STUDENT,
    TEACHER,
    UNDISTILLED,
    Cost,
    ModelResult,
    Quality,
    Report,
    Timing,
)

GRID = ((1, 16), (1, 64), (8, 16), (8, 64))
ENVIRONMENT = {
    "processor": "Some CPU",
    "threads": 1,
    "device": "cpu",
    "dtype": "float32",
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "latency": "30 passes after 5",
}


def cost(parameters=1000, ms=2.0, grid=GRID, spread=1.25, **others):
    timings = tuple(Timing(batch, length, ms * batch, ms * batch * spread, 30, 1000 / ms) for batch, length in grid)
    return Cost(parameters=parameters, size_bytes=4 * parameters, timings=timings, **others)


def quality(score=0.9, *, classes=None, wrong=1, metric="accuracy", **others):
    """Of a classifier, if it has classes: every item of a class right but `wrong`, which go to the next one."""
    if classes is not None:
        count = len(classes)
        confusion = [[0] * count for _ in range(count)]
        for index in range(count):
            confusion[index][index] = 20
            confusion[index][(index + 1) % count] += wrong
        others |= {
            "f1_by_class": {name: score - 0.001 * index for index, name in enumerate(classes)},
            "confusion_with_teacher": confusion,
        }
    return Quality(metrics={metric: score}, items=200, **others)


def log(steps, **series):
    """A log of a training; each series is a function of the progress from 0 to 1."""
    return [
        {"step": 10 * (index + 1), "loss": 1.0, **{name: f(index / max(steps - 1, 1)) for name, f in series.items()}}
        for index in range(steps)
    ]


def report(*models, metric="accuracy", higher=True, task="sequence_classification", training=None, **others):
    data = {"name": "snips", "split": "test", "rows": 200, "fingerprint": "abc"}
    values = {"task": task, "data": data, "environment": ENVIRONMENT, "training": training}
    return Report(metric=metric, higher_is_better=higher, models=models, **{**values, **others})


def classifiers(classes=("no", "yes"), *, wrong=1, log_history=None, more=()):
    seen = {
        "agreement": 0.95,
        "kl_to_teacher": 0.0123,
        "calibration_error": 0.03,
        "calibration_error_to_teacher": 0.04,
    }
    return report(
        ModelResult(
            "teacher", TEACHER, "org/big", quality(0.92, classes=classes, wrong=0), cost(4000, 4.0, flops=8000)
        ),
        ModelResult("student", STUDENT, "small", quality(0.9, classes=classes, wrong=wrong, **seen), cost(1000, 2.0)),
        ModelResult("student, undistilled", UNDISTILLED, "small", quality(0.81, classes=classes), cost(1000, 2.1)),
        *more,
        training=None if log_history is None else {"log_history": log_history},
    )


def names(count, length=40):
    return tuple(f"{'a_rather_long_name_of_a_class_'[: length - 4]}{index}" for index in range(count))


def baselines(count):
    return tuple(
        ModelResult(
            f"teacher, method {index}", BASELINE, None, quality(0.9199 - index / 2000), cost(3900 + index, 3.9)
        )
        for index in range(count)
    )


LONG_LOG = log(
    300,
    loss_task=lambda progress: 2 * math.exp(-8 * progress),
    loss_kd=lambda progress: math.nan if 0.5 < progress < 0.6 else 3 - progress,
    loss_a_match_of_hidden_states_with_a_very_long_name=lambda progress: 1e-3 + progress,
    temperature=lambda progress: 8 - 6 * progress,
    temperature_min=lambda progress: 2 - progress,
    temperature_max=lambda progress: 9.0,
    weight_task=lambda progress: progress,
    weight_a_match_of_hidden_states_with_a_very_long_name=lambda progress: 1.0,
)
EVALUATED_LOG = [
    *log(5, loss_task=lambda p: 2 - p, loss_kd=lambda p: 1 - p),
    {"step": 50, "eval_loss": 1.1, "eval_kd": 0.1},
]
LANGUAGE_MODELS = report(
    ModelResult("teacher", TEACHER, None, quality(9.4, metric="perplexity"), cost(4000, 4.0)),
    ModelResult("student", STUDENT, None, quality(12.1, metric="perplexity", agreement=0.7), cost(1000, 2.0)),
    ModelResult("teacher, pruned", BASELINE, None, quality(8340.0, metric="perplexity"), cost(4000, 4.0)),
    metric="perplexity",
    higher=False,
    task="causal_lm",
    training={"log_history": log(1, loss_kd=lambda progress: 0.5, loss_task=lambda progress: None)},
)
REGRESSION = report(
    ModelResult("teacher", TEACHER, None, quality(0.9, metric="pearson"), cost(4000, 4.0, grid=((1, None),))),
    ModelResult("student", STUDENT, None, quality(0.8, metric="pearson"), cost(900, 1.0, grid=((1, None),))),
    metric="pearson",
)
UNLABELLED = report(
    ModelResult("teacher", TEACHER, None, Quality(items=50), cost(4000)),
    ModelResult("student", STUDENT, None, Quality(agreement=0.875, kl_to_teacher=0.2, items=50), cost(2000)),
    metric=None,
)
UNMEASURED = report(
    ModelResult("teacher", TEACHER), ModelResult("student", STUDENT), metric=None, environment={}, data={}
)
LONG_NAMES = report(
    ModelResult(
        "organisation/a-teacher-with-a-name-that-never-ends-v2-final", TEACHER, None, quality(0.9), cost(4000)
    ),
    ModelResult(
        "organisation/a-student-with-a-name-that-never-ends-v2-final", STUDENT, None, quality(0.8), cost(1000)
    ),
)
CASES = {
    "classifiers": classifiers(log_history=LONG_LOG),
    "one class more than fits": classifiers(names(16), log_history=EVALUATED_LOG),
    "fifteen classes": classifiers(names(15), wrong=12345, log_history=[]),
    "77 classes": classifiers(names(77), more=baselines(3)),
    "500 classes": classifiers(names(500), wrong=0),
    "many models": classifiers(more=baselines(8)),
    "language models": LANGUAGE_MODELS,
    "regression": REGRESSION,
    "unlabelled": UNLABELLED,
    "unmeasured": UNMEASURED,
    "long names": LONG_NAMES,
}
