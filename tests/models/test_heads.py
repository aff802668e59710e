"""The task of a head, the Auto class that builds it, and its inputs, over many architectures made from configs."""

import inspect

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_distill.models.heads import (
    auto_class_name,
    decoder_inputs,
    find_task,
    frame_mask,
    input_names,
    problem_type,
    task_model,
)
from hf_distill.signals import Task
from tests.tiny import EMBEDDERS, ZOO, bert, embedder, llama, pair, rows
from tests.training import batch_of

TEXT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
DECODER = {**TEXT, "num_key_value_heads": 2}
SEQ2SEQ = {
    "vocab_size": 50,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "pad_token_id": 0,
}
T5 = {"vocab_size": 50, "d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 16}
VIT = {**{k: TEXT[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}}
VIT |= {"image_size": 16, "patch_size": 8}
SOUND = {
    **{k: TEXT[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")},
    "vocab_size": 20,
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
    "feat_extract_norm": "layer",
}

SEQUENCE, TOKENS = Task.SEQUENCE_CLASSIFICATION, Task.TOKEN_CLASSIFICATION
# (class, its config's options, the config class if it is named otherwise, task, what stands after AutoModelFor)
ARCHITECTURES = [
    ("AlbertForSequenceClassification", {**TEXT, "embedding_size": 8}, None, SEQUENCE, "SequenceClassification"),
    ("AlbertForMaskedLM", {**TEXT, "embedding_size": 8}, None, Task.MASKED_LM, "MaskedLM"),
    ("BartForConditionalGeneration", SEQ2SEQ, None, Task.SEQ2SEQ_LM, "Seq2SeqLM"),
    ("BartForSequenceClassification", SEQ2SEQ, None, SEQUENCE, "SequenceClassification"),
    ("BartForQuestionAnswering", SEQ2SEQ, None, Task.QUESTION_ANSWERING, "QuestionAnswering"),
    ("BertForSequenceClassification", TEXT, None, SEQUENCE, "SequenceClassification"),
    ("BertForTokenClassification", TEXT, None, TOKENS, "TokenClassification"),
    ("BertForQuestionAnswering", TEXT, None, Task.QUESTION_ANSWERING, "QuestionAnswering"),
    ("BertForMultipleChoice", TEXT, None, Task.MULTIPLE_CHOICE, "MultipleChoice"),
    ("BertForMaskedLM", TEXT, None, Task.MASKED_LM, "MaskedLM"),
    ("BertLMHeadModel", {**TEXT, "is_decoder": True}, "BertConfig", Task.CAUSAL_LM, "CausalLM"),
    (
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_stages": 4},
        None,
        SEQUENCE,
        "ImageClassification",
    ),
    ("Data2VecAudioForCTC", SOUND, None, Task.CTC, "CTC"),
    ("Data2VecAudioForSequenceClassification", SOUND, None, SEQUENCE, "AudioClassification"),
    ("DebertaV2ForSequenceClassification", TEXT, None, SEQUENCE, "SequenceClassification"),
    ("DebertaV2ForMultipleChoice", TEXT, None, Task.MULTIPLE_CHOICE, "MultipleChoice"),
    (
        "DistilBertForTokenClassification",
        {"dim": 16, "n_layers": 1, "n_heads": 2},
        None,
        TOKENS,
        "TokenClassification",
    ),
    ("ElectraForSequenceClassification", TEXT, None, SEQUENCE, "SequenceClassification"),
    ("ElectraForMaskedLM", TEXT, None, Task.MASKED_LM, "MaskedLM"),
    ("GPT2LMHeadModel", {"n_embd": 16, "n_layer": 1, "n_head": 2}, "GPT2Config", Task.CAUSAL_LM, "CausalLM"),
    (
        "GPT2ForSequenceClassification",
        {"n_embd": 16, "n_layer": 1, "n_head": 2},
        None,
        SEQUENCE,
        "SequenceClassification",
    ),
    (
        "GPTNeoForCausalLM",
        {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
        None,
        Task.CAUSAL_LM,
        "CausalLM",
    ),
    ("GPTNeoXForCausalLM", TEXT, None, Task.CAUSAL_LM, "CausalLM"),
    ("HubertForCTC", SOUND, None, Task.CTC, "CTC"),
    ("HubertForSequenceClassification", SOUND, None, SEQUENCE, "AudioClassification"),
    ("LlamaForCausalLM", DECODER, None, Task.CAUSAL_LM, "CausalLM"),
    ("LlamaForTokenClassification", DECODER, "LlamaConfig", TOKENS, "TokenClassification"),
    ("LlamaForQuestionAnswering", DECODER, "LlamaConfig", Task.QUESTION_ANSWERING, "QuestionAnswering"),
    ("MPNetForSequenceClassification", TEXT, None, SEQUENCE, "SequenceClassification"),
    ("MPNetForMaskedLM", TEXT, None, Task.MASKED_LM, "MaskedLM"),
    ("MT5ForConditionalGeneration", T5, None, Task.SEQ2SEQ_LM, "Seq2SeqLM"),
    ("MixtralForCausalLM", {**DECODER, "num_local_experts": 2}, None, Task.CAUSAL_LM, "CausalLM"),
    (
        "MobileViTForImageClassification",
        {"hidden_sizes": [8, 8, 8], "neck_hidden_sizes": [4, 4, 4, 4, 4, 4, 8]},
        None,
        SEQUENCE,
        "ImageClassification",
    ),
    ("ModernBertForMaskedLM", {**TEXT, "vocab_size": 60}, None, Task.MASKED_LM, "MaskedLM"),
    ("OPTForCausalLM", {**TEXT, "ffn_dim": 16, "word_embed_proj_dim": 16}, None, Task.CAUSAL_LM, "CausalLM"),
    ("PegasusForConditionalGeneration", SEQ2SEQ, None, Task.SEQ2SEQ_LM, "Seq2SeqLM"),
    ("Qwen3ForCausalLM", {**DECODER, "head_dim": 8}, None, Task.CAUSAL_LM, "CausalLM"),
    ("RobertaForQuestionAnswering", TEXT, None, Task.QUESTION_ANSWERING, "QuestionAnswering"),
    (
        "SwinForImageClassification",
        {"embed_dim": 8, "depths": [1], "num_heads": [2], "image_size": 16, "window_size": 2},
        None,
        SEQUENCE,
        "ImageClassification",
    ),
    ("T5ForConditionalGeneration", T5, None, Task.SEQ2SEQ_LM, "Seq2SeqLM"),
    ("TimesformerForVideoClassification", {**VIT, "num_frames": 2}, None, SEQUENCE, "VideoClassification"),
    ("VideoMAEForVideoClassification", {**VIT, "num_frames": 2}, None, SEQUENCE, "VideoClassification"),
    ("ViTForImageClassification", VIT, None, SEQUENCE, "ImageClassification"),
    ("Wav2Vec2ForCTC", SOUND, None, Task.CTC, "CTC"),
    ("WavLMForCTC", SOUND, None, Task.CTC, "CTC"),
    ("WhisperForConditionalGeneration", SEQ2SEQ, None, Task.SEQ2SEQ_LM, "SpeechSeq2Seq"),
    ("XLMRobertaForTokenClassification", TEXT, None, TOKENS, "TokenClassification"),
]


def build(name, options, config_name=None):
    config_name = config_name or name.split("For")[0] + "Config"
    return getattr(hf, name)(getattr(hf, config_name)(**options))


def vision_encoder_decoder():
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        hf.ViTConfig(**VIT), hf.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    )
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return hf.VisionEncoderDecoderModel(config)


@pytest.mark.parametrize(
    ("name", "options", "config_name", "task", "auto"), ARCHITECTURES, ids=[row[0] for row in ARCHITECTURES]
)
def test_the_task_and_the_auto_class_of_a_head_are_known(name, options, config_name, task, auto):
    model = build(name, options, config_name)
    assert find_task(model) is task
    assert auto_class_name(model) == f"AutoModelFor{auto}"
    rebuilt = getattr(hf, f"AutoModelFor{auto}").from_config(model.config)
    assert type(rebuilt) is type(model)
    taken = input_names(model)
    assert model.main_input_name in taken
    assert not {"self", "args", "kwargs"} & taken
    assert taken <= {*inspect.signature(model.forward).parameters}


def test_an_image_encoder_with_a_text_decoder_generates_text():
    model = vision_encoder_decoder()
    assert find_task(model) is Task.SEQ2SEQ_LM
    assert {"pixel_values", "decoder_input_ids", "labels"} <= input_names(model)
    assert auto_class_name(model) == "AutoModelForImageTextToText"


@pytest.mark.parametrize(
    "name", ["bert", "bert-tokens", "bert-spans", "llama", "t5", "vit", "wav2vec2-ctc", "whisper"]
)
def test_an_adapter_around_a_model_changes_nothing(name):
    model = ZOO[name][0]()
    task, auto, names = find_task(model), auto_class_name(model), input_names(model)
    targets = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)][:1]
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    assert task_model(wrapped) is model
    assert (find_task(wrapped), auto_class_name(wrapped), input_names(wrapped)) == (task, auto, names)


def test_a_compiled_models_head_is_known():
    model = bert()
    compiled = torch.compile(model, backend="eager")
    assert type(compiled) is not type(model)
    assert task_model(compiled) is model
    assert find_task(compiled) is SEQUENCE
    assert task_model(torch.compile(get_peft_model(model, LoraConfig(target_modules=["query"])))) is model


class Sentiment(hf.BertForSequenceClassification):
    """A user's own class, under a name of its own."""


class MyEncoderForTokenClassification(hf.BertPreTrainedModel):
    """A user's own head, told by the class's name."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = hf.BertModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, input_ids=None, mine=None, labels=None):
        raise NotImplementedError


class Extractor(hf.BertPreTrainedModel):
    """A user's own head, told by what its forward takes."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = hf.BertModel(config)

    def forward(self, input_ids=None, start_positions=None, end_positions=None):
        raise NotImplementedError


class Chat(hf.LlamaPreTrainedModel, hf.GenerationMixin):
    """A user's own language model, told by its output embeddings."""

    def __init__(self, config):
        super().__init__(config)
        self.model = hf.LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, input_ids=None, labels=None, **kwargs):
        raise NotImplementedError


class Classifier(hf.BertModel):
    """A user's own head on a model without one, told by nothing but the labels that it takes."""

    def forward(self, input_ids=None, labels=None):
        raise NotImplementedError


class Sentences(hf.BertModel):
    """A user's own embeddings."""

    def forward(self, input_ids=None, attention_mask=None):
        raise NotImplementedError


class Spans(hf.BertModel):
    """A user's own head on a model without one, told by what its forward takes."""

    def forward(self, input_ids=None, start_positions=None, end_positions=None):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("cls", "config", "task", "auto"),
    [
        (Sentences, hf.BertConfig(**TEXT), Task.EMBEDDING, "AutoModel"),
        (Spans, hf.BertConfig(**TEXT), Task.QUESTION_ANSWERING, None),
        (Sentiment, hf.BertConfig(**TEXT), SEQUENCE, "AutoModelForSequenceClassification"),
        (MyEncoderForTokenClassification, hf.BertConfig(**TEXT), TOKENS, None),
        (Extractor, hf.BertConfig(**TEXT), Task.QUESTION_ANSWERING, None),
        (Chat, hf.LlamaConfig(**DECODER), Task.CAUSAL_LM, None),
    ],
)
def test_a_users_own_class_is_understood(cls, config, task, auto):
    model = cls(config)
    assert find_task(model) is task
    assert auto_class_name(model) == auto
    if cls is MyEncoderForTokenClassification:
        assert input_names(model) == {"input_ids", "mine", "labels"}


