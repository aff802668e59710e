"""How to use a student, as code that runs with what its folder holds."""

from collections.abc import Mapping

from hf_distill.card.metadata import pipeline_tag
from hf_distill.run_record import RunRecord

# By pipeline: what one asks it, and further arguments that the question needs.
_QUESTIONS: Mapping[str, str] = {
    "text-classification": '"A text to classify."',
    "token-classification": '"A text with words to label."',
    "question-answering": "",  # no pipeline of Transformers 5
    "fill-mask": 'f"A text with a {pipe.tokenizer.mask_token} in it."',
    "text-generation": '"Once upon a time", max_new_tokens=40',
    "image-classification": '"picture.png"',
    "audio-classification": '"recording.wav"',
    "automatic-speech-recognition": '"recording.wav"',
    "feature-extraction": '"A text to embed."',
    "image-feature-extraction": '"picture.png"',
}
_OF_SOUND = ("audio-classification", "automatic-speech-recognition")


def usage(record: RunRecord, where: str) -> str:
    """Python code that loads the student and asks it something.

    Args:
        record: of the training.
        where: the repository or the folder.
    """
    task = pipeline_tag(record) or ""
    if "peft" in record.student:
        return _adapter(record, where)
    if _QUESTIONS.get(task):
        missing = "" if record.processing else _other_tokenizer(record)
        lines = [
            "from transformers import pipeline",
            "",
            f'pipe = pipeline("{task}", model="{where}"{missing})',
            f"print(pipe({_QUESTIONS[task]}))",
        ]
        return "\n".join(lines)
    return _by_hand(record, where, task)


def _other_tokenizer(record: RunRecord) -> str:
    """The processor of the student's origin, where none was saved with it."""
    task = pipeline_tag(record) or ""
    kind = "tokenizer"
    if task.startswith("image"):
        kind = "image_processor"
    elif task in _OF_SOUND:
        kind = "feature_extractor"
    origin = record.student.get("name") if record.student.get("on_hub") else "..."
    return f', {kind}="{origin}"'


def _tokenizer_from(record: RunRecord, where: str) -> str:
    if record.processing:
        return where
    return record.student["name"] if record.student.get("on_hub") else "..."


def _adapter(record: RunRecord, where: str) -> str:
    auto = str(record.student.get("auto_class") or "AutoModel").replace("AutoModel", "AutoPeftModel", 1)
    labels = record.student.get("labels")
    sized = f", num_labels={labels}" if auto.endswith("Classification") and labels else ""
    lines = [
        f"from peft import {auto}",
        "from transformers import AutoTokenizer",
        "",
        f'model = {auto}.from_pretrained("{where}"{sized})',
        f'tokenizer = AutoTokenizer.from_pretrained("{_tokenizer_from(record, where)}")',
        'inputs = tokenizer("A text for the model.", return_tensors="pt")',
    ]
    generates = auto.endswith(("CausalLM", "Seq2SeqLM"))
    lines.append(
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0], skip_special_tokens=True))"
        if generates
        else "print(model(**inputs))"
    )
    return "\n".join(lines)


def _by_hand(record: RunRecord, where: str, task: str) -> str:
    auto = record.student.get("auto_class") or record.student["class"]
    lines = [f"from transformers import AutoTokenizer, {auto}", "", f'model = {auto}.from_pretrained("{where}")']
    lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{_tokenizer_from(record, where)}")')
    if task == "question-answering":
        lines += [
            'inputs = tokenizer("Who teaches?", "The teacher teaches the student.", return_tensors="pt")',
            "outputs = model(**inputs)",
            "start, end = outputs.start_logits.argmax(), outputs.end_logits.argmax()",
            'print(tokenizer.decode(inputs["input_ids"][0, start : end + 1]))',
        ]
    elif task == "multiple-choice":
        lines += [
            'prompt, choices = "The sky is", ["blue.", "a fish."]',
            'inputs = tokenizer([prompt] * len(choices), choices, padding=True, return_tensors="pt")',
            "outputs = model(**{name: value[None] for name, value in inputs.items()})",
            "print(choices[outputs.logits.argmax()])",
        ]
    elif task == "text2text-generation":
        lines += [
            'inputs = tokenizer("A text for the model.", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0], skip_special_tokens=True))",
        ]
    else:
        return "\n".join(lines[:-1]).replace("AutoTokenizer, ", "")
    return "\n".join(lines)
