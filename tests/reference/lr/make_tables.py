"""Writes schedulers_mmengine.json: MMEngine's learning rates for every kind of scheduler; see README.md
beside it.

python make_tables.py OUT.json, with mmengine 0.10.7 and torch installed. Every case is stepped as the Runner
steps it; those with 7 iterations per epoch are trained with a real Runner as well and must be equal bit for
bit.
"""

import copy
import functools
import json
import math
import sys
import tempfile

import mmengine
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import PARAM_SCHEDULERS
from mmengine.runner import Runner

lin, ms, cos, poly, const, step, exp = (
    functools.partial(dict, type=kind)
    for kind in (
        "LinearLR",
        "MultiStepLR",
        "CosineAnnealingLR",
        "PolyLR",
        "ConstantLR",
        "StepLR",
        "ExponentialLR",
    )
)
C = {}


def case(name, schedulers, epochs=6, lr=0.02):
    C[name] = (schedulers, epochs, lr)


case("linear_by_iter_end_factor", [lin(start_factor=0.25, end_factor=0.5, by_epoch=False, begin=3, end=17)])
case("linear_by_epoch", [lin(start_factor=0.1, begin=1, end=4)])
case("linear_default_end_by_epoch", [lin(start_factor=0.2)])
case("linear_default_end_by_iter", [lin(start_factor=0.2, by_epoch=False)])
case("linear_converted", [lin(start_factor=0.001, begin=0, end=2, convert_to_iter_based=True)])
case("linear_converted_fraction", [lin(start_factor=0.001, begin=0.5, end=2.5, convert_to_iter_based=True)])
case("linear_no_end", [lin(start_factor=0.5, end=int(1e9), by_epoch=False)])
case("linear_to_zero", [lin(start_factor=1.0, end_factor=0.0, by_epoch=False, begin=0, end=20)])
case("linear_one_step", [lin(start_factor=0.3, by_epoch=False, begin=2, end=3)])
case("constant_by_iter", [const(factor=0.1, by_epoch=False, begin=0, end=9)])
case("constant_by_epoch_begin", [const(factor=0.3, begin=2, end=5)])
case("constant_default", [const()])
case("constant_one_step", [const(factor=0.3, by_epoch=False, begin=4, end=5)])
case("constant_converted", [const(factor=0.3, begin=1, end=3, convert_to_iter_based=True)])
case("multistep_begin", [ms(milestones=[1, 2, 3], gamma=0.5, begin=2, end=5)])
case("multistep_by_iter", [ms(milestones=[0, 5, 11], gamma=0.3, by_epoch=False, begin=1, end=12)])
case("multistep_converted", [ms(milestones=[2, 4], gamma=0.1, begin=0, end=6, convert_to_iter_based=True)])
case("step_by_epoch", [step(step_size=2, gamma=0.5)])
case("step_by_iter", [step(step_size=5, gamma=0.7, by_epoch=False, begin=3, end=31)])
case("step_converted", [step(step_size=2, gamma=0.5, begin=1, end=6, convert_to_iter_based=True)])
case("exponential_by_epoch", [exp(gamma=0.7, begin=1, end=5)])
case("exponential_by_iter", [exp(gamma=0.97, by_epoch=False)])
case("exponential_converted", [exp(gamma=0.97, begin=1, end=4, convert_to_iter_based=True)])
case("cosine_by_epoch", [cos(eta_min=0.001)])
case("cosine_T_max", [cos(T_max=6, eta_min=0.0)])
case("cosine_by_iter", [cos(T_max=20, by_epoch=False, begin=0, end=20, eta_min=1e-5)])
case("cosine_converted", [cos(begin=2, end=6, T_max=4, eta_min_ratio=0.05, convert_to_iter_based=True)])
case("cosine_restart", [cos(T_max=7, by_epoch=False, eta_min=0.002)])
case("cosine_restart_zero_floor", [cos(T_max=7, by_epoch=False)])
case("cosine_T_max_1", [cos(T_max=1, eta_min=0.002)])
case("cosine_stops_early", [cos(T_max=40, by_epoch=False, begin=5, end=20, eta_min=0.002)])
case("cosine_then_restart_ratio", [cos(T_max=2, eta_min_ratio=0.1)])
case("poly_by_epoch", [poly(power=0.9, eta_min=1e-4)])
case("poly_by_iter", [poly(power=2.0, by_epoch=False, begin=4, end=30)])
case("poly_converted", [poly(power=0.9, eta_min=1e-3, begin=1, end=5, convert_to_iter_based=True)])
case("poly_one_step", [poly(power=0.9, eta_min=1e-3, begin=1, end=2)])
# composed
case(
    "warmup_then_cosine",
    [
        lin(start_factor=0.001, by_epoch=False, begin=0, end=10),
        cos(eta_min=1e-3, begin=3, end=6, T_max=3, convert_to_iter_based=True),
    ],
)
case("warmup_under_cosine_by_epoch", [lin(start_factor=0.01, by_epoch=False, begin=0, end=25), cos(eta_min=1e-3)])
case("cosine_listed_first", [cos(eta_min=1e-3), lin(start_factor=0.01, by_epoch=False, begin=0, end=25)])
case(
    "warmup_under_cosine_by_iter",
    [lin(start_factor=0.01, by_epoch=False, begin=0, end=15), cos(eta_min=1e-3, by_epoch=False)],
)
case(
    "cosine_by_iter_listed_first",
    [cos(eta_min=1e-3, by_epoch=False), lin(start_factor=0.01, by_epoch=False, begin=0, end=15)],
)
case("warmup_times_cosine", [lin(start_factor=0.01, by_epoch=False, begin=0, end=25), cos(T_max=6)])
case(
    "warmup_under_restarting_cosine",
    [lin(start_factor=0.01, by_epoch=False, begin=0, end=15), cos(T_max=7, by_epoch=False)],
)
case(
    "warmup_poly_floor",
    [lin(start_factor=0.01, by_epoch=False, begin=0, end=15), poly(power=0.9, eta_min=1e-3, by_epoch=False)],
)
case(
    "warmup_then_poly",
    [lin(start_factor=0.01, by_epoch=False, begin=0, end=7), poly(power=0.9, eta_min=1e-3, by_epoch=False, begin=7)],
)
case(
    "cosine_up_cosine_down",
    [
        lin(start_factor=0.1, begin=0, end=2),
        cos(begin=2, end=4, T_max=2, eta_min=1e-3),
        const(factor=0.5, begin=4, end=6),
    ],
)
case("two_floors_in_turns", [poly(eta_min=1e-3, by_epoch=False), cos(eta_min=2e-3)])
case("two_floors_in_turns_swapped", [cos(eta_min=2e-3), poly(eta_min=1e-3, by_epoch=False)])
case(
    "everything_multiplied",
    [
        lin(start_factor=0.1, by_epoch=False, begin=0, end=12),
        exp(gamma=0.99, by_epoch=False),
        step(step_size=2, gamma=0.5),
        const(factor=0.2, begin=1, end=4),
        poly(power=0.5),
        ms(milestones=[3, 5]),
    ],
)
case("constant_at_start_then_floor", [const(factor=0.5, begin=0, end=2), cos(begin=1, eta_min=0.004)])
case("single_without_list", ms(milestones=[2, 3], gamma=0.2))
case("floor_above_lr", [cos(eta_min=0.05)])


