"""Every registered loss of logits, as it is by default and with other options, and what tells one from another."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from hf_distill.losses import LOSSES
from tests import references

SPECS = [LOSSES.get(name) for name in LOSSES if LOSSES.get(name).feature == "logits"]

# Beside the defaults. A loss with an option that is missing here fails a test.
OPTIONS = {
    "adaptive_kl": [{"head": 0.1}, {"head": 0.9}],
    "dist": [{"inter": 2.0, "intra": 0.0}, {"inter": 0.0, "intra": 0.5}],
    "dkd": [{"alpha": 0.0, "beta": 1.0}, {"alpha": 2.0, "beta": 0.0}],
    "generalized_jsd": [{"beta": beta} for beta in (0, 1e-3, 0.9, 1)],
    "jsd": [{"beta": beta} for beta in (0, 1e-8, 1e-6, 1e-3, 0.1, 0.9, 0.999, 1 - 1e-6, 1)],
    "nkd": [{"gamma": 0.0}, {"gamma": 4.0}],
    "skewed_kl": [{"skew": skew} for skew in (0, 1e-6, 1e-3, 0.5, 0.9)],
    "skewed_reverse_kl": [{"skew": skew} for skew in (0, 1e-6, 1e-3, 0.5, 0.9)],
    "soft_cross_entropy": [{"class_mean": True}],
    "symmetric_kl": [{"share": share} for share in (0, 0.1, 1)],
    "top_k_kl": [{"k": k} for k in (1, 2, 5)],
}

# These hold an entropy or push the target's class up without end.
NOT_ZERO_AT_EQUALITY = {"soft_bce", "soft_cross_entropy", "nkd"}
# Their gradient is not the derivative of their value: weights within them are held constant, as their authors do.
NOT_A_DERIVATIVE = {"adaptive_kl"}
# Only a part of them is softened.
NOT_SCALED_BY_TEMPERATURE = {"nkd"}
# Their gradient is a difference of terms that are as large as a logit, and so rounds like a logit.
GRADIENT_OF_LOGIT_SIZE = {
    "adaptive_kl",
    "generalized_jsd",
    "jsd",
    "reverse_kl",
    "skewed_reverse_kl",
    "symmetric_kl",
}
# They square differences of logits, which cancel down to the rounding of the logits.
LOGIT_DIFFERENCES = {"centered_logit_mse", "margin_mse"}
# Its gradient is divided by the length of the student's logits.
GRADIENT_PER_LENGTH = {"logit_cosine"}


@dataclass(frozen=True)
class Variant:
    """A loss with its options filled in."""

    spec: Any
    options: dict

    def __str__(self):
        return "-".join([self.spec.name, *(f"{name}={value}" for name, value in self.options.items())])

    def function(self, student, teacher, **keywords):
        return self.spec.function(student, teacher, **self.options, **keywords)

    def reference(self, student, teacher, **keywords):
        return getattr(references, self.spec.name)(student, teacher, **self.options, **keywords)

    def keywords(self, case):
        """What the composition fills in, as far as the loss takes it: temperature, labels, valid rows."""
        found = {}
        if self.spec.takes_temperature:
            found["temperature"] = case.temperature
        if self.spec.takes_targets:
            possible = (case.teacher != -torch.inf).sum(-1).clamp(min=1)
            labels = (case.weights * 997).long() % possible
            found["targets"] = torch.where(case.weights < 0.3, -100, labels)
        if self.spec.compares_rows:
            found["valid"] = case.weights > 0.3
        return found


def variants(keep=lambda spec: True, *, options=True):
    """A mark that runs a test with every loss for which `keep` holds, by default with every set of options."""
    return pytest.mark.parametrize("loss", variants_of(keep, options=options), ids=str)


def variants_of(keep=lambda spec: True, *, options=True):
    """The losses for which `keep` holds, each with every set of options."""
    return [
        Variant(spec, settings)
        for spec in SPECS
        if keep(spec)
        for settings in [{}, *(OPTIONS.get(spec.name, ()) if options else ())]
    ]


def decided(spec, case):
    """(...,) bool: the items whose value and gradient do not hang on the last bit of a probability in float32."""
    temperature = torch.as_tensor(case.temperature, dtype=torch.float64).unsqueeze(-1)
    student, teacher = ((logits.double() / temperature).softmax(-1) for logits in (case.student, case.teacher))
    # Where it has a probability at all, a class that is impossible to the teacher makes a reverse KL infinite.
    vanishing = (case.teacher == -torch.inf) & (student > 1e-46) & (student < 1e-37)
    if spec.name == "tvd":
        vanishing |= (student - teacher).abs() < 2e-6 * student
    if spec.name == "uld":
        # Which class has a rank is open where two of the student's probabilities are as good as equal.
        ranked, taught = (probabilities.sort(-1, descending=True).values for probabilities in (student, teacher))
        vanishing |= (ranked - taught).abs() < 2e-6 * ranked
        signs = (ranked - taught).sign()
        close = ranked.diff().abs() < 2e-6 * ranked[..., 1:]
        vanishing[..., 1:] |= close & (signs.diff() != 0)
    if spec.name == "adaptive_kl":  # what lies in the head is a share of this
        vanishing |= (student - teacher).abs().sum(-1, keepdim=True) < 1e-6
    return ~vanishing.any(-1)
