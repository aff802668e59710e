"""What a teacher's student kept, and what it costs: `make_report` measures, `results.Report` holds the numbers."""

from typing import TYPE_CHECKING, Any

__all__ = ["make_report"]

if TYPE_CHECKING:
    from hf_distill.report.measuring import make_report


def __getattr__(name: str) -> Any:
    # PEP 562: to read a report, or to write it as Markdown, takes no torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    from hf_distill.report import measuring

    return getattr(measuring, name)
