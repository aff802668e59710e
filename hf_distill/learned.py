"""What else trains beside the student: a learned temperature, the balance of the terms."""

from torch import nn

from hf_distill.balancing import Balancer, balance_module, balanced_terms
from hf_distill.config import DistillationConfig
from hf_distill.matching import Learned
from hf_distill.models.learned import TemperatureModule
from hf_distill.temperature import LearnedTemperature

TEMPERATURE = "learned_temperature"
BALANCE = "loss_balance"


def learned_settings(config: DistillationConfig) -> dict[str, object]:
    """The modules that a config needs, by name, and what each depends on: where that is equal, it fits."""
    settings: dict[str, object] = {}
    policy = config.logits.temperature
    if isinstance(policy, LearnedTemperature) and config.logits.weight > 0:
        settings[TEMPERATURE] = policy
    if config.balance.kind != "none":
        settings[BALANCE] = (config.balance, balanced_terms(config))
    return settings


def make_balancer(config: DistillationConfig, modules: nn.ModuleDict) -> Balancer | None:
    """The balance of a training's terms; None without one."""
    return Balancer(balanced_terms(config), modules[BALANCE]) if BALANCE in modules else None


def temperature_module(policy: LearnedTemperature, *, seed: int) -> TemperatureModule:
    """What a learned temperature trains, as it begins; `seed` is of its first weights."""
    return TemperatureModule(minimum=policy.min, spread=policy.range, per_item=policy.is_per_item, seed=seed)


def learned_modules(config: DistillationConfig, *, seed: int) -> dict[str, Learned]:
    """The modules that a config needs, by name.

    Args:
        config: the terms.
        seed: of the first weights.
    """
    needed, modules = learned_settings(config), {}
    policy = needed.get(TEMPERATURE)
    if isinstance(policy, LearnedTemperature):
        modules[TEMPERATURE] = Learned(temperature_module(policy, seed=seed), policy.learning_rate_factor)
    if BALANCE in needed:
        modules[BALANCE] = Learned(balance_module(config), config.balance.learning_rate_factor)
    return modules