@pytest.mark.parametrize(
    "model",
    [
        lambda: Classifier(hf.BertConfig(**TEXT)),
        lambda: hf.MgpstrForSceneTextRecognition(hf.MgpstrConfig(**TEXT)),  # AutoModel builds it, head and all
        lambda: hf.Wav2Vec2ForXVector(hf.Wav2Vec2Config(**SOUND, tdnn_dim=(8,), tdnn_kernel=(1,), tdnn_dilation=(1,))),
        lambda: hf.BertForNextSentencePrediction(hf.BertConfig(**TEXT)),
    ],
)
def test_a_head_of_no_supported_task_is_refused_by_its_class(model):
    made = model()
    with pytest.raises(ValueError, match=rf"head of {type(made).__name__} predicts.*Use a model with one of these"):
        find_task(made)


@pytest.mark.parametrize("name", EMBEDDERS)
def test_a_model_without_a_head_embeds(name):
    model = embedder(name)
    linear = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)][:1]
    compiled = torch.compile(model, backend="eager")
    for each in (model, compiled, get_peft_model(model, LoraConfig(r=2, target_modules=linear))):
        assert find_task(each) is Task.EMBEDDING
        assert auto_class_name(each) == "AutoModel"
    assert Task.EMBEDDING.one_item_per_row


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize(
    ("name", "adapter"),
    [(name, False) for name in ("Wav2Vec2", "Hubert", "Data2VecAudio", "WavLM", "UniSpeechSat", "SEW")]
    + [(name, True) for name in ("Wav2Vec2", "WavLM", "Data2VecAudio")],
)
def test_the_frames_that_hold_sound_are_the_models_own(name, adapter, norm, masked):
    options = {**SOUND, "feat_extract_norm": norm}
    if adapter:
        options |= {"add_adapter": True, "num_adapter_layers": 1, "adapter_stride": 2, "output_hidden_size": 16}
    if name == "SEW":
        options |= {"squeeze_factor": 2}
    torch.manual_seed(0)
    model = build(f"{name}ForCTC", options, f"{name}Config").eval()
    values = torch.randn(4, 203)
    real = torch.tensor([203, 131, 77, 60])
    mask = (torch.arange(203) < real[:, None]).long()
    inputs = {"input_values": values, "attention_mask": mask} if masked else {"input_values": values}
    with torch.no_grad():
        frames = model(**inputs).logits.shape[1]
    actual = frame_mask(model, inputs)
    assert actual.shape == (4, frames)
    if not masked:
        assert actual.all()
        return
    own = getattr(model, "sew", model)._get_feature_vector_attention_mask
    assert torch.equal(actual, own(frames, mask).bool())
    assert actual.sum(-1).tolist() == sorted(actual.sum(-1).tolist(), reverse=True)
    assert actual[0].all()
    assert not actual[3].all()


