"""The parts of a card as Markdown: models, terms, stages, data, hyperparameters and results."""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_distill.card.metadata import is_metric, last_metrics
from hf_distill.card.papers import linked
from hf_distill.card.words import balance_in_words, logits_in_words, match_in_words, weight_in_words
from hf_distill.config import DistillationConfig
from hf_distill.losses import LOSSES
from hf_distill.provenance import STUDENT_ADAPTERS_OFF
from hf_distill.report.wording import NOTHING, count, escaped, number
from hf_distill.run_record import RunRecord

_MAX_ROWS = 20
_ALWAYS_SHOWN = ("eval_loss", "eval_kd", "eval_agreement")
_OTHERS_SHOWN = 3
_PACKAGES = {
    "peft": "PEFT",
    "hf-distill": "hf-distill",
    "transformers": "Transformers",
    "torch": "PyTorch",
    "accelerate": "Accelerate",
    "datasets": "Datasets",
    "tokenizers": "Tokenizers",
    "huggingface-hub": "huggingface_hub",
}
_MEANINGS = {
    "loss": "the student's own loss on the labels",
    "kd": "mean distance of the student's logits from the teacher's",
    "agreement": "how often the student chooses as the teacher does",
}
_UNREMARKABLE = {"max_steps": -1, "gradient_accumulation_steps": 1, "warmup_steps": 0, "weight_decay": 0.0}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, aligned to the left."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows])


def named(model: Mapping[str, Any]) -> str:
    """A model's name, as a link where the Hub has it."""
    name = model.get("name")
    if name is None:
        return "not named"
    revision = f" at `{str(model['revision'])[:12]}`" if model.get("revision") else ""
    return f"[{escaped(name)}](https://huggingface.co/{name}){revision}" if model.get("on_hub") else escaped(name)


def models_table(record: RunRecord) -> str:
    """Teacher and student side by side."""
    teacher, student = record.teacher, record.student
    rows = [["Teacher", *_model_cells(teacher)], ["Student", *_model_cells(student)]]
    text = table(["", "From", "Class", "Parameters", "Hash of the weights"], rows)
    if "peft" in student:
        trained = student.get("trained_parameters")
        text += f"\n\nThe student is an adapter ({escaped(student['peft'])}) of {count(trained)} trained parameters."
    return text


def _model_cells(model: Mapping[str, Any]) -> list[str]:
    own = STUDENT_ADAPTERS_OFF if model.get("kind") == STUDENT_ADAPTERS_OFF else named(model)
    weights = model.get("weights")
    return [
        own,
        f"`{model.get('class')}`",
        count(model.get("parameters")),
        f"`{weights}`" if weights else NOTHING,
    ]


def terms_table(
    config: DistillationConfig,
    *,
    logit_loss: str | None = None,
    layers: Mapping[str, Sequence[Sequence[str | None]]] | None = None,
) -> str:
    """Every term with its weight, its loss, what it compares and where it comes from.

    Args:
        config: the terms.
        logit_loss: the loss of the logits that was computed, if it is another than the config's.
        layers: the pairs of layers of each match, where they are known.
    """
    rows = []
    if config.task.weight > 0:
        rows.append(["`task`", weight_in_words(config.task), "the student's own", "on the labels", ""])
    if config.logits.weight > 0:
        loss = logit_loss or config.logits.loss
        rows.append(_term("kd", config.logits, loss, logits_in_words(config.logits)))
    for match in config.matches:
        if match.weight > 0:
            words = match_in_words(match, (layers or {}).get(match.name, ()))
            rows.append(_term(match.name, match, match.loss, words))
    text = table(["Term", "Weight", "Loss", "How", "Source"], rows)
    return "\n\n".join(filter(None, [text, linked(balance_in_words(config.balance))]))


def _term(name: str, term: Any, loss: str, words: str) -> list[str]:
    paper = LOSSES.get(loss).paper if loss in LOSSES else ""
    cells = words.replace("|", "\\|")
    return [f"`{name}`", weight_in_words(term), f"`{loss}`", cells, linked(escaped(paper))]


def stages_text(record: RunRecord) -> str:
    """What each stage did, in order; nothing for a training in one piece."""
    if not record.stages:
        return ""
    rows = []
    for number_, stage in enumerate(record.stages, 1):
        teacher = stage["teacher"]
        of_before = "the student of the stage before"
        metrics = {key: value for key, value in stage["metrics"].items() if key in ("train_loss", "eval_loss")}
        rows.append(
            [
                str(number_),
                escaped(stage["name"]),
                of_before if teacher.get("origin") == "previous" else named(teacher) if teacher else NOTHING,
                f"`{stage['student'].get('class')}`, {count(stage['student'].get('parameters'))}",
                f"{stage['data'].get('rows') or NOTHING}",
                f"{stage['steps']}",
                f"{number(stage['learning_rate'])}",
                ", ".join(f"{key} {number(value)}" for key, value in metrics.items()) or NOTHING,
            ]
        )
    header = ["", "Stage", "Teacher", "Student", "Rows", "Steps", "Learning rate", "Came to"]
    parts = [table(header, rows)]
    for stage in record.stages:
        config = DistillationConfig.from_dict(stage["terms"])
        parts.append(f"What **{escaped(stage['name'])}** minimised:\n\n{terms_table(config)}")
    return "\n\n".join(parts)


