"""What cannot be distilled as asked is refused before the first step: what is wrong, what was expected, what helps."""

import copy
import math
import re

import datasets
import numpy as np
import pytest
import torch
import transformers as hf
from peft import PromptTuningConfig, get_peft_model
from transformers import TrainingArguments

from hf_distill import (
    DistillationTrainer,
    DistillationTrainingArguments,
    Seq2SeqDistillationTrainer,
    Seq2SeqDistillationTrainingArguments,
)
from tests.tiny import bert, llama, pair, rows, tokenizer, vit
from tests.training import SILENT, arguments, logged, make_trainer


def refused(folder, error, *fragments, change=None, name="bert", models=None, **options):
    """Checks that making and training a trainer raises the error, with all the fragments, before any step."""
    models = models or pair(name)
    student = models[0]
    before = copy.deepcopy(student.state_dict())
    made = []

    def make_and_train():
        made.append(make_trainer(folder, name, models=models, learning_rate=1.0, **options))
        if change is not None:
            change(made[0].args)
        made[0].train()

    with pytest.raises(error) as refusal:
        make_and_train()
    message = str(refusal.value)
    for fragment in fragments:
        assert re.search(fragment, message), f"{fragment!r} is not in {message!r}"
    assert all(trainer.state.global_step == 0 for trainer in made)
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


def no_labels(data):
    targets = ("labels", "start_positions", "end_positions")
    return [{key: value for key, value in row.items() if key not in targets} for row in data]


