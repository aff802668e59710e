"""Causal language models with other tokenizers, compared where both have read the same text."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, default_data_collator
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hf_distill.losses import LOSSES
from hf_distill.token_alignment import tokenize_for_teacher
from tests import tiny
from tests.references import forward_kl, uld
from tests.tokenizers_of_text import LINES, byte_level, sentence_piece
from tests.training import GradientRecorder, assert_same_gradients, logged, make_trainer

PIECES, BYTES = sentence_piece(), byte_level()
TEXTS = [LINES[place % 7] + " " + LINES[place * 3 % 7] for place in range(8)]
ROWS = {"student": 424, "teacher": 328}  # of the heads: some are no token
IN_ONE_STEP = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 1}
ON_CLASSES = [
    name
    for name, spec in ((name, LOSSES.get(name)) for name in LOSSES)
    if spec.feature == "logits" and spec.compares == "classes" and not (spec.takes_targets or spec.compares_rows)
]


def models():
    torch.manual_seed(1)
    teacher = tiny.llama(hidden=48, layers=3, vocab_size=ROWS["teacher"], max_position_embeddings=128)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(25.0 if name.startswith("lm_head") else 2.5)
    torch.manual_seed(0)
    return tiny.llama(vocab_size=ROWS["student"], max_position_embeddings=128), teacher


def data(student_tokenizer=PIECES, teacher_tokenizer=BYTES, texts=TEXTS, **options):
    columns = tokenize_for_teacher(texts, student_tokenizer, teacher_tokenizer, **options)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [{**row, "labels": [-100, -100, *row["input_ids"][2:]]} for row in rows]


def aligned(folder, *, tokenizers=(PIECES, BYTES), multiple=None, **options):
    rows = data(*tokenizers)
    collator = DataCollatorForSeq2Seq(tokenizers[0], pad_to_multiple_of=multiple)
    options = {"kd_weight": 1.0, "task_weight": 0.0, "token_alignment": "offsets", **options}
    options = {"train_dataset": rows, "eval_dataset": rows, "data_collator": collator, "models": models(), **options}
    options = {"processing_class": tokenizers[0], "teacher_processing_class": tokenizers[1], **options}
    return make_trainer(folder, "llama", **options)


def permuted(tokenizer, model):
    """The same tokenizer and model with the ids in another order, special tokens aside."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    moved_ids = torch.randperm(len(tokenizer) - 3, generator=torch.Generator().manual_seed(0)) + 3
    order = [0, 1, 2, *moved_ids.tolist()]
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {token: order[number] for token, number in vocabulary.items()}
    for token in content["added_tokens"]:
        token["id"] = order[token["id"]]
    backend = Tokenizer.from_str(json.dumps(content))
    names = {name: getattr(tokenizer, name) for name in ("unk_token", "bos_token", "eos_token", "pad_token")}
    moved = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in (other.get_input_embeddings().weight, other.lm_head.weight):
            weight[order] = weight[: len(order)].clone()
    return moved, other


def same_tokens():
    """Pairs of ids that spell the same, the ends of a text among them."""
    table = {character: byte for byte, character in bytes_to_unicode().items()}
    special = {*BYTES.all_special_ids}
    theirs = {
        bytes(table[character] for character in token): number
        for token, number in BYTES.get_vocab().items()
        if number not in special
    }
    mine = {}
    for token, number in sorted(PIECES.get_vocab().items(), key=lambda entry: not entry[0].startswith("<0x")):
        if number not in PIECES.all_special_ids:  # a single byte gives way to the character
            mine[bytes([int(token[1:-1], 16)]) if token.startswith("<0x") else token.replace("▁", " ").encode()] = (
                number
            )
    pairs = [(mine[spelled], theirs[spelled]) for spelled in mine.keys() & theirs.keys()]
    return torch.tensor([*pairs, (PIECES.eos_token_id, BYTES.eos_token_id)]).T


def with_rest(logits, ids, count):
    """Log-probabilities of some of the first `count` classes, and of all the others of these together."""
    probabilities = logits[:count].softmax(-1)
    return torch.cat([probabilities[ids], 1 - probabilities[ids].sum(-1, keepdim=True)]).log()


def by_hand(loss, temperature, models):
    """The mean over the paired positions, row by row without padding; and how often both choose the same token."""
    own_ids, other_ids = same_tokens()
    values, same = [], []
    for row in data():
        with torch.no_grad():
            own, others = (
                model(input_ids=torch.tensor([row[name]])).logits[0].double()
                for model, name in zip(models, ("input_ids", "teacher_input_ids"), strict=True)
            )
        for place, other in enumerate(row["teacher_positions"][:-1]):
            if other < 0 or row["labels"][place + 1] == -100:
                continue
            if loss == "uld":
                pair = own[place, : len(PIECES)], others[other, : len(BYTES)]
                values.append(uld(*pair, temperature))
            else:
                pair = with_rest(own[place], own_ids, len(PIECES)), with_rest(others[other], other_ids, len(BYTES))
                values.append(forward_kl(*pair, temperature))
            same.append(own[place, own_ids].argmax() == others[other, other_ids].argmax())
    return torch.stack(values).mean().item(), torch.stack(same).double().mean().item()


