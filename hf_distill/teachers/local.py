"""Teachers that run in this process: a frozen model, or a PEFT student's own base."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.features import Feature
from hf_distill.models.capture import Capture
from hf_distill.models.heads import decoder_inputs, find_task, input_names, task_model
from hf_distill.models.lm_head import HeadTap
from hf_distill.signals import Task, TeacherOutput, read_logits


class LocalTeacher:
    """A model in evaluation mode whose forward makes no graph and changes nothing.

    It keeps its own dtype and, where it was loaded with a device map or quantised, its own place.

    Args:
        model: a Transformers model with a head.
        autocast: a factory of the context its forward runs in, as `Accelerator.autocast`, for a float32 teacher under
            mixed precision. A context, and not `Accelerator.prepare_model`: that one rewrites the model's forward,
            copies its outputs to float32 and would stand in for the student in evaluation.
    """

    def __init__(self, model: nn.Module, *, autocast: Callable[[], AbstractContextManager] = nullcontext) -> None:
        self._model: Any = model.eval()
        self._autocast = autocast
        self._task = find_task(model)
        self._names = input_names(model)
        self._capture: Capture | None = None
        self._tap = HeadTap(model)

    @property
    def model(self) -> nn.Module:
        """The teacher model."""
        return self._model

    @property
    def gives_factors(self) -> bool:
        """Whether the logits can be taken apart, as far as is known."""
        return self.no_factors is None

    @property
    def no_factors(self) -> str | None:
        """Why the logits cannot be taken apart; None while they can, as far as is known."""
        return self._tap.reason

    def prepare_recording(self, features: Sequence[Feature]) -> None:
        """Makes ready to record these features; see `RecordingTeacher`."""
        if self._capture is not None:
            self._capture.close()
        self._capture = Capture(self._model, features) if features else None

    def place(self, device: torch.device) -> None:
        """Moves the model to `device`, unless it was placed by a device map or holds quantised weights."""
        if getattr(self._model, "hf_device_map", None) is None and not getattr(self._model, "is_quantized", False):
            self._model.to(device)

    def __call__(self, inputs: Mapping[str, Tensor], *, record: bool = False, factored: bool = False) -> TeacherOutput:
        """The logits of one forward over those of `inputs` that the model's forward names, and with `record` more.

        With `factored` it gives what its logits are made of in their place, where it can.
        """
        arguments = {name: value for name, value in inputs.items() if name in self._names and name != "labels"}
        model = task_model(self._model)
        if model.main_input_name not in arguments and "inputs_embeds" not in arguments:
            raise ValueError(
                f"The teacher ({type(model).__name__}) reads {model.main_input_name}, but the batch has "
                f"{', '.join(inputs)}. Choose a teacher that reads what the student reads, or give the rows columns "
                f"of its own: teacher_{model.main_input_name}."
            )
        if self._model.training:  # whoever turned it on since: dropout would make its targets noise
            self._model.eval()
        with torch.no_grad():
            # Not of every encoder-decoder model: a classifier's labels are no text to decode.
            if self._task is Task.SEQ2SEQ_LM and "labels" in inputs and "decoder_input_ids" not in arguments:
                arguments |= decoder_inputs(model, inputs["labels"])
            options: dict[str, Any] = {"use_cache": False} if "use_cache" in self._names else {}
            capture = self._capture if record else None
            arguments = {**self._cast(arguments), **options}
            if factored:
                if not self._tap.reads(self._model):
                    self._tap = HeadTap(self._model)
                with self._autocast():
                    self._tap.verify(self._model, arguments)
            with ExitStack() as stack:
                stack.enter_context(self._autocast())
                if capture is not None:
                    stack.enter_context(capture.recording())
                    arguments |= capture.forward_arguments
                if factored and self._tap.verified:
                    stack.enter_context(self._tap.open(lambda factors: factors))
                outputs = self._model(**arguments)
                features = {} if capture is None else capture.collect(outputs)
        factors = self._tap.take() if factored else None
        logits = () if factors is not None else read_logits(self._task, outputs)
        return TeacherOutput(logits=logits, overwritable=True, features=features, factors=factors)

    def _cast(self, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
        # Whisper in bfloat16 refuses float32 features.
        dtype, device = self._model.dtype, self._model.device
        return {
            name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
            for name, value in arguments.items()
        }


class AdapterOffTeacher:
    """A PEFT student's base model: the student's own forward with its adapters off.

    Args:
        student: returns the PEFT model, asked anew at every batch: `model_init` may have replaced it.
        autocast: as for `LocalTeacher`.
    """

    def __init__(
        self, student: Callable[[], nn.Module], *, autocast: Callable[[], AbstractContextManager] = nullcontext
    ) -> None:
        self._student = student
        self._autocast = autocast
        self._features: tuple[Feature, ...] = ()
        self._recorder: LocalTeacher | None = None

    @property
    def model(self) -> nn.Module:
        """The base model inside the student."""
        return task_model(self._student())

    @property
    def gives_factors(self) -> bool:
        """Whether the base's logits can be taken apart, as far as is known."""
        return self.no_factors is None

    @property
    def no_factors(self) -> str | None:
        """Why the base's logits cannot be taken apart; None while they can, as far as is known."""
        return None if self._recorder is None else self._recorder.no_factors

    def place(self, device: torch.device) -> None:
        """Nothing: the student is there already."""

    def prepare_recording(self, features: Sequence[Feature]) -> None:
        """Makes ready to record these features; see `RecordingTeacher`."""
        if self._recorder is not None:
            self._recorder.prepare_recording(())
        self._features, self._recorder = tuple(features), None

    def __call__(self, inputs: Mapping[str, Tensor], *, record: bool = False, factored: bool = False) -> TeacherOutput:
        """The base's logits, or what they are made of, for a batch, and with `record` its features."""
        student: Any = self._student()
        with in_eval_mode(student), student.disable_adapter():
            if self._recorder is None or self._recorder.model is not student:
                self._recorder = LocalTeacher(student, autocast=self._autocast)
                if self._features:
                    self._recorder.prepare_recording(self._features)
            return self._recorder(inputs, record=record, factored=factored)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and after it every module in the mode it had: a frozen part may be in evaluation by design."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
