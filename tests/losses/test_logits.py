import math

import pytest
import torch
import torch.nn.functional as F

from hf_distill.losses import binary_forward_kl, logit_mse
from tests.losses.cases import random_case

INF = math.inf


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_binary_forward_kl_is_bce_less_the_teachers_entropy_with_the_gradient_of_bce(temperature):
    case = random_case((6,), 5, 0, scale=2.0)
    target = torch.sigmoid(case.teacher / temperature)

    def bce(logits):
        loss = F.binary_cross_entropy_with_logits(logits / temperature, target, reduction="none")
        return loss.sum(-1) * temperature**2

    gradients = []
    for function in (bce, lambda logits: binary_forward_kl(logits, case.teacher, temperature=temperature)):
        student = case.student.detach().requires_grad_()
        gradients.append(torch.autograd.grad(function(student).sum(), student)[0])
    torch.testing.assert_close(gradients[1], gradients[0])
    values = binary_forward_kl(case.student, case.teacher, temperature=temperature)
    torch.testing.assert_close(values, bce(case.student) - bce(case.teacher), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ([1e4], [-1e4], 1e4),
        ([-1e4], [1e4], 1e4),
        ([1e4, -1e4], [1e4, -1e4], 0.0),
        ([0.0], [1e4], math.log(2)),
        ([-INF, INF], [-INF, INF], 0.0),
        ([0.0, 0.0], [-INF, INF], 2 * math.log(2)),
        ([-INF], [0.0], INF),
        ([INF], [0.0], INF),
    ],
)
def test_binary_forward_kl_at_certainty(student, teacher, expected):
    student, teacher = torch.tensor(student, requires_grad=True), torch.tensor(teacher)
    value = binary_forward_kl(student, teacher)
    value.backward()
    torch.testing.assert_close(value.detach(), torch.tensor(expected))
    torch.testing.assert_close(student.grad, torch.sigmoid(student.detach()) - torch.sigmoid(teacher))


def test_logit_mse_is_the_mean_over_outputs_and_needs_no_temperature():
    student, teacher = (
        torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]),
        torch.tensor([[1.0, 4.0, 6.0], [0.0, 0.0, 3.0]]),
    )
    values = logit_mse(student, teacher)
    assert values.tolist() == pytest.approx([13 / 3, 3.0])
    torch.testing.assert_close(16 * logit_mse(student / 4, teacher / 4), values)


def test_logit_mse_counts_a_padded_vocabulary_as_agreement():
    student = torch.tensor([[1.0, -INF]], requires_grad=True)
    values = logit_mse(student, torch.tensor([[3.0, -INF]]))
    values.sum().backward()
    assert values.item() == 2.0
    assert student.grad.tolist() == [[-2.0, 0.0]]
    assert logit_mse(torch.tensor([1.0, 0.0]), torch.tensor([1.0, -INF])) == INF
