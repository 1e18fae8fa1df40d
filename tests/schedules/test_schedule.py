"""The Schedule itself: overrides, round trips, equality, description."""

import json

import pytest

from schedules import ScheduleError, load_schedule, schedule_from_dict, with_overrides


def overridden(overrides, name="1x"):
    return with_overrides(load_schedule(name), overrides)


def test_overrides_change_the_value_and_are_reported():
    schedule, lines = overridden(
        {
            "optim_wrapper.optimizer.weight_decay": "0",
            "train_cfg.val_interval": "2",
            "param_scheduler.1.milestones": "[4, 5]",
            "lr": "0.01",
        }
    )
    assert schedule.optimizer.kwargs["weight_decay"] == 0
    assert schedule.val_interval == 2
    assert schedule.param_schedulers[1].milestones == (4, 5)
    assert schedule.optimizer.lr == 0.01
    assert lines == [
        "optim_wrapper.optimizer.weight_decay: 0.0001 -> 0",
        "train_cfg.val_interval: 1 -> 2",
        "param_scheduler.1.milestones: [8, 11] -> [4, 5]",
        "optim_wrapper.optimizer.lr: 0.02 -> 0.01",
    ]


def test_the_original_stays_as_it_was():
    schedule = load_schedule("1x")
    before = schedule.to_dict()
    changed, _ = with_overrides(schedule, {"param_scheduler.0.end": "100"})
    assert schedule.to_dict() == before
    assert changed != schedule
    assert with_overrides(schedule, {}) == (schedule, [])


def test_an_epoch_schedulers_end_follows_max_epochs_and_idle_milestones_are_named():
    schedule, lines = overridden({"max_epochs": "10"})
    assert (schedule.max_epochs, schedule.param_schedulers[1].end) == (10, 10)
    assert schedule.param_schedulers[1].milestones == (8, 11)
    assert schedule.param_schedulers[0].end == 500
    assert lines[0] == "train_cfg.max_epochs: 12 -> 10"
    assert lines[1].startswith("param_scheduler.1.end: 12 -> 10")
    assert lines[2].startswith("warning: param_scheduler.1.milestones: 11 ")
    assert len(lines) == 3
    longer, _ = overridden({"train_cfg.max_epochs": "24", "param_scheduler.1.milestones": "[16, 22]"})
    assert longer == load_schedule("2x")
    longer, _ = overridden({"train_cfg.max_epochs": "20", "param_scheduler.1.milestones": "[16, 19]"})
    assert longer == load_schedule("20e")


