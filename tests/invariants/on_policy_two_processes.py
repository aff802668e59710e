"""On-policy steps of two processes over gloo."""

import torch

from tests import tiny
from tests.invariants.steps import distil
from tests.on_policy_cases import ALWAYS, GREEDY, prompt_rows

# Batch per process and accumulation: 8 rows a step with two processes; 11 rows end in a step with repeated ones.
SPLITS = ((4, 1), (2, 2))
# Beside the likeliest answers, which do not depend on who writes them: half of the batches, sampled.
CASES = {
    "always": {**ALWAYS, "generation_kwargs": GREEDY},
    "half": {**ALWAYS, "lmbda": 0.5, "task_weight": 1.0, "num_train_epochs": 4},
}


def steps_of(case, batch, accumulation, output_dir, **changes):
    """What one case leaves behind: gradients and logs of its steps."""
    options = {**CASES[case], **changes}
    run = distil(tiny.pair("llama"), prompt_rows(11), output_dir, batch, accumulation, **options)
    return {"gradients": run.gradients, "logs": run.logs}


def save_results(path):
    cases = [("always", *split) for split in SPLITS] + [("half", 4, 1)]
    results = {str(case): steps_of(*case, f"{path}.output", ddp_backend="gloo") for case in cases}
    if torch.distributed.get_rank() == 0:
        torch.save(results | {"processes": torch.distributed.get_world_size()}, path)
