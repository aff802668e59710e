"""What a training with terms between layers changes in `Trainer`: modules that come, train, are saved, and go."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_distill.config import DistillationConfig
from hf_distill.layer_setup import make_layer_terms
from hf_distill.learned import learned_settings, make_balancer
from hf_distill.models.modules import check_modules, learning_rate_groups, load_modules, lost_keys, save_modules
from hf_distill.step import StepMixin


class LayerTrainingMixin(StepMixin):
    """The life of the terms between layers: planned with the trainer, attached for a training, in its checkpoints."""

    _planned: tuple[Any, ...]

    def _plan_layers(self, student: nn.Module) -> None:
        """Checks the terms between layers against both models, and makes ready what they need."""
        if self._layers is not None:
            self._layers.stop()
        self._signature_columns = None  # other terms may read other columns
        self._layers = make_layer_terms(self, student)
        self._balancer = None if self._layers is None else make_balancer(self._terms, self._layers.modules)
        self._planned = self._what_to_plan()

    @property
    def _terms(self) -> DistillationConfig:
        return self.args.distillation

    def _what_to_plan(self) -> tuple[Any, ...]:
        matches = tuple(replace(match, weight=1.0) for match in self._terms.matches if match.weight > 0)
        return matches, learned_settings(self._terms)

    def _start_layers(self) -> None:
        """Attaches the terms between layers; plans them anew if a hyperparameter search has changed them."""
        if self._what_to_plan() != self._planned:
            self._plan_layers(self.model)
            # An optimizer and a DDP wrapper of an earlier training know nothing of new modules.
            if self.state.global_step > 0 and self._layers is not None and self._layers.modules:
                self.optimizer, self.lr_scheduler, self.model_wrapped = None, None, self.model
        matches, learned = self._planned
        names = [*(f"match {match.name!r}" for match in matches), *learned]
        if names and self._layers is None:
            raise ValueError(
                f"The {names[0]} is planned on the first rows of train_dataset, which is None. Pass train_dataset, "
                "even where get_train_dataloader is your own."
            )
        if self._layers is not None:
            self._layers.start(self.model)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._start_layers()
        self._chunked.attach(self.model)
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            self._chunked.detach()
            if self._layers is not None:
                self._layers.stop()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """`Trainer`'s, in which projections have their own learning rate where one was asked for."""
        known = self.optimizer
        optimizer = super().create_optimizer(*args, **kwargs)
        if self._layers is not None and self._layers.is_attached:
            # Of an earlier training's optimizer the groups are what they should be; a checkpoint holds as many.
            is_new = optimizer is not known
            factors = self._layers.learning_rate_factors if is_new else {}
            without_decay = frozenset(self._layers.learned if is_new else ())
            learning_rate_groups(optimizer, self.model, factors, without_decay=without_decay)
        return optimizer

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._balancer is not None:
            self._balancer.settle(self.accelerator)
        super()._save_optimizer_and_scheduler(output_dir)
        if self._layers is not None:
            save_modules(self.model, output_dir, is_main_process=self.args.should_save)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._start_layers()
        try:
            check_modules(resume_from_checkpoint, expected=self._layers is not None)
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            if self._layers is not None:
                load_modules(self.model, resume_from_checkpoint)
        except BaseException:
            if self._layers is not None:
                self._layers.stop()
            raise

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self._layers is not None and not self.args.save_only_model:
            load_modules(self.model, self.state.best_model_checkpoint or "")

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        if self._layers is not None and isinstance(self.model, PreTrainedModel):
            load_result = load_result._replace(missing_keys=lost_keys(self.model, load_result.missing_keys))
        super()._issue_warnings_after_load(load_result)
