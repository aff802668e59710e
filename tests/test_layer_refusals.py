"""What cannot be compared inside two models is refused when the trainer is made, with the reason and the remedy."""

import re

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

from hf_distill.signals import TeacherOutput
from tests import tiny
from tests.models.families import family
from tests.test_encoder_decoder_classifiers import classifier
from tests.test_other_tokenizers import own_columns
from tests.training import logged, make_trainer

HIDDEN = {"student": "hidden[*]", "loss": "hidden_mse"}
ATTENTION = {"student": "attention_scores[*]", "loss": "attention_mse"}
LAST = {"student": "hidden[-1]", "teacher": "hidden[-1]", "loss": "hidden_mse"}


def ended(data):
    """Rows that end in the token whose state BART classifies."""
    for row in data:
        tokens, last = row["input_ids"], int(row["attention_mask"].sum()) - 1
        tokens[tokens == 2] = 3
        tokens[last] = 2
    return data


def recipe(*matches, task=0.5):
    named = [{"name": f"own_{number}", **match} for number, match in enumerate(matches)]
    return {"task": {"weight": task}, "matches": named}


def made(folder, match, name="bert", **options):
    return make_trainer(folder, name, distillation_config=recipe(match), **options)


def refused(folder, match, *fragments, name="bert", **options):
    """Checks that making the trainer raises a ValueError whose message has all the fragments."""
    with pytest.raises(ValueError, match=fragments[0]) as refusal:
        made(folder, match, name, **options)
    for fragment in fragments[1:]:
        assert re.search(fragment, str(refusal.value)), f"{fragment!r} is not in {str(refusal.value)!r}"


def trains(folder, match, name="bert", **options):
    """Checks that a step has a term worth its name, and that it moves the student."""
    trainer = made(folder, match, name, max_steps=1, learning_rate=1e-2, **options)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    value = logged(trainer, "loss_own_0")[0]
    assert 0 < value < float("inf")
    assert any(not torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True))
    return value


class TestLayers:
    """The zoo's student has 2 layers, its teacher 3."""

    @pytest.mark.parametrize("layer", [3, -4])
    def test_the_student_must_have_the_layer(self, layer, tmp_path):
        match = {**LAST, "student": f"hidden[{layer}]"}
        refused(tmp_path, match, rf"'own_0': hidden\[{layer}\] is not there", "2 layers", "from 0", "-1 backwards")

    @pytest.mark.parametrize("layer", [4, -5])
    def test_the_teacher_must_have_the_layer(self, layer, tmp_path):
        match = {**LAST, "teacher": f"hidden[{layer}]"}
        refused(tmp_path, match, rf"hidden\[{layer}\] is not there", "3 layers", "-1 backwards")

    def test_attention_counts_from_1(self, tmp_path):
        match = {**ATTENTION, "student": "attention_scores[-3]", "teacher": "attention_scores[1]"}
        refused(tmp_path, match, r"attention_scores\[-3\] is not there", "counted from 1 to 2")

    @pytest.mark.parametrize("pairs", [[[1, 4]], [[3, 3]], [[1, 3], [2, -5]]])
    def test_a_map_must_be_for_these_depths(self, pairs, tmp_path):
        refused(tmp_path, {**HIDDEN, "map": pairs}, "'own_0'", "student has 2 layers, the teacher 3")

    def test_a_map_names_each_pair_once(self, tmp_path):
        refused(tmp_path, {**HIDDEN, "map": [[2, 3], [-1, -1]]}, r"pair \[2, 3\] twice")

    def test_a_map_must_leave_something(self, tmp_path):
        refused(tmp_path, {**HIDDEN, "map": []}, "explicit map needs at least one")
        shallow = (tiny.bert(layers=1), tiny.bert(layers=3))
        refused(tmp_path, {**HIDDEN, "map": "skip"}, "maps nothing", "Use uniform or last", models=shallow)
        one = {"student": "hidden[2]", "teacher": "hidden", "loss": "hidden_mse", "map": "skip"}
        refused(tmp_path, one, "leaves nothing to compare", "Name the pairs")

    @pytest.mark.parametrize("strategy", ["last", "first", "skip"])
    def test_a_student_deeper_than_its_teacher_has_no_place_in_some_maps(self, strategy, tmp_path):
        deep = (tiny.bert(layers=4), tiny.bert(layers=3))
        refused(tmp_path, {**HIDDEN, "map": strategy}, "4 student and 3 teacher layers", "Use uniform", models=deep)

    def test_a_random_map_needs_as_many_candidates_as_layers(self, tmp_path):
        match = {**HIDDEN, "map": {"strategy": "random", "candidates": [2]}}
        refused(tmp_path, match, r"candidates \[2\]", "Give more candidates")

    def test_vectors_of_a_mixture_of_layers_are_no_relations_between_texts(self, tmp_path):
        match = {"student": "pooled(cls)@hidden[*]", "loss": "rkd_distance", "map": "attention"}
        refused(tmp_path, match, "rkd_distance compares relations", "hidden_mse, or another map")

    def test_a_module_must_be_there(self, tmp_path):
        match = {"student": "module:bert.poler", "teacher": "module:bert.pooler", "loss": "hidden_mse"}
        refused(tmp_path, match, r"no module 'bert\.poler'", r"Did you mean bert\.pooler")

    def test_a_stack_must_be_there(self, tmp_path):
        match = {**HIDDEN, "student": "encoder.hidden[*]", "teacher": "hidden"}
        refused(tmp_path, match, "has no encoder of its own", r"Write hidden\[\*\] instead")

    def test_one_stack_against_two_must_say_which(self, tmp_path):
        student, teacher = classifier("SequenceClassification", 0), tiny.bert()
        for models in ((student, teacher), (teacher, student)):
            fragments = ("encoder and decoder", "one stack of layers", r"write encoder\.")
            refused(tmp_path, HIDDEN, *fragments, models=models)
        match = {**HIDDEN, "teacher": "encoder.hidden"}
        trains(tmp_path, match, models=(teacher, student), train_dataset=ended(tiny.rows("sequence")))

    @pytest.mark.parametrize(
        ("name", "setting"),
        [("wav2vec2-ctc", "layerdrop"), ("bart", "encoder_layerdrop"), ("bart", "decoder_layerdrop")],
    )
    def test_a_student_must_not_skip_layers(self, name, setting, tmp_path):
        models = tiny.pair(name)
        setattr(models[0].config, setting, 0.1)
        fragments = ("leaves out 10% of its layers", "layerdrop", "to 0")
        refused(tmp_path, HIDDEN, *fragments, name=name, models=models)
        trains(tmp_path, HIDDEN, name, models=models[::-1])  # a teacher is in evaluation mode


