"""A card from what is known of a training: pure, so that equal records make equal cards."""

import re
from collections.abc import Iterator, Sequence
from importlib.resources import files

from huggingface_hub import ModelCard

from hf_distill.card.metadata import NO_OPTIONS, CardOptions, card_data, listed, model_name
from hf_distill.card.papers import arxiv_ids, citations, linked
from hf_distill.card.tables import (
    data_text,
    evaluation_table,
    hyperparameters_text,
    models_table,
    named,
    progress_table,
    stages_text,
    terms_table,
    versions_text,
)
from hf_distill.card.usage import usage
from hf_distill.card.words import sources
from hf_distill.config import DistillationConfig
from hf_distill.losses import LOSSES
from hf_distill.presets import load_preset, preset_names
from hf_distill.provenance import STUDENT_ADAPTERS_OFF
from hf_distill.report.markdown import headline, plot_image, results_table
from hf_distill.report.results import Report
from hf_distill.report.wording import count, escaped, percent
from hf_distill.run_record import RunRecord

_ON_POLICY = "2306.13649"


def render_card(
    record: RunRecord,
    report: Report | None = None,
    *,
    options: CardOptions = NO_OPTIONS,
    plots: Sequence[str] = (),
) -> ModelCard:
    """A student's model card.

    Args:
        record: of its training.
        report: its measures; without them the card has the last evaluation's.
        options: what the user says of language, license, tags, names and data.
        plots: of the report, by their paths relative to the card.
    """
    data, config = card_data(record, report, options), DistillationConfig.from_dict(record.terms)
    name = model_name(record, options)
    template = (files(__package__) / "template.md").read_text(encoding="utf-8")
    card = ModelCard.from_template(
        data,
        template_str="---\n{{ card_data }}\n---\n\n" + template,
        name=escaped(name),
        summary=_summary(record),
        headline="" if report is None else headline(report),
        results=evaluation_table(record) if report is None else results_table(report),
        plots="" if report is None else "\n\n".join(plot_image(report, path) for path in plots),
        usage=usage(record, record.repo_id or name),
        note="" if record.processing else "No tokenizer or processor was saved with the student.",
        models=models_table(record),
        objective=_objective(record, config),
        stages=stages_text(record),
        data=data_text(record, listed(options.dataset or options.dataset_tags)),
        hyperparameters=hyperparameters_text(record),
        progress=progress_table(record),
        versions=versions_text(record),
        citation=_citation(record),
    )
    card.text = re.sub("\n{3,}", "\n\n", card.text).strip() + "\n"
    return card


def _summary(record: RunRecord) -> str:
    student, teacher = record.student, record.teacher
    size = f" of {count(student['parameters'])} parameters" if student.get("parameters") else ""
    of_itself = teacher.get("kind") == STUDENT_ADAPTERS_OFF
    local = f"a `{teacher.get('class')}` of {count(teacher.get('parameters'))}"
    local += f" ({escaped(teacher['name'])})" if teacher.get("name") else ""
    source = "its own base model" if of_itself else named(teacher) if teacher.get("on_hub") else local
    origin = f" It began as {named(student)}." if student.get("on_hub") and not of_itself else ""
    return f"A `{student['class']}`{size}, distilled from {source} with `hf-distill`.{origin}"


def _objective(record: RunRecord, config: DistillationConfig) -> str:
    parts = []
    if record.stages:
        parts.append("By the last stage; those before it are below.")
    if record.preset in preset_names():
        preset = load_preset(str(record.preset))
        parts.append(f"The preset `{preset.name}`: {preset.title}, {linked(preset.paper)}. As it was trained:")
    parts.append(terms_table(config, logit_loss=record.logit_loss, layers=record.layers))
    if record.arguments.get("lmbda"):
        share = percent(record.arguments["lmbda"])
        parts.append(
            linked(f"In {share} of the batches the student answered the prompts itself (arXiv:{_ON_POLICY}).")
        )
    return "\n\n".join(parts)


def _papers(record: RunRecord) -> Iterator[str]:
    if record.preset in preset_names():
        yield load_preset(str(record.preset)).paper
    configs = [DistillationConfig.from_dict(terms) for terms in (record.terms, *(s["terms"] for s in record.stages))]
    for config in configs:
        losses = [config.logits.loss] if config.logits.weight > 0 else []
        losses += [match.loss for match in config.matches if match.weight > 0]
        if config is configs[0] and record.logit_loss is not None and config.logits.weight > 0:
            losses[0] = record.logit_loss
        yield from (LOSSES.get(loss).paper for loss in losses if loss in LOSSES)
        yield sources(config)
    if record.arguments.get("lmbda"):
        yield _ON_POLICY


def _citation(record: RunRecord) -> str:
    entries = citations(arxiv_ids(" ".join(_papers(record))))
    return f"```bibtex\n{entries}\n```" if entries else "No paper is behind these terms."