@pytest.mark.parametrize("iterations_per_epoch", [7, 50, 5000])
def test_finetune_warms_up_for_a_fiftieth_of_the_run_and_ends_near_0_whatever_the_number_of_images(
    iterations_per_epoch,
):
    schedule, _ = overridden({}, "finetune")
    total = schedule.max_epochs * iterations_per_epoch
    rates = [schedule.learning_rate(i, iterations_per_epoch) for i in range(0, total, max(total // 5000, 1))]
    assert rates[0] == pytest.approx(0.02 * 0.001) and 0.0199 < max(rates) <= 0.02
    assert rates.index(max(rates)) <= len(rates) / 50 + 1
    assert 0.0002 <= schedule.learning_rate(total - 1, iterations_per_epoch) < 0.00022
    assert schedule_from_dict(schedule.to_dict()) == schedule and schedule.ema_decay == 0.998


def test_finetune_follows_max_epochs_and_its_averaged_weights_can_be_left_out():
    schedule, lines = overridden({"max_epochs": "10", "ema": "None"}, "finetune")
    assert 0.0002 <= schedule.learning_rate(10 * 7 - 1, 7) < 0.0003
    assert schedule.ema_decay is None and not any("warning" in line for line in lines)
    with pytest.raises(ScheduleError, match=r"ema.decay: must be a finite number > 0"):
        overridden({"ema.decay": "0"}, "finetune")


def test_an_end_given_by_hand_does_not_follow_max_epochs():
    schedule, lines = overridden({"max_epochs": "24", "param_scheduler.1.end": "12"})
    assert schedule.param_schedulers[1].end == 12
    assert not any("goes along" in line for line in lines)


def test_a_scheduler_that_would_begin_after_the_shortened_run_is_reported():
    base, _ = overridden({"param_scheduler.1": "dict(type='CosineAnnealingLR', begin=6, T_max=12, end=12)"})
    schedule, lines = with_overrides(base, {"max_epochs": "5"})
    assert schedule.param_schedulers[1].end == 12
    assert any("begins at epoch 6 and never acts" in line for line in lines)
    assert any("T_max stays 12" in line for line in lines)
    assert schedule.learning_rate(499, 100) == 0.02


def test_whole_dicts_and_absent_sections_can_be_overridden():
    schedule, lines = overridden(
        {
            "optim_wrapper.clip_grad.max_norm": "35",
            "optim_wrapper.paramwise_cfg": "dict(norm_decay_mult=0)",
            "optim_wrapper.optimizer.fused": "True",
            "param_scheduler.0": "dict(type='ConstantLR', factor=0.5, end=1)",
        }
    )
    assert schedule.clip_grad.max_norm == 35
    assert schedule.paramwise.norm_decay_mult == 0
    assert schedule.optimizer.kwargs["fused"] is True
    assert schedule.param_schedulers[0].kind == "ConstantLR"
    assert len(lines) == 4


def test_another_optimizer_drops_what_it_does_not_know_and_says_so():
    schedule, lines = overridden({"optim_wrapper.optimizer.type": "AdamW", "lr": "1e-4"})
    assert schedule.optimizer.type == "AdamW"
    assert schedule.optimizer.kwargs["weight_decay"] == 0.0001
    assert "momentum" not in schedule.optimizer.kwargs
    assert any("momentum: 0.9 -> removed" in line for line in lines)


def test_mixed_precision_can_be_switched_on_and_off():
    on, _ = overridden({"optim_wrapper.type": "AmpOptimWrapper", "optim_wrapper.dtype": "bfloat16"})
    assert on.amp == "bf16"
    off, _ = with_overrides(on, {"optim_wrapper.type": "'OptimWrapper'"})
    assert off == load_schedule("1x")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train_cfg.max_epoch", "3", "did you mean train_cfg.max_epochs"),
        ("max_epoch", "3", "did you mean max_epochs"),
        ("momentum", "0", "did you mean optim_wrapper.optimizer.momentum"),
        ("optim_wrapper.optimizer.betas", "(0.9, 0.99)", "no key optim_wrapper.optimizer.betas"),
        ("param_scheduler.2.end", "3", "no key param_scheduler.2.end"),
        ("param_scheduler.-1.end", "3", "no key param_scheduler.-1.end"),
        ("log_level", "'INFO'", "no key log_level"),
        ("", "1", "no key"),
        ("train_cfg..max_epochs", "1", "no key"),
        ("lr", "", "no value given"),
        ("lr", "0.01 * 2", "arithmetic found"),
        ("lr", "__import__('os')", "a call found"),
        ("lr", "fast", "must be a finite number > 0 and <= 1000, not 'fast'"),
        ("lr", "-1", "must be a finite number > 0"),
        ("lr", "[" * 300, "not readable|too deeply"),
        ("max_epochs", "None", "must be a whole number"),
        ("train_cfg", "3", "train_cfg: must be dict"),
        ("param_scheduler", "3", "param_scheduler: must be a list"),
    ],
)
def test_an_override_that_does_not_fit_is_refused(key, value, message):
    with pytest.raises(ScheduleError, match=message):
        overridden({key: value})


def test_float16_keeps_its_loss_scale():
    wrapper = {"optim_wrapper.type": "AmpOptimWrapper", "optim_wrapper.loss_scale": "dict(init_scale=8, enabled=True)"}
    assert overridden(wrapper)[0].loss_scale == {"init_scale": 8.0}
    with pytest.raises(ScheduleError, match=r"loss_scale.enabled: must be True \(dtype='bfloat16' trains without"):
        overridden({**wrapper, "optim_wrapper.loss_scale": "dict(enabled=False)"})


def test_one_setting_cannot_be_overridden_twice():
    with pytest.raises(ScheduleError, match="given twice"):
        overridden({"lr": "1", "optim_wrapper.optimizer.lr": "2"})


def test_schedules_survive_their_dict_and_json():
    every_setting, _ = overridden(
        {
            "optim_wrapper.type": "AmpOptimWrapper",
            "optim_wrapper.loss_scale": "dict(init_scale=8)",
            "optim_wrapper.clip_grad": "dict(max_norm=1, norm_type='inf')",
            "optim_wrapper.paramwise_cfg": "dict(custom_keys={'a.b': dict(lr_mult=2)}, bias_lr_mult=2)",
            "param_scheduler.0": "dict(type='PolyLR', by_epoch=False)",
            "param_scheduler.1": "dict(type='CosineAnnealingLR', begin=0.5, convert_to_iter_based=True)",
            "train_cfg.dynamic_intervals": "[(6, 2)]",
            "auto_scale_lr.enable": "True",
        }
    )
    for schedule in (every_setting, *map(load_schedule, ("1x", "2x", "20e"))):
        values = json.loads(json.dumps(schedule.to_dict(), allow_nan=False))
        assert values == schedule.to_dict()
        assert schedule_from_dict(values) == schedule


def test_dicts_are_equal_where_schedules_are_and_only_there():
    schedule = load_schedule("1x")
    same = schedule_from_dict(schedule.to_dict(), name="another", source="elsewhere")
    assert same == schedule
    assert same.to_dict() == schedule.to_dict()
    for overrides in ({"lr": "0.03"}, {"param_scheduler.0.end": "501"}, {"auto_scale_lr.base_batch_size": "8"}):
        changed, _ = with_overrides(schedule, overrides)
        assert changed != schedule
        assert changed.to_dict() != schedule.to_dict()


def test_validation_falls_due_at_the_interval_and_after_the_last_epoch():
    schedule, _ = overridden({"val_interval": "5", "train_cfg.val_begin": "6"})
    assert [epoch for epoch in range(1, 13) if schedule.validates_after(epoch)] == [10, 12]


def test_the_description_names_what_a_person_asks_first():
    text = "\n".join(load_schedule("1x").describe())
    for part in ("12 epochs", "SGD", "0.02", "momentum 0.9", "x0.1 after epoch 8, 11", "iteration 0 to 500"):
        assert part in text
    changed, _ = overridden({"param_scheduler.1": "dict(type='StepLR', step_size=3)", "val_interval": "3"})
    text = "\n".join(changed.describe())
    assert "StepLR step_size 3 gamma 0.1" in text
    assert "every 3 epochs" in text
