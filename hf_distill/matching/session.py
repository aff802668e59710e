"""What one training adds to the student: the matches' recorders and projections, and what else trains beside it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from hf_distill.batches import Batch
from hf_distill.config import MatchTerm
from hf_distill.features import Feature
from hf_distill.matching.batch_masks import BatchMasks
from hf_distill.matching.masks import real_positions
from hf_distill.matching.plan import Plan, as_sequence, is_image, pooled, student_key
from hf_distill.matching.terms import MatchContext, StudentFeatures, match_share
from hf_distill.models.capture import Capture
from hf_distill.models.modules import DistillationModules, StudentHook, attach, detach
from hf_distill.models.projections import make_projection
from hf_distill.teachers import RecordingTeacher, in_eval_mode


@dataclass(frozen=True)
class Learned:
    """A module that trains beside the student without weight decay, which would pull it to 0.

    Attributes:
        module: the module.
        learning_rate_factor: > 0, times the student's learning rate.
    """

    module: nn.Module
    learning_rate_factor: float


# Where the parameters of what else trains are found among the features of a forward: {name: {parameter: value}}.
LEARNED = "learned"


class LayerTerms:
    """The matches between the layers of a student and a teacher, and what else trains beside the student.

    Between `start` and `stop` the student carries what they need: a child module with the projections, a hook that
    runs them inside its forward, and the recorders of its layers. After `stop` it is the plain model again.

    Args:
        plan: the checked matches.
        student: whose dtype and device the projections get.
        teacher: the teacher; None where no match asks one.
        seed: of the projections' first weights.
        special_tokens: (any,) ids that `mask: content` leaves out; None where they are not known.
        gather: rows of this rank -> rows of all ranks, with their gradient.
        rank: this process.
        learned: further modules by name, such as a learned temperature. The loss runs them, not the student: their
            parameters come out of the student's forward, so that wrappers such as DDP know that they are used.
    """

    def __init__(
        self,
        plan: Plan,
        student: nn.Module,
        teacher: RecordingTeacher | None,
        *,
        seed: int,
        special_tokens: Tensor | None,
        gather: Callable[[Tensor], Tensor],
        rank: int,
        learned: Mapping[str, Learned] | None = None,
    ) -> None:
        self.plan, self.learned = plan, dict(learned or {})
        self.modules = _make_modules(plan, student, seed)
        for name, each in self.learned.items():
            self.modules[name] = each.module.to(next(student.parameters()).device)
        self._teacher, self._special, self._gather, self._rank = teacher, special_tokens, gather, rank
        self._student: nn.Module | None = None
        self._capture: Capture | None = None
        self._hook = StudentHook()
        self._masks: BatchMasks | None = None
        self._names: frozenset[str] = frozenset()

    @property
    def learning_rate_factors(self) -> dict[str, float]:
        """The learning rate of each module as a multiple of the student's."""
        projections = {name: shape.settings.learning_rate_factor for name, shape in self.plan.projections.items()}
        return projections | {name: each.learning_rate_factor for name, each in self.learned.items()}

    @property
    def is_attached(self) -> bool:
        """Whether the student carries the modules now."""
        return self._student is not None

    def start(self, student: nn.Module) -> None:
        """Attaches modules and recorders; does nothing for a student that carries them."""
        if self._student is student:
            return
        if self._student is not None:
            self.stop()
        attach(student, self.modules, self._hook)
        self._student = student
        self._capture = Capture(student, self.plan.student_sources)
        if self._teacher is not None:
            self._teacher.prepare_recording(self.plan.teacher_sources)

    def stop(self) -> None:
        """Leaves the student and the teacher as they were before `start`."""
        if self._student is None:
            return
        if self._capture is not None:
            self._capture.close()
        if self._teacher is not None:
            self._teacher.prepare_recording(())
        detach(self._student)
        self._student = self._capture = None

    @property
    def forward_arguments(self) -> dict[str, Any]:
        """What the student's forward needs beside its inputs."""
        assert self._capture is not None
        return self._capture.forward_arguments

    def masks(self, student: nn.Module, batch: Batch) -> BatchMasks:
        """The masks of a batch."""
        return BatchMasks(student, batch.student, batch.items, batch.extras, self._special)

    def counts(self, student: nn.Module, batch: Batch) -> list[Tensor]:
        """How many items of each of the plan's units a batch has."""
        if not self.plan.matches:
            return []
        return self.masks(student, batch).counts(self.plan.distinct_units)

    @contextmanager
    def recording(self, terms: tuple[MatchTerm, ...], masks: BatchMasks) -> Iterator[None]:
        """While it lasts, the student's forward returns {"student": its output, "features": recorded, projected}.

        Only what `terms` ask for is projected: DDP waits for the gradient of whatever a forward returns.
        """
        assert self._capture is not None
        self._masks, self._names = masks, frozenset(term.name for term in terms)
        try:
            with self._capture.recording(), self._hook.running(self._student_features):
                yield
        finally:
            self._masks = None

    def _student_features(self, outputs: Any) -> dict[Any, Any]:
        """What the matches take of the student by its `StudentKey`; runs inside its forward."""
        assert self._capture is not None
        assert self._masks is not None
        recorded, masks = self._capture.collect(outputs), self._masks
        features: dict[Any, Any] = {
            LEARNED: {
                name: {key: value.clone() for key, value in self.modules[name].named_parameters()}
                for name in self.learned
            }
        }
        matches = zip(self.plan.matches, self.plan.units, strict=True)
        wanted = (zip(match.stacks, units, strict=True) for match, units in matches if match.term.name in self._names)
        for pair, unit in ((pair, unit) for stacks in wanted for stack, unit in stacks for pair in stack.pairs):
            key = student_key(pair, unit)
            if key in features:
                continue
            feature = recorded[pair.student.source]
            if isinstance(feature, Tensor):
                feature = as_sequence(feature)
                pools = pair.student.pooling is not None and feature.dim() > 2
                tokens = masks.pooled(unit, feature.shape[1]) if pools else None
                feature = pooled(feature, tokens, pair.student)
                if pair.projection is not None:
                    feature = self.modules[pair.projection](feature)
            features[key] = feature
        return features

    def shares(
        self,
        terms: tuple[MatchTerm, ...],
        features: StudentFeatures,
        teacher_features: Mapping[Feature, Any],
        batch: Batch,
        masks: BatchMasks,
        counts: Tensor,
        *,
        epoch: int,
    ) -> dict[str, Tensor]:
        """This batch's share of each match before its weight, by name: scalars with a graph.

        Args:
            terms: the matches that are on.
            features: what the student's forward returned as `features`.
            teacher_features: what the teacher recorded.
            batch: the batch.
            masks: its masks.
            counts: (units,) items of the plan's units over the accumulation window and all ranks.
            epoch: which epoch this is.
        """
        assert self._student is not None
        teacher = self._teacher

        @cache
        def teacher_tokens(stack: str | None) -> Tensor | None:
            return None if teacher is None else real_positions(teacher.model, batch.teacher, stack)

        context = MatchContext(
            masks=masks,
            student=features,
            teacher=teacher_features,
            teacher_tokens=teacher_tokens,
            gather=self._gather,
            rank=self._rank,
            grid=is_image(self._student),
            epoch=epoch,
        )
        names = {term.name for term in terms}
        place = {unit: number for number, unit in enumerate(self.plan.distinct_units)}
        return {
            match.term.name: match_share(match, units, [counts[place[unit]] for unit in units], context)
            for match, units in zip(self.plan.matches, self.plan.units, strict=True)
            if match.term.name in names
        }

    def try_once(self, batch: Batch, arguments: Mapping[str, Any]) -> None:
        """Computes every match on one batch, without a trace, while started.

        Args:
            batch: a batch, such as the first rows.
            arguments: what the student's forward takes of it.

        Raises:
            ValueError: what a match's loss refuses, with the match's name.
        """
        assert self._student is not None
        terms, masks = tuple(match.term for match in self.plan.matches), self.masks(self._student, batch)
        counts = torch.stack(masks.counts(self.plan.distinct_units))
        teacher = {} if self._teacher is None else self._teacher(batch.teacher, record=True).features
        with in_eval_mode(self._student), torch.no_grad():
            with self.recording(terms, masks):
                features = self._student(**arguments, **self.forward_arguments)["features"]
            for term in terms:
                try:
                    self.shares((term,), features, teacher, batch, masks, counts, epoch=0)
                except ValueError as error:
                    raise ValueError(f"Match {term.name!r}: {error}") from error


def _make_modules(plan: Plan, student: nn.Module, seed: int) -> DistillationModules:
    floating = [p for p in student.parameters() if p.is_floating_point()]
    like = next((p for p in floating if p.requires_grad), floating[0])
    modules = DistillationModules()
    for name, shape in plan.projections.items():
        settings = shape.settings
        modules[name] = make_projection(
            shape.student_width,
            shape.teacher_width,
            kind=settings.kind,
            init=settings.init,
            bias=settings.bias,
            dtype=like.dtype,
            device=like.device,
            seed=seed + crc32(name.encode()) % 2**16,
        )
    return modules
