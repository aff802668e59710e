"""What all tests share: no network, one thread, quiet libraries."""

import gc
import os

# Read when the libraries are first imported, and by the processes that tests start.
os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    TRANSFORMERS_VERBOSITY="error",
)

import pytest
import torch

gc.disable()  # until all tests are found: nothing that is imported for them is garbage
torch.set_num_threads(1)
if not torch.cuda.is_available():  # read when Triton is first imported: kernels run on the CPU, operation by operation
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="module")
def _imports_out_of_the_collectors_sight():
    """`Trainer.train` collects garbage over all that was imported: 0.4 s of a 0.5 s test otherwise."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture
def output_dir(tmp_path):
    """A folder of its own for a trainer's output."""
    return str(tmp_path / "output")
