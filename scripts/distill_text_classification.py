"""Distil a text classifier: a teacher and a student by name or path, and labelled or partly labelled texts.

    python scripts/distill_text_classification.py --teacher bert-base-finetuned --student distilbert-base-uncased \
        --dataset texts.csv --output_dir distilled --kd_weight 0.9 --task_weight 0.1 --temperature 2

The data set is `snips` (in the package), a .csv, .json, .jsonl or .parquet file, a folder, or a name on the Hub. Rows
whose label is empty learn from the teacher alone. All options of TrainingArguments hold; see --help.
"""

from dataclasses import dataclass, field

from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser, set_seed

from hf_distill import DistillationTrainer, DistillationTrainingArguments, compute_metrics_for
from hf_distill.demo.corpus import load_corpus


@dataclass
class ScriptArguments:
    """What to distil into what, on which texts."""

    teacher: str = field(metadata={"help": "The fine-tuned teacher: a Hub name or a folder."})
    student: str = field(metadata={"help": "The student to train: a Hub name or a folder."})
    dataset: str = field(default="snips", metadata={"help": "snips, a file, a folder or a Hub name."})
    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    label_column: str = field(default="label", metadata={"help": "Column of the labels; empty ones are unlabelled."})
    text_length: int = field(default=128, metadata={"help": "Longest input, in tokens."})


def main() -> None:
    """Trains, evaluates and saves the student."""
    script, args = HfArgumentParser((ScriptArguments, DistillationTrainingArguments)).parse_args_into_dataclasses()
    columns = {"text_column": script.text_column, "label_column": script.label_column}
    corpus = load_corpus(script.dataset, **columns, keeps_others=True)
    student_tokenizer = AutoTokenizer.from_pretrained(script.student)
    teacher_tokenizer = AutoTokenizer.from_pretrained(script.teacher)
    own_inputs = student_tokenizer.get_vocab() != teacher_tokenizer.get_vocab()

    def tokenize(rows: dict) -> dict:
        columns = dict(student_tokenizer(rows["text"], truncation=True, max_length=script.text_length))
        if own_inputs:
            teacher = teacher_tokenizer(rows["text"], truncation=True, max_length=script.text_length)
            columns |= {f"teacher_{name}": value for name, value in teacher.items()}
        return columns

    with args.main_process_first(desc="tokenizing"):
        train, test = (rows.map(tokenize, batched=True) for rows in (corpus.train, corpus.test))
    names = dict(enumerate(corpus.label_names))
    if all(name.isdecimal() for name in corpus.label_names):  # numbers are the teacher's own
        names = AutoConfig.from_pretrained(script.teacher).id2label
        if len(corpus.label_names) > len(names):
            raise ValueError(f"The data has the label {corpus.label_names[-1]}, the teacher only {len(names)} labels.")
    set_seed(args.seed)  # a new head is part of the run
    trainer = DistillationTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(
            script.student,
            id2label=names,
            label2id={name: index for index, name in names.items()},
            ignore_mismatched_sizes=True,
            **(args.model_init_kwargs or {}),
        ),
        teacher_model=script.teacher,
        args=args,
        train_dataset=train,
        eval_dataset=test,
        processing_class=student_tokenizer,
        teacher_processing_class=teacher_tokenizer if own_inputs else None,
        compute_metrics=compute_metrics_for("single_label_classification"),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
