"""Train the project's example students, measure them, and write their cards to `model_cards/`.

    python scripts/write_model_cards.py [--only NAME] [--cards]

Each folder there has the `config.json` that made its student, the card with its plots, and what the card is made of.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import Trainer, TrainingArguments, set_seed

from hf_distill import DistillationTrainer, DistillationTrainingArguments, build_student, compute_metrics_for
from hf_distill.card import CardOptions, write_card
from hf_distill.demo.corpus import load_corpus
from hf_distill.demo.models import Shape, build_classifier, train_wordpiece
from hf_distill.run_record import EVIDENCE_FOLDER

FOLDER = Path(__file__).parents[1] / "model_cards"
QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
METRICS = compute_metrics_for("single_label_classification")


def tokenized(rows: Dataset, tokenizer: Any, number: int | None) -> Dataset:
    """The first rows of a shuffle, tokenised."""
    chosen = rows.shuffle(seed=0).select(range(min(number or len(rows), len(rows))))
    return chosen.map(lambda row: tokenizer(row["text"], truncation=True, max_length=32), remove_columns="text")


def make(config: dict[str, Any], folder: Path) -> None:
    """Trains teacher and student as the config says, and writes record, report and plots to the folder."""
    corpus = load_corpus(config["data"]["name"])
    tokenizer = train_wordpiece(corpus.train["text"], vocabulary_size=2000)
    train = tokenized(corpus.train, tokenizer, config["data"]["train_rows"])
    test = tokenized(corpus.test, tokenizer, config["data"]["test_rows"])
    common = {"processing_class": tokenizer, "compute_metrics": METRICS, "train_dataset": train, "eval_dataset": test}
    with tempfile.TemporaryDirectory() as scratch:
        set_seed(0)
        shape = Shape(**config["teacher"]["shape"])
        teacher = build_classifier(None, shape=shape, tokenizer=tokenizer, label_names=corpus.label_names)
        args = TrainingArguments(f"{scratch}/teacher", **QUIET, **config["teacher"]["training"])
        Trainer(teacher, args, **common).train()
        set_seed(0)
        student = build_student(teacher, **config["student"]).model
        args = DistillationTrainingArguments(f"{scratch}/{config['name']}", **QUIET, **config["arguments"])
        trainer = DistillationTrainer(student, args, teacher_model=teacher, **common)
        trainer.train()
        trainer.evaluate()
        trainer.save_model()
        trainer.report(data_name=config["data"]["name"], **config["report"])
        shutil.copytree(Path(args.output_dir, EVIDENCE_FOLDER), folder / EVIDENCE_FOLDER, dirs_exist_ok=True)


def main() -> None:
    """Makes every student of the folder, or one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="One student, by its folder's name.")
    parser.add_argument("--cards", action="store_true", help="Only write the cards anew, of what was measured before.")
    given = parser.parse_args()
    for path in sorted(FOLDER.glob(f"{given.only or '*'}/config.json")):
        config, folder = json.loads(path.read_text(encoding="utf-8")), path.parent
        if not given.cards:
            make(config, folder)
        (folder / "README.md").unlink(missing_ok=True)
        write_card(folder, options=CardOptions(**config["card"]))


if __name__ == "__main__":
    main()
