"""scripts/benchmark.py runs at toy size and writes what its readers rely on. No test judges how long anything took."""

import gzip
import importlib
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from detection.engine.distributed.comm import Processes
from detection.models import ImageBatch, TargetBatch, build_model

SCRIPTS = Path(__file__).parents[3] / "scripts"
RECORD_KEYS = {"benchmark", "command", "date", "git", "hardware", "versions", "settings", "device"}
TOY = ["--min-size", "64", "--max-size", "96", "--batch-size", "1", "--threads", "1", "--repeats", "1"]


@pytest.fixture
def script(monkeypatch):
    """Modules of scripts/ by name."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


@pytest.fixture
def measured(script, tmp_path):
    """measured("data", *options): the JSON record of a run."""

    def run(*argv):
        file = tmp_path / "figures.json"
        assert script("benchmark").main([*map(str, argv), "--json", str(file)]) == 0
        record = json.loads(file.read_text())
        assert record.keys() >= RECORD_KEYS
        assert record["benchmark"] == argv[0]
        return record

    return run


def test_train_measures_both_steps_and_takes_them_apart(measured, script, capsys, tmp_path, monkeypatch):
    benchmark = script("benchmarks.train")
    in_own_processes = benchmark.peak_memory_on_cpu
    # Ours alone: a process takes some seconds to start.
    monkeypatch.setattr(benchmark, "peak_memory_on_cpu", lambda found, work: in_own_processes(found[1:], work))
    trace = tmp_path / "trace.json"
    variants = ["torchvision-fp32", "ours-bf16-cl"]
    options = [*TOY, "--device", "cpu", "--variants", *variants, "--inference", "--profile", trace]
    record = measured("train", "--model", "faster_rcnn_r18_fpn", *options)
    assert [row["name"] for row in record["train"]] == variants
    for row in [*record["train"], *record["inference"]["batch"], *record["inference"]["one_image"]]:
        assert row["seconds"].keys() == {"median", "min", "max", "values"}
        assert row["ratios"].keys() == {"torchvision-fp32"}
        assert row["images_per_second"] > 0
    assert all(np.isfinite(list(row["losses"].values())).all() and row["losses"] for row in record["train"])
    stages = record["stage_seconds"]["ours-bf16-cl"]
    # A stage at zero is one whose code has moved, so that its time hides in another's.
    assert record["stages_not_found"] == []
    assert all(seconds > 0 for seconds in stages.values())
    waits = {name: sum(kinds["device_to_host"].values()) for name, kinds in record["waits"].items()}
    assert waits["ours-bf16-cl"] < waits["torchvision-fp32"]
    assert record["gflop_per_image"].keys() == {"torchvision", "ours"}
    assert record["utilization"].keys() == set(variants)
    if Path("/proc/self/status").exists():
        assert record["peak_memory_gb"].keys() == {"ours-bf16-cl"}
        # Weights, gradients and momentum of a ResNet-18 detector are 0.3 GB alone.
        assert 0.3 < record["peak_memory_gb"]["ours-bf16-cl"] < 3
    assert {"traceEvents"} <= json.loads(trace.read_text()).keys()
    assert "x torchvision-fp32" in capsys.readouterr().out


PEAK = """
import sys
sys.path.insert(0, sys.argv[1])
from types import SimpleNamespace
import torch
from benchmarks import peak_memory

open("/proc/self/clear_refs", "w").write("5")
sizes = [900, 300, 300]

def touch(megabytes):
    torch.ones(megabytes * 2**20, dtype=torch.uint8)

def build(variant, work):
    kept = torch.ones(100 * 2**20, dtype=torch.uint8)  # as weights are
    return SimpleNamespace(settle=lambda run: run(), train=lambda batches: touch(sizes.pop(0)), kept=kept)

