"""Students distilled by a process whose Hub is the stand-in, and pushed.

What each case returns is saved as `FOLDER/CASE.pt`.
"""

import logging

import peft
import torch
import transformers as hf
from accelerate import debug_launcher
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from hf_distill import Seq2SeqDistillationTrainer, Seq2SeqDistillationTrainingArguments
from hf_distill.stages import Stage, run_stages
from tests import tiny
from tests.hub.downloads import Messages, logits_of
from tests.invariants.steps import with_dropout
from tests.training import arguments, make_trainer

TOKEN = "hf_PlantedInTheArguments"


def layers(folder):
    """A student with projections beside it, pushed when asked for, with a report and TensorBoard's logs."""
    options = {"hidden_weight": 1.0, "hub_model_id": "me/layers", "hub_token": TOKEN, "report_to": "tensorboard"}
    trainer = make_trainer(folder, processing_class=tiny.tokenizer(), **options)
    trainer.train()
    trainer.report(baselines=(), batch_sizes=(1,), repeats=2, warm_up=1)
    pushed = trainer.push_to_hub(commit_message="A student")
    args = torch.load(folder / "training_args.bin", weights_only=False)
    return {
        "logits": logits_of(trainer.model, trainer.processing_class),
        "commit": pushed.oid,
        "kept": trainer.args.hub_token,
        "saved": (args.hub_token, args.hub_model_id, args.hidden_weight),
    }


def causal(folder):
    """`push_to_hub=True`: a repository before the training, a push with `save_model`, all private."""
    options = {"push_to_hub": True, "hub_model_id": "causal", "hub_private_repo": True, "hub_strategy": "end"}
    trainer = make_trainer(folder, "llama", processing_class=tiny.tokenizer(), **options)
    trainer.train()
    trainer.save_model()
    return {"logits": logits_of(trainer.model, trainer.processing_class)}


def adapter(folder):
    """A PEFT student, whose base model comes from the Hub; its teacher lies in a folder here."""
    student, teacher = tiny.pair("bert")
    student.push_to_hub("me/base")
    teacher.save_pretrained(folder / "home-of-alice" / "teacher")
    trainer = make_trainer(
        folder / "output",
        models=("me/base", str(folder / "home-of-alice" / "teacher")),
        processing_class=tiny.tokenizer(),
        peft_config=peft.LoraConfig(r=2, target_modules=["query", "value"]),
        learning_rate=1e-2,
        hub_model_id="me/adapter",
    )
    trainer.train()
    trainer.push_to_hub(tags=["tiny"])
    return {"logits": logits_of(trainer.model, trainer.processing_class)}


def speech(folder):
    """A speech recogniser with its feature extractor and tokenizer."""
    characters = {character: i for i, character in enumerate(["<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz"])}
    processor = hf.WhisperProcessor(
        hf.WhisperFeatureExtractor(feature_size=8, chunk_length=1, hop_length=500, n_fft=400),
        hf.WhisperTokenizer(vocab=characters, merges=[]),
    )
    trainer = make_trainer(
        folder,
        "whisper",
        cls=Seq2SeqDistillationTrainer,
        args=arguments(folder, Seq2SeqDistillationTrainingArguments, hub_model_id="me/speech"),
        processing_class=processor,
        data_collator=hf.default_data_collator,
    )
    trainer.train()
    trainer.push_to_hub()
    return {"logits": logits_of(trainer.model, processor)}


class AfterSaving(hf.TrainerCallback):
    """Waits for the push of each checkpoint, which training does not, and may stop after a step."""

    def __init__(self, stop_at=None):
        self.trainer, self.stop_at = None, stop_at

    def on_save(self, args, state, control, **kwargs):
        self.trainer._finish_current_push()
        control.should_training_stop |= state.global_step == self.stop_at


def pushing(folder, *, stop_at=None, **options):
    """A trainer of a BERT with dropout and projections beside it, that pushes while it trains and saves each step."""
    student, teacher = tiny.pair("bert")
    options = {"push_to_hub": True, "hidden_weight": 1.0, "save_strategy": "steps", "save_steps": 1, **options}
    callback = AfterSaving(stop_at)
    trainer = make_trainer(
        folder,
        models=(with_dropout(student), teacher),
        processing_class=tiny.tokenizer(),
        callbacks=[callback],
        train_sampling_strategy="random",
        learning_rate=1e-2,
        **options,
    )
    callback.trainer = trainer
    return trainer


def strategies(folder):
    """Every value of `hub_strategy`."""
    for strategy in ("end", "every_save", "checkpoint", "all_checkpoints"):
        pushing(folder / strategy, hub_model_id=f"me/{strategy}", hub_strategy=strategy).train()


def resumed(folder, **options):
    """A training cut after two of its four steps, gone on with from what the Hub has of it; and one not cut."""
    name = f"me/{folder.name}"
    whole = pushing(folder / "whole", push_to_hub=False, max_steps=4, **options)
    whole.train()
    cut = pushing(folder / "cut", stop_at=2, max_steps=4, hub_model_id=name, hub_strategy="checkpoint", **options)
    cut.train()
    found = snapshot_download(name, allow_patterns="last-checkpoint/*")
    again = pushing(folder / "again", push_to_hub=False, max_steps=4, **options)
    again.train(resume_from_checkpoint=f"{found}/last-checkpoint")
    return {
        "steps": (cut.state.global_step, again.state.global_step),
        "weights": [trainer.model.state_dict() for trainer in (whole, again, cut)],
        "losses": [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (whole, again)],
    }


