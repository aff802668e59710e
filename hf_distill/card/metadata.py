"""What stands at the head of a card, for the Hub's filters and its table of results."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from transformers.modelcard import TASK_TAG_TO_NAME_MAPPING

from hf_distill.provenance import is_hub_id
from hf_distill.report.results import STUDENT, Report
from hf_distill.run_record import RunRecord
from hf_distill.signals import Task

TAGS = ("knowledge-distillation", "hf-distill", "generated_from_trainer")
# By what the model reads: text, pictures or sound.
_TEXT, _IMAGE, _SOUND = "text", "image", "sound"
_INPUTS = {"pixel_values": _IMAGE, "input_values": _SOUND, "input_features": _SOUND}
_PIPELINES = {
    Task.SEQUENCE_CLASSIFICATION: {
        _TEXT: "text-classification",
        _IMAGE: "image-classification",
        _SOUND: "audio-classification",
    },
    Task.TOKEN_CLASSIFICATION: {_TEXT: "token-classification"},
    Task.QUESTION_ANSWERING: {_TEXT: "question-answering"},
    Task.MULTIPLE_CHOICE: {_TEXT: "multiple-choice"},
    Task.MASKED_LM: {_TEXT: "fill-mask"},
    Task.CAUSAL_LM: {_TEXT: "text-generation"},
    Task.SEQ2SEQ_LM: {
        _TEXT: "text2text-generation",
        _IMAGE: "image-to-text",
        _SOUND: "automatic-speech-recognition",
    },
    Task.CTC: {_SOUND: "automatic-speech-recognition"},
    Task.EMBEDDING: {_TEXT: "feature-extraction", _IMAGE: "image-feature-extraction", _SOUND: "feature-extraction"},
}
# A task to evaluate, but no pipeline of the Hub.
_NO_PIPELINE = ("multiple-choice",)
# What the Hub calls metrics that are called otherwise here.
_METRICS = {"pearson": "pearsonr", "spearman": "spearmanr"}
_KNOWN_METRICS = (
    "accuracy",
    "bleu",
    "cer",
    "exact_match",
    "f1",
    "mae",
    "matthews_correlation",
    "mse",
    "pearsonr",
    "perplexity",
    "precision",
    "recall",
    "rouge",
    "sacrebleu",
    "spearmanr",
    "wer",
)
# Of an evaluation: distances, and what is about the teacher.
_NO_RESULTS = re.compile(r"(.*_)?(loss|kd)|(.*_)?loss_.*|(teacher|retention)_.*")
_NO_METRICS = re.compile(r"(.*_)?(runtime|(samples|steps|tokens)_per_second|epoch|step|time)")


@dataclass(frozen=True)
class CardOptions:
    """What `Trainer.create_model_card` takes; what is None is found out, or left out."""

    language: str | Sequence[str] | None = None
    license: str | None = None
    tags: str | Sequence[str] | None = None
    model_name: str | None = None
    finetuned_from: str | None = None
    tasks: str | Sequence[str] | None = None
    dataset_tags: str | Sequence[str] | None = None
    dataset: str | Sequence[str] | None = None
    dataset_args: str | Sequence[str] | None = None


NO_OPTIONS = CardOptions()


@dataclass(frozen=True)
class _Data:
    """A data set of results, as the Hub knows it."""

    type: str
    name: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None


def card_data(record: RunRecord, report: Report | None, options: CardOptions) -> ModelCardData:
    """The head of a student's card.

    Args:
        record: of its training.
        report: its measures; None: the last evaluation's are shown.
        options: what the user says.
    """
    student, teacher = record.student, record.teacher
    is_adapter = "peft" in student
    base = options.finetuned_from or (student["name"] if student.get("on_hub") else None)
    results = _results(record, report, options)
    pipeline = pipeline_tag(record)
    return ModelCardData(
        language=listed(options.language) or None,
        license=options.license,
        library_name="peft" if is_adapter else "transformers",
        base_model=base,
        base_model_relation=_relation(record) if base else None,
        teacher_model=teacher["name"] if teacher.get("on_hub") else None,
        pipeline_tag=None if pipeline in _NO_PIPELINE else pipeline,
        tags=_tags(record, options, base),
        datasets=_datasets(record, options) or None,
        metrics=[name for name in _KNOWN_METRICS if name in {each.metric_type for each in results}] or None,
        model_name=model_name(record, options),
        eval_results=results or None,
    )


def model_name(record: RunRecord, options: CardOptions) -> str:
    """What the student is called."""
    return options.model_name or record.name or record.student.get("name") or record.student["class"]


def pipeline_tag(record: RunRecord) -> str | None:
    """The Hub's name of the task."""
    reads = _INPUTS.get(str(record.student.get("input")), _TEXT)
    return _PIPELINES[Task(record.task)].get(reads)


