"""`hf-distill presets` and `hf-distill presets show NAME`: the methods from papers, ready to copy into a recipe."""

import argparse
import difflib
import textwrap
from importlib.resources import files
from typing import Any

DESCRIPTION = "List the methods from papers, or show one with the lines for a recipe."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`show` and a name, or nothing."""
    parser.usage = "hf-distill presets [show NAME]"
    parser.add_argument("action", nargs="?", choices=("show",), help="show one; without it all are listed")
    parser.add_argument("name", nargs="?", metavar="NAME", help="of the preset to show")
    parser.set_defaults(refuse=parser.error)


def run(arguments: argparse.Namespace) -> None:
    """Prints the list, or one preset.

    Raises:
        ValueError: no preset is called so.
    """
    # Read as the data they are: hf_distill.presets checks them too, and takes seconds to load torch for it.
    folder = files("hf_distill") / "presets"
    names = sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
    if arguments.action is None:
        width = max(map(len, names))
        for name in names:
            values = _read(folder, name)
            print(f"{name:{width}}  {values['title']} ({values['paper']})")
        return
    if arguments.name is None:
        arguments.refuse(f"show lacks the NAME of a preset. Known: {', '.join(names)}.")
    if arguments.name not in names:
        near = difflib.get_close_matches(arguments.name.casefold(), names, n=1)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"preset {arguments.name!r} is unknown.{meant} Known: {', '.join(names)}.")
    print(_shown(arguments.name, _read(folder, arguments.name)))


def _read(folder: Any, name: str) -> dict[str, Any]:
    import yaml

    return yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))


def _shown(name: str, values: dict[str, Any]) -> str:
    import yaml

    stages = values["stages"]
    short: dict[str, Any] = {"arguments": {"preset": name}}
    if len(stages) == 1:
        full: dict[str, Any] = {"arguments": {"distillation_config": stages[0]["terms"]}}
    else:
        kept = ("name", "distillation", "training")
        named = ({**stage, "distillation": stage["terms"]} for stage in stages)
        full = {"stages": [{key: stage[key] for key in kept if key in stage} for stage in named]}
    paragraphs = [
        f"{values['title']}\n{values['paper']}",
        textwrap.fill(values["notes"], width=100),
        "In a recipe:",
        yaml.safe_dump(short, sort_keys=False).strip(),
    ]
    if len(stages) > 1:
        paragraphs += [
            "As trainings one after another:",
            yaml.safe_dump({"stages": name}, sort_keys=False).strip(),
        ]
    paragraphs += ["Written out, to change:", yaml.safe_dump(full, sort_keys=False, default_flow_style=None).strip()]
    return "\n\n".join(paragraphs)
