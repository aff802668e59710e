"""Runs what pushes and what loads in processes of their own, whose Hub is the stand-in."""

import importlib
import os

import huggingface_hub.constants
import huggingface_hub.hf_api
import torch
import transformers

from tests.processes import run_alone

# Planted where pushes could pick them up; none may reach the Hub but as authorization.
SECRETS = ("hf_PlantedInTheArguments", "hf_PlantedInTheEnvironment", "PlantedForWandb")

MODEL = {"README.md", "config.json", "model.safetensors", "training_args.bin"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
EVIDENCE = {"distillation/run.json"}
CHECKPOINT = {"config.json", "distillation_modules.safetensors", "model.safetensors", "optimizer.pt", "rng_state.pth"}
CHECKPOINT |= {"scheduler.pt", "trainer_state.json", "training_args.bin", *TOKENIZER}


def run(hub, module, home, *arguments):
    """`main` of a module in a process of its own that knows the Hub's address; it must succeed."""
    own = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": SECRETS[1],
        "NO_PROXY": "*",
        "TRANSFORMERS_VERBOSITY": "warning",
        "WANDB_API_KEY": SECRETS[2],
    }
    run_alone(_enter, own, module, *arguments)


def _enter(environment, module, *arguments):
    os.environ.update(environment)
    # As if it were imported now: the process was forked with what the tests' environment said.
    importlib.reload(huggingface_hub.constants)
    huggingface_hub.hf_api.api.endpoint = environment["HF_ENDPOINT"]
    transformers.logging.set_verbosity_warning()
    importlib.import_module(module).main(*arguments)


def push(hub, folder, *cases):
    """Runs cases of `tests.hub.pushes`, and returns what each left, by its name."""
    run(hub, "tests.hub.pushes", folder / "home", folder, *cases)
    return {case: torch.load(folder / f"{case}.pt", weights_only=True) for case in cases}


def download(hub, folder, *names):
    """Loads pushed students where hf_distill cannot be imported, with a cache of its own."""
    path = folder / "downloads.pt"
    run(hub, "tests.hub.downloads", folder / "other_home", path, *names)
    return torch.load(path, weights_only=True)


def everything(hub):
    """The path and the content of all that any push brought, and the requests' bodies as they were."""
    for name, repo in hub.repos.items():
        for commit in repo.pushes:
            for path in commit.changed:
                yield f"{name}/{path}", commit.files[path]
    yield from zip(hub.requests, hub.bodies, strict=True)


def holding(hub, text):
    """Where a text is in what came: in names, and in contents."""
    return {path for path, content in everything(hub) if text in path or text.encode() in content}
