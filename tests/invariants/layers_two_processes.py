"""Terms between layers, trained by two processes over gloo."""

import torch

from hf_distill import DistillationTrainer, DistillationTrainingArguments
from tests import tiny
from tests.invariants.steps import recorded, step_options
from tests.invariants.test_layer_exactness import BATCH_SCOPED, ITEM_SCOPED, config, rows_of

SPLITS = ((4, 1), (2, 2))
TRAINING_ROWS = 11  # a step of 8 rows, and one of 3 that the processes fill up with repeated rows
HEADS = ("bert", "bert-choices", "llama", "t5", "vit", "wav2vec2-ctc", "whisper")
# Stage one of TinyBERT: the head gets no gradient, and DDP must not wait for one.
LAYERS_ONLY = {"hidden_weight": 1.0, "attention_weight": 1.0, "task_weight": 0.0, "kd_weight": 0.0}
CASES = {f"{name}, layers only": (name, LAYERS_ONLY, SPLITS if name == "bert" else ((2, 2),)) for name in HEADS} | {
    "bert, every item": ("bert", {"distillation_config": config(*ITEM_SCOPED)}, SPLITS),
    "llama, every item": ("llama", {"distillation_config": config(*ITEM_SCOPED)}, ((2, 2),)),
    "bert, whole batch": ("bert", {"distillation_config": config(*BATCH_SCOPED)}, ((4, 1),)),
    "bert, windows": (
        "bert",
        {
            "distillation_config": config(
                {"student": "hidden[*]", "loss": "hidden_mse", "active": [0, 0.5]},
                {"student": "attention_scores[*]", "loss": "attention_mse", "active": [0.5, 1]},
                {"student": "hidden[-1]", "teacher": "hidden[-1]", "loss": "hidden_mse", "active": [0.5, 1]},
                task=0.0,
                kd=0.0,
            )
        },
        ((2, 2),),
    ),
    "bert, checkpointed": ("bert", {**LAYERS_ONLY, "activation_checkpointing": True}, ((2, 2),)),
}


def train(name, settings, batch, accumulation, output_dir, **changes):
    """The gradients and logs of a run."""
    student, teacher = tiny.pair(name)
    rows = rows_of(name, {"domain": "domain"} if "distillation_config" in settings else None)
    rows = [*rows, *rows][:TRAINING_ROWS]
    options = step_options(output_dir, batch, accumulation, **settings, **changes)
    args = DistillationTrainingArguments(**options)
    trainer = DistillationTrainer(model=student, teacher_model=teacher, args=args, train_dataset=rows)
    run = recorded(trainer)
    return {"gradients": run.gradients, "logs": run.logs}


def save_results(path):
    results = {
        f"{case}, {batch}x{accumulation}": train(
            name, settings, batch, accumulation, f"{path}.output", ddp_backend="gloo"
        )
        for case, (name, settings, splits) in CASES.items()
        for batch, accumulation in splits
    }
    if torch.distributed.get_rank() == 0:
        torch.save(results | {"processes": torch.distributed.get_world_size()}, path)
