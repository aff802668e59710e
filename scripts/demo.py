"""Shows what distillation is for: a small model with few labels, alone and with a teacher.

Without options it runs on bundled data; `--help` lists them. With models and data of your choice:
`python scripts/demo.py --teacher textattack/bert-base-uncased-SST-2 --teacher_steps 0
--student distilbert-base-uncased --dataset stanfordnlp/sst2 --text_column sentence`
"""

from rich.console import Console
from transformers import HfArgumentParser

from hf_distill.demo.experiment import run_demo
from hf_distill.demo.settings import DemoSettings

READING = """\
The teacher saw every label. "student alone" saw a few of each class. "student distilled" saw the same few, and the \
other texts without labels, on which it learns from the teacher's answers. "student all labels" is what a full set of \
labels gives. Students: mean ± standard deviation over seeds that draw labels, weights and order. Retention: accuracy \
/ the teacher's. Agreement: the same answer as the teacher. Latency: median of one row."""


def main() -> None:
    """Reads the options, runs the demo and prints its tables."""
    (settings,) = HfArgumentParser(DemoSettings, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()
    console = Console()
    results = run_demo(settings, console)
    for part in (*results.tables(), READING):
        console.print(part, highlight=False)
    console.print(f"{results.seconds:.0f} s. Every number and both models are in {settings.output_dir}.")


if __name__ == "__main__":
    main()
