"""From the matches asked for to the terms of a training, refusing before the first step what cannot work."""

from collections.abc import Callable
from copy import deepcopy
from itertools import islice
from typing import Any

from torch import nn
from transformers.utils.quantization_config import QuantizationMethod

from hf_distill.batches import TARGETS
from hf_distill.config import ALWAYS, MatchTerm
from hf_distill.dataset_checks import is_indexed, random_states_kept
from hf_distill.gathering import gather_rows
from hf_distill.learned import learned_modules
from hf_distill.matching import NOTHING, LayerTerms, plan_layers
from hf_distill.models.architectures import layerdrop
from hf_distill.models.heads import decoder_inputs, task_model
from hf_distill.signals import Task


def make_layer_terms(trainer: Any, student: nn.Module) -> LayerTerms | None:
    """The terms between layers that a trainer's arguments ask for, and what else trains; None without either.

    Both models see the training set's first rows, without a trace: so widths, heads and lengths are known, every
    match is computed once, and what does not fit is refused now.

    Args:
        trainer: a `DistillationTrainer` that is otherwise ready.
        student: its student.

    Raises:
        ValueError: a match that cannot work, with the reason and the remedy.
    """
    terms = tuple(match for match in trainer.args.distillation.matches if match.weight > 0)
    learned = learned_modules(trainer.args.distillation, seed=trainer.args.seed)
    if not (terms or learned) or trainer.train_dataset is None:
        return None
    _check_sharding(trainer, [*(f"match {term.name!r}" for term in terms), *learned][0])
    _place(trainer, student)
    if not terms:
        return _attached_once(LayerTerms(NOTHING, student, None, **_surroundings(trainer), learned=learned), student)
    teacher = trainer.teacher if any(term.asks_teacher for term in terms) else None
    _check_models(trainer, student, terms)
    batch = trainer.split(trainer._prepare_inputs(_first_batch(trainer)))
    arguments = {name: value for name, value in batch.student.items() if name not in TARGETS}
    if trainer._pair.task is Task.SEQ2SEQ_LM and "decoder_input_ids" not in arguments and "labels" in batch.labels:
        arguments |= decoder_inputs(student, batch.labels["labels"])
    with trainer.accelerator.autocast():
        plan = plan_layers(
            terms,
            student,
            teacher,
            batch,
            arguments,
            special_tokens=trainer._special_tokens,
            other_tokens=trainer._pair.needs_teacher_inputs,
        )
    layers = LayerTerms(plan, student, teacher, **_surroundings(trainer), learned=learned)

    def try_once() -> None:
        with trainer.accelerator.autocast():
            layers.try_once(batch, arguments)

    return _attached_once(layers, student, try_once)


def _surroundings(trainer: Any) -> dict[str, Any]:
    return {
        "seed": trainer.args.seed,
        "special_tokens": trainer._special_tokens,
        "gather": lambda rows: gather_rows(rows, trainer.accelerator),
        "rank": trainer.accelerator.process_index,
    }


def _attached_once(layers: LayerTerms, student: nn.Module, run: Callable[[], None] = lambda: None) -> LayerTerms:
    """The terms, after they were attached for a run: PEFT may refuse the modules."""
    layers.start(student)
    try:
        run()
    finally:
        layers.stop()
    return layers


def _place(trainer: Any, student: nn.Module) -> None:
    """Moves the student to the batches: `Trainer` does so late with `model_init` and an evaluation in 16 bits."""
    places_itself = trainer.is_model_parallel or trainer.is_distributed_loading_by_transformers
    quantized = getattr(student, "quantization_method", None) == QuantizationMethod.BITS_AND_BYTES
    if not places_itself and not quantized:
        trainer._move_model_to_device(student, trainer.args.device)


