"""The figures of the docs are those that their script draws."""

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from docs import make_figures

FIGURES = Path(make_figures.__file__).parent / "figures"
MAX_BYTES = 60_000


def test_the_script_draws_every_figure_of_the_docs_small_and_the_same_each_time(tmp_path, monkeypatch):
    drawn = []
    for folder in (tmp_path / "once", tmp_path / "again"):
        monkeypatch.setattr("sys.argv", ["make_figures.py", "--out", str(folder)])
        make_figures.main()
        drawn.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert drawn[0] == drawn[1]
    assert drawn[0].keys() == {path.name for path in FIGURES.iterdir()}
    assert max(map(len, drawn[0].values())) < MAX_BYTES