def build(schedulers, optimizer, epochs, length):
    """As Runner._build_param_scheduler does, the default of `end` included."""
    built = []
    for config in schedulers if isinstance(schedulers, list) else [schedulers]:
        config = copy.deepcopy(config)
        config.setdefault("end", epochs if config.get("by_epoch", True) else epochs * length)
        built.append(PARAM_SCHEDULERS.build(config, default_args={"optimizer": optimizer, "epoch_length": length}))
    return built


def simulate(schedulers, epochs, lr, length, lr_mult=1.0):
    group = {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr * lr_mult}
    optimizer = torch.optim.SGD([group], lr=lr)
    built = build(schedulers, optimizer, epochs, length)
    values = []
    for iteration in range(epochs * length):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in built:
            if not scheduler.by_epoch:
                scheduler.step()
        for scheduler in built:
            if scheduler.by_epoch and (iteration + 1) % length == 0:
                scheduler.step()
    return values


class Tiny(BaseModel):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, mode="loss"):
        return {}

    def train_step(self, data, optim_wrapper):
        optim_wrapper.update_params((self.w * 0).sum())
        return {}


class Watch(Hook):
    def __init__(self):
        self.values = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.values.append(runner.optim_wrapper.optimizer.param_groups[0]["lr"])


def train(schedulers, epochs, lr, length, name):
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        Runner(
            Tiny(),
            work_dir=folder,
            train_dataloader=torch.utils.data.DataLoader(torch.zeros(length, 1), batch_size=1),
            train_cfg={"by_epoch": True, "max_epochs": epochs},
            optim_wrapper={"optimizer": {"type": "SGD", "lr": lr}},
            param_scheduler=copy.deepcopy(schedulers),
            custom_hooks=[watch],
            default_hooks={"logger": None, "checkpoint": None, "timer": None},
            log_level="ERROR",
            experiment_name=f"{name}_{length}",
        ).train()
    return watch.values


