"""Models without a head, such as sentence encoders: one learns another's embeddings, and nothing reads logits."""

import re
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import peft
import pytest
import torch
import transformers as hf
from torch.nn import functional as F
from transformers import DataCollatorWithPadding

from tests import references, tiny
from tests.invariants.embeddings_two_processes import CASES, EACH_TEXT, save_results, train
from tests.invariants.steps import Run, assert_same_steps, distil, longer, with_dropout
from tests.invariants.test_export import load_without_us
from tests.invariants.test_resume import PLAN, STEPS, STOP
from tests.processes import run_twice
from tests.training import GradientRecorder, assert_same_gradients, batch_of, logged, make_trainer, plain_trainer

ROOT = Path(__file__).resolve().parents[1]
# The losses between two vectors, and those over the texts of a batch.
OF_A_TEXT = ("hidden_mse", "hidden_kl", "hidden_cosine", "hidden_normalized_mse")
OF_A_BATCH = ("similarity_preserving", "contrastive", "rkd_distance", "rkd_angle")


def recipe(loss="hidden_mse", reference="pooled(mean)@hidden[-1]", **match):
    return {"matches": [{"name": "embedding", "student": reference, "loss": loss, **match}]}


def made(folder, *, models=None, **options):
    """A trainer of models without a head, on texts without labels."""
    data = tiny.texts()
    options = {"train_dataset": data, "eval_dataset": data, "distillation_config": recipe(), **options}
    return make_trainer(folder, models=models or tiny.embedding_pair(), **options)


def embeddings(model, batch):
    """(texts, width): the mean of the last hidden states over the real tokens, as sentence encoders take it."""
    hidden, real = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    return (hidden * real).sum(1) / real.sum(1)


