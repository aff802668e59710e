"""Everything a distillation minimises, and its form as a file."""

import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hf_distill.config.language import check_keys, read, read_balance, write, write_balance
from hf_distill.config.matches import MatchTerm
from hf_distill.config.terms import Balance, LogitTerm, TaskTerm

OFF = 0.0


@dataclass(frozen=True)
class DistillationConfig:
    """Every term of the training loss: their weighted sum is minimised, and weights are never normalised.

    What is written is on, with its own defaults; what is left out is off. A recipe with `matches` alone trains neither
    on labels nor on logits, and `logits: {}` is the distance of the logits with weight 0.5.

    Attributes:
        task: the loss on the labels.
        logits: the distance of the logits.
        matches: what is compared inside the models.
        balance: how the terms are weighed against each other while training.

    Raises:
        ValueError: no term with a weight, two matches of one name, or a balance of less than two terms.
    """

    task: TaskTerm = field(default_factory=lambda: TaskTerm(weight=OFF))
    logits: LogitTerm = field(default_factory=lambda: LogitTerm(weight=OFF))
    matches: tuple[MatchTerm, ...] = ()
    balance: Balance = field(default_factory=Balance)

    def __post_init__(self) -> None:
        object.__setattr__(self, "matches", tuple(self.matches))
        names = [match.name for match in self.matches]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"Two matches are called {', '.join(twice)}, and both would be logged under that name.")
        if all(term.weight == 0 for term in self.terms.values()):
            raise ValueError(
                "All weights are zero, so there is nothing to learn: raise kd_weight or task_weight, or the weight "
                "of a match."
            )
        if self.balance.kind != "none" and sum(term.weight > 0 for term in self.terms.values()) < 2:
            raise ValueError(f"balance: {self.balance.kind} weighs terms against each other, and there is one only.")
        if self.balance.kind == "magnitude" and self.logits.weight == 0:
            raise ValueError(
                "balance: magnitude brings the terms to the size of the logits' term, whose weight is 0. Raise "
                "kd_weight, or take uncertainty."
            )

    @property
    def terms(self) -> dict[str, TaskTerm | LogitTerm | MatchTerm]:
        """Every term by the name under which it is logged: `task`, `kd`, and the matches'."""
        return {"task": self.task, "kd": self.logits, **{match.name: match for match in self.matches}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DistillationConfig":
        """The config that plain values stand for: `task`, `logits` and a list of `matches`, each left out if off.

        `balance` may stand beside them.

        Raises:
            ValueError: an unknown key at any depth, or values that the terms refuse.
        """
        if isinstance(values, Mapping) and "kd" in values:
            raise ValueError("kd: in a config the term of the logits is called logits. Rename the key.")
        check_keys(values, ("task", "logits", "matches", "balance"), "")
        matches = values.get("matches", [])
        if not isinstance(matches, list | tuple):
            raise ValueError(f"matches is {matches!r}; expected a list of mappings.")
        terms: dict[str, Any] = {
            "matches": tuple(read(MatchTerm, each, f"matches[{i}]") for i, each in enumerate(matches))
        }
        if "task" in values:
            terms["task"] = read(TaskTerm, values["task"], "task")
        if "logits" in values:
            terms["logits"] = read(LogitTerm, values["logits"], "logits")
        if "balance" in values:
            terms["balance"] = read_balance(values["balance"])
        return cls(**terms)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and YAML, from which `from_dict` makes an equal config."""
        written: dict[str, Any] = {"task": write(self.task), "logits": write(self.logits)}
        if self.matches:
            written["matches"] = [write(match) for match in self.matches]
        if self.balance != Balance():
            written["balance"] = write_balance(self.balance)
        return written

    @classmethod
    def from_yaml(cls, text: str) -> "DistillationConfig":
        """The config that a YAML text stands for."""
        return cls.from_dict(read_yaml(text))

    def to_yaml(self) -> str:
        """The text from which `from_yaml` makes an equal config."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=119)

    @classmethod
    def from_json(cls, text: str) -> "DistillationConfig":
        """The config that a JSON text stands for; `json.dumps(config.to_dict())` writes one."""
        return cls.from_dict(json.loads(text))

    @classmethod
    def load(cls, value: "str | Path | Mapping[str, Any] | DistillationConfig") -> "DistillationConfig":
        """The config that a path of a YAML or JSON file, plain values, or a config itself stand for."""
        if isinstance(value, DistillationConfig):
            return value
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        path = Path(value)
        if not path.is_file():
            raise ValueError(f"distillation_config={str(value)!r} is no file. Give the path of a YAML or JSON file.")
        read_text = cls.from_json if path.suffix == ".json" else cls.from_yaml
        try:
            return read_text(path.read_text(encoding="utf-8"))
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: {error}") from error


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader keeps the last of two equal keys without a word; this one refuses them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node whose keys all differ."""
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if isinstance(key, Hashable) and key in lines:
                raise ValueError(f"{key!r} is written twice, in line {lines[key]} and line {line}. Keep one.")
            if isinstance(key, Hashable):
                lines[key] = line
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """The plain values of a YAML text in which no key is written twice."""
    return yaml.load(text, Loader=_UniqueKeyLoader)  # a SafeLoader: it builds plain values alone
