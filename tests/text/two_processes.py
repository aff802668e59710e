"""Packed and padding-free batches of two processes over gloo."""

import torch
from datasets import Dataset

from hf_distill import DistillationTrainer
from tests.text.corpus import SENTENCES, tokenizer
from tests.text.models import pair
from tests.training import arguments, logged

WAYS = {
    "padded": {},
    "padding-free": {"padding_free": True},
    "packed": {"packing": True},
    "packed, padding-free": {"packing": True, "padding_free": True},
}
# Seven texts, of which three make a packed row: the last batch of two ranks is filled up by rows seen before.
ROWS = [{"text": " ".join(SENTENCES[i % 5].split()[: 2 + i])} for i in range(7)]
STREAM = "stream"


def train(way, batch, output_dir, **changes):
    """What two epochs log; each is one step over all texts."""
    student, teacher = pair("llama")
    options = {"max_steps": -1, "num_train_epochs": 2, "max_length": 32, "learning_rate": 1e-3, **changes}
    data = Dataset.from_list(ROWS)
    trainer = DistillationTrainer(
        student,
        arguments(output_dir, per_device_train_batch_size=batch, **WAYS[way], **options),
        teacher_model=teacher,
        train_dataset=data,
        processing_class=tokenizer(),
    )
    trainer.train()
    return {name: logged(trainer, name) for name in ("loss", "loss_task", "loss_kd", "labelled_fraction", "grad_norm")}


def refusal_of_a_stream(output_dir, **changes):
    """What is said of a stream whose batches the main process would make."""
    student, teacher = pair("llama")
    data = Dataset.from_list(ROWS).to_iterable_dataset()
    args = arguments(output_dir, padding_free=True, **changes)
    try:
        DistillationTrainer(student, args, teacher_model=teacher, train_dataset=data, processing_class=tokenizer())
    except ValueError as error:
        return str(error)
    return ""


def save_results(path):
    folder = f"{path}.output"
    results = {way: train(way, 4 if way.startswith("padd") else 2, folder, ddp_backend="gloo") for way in WAYS}
    # One of the two ranks has nothing but rows of the other.
    results["one rank"] = train("packed, padding-free", 4, folder, ddp_backend="gloo")
    results[STREAM] = refusal_of_a_stream(folder, ddp_backend="gloo")
    free = {"accelerator_config": {"dispatch_batches": False}}
    results["free stream"] = refusal_of_a_stream(folder, ddp_backend="gloo", **free)
    if torch.distributed.get_rank() == 0:
        torch.save(results | {"processes": torch.distributed.get_world_size()}, path)
