"""The plots of a report, as PNG files."""

import os
from pathlib import Path

from hf_distill.files import whole_file
from hf_distill.report.results import Report

PLOTS = ("tradeoff.png", "confusion.png", "losses.png", "dynamics.png")


def write_plots(report: Report, folder: str | os.PathLike) -> list[Path]:
    """Draws what there is data for: `tradeoff.png`, `confusion.png`, `losses.png`, `dynamics.png`.

    Args:
        report: what was measured; the last two need its training's log.
        folder: made if it is missing.

    Returns: the files, in that order.

    Raises:
        ImportError: matplotlib, which the extra `report` brings, is not installed.
    """
    try:
        from hf_distill.report.curves import dynamics, losses
        from hf_distill.report.drawing import drawn
        from hf_distill.report.figures import confusion, tradeoff
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ImportError(
            'The plots of a report need matplotlib, which is not installed: pip install "hf-distill[report]".'
        ) from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with drawn():
        for draw in (tradeoff, confusion, losses, dynamics):
            figure = draw(report)
            if figure is not None:
                path = folder / f"{draw.__name__}.png"
                with whole_file(path) as whole:
                    figure.savefig(whole, format="png", metadata={"Software": None})
                paths.append(path)
    return paths