def test_a_model_that_does_not_tell_its_frames_is_refused():
    with pytest.raises(ValueError, match=r"BertForSequenceClassification does not say how many frames.*Wav2Vec2-like"):
        frame_mask(bert(), batch_of(rows("sequence")))


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_decoder_inputs_give_the_logits_that_labels_give(name):
    model = pair(name)[0].eval()
    batch = batch_of(rows(ZOO[name][1]))
    with torch.no_grad():
        expected = model(**batch).logits
        labels = batch.pop("labels")
        made = decoder_inputs(model, labels)
        actual = model(**batch, **made).logits
    assert {*made} == {"decoder_input_ids"}
    assert torch.equal(actual, expected)


def test_decoder_inputs_of_an_image_captioner_give_the_logits_that_labels_give():
    torch.manual_seed(0)
    model = vision_encoder_decoder().eval()
    labels = torch.tensor([[5, 6, 7], [8, -100, -100]])
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(pixel_values=images, labels=labels).logits
        assert torch.equal(model(pixel_values=images, **decoder_inputs(model, labels)).logits, expected)


@pytest.mark.parametrize(
    ("own", "num_labels", "labels", "default", "kind"),
    [
        (None, 3, torch.tensor([1]), None, "single_label_classification"),
        (None, 3, torch.tensor([[0.0, 1.0, 1.0]]), None, "multi_label_classification"),
        (None, 1, torch.tensor([0.3]), None, "regression"),
        (None, 1, None, "multi_label_classification", "regression"),
        (None, 3, None, None, "single_label_classification"),
        (None, 3, None, "multi_label_classification", "multi_label_classification"),
        (None, 3, torch.tensor([1]), "multi_label_classification", "single_label_classification"),
        ("regression", 3, torch.tensor([[0.1, 0.2, 0.3]]), None, "regression"),
        ("multi_label_classification", 1, None, "regression", "multi_label_classification"),
    ],
)
def test_the_kind_of_sequence_classification_is_transformers_own(own, num_labels, labels, default, kind):
    config = hf.BertConfig(num_labels=num_labels, problem_type=own)
    assert problem_type(config, labels, default=default) == kind
    if labels is not None:
        model = hf.BertForSequenceClassification(hf.BertConfig(**TEXT, num_labels=num_labels, problem_type=own))
        model(torch.tensor([[5]]), labels=labels)
        assert model.config.problem_type == kind


def test_tied_base_models_are_seen_through_every_wrapper():
    model = llama()
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert input_names(wrapped) == input_names(model) >= {"input_ids", "attention_mask", "labels", "use_cache"}