def runs(values):
    return [[i, v] for i, v in enumerate(values) if i == 0 or v != values[i - 1]]


def short_cases():
    for name, (schedulers, epochs, lr) in C.items():
        for length in (1, 7, 10):
            if (name, length) == ("warmup_then_poly", 1) or (length == 1 and "fraction" in name):
                continue  # MMEngine refuses them: the end is not after the begin
            values = simulate(schedulers, epochs, lr, length)
            assert all(math.isfinite(v) for v in values), name
            if length == 7:
                assert train(schedulers, epochs, lr, length, name) == values, name
            yield {
                "name": name,
                "iterations_per_epoch": length,
                "max_epochs": epochs,
                "lr": lr,
                "lr_mult": 1.0,
                "param_scheduler": schedulers,
                "real_runner": length == 7,
                "values": runs(values),
            }


def group_cases():
    for name in (
        "warmup_then_cosine",
        "warmup_under_cosine_by_epoch",
        "cosine_restart",
        "two_floors_in_turns",
        "cosine_then_restart_ratio",
    ):
        schedulers, epochs, lr = C[name]
        yield {
            "name": name,
            "iterations_per_epoch": 7,
            "max_epochs": epochs,
            "lr": lr,
            "lr_mult": 0.1,
            "param_scheduler": schedulers,
            "real_runner": False,
            "values": runs(simulate(schedulers, epochs, lr, 7, 0.1)),
        }


def long_cases():
    warmup = lin(start_factor=0.001, by_epoch=False, begin=0, end=1000)
    at = sorted({*range(0, 12000, 499), *range(990, 1010), *range(11990, 12000)})
    for name, schedulers in {
        "long_warmup_cosine": [warmup, cos(eta_min=1e-5, begin=6, end=12, T_max=6, convert_to_iter_based=True)],
        "long_cosine_zero": [warmup, cos(T_max=12, convert_to_iter_based=True)],
        "long_cosine_over_warmup": [warmup, cos(eta_min=1e-5, convert_to_iter_based=True)],
        "long_poly": [poly(power=0.9, by_epoch=False)],
        "long_poly_floor": [poly(power=0.9, eta_min=1e-4, by_epoch=False)],
        "long_exponential": [exp(gamma=0.9999, by_epoch=False)],
        "long_linear": [lin(start_factor=1.0, end_factor=0.01, by_epoch=False)],
    }.items():
        values = simulate(schedulers, 12, 0.02, 1000)
        yield {
            "name": name,
            "iterations_per_epoch": 1000,
            "max_epochs": 12,
            "lr": 0.02,
            "lr_mult": 1.0,
            "param_scheduler": schedulers,
            "real_runner": False,
            "samples": [[i, values[i]] for i in at],
        }


if __name__ == "__main__":
    versions = {"mmengine": mmengine.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}
    cases = [*short_cases(), *group_cases(), *long_cases()]
    with open(sys.argv[1], "w") as out:  # noqa: PTH123
        out.write(f'{{"versions": {json.dumps(versions)},\n"cases": [\n')
        out.write(",\n".join(map(json.dumps, cases)) + "\n]}\n")