class TestAttention:
    def test_heads_must_be_as_many(self, tmp_path):
        models = (tiny.bert(), tiny.bert(hidden=48, num_attention_heads=6))
        for match in (ATTENTION, {"student": "attention_probs[*]", "loss": "attention_kl"}):
            refused(tmp_path, match, "has 4 heads.* 6", "heads: mean", "heads: relation", models=models)
        values = {"student": "value[-1]", "teacher": "value[-1]", "loss": "minilm_values"}
        refused(tmp_path, values, "4 heads.* 6", "minilmv2_relations", models=models)

    def test_distributions_have_no_mean_over_heads(self, tmp_path):
        match = {"student": "attention_probs[*]", "loss": "attention_kl", "heads": "mean"}
        refused(tmp_path, match, "heads: mean averages scores", "heads: relation")

    @pytest.mark.parametrize("heads", [5, 64])
    def test_relation_heads_must_divide_both_widths(self, heads, tmp_path):
        match = {"student": "query[-1]", "teacher": "query[-1]", "loss": "minilmv2_relations"}
        refused(tmp_path, {**match, "options": {"relation_heads": heads}}, "cannot be divided", "Valid numbers: 1, 2")

    @pytest.mark.parametrize("name", ["deberta-v2", "fnet", "mamba"])
    def test_a_model_whose_attention_cannot_be_seen_teaches_its_hidden_states(self, name, tmp_path):
        kind = "bert" if name != "mamba" else "gpt2"
        other = tiny.pair(kind)[1]
        for models in ((family(name), other), (other, family(name))):
            refused(tmp_path, ATTENTION, "attention interface", r"Match hidden\[i\]", name=kind, models=models)
            # Mamba does not give the output of its embeddings.
            match = {**HIDDEN, "map": {1: 1, 2: 2}} if name == "mamba" else HIDDEN
            trains(tmp_path, match, kind, models=models)

    def test_embeddings_that_a_model_does_not_give_are_refused(self, tmp_path):
        models = (family("mamba"), tiny.pair("gpt2")[1])
        refused(
            tmp_path, HIDDEN, r"does not give .* hidden\[0\]", r"Use hidden\[1\] and up", name="gpt2", models=models
        )

    @pytest.mark.parametrize("match", [HIDDEN, ATTENTION, {"student": "attention_probs[*]", "loss": "attention_kl"}])
    @pytest.mark.parametrize("as_student", [True, False])
    def test_layers_that_share_their_weights_are_layers(self, match, as_student, tmp_path):
        models = (family("albert"), tiny.pair("bert")[1])
        trains(tmp_path, match, models=models if as_student else models[::-1])

    @pytest.mark.parametrize("side", [0, 1])
    def test_its_implementation_must_let_itself_be_seen(self, side, tmp_path):
        models = tiny.pair("bert")
        models[side].config._attn_implementation = "flex_attention"
        refused(tmp_path, ATTENTION, "'flex_attention'", r"set_attn_implementation\('sdpa'\)", models=models)

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_implementations_that_can_be_seen_give_the_same(self, implementation, tmp_path):
        models = tiny.pair("bert")
        for model in models:
            model.set_attn_implementation(implementation)
        assert trains(tmp_path, ATTENTION, models=models) == pytest.approx(trains(tmp_path, ATTENTION), rel=1e-5)

    def test_a_causal_model_and_one_that_is_not_have_other_maps(self, tmp_path):
        match = {
            "student": "encoder.attention_scores[*]",
            "teacher": "decoder.attention_scores",
            "loss": "attention_mse",
        }
        data = tiny.rows("translation", length=7)
        refused(tmp_path, match, "sees those after it", "Compare hidden states", name="bart", train_dataset=data)


