"""Models and data in a folder, small enough for a training of two steps, for each recipe in `examples/recipes/`."""

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from datasets import Dataset, DatasetDict
from PIL import Image

from hf_distill.demo.models import train_wordpiece
from tests import tiny
from tests.text import corpus, models

WORDS = ["rain", "sun", "song", "band", "table", "chair"]
TEXTS = [f"{WORDS[i % 6]} {WORDS[(i + i // 6) % 6]} {WORDS[(i * 5) % 6]}" for i in range(24)]
NAMES = ["weather", "music", "furniture"]
CLASSES = [NAMES[(i % 6) // 2] for i in range(24)]
IDS = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
TAGS = {0: "O", 1: "B-THING", 2: "I-THING"}


def save(folder: Path, model: Any, *processors: Any) -> str:
    """Writes a model and what reads its inputs."""
    for part in (model, *processors):
        part.save_pretrained(folder)
    return str(folder)


def words(size: int = 60, **options: Any) -> Any:
    """A tokenizer of the texts, with a mask."""
    made = train_wordpiece(TEXTS, vocabulary_size=size)
    made.add_special_tokens({"mask_token": "[MASK]"})
    return made


def encoder(folder: Path, head: str = "SequenceClassification", **config: Any) -> str:
    """A BERT of three layers with its tokenizer."""
    torch.manual_seed(1)
    return save(folder, tiny.bert(head, layers=3, **config), words())


def text_classification(folder: Path) -> dict[str, str]:
    rows = [(text, "" if i % 5 == 4 else CLASSES[i]) for i, text in enumerate(TEXTS)]
    (folder / "texts.csv").write_text("sentence,label\n" + "\n".join(f"{a},{b}" for a, b in rows), encoding="utf-8")
    return {
        "teacher": encoder(folder / "t", **IDS),
        "student.layers": "1",
        "data.train": str(folder / "texts.csv"),
        "report": "false",
    }


def sentence_pair_regression(folder: Path) -> dict[str, str]:
    columns = {"sentence1": TEXTS, "sentence2": TEXTS[::-1], "score": [i / 10 for i in range(24)]}
    Dataset.from_dict(columns).to_json(folder / "pairs.jsonl")
    return {"teacher": encoder(folder / "t", num_labels=1), "student.layers": "1", "data": str(folder / "pairs.jsonl")}


def token_classification(folder: Path) -> dict[str, str]:
    tags = [[TAGS[len(word) % 3] for word in text.split()] for text in TEXTS]
    Dataset.from_dict({"words": [t.split() for t in TEXTS], "ner_tags": tags}).to_parquet(folder / "names.parquet")
    teacher = encoder(folder / "t", "TokenClassification", id2label=TAGS, label2id={v: k for k, v in TAGS.items()})
    return {"teacher": teacher, "student.layers": "2", "data": str(folder / "names.parquet")}


def question_answering(folder: Path) -> dict[str, str]:
    context = [" ".join(TEXTS[i : i + 3]) for i in range(20)]
    answers = [{"text": [c.split()[4]], "answer_start": [len(" ".join(c.split()[:4])) + 1]} for c in context]
    rows = Dataset.from_dict({"question": TEXTS[:20], "context": context, "answers": answers})
    DatasetDict(train=rows, validation=rows.select(range(6))).save_to_disk(folder / "squad")
    return {
        "teacher": encoder(folder / "t", "QuestionAnswering", num_labels=2),
        "student.layers": "1",
        "data.train": str(folder / "squad"),
        "data.train_split": "train",
        "data.max_length": "12",
    }


def masked_language_model(folder: Path) -> dict[str, str]:
    (folder / "corpus.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    teacher = encoder(folder / "t", "MaskedLM", vocab_size=len(words()))
    data = {"data": str(folder / "corpus.txt"), "data.test_fraction": "0.2"}
    return {"teacher": teacher, "student.layers": "1", **data}


def causal_language_model(folder: Path) -> dict[str, str]:
    (folder / "corpus.txt").write_text("\n".join(corpus.SENTENCES * 6), encoding="utf-8")
    student, teacher = models.pair("llama")
    return {
        "teacher": save(folder / "t", teacher, corpus.tokenizer()),
        "student": save(folder / "s", student, corpus.tokenizer()),
        "data": str(folder / "corpus.txt"),
        "max_length": "16",
    }


def chat(folder: Path) -> dict[str, str]:
    talks = [corpus.talk(*corpus.SENTENCES[i % 4 : i % 4 + 2]) for i in range(16)]
    Dataset.from_dict({"messages": talks}).to_json(folder / "chats.jsonl")
    student, teacher = models.pair("qwen3")
    read = corpus.tokenizer(corpus.PLAIN_TEMPLATE)
    return {
        "teacher": save(folder / "t", teacher, read),
        "student": save(folder / "s", student, read),
        "data": str(folder / "chats.jsonl"),
        "max_length": "64",
    }


def seq2seq(folder: Path) -> dict[str, str]:
    lines = [f"{text},{text.split()[0]}" for text in TEXTS]
    (folder / "articles.csv").write_text("article,highlights\n" + "\n".join(lines), encoding="utf-8")
    teacher = save(folder / "t", tiny.bart(layers=3), words())
    return {"teacher": teacher, "student.layers": "{decoder: 1}", "data": str(folder / "articles.csv")}


def image_classification(folder: Path) -> dict[str, str]:
    for number in range(18):
        place = folder / "images" / "train" / NAMES[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number * 9, 99, 200)).save(place / f"{number}.png")
    torch.manual_seed(1)
    teacher = tiny.vit(layers=3)
    teacher.config.id2label, teacher.config.label2id = IDS["id2label"], IDS["label2id"]
    read = hf.ViTImageProcessorPil(size={"height": 16, "width": 16})
    return {"teacher": save(folder / "t", teacher, read), "student.layers": "1", "data": str(folder / "images")}


def audio_classification(folder: Path) -> dict[str, str]:
    sounds = torch.randn(12, 200).tolist()
    rows = {"audio": [sound[: 150 + 4 * i] for i, sound in enumerate(sounds)], "keyword": [i % 3 for i in range(12)]}
    Dataset.from_dict(rows).to_parquet(folder / "sounds.parquet")
    read = hf.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    teacher = save(folder / "t", tiny.wav2vec2("SequenceClassification", layers=3), read)
    return {"teacher": teacher, "student.layers": "1", "data": str(folder / "sounds.parquet")}


def two_stages(folder: Path) -> dict[str, str]:
    rows = Dataset.from_dict({"sentence": TEXTS, "label": CLASSES}).class_encode_column("label")
    DatasetDict(train=rows, validation=rows.select(range(8))).save_to_disk(folder / "texts")
    return {
        "teacher": encoder(folder / "t", **IDS),
        "student": "{layers: 2, hidden_size: 16, heads: 4}",
        "data": str(folder / "texts"),
        "num_train_epochs": "1",
    }


# Each is named as its recipe, and returns the words of the command line that put small models in the place of others.
CASES = {
    make.__name__: make
    for make in (
        text_classification,
        sentence_pair_regression,
        token_classification,
        question_answering,
        masked_language_model,
        causal_language_model,
        chat,
        seq2seq,
        image_classification,
        audio_classification,
        two_stages,
    )
}
SMALL = {
    "max_steps": "2",
    "per_device_train_batch_size": "4",
    "per_device_eval_batch_size": "4",
    "logging_steps": "1",
    "use_cpu": "true",
    "report_to": "none",
}


def command(folder: Path, changes: dict[str, str], **more: str) -> list[str]:
    """The words behind the recipe's name."""
    words = {**changes, **SMALL, "output_dir": str(folder / "out"), **more}
    return [word for key, value in words.items() for word in (f"--{key}", value)]
