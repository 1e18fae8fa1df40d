"""The training step beside torchvision's: time, memory, synchronizations, stages, and FLOPs against the machine's."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import torch

import checkout  # noqa: F401
from benchmarks import profilers
from benchmarks.figures import (
    CLOCKS,
    BenchmarkError,
    Say,
    add_common_arguments,
    figure_rows,
    figure_table,
    format_table,
    in_own_process,
    interleave,
    nested_table,
    ratio_cell,
    spread,
)
from benchmarks.profilers import MASK_HEAD, STAGES, synchronize
from benchmarks.scaling import measure_scaling
from benchmarks.scenes import add_image_arguments
from benchmarks.steps import DTYPES, SWITCHES, Step, Variant, Work, build_step, load_work
from data import RawBatch

_GPU_BLOCKS = 2  # untimed passes over the batches before anything is measured on a GPU
# Defaults that give a table in a couple of minutes on two cores, and that fill a GPU.
_CPU_DEFAULTS = {"batch_size": 2, "batches": 1, "min_size": 320, "max_size": 533}
_GPU_DEFAULTS = {"batch_size": 16, "batches": 10, "min_size": 800, "max_size": 1333}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, repeats=5)
    add_image_arguments(parser, num_images=0)
    add = parser.add_argument
    add("--model", default="faster_rcnn_r50_fpn", help="our model [faster_rcnn_r50_fpn]")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--threads", type=int, help="torch's threads on the CPU [torch's own choice]")
    add("--batch-size", type=int, help="images a step [2 on a CPU, 16 on a GPU]")
    add("--batches", type=int, help="different batches a round; a round trains one step on each [1, 10]")
    add("--min-size", type=int, help="shorter side of the resize [320 on a CPU, 800 on a GPU]")
    add("--max-size", type=int, help="longest side [533, 1333]")
    add("--height", type=int, help="with --width: every image has this network size")
    add("--width", type=int)
    add("--amp", choices=["off", "bf16", "fp16"], default="bf16", help="precision of the variants [bf16]")
    add("--compile", action="store_true", help="also the compiled variants")
    add("--graphs", action="store_true", help="also ours in CUDA graphs, on a GPU")
    add("--variants", nargs="+", metavar="NAME", help="instead of the usual ones, e.g. ours-fp32 ours-bf16-cl")
    add("--clock", choices=list(CLOCKS), default="wall", help="cpu: CPU-seconds, for a machine that others use too")
    add("--inference", action="store_true", help="also images/s, and the latency of one image")
    add("--ablation", action="store_true", help="ours alone: each setting turned off in turn, in the same run")
    add("--nproc", type=int, metavar="N", help="scaling: images/s of N processes over N times one")
    add("--no-probes", action="store_true", help="times only: no stages, synchronizations and FLOPs")
    add("--profile", metavar="FILE", help="write a Chrome trace of the last of our variants")


def run(arguments: argparse.Namespace, say: Say) -> tuple[dict[str, Any], str]:
    """The figures for the JSON file, and the tables."""
    arguments = argparse.Namespace(**vars(arguments))
    device = _device(arguments)
    ablated = _ablation_variants(arguments, device) if arguments.ablation else {}
    names = arguments.variants or list(ablated) or _usual_variants(arguments)
    variants = [Variant.parse(name) for name in names]
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        if arguments.nproc is not None:
            return measure_scaling(arguments, variants[-1], device, Path(folder), say)
        comparison = Comparison(arguments, variants, load_work(arguments, Path(folder), device), say)
        figures, texts = comparison.training()
        more = comparison.ablation(figures["train"], ablated) if ablated else comparison.everything_else(figures)
        return figures | more[0], "\n\n".join([*texts, *more[1]])


def _device(arguments: argparse.Namespace) -> torch.device:
    """The device, with the defaults of its kind filled in."""
    has_gpu = torch.cuda.is_available()
    if arguments.device == "cuda" and not has_gpu:
        raise BenchmarkError("--device cuda: PyTorch sees no CUDA device here")
    device = torch.device("cuda", 0) if has_gpu and arguments.device != "cpu" else torch.device("cpu")
    if arguments.amp == "fp16" and device.type == "cpu":
        raise BenchmarkError("--amp fp16 is for GPUs; take bf16 on a CPU")
    if arguments.graphs and device.type == "cpu":
        raise BenchmarkError("--graphs is for GPUs: leave it away on a CPU")
    if (arguments.height is None) != (arguments.width is None):
        raise BenchmarkError("--height and --width go together")
    for name, value in (_GPU_DEFAULTS if device.type == "cuda" else _CPU_DEFAULTS).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.pictures = arguments.pictures or arguments.batch_size * arguments.batches
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    return device


def _usual_variants(arguments: argparse.Namespace) -> list[str]:
    precision = "fp32" if arguments.amp == "off" else arguments.amp
    compiled = ["-compile"] if arguments.compile else []
    names = ["torchvision-fp32", *(f"torchvision-{precision}-cl{how}" for how in ("", *compiled))]
    ours = [f"ours-{precision}-cl{how}" for how in ("", *compiled)]
    return names + ours + ([f"{name}-graphs" for name in ours] if arguments.graphs else [])


def _ablation_variants(arguments: argparse.Namespace, device: torch.device) -> dict[str, str]:
    """Ours, and beside it ours with one setting turned off: variant -> what it does without."""
    if arguments.nproc is not None:
        raise BenchmarkError("--ablation is for one process: leave --nproc away")
    precision = "fp32" if arguments.amp == "off" else arguments.amp
    full = f"ours-{precision}-cl"
    found = {full: "nothing"}
    if precision != "fp32":
        found["ours-fp32-cl"] = f"{precision} (float32 instead)"
    found[f"ours-{precision}"] = "channels-last"
    for name, switch in SWITCHES.items():
        if switch.device in (None, device.type) and not switch.of_compiled:
            found[f"{full}-without-{name}"] = switch.text
    if arguments.compile:
        found[f"{full}-compile"] = "(with --compile added)"
        for name, switch in SWITCHES.items():
            if switch.of_compiled and switch.device in (None, device.type):
                found[f"{full}-compile-without-{name}"] = f"{switch.text} (with --compile added)"
    return found


Found = tuple[dict[str, Any], list[str]]
"""Figures for the JSON file, and the texts that show them."""


class Comparison:
    """Variants of the training step on the same work."""

    def __init__(self, arguments: argparse.Namespace, variants: Sequence[Variant], work: Work, say: Say) -> None:
        self.arguments, self.work, self.say = arguments, work, say
        self.on_gpu = work.device.type == "cuda"
        self.key = CLOCKS[arguments.clock]
        self.steps: dict[str, Step] = {}
        self.peaks: dict[str, float] = {}
        """GB at the highest point of a step, had the variant the machine to itself"""
        for variant in variants:
            say(f"building {variant.name}")
            before = torch.cuda.memory_allocated() if self.on_gpu else 0
            step = self.steps[variant.name] = build_step(variant, work)
            if self.on_gpu:
                for _ in range(_GPU_BLOCKS):
                    step.train(work.batches)
                torch.cuda.reset_peak_memory_stats()
                step.train(work.batches)
                torch.cuda.synchronize()
                self.peaks[variant.name] = (torch.cuda.max_memory_allocated() - before) / 2**30
        torchvisions = [variant.name for variant in variants if variant.owner == "torchvision"]
        self.peers = [variants[0].name] if arguments.ablation else torchvisions

    def interleaved(
        self, runs: Mapping[str, Callable[[], None]], batches: Sequence[RawBatch]
    ) -> tuple[list[dict[str, Any]], str]:
        """The rows with images/s, and their table; a run goes over all of `batches`."""
        wait = partial(synchronize, self.work.device)
        samples = interleave(runs, self.arguments.repeats, wait=wait, say=self.say)
        rows = figure_rows(samples, self.peers, self.key, units=len(batches))
        for row in rows:
            row["images_per_second"] = len(batches[0]) / row[self.key]["median"]
        rate = {"images/s": lambda row: f"{row['images_per_second']:.2f}"}
        return rows, figure_table(rows, self.key, f"ms ({self.arguments.clock})", 1e3, **rate)

    def training(self) -> Found:
        """Seconds of the training steps."""
        batches, batch_size = self.work.batches, len(self.work.batches[0])
        rows, table = self.interleaved(
            {name: partial(step.train, batches) for name, step in self.steps.items()}, batches
        )
        for row in rows:
            row["losses"] = self.steps[row["name"]].losses()
        inside = sum(height * width for batch in batches for height, width in batch.resized_sizes)
        computed = batch_size * sum(batch.padded_size[0] * batch.padded_size[1] for batch in batches)
        figures: dict[str, Any] = {
            "device": self.work.device.type,
            "threads": torch.get_num_threads(),
            "clock": self.arguments.clock,
            "batch_size": batch_size,
            "shapes": [list(batch.padded_size) for batch in batches],
            "padding_share": 1 - inside / computed,
            "boxes_per_image": sum(int(batch.valid.sum()) for batch in batches) / (batch_size * len(batches)),
            "train": rows,
        }
        shapes = ", ".join(sorted({f"{height}x{width}" for height, width in figures["shapes"]}))
        place = "GPU" if self.on_gpu else f"{figures['threads']} threads"
        text = (
            f"training step, {place}, batch {batch_size}, padded to {shapes} "
            f"({figures['padding_share']:.0%} padding), {figures['boxes_per_image']:.1f} boxes an image"
        )
        return figures, [text, table]

    def ablation(self, rows: Sequence[Mapping[str, Any]], ablated: Mapping[str, str]) -> Found:
        """Each row's time over the first's, round by round: above 1, what it does without is worth having."""
        found = []
        for row in rows[1:]:
            ratio = spread([1 / value for value in row["ratios"][self.peers[0]]["values"]])
            found.append({"variant": row["name"], "without": ablated.get(row["name"], row["name"]), "ratio": ratio})
        cells = [[row["without"], ratio_cell(row["ratio"], 3)] for row in found]
        return {"ablation": found}, [format_table(["without", "x time of the whole"], cells)]

    def everything_else(self, figures: Mapping[str, Any]) -> Found:
        """Peak memory, inference, and what the profiler tells."""
        arguments, texts = self.arguments, []
        found: dict[str, Any] = {}
        if not self.on_gpu and not arguments.no_probes:
            self.say("peak memory")
            for name, step in self.steps.items():
                # The system may kill a process that takes too much: that one has no figure.
                with contextlib.suppress(BrokenProcessPool):
                    added = in_own_process(bytes_added, step.variant, self.work, torch.get_num_threads())
                    self.peaks[name] = added / 2**30
        if self.peaks:
            found["peak_memory_gb"] = self.peaks
            texts.append("peak memory: " + ", ".join(f"{name} {peak:.2f} GB" for name, peak in self.peaks.items()))
        if arguments.inference:
            found["inference"] = {}
            # Images/s at the batch size, and the latency of one image: from decoded pixels to detections on the host.
            one = argparse.Namespace(**{**vars(arguments), "batch_size": 1})
            single = load_work(one, self.work.weights.parent, self.work.device).batches
            for title, batches in (("batch", self.work.batches), ("one_image", single)):
                runs = {name: partial(step.detect, batches) for name, step in self.steps.items()}
                found["inference"][title], table = self.interleaved(runs, batches)
                texts.append(f"inference, images at a time: {len(batches[0])}\n{table}")
        if not arguments.no_probes:
            self.say("probes")
            found |= self.probes(figures["train"])
            texts += _probe_tables(found)
        elif arguments.profile:
            profilers.profile(partial(list(self.steps.values())[-1].train, self.work.batches), self.work.device,
                              arguments.profile)  # fmt: skip
        return found, texts

    def probes(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Stages, synchronizations and the GPU's work from a profile of each variant; FLOPs and the share reached."""
        arguments, work, steps = self.arguments, self.work, self.steps
        stages, waits, gpu = {}, {}, {}
        flops: dict[str, float] = {}
        for row in rows:
            name, step = row["name"], steps[row["name"]]
            run = partial(step.train, work.batches)
            events = profilers.profile(run, work.device, arguments.profile if name == rows[-1]["name"] else None)
            ours = step.variant.owner == "ours"
            spans = profilers.StageSpans(events, profilers.OUR_FUNCTIONS if ours else profilers.THEIR_FUNCTIONS)
            if not step.variant.graphs:  # a replay calls nothing that belongs to a stage
                seconds = spans.seconds(events)
                known = [stage for stage in STAGES if stage != MASK_HEAD or work.loader.dataset.has_masks]
                stages[name] = {stage: seconds[stage] / len(work.batches) for stage in known}
                waits[name] = profilers.count_waits(events, spans, len(work.batches))
            if self.on_gpu:
                gpu[name] = profilers.gpu_figures(events, len(work.batches))
                # Under the profiler, which slows the host, it is idle for longer.
                busy = gpu[name]["gpu_busy_seconds_per_step"]
                gpu[name]["idle_share"] = max(0.0, 1 - busy / row["seconds"]["median"])
            # Ours does less work for the same losses (the RPN learns at its samples only), so each owner's is counted.
            if step.variant.owner not in flops:
                flops[step.variant.owner] = profilers.count_flops(run) / sum(map(len, work.batches))
        ticks = time.perf_counter if arguments.clock == "wall" else time.process_time
        precisions = sorted({step.variant.amp for step in steps.values()})
        rates = {amp: profilers.matmul_rate(work.device, DTYPES[amp], ticks) for amp in precisions}
        return {
            "stage_seconds": stages,
            "waits": waits,
            "gpu": gpu,
            "gflop_per_image": {owner: number / 1e9 for owner, number in flops.items()},
            "matmul_gflops": {"fp32" if amp == "off" else amp: rate / 1e9 for amp, rate in rates.items()},
            "utilization": {
                name: flops[step.variant.owner] * row["images_per_second"] / rates[step.variant.amp]
                for (name, step), row in zip(steps.items(), rows, strict=True)
            },
        }