class TestTraining:
    @pytest.mark.parametrize("loss", [*OF_A_TEXT, *OF_A_BATCH])
    def test_loss_and_gradient_are_those_of_the_mean_pooled_embeddings(self, loss, tmp_path):
        def models():
            student, teacher = tiny.embedder("distilbert"), tiny.embedder("bert", seed=1, layers=3)
            return student.eval(), teacher.eval()

        recorder = GradientRecorder()
        trainer = made(
            tmp_path,
            models=models(),
            distillation_config=recipe(loss),
            callbacks=[recorder],
            max_steps=1,
            per_device_train_batch_size=8,
        )
        trainer.train()
        student, teacher = models()
        batch = batch_of(tiny.texts())
        with torch.no_grad():
            taught = embeddings(teacher, batch)
        expected = getattr(references, loss)(embeddings(student, batch), taught).mean()
        assert logged(trainer, "loss_embedding") == [pytest.approx(float(expected.detach()), rel=1e-4)]
        assert logged(trainer, "loss") == logged(trainer, "loss_embedding")
        expected.backward()
        wanted = {name: value.grad for name, value in student.named_parameters() if value.grad is not None}
        given = {name: value for name, value in recorder.steps[0].items() if name in wanted}
        assert_same_gradients(given, wanted, rtol=1e-3, atol=1e-5)
        assert {*recorder.steps[0]} == {*wanted}

    @pytest.mark.parametrize("loss", [*OF_A_TEXT, "contrastive"])
    def test_another_width_is_bridged_by_a_projection_that_learns(self, loss, tmp_path):
        bridged = recipe(loss, projection={"when": "always"} if loss == "contrastive" else {})
        trainer = made(tmp_path, distillation_config=bridged, learning_rate=5e-3, max_steps=10)
        before = {name: value.clone() for name, value in trainer._layers.modules.state_dict().items()}
        assert [value.shape for value in before.values() if value.dim() == 2] == [(48, 32)]
        trainer.train()
        assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0]
        for name, value in trainer._layers.modules.state_dict().items():
            assert not torch.equal(before[name], value)

    @pytest.mark.parametrize("name", tiny.EMBEDDERS)
    def test_models_of_all_kinds_learn_from_a_larger_one_of_theirs(self, name, tmp_path):
        models = tiny.embedding_pair(name, name)
        if name == "vit":
            data = [{"pixel_values": row["pixel_values"]} for row in tiny.rows("image")]
        else:
            data = tiny.texts()
        trainer = made(tmp_path, models=models, train_dataset=data, learning_rate=5e-3, max_steps=10)
        trainer.train()
        values = logged(trainer, "loss_embedding")
        assert 0 < values[-1] < values[0]

    def test_ids_and_a_tokenizer_are_all_that_rows_need(self, tmp_path):
        words = tiny.tokenizer()
        data = [{"input_ids": row["input_ids"][row["attention_mask"].bool()].tolist()} for row in tiny.texts()]
        trainer = made(tmp_path, train_dataset=data, processing_class=words)
        assert isinstance(trainer.data_collator.collator, DataCollatorWithPadding)
        trainer.train()
        padded = made(tmp_path)
        padded.train()
        assert logged(trainer, "loss") == pytest.approx(logged(padded, "loss"), rel=1e-4)

    def test_labels_of_the_rows_change_nothing(self, tmp_path):
        data = [{**row, "label": torch.tensor(0.5 * number)} for number, row in enumerate(tiny.texts())]
        values = []
        for rows in (data, tiny.texts()):
            trainer = made(tmp_path, train_dataset=rows)
            trainer.train()
            values.append(logged(trainer, "loss"))
        assert values[0] == values[1]

    def test_a_teacher_may_read_other_tokens_of_the_same_texts(self, tmp_path):
        read = tiny.texts(seed=1, length=9)
        data = [
            {**row, **{f"teacher_{name}": value for name, value in other.items()}}
            for row, other in zip(tiny.texts(), read, strict=True)
        ]
        student, teacher = tiny.embedder("distilbert").eval(), tiny.embedder("bert", seed=1)
        trainer = made(
            tmp_path, models=(student, teacher), train_dataset=data, max_steps=1, per_device_train_batch_size=8
        )
        with torch.no_grad():
            taught, own = embeddings(teacher.eval(), batch_of(read)), embeddings(student, batch_of(tiny.texts()))
        trainer.train()
        assert logged(trainer, "loss") == [pytest.approx(float(F.mse_loss(own, taught)), rel=1e-4)]

    def test_a_teacher_with_a_head_teaches_what_is_below_it(self, tmp_path):
        teacher = hf.BertForMaskedLM(tiny.bert(hidden=48, layers=3).config)
        values = []
        for model in (teacher, hf.BertModel(teacher.config, add_pooling_layer=False)):
            model.load_state_dict(teacher.state_dict() if model is teacher else teacher.bert.state_dict())
            trainer = made(tmp_path, models=(tiny.embedder("distilbert"), model))
            trainer.train()
            values.append(logged(trainer, "loss"))
        assert values[0] == values[1]

    def test_what_a_head_once_predicted_does_not_matter(self, tmp_path):
        student, teacher = tiny.embedding_pair()
        student.config.problem_type, teacher.config.problem_type = "regression", "multi_label_classification"
        teacher.config.id2label = {0: "other"}
        trainer = made(tmp_path, models=(student, teacher))
        trainer.train()
        assert logged(trainer, "loss")[0] > 0

    def test_a_base_without_its_adapters_teaches_the_adapters(self, tmp_path):
        base = tiny.embedder("bert")
        student = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["query"], init_lora_weights=False))
        trainer = made(tmp_path, models=(student, None), learning_rate=5e-3, max_steps=10)
        trainer.train()
        assert 0 < logged(trainer, "loss")[-1] < logged(trainer, "loss")[0]

    def test_a_pooler_that_nothing_reads_stays_as_it_was(self, tmp_path):
        student, teacher = tiny.embedding_pair("bert")
        before = student.pooler.dense.weight.clone()
        made(tmp_path, models=(student, teacher), weight_decay=0.1, learning_rate=1e-2).train()
        assert torch.equal(student.pooler.dense.weight, before)

    def test_the_students_similarities_approach_the_teachers(self, tmp_path):
        """Of texts that were not trained on. The teacher knows which words mean the same, the student does not."""
        student, teacher = tiny.embedder("distilbert"), tiny.embedder("bert", seed=1, hidden=48, layers=3)
        meanings = torch.randn(8, 48, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            teacher.embeddings.word_embeddings.weight.copy_(meanings[torch.arange(tiny.VOCABULARY) % 8])
        seen, unseen = tiny.texts(128, seed=1), batch_of(tiny.texts(32, seed=2))

        def similarities(model):
            model.eval()
            with torch.no_grad():
                unit = F.normalize(embeddings(model, unseen) - embeddings(model, unseen).mean(0), dim=-1)
            return unit @ unit.T

        def agreement():
            """The correlation of both models' similarities, and the share of texts with the same nearest text."""
            apart = ~torch.eye(32, dtype=torch.bool)
            ours, theirs = similarities(student), similarities(teacher)
            correlation = torch.corrcoef(torch.stack([ours[apart], theirs[apart]]))[0, 1]
            nearest = [each.fill_diagonal_(-2).argmax(-1) for each in (ours, theirs)]
            return float(correlation), float((nearest[0] == nearest[1]).float().mean())

        correlation, nearest = agreement()
        assert correlation < 0.2
        assert nearest < 0.1
        sizes = {"per_device_train_batch_size": 16, "learning_rate": 5e-3, "max_steps": 60}
        made(tmp_path, models=(student, teacher), train_dataset=seen, **sizes).train()
        correlation, nearest = agreement()
        assert correlation > 0.6
        assert nearest > 0.3


class TestExactness:
    @pytest.mark.parametrize(("batch", "accumulation"), [(4, 2), (1, 8)])
    def test_a_step_does_not_depend_on_how_its_texts_are_split(self, batch, accumulation, output_dir):
        options = {"distillation_config": EACH_TEXT}
        whole = distil(tiny.embedding_pair(), tiny.texts(16), output_dir, 8, 1, **options)
        split = distil(tiny.embedding_pair(), tiny.texts(16), output_dir, batch, accumulation, **options)
        assert_same_steps(split, whole)

    @pytest.mark.parametrize("loss", [*OF_A_TEXT, "rkd_distance", "similarity_preserving"])
    def test_a_step_does_not_depend_on_padding(self, loss, output_dir):
        options = {"distillation_config": recipe(loss)}
        runs = [
            distil(tiny.embedding_pair("bert"), data, output_dir, **options)
            for data in (longer(tiny.texts(), "sequence"), tiny.texts())
        ]
        assert_same_steps(*runs)

    def test_two_processes_do_what_one_does(self, tmp_path, output_dir, subtests):
        path = tmp_path / "results.pt"
        run_twice(save_results, path)
        results = torch.load(path, weights_only=True)
        assert results["processes"] == 2
        for case, (*_, splits) in CASES.items():
            one = Run(**train(case, output_dir, 8, 1))
            assert len(one.gradients) == 2
            for batch, accumulation in splits:
                with subtests.test(f"{case}, {batch}x{accumulation}"):
                    assert_same_steps(Run(**results[f"{case}, {batch}x{accumulation}"]), one)

    def test_a_resumed_training_ends_with_the_same_bits(self, output_dir):
        def fresh():
            student, teacher = tiny.embedding_pair()
            return made(output_dir, models=(with_dropout(student), teacher), train_dataset=tiny.texts(16), **PLAN)

        whole, resumed = fresh(), fresh()
        whole.train()
        resumed.train(resume_from_checkpoint=str(Path(output_dir, f"checkpoint-{STOP}")))
        assert resumed.state.global_step == STEPS
        assert logged(resumed, "loss")[STOP:] == logged(whole, "loss")[STOP:]
        for part in ("model", "modules"):
            one, other = (t.model if part == "model" else t._layers.modules for t in (whole, resumed))
            assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


class TestExport:
    def test_what_is_saved_gives_the_same_embeddings_without_us(self, tmp_path):
        autos = {"bert": "AutoModel", "distilbert": "AutoModel", "t5-encoder": "AutoModelForTextEncoding"}
        batch = batch_of(tiny.texts())
        for name, auto in autos.items():
            trainer = made(tmp_path, models=tiny.embedding_pair(name))
            trainer.train()
            trainer.save_model(str(tmp_path / name))
            loaded = getattr(hf, auto).from_pretrained(tmp_path / name).eval()
            assert type(loaded) is type(trainer.model)
            with torch.no_grad():
                assert torch.equal(embeddings(loaded, batch), embeddings(trainer.model.eval(), batch))
        for said in load_without_us({str(tmp_path / name): auto for name, auto in autos.items()}).values():
            assert not any(said.values())


class TestDocs:
    def test_the_example_runs(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        page = (ROOT / "docs" / "layers.md").read_text(encoding="utf-8")
        section = page.split("\n## Embedding models\n")[1].split("\n## ")[0]
        example = re.search(r"^```python\n(.*?)^```$", section, flags=re.DOTALL | re.MULTILINE)[1]
        student, teacher = tiny.embedding_pair()
        sentences = [{"text": f"w{number} w{2 * number}" + number % 3 * " w7"} for number in range(12)]
        names = {"student": student, "teacher": teacher, "tokenizer": tiny.tokenizer()}
        names["sentences"] = datasets.Dataset.from_list(sentences)
        exec(example, names)
        assert names["trainer"].state.log_history[-1]["train_loss"] > 0
        assert type(hf.AutoModel.from_pretrained("distilled")) is hf.DistilBertModel


class TestEvaluation:
    def test_it_gives_no_number_of_the_teacher_and_does_not_ask_it(self, tmp_path):
        trainer = made(tmp_path)
        trainer.train()
        with mock.patch.object(trainer.teacher, "_model", None):
            metrics = trainer.evaluate()
        assert not {"eval_loss", "eval_kd", "eval_agreement"} & {*metrics}
        assert metrics["eval_runtime"] > 0

    def test_its_predictions_are_those_of_the_plain_trainer(self, tmp_path):
        student, teacher = tiny.embedding_pair("bert")
        ours = made(tmp_path, models=(student, teacher)).predict(tiny.texts())
        plain = plain_trainer(tmp_path, model=student).predict(tiny.texts())
        assert len(ours.predictions) == len(plain.predictions) == 2
        for one, other in zip(ours.predictions, plain.predictions, strict=True):
            np.testing.assert_array_equal(one, other)
        assert ours.label_ids is None

    def test_scores_of_the_rows_reach_the_users_metrics(self, tmp_path):
        scores = [3.0, 0.5, 1.25, 4.0, 0.0, 2.0, 5.0, 1.0]
        data = [{**row, "label": score} for row, score in zip(tiny.texts(), scores, strict=True)]
        taken = []

        def measure(prediction):
            taken.append(prediction)
            return {"spearman": 0.25}

        trainer = made(tmp_path, eval_dataset=data, compute_metrics=measure, label_names=["labels"])
        assert trainer.evaluate()["eval_spearman"] == 0.25
        assert taken[0].label_ids.tolist() == scores
        assert taken[0].predictions.shape == (8, 12, 32)


class TestByName:
    """A name beside a model without a head is loaded without one, whatever head was saved."""

    @pytest.mark.parametrize("saved", ["BertModel", "BertForMaskedLM"])
    def test_a_teachers_folder_teaches_as_its_module_does(self, saved, tmp_path):
        teacher = getattr(hf, saved)(tiny.bert(hidden=48, layers=3).config)
        teacher.save_pretrained(tmp_path / "teacher")
        values = []
        for given in (str(tmp_path / "teacher"), teacher):
            trainer = made(tmp_path, models=(tiny.embedder("distilbert"), given))
            trainer.train()
            values.append(logged(trainer, "loss"))
            if given is not teacher:
                assert type(trainer.teacher.model) is hf.BertModel
        assert values[0] == values[1]

    def test_a_pooler_that_was_not_saved_cannot_teach(self, tmp_path):
        student, _ = tiny.embedding_pair("bert")
        hf.BertForMaskedLM(tiny.bert(hidden=48).config).save_pretrained(tmp_path / "teacher")
        with pytest.raises(ValueError, match="BertModel has no module 'pooler'"):
            made(
                tmp_path,
                models=(student, str(tmp_path / "teacher")),
                distillation_config=recipe(reference="module:pooler"),
            )

    def test_weights_other_than_a_poolers_must_be_there(self, tmp_path):
        teacher = tiny.embedder("bert", hidden=48)
        teacher.save_pretrained(
            tmp_path, state_dict={k: v for k, v in teacher.state_dict().items() if "query" not in k}
        )
        with pytest.raises(ValueError, match=r"no weights for .*query.*it would teach noise"):
            made(tmp_path, models=(tiny.embedder("distilbert"), str(tmp_path)))

    def test_the_teachers_encoder_is_taken_alone_where_it_has_a_decoder(self, tmp_path):
        hf.T5ForConditionalGeneration(tiny.t5(hidden=48).config).save_pretrained(tmp_path / "teacher")
        trainer = made(tmp_path, models=(tiny.embedder("modernbert"), str(tmp_path / "teacher")))
        assert type(trainer.teacher.model) is hf.T5EncoderModel
        trainer.train()
        assert logged(trainer, "loss")[0] > 0

    @pytest.mark.parametrize("both", [False, True])
    def test_a_students_folder_gives_it_without_its_head(self, both, tmp_path):
        student, teacher = tiny.distilbert(), tiny.embedding_pair()[1]
        student.save_pretrained(tmp_path / "student")
        teacher.save_pretrained(tmp_path / "teacher")
        trainer = made(tmp_path, models=(str(tmp_path / "student"), str(tmp_path / "teacher") if both else teacher))
        assert type(trainer.model) is hf.DistilBertModel
        assert type(trainer.teacher.model) is hf.BertModel
        trained = trainer.model.transformer.layer[0].ffn.lin1.weight
        assert torch.equal(trained, student.distilbert.transformer.layer[0].ffn.lin1.weight)
