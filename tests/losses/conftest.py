import pytest

from hf_distill.losses import row_gradient


@pytest.fixture
def three_rows_a_block(monkeypatch):
    """Called with the number of classes, it makes blocks three rows high (four buffers of scratch, float32)."""

    def set_classes(classes, buffers=4):
        monkeypatch.setattr(row_gradient, "_CPU_SCRATCH_BYTES", 3 * buffers * 4 * classes)

    return set_classes