def _first_batch(trainer: Any) -> dict[str, Any]:
    """The first rows of the training set as a batch; no random state is changed by looking at them."""
    dataset = trainer.train_dataset
    number = min(2, trainer.args.per_device_train_batch_size)  # rows of unequal length may never meet in a batch
    if _read_once(dataset):
        raise ValueError(
            "train_dataset can be read only once (its iterator is itself), and matches between layers look at its "
            "first rows beforehand: the training would lose them. Give a data set that can be iterated anew."
        )
    collator = _copied(trainer.data_collator, trainer)
    collate = trainer._get_collator_with_removed_columns(collator, description="training")
    with random_states_kept():
        if is_indexed(dataset):
            rows = [dataset[index] for index in range(min(number, len(dataset)))]
        else:
            rows = list(islice(dataset, number))
        if not rows:
            raise ValueError("train_dataset is empty: there is nothing to learn from.")
        return collate(rows)


def _copied(collator: Any, trainer: Any) -> Any:
    """A copy of a collator: one with a seed draws its first random numbers in the training."""
    models = [trainer.model, *(() if trainer.teacher is None else (trainer.teacher.model,))]
    kept = {id(module): module for model in models for module in model.modules()}  # a collator may hold one
    try:
        return deepcopy(collator, kept)
    except (TypeError, RuntimeError):  # some things, such as locks, have no copy
        return collator


def _read_once(dataset: Any) -> bool:
    """Whether looking at a data set's rows takes them from the training."""
    return not is_indexed(dataset) and iter(dataset) is iter(dataset)


def _check_sharding(trainer: Any, what: str) -> None:
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            f"The {what} trains or reads something inside the student, which FSDP and DeepSpeed (ZeRO) take apart: "
            "this is untested, so it is refused. Train with DDP, or drop matches, learned temperature and balance."
        )


def _check_models(trainer: Any, student: nn.Module, terms: tuple[MatchTerm, ...]) -> None:
    teacher = trainer.teacher
    asking = [term.name for term in terms if term.asks_teacher]
    if asking and teacher is None:
        raise ValueError(f"Match {asking[0]!r} compares the student's layers with a teacher's. Pass teacher_model=.")
    if asking and not hasattr(teacher, "prepare_recording"):
        raise ValueError(
            f"The teacher, a {type(teacher).__name__}, gives logits only, and match {asking[0]!r} needs what is "
            "inside it. Pass a model as teacher_model, or drop the match."
        )
    dropped = layerdrop(student)
    if dropped > 0:
        raise ValueError(
            f"The student ({type(task_model(student)).__name__}) leaves out {dropped:.0%} of its layers at random "
            "(layerdrop), so a layer's number means another layer at every step. Set layerdrop (encoder_layerdrop, "
            "decoder_layerdrop) to 0 in the student's config."
        )
    windows = [term.name for term in terms if term.active != ALWAYS]
    unused = trainer.args.ddp_find_unused_parameters
    checkpoints = trainer.args.activation_checkpointing or getattr(student, "is_activation_checkpointing", False)
    waits = checkpoints if unused is None else not unused
    if windows and waits and trainer.accelerator.num_processes > 1:
        raise ValueError(
            f"Match {windows[0]!r} is on in a part of the training only, and DDP would wait for the gradient of its "
            "projections in the rest. Set ddp_find_unused_parameters=True."
        )
    pooler: Any = getattr(task_model(student), "pooler", None)
    unread = trainer._pair.task is Task.EMBEDDING and not any(term.student.path == "pooler" for term in terms)
    unread = unread and pooler is not None and any(parameter.requires_grad for parameter in pooler.parameters())
    if unread and waits and trainer.accelerator.num_processes > 1:
        raise ValueError(
            f"No match reads the pooler of the student ({type(task_model(student)).__name__}), and DDP would wait for "
            "its gradient. Set ddp_find_unused_parameters=True, or load the student with add_pooling_layer=False."
        )
    attentive = [term.name for term in terms if term.student.is_attention]
    if not attentive:
        return
    checkpointing = trainer.args.activation_checkpointing_kwargs or {}
    if trainer.args.activation_checkpointing and checkpointing.get("use_reentrant", False):
        raise ValueError(
            f"Re-entrant activation checkpointing cuts the gradient of what is recorded inside a layer, so match "
            f"{attentive[0]!r} would teach nothing. Set use_reentrant=False (the default)."
        )
