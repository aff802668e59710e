"""Twins of the divergences: sums over classes of float64 logarithms of probabilities.

Each takes (..., classes) tensors and returns (...,) float64 values that torch can differentiate.
"""

import math

import torch

from tests.references.logits import forward_kl

# What a softmax in float32 takes for no probability at all.
NEGLIGIBLE = math.log(torch.finfo(torch.float32).tiny)


def _log_probabilities(logits, temperature):
    logits = logits.double() / torch.as_tensor(temperature, dtype=torch.float64).unsqueeze(-1)
    return logits - logits.logsumexp(-1, keepdim=True)


def _times_square(temperature, values):
    return torch.as_tensor(temperature, dtype=torch.float64) ** 2 * values


def _expected(log_probability, surplus):
    """The mean of `surplus` under the probabilities, over the classes that have one."""
    happens = log_probability > -math.inf
    return (log_probability.exp() * torch.where(happens, surplus, 0.0)).sum(-1)


def _possible_to_either(student, teacher):
    """Both sides without -inf where it is in both, which no mixture can take the gradient of."""
    neither = (student == -math.inf) & (teacher == -math.inf)
    return torch.where(neither, -1e9, student), torch.where(neither, -1e9, teacher)


def reverse_kl(student_logits, teacher_logits, temperature=1.0):
    """The student's cross-entropy under the teacher, less its own entropy; +inf is a constant (MiniLLM)."""
    student = _log_probabilities(student_logits, temperature)
    teacher = _log_probabilities(teacher_logits, temperature)
    happens = student.detach() - student.detach().amax(-1, keepdim=True) > NEGLIGIBLE
    infinite = (happens & (teacher == -math.inf)).any(-1)
    finite = happens & (teacher > -math.inf)
    own, others = (torch.where(finite, logits, 0.0) for logits in (student, teacher))
    values = (torch.where(finite, student.exp(), 0.0) * (own - others)).sum(-1)
    broken = (student + teacher).isnan().any(-1)
    values = torch.where(broken, student.sum(-1), values)
    return _times_square(temperature, torch.where(infinite & ~broken, math.inf, values))


def symmetric_kl(student_logits, teacher_logits, temperature=1.0, share=0.5):
    """A mean of the two directions."""
    if share in (0, 1):
        return (reverse_kl, forward_kl)[int(share)](student_logits, teacher_logits, temperature)
    forward = forward_kl(student_logits, teacher_logits, temperature)
    return share * forward + (1 - share) * reverse_kl(student_logits, teacher_logits, temperature)


def _to_mixture(student_logits, teacher_logits, temperature, share):
    """KL of the teacher and of the student from their mixture, in which the teacher has `share`, from log-sum-exp."""
    student, teacher = _possible_to_either(
        _log_probabilities(student_logits, temperature), _log_probabilities(teacher_logits, temperature)
    )
    mixture = torch.logaddexp(teacher + math.log(share), student + math.log1p(-share))
    return _expected(teacher, teacher - mixture), _expected(student, student - mixture)


def jsd(student_logits, teacher_logits, temperature=1.0, beta=0.5):
    """GKD's mean of both KL to the mixture, over the product of its two weights; each end is the KL it tends to."""
    if beta in (0, 1):
        return generalized_jsd(student_logits, teacher_logits, temperature, beta)
    values = generalized_jsd(student_logits, teacher_logits, temperature, beta)
    return values / (beta * (1 - beta))


def generalized_jsd(student_logits, teacher_logits, temperature=1.0, beta=0.5):
    """GKD's mean of both KL to the mixture, with TRL's ends."""
    if beta in (0, 1):
        return (forward_kl, reverse_kl)[int(beta)](student_logits, teacher_logits, temperature)
    from_teacher, from_student = _to_mixture(student_logits, teacher_logits, temperature, beta)
    return _times_square(temperature, beta * from_teacher + (1 - beta) * from_student)


def skewed_kl(student_logits, teacher_logits, temperature=1.0, skew=0.1):
    """DistiLLM's SKL."""
    if skew == 0:
        return forward_kl(student_logits, teacher_logits, temperature)
    return _times_square(temperature, _to_mixture(student_logits, teacher_logits, temperature, skew)[0])


