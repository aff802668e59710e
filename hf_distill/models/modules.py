"""What trains beside the student: attached to it, run inside its forward, saved beside it, and in no export of it."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.optim import Optimizer
from transformers import PreTrainedModel

from hf_distill.files import whole_file

ATTRIBUTE = "distillation_modules"
FILE_NAME = f"{ATTRIBUTE}.safetensors"
_WHOLE = StateDictOptions(full_state_dict=True)


class DistillationModules(nn.ModuleDict):
    """Projections and whatever else trains beside the student, by name; a child of the student while attached."""


class StudentHook:
    """The student's root forward hook: idle, unless a distillation step runs a function on its outputs.

    What the function computes is part of the student's own forward, so DDP, FSDP, activation checkpointing and
    `torch.compile` see it as they see any layer. A copy or a pickle of the hook is idle and knows nothing of its run.
    """

    def __init__(self) -> None:
        self.run: Callable[[Any], Mapping[Any, Any]] | None = None

    def __call__(self, student: nn.Module, inputs: Any, outputs: Any) -> dict[str, Any] | None:
        """The outputs and what the function made of them; None, which leaves the outputs alone, while idle."""
        # A plain dict: DDP rebuilds a ModelOutput, which takes no further key (transformers 5.23).
        return None if self.run is None else {"student": outputs, "features": self.run(outputs)}

    @contextmanager
    def running(self, run: Callable[[Any], Mapping[Any, Any]]) -> Iterator[None]:
        """While open, the student's forward returns `{"student": outputs, "features": run(outputs)}`.

        Args:
            run: from the outputs to tensors by any keys, through the attached modules; errors pass through.
        """
        self.run = run
        try:
            yield
        finally:
            self.run = None

    def __reduce__(self) -> tuple[type["StudentHook"], tuple[()]]:
        # Of `copy.deepcopy` too: a bound method in `run` would take the trainer and its teacher along.
        return StudentHook, ()


def attach(student: nn.Module, modules: DistillationModules, hook: StudentHook) -> None:
    """Makes the modules a child of the student and the hook its root forward hook; `detach` undoes both.

    Optimizers, clipping, wrappers and `.to()` find the modules as they find the student's layers. `save_pretrained`,
    and so every checkpoint, leaves them out.

    Args:
        student: the top-level model that is trained: a `PreTrainedModel` or a `PeftModel`, without a wrapper.
        modules: on the student's device, in the dtype of its trainable parameters.
        hook: a new one, or one of a student that is trained no more.

    Raises:
        TypeError: another kind of model, whose exports would hold the modules.
        ValueError: the student has such modules, or PEFT would save some of them with the adapter.
    """
    if not isinstance(student, PreTrainedModel | PeftModel):
        raise TypeError(
            f"The student is a {type(student).__name__}. Modules can be trained beside a PreTrainedModel or a "
            "PeftModel, whose save_pretrained leaves them out; give the model itself, not a wrapper of it."
        )
    if hasattr(student, ATTRIBUTE):
        raise ValueError(
            f"The student has {ATTRIBUTE} already, from a trainer that was made before. "
            "Call hf_distill.models.modules.detach(student) first."
        )
    student.add_module(ATTRIBUTE, modules)
    student.register_forward_hook(hook)
    names = _own_keys(modules)
    if isinstance(student, PreTrainedModel):
        student._keys_to_ignore_on_save = {*(student._keys_to_ignore_on_save or ()), *names}
        return
    # An adapter's weights are found by what their names contain.
    leaked = [
        name
        for adapter in student.peft_config
        for name in get_peft_model_state_dict(student, adapter_name=adapter, save_embedding_layers=False)
        if name.startswith(f"{ATTRIBUTE}.")
    ]
    if leaked:
        detach(student)
        raise ValueError(
            f"PEFT would save {leaked[:3]} as weights of the adapter, because of their names. With bias='all' in the "
            "adapter's config, set bias: false for the projections, or bias='lora_only' for the adapter; else rename "
            "the match."
        )


def detach(student: nn.Module) -> DistillationModules:
    """The modules, taken off the student, which is then the plain model that it was."""
    modules = getattr(student, ATTRIBUTE)
    delattr(student, ATTRIBUTE)
    for key in [key for key, hook in student._forward_hooks.items() if isinstance(hook, StudentHook)]:
        del student._forward_hooks[key]
    if isinstance(student, PreTrainedModel):
        ignored = student._keys_to_ignore_on_save or ()
        student._keys_to_ignore_on_save = {key for key in ignored if not key.startswith(f"{ATTRIBUTE}.")}
    return modules


def lost_keys(student: PreTrainedModel, missing: list[str]) -> list[str]:
    """The missing keys of a loaded checkpoint that it should have held.

    `Trainer` warns of every missing key unless exactly those left out on purpose are missing, so it warns of tied
    weights as well (transformers 5.23).
    """
    ignored = {*(student._keys_to_ignore_on_save or ())}
    tied = student.all_tied_weights_keys
    return [key for key in missing if key not in ignored and tied.get(key, key) in missing]


def save_modules(student: nn.Module, folder: str | os.PathLike[str], *, is_main_process: bool = True) -> None:
    """Writes the modules of the student to `distillation_modules.safetensors`; nothing where none has a weight.

    Args:
        student: with modules attached, not wrapped.
        folder: an existing folder, such as a checkpoint's.
        is_main_process: whether this process writes. All must call: they may hold a shard each (FSDP2).
    """
    modules = getattr(student, ATTRIBUTE)
    if not modules.state_dict():
        return
    state: dict[str, Any] = get_model_state_dict(modules, options=_WHOLE)
    if not is_main_process:
        return
    path = Path(folder, FILE_NAME)
    # Copies: safetensors refuses a weight that two names share.
    copies = {name: value.cpu().clone().contiguous() for name, value in state.items()}
    with whole_file(path) as whole:
        save_file(copies, whole, {"format": "pt"})


def check_modules(folder: str | os.PathLike[str], *, expected: bool) -> None:
    """Refuses a checkpoint with modules for a training that has none.

    Raises:
        ValueError: with what it was written with.
    """
    path = Path(folder, FILE_NAME)
    if expected or not path.is_file():
        return
    with safe_open(path, "pt") as file:
        names = sorted({name.split(".")[0] for name in file.keys()})
    raise ValueError(
        f"{folder} holds modules that were trained beside the student ({', '.join(names[:3])}), and its optimizer "
        "their state: it was written with terms between layers, a learned temperature or a balance, which are off "
        "now. Resume with those, or start anew from its weights: load them as the student and leave "
        "resume_from_checkpoint out."
    )


def load_modules(student: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Reads into the student's modules what `save_modules` wrote.

    Raises:
        ValueError: the folder has no such file, or one with other modules or of other widths.
    """
    modules, path = getattr(student, ATTRIBUTE), Path(folder, FILE_NAME)
    expected = {name: tuple(value.shape) for name, value in modules.state_dict().items()}
    if not path.is_file():
        if not expected:
            return
        raise ValueError(
            f"{folder} has no {FILE_NAME}, so what trains beside the student, {sorted({*modules})}, cannot be "
            "resumed. The checkpoint was written without these terms, learned temperature or balance, or without us. "
            "Resume with what it was written with, or start anew from its weights: load them as the student and leave "
            "resume_from_checkpoint out."
        )
    state: dict[str, Any] = {**load_file(path)}
    found = {name: tuple(value.shape) for name, value in state.items()}
    if found != expected:
        raise ValueError(
            f"{path} does not fit the modules of this training. {_differences(found, expected)}. It was written with "
            "another layer map, other terms, another teacher or kind of learned temperature: resume with the "
            "distillation config it was written with."
        )
    set_model_state_dict(modules, state, options=_WHOLE)