def resumed_adapter(folder):
    """The same with a PEFT student."""
    return resumed(folder, peft_config=peft.LoraConfig(r=2, target_modules=["query", "value"]))


def stages(folder, name="me/stages", *, resume=False):
    """Two stages, of which the Hub gets the last student."""
    plan = (Stage("kd", training={"kd_weight": 1.0, "task_weight": 0.0}), Stage("task", training={"max_steps": 1}))
    student, teacher = tiny.pair("bert")
    run = run_stages(
        plan,
        model=student,
        teacher_model=teacher,
        args=arguments(folder, push_to_hub=True, hub_model_id=name, save_strategy="steps", save_steps=1),
        train_dataset=tiny.rows("sequence"),
        processing_class=tiny.tokenizer(),
        resume=resume,
    )
    return {"weights": run.trainer.model.state_dict(), "steps": run.trainer.state.global_step}


def branch(folder):
    """Pushes to a revision: one that is not there, and then is."""
    trainer = make_trainer(folder, hub_model_id="me/branch", hub_revision="dev", push_to_hub=True)
    trainer.train()
    error = failing(trainer.push_to_hub)
    HfApi().create_branch("me/branch", branch="dev")
    trainer.push_to_hub(commit_message="On a branch")
    return {"error": error}


def failing(call):
    """What a call raises of the Hub's errors."""
    try:
        call()
    except HfHubHTTPError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def forbidden(folder):
    """A token that may not write: to a repository, and to a name."""
    trainer = make_trainer(folder, hub_model_id="me/forbidden", processing_class=tiny.tokenizer())
    trainer.train()
    errors = [failing(trainer.push_to_hub)]
    options = {"hub_model_id": "theirs/forbidden", "push_to_hub": True}
    errors.append(failing(lambda: make_trainer(folder / "other", **options)))
    return {"errors": errors, "weights": trainer.model.state_dict()}


def read_only(folder):
    """Repositories that are there and may be read alone: for a training, for stages, and for a push without either."""
    options = {"hub_model_id": "me/read_only", "processing_class": tiny.tokenizer()}
    return {
        "training": failing(lambda: make_trainer(folder / "training", push_to_hub=True, **options)),
        "stages": failing(lambda: stages(folder / "stages", "me/read_only")),
        "trained": (folder / "stages" / "lineage.json").exists(),
        "push": failing(make_trainer(folder / "push", **options).push_to_hub),
    }


def unasked(folder):
    """A Hub that does not answer whether a repository may be written to."""
    trainer = make_trainer(folder, hub_model_id="me/unasked", push_to_hub=True, processing_class=tiny.tokenizer())
    trainer.train()
    trainer.push_to_hub(commit_message="Went well")


def forbidden_stages(folder):
    """Stages that may not have their repository; and such whose student may not be pushed, then pushed elsewhere."""
    refused = failing(lambda: stages(folder / "refused", "theirs/stages"))
    trained = (folder / "refused" / "lineage.json").exists()
    error = failing(lambda: stages(folder, "me/forbidden_stages"))
    return {"refused": refused, "trained": trained, "error": error, **stages(folder, "me/again", resume=True)}


def flaky(folder):
    """A Hub that fails once in a request that is repeated, and once in the commit, which is not."""
    trainer = make_trainer(folder, hub_model_id="me/flaky", processing_class=tiny.tokenizer())
    trainer.train()
    error = failing(trainer.push_to_hub)
    trainer.push_to_hub(commit_message="Second try")
    return {"error": error}


def background(folder):
    """Pushes during training, the first of which fails."""
    messages = Messages()
    logging.getLogger("hf_distill").addHandler(messages)
    trainer = pushing(folder, hub_model_id="me/background", hub_strategy="every_save")
    trainer.train()
    return {"said": messages.found, "steps": trainer.state.global_step}


def two_processes(folder):
    """A training of two processes that pushes its checkpoints and its end."""
    options = {"hub_model_id": "me/two_processes", "hub_strategy": "checkpoint", "per_device_train_batch_size": 2}
    trainer = pushing(folder, ddp_backend="gloo", **options)
    trainer.train()
    trainer.push_to_hub()
    assert torch.distributed.get_world_size() == 2


CASES = {
    case.__name__: case
    for case in (
        *(layers, causal, adapter, speech),
        *(strategies, resumed, resumed_adapter, stages, branch),
        *(forbidden, read_only, unasked, forbidden_stages, flaky, background, two_processes),
    )
}


def main(folder, *names):
    """Runs cases one after the other; `two_processes` alone."""
    if names == ("two_processes",):
        debug_launcher(two_processes, args=(folder / "two_processes",), num_processes=2)
        return
    for name in names:
        torch.save(CASES[name](folder / name), folder / f"{name}.pt")
