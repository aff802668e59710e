"""What the trainer leaves beside a student: the record of its training, its report and its card."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers.modelcard import TrainingSummary
from transformers.utils import logging

from hf_distill.card import CardOptions, write_card
from hf_distill.card.metadata import model_name
from hf_distill.card.writing import with_known
from hf_distill.report.live import report_of
from hf_distill.report.results import Report
from hf_distill.run_record import EVIDENCE_FOLDER, RunRecord, record_path


class EvidenceMixin:
    """`Trainer`'s `save_model` and `create_model_card` of a student with a teacher, and `report`."""

    teacher: Any
    args: Any
    state: Any
    accelerator: Any
    is_world_process_zero: Callable[[], bool]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """`Trainer`'s; a student that is saved in `args.output_dir` has its record beside it, in `distillation/`."""
        super().save_model(output_dir, _internal_call=_internal_call)  # type: ignore[misc]
        is_own = output_dir is None or os.path.realpath(output_dir) == os.path.realpath(self.args.output_dir)
        if is_own and not _internal_call and self.teacher is not None and self.is_world_process_zero():
            self._record().write(self.args.output_dir)

    def report(self, dataset: Any = None, **options: Any) -> Report:
        """Measures what the student kept and gained, and writes it to `distillation/` in `args.output_dir`.

        The main process measures, and the others wait for it, as long as `args.ddp_timeout` lets them. A line says
        what is measured now, unless `args.disable_tqdm`.

        Args:
            dataset: rows to measure on; None: `eval_dataset`.
            options: as `hf_distill.make_report` takes them, such as `undistilled=` or `baselines=()`.

        Raises:
            ValueError: there is no teacher to compare with, or the student is sharded.
        """
        found: list[Any] = [None]
        if self.accelerator.num_processes > 1 and dataset is not None:
            # To tokenise text, one process goes first and waits for the others.
            dataset = self._with_tokens(dataset, "eval_dataset")  # type: ignore[attr-defined]
        if self.is_world_process_zero():
            try:
                found = [self._measure(dataset, options)]
            except Exception as error:
                if self.accelerator.num_processes == 1:
                    raise
                found = [error]  # the others must not wait for what never comes
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found)
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]

    def _measure(self, dataset: Any, options: Mapping[str, Any]) -> Report:
        folder = Path(self.args.output_dir, EVIDENCE_FOLDER)
        record = None if self.teacher is None else self._record()
        if record is not None and "output_dir" not in options:
            record.write(self.args.output_dir)
        own = {"output_dir": folder, "training": record and record.to_dict()}
        with logging.tqdm(bar_format="{desc} [{elapsed}]", leave=False, disable=self.args.disable_tqdm) as line:
            return report_of(self, dataset, **{**own, "progress": line.set_description_str, **options})

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Writes `README.md` with what was distilled from what, how, and what came of it.

        The arguments are `Trainer.create_model_card`'s. Call `report()` before for a card with its table and plots. A
        card that somebody wrote by hand is kept as `_README.old.md`.
        """
        given: dict[str, Any] = {
            "language": language,
            "license": license,
            "tags": tags,
            "model_name": model_name,
            "finetuned_from": finetuned_from,
            "tasks": tasks,
            "dataset_tags": dataset_tags,
            "dataset": dataset,
            "dataset_args": dataset_args,
        }
        if self.teacher is None:
            super().create_model_card(**given)  # type: ignore[misc]
            return
        if not self.is_world_process_zero():
            return
        folder, record = self.args.output_dir, self._record()
        record.write(folder)
        options = _with_license(with_known(CardOptions(**given), folder), record)
        write_card(folder, record=record, options=options)

    def _record(self) -> RunRecord:
        """The record as it is now; of a student that an earlier process trained, what that one wrote."""
        record = RunRecord.of(self)
        if self.state.global_step > 0 or not record_path(self.args.output_dir).is_file():
            return record
        earlier = RunRecord.read(self.args.output_dir)
        return earlier.with_logs(record.log_history) if earlier.same_student(record) else record


def _with_license(options: CardOptions, record: RunRecord) -> CardOptions:
    """The options with the license of the student's origin, which `Trainer` asks the Hub for."""
    origin = options.finetuned_from or (record.student["name"] if record.student.get("on_hub") else None)
    summary = TrainingSummary(model_name(record, options), license=options.license, finetuned_from=origin)
    return replace(options, license=summary.license)
