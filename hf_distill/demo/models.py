"""Teacher and student of the demo: by name, or small BERTs from scratch with a WordPiece trained on the spot."""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

VOCABULARY_SIZE = 4000
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]  # the trainer numbers them in this order


@dataclass(frozen=True)
class Shape:
    """Layers and width of a BERT from scratch; heads are 32 wide, the feed-forward four times the width."""

    layers: int
    width: int


TEACHER_SHAPE = Shape(layers=2, width=128)
STUDENT_SHAPE = Shape(layers=1, width=64)


def train_wordpiece(texts: Sequence[str], *, vocabulary_size: int = VOCABULARY_SIZE) -> PreTrainedTokenizerFast:
    """Returns a lower-casing BERT tokenizer whose word pieces are learned from the texts."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=vocabulary_size, special_tokens=SPECIAL_TOKENS, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", SPECIAL_TOKENS.index("[SEP]")), ("[CLS]", SPECIAL_TOKENS.index("[CLS]"))
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def load_tokenizers(
    student: str | None, teacher: str | None, texts: Sequence[str]
) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """Returns the student's and the teacher's tokenizer.

    A named model has its own; one from scratch shares the other's; two from scratch share a WordPiece of the texts.
    """
    if student is None and teacher is None:
        shared = train_wordpiece(texts)
        return shared, shared
    student_tokenizer = AutoTokenizer.from_pretrained(student or teacher)
    teacher_tokenizer = AutoTokenizer.from_pretrained(teacher or student)
    return student_tokenizer, teacher_tokenizer


def build_classifier(
    name: str | None, *, shape: Shape, tokenizer: PreTrainedTokenizerBase, label_names: Sequence[str]
) -> PreTrainedModel:
    """Returns a classifier over the labels: loaded under its name, else a BERT of the shape with random weights."""
    id2label = dict(enumerate(label_names))
    label2id = {label: index for index, label in id2label.items()}
    if name is not None:
        return AutoModelForSequenceClassification.from_pretrained(name, id2label=id2label, label2id=label2id)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // 32,
        intermediate_size=4 * shape.width,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        id2label=id2label,
        label2id=label2id,
    )
    return BertForSequenceClassification(config)


def load_classifier(name: str, *, label_names: Sequence[str]) -> PreTrainedModel:
    """Returns a fine-tuned classifier as it is, after a look at its labels: as many, and in the same order.

    Labels called LABEL_0, LABEL_1, ... say nothing about their order, which is then taken to be the dataset's.
    """
    model = AutoModelForSequenceClassification.from_pretrained(name)
    own = [model.config.id2label[index] for index in range(model.config.num_labels)]
    unnamed = own == [f"LABEL_{index}" for index in range(len(own))]
    same = [label.lower() for label in own] == [label.lower() for label in label_names]
    if len(own) != len(label_names) or not (unnamed or same):
        raise ValueError(
            f"Teacher '{name}' has the labels {own}, the dataset {list(label_names)}. "
            "Give teacher_steps > 0 to fine-tune it, or a teacher with the dataset's labels in the same order."
        )
    return model