REENTRANT = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}


class TestCheckpointing:
    def test_reentrant_checkpointing_cuts_attention_off(self, tmp_path):
        refused(tmp_path, ATTENTION, "Re-entrant", "use_reentrant=False", **REENTRANT)

    def test_reentrant_checkpointing_leaves_hidden_states(self, tmp_path):
        assert trains(tmp_path, HIDDEN, **REENTRANT) == pytest.approx(trains(tmp_path, HIDDEN), rel=1e-5)


class LogitsOnly:
    """A teacher that says nothing of its inside."""

    def __init__(self, model):
        self.model = model.eval()

    def place(self, device):
        self.model.to(device)

    @torch.no_grad()
    def __call__(self, inputs):
        kept = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return TeacherOutput((self.model(**kept).logits,))


class TestTeacher:
    def test_there_must_be_one(self, tmp_path):
        models = (tiny.pair("bert")[0], None)
        refused(
            tmp_path, HIDDEN, "'own_0' compares the student's layers with a teacher's", "teacher_model=", models=models
        )

    def test_it_must_show_its_inside(self, tmp_path):
        student, teacher = tiny.pair("bert")
        models = (student, LogitsOnly(teacher))
        refused(tmp_path, HIDDEN, "a LogitsOnly, gives logits only", "'own_0'", "Pass a model", models=models)
        trainer = make_trainer(tmp_path, models=models, kd_weight=1.0)
        trainer.train()
        assert logged(trainer, "loss_kd")[0] > 0

    def test_a_loss_on_the_student_alone_needs_none(self, tmp_path):
        data = [{**row, "domain": torch.tensor(i % 2)} for i, row in enumerate(tiny.rows("sequence"))]
        match = {"student": "pooled(cls)@hidden[-1]", "loss": "mmd", "domain": "domain"}
        trains(tmp_path, match, models=(tiny.pair("bert")[0], None), train_dataset=data)

    @pytest.mark.parametrize(
        "match",
        [HIDDEN, ATTENTION, {"student": "hidden[*]", "loss": "ckd_pairs"}, {**LAST, "length": "interpolate"}],
        ids=["hidden", "attention", "ckd", "interpolate"],
    )
    @pytest.mark.parametrize("lengths", ["other lengths", "one length, other tokens"])
    def test_texts_of_its_own_tokens_are_not_compared_token_by_token(self, match, lengths, tmp_path):
        length = 15 if lengths == "other lengths" else 12
        refused(tmp_path, match, r"pooled\(mean\)@", train_dataset=texts_of_two_tokenizers(length))

    @pytest.mark.parametrize("pooling", ["cls", "mean", "max"])
    def test_texts_of_its_own_tokens_are_compared_as_one_vector(self, pooling, tmp_path):
        match = {"student": f"pooled({pooling})@hidden[*]", "loss": "hidden_mse"}
        trains(tmp_path, match, train_dataset=texts_of_two_tokenizers(15))

    def test_columns_of_its_own_with_the_same_tokens_are_compared(self, tmp_path):
        data = own_columns(tiny.rows("sequence"))
        assert trains(tmp_path, HIDDEN, train_dataset=data) == trains(tmp_path, HIDDEN)