class TestTeacher:
    def test_there_must_be_one(self, tmp_path):
        student = pair("bert")[0]
        refused(
            tmp_path,
            ValueError,
            r"kd_weight=0\.5",
            "no teacher",
            "teacher_model=",
            "kd_weight=0",
            models=(student, None),
        )

    def test_there_must_be_one_too_where_its_weight_is_raised_later(self, tmp_path):
        def ask_a_teacher(args):
            args.kd_weight = 0.25

        refused(
            tmp_path,
            ValueError,
            r"kd_weight=0\.25.*no teacher.*teacher_model=",
            models=(pair("bert")[0], None),
            kd_weight=0.0,
            change=ask_a_teacher,
        )

    def test_it_must_not_be_the_student(self, tmp_path):
        student = pair("bert")[0]
        refused(tmp_path, ValueError, "one object", "Load the teacher apart", models=(student, student))

    def test_it_must_not_share_what_is_trained(self, tmp_path):
        student, teacher = bert(), bert()
        teacher.bert = student.bert
        refused(tmp_path, ValueError, "the teacher's own", "deepcopy", models=(student, teacher))

    @pytest.mark.parametrize(
        "teacher", [42, {"model": "bert"}, hf.BertForSequenceClassification, lambda inputs: inputs]
    )
    def test_it_must_be_something_that_teaches(self, teacher, tmp_path):
        refused(
            tmp_path,
            TypeError,
            f"teacher_model is a {type(teacher).__name__}",
            "expected a Transformers model, its name or path",
            models=(pair("bert")[0], teacher),
        )

    def test_a_list_of_teachers_is_no_teacher(self, tmp_path):
        refused(tmp_path, TypeError, "teacher_model is a list", models=(pair("bert")[0], [pair("bert")[1]]))

    @pytest.mark.parametrize(
        "teacher",
        [bert("TokenClassification"), bert("QuestionAnswering", num_labels=2), bert("MaskedLM"), llama()],
        ids=lambda model: type(model).__name__,
    )
    def test_it_must_do_the_students_task(self, teacher, tmp_path):
        refused(
            tmp_path,
            ValueError,
            r"student \(BertForSequenceClassification\) does sequence_classification",
            rf"teacher \({type(teacher).__name__}\)",
            "load the teacher with the student's kind of head",
            models=(bert(), teacher),
        )

    @pytest.mark.parametrize(("name", "other"), [("bert-regression", "bert"), ("bert-multi-label", "bert")])
    def test_it_must_have_the_students_kind_of_labels(self, name, other, tmp_path):
        teacher = pair(other)[1]
        teacher.config.problem_type = "single_label_classification"
        fragments = ["problem_type", "teacher's single_label_classification", "Set both"]
        if name == "bert-regression":
            fragments = ["label sets differ", "the student has 1 labels, the teacher 3"]
        refused(tmp_path, ValueError, *fragments, models=(pair(name)[0], teacher), name=name)

    def test_it_must_have_the_students_labels(self, tmp_path):
        student, teacher = pair("bert")
        student.config.id2label = {0: "cat", 1: "dog", 2: "bird"}
        teacher.config.id2label = {0: "cat", 1: "dog", 2: "fish"}
        refused(
            tmp_path,
            ValueError,
            "label sets differ",
            "only the student has bird, only the teacher fish",
            "id2label",
            models=(student, teacher),
        )

    def test_it_must_have_as_many_labels(self, tmp_path):
        refused(
            tmp_path,
            ValueError,
            "the student has 3 labels, the teacher 4",
            "Load both with the same id2label",
            models=(bert(), bert(num_labels=4)),
        )

    def test_it_must_have_the_students_vocabulary(self, tmp_path):
        refused(
            tmp_path,
            ValueError,
            "student's head has 97 classes, the teacher's 120",
            "tokenizer is not known",
            "Pass processing_class and teacher_processing_class",
            name="llama",
            models=(llama(), llama(vocab_size=120)),
        )

    def test_tokens_beyond_the_smaller_head_are_no_padding(self, tmp_path):
        refused(
            tmp_path,
            ValueError,
            "use ids up to 96: so rows beyond 90 may be tokens",
            name="llama",
            models=(llama(), llama(vocab_size=90)),
            processing_class=tokenizer(),
            teacher_processing_class=tokenizer(),
        )

    def test_a_name_cannot_stand_for_a_head_that_no_auto_class_builds(self, tmp_path):
        class Answers(hf.BertPreTrainedModel):
            def __init__(self, config):
                super().__init__(config)
                self.bert = hf.BertModel(config)
                self.qa_outputs = torch.nn.Linear(config.hidden_size, 2)

            def forward(self, input_ids=None, attention_mask=None, start_positions=None, end_positions=None):
                raise NotImplementedError

        refused(
            tmp_path,
            ValueError,
            "teacher_model='some/name' is a name",
            r"no Auto class.*\(Answers\)",
            "pass the module",
            models=(Answers(bert().config), "some/name"),
        )

    def test_other_positions_than_the_students_are_refused_where_positions_are_compared(self, tmp_path):
        data = [{**row, "teacher_input_ids": row["input_ids"][:9]} for row in rows("tokens")]
        refused(
            tmp_path,
            ValueError,
            r"student's logits have shape \(4, 12, 3\), the teacher's \(4, 9, 3\)",
            "give both the same tokens",
            name="bert-tokens",
            train_dataset=data,
        )


