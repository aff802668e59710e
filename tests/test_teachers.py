"""What a teacher reads, what it answers, and what it must never touch or show to the student."""

import copy

import datasets
import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import DataCollatorWithPadding

from hf_distill.signals import TeacherOutput
from hf_distill.teachers import AdapterOffTeacher, LocalTeacher
from tests import references
from tests.tiny import bert, distilbert, llama, pair, rows, tokenizer
from tests.training import GradientRecorder, assert_same_gradients, batch_of, logged, make_trainer

DISTRIBUTION_FREE = {"kd_weight": 1.0, "task_weight": 0.0, "max_steps": 1}


def forward_kl(student, teacher, temperature=2.0):
    return references.forward_kl(student, teacher, torch.full((), temperature))


def adapted(model, **options):
    """The model with low-rank adapters that are not zero, so that turning them off is seen."""
    torch.manual_seed(1)
    wrapped = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.3, **options))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    return wrapped


class TestLocalTeacher:
    def test_a_teacher_answers_in_evaluation_mode_and_stays_in_it(self, tmp_path):
        teacher = bert(hidden=48, hidden_dropout_prob=0.5).train()
        trainer = make_trainer(tmp_path, models=(pair("bert")[0], teacher))
        seen = []
        teacher.register_forward_pre_hook(lambda module, args: seen.append(module.training))
        trainer.train()
        trainer.evaluate()
        assert seen == [False] * len(seen)
        assert len(seen) == 2 + 2
        assert not any(module.training for module in teacher.modules())

    def test_a_teacher_makes_no_graph_and_gets_no_gradient(self):
        teacher = LocalTeacher(pair("bert")[1])
        (logits,) = teacher(batch_of(rows("sequence"))).logits
        assert not logits.requires_grad
        assert not logits.is_inference(), "the backward pass may save it"

    def test_a_teacher_is_bit_for_bit_the_same_after_training(self, tmp_path):
        student, teacher = pair("bert")
        before = copy.deepcopy(teacher.state_dict())
        make_trainer(tmp_path, models=(student, teacher), learning_rate=0.1).train()
        assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
        assert all(parameter.grad is None for parameter in teacher.parameters())

    def test_a_teacher_is_in_no_checkpoint_and_in_no_optimizer(self, tmp_path):
        student, teacher = pair("bert")
        trainer = make_trainer(tmp_path, models=(student, teacher))
        trainer.train()
        trained = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
        assert trained == {id(parameter) for parameter in student.parameters()}
        trainer.save_model(str(tmp_path / "saved"))
        saved = hf.BertForSequenceClassification.from_pretrained(tmp_path / "saved")
        assert {*saved.state_dict()} == {*student.state_dict()}

    def test_a_teacher_with_parameters_that_are_not_frozen_is_not_trained(self, tmp_path):
        student, teacher = pair("bert")
        assert all(parameter.requires_grad for parameter in teacher.parameters())
        make_trainer(tmp_path, models=(student, teacher), learning_rate=0.1).train()
        assert all(parameter.grad is None for parameter in teacher.parameters())

    def test_any_object_that_answers_for_a_batch_can_teach(self, tmp_path):
        student, model = pair("bert")

        class Recorded:
            def __init__(self):
                self.model, self.placed = model, []

            def place(self, device):
                self.placed.append(device)

            def __call__(self, inputs):
                with torch.no_grad():
                    logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
                return TeacherOutput((logits,))

        teacher = Recorded()
        trainer = make_trainer(tmp_path, models=(student, teacher))
        trainer.train()
        expected = make_trainer(tmp_path)
        expected.train()
        assert teacher.placed == [torch.device("cpu")]
        assert logged(trainer, "loss") == pytest.approx(logged(expected, "loss"), rel=1e-6)


