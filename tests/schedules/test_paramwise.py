"""schedules.paramwise: the rules of MMEngine's default optimizer constructor."""

from schedules import ParameterFacts, ParamwiseSettings, parameter_multipliers, unmatched_custom_keys

CONV = ParameterFacts("backbone.conv1.weight")
CONV_BIAS = ParameterFacts("head.conv.bias", is_bias=True, is_flat=True)
NORM = ParameterFacts("backbone.bn1.weight", is_norm=True, is_flat=True)
NORM_BIAS = ParameterFacts("backbone.bn1.bias", is_norm=True, is_bias=True, is_flat=True)
DEPTHWISE = ParameterFacts("neck.dw.weight", is_depthwise=True)
SCALE = ParameterFacts("scale", is_flat=True)
EVERY = [CONV, CONV_BIAS, NORM, NORM_BIAS, DEPTHWISE, SCALE]


def multipliers(**settings):
    found = parameter_multipliers(ParamwiseSettings(**settings), EVERY)
    assert list(found) == [facts.name for facts in EVERY]
    return list(found.values())


def test_without_rules_nothing_is_multiplied():
    assert multipliers() == [(1, 1)] * 6


def test_norm_decay_counts_for_weights_and_biases_of_norms():
    assert multipliers(norm_decay_mult=0) == [(1, 1), (1, 1), (1, 0), (1, 0), (1, 1), (1, 1)]


def test_bias_rates_leave_norms_alone_and_bias_decay_only_yields_to_norm_decay():
    assert multipliers(bias_lr_mult=2) == [(1, 1), (2, 1), (1, 1), (1, 1), (1, 1), (1, 1)]
    assert multipliers(bias_decay_mult=0) == [(1, 1), (1, 0), (1, 1), (1, 0), (1, 1), (1, 1)]
    assert multipliers(bias_decay_mult=0, norm_decay_mult=3)[3] == (1, 3)


def test_depthwise_and_flat_parameters_have_decays_of_their_own():
    assert multipliers(dwconv_decay_mult=0)[4] == (1, 0)
    assert multipliers(flat_decay_mult=0) == [(1, 1), (1, 0), (1, 0), (1, 0), (1, 1), (1, 0)]


def test_the_longest_custom_key_wins_and_ends_all_other_rules():
    keys = {"backbone": (0.1, 1.0), "backbone.bn1": (0.5, 0.0)}
    found = multipliers(custom_keys=keys, norm_decay_mult=7, bias_lr_mult=9)
    assert found == [(0.1, 1), (9, 1), (0.5, 0), (0.5, 0), (1, 1), (1, 1)]


def test_of_equally_long_keys_the_first_in_the_alphabet_wins():
    assert multipliers(custom_keys={"head.": (3.0, 3.0), "conv.": (2.0, 2.0)})[1] == (2, 2)


def test_custom_keys_match_other_names_of_a_parameter_too():
    facts = ParameterFacts("fpn.output.0.weight", aliases=("neck.fpn_convs.0.conv.weight",))
    settings = ParamwiseSettings(custom_keys={"neck": (0.5, 1.0), "mask_head": (2.0, 1.0)})
    assert parameter_multipliers(settings, [facts]) == {facts.name: (0.5, 1.0)}
    assert unmatched_custom_keys(settings, [facts]) == ["mask_head"]
