"""Students that train adapters: what `peft_config` makes of them, and what it refuses."""

import copy

import peft
import pytest
import torch
import transformers as hf

from hf_distill import DistillationTrainer, Stage, build_student, run_stages
from hf_distill.adapters import add_adapters
from hf_distill.models.heads import task_model
from tests.invariants.steps import assert_same_steps, recorded
from tests.tiny import ZOO, bert, llama, pair, rows, vit, wav2vec2
from tests.training import arguments, logged, losses, make_trainer

FAST = {"learning_rate": 0.05}


def lora(**options):
    return peft.LoraConfig(**{"r": 2, "target_modules": "all-linear", **options})


def fresh(make=llama, **options):
    torch.manual_seed(0)
    return make(**options)


class TestWhatIsTrained:
    def test_the_training_is_that_of_a_student_wrapped_by_hand(self, tmp_path):
        config, teacher = lora(lora_dropout=0.1, task_type="CAUSAL_LM"), pair("llama")[1]
        base = fresh()
        hf.set_seed(42)
        by_hand = peft.get_peft_model(base, copy.deepcopy(config))
        expected = make_trainer(tmp_path, "llama", models=(by_hand, teacher), **FAST)
        before = losses(expected)
        trainer = make_trainer(tmp_path, "llama", models=(fresh(), teacher), peft_config=config, **FAST)
        assert losses(trainer) == before
        assert trainer.model.state_dict().keys() == expected.model.state_dict().keys()
        for name, value in expected.model.state_dict().items():
            assert torch.equal(trainer.model.state_dict()[name], value), name

    def test_the_base_is_neither_copied_nor_changed_and_the_config_is_left_as_it_is(self, tmp_path):
        student, config = fresh(), lora()
        before, places = copy.deepcopy(student.state_dict()), {p.data_ptr() for p in student.parameters()}
        given = copy.deepcopy(config.to_dict())
        teacher = pair("llama")[1]
        trainer = make_trainer(tmp_path, "llama", models=(student, teacher), peft_config=config, **FAST)
        assert places <= {parameter.data_ptr() for parameter in trainer.model.parameters()}
        trainer.train()
        restored = trainer.model.unload().state_dict()
        assert all(torch.equal(restored[name], value) for name, value in before.items())
        assert config.to_dict() == given

    def test_names_of_student_and_teacher_will_do(self, tmp_path):
        student, teacher = pair("bert")
        student.save_pretrained(tmp_path / "student")
        teacher.save_pretrained(tmp_path / "teacher")
        names = tuple(str(tmp_path / name) for name in ("student", "teacher"))
        first = make_trainer(tmp_path, models=names, peft_config=lora(), **FAST)
        second = make_trainer(tmp_path, models=names, peft_config=lora(), **FAST)
        assert isinstance(first.model, peft.PeftModelForSequenceClassification)
        assert losses(first) == losses(second)

    def test_every_fresh_student_gets_adapters(self, tmp_path):
        options = {"model_init": lambda: fresh(), "peft_config": lora(), "max_steps": 3}
        trainer = make_trainer(tmp_path, "llama", models=(None, None), **options, **FAST)
        seen = []
        for _ in range(2):
            trainer.train()
            first, *later = logged(trainer, "loss_kd")
            assert first == pytest.approx(0, abs=1e-6), "the base teaches"
            assert max(later) > 1e-6
            seen.append((later, trainer.model))
        assert seen[0][0] == seen[1][0]
        assert seen[0][1] is not seen[1][1]

    def test_a_search_gives_every_trial_adapters(self, tmp_path):
        optuna = pytest.importorskip("optuna", reason="a search needs the extra hpo")
        optuna.logging.set_verbosity(optuna.logging.CRITICAL)
        seen = []

        class Watcher(hf.TrainerCallback):
            def on_train_begin(self, args, state, control, model=None, **kwargs):
                seen.append({name for name, parameter in model.named_parameters() if parameter.requires_grad})

        options = {"model_init": lambda: fresh(), "peft_config": lora(), "eval_strategy": "steps", "eval_steps": 1}
        models = (None, pair("llama")[1])
        trainer = make_trainer(tmp_path, "llama", models=models, max_steps=1, callbacks=[Watcher()], **options)
        trainer.hyperparameter_search(
            lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 0.1, 0.2)}, n_trials=2
        )
        assert len(seen) == 2
        assert all(names and all("lora_" in name for name in names) for names in seen)

    @pytest.mark.parametrize("checkpointing", [{"use_reentrant": False}, {"use_reentrant": True}], ids=str)
    @pytest.mark.parametrize("name", ["llama", "bert"])
    def test_gradients_are_the_same_with_checkpointing(self, name, checkpointing, tmp_path):
        runs = []
        for options in ({}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": checkpointing}):
            config = lora(init_lora_weights=False)
            runs.append(recorded(make_trainer(tmp_path, name, peft_config=config, **options)))
        assert_same_steps(runs[1], runs[0])

    def test_layers_are_matched_through_the_adapters(self, tmp_path):
        terms = {"hidden_weight": 1.0, "attention_weight": 1.0, "max_steps": 1}
        plain = make_trainer(tmp_path, "llama", **terms)
        adapted = make_trainer(tmp_path, "llama", peft_config=lora(), **terms)
        plain.train()
        adapted.train()  # adapters begin as nothing
        for name in ("loss_kd", "loss_hidden", "loss_attention"):
            assert logged(adapted, name) == pytest.approx(logged(plain, name), rel=1e-5)

    def test_layers_are_paired_with_their_originals_through_the_adapters(self, tmp_path):
        teacher = fresh(layers=6)
        models = (build_student(teacher, layers=[0, 2, 5]).model, teacher)
        terms = {"hidden_weight": 1.0, "layer_mapping": "copied"}
        trainer = make_trainer(tmp_path, "llama", models=models, peft_config=lora(), **terms)
        pairs = trainer._layers.plan.matches[0].stacks[0].pairs
        assert [(pair.student.layer, pair.teacher.layer) for pair in pairs] == [(0, 0), (1, 1), (2, 3), (3, 6)]


class TestHeads:
    @pytest.mark.parametrize(
        ("name", "task_type"),
        [
            ("bert", "SEQ_CLS"),
            ("bert-tokens", "TOKEN_CLS"),
            ("bert-spans", "QUESTION_ANS"),
            ("bert-choices", None),
            ("bert-masked", None),
            ("llama", "CAUSAL_LM"),
            ("t5", "SEQ_2_SEQ_LM"),
            ("vit", None),
            ("whisper", None),
        ],
    )
    def test_the_task_type_follows_the_head(self, name, task_type, tmp_path):
        trainer = make_trainer(tmp_path, name, peft_config=lora(), **FAST)
        assert trainer.model.active_peft_config.task_type == task_type
        trainer.train()
        assert trainer.state.global_step == 2

    @pytest.mark.parametrize(
        ("name", "heads"),
        [
            ("bert", {"classifier"}),
            ("distilbert", {"pre_classifier", "classifier"}),
            ("modernbert", {"head", "classifier"}),
            ("bert-choices", {"classifier"}),
            ("vit", {"classifier"}),
            ("wav2vec2-sound", {"projector", "classifier"}),
        ],
    )
    def test_a_new_classifier_is_trained_and_saved(self, name, heads, tmp_path):
        torch.manual_seed(0)
        ZOO[name][0]().base_model.save_pretrained(tmp_path / "body")
        cls, teacher = type(pair(name)[0]), pair(name)[1]
        options = {"num_labels": teacher.config.num_labels}
        student = cls.from_pretrained(tmp_path / "body", **options)
        before = {key: value.clone() for key, value in student.state_dict().items()}
        trainer = make_trainer(tmp_path, name, models=(student, teacher), peft_config=lora(), **FAST)
        trainer.train()
        trainer.save_model(str(tmp_path / "saved"))
        base = cls.from_pretrained(tmp_path / "body", **options)  # with another new head
        assert not torch.equal(base.classifier.weight, before["classifier.weight"])
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "saved").eval()
        merged, own = loaded.merge_and_unload(), trainer.model.merge_and_unload()
        changed = {key.split(".")[0] for key, value in before.items() if not torch.equal(own.state_dict()[key], value)}
        assert changed >= heads
        for key, value in own.state_dict().items():
            torch.testing.assert_close(merged.state_dict()[key], value, msg=key)

    def test_a_head_with_a_name_unknown_to_peft_is_trained_where_the_task_type_is_given_too(self):
        config = hf.BartConfig(**{**ZOO["bart"][0]().config.to_dict(), "num_labels": 3})
        student = add_adapters(hf.BartForSequenceClassification(config), lora(task_type="SEQ_CLS"))
        trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
        assert any("classification_head.modules_to_save" in name for name in trained)

    @pytest.mark.parametrize(
        ("make", "options", "saved"),
        [
            (llama, {}, None),
            (llama, {"modules_to_save": ["embed_tokens"]}, {"embed_tokens"}),
            (vit, {"modules_to_save": ["layernorm"]}, {"layernorm"}),
            (vit, {"target_modules": ["q_proj", "query", "classifier"]}, None),
        ],
    )
    def test_what_the_config_says_stays(self, make, options, saved):
        student = add_adapters(fresh(make), lora(**options))
        found = student.active_peft_config.modules_to_save
        assert (found and {*found}) == saved