peak_memory.build_step = build
work = SimpleNamespace(batches=(), device=torch.device("cpu"))
print(peak_memory._bytes_added(None, work, 1) / 2**20, len(sizes))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux, which tells the peak")
def test_peak_memory_is_what_a_step_adds_and_not_what_its_first_run_took():
    # A process of its own, as the benchmark has: what others have freed in this one may serve a step.
    done = subprocess.run([sys.executable, "-c", PEAK, str(SCRIPTS)], capture_output=True, text=True, check=False)
    if "PermissionError" in done.stderr:
        pytest.skip("the system does not let a process reset its peak")
    assert done.returncode == 0, done.stderr
    added, left = done.stdout.split()
    assert left == "0"
    assert 390 < float(added) < 480


def test_padding_counts_sizes_and_pixels_with_and_without_buckets(measured, script, tmp_path):
    sizes = [(640, 480), (640, 427), (500, 375), (480, 640), (600, 593)]
    annotations = script("benchmarks.scenes").write_images(tmp_path / "own", sizes, seed=5)
    record = measured("padding", "--annotations", annotations, "--pictures", 300, "--batch-sizes", 1, 4)
    for row in record["padding"]:
        natural, buckets = row["natural"], row["buckets"]
        assert 1 <= buckets["shapes"] <= natural["shapes"] <= 9
        assert 0 < natural["padding"] <= buckets["padding"] < 0.5
        assert natural["pixels"] <= buckets["pixels"]
    assert [row["batch_size"] for row in record["padding"]] == [1, 4]


def test_data_measures_each_way_alone_and_through_a_worker(measured):
    record = measured("data", *TOY, "--pictures", 3)
    rows = {row["name"]: row for row in record["chains"]}
    assert {"ours, Pillow, worker", "torchvision reference, worker + device", "Pillow, decode alone"} <= rows.keys()
    assert all(row["images_per_second"] > 0 for row in rows.values())
    assert "torchvision reference, worker" in rows["ours, Pillow, worker"]["ratios"]
    streams = {row["name"]: row for row in record["through_a_worker"]}
    assert {"ours, Pillow", "torchvision reference", "torchvision reference with its model's part"} <= streams.keys()
    for row in streams.values():
        assert row["worker_cpu_seconds"]["min"] > 0 and row["main_cpu_seconds"]["min"] > 0
        assert "all of torchvision reference" in row["ratios"]


def test_data_takes_a_set_of_ones_own(measured, script, tmp_path):
    annotations = script("benchmarks.scenes").write_images(tmp_path / "own", [(64, 48), (48, 64)], seed=5)
    source = ["--images", tmp_path / "own", "--annotations", annotations]
    record = measured("data", *TOY, *source, "--workers", 0)
    assert record["images"] == 2


def test_the_peers_chains_give_the_batches_of_the_trainings_they_stand_for(script, tmp_path):
    """What torchvision's model and MMDetection's preprocessor see is ours, normalized."""
    pytest.importorskip("cv2")
    chains, data = script("benchmarks.baselines"), script("data")
    file = script("benchmarks.scenes").write_images(tmp_path, [(64, 48)] * 2, seed=5)
    dataset = data.CocoDataset(tmp_path, data.read_coco(file), training=True)
    loader = data.TrainLoader(dataset, min_size=96, max_size=160, batch_size=2, seed=1)
    ours = data.assemble(next(loader.batches(0, 1)), "cpu")
    plans = list(loader.plans(0, 1))
    assert sorted(ours.flips) == [False, True]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (chains.MEAN, chains.STD))
    peers = [chains.MMDetection3(dataset, plans), chains.MMDetection2(dataset, plans)]
    peers += [chains.TorchvisionReference(dataset, plans, 96, 160)]
    for chain in peers:
        samples = [chain[item] for item in chain.batches[0]]
        batch = chain.on_device(samples)
        pixels, boxes = batch, [sample.boxes_xyxy for sample in samples]
        if isinstance(chain, chains.TorchvisionReference):
            pixels, boxes = batch[0].tensors, [target["boxes"] for target in batch[1]]
        assert pixels.shape == ours.pixels.shape
        assert ((pixels * std + mean) - ours.pixels).abs().mean() < 1
        for theirs, rows, valid in zip(boxes, ours.boxes_xyxy, ours.valid, strict=True):
            assert torch.allclose(theirs, rows[valid], atol=0.01)


