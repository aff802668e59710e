"""What processes load that have not imported hf_distill."""

import importlib
import json
import sys

import peft
import transformers


def write_reports(path, folders, adapters):
    """Writes, for each folder, what `from_pretrained` had to say; adapters only have to load."""
    assert "hf_distill" not in sys.modules
    sys.modules["hf_distill"] = None  # importing it fails from here on
    said = {}
    for folder, architecture in folders.items():
        _, information = getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True)
        said[folder] = {key: sorted(map(str, value)) for key, value in information.items()}
    for folder in adapters:
        peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    path.write_text(json.dumps(said), encoding="utf-8")


def load_the_trainer():
    """Fails where it loads evaluate."""
    assert not {"hf_distill", "evaluate"} & {*sys.modules}
    assert importlib.import_module("hf_distill").DistillationTrainer
    assert "evaluate" not in sys.modules