@pytest.mark.parametrize("loss", ["uld", "forward_kl", "jsd"])
def test_the_loss_falls_between_other_tokenizers(tmp_path, loss):
    trainer = aligned(tmp_path, kd_loss=loss, max_steps=25, learning_rate=1e-2)
    trainer.train()
    losses = logged(trainer, "loss_kd")
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("loss", ON_CLASSES)
def test_every_loss_over_classes_can_be_taken(tmp_path, loss):
    options = {"top_k_kl": {"k": 5}}.get(loss)
    trainer = aligned(tmp_path, kd_loss=loss, kd_options=options, max_steps=1)
    trainer.train()
    assert 0 < logged(trainer, "loss_kd")[0] < float("inf")


@pytest.mark.parametrize("multiple", [None, 64])
@pytest.mark.parametrize("loss", ["uld", "forward_kl"])
def test_the_loss_is_the_mean_over_the_paired_positions_alone(tmp_path, loss, multiple):
    pair = models()
    expected, agreement = by_hand(loss, 2.0, pair)
    metrics = aligned(tmp_path, models=pair, kd_loss=loss, multiple=multiple).evaluate()
    assert metrics["eval_kd"] == pytest.approx(expected, rel=1e-5)
    assert metrics.get("eval_agreement") == (None if loss == "uld" else pytest.approx(agreement))
    trainer = aligned(tmp_path, models=pair, kd_loss=loss, multiple=multiple, task_weight=0.5, **IN_ONE_STEP)
    trainer.train()
    assert logged(trainer, "loss_kd") == [pytest.approx(expected, rel=1e-5)]


@pytest.mark.parametrize("loss", ["uld", "forward_kl", "reverse_kl"])
@pytest.mark.parametrize("order", ["the same ids", "other ids"])
def test_identical_models_have_no_distance(tmp_path, loss, order):
    student, _ = models()
    tokenizer, teacher = (PIECES, copy.deepcopy(student)) if order == "the same ids" else permuted(PIECES, student)
    trainer = aligned(tmp_path, models=(student, teacher), tokenizers=(PIECES, tokenizer), kd_loss=loss, max_steps=1)
    metrics = trainer.evaluate()
    assert abs(metrics["eval_kd"]) < 1e-6
    assert metrics.get("eval_agreement", 1.0) == 1.0
    trainer.train()
    assert abs(logged(trainer, "loss_kd")[0]) < 1e-6


@pytest.mark.parametrize("loss", ["uld", "forward_kl"])
def test_accumulation_and_padding_change_no_gradient(tmp_path, loss):
    steps = {}
    for size, multiple in ((8, None), (4, 64), (2, None), (1, 32)):
        recorder = GradientRecorder()
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_steps": 1}
        trainer = aligned(tmp_path, kd_loss=loss, task_weight=0.5, multiple=multiple, callbacks=[recorder], **options)
        trainer.train()
        steps[size] = recorder.steps[0], logged(trainer, "loss_kd")[0]
    for gradients, value in steps.values():
        assert value == pytest.approx(steps[8][1], rel=1e-5)
        assert_same_gradients(gradients, steps[8][0])


@pytest.mark.parametrize("sides", [("left", "left"), ("left", "right"), ("right", "left")])
def test_the_side_of_the_padding_does_not_matter(tmp_path, sides):
    tokenizers = [copy.deepcopy(tokenizer) for tokenizer in (PIECES, BYTES)]
    expected = aligned(tmp_path).evaluate()["eval_kd"]
    for tokenizer, side in zip(tokenizers, sides, strict=True):
        tokenizer.padding_side = side
    metrics = aligned(tmp_path, tokenizers=tokenizers).evaluate()
    assert metrics["eval_kd"] == pytest.approx(expected, rel=1e-5)


def test_rows_that_happen_to_be_as_long_as_the_teachers_are_no_others(tmp_path):
    tokenizers, found = (BYTES, PIECES), []
    rows = data(*tokenizers)
    longest = max(len(row["input_ids"]) for row in rows)
    padded = [
        {
            **row,
            "teacher_input_ids": row["teacher_input_ids"] + [0] * (longest - len(row["teacher_input_ids"])),
            "teacher_attention_mask": [place < len(row["teacher_input_ids"]) for place in range(longest)],
        }
        for row in rows
    ]
    for train in (rows, padded):
        options = {"per_device_train_batch_size": 8, "max_steps": 1, "eval_dataset": train}
        trainer = aligned(tmp_path, models=models()[::-1], tokenizers=tokenizers, train_dataset=train, **options)
        found.append(trainer.evaluate()["eval_kd"])
        trainer.train()
        found += logged(trainer, "loss_kd")
    assert found == [pytest.approx(found[0], rel=1e-5)] * 4


