"""The columns and masks of a batch: which rows and positions of the layers count, and what the models still read."""

import pytest
import torch
from torch.nn import functional as F

from tests import tiny
from tests.matches import look, pair_of
from tests.test_layer_refusals import HIDDEN, made, recipe, refused, trains
from tests.training import logged, make_trainer

DOMAIN = {"student": "pooled(mean)@hidden[-1]", "loss": "mmd"}


def with_column(data, name, value):
    """The rows with a column more: of each row's number and the row."""
    return [{**row, name: value(number, row)} for number, row in enumerate(data)]


class TestColumns:
    @pytest.mark.parametrize(
        "match", [{**HIDDEN, "mask": "batch:token_type_ids"}, {**DOMAIN, "domain": "labels"}], ids=["mask", "domain"]
    )
    def test_a_column_that_a_match_reads_is_still_the_models(self, match, tmp_path):
        data = with_column(tiny.rows("sequence"), "token_type_ids", lambda *_: (torch.arange(12) > 3).long())
        trainers = [made(tmp_path, match, train_dataset=data), make_trainer(tmp_path, train_dataset=data)]
        values = []
        for trainer in trainers:
            trainer.train()
            values.append(logged(trainer, "loss_task")[0])
        assert values[0] == pytest.approx(values[1], rel=1e-6)

    def test_a_column_that_the_student_reads_can_be_a_mask(self, tmp_path):
        data = with_column(tiny.rows("sequence"), "token_type_ids", lambda *_: (torch.arange(12) < 1).long())
        masked = trains(tmp_path, {**HIDDEN, "mask": "batch:token_type_ids"}, train_dataset=data)
        assert masked == pytest.approx(trains(tmp_path, {**HIDDEN, "mask": "cls"}, train_dataset=data), rel=1e-6)

    def test_a_mask_may_speak_of_each_of_several_choices(self, tmp_path):
        data = with_column(tiny.rows(tiny.ZOO["bert-choices"][1]), "spans", lambda _, row: row["attention_mask"])
        masked = trains(tmp_path, {**HIDDEN, "mask": "batch:spans"}, "bert-choices", train_dataset=data)
        assert masked == pytest.approx(trains(tmp_path, HIDDEN, "bert-choices", train_dataset=data), rel=1e-6)

    def test_a_match_set_after_the_trainer_was_made_reads_its_column(self, tmp_path):
        data = with_column(tiny.rows("sequence"), "source", lambda number, _: torch.tensor(number % 2))
        trainer = made(tmp_path, HIDDEN, train_dataset=data)
        trainer.get_train_dataloader()  # settles which columns are kept
        trainer.args.distillation_config = recipe({**DOMAIN, "domain": "source"})
        trainer.train()
        value = logged(trainer, "loss_own_0")[0]
        whole = made(tmp_path, {**DOMAIN, "domain": "source"}, train_dataset=data)
        whole.train()
        assert value == pytest.approx(logged(whole, "loss_own_0")[0], rel=1e-5)


class TestMasks:
    @pytest.mark.parametrize("mask", ["cls", "batch:spans"])
    def test_a_mask_chooses_the_rows_of_distributions_over_all_real_keys(self, mask, tmp_path):
        models = pair_of(tiny.bert, {"layers": 2}, {"layers": 2})
        data = with_column(tiny.rows("sequence"), "spans", lambda *_: torch.arange(12) % 3 == 1)
        s, t = (look(model, data[:4]) for model in models)
        first = torch.arange(12) == 0
        chosen = s.real & (first if mask == "cls" else torch.arange(12) % 3 == 1)
        expected = 0.0
        for own, other in zip(s.maps, t.maps, strict=True):
            kl = F.kl_div(own.clamp(min=1e-300).log(), other, reduction="none").sum(-1)
            expected += float(kl.mean(1)[chosen].mean())
        match = {"student": "attention_probs[*]", "loss": "attention_kl", "mask": mask}
        value = trains(tmp_path, match, models=models, train_dataset=data)
        assert value == pytest.approx(expected, rel=1e-4)

    def test_the_first_positions_relations_are_a_distribution_over_all_real_keys(self, tmp_path):
        match = {"student": "query[-1]", "teacher": "query[-1]", "loss": "minilmv2_relations", "mask": "cls"}
        assert trains(tmp_path, match) > 1e-9  # over the first position alone it is 0

    def test_an_encoder_has_no_positions_of_the_task_even_where_lengths_agree(self, tmp_path):
        data = with_column(tiny.rows("translation"), "labels", lambda *_: torch.full((12,), 5))
        match = {"loss": "hidden_mse", "mask": "task"}
        fragments = ("'own_0'.*the decoder's positions", r"Write decoder\.")
        refused(tmp_path, {**match, "student": "encoder.hidden[*]"}, *fragments, name="t5", train_dataset=data)
        trains(tmp_path, {**match, "student": "decoder.hidden[*]"}, "t5", train_dataset=data)

    def test_texts_packed_into_later_rows_are_kept_apart_as_in_the_first(self, tmp_path):
        one, two = list(range(12)), [*range(6), *range(6)]
        ids = torch.arange(5, 17)
        single, packed = ({"input_ids": ids, "position_ids": torch.tensor(p), "labels": ids} for p in (one, two))
        match = {"student": "attention_probs[1]", "teacher": "attention_probs[1]", "loss": "attention_kl"}
        models = [pair_of(tiny.llama, {}, {}) for _ in range(2)]
        orders = [[single, single, packed, packed], [packed, packed, single, single]]
        values = [
            trains(tmp_path, match, "llama", models=pair, train_dataset=order)
            for pair, order in zip(models, orders, strict=True)
        ]
        assert values[0] == pytest.approx(values[1], rel=1e-5)

    def test_a_whole_attention_mask_changes_nothing_for_whisper(self, tmp_path):
        data = tiny.rows(tiny.ZOO["whisper"][1])
        masked = with_column(data, "attention_mask", lambda _, row: torch.ones(row["input_features"].shape[-1]).long())
        match = {**HIDDEN, "student": "encoder.hidden[*]", "teacher": "encoder.hidden"}
        values = [trains(tmp_path, match, "whisper", train_dataset=some) for some in (data, masked)]
        assert values[0] == pytest.approx(values[1], rel=1e-5)


def decoder_rows():
    """Rows whose targets are as long as their sources, padding included, but padded elsewhere."""
    labels = torch.cat([torch.full((4,), 7), torch.full((8,), -100)])
    return with_column(tiny.rows("translation"), "labels", lambda *_: labels)


def test_a_module_of_a_decoder_has_the_decoders_padding(tmp_path):
    match = {"loss": "hidden_cosine", "projection": {"share": "all"}}
    references = "module:decoder.final_layer_norm", "decoder.hidden[-1]"
    values = [
        trains(tmp_path, {**match, "student": own, "teacher": own}, "t5", train_dataset=decoder_rows())
        for own in references
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_a_module_of_an_encoder_has_the_encoders_padding(tmp_path):
    match = {"loss": "hidden_cosine", "projection": {"share": "all"}}
    references = "module:encoder.final_layer_norm", "encoder.hidden[-1]"
    values = [
        trains(tmp_path, {**match, "student": own, "teacher": own}, "t5", train_dataset=decoder_rows())
        for own in references
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-6)
