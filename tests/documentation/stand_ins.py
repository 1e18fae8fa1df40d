"""How each command of the documentation is run here: as it is written, with what makes it small, or not at all.

Everything in which a run differs from the page is said in this file, with its reason. A command that fits nothing below
has no way to be run, and that is an error until a way is given.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Callable
from zlib import crc32

from tests.documentation.documented_commands import ROOT, Command

# Commands, and pages, that other tests run. Each with the test, and a text that the test must hold. CI is .ci/run.
DONE_BY = {
    "docs/extend.md": ("tests/documentation/test_extend_page.py", '"extend.md"'),
    "docs/own_data.md": ("tests/scripts/convert/test_own_data_guide.py", '"own_data.md"'),
    # Ten minutes, and it installs PyTorch.
    "bash scripts/quickstart.sh": (".ci/run", "bash scripts/quickstart.sh --short"),
    # The suite itself, and a part of it.
    "bash scripts/test.sh": (".ci/run", "bash scripts/test.sh"),
    'OMP_NUM_THREADS=1 python -m pytest -q -n 2 -m "not slow"': (".ci/run", "bash scripts/test.sh"),
    # Tests of the suite, which makes fewer examples and combinations.
    "FUZZ_EXAMPLES=1000 python -m pytest --timeout=0 -k fuzz": ("tests/fuzzing.py", '"FUZZ_EXAMPLES"'),
    "OPTION_PAIRS=1/1 python -m pytest -q tests/engine/options": (
        "tests/engine/options/test_option_pairs.py",
        '"OPTION_PAIRS"',
    ),
    # It writes the page.
    "python3 -m detection.config.options_page": ("tests/config/test_run_config.py", "options_page()"),
    "python3 -m detection.config.mmdet_page FOLDER": ("tests/config/test_mmdet_run.py", "page(wheel_configs())"),
    # It asks for COCO's classes by name.
    "torchrun --nproc_per_node=8 train.py --config CONFIG": ("tests/engine/options/test_mmdet_run.py", '"--config"'),
    "python scripts/fault_test.py --merge part1.json part2.json --report report.md --json report.json": (
        "tests/scripts/fault_injection/test_fault_test.py",
        '"--merge"',
    ),
    "python3 scripts/pack_dataset.py pack datasets/coco packed/coco": ("tests/scripts/test_pack_dataset.py", '"pack"'),
    "python3 train.py --schedule 1x --data-path packed/coco": (
        "tests/engine/inputs/test_shards_training.py",
        '"--data-path"',
    ),
    "python3 scripts/pack_dataset.py images datasets/coco/train2017 packed/train2017": (
        "tests/scripts/test_pack_dataset.py",
        '"images"',
    ),
    "python3 scripts/pack_dataset.py locate packed/coco/train s3://bucket/train": (
        "tests/scripts/test_pack_dataset.py",
        '"locate"',
    ),
    "python3 scripts/pack_dataset.py check packed/coco": ("tests/scripts/test_pack_dataset.py", '"check"'),
    # 20 GB. The test has a server of small archives.
    "python3 scripts/download_coco.py --data-path datasets/coco": (
        "tests/scripts/test_download_coco.py",
        "--data-path",
    ),
}
for _more in ("", " --device cuda --trainings 1 8 loader", " --jobs 4"):  # an hour each; minutes there
    _command = f"python scripts/fault_test.py --kills 100{_more} --report report.md --json report.json"
    DONE_BY[_command] = (".ci/run", "scripts/fault_test.py --kills 6")


class NoWay(LookupError):
    """A command that nothing here says how to run."""


# Written here -> in its place, in every command. The reader's own names (DIR, FILE.json, runs/NAME, photo.jpg, ...)
# need nothing: tree.py lays out images, annotations and runs under just these names.
SUBSTITUTIONS = (
    (r"--nproc_per_node=(8|4|gpu)(?= )", "--nproc_per_node=2", "two CPU processes in place of the GPUs"),
    (r"--nproc 8\b", "--nproc 2", "the same"),
    (r"--processes 8 64\b", "--processes 2 3", "two cores in place of many machines"),
    (r"--device cuda\b", "--device cpu", "no GPU"),
    (r" (--(cuda-)?graphs|ours-[\w-]+-graphs)\b", "", "CUDA graphs are for GPUs; tests/engine has their stand-in"),
    (r" --work-dir /tmp/\w+", "", "no folder outside the scratch tree"),
    (r"\bnode0:29500\b", "127.0.0.1:{port}", "both machines are this one"),
    (r"(?<=[ =])/(shared|datasets)/", r"\1/", "no folder outside the scratch tree"),
    (r" --amp bf16\b", "", "most processors emulate bfloat16, and take ten times as long"),
    (r"--val-images DIR --val-annotations FILE", "--val-images DIR_VAL --val-annotations FILE_VAL", "two splits"),
    (r"\bIMAGE\.\.\.", "photo.jpg", "an image"),
    (r"two_node_test.sh$", "two_node_test.sh --localhost", "network namespaces need root and ip"),
)

SMALL_MODEL = (
    "--model faster_rcnn_r18_fpn --model-set fpn_channels=16 --model-set roi_hidden_channels=32 "
    "--model-set roi_samples_per_image=32 --model-set rpn_nms_pre_train=100 --model-set rpn_proposals_train=60 "
    "--model-set rpn_proposals_test=30"
)
SHORT_TRAINING = "--device cpu --workers 0 --min-size 64 --max-size 96 --limit-train-batches 2 --limit-val-batches 1"


def _train(words: list[str]) -> str:
    if "--resume runs/" in " ".join(words):
        return "--global-batch-size 2 --max-epochs 2"  # of a run by one process
    added = [SHORT_TRAINING]
    if "--model" not in words:
        added.append(SMALL_MODEL)
    resumes = "--resume" in words and words[words.index("--resume") + 1 :][:1] != ["auto"]
    added.append(f"--max-epochs {2 if resumes else 1}")
    if "--output-dir" not in words:
        # Each of the alternatives on a page has a directory of its own; `COMMAND --resume` goes on in COMMAND's.
        start = " ".join(word for word in words if word != "--resume").replace("python3", "python")
        added.append(f"--output-dir runs/{crc32(start.encode()):08x}")
    return " ".join(added)


def _benchmark_train(words: list[str]) -> str:
    # What is counted beside the times, with operators traced, takes longer than all the rest.
    added = "--model faster_rcnn_r18_fpn --height 64 --width 96 --batch-size 1 --repeats 1 --threads 1 --no-probes"
    added += " --amp off"  # the same
    if {"--ablation", "--compile"} <= set(words) and "--variants" not in words:
        # Every one of them is taken out by the command without --compile.
        added += " --variants ours-fp32-cl ours-fp32-cl-without-fused-optimizer"
    elif "--variants" in words:
        named = itertools.takewhile(lambda word: not word.startswith("-"), words[words.index("--variants") + 1 :])
        added += " --variants " + " ".join(dict.fromkeys(name.replace("bf16", "fp32") for name in named))
    return added


def _reproduce(words: list[str]) -> str:
    if "--list" in words:
        return ""
    if "--dry-run" in words:
        return "1x"
    return ("" if "--" in words else "-- ") + f"{SHORT_TRAINING} {SMALL_MODEL} --max-epochs 1"


# Programs that run as the page has them.
UNCHANGED = {
    *(
        "pytest",
        "timeit",
        "source",
        "scripts/analyze_results.py",
        "scripts/browse_dataset.py",
        "scripts/check_dataset.py",
    ),
    *("scripts/compare_runs.py", "scripts/convert_weights.py", "scripts/export.py", "scripts/plot_schedule.py"),
    "scripts/report.py",
    "scripts/two_node_test.sh",
}
# Program -> what is added behind its arguments, where the later of two options counts: small sizes and short runs.
ADDED: dict[str, str | Callable[[list[str]], str]] = {
    "train.py": _train,
    "docs/slurm/train_1x.sbatch": f"{SHORT_TRAINING} {SMALL_MODEL} --max-epochs 1",
    "scripts/benchmark.py data": lambda words: (
        "--small-files 50 --repeats 1" if "--small-files" in words else "--pictures 4 --repeats 1"
    ),
    "scripts/benchmark.py eval": "--images 20 --detections 5 --repeats 1",
    "scripts/benchmark.py memory": lambda words: (
        "--polygons 60"
        if "--polygons" in words
        else "--listed 32 --epochs 1 --repeats 1" + (" --processes 2 --workers 1" if "--processes" in words else "")
    ),
    "scripts/benchmark.py padding": "--pictures 200",
    "scripts/benchmark.py startup": "--repeats 1 --annotation-images 50",
    "scripts/benchmark.py traffic": "--model faster_rcnn_r18_fpn --batch-size 1 --height 64 --width 96",
    "scripts/benchmark.py train": _benchmark_train,
    "scripts/gpu_checks/training.py": "--short --work-dir check_gpu_training_{port}",
    "scripts/gpu_checks/candidates.py": "--device cpu --parts rates",
    "scripts/check_gpu.py": "--device cpu --short --parts tests",
    "scripts/predict.py": "--device cpu --limit 2",
    "scripts/replay.py": "|| [ $? = 3 ]",  # it finds something
    "scripts/reproduce_coco.sh": _reproduce,
}

# Asks TensorBoard on the port of its first argument for the names of the runs, for a minute, until it answers.
ASK_TENSORBOARD = """
import sys, time, urllib.request
for _ in range(300):
    time.sleep(0.2)
    try:
        if urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/data/runs", timeout=10).read().startswith(b'["'):
            sys.exit()
    except OSError:
        pass
