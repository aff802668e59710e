"""Writes docs/options.md, from the fields that the code reads: `python -m docs.make_options` in the root."""

import re
from collections.abc import Collection, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, get_type_hints

from transformers import TrainingArguments

from hf_distill.arguments import DistillationTrainingArguments
from hf_distill.config import default_config, flat_values
from hf_distill.generation.arguments import GenerationArguments
from hf_distill.on_policy_arguments import OnPolicyArguments
from hf_distill.recipes.recipe import DataPart, Recipe, StudentPart, TeacherPart
from hf_distill.text.arguments import TextArguments

HEAD = """# Arguments

<!-- Written by docs/make_options.py. -->

What `DistillationTrainingArguments` has beside the fields of `TrainingArguments`, which all hold too;
`Seq2SeqDistillationTrainingArguments` adds those of `Seq2SeqTrainingArguments`. On a command line each is
`--NAME VALUE`, with mappings and lists as JSON; in a recipe it is a key of [`arguments`](command_line.md#recipes).
What they do together: [guide](guide.md), [losses, temperatures and weights](objectives.md), [layers](layers.md),
[language models](language_models.md).
"""
GENERATE = """
`hf-distill generate TEACHER PROMPTS OUTPUT`, and keywords of `hf_distill.generate_answers`
([how](language_models.md#text-of-the-teacher)).
"""
RECIPE = """
What a [recipe](command_line.md#recipes) says beside its `arguments`.
"""
SECTIONS = {"data": DataPart, "student": StudentPart, "teacher": TeacherPart}
# In the order in which a page names them.
KINDS = {
    "bool": "true, false",
    "int": "whole number",
    "float": "number",
    "str": "text",
    "list": "list",
    "dict": "mapping",
    "DistillationConfig": "`DistillationConfig`",
}


def page() -> str:
    """The page as it should be."""
    plain = {field.name for field in fields(TrainingArguments)}
    own = [field.name for field in fields(DistillationTrainingArguments) if field.name not in plain]
    sections = [HEAD]
    shared = {field.name for group in (TextArguments, OnPolicyArguments) for field in fields(group)}
    sections += [
        "\n## What is minimised\n",
        table(DistillationTrainingArguments, [name for name in own if name not in shared]),
    ]
    sections += ["\n## Raw text\n", table(TextArguments)]
    sections += ["\n## Text that the student writes\n", table(OnPolicyArguments)]
    sections += ["\n## Text that the teacher writes\n", GENERATE, table(GenerationArguments)]
    sections += ["\n## Keys of a recipe\n", RECIPE]
    rows = [row for section, part in SECTIONS.items() for row in rows_of(part, section=f"{section}.")]
    rows += rows_of(Recipe, [field.name for field in fields(Recipe) if field.name not in SECTIONS])
    sections += [as_table(rows)]
    return "".join(sections)


def table(owner: type, names: Collection[str] | None = None) -> str:
    """A table of the fields of a dataclass, or of those that are named."""
    return as_table(rows_of(owner, names))


def as_table(rows: Sequence[str]) -> str:
    """Rows with their head."""
    return "\n".join(["\n| argument | value | left out | |", "|---|---|---|---|", *rows, ""])


def rows_of(owner: type, names: Collection[str] | None = None, section: str = "") -> list[str]:
    """A row for each field, with the section of a recipe that it is in."""
    hints = get_type_hints(owner)  # HfArgumentParser writes over the types of the fields
    return [
        f"| `{section}{field.name}` | {kind(hints[field.name])} | {default(field)} | {words(field.metadata['help'])} |"
        for field in fields(owner)
        if names is None or field.name in names
    ]


def kind(hint: Any) -> str:
    """What may be given, in words."""
    found = re.findall(r"\w+", re.sub(r"\[[^|]*\]", "", str(hint)))
    return ", ".join(text for name, text in KINDS.items() if name in found)


def default(field: Field) -> str:
    """What holds where nothing is given."""
    if field.default is MISSING:  # it has to be given, or is an empty mapping
        return ""
    value: Any = field.default
    value = flat_values(default_config()).get(field.name, value) if value is None else value
    return "" if value is None else f"`{value}`"


def words(text: str) -> str:
    """A help text as Markdown: JSON, names and options as code, pages as links."""
    text = re.sub(r"'([\[{].*?[\]}])'", r"`\1`", text.replace("|", "\\|"))
    text = re.sub(r"docs/(\w+)\.md", r"[\1](\1.md)", text)
    parts = re.split(r"(`.*?`|\[\w+\]\(.*?\))", text)
    parts[::2] = [re.sub(r"[a-z]+[\w.]*_[\w.<>]*\w>?(?:=\w+)?", r"`\g<0>`", part) for part in parts[::2]]
    return "".join(parts)


def main() -> None:
    """Writes the page."""
    Path(__file__).with_name("options.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
