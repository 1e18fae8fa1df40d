_base_ = ["base/schedule.py", "base/data.py"]
epochs = _base_.max_epochs * 2
warmup, ramp = 500, [0.1, -0.5e-3]
first = second = dict(a=[1])
second["a"] = first["a"] + [2, +3] * 2
lr = _base_.base_lr / 2 ** (1.0 / 3) - 1e-9 % 0.3
_base_.param_scheduler[1].milestones = [epochs - 8, epochs - 2]
_base_.param_scheduler[0]["end"] = warmup
_base_.optim_wrapper.type = "AmpOptimWrapper"
_base_.loader.dataset.steps = _base_.train_steps[:1] + [dict(type="Flip")] + _base_.train_steps[-1:]
train_cfg = dict(max_epochs=epochs, begin=-epochs // 5, huge=2**70, ok=True + 1, whole=7.5 // 2)
folder = _base_.data_root[:-1] + "_" + "x" * 3
pair = (1, 2) + (3,) * 2
step = [*pair, *range(3)][::2]
merged = {**first, "b": None}
both = dict(dict(first, c=1), **second)
