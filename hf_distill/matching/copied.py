"""Which teacher layer each layer of a student was copied from, read from the weights."""

from torch import Tensor, nn
from torch.nn import functional as F

from hf_distill.models.architectures import layer_stacks
from hf_distill.models.heads import task_model

# Layers of one model, or of two trainings, are far below; a copy that was trained on is far above.
_LEAST_COSINE = 0.8
_NO_COMMON_SHAPE = -2.0


def copied_layers(
    student: nn.Module, teacher: nn.Module, student_stack: str | None, teacher_stack: str | None
) -> dict[int, int]:
    """The teacher layer of each student layer, counted from 1.

    Args:
        student: a model whose layers were copied from the teacher, as by `build_student(teacher, layers=...)`, and
            maybe trained since.
        teacher: the teacher.
        student_stack: `encoder`, `decoder` or None.
        teacher_stack: likewise.

    Raises:
        ValueError: a layer of the student is like none of the teacher's.
    """
    teachers = [_weights(layer) for layer in layer_stacks(teacher)[teacher_stack]]
    found = {}
    for number, layer in enumerate(layer_stacks(student)[student_stack], 1):
        likeness = [_likeness(_weights(layer), other) for other in teachers]
        best = max(range(len(teachers)), key=likeness.__getitem__)
        if likeness[best] == _NO_COMMON_SHAPE:
            raise ValueError(
                f"map: copied, but layer {number} of the student ({type(task_model(student)).__name__}) has no weight "
                "of the shape that one of the teacher's has, so it was cut narrower too and cannot be recognised. "
                "Write the pairs, counted from 1: map: {1: 1, 2: 3, 3: 6}."
            )
        if likeness[best] < _LEAST_COSINE:
            raise ValueError(
                f"map: copied, but layer {number} of the student ({type(task_model(student)).__name__}) is like none "
                f"of the teacher's: its weights have at most the cosine {likeness[best]:.2f} with them. Build the "
                "student from this teacher (hf_distill.build_student), or name another map."
            )
        found[number] = best + 1
    return found


def same_layers(
    student: nn.Module, teacher: nn.Module, student_stack: str | None, teacher_stack: str | None
) -> dict[int, int]:
    """The teacher layer whose weights a student layer has to the bit, counted from 1, for those that have one."""
    teachers = [_weights(layer) for layer in layer_stacks(teacher)[teacher_stack]]
    found = {}
    for number, layer in enumerate(layer_stacks(student)[student_stack], 1):
        own = _weights(layer)
        equal = [place for place, other in enumerate(teachers, 1) if _is_same(own, other)]
        if len(equal) == 1:
            found[number] = equal[0]
    return found


def _weights(layer: nn.Module) -> dict[str, Tensor]:
    """The matrices of a layer by the names they have without adapters, but for those that torchao holds quantised.

    Vectors begin as zeros and ones in every model.
    """
    named = [(name.replace(".base_layer", ""), value.detach()) for name, value in layer.named_parameters()]
    return {name: value for name, value in named if value.dim() > 1 and type(value.data) is Tensor}


def _is_same(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> bool:
    if not teacher or not {*teacher} <= {*student}:  # a student has those of its adapters too
        return False
    return all(
        value.shape == student[name].shape and bool((student[name] == value.to(student[name])).all())
        for name, value in teacher.items()
    )


def _likeness(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> float:
    """The mean cosine of the matrices of one name and shape that both have."""
    shared = [name for name, value in student.items() if name in teacher and teacher[name].shape == value.shape]
    both = [(student[name].flatten().float(), teacher[name].flatten().to(student[name].device)) for name in shared]
    cosines = [float(F.cosine_similarity(own, other.float(), dim=0)) for own, other in both]
    return sum(cosines) / len(cosines) if cosines else _NO_COMMON_SHAPE
