"""Twins of the losses on logits, the fused terms of a language model included.

Each takes (..., classes) tensors and returns (...,) float64 values that torch can differentiate. The fused terms of a
language model have their twin here too.
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


def cross_entropy_and_forward_kl(
    student_logits, teacher_logits, targets, *, task_weights, kd_weights, temperature=1.0
):
    """Loss, cross-entropy and KL * temperature²; each term is formed over the items alone that have a weight in it."""
    in_task, in_kd = task_weights > 0, kd_weights > 0
    chosen = student_logits[in_task].double()
    cross_entropy = chosen.logsumexp(-1) - chosen.gather(-1, targets[in_task].unsqueeze(-1)).squeeze(-1)
    temperature = torch.as_tensor(temperature, dtype=torch.float64).expand(targets.shape)
    shared = teacher_logits.shape[-1]
    kl = forward_kl(student_logits[in_kd][..., :shared], teacher_logits[in_kd], temperature[in_kd])
    loss = (task_weights[in_task] * cross_entropy).sum() + (kd_weights[in_kd] * kl).sum()
    nothing = torch.zeros(targets.shape, dtype=torch.float64)
    per_item = (nothing.masked_scatter(in_task, cross_entropy), nothing.masked_scatter(in_kd, kl))
    return loss, *(values.detach() for values in per_item)
