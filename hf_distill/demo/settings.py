"""The demo's settings; the command line is generated from them."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class DemoSettings:
    """What the demo trains, on what, and for how long."""

    dataset: str = field(
        default="snips",
        metadata={"help": "'snips' (bundled), a dataset on the Hub, a local folder, or a .csv/.json file."},
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    label_column: str = field(
        default="label", metadata={"help": "Column that holds the class, as a name or a number."}
    )
    teacher: str | None = field(
        default=None, metadata={"help": "Hub or local name of the teacher. Default: BERT 2x128, trained from scratch."}
    )
    student: str | None = field(
        default=None, metadata={"help": "Hub or local name of the student. Default: BERT 1x64, trained from scratch."}
    )
    labels_per_class: int = field(default=10, metadata={"help": "Labelled rows of each class that the student gets."})
    seeds: int = field(default=3, metadata={"help": "Students of each kind; seeds 0, 1, ..."})
    teacher_steps: int = field(
        default=400, metadata={"help": "Training steps of the teacher; 0 for a teacher that is already fine-tuned."}
    )
    student_steps: int = field(default=300, metadata={"help": "Training steps of each student."})
    batch_size: int = field(default=64, metadata={"help": "Rows in a training step."})
    teacher_learning_rate: float | None = field(
        default=None, metadata={"help": "Default: 1e-3 from scratch, 1e-4 for a pretrained model."}
    )
    student_learning_rate: float | None = field(
        default=None, metadata={"help": "Default: 3e-3 from scratch, 1e-4 for a pretrained model."}
    )
    temperature: float = field(default=2.0, metadata={"help": "Distillation temperature, > 0."})
    kd_weight: float = field(default=0.9, metadata={"help": "Weight of the distillation loss."})
    task_weight: float = field(default=0.1, metadata={"help": "Weight of the loss on the labels."})
    max_length: int = field(default=64, metadata={"help": "Tokens kept of each text."})
    threads: int = field(default=1, metadata={"help": "CPU threads; one is fastest for models this small."})
    output_dir: str = field(default="demo-results", metadata={"help": "Where results.json and the models go."})

    def __post_init__(self) -> None:
        for name in ("labels_per_class", "seeds", "student_steps", "batch_size", "max_length", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but is {getattr(self, name)}.")
        if self.teacher_steps < 0:
            raise ValueError(f"teacher_steps must be at least 0, but is {self.teacher_steps}.")
        if self.teacher_steps == 0 and self.teacher is None:
            raise ValueError("teacher_steps=0 leaves a teacher from scratch untrained; name a fine-tuned `teacher`.")
