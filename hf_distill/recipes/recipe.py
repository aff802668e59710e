"""What a recipe may say. Nothing heavy is imported here, so that `--help` can print it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Task -> the Auto class of its models, by the names that the Hub has for tasks.
TASKS = {
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
    "fill-mask": "AutoModelForMaskedLM",
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
    "audio-classification": "AutoModelForAudioClassification",
}


def _help(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TeacherPart:
    """The section `teacher`; its name alone may stand for it."""

    name: str | None = _help("Hub name or folder; none for a student with lora, whose base then teaches.")
    processor: str | None = _help("Where its tokenizer or processor is, if not with it.")


@dataclass(frozen=True)
class StudentPart:
    """The section `student`; its name alone may stand for it. Without a name it is built from the teacher.

    Raises:
        ValueError: neither says what the student is, or both do.
    """

    name: str | None = _help("Hub name or folder of a student that is trained as it is.")
    processor: str | None = _help("Where its tokenizer or processor is, if not with it (or with the teacher).")
    layers: int | str | list | dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Of the teacher's layers: how many (6), which ([0, 2, 5]), or by stack ({decoder: 2})."},
    )
    hidden_size: int | None = _help("Width of the residual stream.")
    heads: int | None = _help("Attention heads to keep.")
    intermediate_size: int | None = _help("Width of the feed-forward layers.")
    init: str | None = _help("Weights of a narrower student: slice, importance, svd or random.")
    architecture: str | None = _help("model_type to copy into, e.g. distilbert.")
    lora: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Adapters to train in place of the weights: the options of peft.LoraConfig."},
    )

    @property
    def shape(self) -> dict[str, Any]:
        """How it is built from the teacher."""
        names = ("layers", "hidden_size", "heads", "intermediate_size", "init", "architecture")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def __post_init__(self) -> None:
        if self.name is not None and self.shape:
            raise ValueError(
                f"student.name={self.name!r} is trained as it is, and student.{', student.'.join(self.shape)} builds "
                "one from the teacher. Drop one of them; `hf-distill student` writes a built one to a folder."
            )
        if self.name is None and not self.shape:
            raise ValueError(
                "student says nothing. Give its name (student: distilbert-base-uncased), or how it is built from the "
                "teacher (student: {layers: 6})."
            )


@dataclass(frozen=True)
class DataPart:
    """The section `data`; `train` alone may stand for it.

    Raises:
        ValueError: a part of the rows that is none.
    """

    train: str = _help("A file (csv, json, jsonl, parquet, txt), a folder, a saved data set, or a name on the Hub.")
    eval: str | None = _help("The same, for evaluation; not given: a split of train's source.")
    config: str | None = _help("Configuration of a data set with several, e.g. sst2 of glue.")
    train_split: str | None = _help("Split to train on (train); train[:1000] takes a part.")
    eval_split: str | None = _help("Split to evaluate on; not given: validation or test, where there is one.")
    test_fraction: float = _help("Share of the rows held out where there is no split for evaluation; 0 for none.", 0.1)
    columns: dict[str, str] = field(
        default_factory=dict, metadata={"help": "What the columns are called, as {text: sentence, label: intent}."}
    )
    max_length: int | None = _help(
        "Tokens kept of a text; not given: what both models read. Of text-generation it is arguments.max_length."
    )
    mask_probability: float | None = _help("Share of the tokens that fill-mask hides; 0.15 unless given.")

    def __post_init__(self) -> None:
        if not self.train:
            raise ValueError("data.train is missing: name a file, a folder or a data set on the Hub.")
        if not 0 <= self.test_fraction < 1:
            raise ValueError(f"data.test_fraction={self.test_fraction}, but it is a share of the rows, in [0, 1).")
        if self.mask_probability is not None and not 0 < self.mask_probability < 1:
            raise ValueError(f"data.mask_probability={self.mask_probability}, but it is a share, between 0 and 1.")


@dataclass(frozen=True)
class Recipe:
    """A training from models and data to a saved student.

    Raises:
        ValueError: sections that do not go together.
    """

    data: DataPart = field(metadata={"help": "What it learns from."})
    student: StudentPart = field(metadata={"help": "What is trained."})
    teacher: TeacherPart = field(default=TeacherPart(), metadata={"help": "What it learns from."})
    task: str | None = _help(f"Checked against the models if given: {', '.join(TASKS)}.")
    arguments: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Fields of DistillationTrainingArguments; output_dir is needed."}
    )
    stages: str | list | None = field(
        default=None,
        metadata={
            "help": "Trainings one after another: the name of a preset, or a list of {name, distillation, training, "
            "teacher, student}."
        },
    )
    metrics: bool | dict[str, Any] = field(
        default=True, metadata={"help": "Whether the task's metrics are computed, or their options."}
    )
    report: bool | dict[str, Any] = field(
        default=False, metadata={"help": "Whether to measure teacher and student at the end, or how."}
    )
    card: bool = _help("Whether a model card is written.", True)

    def __post_init__(self) -> None:
        if self.student.shape and self.teacher.name is None:
            raise ValueError("student is built from the teacher, and teacher.name is missing.")
        if self.student.lora is not None and self.stages is not None:
            raise ValueError("student.lora beside stages: stages hand on whole students. Drop one of them.")
        if self.report is not False and self.teacher.name is None:
            raise ValueError("report compares the student with a teacher of its own, and teacher.name is missing.")

    @property
    def report_options(self) -> Mapping[str, Any] | None:
        """How the report is made; None for no report."""
        if self.report is False:
            return None
        return {} if self.report is True else self.report