def last_metrics(record: RunRecord) -> dict[str, float]:
    """The numbers of the last evaluation of the training, without how long it took; `eval_` is taken off."""
    found: dict[str, float] = {}
    for entry in record.log_history:
        evaluated = {key.removeprefix("eval_"): value for key, value in entry.items() if key.startswith("eval_")}
        found |= {key: value for key, value in evaluated.items() if is_metric(key)}
    return found


def is_metric(name: str) -> bool:
    """Whether what an evaluation logs under that name, without `eval_`, is about the student and not about time."""
    return _NO_METRICS.fullmatch(name) is None


def listed(value: Any) -> list[Any]:
    """A list of what may be one text, several, or None."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def _relation(record: RunRecord) -> str | None:
    """The Hub's word for the way from the base; None for layers cut out of the teacher, for which it has none."""
    if "peft" in record.student:
        return "adapter"
    sizes = (record.teacher.get("parameters"), record.student.get("parameters"))
    cut = record.teacher.get("name") == record.student["name"] and sizes[0] != sizes[1]
    return None if cut else "finetune"


def _tags(record: RunRecord, options: CardOptions, base: str | None) -> list[str]:
    adapter = record.student.get("peft")
    of_peft = [] if adapter is None else ["transformers", *(["lora"] if adapter == "LORA" else [])]
    of_peft += [f"base_model:adapter:{base}"] if adapter is not None and base else []
    return list(dict.fromkeys([*TAGS, *of_peft, *listed(options.tags)]))


def _datasets(record: RunRecord, options: CardOptions) -> list[str]:
    if options.dataset_tags is not None:
        return listed(options.dataset_tags)
    return list(dict.fromkeys(data["name"] for data in _each(record.data) if data.get("on_hub")))


def _each(data: Any) -> Iterator[Mapping[str, Any]]:
    """The data sets of a record, whether one or several by name."""
    if isinstance(data, Mapping):
        if "rows" in data:
            yield data
        else:
            for part in data.values():
                yield from _each(part)


def _results(record: RunRecord, report: Report | None, options: CardOptions) -> list[EvalResult]:
    measured = None if report is None else report.model(STUDENT)
    if measured is not None and measured.quality is not None:
        metrics = dict(measured.quality.metrics)
        if measured.quality.agreement is not None:
            metrics["agreement"] = measured.quality.agreement
    else:
        metrics = {name: value for name, value in last_metrics(record).items() if not _NO_RESULTS.fullmatch(name)}
    # One of a kind: `f1_macro`, and not `f1_micro` too.
    first: dict[str, str] = {}
    for name, value in metrics.items():
        if value is not None and math.isfinite(value):
            first.setdefault(_metric_type(name), name)
    tasks = listed(options.tasks) or [name for name in [pipeline_tag(record)] if name]
    return [
        EvalResult(
            task_type=task,
            task_name=TASK_TAG_TO_NAME_MAPPING.get(task),
            dataset_type=data.type,
            dataset_name=data.name,
            dataset_config=data.config,
            dataset_split=data.split,
            dataset_revision=data.revision,
            metric_type=kind,
            metric_value=round(metrics[name], 6),
            metric_name=name.replace("_", " ").capitalize(),
        )
        for task in tasks
        for data in _measured_on(record, report, options)
        for kind, name in first.items()
    ]


def _metric_type(name: str) -> str:
    """The Hub's name of a metric: of `dev_f1` and `f1_macro` it is f1."""
    name = _METRICS.get(name, name)
    return next((known for known in _KNOWN_METRICS if re.fullmatch(f"(.*_)?{known}(_.*)?", name)), name)


def _measured_on(record: RunRecord, report: Report | None, options: CardOptions) -> list[_Data]:
    tags, names, configs = (listed(each) for each in (options.dataset_tags, options.dataset, options.dataset_args))
    if tags:
        names, configs = names + tags[len(names) :], [*configs, *[None] * len(tags)]
        return [_Data(tag, name, config) for tag, name, config in zip(tags, names, configs, strict=False)]
    known = next(_each(record.data.get("eval")), {})
    if report is not None:
        same = known.get("fingerprint") is not None and known["fingerprint"] == report.data.get("fingerprint")
        known = {**report.data, **known} if same or known.get("name") == report.data.get("name") else report.data
    name = names[0] if names else known.get("name") or "Evaluation set"
    on_hub = bool(known.get("on_hub")) and is_hub_id(known["name"])
    split, config = known.get("split"), known.get("config")
    return [
        _Data(known["name"] if on_hub else "unknown", name, config, split, known.get("revision") if on_hub else None)
    ]