class TestNumbers:
    @pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
    def test_the_temperature_must_be_positive(self, value, tmp_path):
        with pytest.raises(ValueError, match=rf"temperature={value}.*must be a positive number.*2 to 4 is usual"):
            arguments(tmp_path, temperature=value)

    @pytest.mark.parametrize("name", ["kd_weight", "task_weight"])
    @pytest.mark.parametrize("value", [-0.5, math.nan, math.inf])
    def test_weights_must_not_be_negative(self, name, value, tmp_path):
        with pytest.raises(ValueError, match=rf"{name}={value}.*must be a number >= 0"):
            arguments(tmp_path, **{name: value})

    def test_some_weight_must_not_be_zero(self, tmp_path):
        with pytest.raises(
            ValueError, match=r"All weights are zero.*nothing to learn.*raise kd_weight or task_weight"
        ):
            arguments(tmp_path, kd_weight=0.0, task_weight=0.0)

    @pytest.mark.parametrize(
        ("typed", "meant"), [("kl", "forward_kl, reverse_kl, symmetric_kl"), ("MSE", "logit_mse, centered_logit_mse")]
    )
    def test_a_part_of_a_losss_name_is_answered_with_the_losses_of_logits_that_have_it(self, typed, meant, tmp_path):
        match = rf"Unknown loss '{typed}'\. Is one of these meant: {meant}, [a-z_, ]*\? Known: forward_kl"
        with pytest.raises(ValueError, match=match) as refusal:
            arguments(tmp_path, kd_loss=typed)
        assert "hidden" not in str(refusal.value)

    @pytest.mark.parametrize(("typed", "meant"), [("forward_lk", "forward_kl"), ("logits_mse", "logit_mse")])
    def test_an_unknown_loss_is_answered_with_the_nearest(self, typed, meant, tmp_path):
        with pytest.raises(ValueError, match=rf"Unknown loss '{typed}'\. Did you mean '{meant}'\? Known: forward_kl"):
            arguments(tmp_path, kd_loss=typed)

    @pytest.mark.parametrize(
        ("name", "value", "fragment"),
        [
            ("temperature", 0.0, "must be a positive number"),
            ("kd_weight", -1.0, "must be a number >= 0"),
            ("kd_loss", "forward_k", "Did you mean 'forward_kl'"),
        ],
    )
    def test_a_number_made_invalid_later_stops_the_next_training(self, name, value, fragment, tmp_path):
        trainer = make_trainer(tmp_path)
        trainer.train()
        weights = copy.deepcopy(trainer.model.state_dict())
        setattr(trainer.args, name, value)
        with pytest.raises(ValueError, match=fragment):
            trainer.train()
        assert len(logged(trainer, "loss")) == 2
        assert all(torch.equal(value, weights[key]) for key, value in trainer.model.state_dict().items())


class TestArguments:
    def test_the_arguments_take_no_unknown_argument(self, tmp_path):
        with pytest.raises(TypeError, match="unexpected keyword argument 'alpha'"):
            arguments(tmp_path, alpha=0.5)

    @pytest.mark.parametrize(
        ("cls", "expected", "given"),
        [
            (DistillationTrainer, DistillationTrainingArguments, TrainingArguments),
            (Seq2SeqDistillationTrainer, Seq2SeqDistillationTrainingArguments, TrainingArguments),
            (Seq2SeqDistillationTrainer, Seq2SeqDistillationTrainingArguments, DistillationTrainingArguments),
        ],
    )
    def test_the_arguments_must_be_the_distillations(self, cls, expected, given, tmp_path):
        refused(
            tmp_path,
            TypeError,
            f"args is a {given.__name__}, expected {expected.__name__}",
            "Change the class name",
            cls=cls,
            args=given(str(tmp_path), **SILENT),
        )

    def test_liger_kernels_are_refused_with_a_teacher(self, tmp_path):
        args = arguments(tmp_path)
        args.use_liger_kernel = True  # setting it earlier would look for the package
        refused(tmp_path, ValueError, "use_liger_kernel=True", "no logits", "Set use_liger_kernel=False", args=args)

    def test_several_gpus_in_one_process_are_refused(self, tmp_path):
        args = arguments(tmp_path)
        args._n_gpu = 2
        refused(tmp_path, ValueError, "2 GPUs in one process", "DataParallel", "torchrun", "CUDA_VISIBLE", args=args)

    @pytest.mark.parametrize("name", ["bert-spans", "bert-regression", "wav2vec2-ctc"])
    def test_labels_that_are_no_single_class_cannot_be_smoothed(self, name, tmp_path):
        refused(
            tmp_path,
            ValueError,
            "label_smoothing_factor > 0 needs",
            "one class per item",
            "Set label_smoothing_factor=0",
            name=name,
            label_smoothing_factor=0.1,
        )


