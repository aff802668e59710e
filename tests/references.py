# SPDX-License-Identifier: Apache-2.0
"""The float64 twin of every registered loss, under the loss's name, written from the paper; imports nothing of ours.

Each takes (..., classes) tensors and returns (...,) float64 values that torch can differentiate.
"""

import torch


def _divided(logits, temperature):
    return logits.double() / torch.as_tensor(temperature, dtype=torch.float64).unsqueeze(-1)


def forward_kl(student_logits, teacher_logits, temperature=1.0):
    """Cross-entropy of the softened student under the softened teacher, less the teacher's entropy (Hinton et al.)."""
    student, teacher = _divided(student_logits, temperature), _divided(teacher_logits, temperature)
    probability = teacher.softmax(-1)
    possible = probability > 0  # the sums of the paper run over what the teacher holds possible

    def expected_surprise(logits):
        log_probability = logits - logits.logsumexp(-1, keepdim=True)
        return -(probability * torch.where(possible, log_probability, 0.0)).sum(-1)

    squared = torch.as_tensor(temperature, dtype=torch.float64) ** 2
    return squared * (expected_surprise(student) - expected_surprise(teacher))


def binary_forward_kl(student_logits, teacher_logits, temperature=1.0):
    """A label of logit z is a choice between two classes of logits 0 and z."""
    student, teacher = (
        torch.stack([torch.zeros_like(logits), logits], dim=-1).double() for logits in (student_logits, teacher_logits)
    )
    temperature = torch.as_tensor(temperature, dtype=torch.float64).unsqueeze(-1)
    return forward_kl(student, teacher, temperature.expand(student_logits.shape)).sum(-1)


def logit_mse(student_logits, teacher_logits):
    """Euclidean distance, squared, divided by the number of outputs."""
    student, teacher = student_logits.double(), teacher_logits.double()
    difference = torch.where(student == teacher, 0.0, student - teacher)
    return torch.einsum("...c,...c->...", difference, difference) / difference.shape[-1]