def test_a_data_set_is_mapped_to_the_columns_and_keeps_them(tmp_path):
    mapped = Dataset.from_dict({"text": TEXTS, "topic": ["a"] * 8}).map(
        tokenize_for_teacher,
        batched=True,
        input_columns="text",
        fn_kwargs={"student_tokenizer": PIECES, "teacher_tokenizer": BYTES, "max_length": 20},
    )
    mapped = mapped.map(lambda row: {"labels": row["input_ids"]})
    trainer = aligned(tmp_path, train_dataset=mapped, eval_dataset=mapped)
    trainer.train()
    assert logged(trainer, "loss_kd")[0] > 0


def test_columns_that_are_missing_are_refused_before_the_first_step(tmp_path):
    rows = [{name: value for name, value in row.items() if name != "teacher_positions"} for row in data()]
    trainer = aligned(tmp_path, train_dataset=rows, eval_dataset=rows)
    for act in (trainer.train, trainer.evaluate):
        with pytest.raises(ValueError, match=r"reads teacher_positions.*tokenize_for_teacher"):
            act()
    assert trainer.state.global_step == 0


def test_other_tokenizers_without_the_option_are_refused_with_both_ways_out(tmp_path):
    with pytest.raises(ValueError, match=r"token_alignment='offsets'.*kd_loss='uld'.*any other divergence"):
        aligned(tmp_path, token_alignment=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kd_loss": "dkd"}, "'dkd' sets the label's class apart"),
        ({"kd_loss": "logit_mse"}, "'logit_mse' compares the logits as numbers"),
        (
            {"kd_loss": "uld", "temperature": {"policy": "adaptive", "signal": "teacher_entropy"}},
            "other classes on either side",
        ),
        ({"item_weights": [{"by": "teacher", "signal": "confidence"}]}, "Weigh by a column"),
        ({"kd_weight": 0.0, "task_weight": 1.0}, "token_alignment='offsets', but kd_weight is 0"),
        ({"token_alignment": "bytes"}, "token_alignment"),
        ({"teacher_processing_class": None}, "teacher_processing_class is no tokenizer"),
    ],
)
def test_what_cannot_be_aligned_is_refused_with_a_way_out(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        aligned(tmp_path, **options)


def test_heads_that_do_not_predict_the_next_token_are_refused(tmp_path):
    student, teacher = tiny.pair("bert-masked")
    with pytest.raises(ValueError, match="the task is masked_lm"):
        aligned(tmp_path, models=(student, teacher))


def test_a_temperature_for_each_item_is_taken_over_the_shared_tokens(tmp_path):
    policy = {"policy": "adaptive", "signal": "disagreement"}
    trainer = aligned(tmp_path, temperature=policy, max_steps=1)
    trainer.train()
    assert 2 <= logged(trainer, "temperature")[0] <= 10


def test_positions_that_do_not_fit_their_rows_are_refused(tmp_path):
    rows = data()
    rows[0]["teacher_input_ids"] = rows[0]["teacher_input_ids"][:5]
    rows[0]["teacher_attention_mask"] = rows[0]["teacher_attention_mask"][:5]
    with pytest.raises(ValueError, match=r"5 of the teacher.*Cut texts by tokenize_for_teacher alone"):
        aligned(tmp_path, train_dataset=rows).train()


def test_a_collator_that_joins_rows_is_refused(tmp_path):
    def joining(rows):
        ids = torch.tensor([token for row in rows for token in row["input_ids"]])[None]
        return {"input_ids": ids, "labels": ids}

    with pytest.raises(ValueError, match=r"1 rows of 4.*turn packing and padding_free off"):
        aligned(tmp_path, data_collator=joining).train()


def test_rows_of_one_length_need_no_padding(tmp_path):
    rows = [row for row in data(max_length=6) if len(row["teacher_input_ids"]) > 3]
    rows = [
        {**row, **{f"teacher_{name}": row[f"teacher_{name}"][:4] for name in ("input_ids", "attention_mask")}}
        for row in rows
    ]
    rows = [
        {**row, "teacher_positions": [place if place < 4 else -1 for place in row["teacher_positions"]]}
        for row in rows
    ]
    trainer = aligned(tmp_path, train_dataset=rows, data_collator=default_data_collator, max_steps=1)
    trainer.train()
    assert logged(trainer, "loss")[0] >= 0


def test_the_report_tells_of_the_tokens_of_both_sides(tmp_path):
    vocabulary = aligned(tmp_path)._pair.vocabulary
    assert vocabulary.by_text
    assert vocabulary.classes == same_tokens().shape[1]
    assert vocabulary.classes + len(vocabulary.student_only) == len(PIECES)
    assert vocabulary.padding("teacher") == ROWS["teacher"] - len(BYTES)
    assert "tokens that spell the same are compared" in str(vocabulary)


@pytest.mark.parametrize("loss", ["uld", "forward_kl"])
def test_tokens_are_told_to_be_left_out_where_they_are(loss, tmp_path, caplog):
    aligned(tmp_path, kd_loss=loss)
    told = [record for record in caplog.records if "tokens that spell the same are compared" in record.message]
    assert len(told) == (0 if loss == "uld" else 1)  # which sorts the probabilities of all tokens of both
