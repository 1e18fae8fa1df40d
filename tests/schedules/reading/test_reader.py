"""The reading of schedules and configurations: what is read, what is refused, and that nothing is executed."""

import re
import sys
from pathlib import Path

import pytest

import schedules
from schedules import ParamwiseSettings, ScheduleError, load_schedule

MMDETECTION_STYLE = """
# training schedule for 1x
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

# learning rate
param_scheduler = [
    dict(
        type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(
        type='MultiStepLR',
        begin=0,
        end=12,
        by_epoch=True,
        milestones=[8, 11],
        gamma=0.1)
]

# optimizer
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.02, momentum=0.9, weight_decay=0.0001))

# Default setting for scaling LR automatically
#   - `enable` means enable scaling LR automatically
auto_scale_lr = dict(enable=False, base_batch_size=16)
"""


@pytest.fixture
def read(tmp_path):
    def reader(text, name="mine.py"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_schedule(path)

    return reader


def with_line(text, old, new):
    assert old in text
    return text.replace(old, new)


def test_an_mmdetection_file_says_the_same_as_the_named_schedule(read):
    schedule = read(MMDETECTION_STYLE)
    assert schedule == load_schedule("1x")
    assert (schedule.name, schedule.notes) == ("mine", ())
    assert load_schedule("1x").name == "1x"


def test_the_adamw_schedule_has_the_curve_of_1x_at_its_own_rate_and_norms_do_not_decay():
    adamw, plain = load_schedule(Path(schedules.__file__).with_name("schedule_1x_adamw.py")), load_schedule("1x")
    for iteration in (*range(0, 600, 7), 7330 * 8 - 1, 7330 * 8, 7330 * 11, 7330 * 12 - 1):
        rate = plain.learning_rate(iteration, 7330) * 1e-4 / 0.02
        assert adamw.learning_rate(iteration, 7330) == pytest.approx(rate, rel=1e-12)
    assert (adamw.max_epochs, adamw.val_interval, adamw.base_batch_size, adamw.notes) == (12, 1, 16, ())
    assert (adamw.optimizer.type, adamw.optimizer.lr, adamw.optimizer.kwargs["weight_decay"]) == ("AdamW", 1e-4, 0.1)
    assert adamw.paramwise == ParamwiseSettings(norm_decay_mult=0.0)


def test_everything_the_vocabulary_knows_is_read(read):
    schedule = read(
        '''
"""A docstring."""
train_cfg = {"type": "EpochBasedTrainLoop", "max_epochs": 30, "val_begin": 5, "val_interval": 10,
             "dynamic_intervals": [(20, 1)]}
param_scheduler = (
    dict(type="ConstantLR", factor=0.1, by_epoch=False, begin=0, end=100, verbose=True, last_step=-1),
    dict(type="StepLR", step_size=3, gamma=.5, end=6),
    dict(type="ExponentialLR", gamma=0.9, begin=6, end=9),
    dict(type="CosineAnnealingLR", T_max=5, eta_min_ratio=0.05, begin=10, end=15, convert_to_iter_based=True),
    dict(type="PolyLR", power=0.9, eta_min=1e-5, begin=20.5, end=30, convert_to_iter_based=True),
)
optim_wrapper = dict(
    type="AmpOptimWrapper", dtype="bfloat16", constructor="DefaultOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.98), eps=1e-7, weight_decay=+0.05),
    clip_grad=dict(max_norm=35, norm_type="inf"),
    accumulative_counts=4,
    paramwise_cfg=dict(norm_decay_mult=0, bias_lr_mult=2, bias_decay_mult=0., bypass_duplicate=True,
                       custom_keys={"backbone": dict(lr_mult=0.1), "backbone.layer4": dict(decay_mult=0.5)}),
)
auto_scale_lr = dict(base_batch_size=64, enable=True)
'''
    )
    assert [s.kind for s in schedule.param_schedulers] == [
        "ConstantLR",
        "StepLR",
        "ExponentialLR",
        "CosineAnnealingLR",
        "PolyLR",
    ]
    assert schedule.optimizer.kwargs == {
        "betas": (0.9, 0.98),
        "eps": 1e-7,
        "weight_decay": 0.05,
        "amsgrad": False,
    }
    assert (schedule.amp, schedule.loss_scale, schedule.accumulative_counts) == ("bf16", "dynamic", 4)
    assert (schedule.clip_grad.max_norm, schedule.clip_grad.norm_type) == (35.0, float("inf"))
    assert schedule.paramwise.custom_keys == {"backbone": (0.1, 1.0), "backbone.layer4": (1.0, 0.5)}
    assert (schedule.auto_scale_lr_enabled, schedule.base_batch_size) == (True, 64)
    assert [e for e in range(1, 31) if schedule.validates_after(e)] == [10, *range(19, 31)]
    assert schedule.learning_rate(0, 100) == pytest.approx(1e-5)


def test_fp16_with_its_loss_scale_is_read(read):
    text = with_line(MMDETECTION_STYLE, "type='OptimWrapper'", "type='AmpOptimWrapper', loss_scale=512.")
    assert (read(text).amp, read(text).loss_scale) == ("fp16", 512.0)
    text = with_line(text, "512.", "dict(init_scale=1024, growth_interval=100)")
    assert read(text).loss_scale == {"init_scale": 1024.0, "growth_interval": 100}


def test_keys_of_a_whole_configuration_are_ignored_and_named_without_reading_their_values(read):
    schedule = read(
        MMDETECTION_STYLE
        + "default_hooks = dict(timer=dict(type='IterTimerHook'))\nlog_level = 'INFO'\nload_from = None\n"
        + "train_dataloader = dict(dataset=dict(pipeline=train_pipeline), batch_size=base // 2)\n"
    )
    assert schedule == load_schedule("1x")
    assert len(schedule.notes) == 4
    assert re.search(r"mine\.py, line \d+: default_hooks is ignored", schedule.notes[0])
    assert "--weights" in schedule.notes[2]


def test_the_schedule_of_a_whole_configuration_is_computed_from_its_base_files(read, tmp_path):
    (tmp_path / "base.py").write_text(MMDETECTION_STYLE + "resume = False\nlog_level = 'INFO'\n")
    schedule = read(
        """
_base_ = ["./base.py"]
max_epochs = 24
scale = 1.5
model = dict(type="Any", head=dict(lr=open("nothing")))
log_level = dict(no="text")
train_cfg = dict(max_epochs=max_epochs)
_base_.param_scheduler[1].update(end=max_epochs, milestones=[max_epochs - n for n in (8, 2)])
optim_wrapper = dict(_delete_=True, optimizer=dict(type="SGD", lr=0.01 * 2, momentum=0.9, weight_decay=1e-4))
"""
    )
    assert schedule == load_schedule("2x")
    base, log_level, model, own = schedule.notes
    assert re.search(r"base\.py, line 28: resume is ignored", base)
    assert re.search(r"mine\.py, line 6: log_level is ignored", log_level)
    assert re.search(r"mine\.py, line 5: model is ignored: use --model", model)
    assert own.endswith("of max_epochs, scale only what the schedule uses counts")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("_base_ = 'base.py'\ntrain_cfg = dict(max_epochs=0)", r"mine\.py, line 2: train_cfg\.max_epochs: must be"),
        ("_base_ = 'base.py'\noptim_wrapper = dict(optimizer=dict(nestrov=1))", r"line 2: .*nestrov: .*mean nesterov"),
        (
            "_base_ = 'worse.py'\ntrain_cfg = dict(max_epochs=3)",
            r"worse\.py, line 17: param_scheduler\.1\.gama: unknown",
        ),
        ("_base_ = 'base.py'\nn = f(1)\ntrain_cfg = dict(max_epochs=n)", r"line 2: n: a call found, f"),
        ("_base_ = 'base.py'\ntrain_confg = dict(max_epochs=3)", r"line 2: train_confg: .*mean train_cfg"),
        (
            "_base_ = 'base.py'\ntest_cfg = dict(_delete_=1, a={{_base_.b}})",
            r"line 2: test_cfg\.a: the base files have no b",
        ),
        ("val_begin = 1\nval_cfg = dict(_delete_=True)", r"has no train_cfg"),
        (
            "with read_base():\n    from .._base_.schedules.s import *",
            r"line 1: .*_base_ = \['\.\./_base_/schedules/s\.py'\]",
        ),
    ],
)
def test_an_error_in_a_whole_configuration_names_the_file_it_is_in(read, tmp_path, text, message):
    (tmp_path / "base.py").write_text(MMDETECTION_STYLE)
    (tmp_path / "worse.py").write_text(with_line(MMDETECTION_STYLE, "gamma", "gama"))
    with pytest.raises(ScheduleError, match=message):
        read(text)


