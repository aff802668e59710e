"""Pushed students, loaded by a process that cannot import hf_distill."""

import logging
import sys
import warnings

import torch
import transformers as hf

TEXT = "w1 w5 w7 w11"
# By the repository's name: the head, and what prepares its inputs.
STUDENTS = {
    "layers": (hf.AutoModelForSequenceClassification, hf.AutoTokenizer),
    "causal": (hf.AutoModelForCausalLM, hf.AutoTokenizer),
    "adapter": (hf.AutoModelForSequenceClassification, hf.AutoTokenizer),
    "speech": (hf.AutoModelForSpeechSeq2Seq, hf.AutoProcessor),
}


@torch.no_grad()
def logits_of(model, processor):
    """What a student says to a text or a sound, prepared by its own tokenizer or processor."""
    if isinstance(processor, hf.ProcessorMixin):
        sound = torch.linspace(-1, 1, 16000).sin().numpy()
        inputs = processor(sound, sampling_rate=16000, text="abc", return_tensors="pt")
        inputs = {"input_features": inputs["input_features"], "decoder_input_ids": inputs["labels"]}
    else:
        inputs = processor(TEXT, return_tensors="pt")
    return model.eval()(**inputs).logits


class Messages(logging.Handler):
    """Keeps what is said at the level of a warning or above."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.found = []

    def emit(self, record):
        self.found.append(record.getMessage())


def load(name):
    """The logits of a student, the keys its file had too many or too few, and what was said while it was loaded."""
    head, preparing = STUDENTS[name]
    messages = Messages()
    for library in ("transformers", "huggingface_hub", "peft"):
        logging.getLogger(library).addHandler(messages)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, info = head.from_pretrained(f"me/{name}", output_loading_info=True)
        logits = logits_of(model, preparing.from_pretrained(f"me/{name}"))
    said = [str(warning.message) for warning in caught if not issubclass(warning.category, DeprecationWarning)]
    return {
        "logits": logits,
        "keys": {key: sorted(value) for key, value in info.items() if value},
        "said": said + messages.found,
    }


def main(path, *names):
    """Loads students into a file."""
    assert "hf_distill" not in sys.modules
    sys.modules["hf_distill"] = None  # an import of it raises ImportError
    torch.save({name: load(name) for name in names}, path)
