"""The card as a file: what a user wrote is kept, what is known already is taken up."""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers.utils import logging

from hf_distill.card.metadata import NO_OPTIONS, CardOptions
from hf_distill.card.rendering import render_card
from hf_distill.files import whole_file
from hf_distill.report.plots import PLOTS
from hf_distill.report.results import Report
from hf_distill.run_record import EVIDENCE_FOLDER, RunRecord

CARD_NAME = "README.md"
KEPT_NAME = "_README.old.md"  # a push leaves out what begins with an underscore
REPORT_NAME = "report.json"
_MARK = re.compile(r"<!-- Written by hf-distill \(text ([0-9a-f]{12})\)[^>]*-->\n*")
_OF_PEFT = "# Model Card for Model ID"

logger = logging.get_logger(__name__)


def write_card(
    folder: str | os.PathLike,
    *,
    record: RunRecord | None = None,
    report: Report | None = None,
    options: CardOptions = NO_OPTIONS,
) -> Path:
    """Writes a student's `README.md` and returns its path.

    Language, license, tags and data sets of an earlier card stay, unless the options have others. A card that somebody
    wrote by hand or changed is kept beside it, as `_README.old.md`.

    Args:
        folder: where the student is saved.
        record: of its training; None: what the folder holds.
        report: its measures; None: what the folder holds of this student, if anything.
        options: what the user says.

    Raises:
        FileNotFoundError: no record is given, and the folder has none.
        ValueError: what the folder holds cannot be read.
    """
    folder = Path(folder)
    record = RunRecord.read(folder) if record is None else record
    report = read_report(folder, record) if report is None else report
    path = folder / CARD_NAME
    before = path.read_text(encoding="utf-8") if path.is_file() else None
    if before is not None:
        _keep(path, before)
        options = with_known(options, folder)
    plots = [f"{EVIDENCE_FOLDER}/{name}" for name in PLOTS if (folder / EVIDENCE_FOLDER / name).is_file()]
    card = render_card(record, report, options=options, plots=plots)
    with whole_file(path) as whole:
        whole.write_text(marked(card), encoding="utf-8")
    return path


def with_known(options: CardOptions, folder: str | os.PathLike) -> CardOptions:
    """The options, filled in with what the card in a folder says, if there is one."""
    path = Path(folder, CARD_NAME)
    if not path.is_file():
        return options
    known = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    found: dict[str, Any] = {}
    for name in ("language", "license"):
        if getattr(options, name) is None and known.get(name) is not None:
            found[name] = known.get(name)
    if options.dataset_tags is None and known.get("datasets") is not None:
        found["dataset_tags"] = known.get("datasets")
    of_base = [tag for tag in known.get("tags", []) if not tag.startswith("base_model:")]
    given = [options.tags] if isinstance(options.tags, str) else [*(options.tags or ())]
    found["tags"] = list(dict.fromkeys([*given, *of_base]))
    return replace(options, **found)


def marked(card: ModelCard) -> str:
    """The text of a card, with a mark by which changes to it are seen."""
    text = card.text.strip()
    mark = f"<!-- Written by hf-distill (text {_hash(text)}). If you change the text, it is kept as {KEPT_NAME}. -->"
    return f"---\n{card.data.to_yaml()}\n---\n\n{mark}\n\n{text}\n"


def read_report(folder: str | os.PathLike, record: RunRecord) -> Report | None:
    """The report in a folder, unless it is of another student than the record."""
    path = Path(folder, EVIDENCE_FOLDER, REPORT_NAME)
    if not path.is_file():
        return None
    report = Report.read_json(path)
    measured: Mapping[str, Any] = (report.training or {}).get("student") or {}
    weights = record.student.get("weights")
    if measured.get("weights") is not None and weights is not None and measured["weights"] != weights:
        logger.warning(
            f"{path} is of a student with other weights ({measured['weights']}, and these are {weights}): the card "
            "leaves it out. Measure again: trainer.report()."
        )
        return None
    return report


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _keep(path: Path, before: str) -> None:
    """Puts a card aside that was not written, or not left, as we write it."""
    text = ModelCard(before, ignore_metadata_errors=True).text
    mark = _MARK.search(text)
    ours = mark is not None and mark[1] == _hash(_MARK.sub("", text).strip())
    if ours or _OF_PEFT in text:
        return
    kept, number = path.with_name(KEPT_NAME), 1
    while kept.exists() and kept.read_text(encoding="utf-8") != before:
        number += 1
        kept = path.with_name(KEPT_NAME.replace(".old", f".old{number}"))
    with whole_file(kept) as whole:
        whole.write_text(before, encoding="utf-8")
    logger.warning(f"{path} was not written by hf-distill, or was changed since: it is kept as {kept.name}.")