REFUSED = {
    "unknown top key": ("val_cfg =", "val_confg =", 4, r"val_confg: unknown key; did you mean val_cfg"),
    "unknown inner key": ("val_interval=1", "val_intervall=1", 3, r"train_cfg\.val_intervall: .*mean val_interval\?"),
    "unknown scheduler key": ("gamma=0.1", "gama=0.1", 17, r"param_scheduler\.1\.gama: .*did you mean gamma"),
    "unknown scheduler": ("'MultiStepLR'", "'MultistepLR'", 12, r"param_scheduler\.1\.type: .*mean MultiStepLR"),
    "unknown optimizer": ("'SGD'", "'Lion'", 23, r"optim_wrapper\.optimizer\.type: must be 'SGD' or"),
    "name": ("max_epochs=12", "max_epochs=EPOCHS", 3, r"train_cfg\.max_epochs: the name EPOCHS found"),
    "arithmetic": ("lr=0.02", "lr=0.01*2", 23, r"optim_wrapper\.optimizer\.lr: arithmetic found"),
    "call": ("lr=0.02", "lr=float('1')", 23, r"optim_wrapper\.optimizer\.lr: a call found"),
    "f-string": ("'SGD'", "f'SGD'", 23, r"an f-string found"),
    "import": ("# learning rate", "import os", 7, r"an import found"),
    "subscript": ("# learning rate", "val_cfg['a'] = 1", 7, r"an assignment to something other"),
    "reassignment": ("# learning rate", "val_cfg = dict()", 7, r"val_cfg: set twice, first in line 4"),
    "double star": ("lr=0.02", "**{}, lr=0.02", 23, r"optimizer: dict\(\.\.\.\) may hold only key=value"),
    "repeated argument": ("lr=0.02", "lr=0.02, lr=0.03", 23, r"set twice|repeated"),
    "repeated key": (
        "dict(type='ValLoop')",
        "{'type': 'ValLoop', 'type': 1}",
        4,
        r"val_cfg\.type: set twice, first in",
    ),
    "base file": ("# learning rate", "_base_ = ['a.py']", 7, r"_base_: .*one flat file"),
    "2.x key": ("# learning rate", "lr_config = dict()", 7, r"lr_config: .*MMDetection 2\.x"),
    "no epochs": ("max_epochs=12, ", "", 3, r"train_cfg: has no max_epochs"),
    "zero epochs": ("max_epochs=12", "max_epochs=0", 3, r"max_epochs: must be a whole number >= 1, not 0"),
    "bool epochs": ("max_epochs=12", "max_epochs=True", 3, r"max_epochs: must be a whole number"),
    "float epochs": ("max_epochs=12", "max_epochs=12.", 3, r"max_epochs: must be a whole number"),
    "negative lr": ("lr=0.02", "lr=-0.02", 23, r"optimizer\.lr: must be .* > 0 and <= 1000, not -0\.02"),
    "lr beyond every use": ("lr=0.02", "lr=1e300", 23, r"optimizer\.lr: must be .* <= 1000, not 1e\+300"),
    "epochs beyond every use": ("max_epochs=12", "max_epochs=1000000", 3, r"max_epochs: must be .* <= 100000"),
    "fused with dampening": ("momentum=0.9", "momentum=0.9, dampening=0.1, fused=True", 23, r"leave fused out"),
    "infinite lr": ("lr=0.02", "lr=1e999", 23, r"optimizer\.lr: must be a finite number"),
    "huge lr": ("lr=0.02", "lr=1" + "0" * 400, 23, r"optimizer\.lr: must be a finite number"),
    "text lr": ("lr=0.02", "lr='0.02'", 23, r"optimizer\.lr: must be a finite number .*, not '0\.02'"),
    "falling milestones": ("[8, 11]", "[11, 8]", 16, r"milestones: must be a list .* each larger"),
    "milestones no list": ("[8, 11]", "8", 16, r"milestones: must be a list"),
    "zero gamma": ("gamma=0.1", "gamma=0", 17, r"gamma: must be a finite number > 0"),
    "end before begin": ("end=12", "end=0", 11, r"param_scheduler\.1: ends at 0, which is not after its begin"),
    "zero start": ("start_factor=0.001", "start_factor=0", 10, r"start_factor: must be a finite number > 0 and <= 1"),
    "another loop": ("'EpochBasedTrainLoop'", "'ValLoop'", 3, r"type: must be 'EpochBasedTrainLoop' or 'IterBased"),
    "parts of iterations": (
        "type='EpochBasedTrainLoop', max_epochs=12, val_interval=1",
        "type='IterBasedTrainLoop', max_iters=90, val_interval=20",
        3,
        r"val_interval: must divide max_iters 90",
    ),
    "epochs beside iterations": (
        "type='EpochBasedTrainLoop', max_epochs=12, val_interval=1",
        "type='IterBasedTrainLoop', max_iters=90, val_interval=10",
        15,
        r"param_scheduler\.1\.by_epoch: must be False beside an IterBasedTrainLoop",
    ),
    "last_step": ("gamma=0.1", "gamma=0.1, last_step=3", 17, r"last_step: must be -1"),
    "converting by iteration": (
        "by_epoch=False",
        "by_epoch=False, convert_to_iter_based=True",
        10,
        r"only by_epoch=True can be converted",
    ),
    "momentum of Adam": ("type='SGD'", "type='Adam'", 23, r"momentum: unknown key"),
    "scaling without base": ("enable=False, base_batch_size=16", "enable=True", 27, r"needs base_batch_size"),
    "clipping by value": (
        "type='OptimWrapper',",
        "type='OptimWrapper', clip_grad=dict(type='value', clip_value=1),",
        22,
        r"clip_grad\.type: must be 'norm'",
    ),
    "decay multiplier without decay": (
        "weight_decay=0.0001)",
        "), paramwise_cfg=dict(norm_decay_mult=0.)",
        23,
        r"norm_decay_mult: multiplies the weight decay, but",
    ),
    "syntax": ("gamma=0.1)", "gamma=0.1", 18, r"not readable as Python"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_is_not_known_is_refused_with_file_line_and_key(read, case):
    old, new, line, message = case
    with pytest.raises(ScheduleError, match=message) as caught:
        read(with_line(MMDETECTION_STYLE, old, new))
    assert f"mine.py, line {line}: " in str(caught.value)


def test_a_device_is_no_schedule_and_not_missing_either():
    with pytest.raises(ScheduleError, match="/dev/null: is no regular file; give 1x"):
        load_schedule("/dev/null")


def test_nothing_in_a_file_is_executed(read, tmp_path):
    trace = tmp_path / "executed"
    for text in (
        f"__import__('pathlib').Path({str(trace)!r}).touch()\n",
        f"train_cfg = dict(max_epochs=__import__('pathlib').Path({str(trace)!r}).touch())\n",
        f"log_level = __import__('pathlib').Path({str(trace)!r}).touch()\n",
        f"train_cfg = [open({str(trace)!r}, 'w') for _ in [1]]\n",
    ):
        with pytest.raises(ScheduleError):
            read(text)
    assert not trace.exists()


HOSTILE = {
    "brackets": b"a = " + b"[" * 5000,
    "closed brackets": b"train_cfg = " + b"[" * 90 + b"]" * 90,
    "minus signs": b"train_cfg = " + b"-" * 100_000 + b"1",
    "sum": b"train_cfg = 1" + b"+1" * 100_000,
    "attributes": b"train_cfg = a" + b".b" * 100_000,
    "calls": b"train_cfg = " + b"dict(a=" * 80 + b"1" + b")" * 80,
    "long number": b"train_cfg = dict(max_epochs=" + b"9" * 5000 + b")",
    "hexadecimal number": b"train_cfg = dict(max_epochs=0x" + b"f" * 20000 + b")",
    "NUL": b"train_cfg = dict(\0)",
    "latin": "train_cfg = 'é'".encode("latin-1"),
    "binary": bytes(range(256)) * 10,
    "surrogate": b"train_cfg = {'\\ud800': '\\ud800'}",
    "too large": b"#" * 300_000,
    "empty": b"",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_a_schedule_error_that_can_be_printed(read, content):
    with pytest.raises(ScheduleError) as caught:
        read(content)
    assert len(str(caught.value)) < 1000
    str(caught.value).encode()


@pytest.mark.parametrize("name", ["3x", "no/such/file.py", ".", "a\0b", "/dev/null"])
def test_a_name_that_is_no_schedule_lists_the_known_ones_or_says_why(name):
    with pytest.raises(ScheduleError, match=r"1x, 2x, 20e"):
        load_schedule(name)


def test_a_byte_order_mark_and_windows_lines_are_read(read):
    assert read(b"\xef\xbb\xbf" + MMDETECTION_STYLE.replace("\n", "\r\n").encode()) == load_schedule("1x")


def test_the_package_imports_only_the_standard_library():
    import subprocess

    code = (
        "import sys; before = set(sys.modules); import schedules; schedules.load_schedule('1x');"
        "names = {m.split('.')[0] for m in set(sys.modules) - before} - {'schedules'};"
        "print(sorted(names - set(sys.stdlib_module_names)))"
    )
    root = Path(schedules.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_loop_that_counts_iterations_has_epochs_that_end_with_its_validations(tmp_path):
    file = tmp_path / "mine.py"
    text = MMDETECTION_STYLE.replace("type='EpochBasedTrainLoop', max_epochs=12, val_interval=1", "%s")
    text = text.replace("end=12", "end=90000").replace("[8, 11]", "[60000, 80000]").replace("True", "False")
    file.write_text(text % "type='IterBasedTrainLoop', max_iters=90000, val_interval=10000")
    schedule = load_schedule(file)
    assert (schedule.max_epochs, schedule.epoch_iterations) == (9, 10_000)
    assert all(map(schedule.validates_after, range(1, 10)))
    rates = [schedule.learning_rate(i, 10_000) for i in (0, 500, 59_999, 60_000, 80_000, 89_999)]
    assert rates == pytest.approx([2e-5, 0.02, 0.02, 0.002, 2e-4, 2e-4])
    assert schedules.schedule_from_dict(schedule.to_dict()) == schedule