sys.exit("TensorBoard showed no run")
"""


def program_key(command: Command) -> str:
    """The name under which ADDED knows what the command starts; "" where it starts nothing that could be there."""
    words = command.words
    if words[0] in ("source", "sbatch"):
        return words[0] if words[0] == "source" else words[1]
    if module := {"pytest", "timeit"} & set(words):
        return module.pop()
    is_benchmark = command.program == "scripts/benchmark.py"
    return f"{command.program} {command.arguments[0]}" if is_benchmark else command.program


def way_of(command: Command) -> str:
    """What a shell runs in the command's place; "" where another test runs it.

    Raises NoWay where nothing here says so, or where it installs an extra that setup.cfg does not have.
    """
    if command.text in DONE_BY or command.place.partition(":")[0] in DONE_BY:
        return ""
    if command.words[0] == "tensorboard":  # a server, which is asked for its runs and then stopped
        return f"{command.text} --host 127.0.0.1 --port {{port}} & python -c {shlex.quote(ASK_TENSORBOARD)} {{port}}"
    if command.words[0] == "pip":  # nothing is installed
        known = (ROOT / "setup.cfg").read_text().partition("extras_require]")[2]
        for name in re.findall(r"\w+(?=[],])", command.text):
            if f"\n{name} =\n" not in known:
                raise NoWay(f"{command}\n  setup.cfg has no extra {name}")
        return ""
    key = program_key(command)
    if key not in ADDED.keys() | UNCHANGED:
        raise NoWay(
            f"{command}\n  no way to run it here is given: tests/documentation/stand_ins.py says how every other is run"
        )
    text = command.text
    for pattern, replacement, _ in SUBSTITUTIONS:
        text = re.sub(pattern, replacement, text)
    added = ADDED.get(key, "")
    if not command.is_refused:
        text = f"{text} {added(shlex.split(text)) if callable(added) else added}".strip()
    if "--nnodes=2" in command.words:  # both machines are this one
        return f"{text} & {text}; second=$?; wait $! && exit $second"
    return text
