"""`python -m tests.generation.two_processes FOLDER...`: the answers of `test_resuming`, by two processes over gloo."""

import gc
import sys

import torch
from accelerate import debug_launcher

from hf_distill.generation.answers import generate_answers
from tests.generation.writers import SAMPLED, SMALL, causal, some_prompts, words


def write(*folders):
    for folder in folders:
        generate_answers(causal(), some_prompts(15), folder, tokenizer=words(), **SMALL, **SAMPLED)
    assert torch.distributed.get_world_size() == 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # else each process looks for garbage in all that was imported
    debug_launcher(write, args=tuple(sys.argv[1:]), num_processes=2)
