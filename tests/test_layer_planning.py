"""Looking at the first rows leaves no trace, takes place where the training will, and refuses what cannot work."""

import random
import threading
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, IterableDataset
from transformers import default_data_collator

from hf_distill import DistillationTrainer
from hf_distill.dataset_checks import random_states_kept
from tests import tiny
from tests.test_layer_refusals import HIDDEN, made, refused, trains
from tests.test_layer_trainings import own_hooks
from tests.training import logged


class Stream(IterableDataset):
    """Rows without numbers, but with a length."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __iter__(self):
        return iter(self.data)


class OnceOnly(IterableDataset):
    """Rows that are gone once they are read."""

    def __init__(self, data):
        self.left = list(data)

    def __iter__(self):
        return self

    def __next__(self):
        if not self.left:
            raise StopIteration
        return self.left.pop(0)


class TestDataSets:
    def test_rows_that_can_be_read_but_once_are_left_to_the_training(self, tmp_path):
        data = OnceOnly(tiny.rows("sequence"))
        refused(tmp_path, HIDDEN, "read only once", "iterated anew", train_dataset=data, max_steps=1)
        assert len(data.left) == 8

    def test_a_stream_may_have_a_length(self, tmp_path):
        trains(tmp_path, HIDDEN, train_dataset=Stream(tiny.rows("sequence")))

    def test_rows_of_unequal_length_need_no_padding_in_batches_of_one(self, tmp_path):
        data = [{"input_ids": [5] * n, "attention_mask": [1] * n, "labels": 0} for n in (5, 7, 6, 4)]
        trains(
            tmp_path, HIDDEN, train_dataset=data, per_device_train_batch_size=1, data_collator=default_data_collator
        )

    def test_a_loader_of_the_users_own_does_not_replace_the_data_set(self, tmp_path):
        class OwnLoader(DistillationTrainer):
            def get_train_dataloader(self):
                return DataLoader(tiny.rows("sequence"), batch_size=4, collate_fn=self.data_collator)

        trainer = made(tmp_path, HIDDEN, cls=OwnLoader, train_dataset=None)
        with pytest.raises(ValueError, match=r"'own_0' is planned on the first rows of train_dataset.*Pass"):
            trainer.train()

    def test_random_states_are_kept_where_looking_at_a_row_fails(self):
        def broken_row():
            random.random()
            raise KeyError("row")

        before = random.getstate()
        with pytest.raises(KeyError), random_states_kept():
            broken_row()
        assert random.getstate() == before


class Seeded:
    """A collator with random numbers of its own."""

    def __init__(self):
        self.generator = random.Random(7)

    def __call__(self, rows):
        self.generator.random()
        return default_data_collator(rows)


class TestCollators:
    def test_a_seeded_collator_draws_its_first_numbers_in_the_training(self, tmp_path):
        collator = Seeded()
        made(tmp_path, HIDDEN, data_collator=collator)
        assert collator.generator.getstate() == random.Random(7).getstate()

    def test_a_collators_model_is_not_copied(self, tmp_path):
        models, seen = tiny.pair("bert"), []

        class WithModel(Seeded):
            def __call__(self, rows):
                seen.append(self.model)
                return super().__call__(rows)

        collator = WithModel()
        collator.model = models[0]
        made(tmp_path, HIDDEN, data_collator=collator, models=models)
        assert seen
        assert all(model is models[0] for model in seen)

    def test_a_collator_that_cannot_be_copied_may_be_used(self, tmp_path):
        collator = Seeded()
        collator.lock = threading.Lock()
        trains(tmp_path, HIDDEN, data_collator=collator)


class TestPlace:
    def test_both_models_are_looked_at_in_the_trainings_precision(self, tmp_path):
        models, seen = tiny.pair("bert"), []
        for model in models:
            model.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
        made(tmp_path, HIDDEN, models=models, bf16=True)
        assert len(seen) >= 2
        assert all(seen)

    @pytest.mark.parametrize("late", ["bf16_full_eval", "model_init"])
    def test_a_student_that_trainer_moves_late_is_moved_before_it_is_looked_at(self, late, tmp_path):
        events = []
        student, teacher = tiny.pair("bert")

        class Watched(DistillationTrainer):
            def _move_model_to_device(self, model, device):
                events.append("moved")
                super()._move_model_to_device(model, device)

        def fresh():
            model = tiny.bert()
            model.register_forward_pre_hook(lambda *_: events.append("run"))
            events.append("made")
            return model

        student.register_forward_pre_hook(lambda *_: events.append("run"))
        if late == "model_init":
            trainer = made(tmp_path, HIDDEN, models=(None, teacher), model_init=fresh, cls=Watched)
            events.clear()
            trainer.train()
        else:
            made(tmp_path, HIDDEN, models=(student, teacher), cls=Watched, bf16_full_eval=True)
        assert "moved" in events[: events.index("run")]

    @pytest.mark.parametrize("flag", ["is_fsdp_enabled", "is_deepspeed_enabled"])
    def test_what_takes_models_apart_is_refused(self, flag, tmp_path):
        trainer = made(tmp_path, HIDDEN)
        setattr(trainer, flag, True)
        with pytest.raises(ValueError, match=r"'own_0'.* FSDP and DeepSpeed.* Train with DDP"):
            trainer._plan_layers(trainer.model)

    def test_a_window_with_the_students_own_checkpointing_makes_processes_wait(self, tmp_path):
        models = tiny.pair("bert")
        trainer = made(tmp_path, {**HIDDEN, "active": [0, 0.5]}, models=models)
        trainer._plan_layers(models[0])  # without checkpointing nobody waits
        models[0].activation_checkpointing_enable()
        with (
            mock.patch.object(Accelerator, "num_processes", 2),
            pytest.raises(ValueError, match="ddp_find_unused_parameters=True"),
        ):
            trainer._plan_layers(models[0])

    def test_losses_over_a_batch_need_as_many_rows_of_every_process(self, tmp_path):
        pooled = "pooled(mean)@hidden[-1]"
        match = {"student": pooled, "teacher": pooled, "loss": "rkd_distance"}
        trainer = made(tmp_path, match, accelerator_config={"even_batches": False})
        with (
            mock.patch.object(Accelerator, "num_processes", 2),
            pytest.raises(ValueError, match=r"'own_0'.*even_batches is False"),
        ):
            trainer._plan_layers(trainer.model)


class TestShapes:
    """Every match is computed once on the first rows: what its loss refuses is refused then."""

    def test_one_vector_a_text_is_not_compared_with_one_a_position(self, tmp_path):
        match = {"student": "module:bert.pooler", "teacher": "hidden[-1]", "loss": "hidden_mse"}
        refused(tmp_path, match, r"'own_0'.*\(2, 48\).*\(2, 12, 48\)", "same positions")

    def test_a_loss_between_texts_takes_one_vector_of_each(self, tmp_path):
        module = "module:bert.encoder.layer.0"
        match = {"student": module, "teacher": module, "loss": "rkd_distance"}
        refused(tmp_path, match, r"'own_0'.*\(2, 12, 32\)", r"pooled\(mean\)@")
        pooled = {name: f"pooled(mean)@{module}" for name in ("student", "teacher")}
        trains(tmp_path, {**match, **pooled})

    def test_a_contrast_needs_equal_widths(self, tmp_path):
        pooled = "pooled(mean)@hidden[-1]"
        match = {"student": pooled, "teacher": pooled, "loss": "contrastive"}
        refused(tmp_path, match, "'own_0'.*width 32, the teacher's 48", "projection")
        trains(tmp_path, {**match, "projection": {"when": "always"}})

    def test_looking_at_them_leaves_no_trace(self, tmp_path):
        models = tiny.pair("bert")
        torch.manual_seed(3)
        trainer = made(tmp_path, HIDDEN, models=models)
        for model in models:
            assert not hasattr(model, "distillation_modules")
            assert not own_hooks(model)
            assert all(parameter.grad is None for parameter in model.parameters())
        assert models[0].training
        trainer.train()
        assert logged(trainer, "loss_own_0")[0] > 0