def texts_of_two_tokenizers(length):
    """Rows whose teacher_* columns are cut into other tokens, padded to a length."""
    others = tiny.rows("sequence", length=length, seed=5)[::-1]
    names = ("input_ids", "attention_mask")
    return [
        {**row, **{f"teacher_{name}": other[name] for name in names}}
        for row, other in zip(tiny.rows("sequence"), others, strict=True)
    ]


class TestWidths:
    def test_an_identity_maps_no_width_to_another(self, tmp_path):
        match = {**HIDDEN, "projection": "identity"}
        refused(tmp_path, match, "is 32 wide.* 48", "projection: {kind: linear}")

    def test_one_projection_for_all_needs_one_width(self, tmp_path):
        match = {**HIDDEN, "projection": {"share": "all", "when": "always"}}
        models = (family("swin"), family("swin"))
        refused(
            tmp_path, match, "share: all asks one projection for widths", "Use share: pair", name="vit", models=models
        )

    def test_a_bias_that_peft_trains_is_refused(self, tmp_path):
        base, teacher = tiny.pair("bert")
        adapted = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["query"], bias="all"))
        refused(tmp_path, HIDDEN, "bias", models=(adapted, teacher))


class TestMasks:
    def test_its_column_must_be_in_the_batch(self, tmp_path):
        refused(tmp_path, {**HIDDEN, "mask": "batch:spans"}, "no column 'spans'", "Add it to every row")

    def test_its_column_must_speak_of_every_position(self, tmp_path):
        data = [{**row, "spans": torch.ones(5)} for row in tiny.rows("sequence")]
        refused(tmp_path, {**HIDDEN, "mask": "batch:spans"}, "every position", train_dataset=data)

    def test_its_column_says_which_positions_count(self, tmp_path):
        data = [{**row, "spans": torch.arange(12) < 1} for row in tiny.rows("sequence")]
        first = trains(tmp_path, {**HIDDEN, "mask": "batch:spans"}, train_dataset=data)
        assert first == pytest.approx(trains(tmp_path, {**HIDDEN, "mask": "cls"}), rel=1e-6)
        assert first != pytest.approx(trains(tmp_path, HIDDEN), rel=1e-3)

    def test_the_domain_must_be_in_the_batch(self, tmp_path):
        match = {"student": "pooled(mean)@hidden[-1]", "loss": "mmd", "domain": "source"}
        refused(tmp_path, match, "no column 'source'", "Add it to every row")

    def test_content_needs_a_tokenizer(self, tmp_path):
        match = {**HIDDEN, "mask": "content"}
        refused(tmp_path, match, "no tokenizer", "processing_class", 'mask: "tokens"')
        trains(tmp_path, match, processing_class=tiny.tokenizer())

    def test_a_classifier_of_texts_supervises_no_position(self, tmp_path):
        refused(tmp_path, {**HIDDEN, "mask": "task"}, r"mask: 'task'", "every position")
        trains(tmp_path, {**HIDDEN, "mask": "task"}, "bert-tokens")

    def test_images_have_no_tokens(self, tmp_path):
        refused(tmp_path, {**HIDDEN, "mask": "content"}, "no input_ids", name="vit")


def test_a_compared_model_may_be_any_of_a_family(tmp_path):
    """DistilBERT learns from BERT: other classes, other names inside."""
    models = (tiny.distilbert(), tiny.bert(hidden=48, layers=3))
    for match in (HIDDEN, ATTENTION):
        trains(tmp_path, match, models=models)


def test_the_student_is_left_as_it_was(tmp_path):
    student, teacher = tiny.pair("bert")
    with pytest.raises(ValueError, match="is not there"):
        made(tmp_path, {**LAST, "student": "hidden[9]"}, models=(student, teacher))
    for model in (student, teacher):
        assert not hasattr(model, "distillation_modules")
        assert not any(module._forward_hooks for module in model.modules())
    assert isinstance(student, hf.BertForSequenceClassification)
