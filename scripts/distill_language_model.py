"""Distil a causal language model on text: plain, prompts and completions, or conversations.

    python scripts/distill_language_model.py --teacher big-llama --student small-llama --dataset corpus.txt \
        --packing --packing_strategy wrapped --max_length 256 --output_dir distilled --kd_weight 0.9 --task_weight 0.1

    # answers of the teacher, written before by `hf-distill generate`, and a share of batches that the student writes
    python scripts/distill_language_model.py --teacher big-llama --student small-llama --dataset answers \
        --lmbda 0.25 --output_dir distilled

    # adapters alone; without --teacher the base, with the adapters off, teaches
    python scripts/distill_language_model.py --teacher big-llama --student small-llama --lora_rank 16 \
        --dataset chats.jsonl --output_dir adapter

The data set is a file, a folder, or a name on the Hub. All options of TrainingArguments hold; see --help.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from datasets import DatasetDict, load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer, HfArgumentParser

from hf_distill import DistillationTrainer, DistillationTrainingArguments

LOADERS = {".txt": "text", ".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass
class ScriptArguments:
    """What to distil into what, on which text."""

    student: str = field(metadata={"help": "The student to train: a Hub name or a folder."})
    dataset: str = field(metadata={"help": "A file, a folder or a Hub name, with text, prompts and completions, or "
                                           "messages."})  # fmt: skip
    teacher: str | None = field(default=None, metadata={"help": "The teacher: a Hub name or a folder."})
    lora_rank: int = field(default=0, metadata={"help": "Train LoRA adapters of this rank alone; 0 trains all."})
    streaming: bool = field(default=False, metadata={"help": "Read the data set as it is trained on; needs "
                                                             "--max_steps and a split for evaluation."})  # fmt: skip


def load_splits(script: ScriptArguments) -> DatasetDict:
    """The training and the evaluation text; without a split for evaluation, a twentieth is held out."""
    suffix, name = Path(script.dataset).suffix, script.dataset
    options = {"data_files": name} if suffix in LOADERS else {}
    splits = load_dataset(LOADERS.get(suffix, name), streaming=script.streaming, **options)
    held_out = next((name for name in ("validation", "test") if name in splits), None)
    if held_out is None and not script.streaming:
        return splits["train"].train_test_split(test_size=0.05, seed=0)
    return {"train": splits["train"], "test": splits[held_out] if held_out else None}


def main() -> None:
    """Trains, evaluates and saves the student."""
    script, args = HfArgumentParser((ScriptArguments, DistillationTrainingArguments)).parse_args_into_dataclasses()
    splits = load_splits(script)
    trainer = DistillationTrainer(
        model=script.student,
        teacher_model=script.teacher,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        processing_class=AutoTokenizer.from_pretrained(script.student),
        peft_config=LoraConfig(r=script.lora_rank, target_modules="all-linear") if script.lora_rank else None,
    )
    resume = args.resume_from_checkpoint  # a folder, or true: from the last checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    trainer.save_model()
    if splits["test"] is not None:
        metrics = trainer.evaluate()
        metrics["eval_perplexity"] = math.exp(metrics["eval_loss"])
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
