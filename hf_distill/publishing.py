"""What goes to the Hub with a student: no access token, no push that fails unseen or could be known to fail."""

import copy
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
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

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """`Trainer`'s, which makes the repository or finds it, and whether it may be written to.

        `Trainer` learns that from its first commit alone, after a training (5.23).

        Raises:
            HfHubHTTPError: the Hub refuses.
        """
        super().init_hf_repo(token, private)  # type: ignore[misc]
        if not self.is_world_process_zero():  # type: ignore[attr-defined]
            return
        try:
            HfApi().auth_check(self.hub_model_id, token=token or self.args.hub_token, write=True)
        except HfHubHTTPError as error:
            if error.response.status_code not in (401, 403):
                return  # a Hub that does not answer the question; the push will tell
            error.append_to_message(
                f"\nThe student cannot be pushed to {self.hub_model_id}: this token may not write there. Use one that "
                "may (HF_TOKEN), or another hub_model_id."
            )
            raise

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
