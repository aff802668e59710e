"""The float64 twin of every registered loss, under its name, written from the paper; imports nothing of ours."""

from tests.references.batches import *  # noqa: F403
from tests.references.divergences import *  # noqa: F403
from tests.references.layers import *  # noqa: F403
from tests.references.logits import *  # noqa: F403
from tests.references.objectives import *  # noqa: F403
