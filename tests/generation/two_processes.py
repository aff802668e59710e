"""The answers of `test_resuming`, by two processes over gloo."""

import torch

from hf_distill.generation.answers import generate_answers
from tests.generation.writers import SAMPLED, SMALL, causal, some_prompts, words


def write(*folders):
    for folder in folders:
        generate_answers(causal(), some_prompts(15), folder, tokenizer=words(), **SMALL, **SAMPLED)
    assert torch.distributed.get_world_size() == 2
