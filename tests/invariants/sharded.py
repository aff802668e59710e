"""Language models of which two processes hold a shard each (FSDP2)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from hf_distill import DistillationTrainer, DistillationTrainingArguments
from hf_distill.losses import chunked_head
from tests import tiny
from tests.invariants.steps import Recorder, step_options
from tests.invariants.test_without_logits import Largest

TRAINING_ROWS = 11  # a step of 8 rows, and one of 3 that the processes fill up with repeated rows
EVALUATION_ROWS = 7
LENGTH = 40  # so that a micro-batch has more tokens than a transposed weight of the head has rows, one for each row


@dataclass
class Case:
    """A student, and how it is taken apart; `batch` and `accumulation` are those of each process.

    `teacher` is the `distributed_config` of a teacher that is taken apart too.
    """

    student: str = "llama"
    fsdp: dict[str, Any] = field(default_factory=dict)
    batch: int = 4
    accumulation: int = 1
    teacher: DistributedConfig | None = None
    changes: dict[str, Any] = field(default_factory=dict)


# accelerate wraps norm and head as one, whose weights stay after the forward, but for what the config names itself.
_ALL_APART = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer", "LlamaRMSNorm", "Linear"]}
_EVALUATES = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 1}
CASES = {
    "a head of its own": Case(fsdp={"reshard_after_forward": True}),
    "weights that stay": Case(fsdp={"reshard_after_forward": False}, batch=2, accumulation=2),
    "a tied head": Case("tied", batch=2, accumulation=2, changes=_EVALUATES),
    "positions in the root": Case("gpt2"),
    "every layer apart": Case(fsdp=_ALL_APART, batch=2, accumulation=2),
    "a head that trains alone": Case("head alone"),
    "a head that trains alone and apart": Case("head alone", fsdp=_ALL_APART),
    "checkpointing": Case("tied", fsdp={"activation_checkpointing": True}),
    "weights from the first process": Case("tied", fsdp={"cpu_ram_efficient_loading": True}),
    "adapters": Case("adapters"),
    "a teacher in shards": Case(teacher=DistributedConfig(fsdp_size=2)),
    "a dense loss": Case("tied", changes={"label_smoothing_factor": 0.1}),
    "bfloat16": Case(changes={"bf16": True}),
}


class _Gathered(Recorder):
    """Records whole gradients, and the largest tensor of logits."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        self.run.gradients.append(torch.cat([whole(gradient).double().flatten() for gradient in gradients]))


def whole(tensor):
    """All of a tensor, of which this process may hold a shard; all processes must ask."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(model):
    """Whether this process holds but a part of the model."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def models_of(student):
    """Student and teacher; the teacher is None where the student's base teaches."""
    if student == "gpt2":
        return tiny.pair(student)
    llama, teacher = tiny.pair("llama")
    if student == "tied":
        torch.manual_seed(0)
        llama = tiny.llama(tie_word_embeddings=True)
    elif student == "head alone":
        for name, parameter in llama.named_parameters():
            parameter.requires_grad_(name == "lm_head.weight")
    elif student == "adapters":
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
        return peft.get_peft_model(llama, config), None
    return llama, teacher


def sharded_arguments(options, fsdp):
    """Arguments that take the student apart on CPUs."""
    options = {**options, "ddp_backend": "gloo", "fsdp": True, "fsdp_config": {"version": 2, **fsdp}}
    args = DistillationTrainingArguments(**options)
    # accelerate (1.15) takes apart what trains on accelerators alone, though nothing it does then needs one.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return args


def trainer_of(case, output_dir, *, batch=None, rows=TRAINING_ROWS, **changes):
    """The trainer of a case: of one process, which takes nothing apart, where it gives the rows of a step."""
    student, teacher = models_of(case.student)
    sizes = (batch, 1) if batch else (case.batch, case.accumulation)
    options = step_options(output_dir, *sizes, per_device_eval_batch_size=2, **case.changes, **changes)
    data = tiny.rows("causal", count=rows, length=LENGTH)
    if case.teacher and not batch:
        options["teacher_model_init_kwargs"] = {"distributed_config": case.teacher}
        teacher = f"{output_dir}.teacher"
    return DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=DistillationTrainingArguments(**options) if batch else sharded_arguments(options, case.fsdp),
        train_dataset=data,
        eval_dataset=data[:EVALUATION_ROWS],
    )


def train_and_evaluate(case, output_dir, *, batch=None):
    """What a case leaves behind: gradients and logs of its steps, weights, metrics, and how they came about."""
    trainer, recorder = trainer_of(case, output_dir, batch=batch), _Gathered()
    trainer.add_callback(recorder)
    with Largest() as largest:
        trainer.train()
    return {
        "gradients": recorder.run.gradients,
        "logs": recorder.run.logs,
        "weights": {name: whole(value) for name, value in trainer.model.state_dict().items()},
        "metrics": [*(log for log in trainer.state.log_history if "eval_kd" in log), trainer.evaluate()],
        "reason": trainer._chunked.reason,
        "rows": largest.rows,
        "sharded": [is_sharded(model) for model in (trainer.model, trainer.teacher.model)],
    }


def saved_and_resumed(folder):
    """The weights of a training, of what it saved, and of one that was resumed after its first step."""
    weights, case = {}, Case("tied")
    for name, checkpoint in (("whole", None), ("resumed", f"{folder}/checkpoint-1")):
        changes = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "learning_rate": 1e-2}
        trainer = trainer_of(case, str(folder), rows=16, **changes)
        trainer.train(resume_from_checkpoint=checkpoint)
        weights[name] = {key: whole(value) for key, value in trainer.model.state_dict().items()}
    trainer.save_model(str(folder))
    torch.distributed.barrier()
    student, loading = type(models_of("tied")[0]).from_pretrained(folder, output_loading_info=True)
    return {**weights, "saved": student.state_dict(), "lost": sorted(loading["missing_keys"])}


def save_results(path):
    chunked_head._SMALLEST_CHUNK, chunked_head._CPU_CHUNK_BYTES = 4, 1
    results = {name: train_and_evaluate(case, f"{path}.output") for name, case in CASES.items()}
    results["saved"] = saved_and_resumed(Path(f"{path}.saved"))
    if torch.distributed.get_rank() == 0:
        torch.save(results | {"processes": torch.distributed.get_world_size()}, path)