def bytes_added(variant: Variant, work: Work, threads: int) -> int:
    """What training adds at its highest point to this process, which has imported torch and read the batches.

    Resident memory without pages of program files; 0 where the system does not tell (it needs Linux).
    """
    status = Path("/proc/self/status")

    def kilobytes(name: str) -> int:
        return int(status.read_text().split(f"{name}:")[1].split()[0])

    if not status.exists():
        return 0
    torch.set_num_threads(threads)
    before, files_before = kilobytes("VmRSS"), kilobytes("RssFile")
    run = partial(build_step(variant, work).train, work.batches)
    run()  # what happens once only, a compiler at work say, is over after a first run
    with contextlib.suppress(OSError):  # forbidden in some containers: then it counts after all
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak becomes the present size
    run()
    return 1024 * (kilobytes("VmHWM") - before - (kilobytes("RssFile") - files_before))


def _probe_tables(figures: Mapping[str, Any]) -> list[str]:
    def cells(figures: Mapping[str, Mapping[str, float]], write: Callable[[float, float], str]) -> Any:
        return {
            name: {key: write(value, sum(of.values())) for key, value in of.items()} for name, of in figures.items()
        }

    waits = {name: {"all kinds": sum(kinds.values()), **kinds} for name, kinds in figures["waits"].items()}
    texts = [
        nested_table(
            "stages, ms a step of one profiled pass",
            cells(figures["stage_seconds"], lambda value, whole: f"{value * 1e3:.1f} ({value / whole:.0%})"),
        ),
        nested_table("synchronizations a step", cells(waits, lambda value, _: f"{value:.0f}")),
    ]
    if figures["gpu"]:
        texts.append(nested_table("the GPU's work", cells(figures["gpu"], lambda value, _: f"{value:,.5g}")))
    work = ", ".join(f"{owner} {number:.1f}" for owner, number in figures["gflop_per_image"].items())
    rates = ", ".join(f"{amp} {rate:,.0f}" for amp, rate in figures["matmul_gflops"].items())
    shares = ", ".join(f"{name} {share:.0%}" for name, share in figures["utilization"].items())
    return [*texts, f"GFLOP an image: {work}; GFLOP/s of a matrix multiplication: {rates}; share reached: {shares}"]