class TestAdapterOffTeacher:
    @pytest.mark.parametrize("kind", ["llama", "bert"])
    def test_it_answers_as_the_base_does(self, kind):
        torch.manual_seed(0)
        base = llama() if kind == "llama" else bert()
        batch = {name: value for name, value in batch_of(rows("causal")).items() if name != "labels"}
        expected = copy.deepcopy(base).eval()(**batch).logits
        targets = ["q_proj", "v_proj"] if kind == "llama" else ["query", "value"]
        student = adapted(base, target_modules=targets).train()
        (actual,) = AdapterOffTeacher(lambda: student)(batch).logits
        assert torch.equal(actual, expected)
        assert not actual.requires_grad
        assert not torch.allclose(student.eval()(**batch).logits, expected, atol=1e-3), "the adapters do something"

    def test_every_module_gets_its_own_mode_back(self):
        student = adapted(llama(attention_dropout=0.2), target_modules=["q_proj"]).train()
        frozen = student.get_base_model().model.layers[0]
        frozen.eval()
        before = {name: module.training for name, module in student.named_modules()}
        assert len({*before.values()}) == 2
        AdapterOffTeacher(lambda: student)(batch_of(rows("causal")))
        assert {name: module.training for name, module in student.named_modules()} == before
        trainable = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
        assert trainable == {name for name in dict(student.named_parameters()) if "lora_" in name}

    def test_modes_and_adapters_come_back_after_an_error(self):
        student = adapted(llama(), target_modules=["q_proj"]).train()
        with pytest.raises(IndexError, match="out of range"):
            AdapterOffTeacher(lambda: student)({"input_ids": torch.tensor([[5, 97]])})
        assert all(module.training for module in student.modules())
        assert not any(getattr(module, "disable_adapters", False) is True for module in student.modules())

    def test_the_student_learns_its_adapters_against_its_own_base(self, tmp_path):
        torch.manual_seed(0)
        base = llama()
        with torch.no_grad():
            base.lm_head.weight.mul_(20)
        batch = batch_of(rows("causal")[:4])
        student = adapted(copy.deepcopy(base), target_modules=["q_proj"])
        for module in student.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        recorder = GradientRecorder()
        trainer = make_trainer(tmp_path, "llama", models=(student, None), callbacks=[recorder], **DISTRIBUTION_FREE)
        twin = copy.deepcopy(student).train()
        trainer.train()
        taught = (batch["labels"] != -100)[:, 1:]
        with torch.no_grad():
            target = base(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        logits = twin(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        forward_kl(logits, target)[taught].mean().backward()
        expected = {name: value.grad for name, value in twin.named_parameters() if value.grad is not None}
        assert_same_gradients(recorder.steps[0], expected)


class TestOwnInputs:
    """`teacher_*` columns: other tokens, of another length, for the teacher alone."""

    @staticmethod
    def rows_with_teachers_tokens():
        generator = torch.Generator().manual_seed(4)
        data = []
        for i, row in enumerate(rows("sequence")):
            length = 3 + (5 * i) % 11
            tokens = torch.randint(5, 97, (length,), generator=generator)
            data.append(
                {
                    **{name: value.tolist() for name, value in row.items()},
                    "teacher_input_ids": tokens.tolist(),
                    "teacher_attention_mask": [1] * length,
                }
            )
        return data

    @pytest.mark.parametrize("container", [list, datasets.Dataset.from_list])
    def test_the_teacher_reads_them_padded_by_its_own_tokenizer(self, container, tmp_path):
        data = self.rows_with_teachers_tokens()
        student, teacher = pair("bert")
        recorder = GradientRecorder()
        trainer = make_trainer(
            tmp_path,
            models=(student, teacher),
            train_dataset=container(data),
            eval_dataset=container(data),
            teacher_processing_class=tokenizer(padding_side="left"),
            callbacks=[recorder],
            per_device_train_batch_size=8,
            **DISTRIBUTION_FREE,
        )
        read = []
        teacher.register_forward_pre_hook(lambda module, args, kwargs: read.append(kwargs), with_kwargs=True)
        trainer.train()
        assert read[0]["input_ids"].shape == (8, max(len(row["teacher_input_ids"]) for row in data))
        assert read[0]["attention_mask"][:, -1].all(), "padded on the left"
        student, teacher = pair("bert")
        batch = batch_of([{k: torch.tensor(v) for k, v in row.items() if "teacher" not in k} for row in data])
        logits = student.train()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        with torch.no_grad():
            padded = teacher.eval()(**left_padded([row["teacher_input_ids"] for row in data])).logits
        forward_kl(logits, padded).mean().backward()
        assert_same_gradients(recorder.steps[0], {name: value.grad for name, value in student.named_parameters()})
        assert trainer.evaluate()["eval_kd"] > 0

    def test_equal_lengths_need_no_tokenizer(self, tmp_path):
        data = [
            {
                **row,
                "teacher_input_ids": row["input_ids"].flip(0),
                "teacher_attention_mask": row["attention_mask"].flip(0),
            }
            for row in rows("sequence")
        ]
        student, teacher = pair("bert")
        trainer = make_trainer(tmp_path, models=(student, teacher), train_dataset=data, **DISTRIBUTION_FREE)
        trainer.train()
        batch = batch_of(data[:4])
        student, teacher = pair("bert")
        with torch.no_grad():
            target = teacher.eval()(batch["teacher_input_ids"], attention_mask=batch["teacher_attention_mask"]).logits
        kd = forward_kl(student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits, target).mean()
        assert logged(trainer, "loss_kd") == pytest.approx([kd.item()], rel=1e-5)

    def test_nothing_of_the_teachers_reaches_the_student(self, tmp_path):
        seen = set()

        class Watching(hf.BertForSequenceClassification):
            def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None, **kwargs):
                seen.update(kwargs)
                return super().forward(
                    input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, labels=labels, **kwargs
                )

        data = self.rows_with_teachers_tokens()
        data[1]["labels"] = None
        trainer = make_trainer(
            tmp_path,
            models=(Watching(bert().config), pair("bert")[1]),
            train_dataset=data,
            eval_dataset=data,
            teacher_processing_class=tokenizer(),
        )
        trainer.train()
        trainer.evaluate()
        trainer.predict([{k: v for k, v in row.items() if k != "labels"} for row in data])
        assert seen <= {"return_dict", "output_attentions", "output_hidden_states"}

    def test_inputs_that_only_the_teacher_takes_reach_it_alone(self, tmp_path):
        torch.manual_seed(0)
        student, teacher = distilbert(), pair("bert")[1]
        with torch.no_grad():
            teacher.bert.embeddings.token_type_embeddings.weight.normal_(std=0.2)
        halves = [{**row, "token_type_ids": (torch.arange(12) > 5).long()} for row in rows("sequence")]
        batch = batch_of(halves[:4])
        with torch.no_grad():
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
            target = teacher.eval()(**inputs).logits
            blind = teacher(**{name: inputs[name] for name in ("input_ids", "attention_mask")}).logits
            del inputs["token_type_ids"]
            logits = student.eval()(**inputs).logits
        trainer = make_trainer(
            tmp_path, "bert", models=(student, teacher), train_dataset=halves, eval_dataset=halves, **DISTRIBUTION_FREE
        )
        trainer.train()
        assert logged(trainer, "loss_kd") == pytest.approx([forward_kl(logits, target).mean().item()], rel=1e-5)
        assert not torch.allclose(target, blind, rtol=0.1), "the token types matter to this teacher"
        assert trainer.evaluate()["eval_kd"] > 0

    def test_a_padding_collator_pads_what_only_the_teacher_takes(self, tmp_path):
        words = tokenizer(model_input_names=["input_ids", "token_type_ids", "attention_mask"])
        text = [f"w{i} w{i + 1}" + " w7" * (i % 4) for i in range(8)]
        encoded = words(text, [f"w{i + 20}" for i in range(8)])
        assert {*encoded} == {"input_ids", "token_type_ids", "attention_mask"}
        data = datasets.Dataset.from_dict({**encoded, "label": [0, 1, 2, 0, 1, 2, 0, 1]})
        trainer = make_trainer(
            tmp_path,
            models=(distilbert(), pair("bert")[1]),
            train_dataset=data,
            eval_dataset=data,
            data_collator=DataCollatorWithPadding(words),
        )
        read = []
        trainer.teacher.model.register_forward_pre_hook(lambda m, args, kwargs: read.append(kwargs), with_kwargs=True)
        trainer.train()
        assert all(kwargs["token_type_ids"].any() for kwargs in read)
        assert all(kwargs["token_type_ids"].shape == kwargs["input_ids"].shape for kwargs in read)


def left_padded(tokens):
    """Token lists as one batch, padded by hand."""
    length = max(map(len, tokens))
    return {
        "input_ids": torch.tensor([[0] * (length - len(row)) + row for row in tokens]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in tokens]),
    }