def learning_rate_groups(
    optimizer: Optimizer,
    student: nn.Module,
    factors: Mapping[str, float],
    *,
    without_decay: frozenset[str] = frozenset(),
) -> None:
    """Gives modules beside the student learning rates of their own: the optimizer's, times a factor.

    Their parameters move to new groups, which keep all else. The groups come in the order of the modules and of the
    optimizer's groups, so that a resumed optimizer's state finds them. Schedulers made afterwards scale all groups
    alike.

    Args:
        optimizer: as `Trainer.create_optimizer` made it, before any scheduler.
        student: with modules attached.
        factors: by the module's name, > 0; the others keep the optimizer's rate.
        without_decay: the names of modules that weight decay leaves alone.

    Raises:
        ValueError: a name of no module, or a trainable weight that the optimizer does not hold.
    """
    modules = getattr(student, ATTRIBUTE)
    if unknown := sorted({*factors} - {*modules}):
        raise ValueError(f"Learning rate factors for {unknown}, which do not train. Known: {sorted({*modules})}.")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    lost = [name for name, value in modules.named_parameters() if value.requires_grad and id(value) not in held]
    if lost:
        raise ValueError(
            f"The optimizer does not hold {lost[:3]}, so they would never train. Do not pass `optimizers`, which were "
            "made before them: pass optimizer_cls_and_kwargs, or set optim in the arguments."
        )
    for name, module in modules.named_children():
        factor = factors.get(name, 1.0)
        if factor == 1.0 and name not in without_decay:
            continue
        changes = {"weight_decay": 0.0} if name in without_decay else {}
        own = {id(parameter) for parameter in module.parameters()}
        for group in [*optimizer.param_groups]:
            moved = [parameter for parameter in group["params"] if id(parameter) in own]
            if moved:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
                optimizer.add_param_group({**group, **changes, "params": moved, "lr": group["lr"] * factor})


def _own_keys(modules: nn.Module) -> list[str]:
    return [f"{ATTRIBUTE}.{name}" for name in modules.state_dict()]


def _differences(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str:
    """The first names that only one side has, and the first shapes that differ."""
    both = [name for name in expected if name in found]
    differences = {
        "not in the file": sorted({*expected} - {*found}),
        "only in the file": sorted({*found} - {*expected}),
        "of another shape": [
            f"{name} is {found[name]}, not {expected[name]}" for name in both if found[name] != expected[name]
        ],
    }
    return "; ".join(f"{words}: {', '.join(names[:3])}" for words, names in differences.items() if names)
