"""Student and teacher of other heads, widths, patches, frames and tokens: each strategy against NumPy in float64."""

import copy

import numpy as np
import pytest
import torch
import transformers as hf
from torch.nn import functional as F

from hf_distill.models.positions import stretch_frames
from tests import tiny
from tests.invariants.steps import longer
from tests.matches import look, pair_of
from tests.models.families import MORE
from tests.test_encoder_decoder_classifiers import classifier
from tests.test_layer_refusals import ended, made, recipe, refused, texts_of_two_tokenizers
from tests.training import batch_of, logged, make_trainer

SIX_HEADS = ({"hidden": 32, "layers": 2}, {"hidden": 48, "layers": 2, "num_attention_heads": 6})


def value_of(folder, match, models, rows, **options):
    """The term of a step over two micro-batches, and the weights of its projections before it; trains a copy."""
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": len(rows) // 4, "max_steps": 1}
    trainer = made(
        folder, match, models=(copy.deepcopy(models[0]), models[1]), train_dataset=rows, **{**sizes, **options}
    )
    weights = {name: value.double().clone() for name, value in trainer._layers.modules.state_dict().items()}
    trainer.train()
    return logged(trainer, "loss_own_0")[0], weights


def projected(weights, name, hidden):
    return hidden @ weights[f"{name}.0.weight"].T + weights[f"{name}.0.bias"]


@pytest.fixture(scope="module")
def other_heads():
    """Models of 4 and 6 heads, rows, and what is inside both models."""
    models = pair_of(tiny.bert, *SIX_HEADS)
    rows = tiny.rows("sequence")
    return models, rows, *(look(model, rows) for model in models)


class TestHeads:
    def test_mean_compares_the_mean_of_the_scores(self, other_heads, tmp_path):
        models, rows, s, t = other_heads
        match = {"student": "attention_scores[*]", "loss": "attention_mse", "heads": "mean"}
        value, _ = value_of(tmp_path, match, models, rows)
        pairs = s.real[:, :, None] & s.real[:, None, :]
        expected = sum(((s.scores(i).mean(1) - t.scores(i).mean(1)) ** 2)[pairs].mean() for i in (1, 2))
        assert value == pytest.approx(float(expected), rel=1e-5)

    @pytest.mark.parametrize("heads", [None, 2, 8])
    def test_relation_compares_scores_of_as_many_regrouped_heads(self, heads, other_heads, tmp_path):
        """Left out, they are as many as the model with fewer heads has."""
        models, rows, s, t = other_heads
        match = {"student": "attention_scores[*]", "loss": "attention_mse", "heads": "relation"}
        value, _ = value_of(tmp_path, match | ({"options": {"relation_heads": heads}} if heads else {}), models, rows)
        pairs = s.real[:, :, None] & s.real[:, None, :]
        expected = 0.0
        for layer in (0, 1):
            own, other = (regrouped_scores(x, "query", "key", layer, heads or 4) for x in (s, t))
            expected += ((own - other) ** 2).mean(1)[pairs].mean()
        assert value == pytest.approx(float(expected), rel=1e-5)

    @pytest.mark.parametrize("loss", ["attention_kl", "attention_probs_mse"])
    def test_relation_compares_distributions_of_regrouped_heads(self, loss, other_heads, tmp_path):
        models, rows, s, t = other_heads
        match = {"student": "attention_probs[-1]", "teacher": "attention_probs[-1]", "loss": loss, "heads": "relation"}
        value, _ = value_of(tmp_path, match, models, rows)
        keys = s.real[:, None, None, :]
        q, p = (regrouped_scores(x, "query", "key", 1, 4).masked_fill(~keys, -torch.inf).softmax(-1) for x in (s, t))
        differences = (p - q) ** 2 if loss == "attention_probs_mse" else p * (p / q).log().nan_to_num()
        assert value == pytest.approx(float(differences.sum(-1).mean(1)[s.real].mean()), rel=1e-5)

    @pytest.mark.parametrize("kind", ["query", "key", "value"])
    @pytest.mark.parametrize("heads", [None, 1, 16])
    def test_relations_are_of_as_many_regrouped_heads(self, kind, heads, other_heads, tmp_path):
        models, rows, s, t = other_heads
        match = {"student": f"{kind}[-1]", "teacher": f"{kind}[-1]", "loss": "minilmv2_relations"}
        match |= {"options": {"relation_heads": heads}} if heads else {}
        value, _ = value_of(tmp_path, match, models, rows)
        keys = s.real[:, None, None, :]
        q, p = (
            regrouped_scores(x, kind, kind, 1, heads or 4).masked_fill(~keys, -torch.inf).softmax(-1) for x in (s, t)
        )
        rows_kl = (p * (p / q).log().nan_to_num()).sum(-1).mean(1)
        assert value == pytest.approx(float(rows_kl[s.real].mean()), rel=1e-5)

    def test_values_may_be_regrouped_too(self, other_heads, tmp_path):
        models, rows, s, t = other_heads
        match = {"student": "value[-1]", "teacher": "value[-1]", "loss": "minilm_values", "heads": "relation"}
        value, _ = value_of(tmp_path, match, models, rows)
        keys = s.real[:, None, None, :]
        q, p = (regrouped_scores(x, "value", "value", 1, 4).masked_fill(~keys, -torch.inf).softmax(-1) for x in (s, t))
        rows_kl = (p * (p / q).log().nan_to_num()).sum(-1).mean(1)
        assert value == pytest.approx(float(rows_kl[s.real].mean()), rel=1e-5)