def test_memory_is_watched_epoch_by_epoch(measured, script):
    if script("benchmarks.processes").memory_of(1 << 30) is None and not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("the system does not tell the memory of processes")
    record = measured("memory", "--epochs", 2, "--workers", 1, "--listed", 40, "--pictures", 3)
    for name in ("ours", "a list of dicts"):
        epochs = record[name]["epochs"]
        assert [len(one["workers"]) for one in epochs] == [1, 1]
        assert all(0 < one["workers"][0]["pss"] < one["workers"][0]["rss"] for one in epochs)
    assert record["ours"]["seconds_to_first_batch"] > 0


def test_eval_compares_all_twelve_figures_with_pycocotools(measured):
    record = measured("eval", "--images", 12, "--detections", 20)
    rows = {row["name"]: row for row in record["backends"]}
    judge = rows["pycocotools"]
    assert len(judge["stats"]) == judge["equal_figures"] == 12
    assert 0 < judge["stats"]["mAP"] < 1
    for row in rows.values():
        assert row["largest_difference"] < 1e-3
        assert row["cpu_seconds"]["median"] > 0 and row["peak_mb"]["median"] > 0
    assert judge["results_file_cpu_seconds"]["median"] > 0


def test_startup_measures_the_way_to_the_first_iteration_and_reading_annotations(measured, script, monkeypatch):
    startup = script("benchmarks.startup")
    # Processes would take most of a minute on a small machine.
    commands = []
    monkeypatch.setattr(startup, "_finished", lambda command: commands.append(command) or startup.Duration(1.0, 0.5))
    monkeypatch.setattr(
        startup, "_first_record", lambda command, output: commands.append(command) or startup.Duration(2.0, 0.5)
    )
    monkeypatch.setattr(startup, "_in_own_process", startup.read_once)
    record = measured("startup", "--repeats", 2, "--annotation-images", 40)
    assert len(commands) == 8
    assert [row["seconds"]["median"] for row in record["startup"]] == [1.0, 1.0, 1.0, 2.0]
    assert [row["cpu_seconds"]["median"] for row in record["startup"]] == [0.5] * 4
    readers = {row["name"] for row in record["annotations"]["readers"]}
    assert readers == {"json.loads", "pycocotools.COCO", "ours, first start", "ours, later starts"}
    assert record["annotations"]["boxes"] >= 40


def test_variants_alternate_and_the_order_rotates_after_a_first_round_that_does_not_count(script):
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    samples = script("benchmarks.timing").interleave(runs, 2)
    assert "".join(order) == "abc" + "abc" + "bca"
    assert all(len(sample.wall) == len(sample.cpu) == 2 for sample in samples.values())


def test_ratios_come_from_pairs_of_one_round(script):
    ratio = script("benchmarks.timing").pairwise_ratio([1.0, 10.0, 2.0], [2.0, 30.0, 8.0])
    assert (ratio["median"], ratio["min"], ratio["max"]) == (3.0, 2.0, 4.0)


def test_a_stage_inside_another_counts_once_and_wrapping_leaves_nothing_behind(script):
    probes = script("benchmarks.profilers")
    now = [0.0]

    def pass_time(seconds):
        now[0] += seconds

    owner = SimpleNamespace(inner=lambda: pass_time(3.0))
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    module.bias = torch.nn.Identity()
    before = dict(vars(module)), owner.inner
    clock = probes.StageClock(torch.device("cpu"), lambda: now[0])
    places = [(owner, "inner", "inner"), (module, "bias", "module"), (owner, "gone", "nowhere")]
    with probes.wrapped(clock, places) as missing, clock.stage("outer"):
        pass_time(1.0)
        owner.inner()
        pass_time(1.0)
        assert module.bias(torch.ones(2)).sum() == 2
    seconds = clock.seconds()
    assert missing == ["SimpleNamespace.gone"]
    assert seconds == {"inner": 3.0, "outer": 2.0, "module": 0.0}
    assert (dict(vars(module)), owner.inner) == before