def skewed_reverse_kl(student_logits, teacher_logits, temperature=1.0, skew=0.1):
    """DistiLLM's SRKL: the same with the sides exchanged."""
    if skew == 0:
        return reverse_kl(student_logits, teacher_logits, temperature)
    student, teacher = _possible_to_either(
        _log_probabilities(student_logits, temperature), _log_probabilities(teacher_logits, temperature)
    )
    mixture = torch.logaddexp(student + math.log(skew), teacher + math.log1p(-skew))
    return _times_square(temperature, _expected(student, student - mixture))


def adaptive_kl(student_logits, teacher_logits, temperature=1.0, head=0.5):
    """Row after row, the classes from the teacher's likeliest on, until they fill the head (Wu et al.)."""
    forward = forward_kl(student_logits, teacher_logits, temperature)
    reverse = reverse_kl(student_logits, teacher_logits, temperature)
    student = _log_probabilities(student_logits.detach(), temperature).exp()
    teacher = _log_probabilities(teacher_logits.detach(), temperature).exp()
    weights = torch.zeros(*forward.shape, 2, dtype=torch.float64)
    classes = student.shape[-1]
    for gaps, probs, weight in zip(
        (teacher - student).abs().view(-1, classes), teacher.view(-1, classes), weights.view(-1, 2), strict=True
    ):
        held = 0.0
        for rank, index in enumerate(probs.argsort(descending=True).tolist()):
            held += probs[index].item()
            weight[0 if rank == 0 or held <= head else 1] += gaps[index]
    total = weights.sum(-1, keepdim=True)
    weights = torch.where(total > 0, weights / total, 0.5)
    # A weight of 0 does not make an infinite KL finite.
    first, second = (weights[..., side].clamp(min=1e-300) for side in (0, 1))
    return first * forward + second * reverse


def tvd(student_logits, teacher_logits, temperature=1.0):
    """The probability that lies where the student gives more than the teacher; on a tie, half of the slope."""
    student = _log_probabilities(student_logits, temperature).exp()
    teacher = _log_probabilities(teacher_logits, temperature).exp()
    return _times_square(temperature, torch.nn.functional.l1_loss(student, teacher, reduction="none").sum(-1) / 2)


def uld(student_logits, teacher_logits, temperature=1.0):
    """Where all classes are equally far apart: the mass to be moved both ways between two ranked lists."""
    ranked = []
    width = max(student_logits.shape[-1], teacher_logits.shape[-1])
    for logits in (student_logits, teacher_logits):
        probabilities = _log_probabilities(logits, temperature).exp()
        best = probabilities.topk(probabilities.shape[-1], dim=-1).values
        ranked.append(torch.cat([best, best.new_zeros(*best.shape[:-1], width - best.shape[-1])], -1))
    student, teacher = ranked
    return _times_square(temperature, torch.nn.functional.l1_loss(student, teacher, reduction="none").sum(-1))


def squared_hellinger(student_logits, teacher_logits, temperature=1.0):
    """1 less the Bhattacharyya coefficient."""
    student, teacher = _possible_to_either(
        _log_probabilities(student_logits, temperature), _log_probabilities(teacher_logits, temperature)
    )
    return _times_square(temperature, 1 - ((student + teacher) / 2).exp().sum(-1))


def top_k_kl(student_logits, teacher_logits, temperature=1.0, k=64):
    """Forward KL of k + 1 outcomes, the last of which is "any other class"."""
    classes = student_logits.shape[-1]
    if k >= classes:
        return forward_kl(student_logits, teacher_logits, temperature)
    order = teacher_logits.argsort(-1, descending=True)
    outcomes = []
    for logits in (student_logits, teacher_logits):
        log_probability = _log_probabilities(logits, temperature).gather(-1, order)
        rest = log_probability[..., k:]
        impossible = (rest == -math.inf).all(-1, keepdim=True)
        total = torch.where(impossible, 0.0, rest).logsumexp(-1, keepdim=True)
        outcomes.append(torch.cat([log_probability[..., :k], torch.where(impossible, -math.inf, total)], -1))
    return _times_square(temperature, forward_kl(*outcomes))