def regrouped_scores(seen, left, right, layer, heads):
    """(rows, heads, length, length): products of the parts of all heads side by side, cut anew; over sqrt(width)."""
    parts = [torch.cat(seen.parts[kind][layer].unbind(1), -1).chunk(heads, -1) for kind in (left, right)]
    return torch.stack([a @ b.mT / a.shape[-1] ** 0.5 for a, b in zip(*parts, strict=True)], 1)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("share", ["pair", "all"])
def test_a_width_is_projected_to_the_other(kind, share, other_heads, tmp_path):
    models, rows, s, t = other_heads
    match = {"student": "hidden[*]", "loss": "hidden_mse", "projection": {"kind": kind, "share": share}}
    value, weights = value_of(tmp_path, match, models, rows)
    expected = 0.0
    for layer in range(3):
        name = "own_0_shared" if share == "all" else f"own_0_{layer}_{layer}"
        own = projected(weights, name, s.hidden[layer])
        if kind == "mlp":
            own = F.gelu(own) @ weights[f"{name}.2.weight"].T + weights[f"{name}.2.bias"]
        expected += F.mse_loss(own[s.real], t.hidden[layer][s.real])
    assert value == pytest.approx(float(expected), rel=1e-5)


def vit(patch, hidden=32, layers=2):
    config = hf.ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=patch,
        num_labels=tiny.CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return hf.ViTForImageClassification(config)


def along(values, axis, length):
    """The values at the centres of `length` equal cells along an axis, linear between the old centres."""
    old = values.shape[axis]
    at = np.clip((np.arange(length) + 0.5) * old / length - 0.5, 0, old - 1)
    return np.apply_along_axis(lambda column: np.interp(at, np.arange(old), column), axis, values)