def test_waits_are_counted_by_kind(script):
    def run():
        values = torch.arange(6.0)
        values[values > 2]
        values.nonzero()
        values.sum().item()
        values[values > 2] = 0.0
        torch.tensor([1.0], device="cpu")

    counts = script("benchmarks.profilers").count_waits(run)
    assert counts["device_to_host"] == {"index by a boolean mask": 1, "nonzero": 1, "scalar read by the host": 1}
    assert counts["host_to_device"] == {"tensor made from Python numbers": 1}


def event(category, name, start, duration):
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "pid": 1, "tid": 1}


# As Kineto writes it: two steps of work on two streams, between events of other kinds.
TRACE = {
    "schemaVersion": 1,
    "traceEvents": [
        event("cpu_op", "aten::convolution", 0, 9),
        event("user_annotation", "backward", 0, 50),
        event("cuda_runtime", "cudaLaunchKernel", 0, 1),
        event("cuda_runtime", "cudaMemcpyAsync", 1, 1),
        event("cuda_runtime", "cudaDeviceSynchronize", 2, 190),
        event("cuda_driver", "cuLaunchKernelEx", 3, 1),
        event("kernel", "convolution", 100, 50),
        event("kernel", "overlapping", 120.5, 39.5),
        event("gpu_user_annotation", "backward", 100, 100),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 180, 10),
        event("gpu_memset", "Memset (Device)", 190, 10),
        {"ph": "f", "cat": "ac2g", "name": "ac2g", "id": 3, "ts": 100, "pid": 1, "tid": 1},
        {"ph": "M", "name": "process_name"},
    ],
}
FROM_TRACE = {
    "kernels_per_step": 1,
    "launches_per_step": 1,
    "copies_per_step": 1,
    "gpu_busy_seconds_per_step": 40e-6,
    "gpu_idle_share": 0.2,
}


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_gpu_figures_read_kernels_launches_and_idle_time_from_a_trace(script, tmp_path, name):
    trace = tmp_path / name
    content = json.dumps(TRACE).encode()
    trace.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert script("benchmarks.profilers").gpu_figures(trace, 2) == pytest.approx(FROM_TRACE)


def test_a_trace_without_gpu_work_gives_counts_of_zero(script, tmp_path):
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps({"traceEvents": [event("cpu_op", "aten::add", 0, 1)]}))
    assert script("benchmarks.profilers").gpu_figures(trace, 1) == {
        "kernels_per_step": 0,
        "launches_per_step": 0,
        "copies_per_step": 0,
    }


class PretendedGpu:
    """What the benchmark asks torch.cuda for, answered as one would that holds 3 GiB and has a peak of 5."""

    def __init__(self, monkeypatch):
        self.calls = []
        answers = {
            "synchronize": None,
            "reset_peak_memory_stats": None,
            "memory_allocated": 3 * 2**30,
            "max_memory_allocated": 5 * 2**30,
            "get_sync_debug_mode": 0,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, lambda *args, answer=answer: answer)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self.set_sync_debug_mode)
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        self.mode = 0

    def set_sync_debug_mode(self, mode):
        if mode == "warn" and not self.calls:
            warnings.warn(
                "Synchronization debug mode ... does not yet detect all synchronizing operations", stacklevel=2
            )
        self.mode = mode
        self.calls.append(mode)

    def synchronizes(self):
        if self.mode == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)

    @staticmethod
    def event(enable_timing):
        assert enable_timing
        return SimpleNamespace(record=lambda: None, elapsed_time=lambda other: 2.0)


class PretendedStep:
    """A step of two synchronizations, and one more where a block ends."""

    def __init__(self, script, name, gpu):
        self.variant = script("benchmarks.steps").Variant.parse(name)
        self.gpu = gpu

    def settle(self, run):
        pass

    def train(self, batches):
        for _ in batches:
            self.gpu.synchronizes()
            self.gpu.synchronizes()
        self.gpu.synchronizes()

    def losses(self):
        return {"loss": 1.0}

    def stages(self):
        return [(self, "settle", "input")]


