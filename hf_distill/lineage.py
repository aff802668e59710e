"""The file that says which stages made a student: what each was asked, what it started from, and what came of it."""

import json
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hf_distill.files import whole_file

LINEAGE_NAME = "lineage.json"
FORMAT = 1
TRAINING, FINISHED = "training", "finished"
_PACKAGES = ("hf-distill", "transformers", "accelerate", "torch", "peft", "datasets")


class Lineage:
    """The stages of a run that have begun, in order; one JSON file in the run's folder, always whole.

    Args:
        folder: the run's `output_dir`.
        writes: whether this process is the one that writes.
    """

    def __init__(self, folder: str | os.PathLike, *, writes: bool) -> None:
        self.path = Path(folder, LINEAGE_NAME)
        self._writes = writes
        self.stages: list[dict[str, Any]] = []

    def read(self) -> None:
        """Takes up what an earlier run left.

        Raises:
            ValueError: the file is none of ours, or of a later version.
        """
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            known = content["format"] == FORMAT
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise ValueError(
                f"{self.path} is no lineage of a run of stages ({error!r}). Take another output_dir."
            ) from error
        if not known:
            raise ValueError(
                f"{self.path} has format {content['format']}, this version reads {FORMAT}. Go on with the version "
                f"that wrote it ({content.get('versions', {}).get('hf-distill')}), or take another output_dir."
            )
        self.stages = content["stages"]

    def as_dict(self) -> dict[str, Any]:
        """What the file holds."""
        return {"format": FORMAT, "stages": self.stages}

    def status(self, number: int) -> str | None:
        """`training`, `finished`, or None for a stage that has not begun; numbers count from 1."""
        return self.stages[number - 1]["status"] if number <= len(self.stages) else None

    def stage(self, number: int) -> dict[str, Any]:
        """The record of a stage that has begun."""
        return self.stages[number - 1]

    def begin(self, number: int, record: Mapping[str, Any], *, resumed_at: int | None) -> None:
        """Notes that a stage trains: from its start, or from a step of an earlier attempt."""
        times: dict[str, Any] = {"began": _now(), "resumed_at_steps": []}
        if resumed_at is not None:
            earlier = self.stage(number)
            times = {"began": earlier["began"], "resumed_at_steps": [*earlier["resumed_at_steps"], resumed_at]}
        # Of the process that trains, and not of the whole run: later stages may run on other versions.
        entry = {"number": number, "status": TRAINING, **_as_json(record), **times, "versions": _versions()}
        self.stages[number - 1 :] = [entry]
        self._write()

    def finish(self, number: int, outcome: Mapping[str, Any], *, student_after: Mapping[str, Any]) -> None:
        """Notes what a stage came to, once its student is saved."""
        stage = self.stage(number)
        stage |= {"status": FINISHED, **_as_json(outcome), "ended": _now()}
        stage["student"]["after"] = _as_json(student_after)
        self._write()

    def check(self, asked: list[Mapping[str, Any]]) -> None:
        """Refuses to go on with other stages than those that began; stages that did not begin may change or be added.

        Raises:
            ValueError: with what differs.
        """
        differences = [
            f"stage {stage['number']} ({stage['name']}) has {key}={stage['asked'].get(key)!r} there, here {value!r}"
            for stage, wanted in zip(self.stages, asked, strict=False)
            for key, value in {**dict.fromkeys(stage["asked"]), **_as_json(wanted)}.items()
            if stage["asked"].get(key) != value
        ]
        differences += [f"stage {s['number']} ({s['name']}) is missing here" for s in self.stages[len(asked) :]]
        if differences:
            raise ValueError(
                f"{self.path} holds a run of other stages: {'; '.join(differences)}. Ask for the same stages, or take "
                "another output_dir."
            )

    def _write(self) -> None:
        if not self._writes:
            return
        with whole_file(self.path) as whole:
            whole.write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")


def _as_json(value: Any) -> Any:
    # What is compared must look as it will when it comes back from the file.
    return json.loads(json.dumps(value, default=str))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _PACKAGES}
