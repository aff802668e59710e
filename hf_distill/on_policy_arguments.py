"""The fields of on-policy distillation, where the student writes what the teacher then scores."""

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import GenerationConfig

# What another field says, or what would change how many rows there are or the form of the answer.
_ELSEWHERE = {
    "max_new_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "temperature": "generation_temperature",
}
_REFUSED = ("num_return_sequences", "return_dict_in_generate", "output_scores", "output_logits", "stop_strings")
_OF_SAMPLING = ("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass
class OnPolicyArguments:
    """How often the student writes the text it learns from, and how.

    Source: GKD, Agarwal et al. 2024, arXiv:2306.13649, algorithm 1, where lambda is `lmbda`.
    """

    lmbda: float = field(
        default=0.0,
        metadata={
            "help": "Share in [0, 1] of the batches in which the student answers the prompts and the teacher scores "
            "these answers in place of the data's (GKD, on-policy). 1 needs task_weight=0: an answer of the student's "
            "own is no target of the task loss."
        },
    )
    max_new_tokens: int = field(
        default=128,
        metadata={"help": "Tokens of an on-policy answer at most; fewer where the student's context ends."},
    )
    generation_temperature: float = field(
        default=1.0,
        metadata={"help": "T > 0 by which the student samples its on-policy answers; not that of the loss."},
    )
    generation_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Further arguments of generate for on-policy answers as JSON, such as '{\"top_p\": 0.95}'. "
            "Without them plain samples are drawn: no top_k, no top_p, no repetition penalty."
        },
    )

    def check_on_policy(self, *, asks_teacher: bool, task_weight: float) -> None:
        """Refuses values that are out of range, and fields that nobody would read.

        Args:
            asks_teacher: whether any term needs the teacher.
            task_weight: of the task loss.

        Raises:
            ValueError: with what would work.
        """
        if not 0 <= self.lmbda <= 1:
            raise ValueError(f"lmbda={self.lmbda}, expected a share of the batches in [0, 1].")
        if self.lmbda == 0:
            ours = [each for each in fields(OnPolicyArguments) if each.name != "lmbda"]
            for each in ours:
                if (value := getattr(self, each.name)) != each.default:
                    raise ValueError(
                        f"{each.name}={value!r}, but lmbda is 0, so the student writes nothing. Set lmbda in (0, 1]."
                    )
            return
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}, expected 1 or more.")
        if not 0 < self.generation_temperature < float("inf"):
            raise ValueError(
                f"generation_temperature={self.generation_temperature}, expected a positive number. For the likeliest "
                "tokens set generation_kwargs={'do_sample': False}."
            )
        if not asks_teacher:
            raise ValueError(
                f"lmbda={self.lmbda}, but no term asks the teacher, so nobody scores what the student writes. Set "
                "kd_weight, or lmbda=0."
            )
        if self.lmbda == 1 and task_weight > 0:
            raise ValueError(
                f"lmbda=1 beside task_weight={task_weight}: where every batch is written by the student, no text is "
                "left for the task loss. Set task_weight=0, or lmbda below 1."
            )
        self._check_generation_kwargs()

    def _check_generation_kwargs(self) -> None:
        given = self.generation_kwargs
        if given is None:
            return
        if not isinstance(given, dict):
            raise ValueError(f"generation_kwargs={given!r} is not a JSON object. Write it as '{{\"top_p\": 0.95}}'.")
        known = {*vars(GenerationConfig())} - {*_REFUSED}
        for name in given:
            if name in _ELSEWHERE:
                raise ValueError(f"generation_kwargs: {name} has a field of its own. Set {_ELSEWHERE[name]}.")
            if name not in known or name.startswith("_"):
                raise ValueError(
                    f"generation_kwargs: {name!r} is not among the arguments of generate that fit here. Take those of "
                    f"transformers.GenerationConfig but {', '.join(_REFUSED)}, as a key of the same name."
                )
        if given.get("do_sample") is False:
            unread = [name for name in _OF_SAMPLING if name in given]
            if self.generation_temperature != 1:
                unread.insert(0, "generation_temperature")
            if unread:
                raise ValueError(
                    f"{' and '.join(unread)} beside do_sample=False: nobody reads them where nothing is sampled. Drop "
                    "them, or do_sample."
                )