def test_what_only_a_gpu_shows_is_in_the_record_and_the_table(script, monkeypatch, tmp_path):
    benchmark, steps = script("benchmarks.train"), script("benchmarks.steps")
    gpu = PretendedGpu(monkeypatch)
    monkeypatch.setattr(benchmark, "matmul_rate", lambda *args: 1e12)
    traced = []

    def write_trace(run, file, device):
        run()
        traced.append((file, device.type))
        file.write_text(json.dumps(TRACE))

    monkeypatch.setattr(benchmark, "write_trace", write_trace)
    annotations = script("benchmarks.scenes").write_images(tmp_path / "set", [(64, 48)] * 2, seed=5)
    data = script("data")
    dataset = data.CocoDataset(tmp_path / "set", data.read_coco(annotations), training=True)
    loader = data.TrainLoader(dataset, min_size=64, max_size=96, batch_size=1, seed=1)
    device = torch.device("cuda", 0)
    work = steps.Work("tiny", 1, 64, 96, device, loader, tuple(loader.batches(0, 2)), tmp_path / "none")
    compared = {name: PretendedStep(script, name, gpu) for name in ("torchvision-fp32", "ours-bf16-cl")}
    arguments = SimpleNamespace(repeats=1, clock="wall", inference=False, no_probes=False, profile=None)
    resident = dict.fromkeys(compared, 2**30)
    figures, text = benchmark._measure(arguments, work, compared, resident, lambda line: None)
    assert figures["peak_memory_gb"] == dict.fromkeys(compared, 3.0)
    assert [kinds["cuda_runtime"] for kinds in figures["waits"].values()] == [2, 2]
    assert gpu.mode == 0
    assert figures["stage_seconds"]["ours-bf16-cl"]["rest"] == pytest.approx(1e-3)  # 2 ms, two batches
    ((file, place),) = traced
    assert place == "cuda" and not file.exists()
    assert figures["gpu"]["variant"] == "ours-bf16-cl"
    for name, value in FROM_TRACE.items():
        assert figures["gpu"][name] == pytest.approx(value)
    assert 0 <= figures["gpu"]["idle_share"] <= 1
    assert "ours-bf16-cl 3.00 GB" in text
    assert "1 kernels, 1 launches, 1 copies, busy 0.0 ms; idle " in text


def test_a_step_without_one_of_the_optimizations_has_the_same_losses(script):
    optimizations = script("benchmarks.ablation").OPTIMIZATIONS
    small = {"fpn_channels": 16, "roi_hidden_channels": 16, "roi_samples_per_image": 16, "rpn_proposals_train": 50}
    torch.manual_seed(0)
    model = build_model("faster_rcnn_r18_fpn", 3, **small).train().to(memory_format=torch.channels_last)
    pixels = torch.rand(2, 3, 64, 96).mul(255).contiguous(memory_format=torch.channels_last)
    images = ImageBatch(pixels, torch.tensor([[64, 96], [60, 90]]))
    boxes = torch.tensor([[[8.0, 8.0, 40.0, 40.0]], [[20.0, 10.0, 80.0, 60.0]]])
    labels, keys = torch.tensor([[1], [2]]), torch.tensor([11, 12])
    targets = TargetBatch(boxes, labels, torch.ones(2, 1, dtype=torch.bool), keys)

    def losses_and_norm():
        model.zero_grad()
        losses = model(images, targets)
        sum(losses.values()).backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return [*(loss.item() for loss in losses.values()), torch.nn.utils.get_total_norm(gradients).item()]

    full = losses_and_norm()
    for name, optimization in optimizations.items():
        if optimization.without is not None:
            with optimization.without(model):
                assert losses_and_norm() == pytest.approx(full, rel=1e-3), name
    assert losses_and_norm() == pytest.approx(full, rel=1e-6)


def test_a_step_of_several_processes_is_wrapped_for_their_exchange(script, monkeypatch):
    steps, wrapped = script("benchmarks.steps"), []
    monkeypatch.setattr(steps, "load_weights", lambda model, path: None)
    processes = Processes(0, 0, 2, 2, torch.device("cpu"))
    monkeypatch.setattr(Processes, "wrap_ddp", lambda self, model, **_: wrapped.append((self, model)) or model)
    loader = SimpleNamespace(iterations_per_epoch=1, global_batch_size=4, seed=0, batch_size=2)
    work = SimpleNamespace(
        model="faster_rcnn_r18_fpn", num_classes=3, device=processes.device, weights="", loader=loader
    )
    step = steps.OurStep(steps.Variant.parse("ours-fp32-cl"), work, processes)
    assert wrapped == [(processes, step.model)]