class TestData:
    @pytest.mark.parametrize("container", [list, datasets.Dataset.from_list])
    @pytest.mark.parametrize(("name", "wanted"), [("bert", "label or labels"), ("bert-spans", "start_positions")])
    def test_a_data_set_without_a_label_column_is_refused_with_the_columns_it_has(
        self, name, wanted, container, tmp_path
    ):
        data = no_labels(rows("sequence"))
        data = container([{**{k: v.tolist() for k, v in row.items()}, "sentiment": 1} for row in data])
        refused(
            tmp_path,
            ValueError,
            f"no column named {wanted}",
            "it has attention_mask, input_ids, sentiment",
            "task_weight=0",
            name=name,
            train_dataset=data,
        )

    @pytest.mark.parametrize(
        ("name", "remedy"),
        [
            ("llama", r"DataCollatorForLanguageModeling\(tokenizer, mlm=False\)"),
            ("bert-masked", r"DataCollatorForLanguageModeling\(tokenizer\)"),
            ("t5", r"a labels column and DataCollatorForSeq2Seq\(tokenizer, model\)"),
        ],
    )
    def test_a_language_models_batches_need_labels(self, name, remedy, tmp_path):
        data = no_labels(rows("causal"))
        refused(
            tmp_path,
            ValueError,
            r"task_weight=0\.5, but the batches hold no labels \(they hold input_ids, attention_mask\)",
            f"Use {remedy}, or set task_weight=0",
            name=name,
            train_dataset=data,
        )

    @pytest.mark.parametrize("name", ["t5", "whisper"])
    def test_a_decoder_needs_something_to_read(self, name, tmp_path):
        data = no_labels(rows("features" if name == "whisper" else "translation"))
        refused(
            tmp_path,
            ValueError,
            "neither labels nor decoder_input_ids",
            "Give each row labels; `generate`",
            name=name,
            train_dataset=data,
            task_weight=0.0,
        )

    @pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
    def test_ragged_inputs_for_the_teacher_need_its_tokenizer(self, kind, tmp_path):
        data = [{**row, "teacher_input_ids": kind([5] * (3 + i))} for i, row in enumerate(rows("sequence"))]
        refused(
            tmp_path,
            ValueError,
            "columns teacher_input_ids have rows of different lengths",
            "Pass teacher_processing_class=",
            train_dataset=data,
        )

    def test_labels_that_are_words_are_refused_with_the_way_to_numbers(self, tmp_path):
        data = [
            {**{key: row[key].tolist() for key in ("input_ids", "attention_mask")}, "label": "good"}
            for row in rows("sequence")
        ]
        refused(tmp_path, ValueError, "label 'good'", "label2id", train_dataset=data)


class TestModels:
    @pytest.mark.parametrize(
        "model",
        [
            lambda: hf.BertForNextSentencePrediction(bert().config),
            lambda: hf.ViTForMaskedImageModeling(vit().config),
        ],
    )
    @pytest.mark.parametrize("who", ["student", "teacher"])
    def test_a_model_no_head_of_which_is_known_is_refused(self, model, who, tmp_path):
        unknown = model()
        refused(
            tmp_path,
            ValueError,
            f"Cannot tell what the head of {type(unknown).__name__} predicts",
            "SequenceClassification, ",
            "Use a model with one of these heads",
            models=(unknown, bert()) if who == "student" else (bert(), unknown),
        )

    def test_a_module_that_is_no_transformers_model_is_refused(self, tmp_path):
        refused(tmp_path, (TypeError, ValueError), "Linear", "Transformers", models=(bert(), torch.nn.Linear(2, 2)))

    def test_prompt_tuning_has_other_positions_than_its_base(self, tmp_path):
        student = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        refused(tmp_path, ValueError, "prompt tuning", name="llama", models=(student, None))