def data_text(record: RunRecord, names: Sequence[str] = ()) -> str:
    """Which rows trained and which were evaluated.

    Args:
        record: of the training.
        names: what the user calls the data, where it does not say so itself.
    """
    called = ", ".join(names) or None
    rows = []
    for part, data in (("Training", record.data.get("train")), ("Evaluation", record.data.get("eval"))):
        several = isinstance(data, Mapping) and "rows" not in data
        for name, each in (data if several else {"": data}).items():  # type: ignore[union-attr]
            if each is not None:
                rows.append(
                    [f"{part} {escaped(name)}".strip(), *_data_cells({**each, "name": each.get("name") or called})]
                )
    if not rows:
        return "Not known."
    return table(["", "Data set", "Split", "Rows", "Fingerprint"], rows)


def _data_cells(data: Mapping[str, Any]) -> list[str]:
    name = data.get("name")
    if name is not None and data.get("on_hub"):
        revision = f" at `{str(data['revision'])[:12]}`" if data.get("revision") else ""
        name = f"[{escaped(name)}](https://huggingface.co/datasets/{name}){revision}"
    elif name is not None:
        name = escaped(name)
    config = f" ({escaped(data['config'])})" if data.get("config") else ""
    fingerprint = f"`{data['fingerprint']}`" if data.get("fingerprint") else NOTHING
    rows = f"{data['rows']:,}" if data.get("rows") is not None else NOTHING
    return [f"{name or _unnamed(data)}{config}", escaped(data.get("split") or NOTHING), rows, fingerprint]


def _unnamed(data: Mapping[str, Any]) -> str:
    files = ", ".join(escaped(name) for name in data.get("files", ()))
    builder = f" (builder `{data['builder']}`)" if data.get("builder") else ""
    return f"{f'local files: {files}' if files else 'not named'}{builder}"


def hyperparameters_text(record: RunRecord) -> str:
    """The settings of the training; of stages those that they share or the last one had."""
    shown = {key: value for key, value in record.arguments.items() if _UNREMARKABLE.get(key, ...) != value}
    if shown.get("max_steps") is not None:
        shown.pop("num_train_epochs", None)
    lines = [f"- {key}: {_value(value)}" for key, value in shown.items()]
    hardware = record.hardware
    device = escaped(hardware.get("name") or hardware.get("device"))
    processes = hardware.get("processes") or 1
    lines.append(f"- hardware: {device}" + (f", {processes} processes" if processes > 1 else ""))
    if record.wall_time_s is not None:
        lines.append(f"- training time: {number(record.wall_time_s, 3)} s")
    return "\n".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_value(part)}" for key, part in value.items())
    return escaped(f"{value:g}" if isinstance(value, float) else value)


def evaluation_table(record: RunRecord) -> str:
    """The last evaluation of the training, where no report measured more."""
    metrics = last_metrics(record)
    if not metrics:
        return "No evaluation was made."
    rows = [[f"`{name}`", number(value), _MEANINGS.get(name, "")] for name, value in metrics.items()]
    return table(["Of the last evaluation", "Value", ""], rows)


def progress_table(record: RunRecord) -> str:
    """The losses at each evaluation, or at each log where nothing was evaluated; at most 20 rows, evenly chosen."""
    entries: list[dict[str, Any]] = []
    latest: dict[str, Any] = {}
    evaluated = any("eval_loss" in entry for entry in record.log_history)
    for entry in record.log_history:
        if "loss" in entry:
            latest = {key: value for key, value in entry.items() if key == "loss" or key.startswith("loss_")}
        if "eval_loss" in entry or (not evaluated and "loss" in entry):
            scores = {key: value for key, value in entry.items() if key.startswith("eval_") and is_metric(key[5:])}
            others = [key for key in scores if key not in _ALWAYS_SHOWN]
            scores = {key: value for key, value in scores.items() if key not in others[_OTHERS_SHOWN:]}
            now = {"step": entry.get("step"), "epoch": entry.get("epoch")}
            if entries and entries[-1]["step"] == now["step"]:  # evaluated once more after the training
                entries.pop()
            entries.append({**now, **latest, **scores})
    if len(entries) > _MAX_ROWS:
        last = len(entries) - 1
        entries = [entries[round(index * last / (_MAX_ROWS - 1))] for index in range(_MAX_ROWS)]
    names = sorted(
        dict.fromkeys(name for entry in entries for name in entry), key=lambda name: name.startswith("eval_")
    )
    rows = [[number(entry.get(name)) if name != "step" else str(entry[name]) for name in names] for entry in entries]
    return table(names, rows) if rows else ""


def versions_text(record: RunRecord) -> str:
    """The packages, as `Trainer` and PEFT list them."""
    shown = {name: label for name, label in _PACKAGES.items() if name != "peft" or "peft" in record.student}
    return "\n".join(f"- {label} {record.versions[name]}" for name, label in shown.items() if name in record.versions)
