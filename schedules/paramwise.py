"""Which parameters learn at another rate or decay by another weight: MMEngine's paramwise_cfg.

The rules are those of MMEngine 0.10.7's DefaultOptimWrapperConstructor. This package knows no tensors: the
caller states the facts of each parameter and applies the multipliers.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from schedules.checks import dictionary, flag, number, optional, read_dict
from schedules.errors import Place

_MULTIPLIER = number(at_least=0, at_most=1000)
_RATIO = {"check": optional(_MULTIPLIER)}


def _custom_keys(value: Any, place: Place) -> dict[str, tuple[float, float]]:
    keys = dict.fromkeys(("lr_mult", "decay_mult"), (_MULTIPLIER, 1.0))
    custom = {key: read_dict(one, place.at(key), keys) for key, one in dictionary(value, place).items()}
    return {key: (mult["lr_mult"], mult["decay_mult"]) for key, mult in custom.items()}


@dataclass(frozen=True)
class ParamwiseSettings:
    """Multipliers of learning rate and weight decay; None: the rule is not in force.

    custom_keys maps a part of a parameter's name to (lr_mult, decay_mult) and goes before every other rule.
    bypass_duplicate is accepted and changes nothing: a shared parameter enters the optimizer once in any
    case.
    """

    norm_decay_mult: float | None = field(default=None, metadata=_RATIO)
    bias_lr_mult: float | None = field(default=None, metadata=_RATIO)
    bias_decay_mult: float | None = field(default=None, metadata=_RATIO)
    dwconv_decay_mult: float | None = field(default=None, metadata=_RATIO)
    flat_decay_mult: float | None = field(default=None, metadata=_RATIO)
    bypass_duplicate: bool = field(default=False, metadata={"check": flag})
    custom_keys: Mapping[str, tuple[float, float]] = field(default_factory=dict, metadata={"check": _custom_keys})


@dataclass(frozen=True)
class ParameterFacts:
    """What the rules ask of one parameter.

    name: full dotted name. is_norm: it belongs to a normalization layer. is_bias: its own name is "bias".
    is_depthwise: it belongs to a convolution with as many groups as input channels. is_flat: it has one
    dimension. aliases: other names of the same parameter (say, MMDetection's) that custom_keys may match as
    well.
    """

    name: str
    is_norm: bool = False
    is_bias: bool = False
    is_depthwise: bool = False
    is_flat: bool = False
    aliases: tuple[str, ...] = ()


def parameter_multipliers(
    settings: ParamwiseSettings, parameters: Iterable[ParameterFacts]
) -> dict[str, tuple[float, float]]:
    """{parameter name: (lr_mult, decay_mult)}; the optimizer's lr and weight_decay are multiplied by them.

    Of several matching custom keys the longest counts, of equally long ones the first in the alphabet.
    """
    keys = sorted(sorted(settings.custom_keys), key=len, reverse=True)
    return {facts.name: _multipliers(settings, keys, facts) for facts in parameters}


def unmatched_custom_keys(settings: ParamwiseSettings, parameters: Iterable[ParameterFacts]) -> list[str]:
    """The custom keys that match no parameter at all: settings without effect, which a run reports."""
    known = list(parameters)
    return [key for key in settings.custom_keys if not any(_matches(key, facts) for facts in known)]


def _matches(key: str, facts: ParameterFacts) -> bool:
    # A parameter of the outermost module is called ".name" where MMEngine matches keys.
    return any(key in (name if "." in name else f".{name}") for name in (facts.name, *facts.aliases))


def _multipliers(settings: ParamwiseSettings, keys: Sequence[str], facts: ParameterFacts) -> tuple[float, float]:
    for key in keys:
        if _matches(key, facts):
            return settings.custom_keys[key]

    lr_mult = decay_mult = None
    if facts.is_bias and not facts.is_norm:
        lr_mult = settings.bias_lr_mult
    if facts.is_norm and settings.norm_decay_mult is not None:
        decay_mult = settings.norm_decay_mult
    elif facts.is_bias and settings.bias_decay_mult is not None:  # a norm's bias as well, without norm_decay_mult
        decay_mult = settings.bias_decay_mult
    elif facts.is_depthwise and settings.dwconv_decay_mult is not None:
        decay_mult = settings.dwconv_decay_mult
    elif facts.is_flat:
        decay_mult = settings.flat_decay_mult
    return 1.0 if lr_mult is None else lr_mult, 1.0 if decay_mult is None else decay_mult
