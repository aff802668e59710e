"""What goes to the Hub with a student: no access token, and no push that fails unseen."""

import copy
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)


class TokensNotPickled:
    """Arguments whose pickle, as in the `training_args.bin` that `Trainer` saves and pushes, holds no access token.

    Copies keep it. A process that gets the arguments pickled takes the token that is in its environment
    (`HF_TOKEN`), or that `hf auth login` left.
    """

    def __getstate__(self) -> dict[str, Any]:
        # By the names that `TrainingArguments.to_dict` masks; the pickle holds `hub_token` in transformers 5.23.
        return {name: None if name.endswith("_token") else value for name, value in vars(self).items()}

    def __copy__(self) -> "TokensNotPickled":
        copied = object.__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> "TokensNotPickled":
        memo[id(self)] = copied = object.__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied


class PublishingMixin:
    """What a distillation changes in how `Trainer` pushes."""

    args: Any
    hub_model_id: Any

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._tell_failed_pushes()
        super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]

    def _finish_current_push(self) -> None:
        super()._finish_current_push()  # type: ignore[misc]
        self._tell_failed_pushes()

    def _tell_failed_pushes(self) -> None:
        """Warns of pushes that failed in the background: `Trainer` never asks what came of them (5.23)."""
        push = getattr(self, "push_in_progress", None)
        if push is None:
            return
        done = [job for job in push.jobs if job.done()]
        push.jobs = [job for job in push.jobs if job not in done]
        limit = self.args.save_total_limit
        remedy = f" save_total_limit={limit} may remove a checkpoint before it is up: raise it." if limit else ""
        for error in [job.exception() for job in done]:
            if error is not None:
                logger.warning(
                    f"A push to {self.hub_model_id} failed during training, which went on without it: {error!r}. "
                    f"trainer.push_to_hub() pushes the student as it is then.{remedy}"
                )