def refused(tmp_path, student, config, *fragments, teacher=None, error=ValueError, **options):
    before = [name for name, _ in student.named_modules()]
    with pytest.raises(error) as refusal:
        make_trainer(tmp_path, options.pop("name", "llama"), models=(student, teacher), peft_config=config, **options)
    for fragment in fragments:
        assert fragment in str(refusal.value)
    return before == [name for name, _ in student.named_modules()]


class TestRefusals:
    def test_adapters_beside_adapters(self, tmp_path):
        said = ("adapters already", "merge_and_unload", "drop peft_config")
        assert refused(tmp_path, peft.get_peft_model(fresh(), lora()), lora(), *said)
        student = fresh()
        student.add_adapter(lora())
        assert refused(tmp_path, student, lora(), *said)

    def test_a_fresh_student_that_has_adapters(self, tmp_path):
        options = {"model_init": lambda: peft.get_peft_model(fresh(), lora()), "peft_config": lora()}
        with pytest.raises(ValueError, match="adapters already"):
            make_trainer(tmp_path, "llama", models=(None, None), **options)

    def test_no_config_of_peft(self, tmp_path):
        said = "peft_config is a dict, expected a config of PEFT"
        assert refused(tmp_path, fresh(), {"r": 2}, said, error=TypeError)

    def test_the_student_itself_as_teacher(self, tmp_path):
        student = fresh()
        assert refused(tmp_path, student, lora(), "one object", "teacher_model=None", teacher=student)

    def test_stages_take_a_student_that_has_them(self, tmp_path):
        student, teacher = pair("llama")
        options = {"teacher_model": teacher, "train_dataset": rows("causal"), "peft_config": lora()}
        with pytest.raises(ValueError, match=r"peft_config.*get_peft_model"):
            run_stages([Stage("first")], args=arguments(tmp_path), model=student, **options)

    def test_a_misspelt_argument_is_told_its_name(self, tmp_path):
        student, teacher = pair("llama")
        with pytest.raises(TypeError, match="Did you mean peft_config"):
            DistillationTrainer(student, teacher_model=teacher, pef_config=lora())

    @pytest.mark.parametrize("name", ["llama", "t5", "bert-tokens", "bert-spans"])
    @pytest.mark.parametrize("config", [peft.PromptTuningConfig, peft.PromptEncoderConfig])
    def test_virtual_tokens_where_every_position_is_predicted(self, config, name, tmp_path):
        config = config(num_virtual_tokens=3)
        student, teacher = pair(name)
        refused(tmp_path, student, config, "The student has 3 virtual tokens", "LoRA", name=name, teacher=teacher)

    def test_virtual_tokens_of_the_teacher(self, tmp_path):
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        with pytest.raises(ValueError, match="The teacher has 3 virtual tokens"):
            make_trainer(tmp_path, "llama", models=(fresh(), peft.get_peft_model(fresh(), config)))

    def test_virtual_tokens_for_a_model_without_text(self, tmp_path):
        student, teacher = pair("vit")
        said = "PEFT has no PROMPT_TUNING for ViTForImageClassification"
        assert refused(
            tmp_path, student, peft.PromptTuningConfig(num_virtual_tokens=3), said, name="vit", teacher=teacher
        )

    @pytest.mark.parametrize("start", ["pissa", "olora"])
    def test_a_base_that_gave_a_part_of_itself_away_does_not_teach(self, start, tmp_path):
        config = lora(init_lora_weights=start)
        refused(tmp_path, fresh(), config, f"init_lora_weights='{start}'", "teacher_model=")
        trainer = make_trainer(tmp_path, "llama", models=(fresh(), pair("llama")[1]), peft_config=config)
        plain = make_trainer(tmp_path, "llama", models=(fresh(), pair("llama")[1]))
        assert losses(trainer)[0] == pytest.approx(losses(plain)[0], rel=1e-5), "the student is what it was"

    def test_a_base_that_is_trained_does_not_teach(self, tmp_path):
        config = lora(target_modules=["query"], bias="all")
        refused(tmp_path, fresh(bert), config, "the base's own", "bias='none'", name="bert")
        student = peft.get_peft_model(fresh(), lora())
        task_model(student).model.norm.weight.requires_grad_()
        with pytest.raises(ValueError, match=r"1 trained parameters are the base's own .*model.norm.weight"):
            make_trainer(tmp_path, "llama", models=(student, None))

    def test_adapters_that_peft_could_not_save(self):
        with pytest.raises(ValueError, match=r"cannot save adapters of the head of Wav2Vec2ForCTC.*target_modules"):
            add_adapters(wav2vec2(), lora())
        student = add_adapters(wav2vec2(), lora(target_modules=["q_proj"]))
        assert any("lm_head.modules_to_save" in name for name in student.state_dict())


def test_virtual_tokens_suit_a_text_as_a_whole(tmp_path):
    config = peft.PromptTuningConfig(num_virtual_tokens=3)
    trainer = make_trainer(tmp_path, peft_config=config, **FAST)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    base = trainer.model.get_base_model()
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "saved").eval()
    batch = {name: torch.stack([row[name] for row in rows("sequence")]) for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(loaded(**batch).logits, trainer.model.eval()(**batch).logits)
