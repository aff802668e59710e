"""Distil a causal language model on plain text: a teacher and a student of one tokenizer, by name or path.

    python scripts/distill_language_model.py --teacher big-llama --student small-llama --dataset corpus.txt \
        --output_dir distilled --kd_weight 0.9 --task_weight 0.1 --temperature 1

The data set is a file, a folder, or a name on the Hub. All options of TrainingArguments hold; see --help.
"""

from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from datasets import DatasetDict, load_dataset
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, HfArgumentParser

from hf_distill import DistillationTrainer, DistillationTrainingArguments, compute_metrics_for
from hf_distill.metrics import preprocess_logits_for

LOADERS = {".txt": "text", ".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass
class ScriptArguments:
    """What to distil into what, on which text."""

    teacher: str = field(metadata={"help": "The teacher: a Hub name or a folder."})
    student: str = field(metadata={"help": "The student to train: a Hub name or a folder."})
    dataset: str = field(metadata={"help": "A file, a folder or a Hub name."})
    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    block_size: int = field(default=256, metadata={"help": "Tokens in a training row."})


def load_splits(script: ScriptArguments) -> DatasetDict:
    """The training and the evaluation text; without a split for evaluation, a twentieth is held out."""
    suffix, name = Path(script.dataset).suffix, script.dataset
    splits = load_dataset(LOADERS[suffix], data_files=name) if suffix in LOADERS else load_dataset(name)
    held_out = next((name for name in ("validation", "test") if name in splits), None)
    if held_out is None:
        return splits["train"].train_test_split(test_size=0.05, seed=0)
    return DatasetDict(train=splits["train"], test=splits[held_out])


def main() -> None:
    """Trains, evaluates and saves the student."""
    script, args = HfArgumentParser((ScriptArguments, DistillationTrainingArguments)).parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(script.student)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def blocks(rows: dict) -> dict:
        tokens = list(
            chain.from_iterable(tokenizer((text or "") + "\n")["input_ids"] for text in rows[script.text_column])
        )
        starts = range(0, len(tokens) - script.block_size + 1, script.block_size)
        return {"input_ids": [tokens[start : start + script.block_size] for start in starts]}

    splits = load_splits(script)
    with args.main_process_first(desc="tokenizing"):
        splits = splits.map(blocks, batched=True, batch_size=10_000, remove_columns=splits["train"].column_names)
    if not len(splits["train"]) or not len(splits["test"]):
        raise ValueError(f"The text is shorter than a block of {script.block_size} tokens; lower --block_size.")
    trainer = DistillationTrainer(
        model=script.student,
        teacher_model=script.teacher,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        compute_metrics=compute_metrics_for("causal_lm"),
        preprocess_logits_for_metrics=preprocess_logits_for("causal_lm"),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_metrics("eval", trainer.evaluate())
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
