"""The training step beside torchvision's: time, memory, synchronizations, stages, and FLOPs against the machine's."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import checkout  # noqa: F401
from benchmarks.ablation import ablation_rows, ablation_table, ablation_variants
from benchmarks.exchange import measure_exchange
from benchmarks.inputs import add_image_arguments, open_images, train_loader
from benchmarks.machine import add_common_arguments
from benchmarks.peak_memory import peak_memory_on_cpu
from benchmarks.profilers import (
    REST,
    StageClock,
    count_cuda_waits,
    count_flops,
    count_waits,
    gpu_figures,
    matmul_rate,
    synchronize,
    wrapped,
    write_trace,
)
from benchmarks.scaling import measure_scaling
from benchmarks.scenes import native_size
from benchmarks.steps import build_step
from benchmarks.timing import BenchmarkError, Samples, format_table, interleave, timing_rows, timing_table
from benchmarks.torchvision_peer import starting_weights
from benchmarks.variants import STAGES, Step, Variant, Work
from data import CocoDataset, RawBatch

_DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_GPU_BLOCKS = 2  # untimed passes over the batches before anything is measured on a GPU
# Defaults that give a table in a couple of minutes on two cores, and that fill a GPU.
_CPU_DEFAULTS = {"batch_size": 2, "batches": 1, "min_size": 320, "max_size": 533}
_GPU_DEFAULTS = {"batch_size": 16, "batches": 10, "min_size": 800, "max_size": 1333}

Say = Callable[[str], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, repeats=5)
    add_image_arguments(parser, num_images=0)
    parser.add_argument("--model", default="faster_rcnn_r50_fpn", help="our model [faster_rcnn_r50_fpn]")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, help="torch's threads on the CPU [torch's own choice]")
    parser.add_argument("--batch-size", type=int, help="images a step [2 on a CPU, 16 on a GPU]")
    parser.add_argument(
        "--batches", type=int, help="different batches a round; a round trains one step on each [1, 10]"
    )
    parser.add_argument("--min-size", type=int, help="shorter side of the resize [320 on a CPU, 800 on a GPU]")
    parser.add_argument("--max-size", type=int, help="longest side [533, 1333]")
    parser.add_argument("--height", type=int, help="with --width: every image has this network size")
    parser.add_argument("--width", type=int)
    parser.add_argument(
        "--amp", choices=["off", "bf16", "fp16"], default="bf16", help="precision of the variants [bf16]"
    )
    parser.add_argument("--compile", action="store_true", help="also the compiled variants")
    parser.add_argument("--graphs", action="store_true", help="also ours in CUDA graphs, on a GPU")
    parser.add_argument(
        "--variants", nargs="+", metavar="NAME", help="instead of the usual ones, e.g. ours-fp32 ours-bf16-cl"
    )
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: CPU-seconds, for a machine that others use too"
    )
    parser.add_argument("--inference", action="store_true", help="also images/s, and the latency of one image")
    parser.add_argument(
        "--ablation",
        action="store_true",
        help="ours alone: each optimization taken out in turn, in the same run; with --nproc, settings of the exchange",
    )
    parser.add_argument(
        "--nproc",
        type=int,
        metavar="N",
        help="scaling: images/s of N processes (GPUs, or CPU processes) over N times one",
    )
    parser.add_argument("--no-probes", action="store_true", help="times only: no stages, synchronizations and FLOPs")
    parser.add_argument("--profile", metavar="FILE", help="write a Chrome trace of the last of our variants")


def run(arguments: argparse.Namespace, say: Say) -> tuple[dict[str, Any], str]:
    """The figures for the JSON file, and the tables."""
    device = _device(arguments)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if arguments.nproc is not None:
        measure = measure_exchange if arguments.ablation else measure_scaling
        return measure(arguments, device, say)
    ablated: dict[str, str] = {}
    if arguments.ablation:
        ablated = ablation_variants(arguments.amp, device, compiled=arguments.compile)
    variants = [Variant.parse(name) for name in arguments.variants or list(ablated) or _usual_variants(arguments)]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark_")))
        work = _work(arguments, device, folder, stack)
        steps, resident = _build(variants, work, say)
        if ablated:
            return _ablation(arguments, work, steps, ablated, say)
        return _measure(arguments, work, steps, resident, say)


def _ablation(
    arguments: argparse.Namespace, work: Work, steps: Mapping[str, Step], ablated: Mapping[str, str], say: Say
) -> tuple[dict[str, Any], str]:
    figures, samples = _timed(arguments, work, steps, [], say)
    ablated = {name: text for name, text in ablated.items() if name in samples}
    figures["ablation"] = ablation_rows(ablated, {name: samples[name].by(arguments.clock) for name in ablated})
    times = timing_table(figures["train"], clock=arguments.clock, rate="images/s", units=figures["batch_size"])
    return figures, "\n".join([_describe(figures), "", times, "", ablation_table(figures["ablation"])])


def _measure(
    arguments: argparse.Namespace,
    work: Work,
    steps: Mapping[str, Step],
    resident: Mapping[str, int],
    say: Say,
) -> tuple[dict[str, Any], str]:
    device, batches = work.device, work.batches
    peers = [name for name, step in steps.items() if step.variant.owner == "torchvision"]
    figures, _ = _timed(arguments, work, steps, peers, say)
    rows, batch_size = figures["train"], figures["batch_size"]
    texts = [_describe(figures), "", timing_table(rows, clock=arguments.clock, rate="images/s", units=batch_size)]
    if device.type == "cuda":
        figures["peak_memory_gb"] = _peak_memory(steps, batches, resident)
    elif not arguments.no_probes:
        say("peak memory")
        figures["peak_memory_gb"] = peak_memory_on_cpu([step.variant for step in steps.values()], work)
    if peaks := figures.get("peak_memory_gb"):
        texts += ["", "peak memory: " + ", ".join(f"{name} {peak:.2f} GB" for name, peak in peaks.items())]
    if arguments.inference:
        figures["inference"], text = _inference(arguments, work, steps, peers, say)
        texts += ["", text]
    if not arguments.no_probes:
        say("probes")
        figures |= _probes(steps, work, rows, arguments.clock)
        texts += ["", _probe_tables(figures)]
    ours = [step for step in steps.values() if step.variant.owner == "ours"]
    if ours and (arguments.profile or device.type == "cuda"):
        with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
            file = Path(arguments.profile or Path(folder) / "trace.json")
            write_trace(partial(ours[-1].train, batches), file, device)
            if device.type == "cuda":
                (row,) = (row for row in rows if row["name"] == ours[-1].variant.name)
                figures["gpu"] = {"variant": row["name"], **_gpu_figures(file, len(batches), row["seconds"]["median"])}
                texts += ["", _gpu_line(figures["gpu"])]
            if arguments.profile:
                texts += ["", f"trace of {ours[-1].variant.name}: {file}"]
    return figures, "\n".join(texts)


def _timed(
    arguments: argparse.Namespace, work: Work, steps: Mapping[str, Step], peers: Sequence[str], say: Say
) -> tuple[dict[str, Any], dict[str, Samples]]:
    """Seconds of the training steps, in an interleaved run; and every single one."""
    device, batches = work.device, work.batches
    batch_size = len(batches[0])
    timed = {name: partial(step.train, batches) for name, step in steps.items()}
    settle = {name: step.settle for name, step in steps.items()}
    samples = interleave(timed, arguments.repeats, wait=partial(synchronize, device), say=say, settle=settle)
    rows = timing_rows(samples, peers, units=len(batches), clock=arguments.clock)
    key = "seconds" if arguments.clock == "wall" else "cpu_seconds"
    for row in rows:
        row["images_per_second"] = batch_size / row[key]["median"]
        row["losses"] = steps[row["name"]].losses()
    figures: dict[str, Any] = {
        "device": device.type,
        "threads": torch.get_num_threads(),
        "clock": arguments.clock,
        "batch_size": batch_size,
        "shapes": [list(batch.padded_size) for batch in batches],
        "padding_share": _padding_share(batches),
        "boxes_per_image": sum(int(batch.valid.sum()) for batch in batches) / (batch_size * len(batches)),
        "train": rows,
    }
    return figures, samples


def _device(arguments: argparse.Namespace) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if arguments.device == "cuda" and not has_gpu:
        raise BenchmarkError("--device cuda: PyTorch sees no CUDA device here")
    device = torch.device("cuda", 0) if has_gpu and arguments.device != "cpu" else torch.device("cpu")
    if arguments.amp == "fp16" and device.type == "cpu":
        raise BenchmarkError("--amp fp16 is for GPUs; take bf16 on a CPU")
    for name, value in (_GPU_DEFAULTS if device.type == "cuda" else _CPU_DEFAULTS).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if device.type == "cpu" and arguments.graphs:
        raise BenchmarkError("--graphs is for GPUs: leave it away on a CPU")
    if (arguments.height is None) != (arguments.width is None):
        raise BenchmarkError("--height and --width go together")
    return device


def _usual_variants(arguments: argparse.Namespace) -> list[str]:
    precision = "fp32" if arguments.amp == "off" else arguments.amp
    names = ["torchvision-fp32"]
    names += [f"torchvision-{precision}-cl"]
    names += [f"torchvision-{precision}-cl-compile"] if arguments.compile else []
    names += [f"ours-{precision}-cl"]
    names += [f"ours-{precision}-cl-compile"] if arguments.compile else []
    if arguments.graphs:
        names += [f"{name}-graphs" for name in names if name.startswith("ours")]
    return names


def _work(arguments: argparse.Namespace, device: torch.device, folder: Path, stack: contextlib.ExitStack) -> Work:
    size = None
    min_size, max_size = arguments.min_size, arguments.max_size
    if arguments.height is not None:
        size = native_size(arguments.height, arguments.width)
        min_size, max_size = sorted((arguments.height, arguments.width))
    arguments.pictures = arguments.pictures or arguments.batch_size * arguments.batches
    dataset = open_images(arguments, folder, size=size)
    batches = load_batches(arguments, dataset, min_size, max_size, device)
    num_classes = len(dataset.class_names)
    weights = stack.enter_context(starting_weights(arguments.model, num_classes, batches[0]))
    loader = train_loader(arguments, dataset, (min_size, max_size))
    return Work(arguments.model, num_classes, min_size, max_size, device, loader, tuple(batches), weights)


def load_batches(
    arguments: argparse.Namespace, dataset: CocoDataset, min_size: int, max_size: int, device: torch.device
) -> list[RawBatch]:
    """The first batches of a training on the set."""
    loader = train_loader(arguments, dataset, (min_size, max_size))
    batches = list(loader.batches(0, arguments.batches))
    return [batch.pin_memory() for batch in batches] if device.type == "cuda" else batches


def _build(variants: Sequence[Variant], work: Work, say: Say) -> tuple[dict[str, Step], dict[str, int]]:
    """The steps, and on a GPU the bytes that each keeps there between steps."""
    steps, resident = {}, {}
    for variant in variants:
        say(f"building {variant.name}")
        before = torch.cuda.memory_allocated() if work.device.type == "cuda" else 0
        steps[variant.name] = build_step(variant, work)
        if work.device.type == "cuda":
            for _ in range(_GPU_BLOCKS):
                steps[variant.name].train(work.batches)
            torch.cuda.synchronize()
            resident[variant.name] = torch.cuda.memory_allocated() - before
    return steps, resident


def _peak_memory(
    steps: Mapping[str, Step], batches: Sequence[RawBatch], resident: Mapping[str, int]
) -> dict[str, float]:
    """GB at the highest point of a step, had the variant the GPU to itself."""
    peaks = {}
    for name, step in steps.items():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step.train(batches)
        torch.cuda.synchronize()
        peaks[name] = (torch.cuda.max_memory_allocated() - before + resident[name]) / 2**30
    return peaks


def _inference(
    arguments: argparse.Namespace, work: Work, steps: Mapping[str, Step], peers: Sequence[str], say: Say
) -> tuple[dict[str, Any], str]:
    """Images/s at the batch size, and the latency of one image: from decoded pixels to detections on the host."""
    dataset = work.loader.dataset
    one = argparse.Namespace(**{**vars(arguments), "batch_size": 1})
    single = load_batches(one, dataset, work.min_size, work.max_size, work.device)[: max(1, arguments.batches)]
    results, texts = {}, []
    for title, batches in (("batch", work.batches), ("one_image", tuple(single))):
        timed = {name: partial(step.detect, batches) for name, step in steps.items()}
        settle = {name: step.settle for name, step in steps.items()}
        samples = interleave(timed, arguments.repeats, wait=partial(synchronize, work.device), say=say, settle=settle)
        results[title] = timing_rows(samples, peers, units=len(batches), clock=arguments.clock)
        number = len(batches[0])
        for row in results[title]:
            row["images_per_second"] = number / row["seconds" if arguments.clock == "wall" else "cpu_seconds"]["median"]
        texts.append(f"inference, {number} image{'s' if number > 1 else ''} at a time")
        texts.append(timing_table(results[title], clock=arguments.clock, rate="images/s", units=number))
    return results, "\n".join(texts)


def _probes(steps: Mapping[str, Step], work: Work, rows: Sequence[Mapping[str, Any]], clock: str) -> dict[str, Any]:
    ticks = time.perf_counter if clock == "wall" else time.process_time
    stages, waits, missing = {}, {}, []
    for name, step in steps.items():
        if step.variant.graphs:  # a replay calls nothing that could be timed
            continue
        step.settle(partial(step.train, work.batches))
        stages[name], absent = stage_seconds(step, work, ticks)
        missing += absent
        if not step.variant.compiled:
            waits[name] = count_waits(partial(step.train, work.batches[:1]))
            if work.device.type == "cuda":
                # The second step's: a block ends with a logging step, where ours reads its losses.
                one, two = (count_cuda_waits(partial(step.train, work.batches[:1] * number)) for number in (1, 2))
                waits[name]["cuda_runtime"] = two - one
    # Ours does less work for the same losses (the RPN learns at its samples only), so each owner's own is counted.
    flops: dict[str, float] = {}
    for step in steps.values():
        if step.variant.owner not in flops:
            counted = count_flops(partial(step.train, work.batches))
            flops[step.variant.owner] = counted / sum(map(len, work.batches))
    precisions = sorted({step.variant.amp for step in steps.values()})
    rates = {amp: matmul_rate(work.device, _DTYPES[amp], ticks) for amp in precisions}
    utilization = {}
    for row in rows:
        variant = steps[row["name"]].variant
        utilization[row["name"]] = flops[variant.owner] * row["images_per_second"] / rates[variant.amp]
    return {
        "stage_seconds": stages,
        "stages_not_found": missing,
        "waits": waits,
        "gflop_per_image": {owner: number / 1e9 for owner, number in flops.items()},
        "matmul_gflops": {"fp32" if amp == "off" else amp: rate / 1e9 for amp, rate in rates.items()},
        "utilization": utilization,
    }


def stage_seconds(step: Step, work: Work, ticks: Callable[[], float]) -> tuple[dict[str, float], list[str]]:
    """Seconds a step by stage, from one pass over the batches; and what could not be found to be timed."""
    clock = StageClock(work.device, ticks)
    with wrapped(clock, step.stages()) as missing:
        with clock.stage(REST):
            step.train(work.batches)
        seconds = clock.seconds()
    return {stage: seconds.get(stage, 0.0) / len(work.batches) for stage in (*STAGES, REST)}, missing


def _probe_tables(figures: Mapping[str, Any]) -> str:
    names = list(figures["stage_seconds"])
    cells = []
    for stage in (*STAGES, REST):
        line = [stage]
        for name in names:
            seconds = figures["stage_seconds"][name]
            line.append(f"{seconds[stage] * 1e3:.1f} ({seconds[stage] / sum(seconds.values()):.0%})")
        cells.append(line)
    texts = ["stages, ms a step of one instrumented pass", format_table(["", *names], cells)]
    if figures["stages_not_found"]:
        texts.append(f"not found, so counted elsewhere: {', '.join(figures['stages_not_found'])}")
    cells = []
    for name, kinds in figures["waits"].items():
        down, up = sum(kinds["device_to_host"].values()), sum(kinds["host_to_device"].values())
        detail = ", ".join(
            f"{kind} {number}" for kind, number in {**kinds["device_to_host"], **kinds["host_to_device"]}.items()
        )
        cells.append([name, str(down), str(up), str(kinds.get("cuda_runtime", "-")), detail])
    texts += ["", "synchronizations a step: device to host, host to device, as the CUDA runtime counts them"]
    texts.append(format_table(["", "to host", "to device", "runtime", "kinds"], cells))
    work = ", ".join(f"{owner} {number:.1f}" for owner, number in figures["gflop_per_image"].items())
    rates = ", ".join(f"{amp} {rate:,.0f}" for amp, rate in figures["matmul_gflops"].items())
    shares = ", ".join(f"{name} {share:.0%}" for name, share in figures["utilization"].items())
    texts += ["", f"GFLOP an image: {work}; GFLOP/s of a matrix multiplication: {rates}; share reached: {shares}"]
    return "\n".join(texts)


def _gpu_figures(trace: Path, num_steps: int, step_seconds: float) -> dict[str, float]:
    """Also the idle share of the timed steps: a profiler slows the host down, and so lets the GPU wait more."""
    figures = gpu_figures(trace, num_steps)
    if "gpu_busy_seconds_per_step" in figures:
        figures["idle_share"] = max(0.0, 1 - figures["gpu_busy_seconds_per_step"] / step_seconds)
    return figures


def _gpu_line(figures: Mapping[str, Any]) -> str:
    counts = ("kernels_per_step", "launches_per_step", "copies_per_step")
    text = ", ".join(f"{figures[name]:,.0f} {name.removesuffix('_per_step')}" for name in counts)
    if "idle_share" not in figures:
        return f"GPU work of {figures['variant']}, a step: none in the trace"
    busy = f"busy {figures['gpu_busy_seconds_per_step'] * 1e3:.1f} ms"
    idle = f"idle {figures['idle_share']:.0%} of a timed step ({figures['gpu_idle_share']:.0%} under the profiler)"
    return f"GPU work of {figures['variant']}, a step: {text}, {busy}; {idle}"


def _padding_share(batches: Sequence[RawBatch]) -> float:
    """Share of the batches' pixels that lie outside the images."""
    inside = sum(height * width for batch in batches for height, width in batch.resized_sizes)
    return 1 - inside / sum(len(batch) * batch.padded_size[0] * batch.padded_size[1] for batch in batches)


def _describe(figures: Mapping[str, Any]) -> str:
    shapes = ", ".join(sorted({f"{height}x{width}" for height, width in figures["shapes"]}))
    place = f"{figures['threads']} threads" if figures["device"] == "cpu" else "GPU"
    return (
        f"training step, {place}, batch {figures['batch_size']}, padded to {shapes} "
        f"({figures['padding_share']:.0%} padding), {figures['boxes_per_image']:.1f} boxes an image"
    )