class TestPatches:
    @pytest.mark.parametrize("patches", [(8, 4), (4, 8)])
    @pytest.mark.parametrize("width", [32, 48])
    def test_a_grid_is_interpolated_and_the_class_token_kept(self, patches, width, tmp_path):
        models = pair_of(vit, {"patch": patches[0]}, {"patch": patches[1], "hidden": width})
        rows = tiny.rows("image")
        s, t = (look(model, rows, attention=False) for model in models)
        match = {"student": "hidden[*]", "loss": "hidden_mse", "length": "interpolate"}
        value, weights = value_of(tmp_path, match, models, rows, name="vit")
        sides = [16 // patch for patch in patches]
        expected = 0.0
        for layer in range(3):
            own, other = s.hidden[layer], t.hidden[layer].numpy()
            grid = other[:, 1:].reshape(len(rows), sides[1], sides[1], width)
            grid = along(along(grid, 1, sides[0]), 2, sides[0]).reshape(len(rows), -1, width)
            other = np.concatenate([other[:, :1], grid], 1)
            own = own if width == 32 else projected(weights, f"own_0_{layer}_{layer}", own)
            expected += np.mean((own.numpy() - other) ** 2)
        assert value == pytest.approx(float(expected), rel=1e-5)

    def test_other_grids_are_refused_without_it(self, tmp_path):
        models, rows = (vit(8), vit(4)), tiny.rows("image")
        match = {"student": "hidden[*]", "loss": "hidden_mse"}
        fragments = ("has 5 positions.* 17", r"pooled\(mean\)@hidden", "length: interpolate")
        refused(tmp_path, match, *fragments, models=models, train_dataset=rows)

    def test_maps_of_other_grids_are_refused(self, tmp_path):
        models, rows = (vit(8), vit(4)), tiny.rows("image")
        for match in (
            {"student": "attention_scores[*]", "loss": "attention_mse"},
            {"student": "query[-1]", "teacher": "query[-1]", "loss": "minilmv2_relations"},
        ):
            refused(tmp_path, match, "has 5 positions.* 17", "Compare hidden", models=models, train_dataset=rows)

    def test_other_special_tokens_are_refused(self, tmp_path):
        deit = hf.DeiTForImageClassification(
            hf.DeiTConfig(**{**vit(4).config.to_dict(), "model_type": "deit", "num_labels": tiny.CLASSES})
        )
        match = {"student": "hidden[*]", "loss": "hidden_mse", "length": "interpolate"}
        refused(tmp_path, match, "2", "special tokens", models=(vit(8), deit), train_dataset=tiny.rows("image"))


def wav2vec2(strides, hidden=32):
    """A model of sound with a frame every `strides[0] * strides[1]` samples."""
    model = tiny.wav2vec2("SequenceClassification", hidden=hidden)
    config = hf.Wav2Vec2Config(**{**model.config.to_dict(), "conv_stride": strides})
    return hf.Wav2Vec2ForSequenceClassification(config)


class TestFrames:
    @pytest.mark.parametrize("strides", [((5, 4), (5, 2)), ((5, 2), (5, 4)), ((5, 3), (5, 2))])
    def test_each_sounds_real_frames_are_interpolated_at_the_students(self, strides, tmp_path):
        models = pair_of(wav2vec2, {"strides": strides[0]}, {"strides": strides[1], "hidden": 48})
        rows = tiny.rows("sound")
        match = {"student": "hidden[*]", "loss": "hidden_mse", "length": "interpolate"}
        value, weights = value_of(tmp_path, match, models, rows, name="wav2vec2-sound")
        s, t = (look(model, rows, attention=False) for model in models)
        samples = batch_of(rows)["attention_mask"].sum(-1)
        counts = [model._get_feat_extract_output_lengths(samples) for model in models]
        total = 0.0
        for row, (own_count, other_count) in enumerate(zip(*counts, strict=True)):
            for layer in range(3):
                own = projected(weights, f"own_0_{layer}_{layer}", s.hidden[layer][row, :own_count]).numpy()
                other = along(t.hidden[layer][row, :other_count].numpy(), 0, int(own_count))
                total += np.sum(np.mean((own - other) ** 2, -1))
        assert value == pytest.approx(total / int(counts[0].sum()), rel=1e-5)

    def test_padding_has_no_part_in_it(self, tmp_path):
        match = {"student": "hidden[*]", "loss": "hidden_mse", "length": "interpolate"}
        values = []
        for rows in (tiny.rows("sound"), longer(tiny.rows("sound"), "sound", extra=7)):
            models = pair_of(wav2vec2, {"strides": (5, 3)}, {"strides": (5, 2)})
            values.append(value_of(tmp_path, match, models, rows, name="wav2vec2-sound")[0])
        assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_frames_are_found_wherever_the_padding_is():
    frames = torch.randn(1, 6, 2, dtype=torch.float64)
    whole = stretch_frames(frames, torch.ones(1, 6).bool(), torch.ones(1, 4).bool())
    left, right = F.pad(frames, (0, 0, 3, 0), value=9.0), F.pad(frames, (0, 0, 1, 2), value=9.0)
    wanted = torch.arange(7)[None] >= 3
    moved = stretch_frames(left, torch.arange(9)[None] >= 3, wanted)
    torch.testing.assert_close(moved[:, 3:], whole)
    place = torch.arange(9)[None]
    torch.testing.assert_close(stretch_frames(right, (place >= 1) & (place < 7), wanted)[:, 3:], whole)
    nothing = stretch_frames(frames, torch.zeros(1, 6).bool(), torch.zeros(1, 4).bool())
    assert nothing.isfinite().all()


def test_an_encoder_of_two_stacks_teaches_one_of_one(tmp_path):
    student, teacher = tiny.bert(), classifier("SequenceClassification", 0)
    rows = ended(tiny.rows("sequence"))
    s, t = (look(model, rows, attention=False) for model in (student, teacher))
    match = {"student": "hidden[*]", "teacher": "encoder.hidden", "loss": "hidden_mse"}
    value, _ = value_of(tmp_path, match, (student, teacher), rows)
    expected = sum(F.mse_loss(a[s.real], b[s.real]) for a, b in zip(s.hidden, t.hidden, strict=True))
    assert value == pytest.approx(float(expected), rel=1e-5)


class TestTokens:
    """A teacher that reads columns of its own, with tokens of its own tokenizer."""

    @pytest.mark.parametrize("length", [15, 12])
    @pytest.mark.parametrize("pooling", ["cls", "mean", "max"])
    def test_each_text_is_one_vector_on_either_side(self, pooling, length, tmp_path):
        models = pair_of(tiny.bert, {"hidden": 32}, {"hidden": 48})
        rows = texts_of_two_tokenizers(length)
        match = {"student": f"pooled({pooling})@hidden[*]", "loss": "hidden_mse"}
        value, weights = value_of(tmp_path, match, models, rows)
        own_rows = [{name: v for name, v in row.items() if not name.startswith("teacher_")} for row in rows]
        others = [
            {**row, **{name: row[f"teacher_{name}"] for name in ("input_ids", "attention_mask")}} for row in rows
        ]
        s, t = look(models[0], own_rows, attention=False), look(models[1], others, attention=False)
        expected = 0.0
        for layer in range(3):
            own, other = (one_vector(x.hidden[layer], x.real, pooling) for x in (s, t))
            expected += F.mse_loss(projected(weights, f"own_0_{layer}_{layer}", own), other)
        assert value == pytest.approx(float(expected), rel=1e-5)

    def test_relations_between_texts_need_no_tokens_in_common(self, tmp_path):
        models = pair_of(tiny.bert, {"hidden": 32}, {"hidden": 48})
        last = "pooled(mean)@hidden[-1]"
        match = {"student": last, "teacher": last, "loss": "similarity_preserving"}
        value, weights = value_of(tmp_path, match, models, texts_of_two_tokenizers(15))
        assert value > 0
        assert not weights

    def test_a_later_batch_of_other_lengths_is_refused(self, tmp_path):
        rows = [
            {**row, "teacher_input_ids": row["input_ids"], "teacher_attention_mask": row["attention_mask"]}
            for row in tiny.rows("sequence")
        ]
        for row in rows[4:]:
            for name in ("teacher_input_ids", "teacher_attention_mask"):
                row[name] = F.pad(row[name], (0, 3))
        match = {"student": "hidden[*]", "loss": "hidden_mse"}
        with pytest.raises(ValueError, match=r"in this batch hidden\[0\] has 12 positions.* 15"):
            value_of(tmp_path, match, tiny.pair("bert"), rows)


class TestPooledMasks:
    """What a mask leaves out has no part in a pooled vector, on either side."""

    @pytest.mark.parametrize("pooling", ["mean", "max"])
    @pytest.mark.parametrize("mask", ["content", "batch:spans"])
    def test_a_pooled_vector_is_made_of_the_chosen_tokens(self, mask, pooling, tmp_path):
        models = pair_of(tiny.bert, {"hidden": 32}, {"hidden": 32})
        rows = tiny.rows("sequence")
        for number, row in enumerate(rows):
            row["input_ids"][0], row["input_ids"][row["attention_mask"].sum() - 1] = 2, 3  # [CLS] and [SEP]
            row["spans"] = torch.arange(12) < 1 + number % 3
        s, t = (look(model, rows, attention=False) for model in models)
        tokens = batch_of(rows)["spans"] if mask == "batch:spans" else batch_of(rows)["input_ids"] > 4
        # Beside it a match of the same feature that pools all tokens.
        feature = f"pooled({pooling})@hidden[-1]"
        every = {"student": feature, "teacher": feature, "loss": "hidden_mse"}
        trainer = make_trainer(
            tmp_path,
            models=models,
            train_dataset=rows,
            processing_class=tiny.tokenizer(),
            distillation_config=recipe({**every, "mask": mask}, every),
            per_device_train_batch_size=8,
            max_steps=1,
        )
        trainer.train()
        for name, chosen in (("own_0", tokens & s.real), ("own_1", s.real)):
            own, other = (one_vector(x.hidden[-1], chosen, pooling) for x in (s, t))
            assert logged(trainer, f"loss_{name}")[0] == pytest.approx(float(F.mse_loss(own, other)), rel=1e-5)

    def test_tokens_of_the_students_choose_none_of_another_tokenizers(self, tmp_path):
        match = {"student": "pooled(mean)@hidden[*]", "loss": "hidden_mse", "mask": "content"}
        fragments = ("mask: 'content' chooses among the student's tokens", "leave out mask")
        refused(tmp_path, match, *fragments, train_dataset=texts_of_two_tokenizers(15))


def swin(hidden):
    config = MORE["swin"][2] | {"embed_dim": hidden, "drop_path_rate": 0.0, "num_labels": tiny.CLASSES}
    return hf.SwinForImageClassification(hf.SwinConfig(**config))


def test_layers_that_merge_patches_have_lengths_of_their_own(tmp_path):
    models = pair_of(swin, {"hidden": 16}, {"hidden": 32})
    rows = tiny.rows("image")
    s, t = (look(model, rows, attention=False) for model in models)
    match = {"student": "hidden[*]", "loss": "hidden_mse"}
    value, weights = value_of(tmp_path, match, models, rows, name="vit")
    expected = sum(
        F.mse_loss(projected(weights, f"own_0_{layer}_{layer}", own), other)
        for layer, (own, other) in enumerate(zip(s.hidden, t.hidden, strict=True))
    )
    assert len({hidden.shape[1] for hidden in s.hidden}) > 1
    assert value == pytest.approx(float(expected), rel=1e-5)


def one_vector(hidden, real, pooling):
    how = {"cls": lambda x: x[0], "mean": lambda x: x.mean(0), "max": lambda x: x.amax(0)}[pooling]
    return torch.stack([how(row[tokens]) for row, tokens in zip(hidden, real, strict=True)])
