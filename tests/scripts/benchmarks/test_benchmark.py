"""scripts/benchmark.py runs at toy size and writes what its readers rely on. No test judges how long anything took."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from detection.engine.optim.amp import multiplies_bfloat16

SCRIPTS = Path(__file__).parents[3] / "scripts"
RECORD_KEYS = {"benchmark", "command", "date", "git", "hardware", "versions", "settings", "device"}
SMALL = ["--min-size", "64", "--max-size", "96", "--batch-size", "1", "--repeats", "1"]
TOY = [*SMALL, "--threads", "1"]


needs_memory_of_processes = pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="the system does not tell the memory of processes"
)


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


@pytest.fixture
def in_this_process(script, monkeypatch):
    """in_this_process("eval"): calls that this benchmark gives processes of their own, which take seconds to start."""

    def here(name):
        monkeypatch.setattr(script(f"benchmarks.{name}"), "in_own_process", lambda call, *words: call(*words))

    return here


@pytest.mark.slow
def test_train_measures_both_steps_and_takes_them_apart(measured, capsys, tmp_path):
    trace = tmp_path / "trace.json"
    variants = ["torchvision-fp32", "ours-fp32-cl"]
    options = [*TOY, "--device", "cpu", "--variants", *variants, "--inference", "--profile", trace]
    record = measured("train", "--model", "mask_rcnn_r18_fpn", *options)
    assert [row["name"] for row in record["train"]] == variants
    assert all("loss_mask" in row["losses"] for row in record["train"])
    for row in [*record["train"], *record["inference"]["batch"], *record["inference"]["one_image"]]:
        assert row["seconds"].keys() == {"median", "min", "max", "values"}
        assert row["ratios"].keys() == {"torchvision-fp32"}
        assert row["images_per_second"] > 0
    assert all(np.isfinite(list(row["losses"].values())).all() and row["losses"] for row in record["train"])
    for stages in record["stage_seconds"].values():
        # A stage at zero is one whose functions are not called any more, so that its time hides in another's.
        assert all(seconds > 0 for seconds in stages.values()), stages
    waits = {name: sum(kinds.values()) for name, kinds in record["waits"].items()}
    assert waits["ours-fp32-cl"] < waits["torchvision-fp32"]
    assert record["gflop_per_image"].keys() == {"torchvision", "ours"}
    assert record["utilization"].keys() == set(variants)
    if Path("/proc/self/status").exists():
        # Weights, gradients and momentum of a ResNet-18 detector are 0.3 GB alone.
        assert all(0.3 < record["peak_memory_gb"][name] < 3 for name in variants)
    assert {"traceEvents"} <= json.loads(trace.read_text()).keys()
    assert "x torchvision-fp32" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(
    not multiplies_bfloat16(torch.device("cpu")),
    reason="its variants take minutes where the processor emulates bfloat16",
)
def test_an_ablation_turns_one_setting_after_the_other_off(measured):
    record = measured("train", "--model", "faster_rcnn_r18_fpn", *TOY, "--device", "cpu", "--ablation")
    without = {row["variant"]: row["without"] for row in record["ablation"]}
    assert list(without)[:2] == ["ours-fp32-cl", "ours-bf16"]
    assert without["ours-bf16-cl-without-fused-optimizer"] == "fused SGD"
    for row, timed in zip(record["ablation"], record["train"][1:], strict=True):
        expected = timed["seconds"]["median"] / record["train"][0]["seconds"]["median"]
        assert row["ratio"]["median"] == pytest.approx(expected)


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


@pytest.mark.slow
def test_data_measures_each_way_alone_and_through_a_worker_on_a_set_of_ones_own(measured, script, tmp_path):
    annotations = script("benchmarks.scenes").write_images(tmp_path / "own", [(64, 48), (48, 64)], seed=5)
    record = measured("data", *SMALL, "--images", tmp_path / "own", "--annotations", annotations)
    assert record["images"] == 2
    rows = {row["name"]: row for row in record["chains"]}
    assert {"ours, Pillow, worker", "torchvision reference, worker + device", "Pillow, decode alone"} <= rows.keys()
    assert all(row["images_per_second"] > 0 for row in rows.values())
    assert "torchvision reference, worker" in rows["ours, Pillow, worker"]["ratios"]
    streams = {row["name"]: row for row in record["through_a_worker"]}
    assert {"ours, Pillow", "torchvision reference", "torchvision reference with its model's part"} <= streams.keys()
    for row in streams.values():
        assert row["worker_cpu_seconds"]["min"] > 0 and row["main_cpu_seconds"]["min"] > 0
        assert "all of torchvision reference" in row["ratios"]


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


@pytest.mark.slow
@needs_memory_of_processes
def test_memory_is_watched_epoch_by_epoch(measured):
    record = measured("memory", "--epochs", 2, "--workers", 1, "--listed", 40)
    for name in ("ours", "a list of dicts"):
        epochs = record[name]["epochs"]
        assert [len(one["workers"]) for one in epochs] == [1, 1]
        assert all(0 < one["workers"][0]["pss"] < one["workers"][0]["rss"] for one in epochs)
    assert record["ours"]["seconds_to_first_batch"] > 0


@pytest.mark.slow
@needs_memory_of_processes
def test_memory_of_processes_that_share_a_set_is_compared_with_a_small_set(measured, capsys):
    record = measured("memory", "--processes", 2, "--workers", 1, "--listed", 1200, "--batch-size", 2)
    assert [one["images"] for one in record["sets"]] == [1000, 1200]
    for one in record["sets"]:
        assert [len(process["workers"]) for process in one["processes"]] == [1, 1]
        assert all(0 < process["main"]["private"] < process["main"]["rss"] for process in one["processes"])
    assert "2 processes with 1 workers each" in capsys.readouterr().out


@pytest.mark.slow
def test_eval_compares_all_twelve_figures_with_pycocotools(measured, in_this_process):
    in_this_process("eval")
    record = measured("eval", "--images", 12, "--detections", 20)
    rows = {row["name"]: row for row in record["backends"]}
    judge = rows["pycocotools"]
    assert len(judge["stats"]) == judge["equal_figures"] == 12
    assert 0 < judge["stats"]["mAP"] < 1
    for row in rows.values():
        assert row["largest_difference"] < 1e-3
        assert row["cpu_seconds"]["median"] > 0 and row["peak_mb"]["median"] > 0
    assert judge["results_file_cpu_seconds"]["median"] > 0


@pytest.mark.slow
def test_startup_measures_the_way_to_the_first_iteration_and_reading_annotations(measured, in_this_process):
    in_this_process("startup")
    record = measured("startup", "--repeats", 1, "--annotation-images", 40, "--boxes-per-image", 2)
    assert len(record["startup"]) == 4
    readers = {row["name"] for row in record["annotations"]["readers"]}
    assert readers == {"json.loads", "pycocotools.COCO", "ours, first start", "ours, later starts"}
    for row in [*record["startup"], *record["annotations"]["readers"]]:
        assert row["seconds"]["median"] > 0 and row["cpu_seconds"]["median"] > 0
    assert record["annotations"]["boxes"] >= 40


@pytest.mark.slow
def test_scaling_compares_processes_together_with_one_alone(measured):
    options = ["--nproc", 2, "--model", "faster_rcnn_r18_fpn", "--height", 64, "--width", 96, "--batch-size", 1]
    options += ["--repeats", 1, "--threads", 1, "--device", "cpu", "--variants", "ours-fp32-cl"]
    record = measured("train", *options)
    alone, apart, together = record["scaling"]
    assert alone["name"] == "one process alone" and together["name"] == "all, gradients exchanged"
    expected = alone["seconds"]["median"] / together["seconds"]["median"]
    assert record["scaling_efficiency"]["median"] == pytest.approx(expected)


def test_variants_alternate_in_an_order_that_rotates_and_ratios_come_from_pairs_of_one_round(script):
    ratio = script("benchmarks.figures").pairwise_ratio([1.0, 10.0, 2.0], [2.0, 30.0, 8.0])
    assert (ratio["median"], ratio["min"], ratio["max"]) == (3.0, 2.0, 4.0)
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    samples = script("benchmarks.figures").interleave(runs, 2)
    assert "".join(order) == "abc" + "abc" + "bca"
    assert all(len(sample["seconds"]) == len(sample["cpu_seconds"]) == 2 for sample in samples.values())


def inner():
    pass


def outer():
    pass


def test_a_stage_inside_another_counts_once_and_a_gpus_work_for_the_stage_that_launched_it(script):
    profilers = script("benchmarks.profilers")
    file = f"tests/{Path(__file__).parent.name}/{Path(__file__).name}"
    calls = [
        event("python_function", f"{file}({outer.__code__.co_firstlineno}): outer", 10, 40),
        event("python_function", f"{file}({inner.__code__.co_firstlineno}): inner", 20, 10),
        event("cpu_op", "aten::add", 60, 10),
    ]
    functions = {"outer": (outer,), "inner": (inner,)}
    seconds = profilers.StageSpans(calls, functions).seconds(calls)
    assert (seconds["outer"], seconds["inner"], seconds["rest"]) == pytest.approx((30e-6, 10e-6, 20e-6))
    launch = event("cuda_runtime", "cudaLaunchKernel", 25, 1) | {"args": {"correlation": 7}}
    kernel = event("kernel", "add", 300, 50) | {"args": {"correlation": 7}}
    events = [*calls, launch, kernel]
    seconds = profilers.StageSpans(events, functions).seconds(events)
    assert seconds["inner"] == pytest.approx(50e-6) and "outer" not in seconds


def test_waits_are_counted_by_kind(script):
    profilers = script("benchmarks.profilers")

    def run():
        values = torch.arange(6.0)
        values[values > 2]
        values.nonzero()
        values.sum().item()

    events = profilers.profile(run, torch.device("cpu"))
    counts = profilers.count_waits(events, profilers.StageSpans(events, {}), 1)
    assert counts == {"nonzero": 2, "scalar read by the host": 1}
    on_gpu = [event("kernel", "add", 0, 5), event("cuda_runtime", "cudaStreamSynchronize", 1, 5)]
    assert profilers.count_waits(on_gpu, profilers.StageSpans(on_gpu, {}), 1) == {"CUDA runtime": 1}


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


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_gpu_figures_read_kernels_launches_and_busy_time_from_a_trace(script, tmp_path, name):
    trace = tmp_path / name
    content = json.dumps(TRACE).encode()
    trace.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    profilers = script("benchmarks.profilers")
    figures = profilers.gpu_figures(profilers.read_trace(trace), 2)
    assert figures.pop("gpu_busy_seconds_per_step") == pytest.approx(40e-6)
    assert figures == {"kernels_per_step": 1, "launches_per_step": 1, "copies_per_step": 1}
    assert set(profilers.gpu_figures([event("cpu_op", "aten::add", 0, 1)], 1).values()) == {0}


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
        (["train", "--nproc", "2", "--ablation"], "leave --nproc away"),
        (["train", "--height", "320"], "--width"),
        (["train", "--model", "faster_rcnn_x101_32x4d_fpn", *TOY], "resnext101_32x4d"),
        (["data", "--images", "somewhere"], "--annotations"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(script, capsys, argv, words):
    assert script("benchmark").main(argv) == 1
    assert words in capsys.readouterr().err


def traffic(file, *more):
    """The record and the text of a process of its own: the device that is pretended stays with the process."""
    options = ["--model", "faster_rcnn_r18_fpn", "--height", "256", "--width", "320", *more]
    command = [sys.executable, str(SCRIPTS / "benchmark.py"), "traffic", *options, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "needs a newer PyTorch" in done.stderr:
        pytest.skip("this PyTorch lets nobody pretend a device")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(file.read_text()), done.stdout


@pytest.mark.slow
def test_a_detection_is_one_launch_and_the_selection_which_asks_for_nothing_before(tmp_path):
    """An operator of the recorded part that the host would have to wait for fails on the pretended GPU."""
    record, text = traffic(tmp_path / "f.json", "--batch-size", "1", "--inference")
    counts = record["traffic"]["kernels"]
    assert sum(row["calls"] for row in counts.values()) > 200 and "backward" not in counts
    assert int(text.split("as written, ")[1].split()[0]) < 100


@pytest.mark.slow
def test_traffic_counts_a_steps_bytes_with_and_without_kernels(tmp_path):
    record, text = traffic(tmp_path / "f.json", "--batch-size", "2")
    operators, kernels = record["traffic"]["operators"], record["traffic"]["kernels"]
    assert "whole step" in text and operators.keys() == kernels.keys()
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


def test_data_reads_many_small_files_and_their_shards(measured):
    record = measured("data", "--small-files", "1200", "--small-kilobytes", "0.5", "--repeats", "1")
    assert [row["name"] for row in record["rows"]] == [
        "files, checked",
        "shards, checked",
        "files, read",
        "shards, read",
    ]
    assert len(record["uncached_images_per_second"]) == 2 and min(record["uncached_images_per_second"]) > 0


def test_eval_by_lviss_rules_gives_its_thirteen_figures(measured, in_this_process):
    in_this_process("eval")
    record = measured("eval", "--lvis", "--images", "3", "--detections", "20", "--classes", "9")
    assert all({"mAP_r", "AR_300"} < row["stats"].keys() for row in record["backends"])
    assert record["backends"][-1]["equal_figures"] == 13


@pytest.mark.slow
def test_startup_starts_many_processes_without_a_model(script, measured):
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import benchmark; sys.exit(benchmark.main())"
    words = ["startup", "--processes", "2", "3"]
    done = subprocess.run([sys.executable, "-c", code, str(SCRIPTS), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line[:1].isdigit() and "," not in line]
    assert [row[0] for row in rows[-2:]] == ["2", "3"]