def test_settings_of_the_gradient_exchange_reach_torch_and_one_of_them_is_the_engines(script, monkeypatch):
    exchange, given = script("benchmarks.exchange"), []

    class Recorded:
        def __init__(self, module, device_ids=None, gradient_as_bucket_view=False, static_graph=False, **kwargs):
            given.append((gradient_as_bucket_view, static_graph))

    monkeypatch.setattr(exchange, "DistributedDataParallel", Recorded)
    monkeypatch.setattr(exchange, "OurStep", lambda variant, work, all_: all_.wrap_ddp(None, broadcast_buffers=False))
    two = exchange.Processes(0, 0, 2, 2, torch.device("cpu"))
    for name in exchange.SETTINGS:
        assert isinstance(exchange._step(name, None, None, two), Recorded)
    assert given == [(True, False), (False, False), (True, True)]


def test_generated_images_are_textured_and_their_boxes_lie_inside(script):
    scenes = script("benchmarks.scenes")
    rng = np.random.default_rng(0)
    pixels = scenes.texture(rng, 64, 48)
    assert pixels.shape == (48, 64, 3) and pixels.std() > 20
    counts = []
    for _ in range(400):
        boxes = scenes.draw_boxes(rng, 640, 480)
        counts.append(len(boxes))
        assert (boxes[:, 2:] > 1).all() and (boxes >= 0).all()
        assert (boxes[:, :2] + boxes[:, 2:] <= [640.02, 480.02]).all()
    assert 5 < np.mean(counts) < 9 and 3 <= np.median(counts) <= 5


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "--variants", "theirs-fp32"], "theirs-fp32"),
        (["train", "--variants", "ours-fp32-without-wheels"], "wheels"),
        (["train", "--nproc", "1"], "2 processes"),
        (["train", "--height", "320"], "--width"),
        (["train", "--model", "faster_rcnn_x101_32x4d_fpn", *TOY], "resnext101_32x4d"),
        (["data", "--images", "somewhere"], "--annotations"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(script, capsys, argv, words):
    assert script("benchmark").main(argv) == 1
    assert words in capsys.readouterr().err


def test_traffic_counts_a_steps_bytes_with_and_without_kernels():
    # A process of its own: the device that is pretended stays with the process.
    options = ["--model", "faster_rcnn_r18_fpn", "--batch-size", "2", "--height", "256", "--width", "320"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        command = [sys.executable, str(SCRIPTS / "benchmark.py"), "traffic", *options, "--json", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "needs a newer PyTorch" in done.stderr:
            pytest.skip("this PyTorch lets nobody pretend a device")
        assert done.returncode == 0, done.stderr[-2000:]
        record = json.loads(file.read_text())
    operators, kernels = record["traffic"]["operators"], record["traffic"]["kernels"]
    assert "whole step" in done.stdout and operators.keys() == kernels.keys()
    for stage, row in operators.items():
        assert row["calls"] > 0 and row["gigabytes"] > 0 and row["milliseconds"] > 0
        # Suppression in rounds is a product of matrices; a kernel's is none.
        if stage != "proposals and NMS":
            assert kernels[stage]["teraflops"] == pytest.approx(row["teraflops"])
    # What the counts are for: these three stages are passes over memory that kernels do without.
    for stage in ("proposals and NMS", "assignment and sampling", "RoIAlign"):
        assert kernels[stage]["gigabytes"] < operators[stage]["gigabytes"] / 2
    # A 3x3 convolution at P2 of two images, one of many: products of 64 x 80 cells, 256 x 9 x 256 each.
    assert operators["RPN head"]["teraflops"] > 2 * 2 * 64 * 80 * 256 * 9 * 256 / 1e12