class TestLabelsAndVocabularies:
    @pytest.mark.parametrize("name", ["bert", "bert-tokens", "bert-multi-label"])
    @pytest.mark.parametrize("shout", [False, True])
    def test_labels_are_matched_by_name_and_without_regard_to_case(self, name, shout, tmp_path):
        student, teacher = pair(name)
        order = torch.tensor([2, 0, 1])
        labels = ["dog", "cat", "bird"]
        reordered = copy.deepcopy(teacher)
        with torch.no_grad():
            reordered.classifier.weight.copy_(teacher.classifier.weight[order])
            reordered.classifier.bias.copy_(teacher.classifier.bias[order])
        student.config.id2label = dict(enumerate(labels))
        reordered.config.id2label = {
            i: labels[j].title() if shout else labels[j] for i, j in enumerate(order.tolist())
        }
        recorders = GradientRecorder(), GradientRecorder()
        matched = make_trainer(tmp_path, name, models=(student, reordered), callbacks=[recorders[0]])
        matched.train()
        make_trainer(tmp_path, name, callbacks=[recorders[1]]).train()
        for actual, expected in zip(recorders[0].steps, recorders[1].steps, strict=True):
            assert_same_gradients(actual, expected)
        by_index = make_trainer(tmp_path, name, models=(pair(name)[0], strip_names(reordered)), **DISTRIBUTION_FREE)
        by_index.train()
        assert logged(by_index, "loss_kd")[0] != pytest.approx(logged(matched, "loss_kd")[0], rel=1e-3)

    def test_one_side_without_names_is_taken_as_it_stands_with_a_warning(self, tmp_path):
        student, teacher = pair("bert")
        teacher.config.id2label = {0: "x", 1: "y", 2: "z"}
        with pytest.warns(UserWarning, match=r"Only the teacher names its labels.*id2label"):
            trainer = make_trainer(tmp_path, models=(student, teacher))
        trainer.train()
        expected = make_trainer(tmp_path)
        expected.train()
        assert logged(trainer, "loss") == logged(expected, "loss")

    @pytest.mark.parametrize("teacher_rows", [90, 104])
    def test_a_vocabulary_padded_otherwise_is_compared_on_the_ids_that_have_a_token(self, teacher_rows, tmp_path):
        torch.manual_seed(0)
        student, teacher = llama(), llama(hidden=48, vocab_size=teacher_rows)
        with torch.no_grad():
            teacher.lm_head.weight.mul_(20)
        words = tokenizer([f"w{i}" for i in range(80)])
        data = rows("causal")
        for row in data:
            row["input_ids"] %= 85
            row["labels"] = torch.where(row["labels"] == -100, -100, row["labels"] % 85)
        recorder = GradientRecorder()
        trainer = make_trainer(
            tmp_path,
            "llama",
            models=(student, teacher),
            train_dataset=data,
            processing_class=words,
            teacher_processing_class=words,
            callbacks=[recorder],
            **DISTRIBUTION_FREE,
        )
        twin = copy.deepcopy(student).train()
        trainer.train()
        batch = batch_of(data[:4])
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        shared = len(words)
        with torch.no_grad():
            target = teacher(**inputs).logits[:, :-1, :shared]
        taught = (batch["labels"] != -100)[:, 1:]
        kd = forward_kl(twin(**inputs).logits[:, :-1, :shared], target)[taught].mean()
        kd.backward()
        assert logged(trainer, "loss_kd") == pytest.approx([kd.item()], rel=1e-5)
        assert_same_gradients(recorder.steps[0], {name: value.grad for name, value in twin.named_parameters()})

    def test_another_tokenizer_is_refused_with_what_differs(self, tmp_path):
        mine, other = tokenizer(), tokenizer(["w0", "w2", "w1", *(f"x{i}" for i in range(89))])
        with pytest.raises(ValueError, match="vocabularies differ") as refusal:
            make_trainer(tmp_path, "llama", processing_class=mine, teacher_processing_class=other)
        message = str(refusal.value)
        assert "97 tokens, the teacher's 97" in message
        assert "only the student has w10, w11" in message
        assert "only the teacher has x0, x1" in message
        assert "2 shared tokens have another id ('w1': 6 and 7; 'w2': 7 and 6)" in message
        assert "use a teacher with the student's tokenizer" in message


def strip_names(model):
    """The model, with Transformers' own label names."""
    model.config.id2label = {i: f"LABEL_{i}" for i in range(3)}
    return model
