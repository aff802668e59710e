"""The models of a recipe, and what reads their inputs."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from safetensors import SafetensorError
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer, set_seed

from hf_distill.alignment import is_unnamed
from hf_distill.models.heads import auto_class_name, task_model
from hf_distill.models.loading import NotLoadedError
from hf_distill.models.student import build_student
from hf_distill.recipes.recipe import TASKS, Recipe, StudentPart
from hf_distill.teachers.loading import load_student, load_teacher

_PROCESSORS: dict[str, Any] = {
    "image-classification": AutoImageProcessor,
    "audio-classification": AutoFeatureExtractor,
}


# What loading raises where files are damaged, or do not go together.
_OF_FILES = (OSError, RuntimeError, LookupError, EOFError, pickle.UnpicklingError, SafetensorError)


@dataclass(frozen=True)
class Models:
    """A student and a teacher with what reads their inputs.

    Attributes:
        task: as the Hub calls it.
        student: the model to train.
        teacher: None where the student's own base teaches.
        processor: the student's tokenizer, image processor or feature extractor.
        teacher_processor: the teacher's, where it reads other inputs than the student.
        built: how the student was built from the teacher, in words.
    """

    task: str
    student: Any
    teacher: Any | None
    processor: Any
    teacher_processor: Any | None
    built: str | None = None

    @property
    def labels(self) -> dict[int, str]:
        """The names of the classes by number, in the student's order; the teacher's where the student names none."""
        own = task_model(self.student).config.id2label
        return own if self.teacher is None or not is_unnamed(own) else task_model(self.teacher).config.id2label


def load_models(recipe: Recipe, args: Any) -> Models:
    """Loads the teacher with its own head, and loads or builds the student.

    Args:
        recipe: which.
        args: the seed, and how names are loaded.

    Raises:
        ValueError: a model of another task than the recipe's, or of none that a recipe knows.
    """
    name, teacher = recipe.teacher.name, None
    if name is not None:
        with named("teacher.name", name):
            teacher = load_teacher(name, None, args.teacher_model_init_kwargs)
    set_seed(args.seed)  # new weights are part of the run
    return with_processors(recipe, *_student(recipe.student, teacher, args), teacher=teacher)


def with_processors(recipe: Recipe, student: Any, built: str | None = None, *, teacher: Any) -> Models:
    """The models with what reads their inputs.

    Args:
        recipe: where that is.
        student: a model.
        built: how it was built.
        teacher: a model, or None.

    Raises:
        ValueError: models of another task than the recipe's, or without a tokenizer or processor.
    """
    task = task_of(student if teacher is None else teacher, recipe.task)
    own = recipe.student.processor or recipe.student.name
    teachers = recipe.teacher.processor or recipe.teacher.name
    processor = load_processor(own or teachers or "", task, "student")
    return Models(task, student, teacher, processor, _other_processor(processor, teachers, task), built)


def _student(part: StudentPart, teacher: Any, args: Any) -> tuple[Any, str | None]:
    if part.name is not None:
        with named("student.name", part.name):
            return load_student(part.name, teacher, args.model_init_kwargs), None
    if args.model_init_kwargs:
        raise ValueError("model_init_kwargs are for a student given by name; this one is built. Drop them.")
    shape = {**part.shape, "layers": read_layers(part.layers)}
    built = build_student(teacher, **shape, seed=args.seed)
    # Of a teacher in half precision only what it computes is wanted; the student's optimizer steps need all digits.
    return built.model.float(), str(built.report)


@contextmanager
def named(key: str, name: str) -> Iterator[None]:
    """Errors of the libraries within say what was to be loaded."""
    try:
        yield
    except _OF_FILES as error:
        kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        reason = error.__cause__ if isinstance(error, NotLoadedError) else error  # without the argument's other name
        raise ValueError(f"{key}={name!r} could not be loaded: {kind}{reason}") from error


def read_layers(value: Any) -> Any:
    """Layers as `build_student` takes them; of a text its numbers: `0,2,5`.

    Raises:
        ValueError: a text that holds something else.
    """
    if not isinstance(value, str):
        return value
    try:
        numbers = [int(number) for number in value.split(",")]
    except ValueError:
        raise ValueError(f"student.layers={value!r}, expected a number (6), or their numbers (0,2,5).") from None
    return numbers if "," in value else numbers[0]


def adapters(part: StudentPart) -> LoraConfig | None:
    """The adapters that a student trains, of all linear layers unless it says which.

    Raises:
        ValueError: an option that LoraConfig does not know.
    """
    if part.lora is None:
        return None
    try:
        return LoraConfig(**{"target_modules": "all-linear", **part.lora})
    except TypeError as error:
        raise ValueError(f"student.lora: {error}") from error


def task_of(model: Any, expected: str | None = None) -> str:
    """The task of a model, as the Hub calls it.

    Raises:
        ValueError: it has another head than expected, or one that no recipe knows.
    """
    auto_class, name = auto_class_name(model), type(task_model(model)).__name__
    if expected is not None and auto_class != TASKS[expected]:
        raise ValueError(f"task={expected!r} needs models with the head of {TASKS[expected]}, and this is a {name}.")
    found = next((task for task, known in TASKS.items() if known == auto_class), None)
    if found is None:
        raise ValueError(
            f"A recipe cannot train a {name}: it does {', '.join(TASKS)}. Write the training with DistillationTrainer."
        )
    return found


def load_processor(name: str, task: str, whose: str) -> Any:
    """What reads the inputs of a model of the task.

    Raises:
        ValueError: there is none.
    """
    try:
        found = _PROCESSORS.get(task, AutoTokenizer).from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"No tokenizer or processor of the {whose} could be loaded from {name!r}. Name one: "
            f"{whose}.processor. ({error})"
        ) from error
    # Some tokenizer classes make up an empty one where none was saved with the model.
    if hasattr(found, "get_vocab") and len(found) <= len(found.all_special_ids):
        raise ValueError(f"No tokenizer was saved in {name!r}. Name one: {whose}.processor.")
    return found


def _other_processor(processor: Any, name: str | None, task: str) -> Any | None:
    # The teacher's own, where it makes other inputs than the student's.
    if name is None:
        return None
    other = load_processor(name, task, "teacher")
    if hasattr(processor, "get_vocab"):
        return None if processor.get_vocab() == other.get_vocab() else other
    return None if processor.to_dict() == other.to_dict() else other
