"""Models given by name or path, in the class that they were saved from."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

_HUB_NAMES = ("revision", "token", "cache_dir", "subfolder", "trust_remote_code")


class NotLoadedError(OSError):
    """A model could not be read from the name that an argument gives; the cause is what the library said."""


@contextmanager
def named(argument: str, name: str) -> Iterator[None]:
    """Where a model is not found, the error says which argument named it: the library's may name neither.

    Raises:
        NotLoadedError: in place of an `OSError` within.
    """
    try:
        yield
    except NotLoadedError:
        raise
    except OSError as error:
        raise NotLoadedError(f"{argument}={name!r} could not be loaded: {error}") from error


def read_config(name: str, kwargs: Mapping[str, Any]) -> PreTrainedConfig:
    """The config of a Hub name or a folder, read with those arguments of `from_pretrained` that say where it is."""
    return AutoConfig.from_pretrained(name, **{key: kwargs[key] for key in _HUB_NAMES if key in kwargs})


def load_as_saved(name: str, kwargs: Mapping[str, Any], *, argument: str) -> PreTrainedModel:
    """The model of a Hub name or a folder, with the head that its config names.

    Args:
        name: a Hub name or a local folder.
        kwargs: arguments of `from_pretrained`.
        argument: what the caller's argument is called, for the error.

    Raises:
        ValueError: the config does not say which class of Transformers it was saved from.
        NotLoadedError: nothing is found under the name.
    """
    with named(argument, name):
        config = read_config(name, kwargs)
    architecture = next(iter(config.architectures or ()), "")
    if not hasattr(transformers, architecture):
        raise ValueError(
            f"{argument}={name!r} is a name, and its config does not say which head it has (architectures="
            f"{config.architectures}). Load it yourself and pass the module."
        )
    with named(argument, name):
        return getattr(transformers, architecture).from_pretrained(name, **kwargs)
