"""A scratch folder like a fresh checkout after `git clone`, with small stand-ins for what the pages speak of."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
import torchvision
from PIL import Image

from data.tools.shapes import make_shapes
from detection.models import build_model, export_state_dict
from detection.models.weights.layouts import COCO_CATEGORY_IDS
from tests.data.layouts import exports
from tests.documentation.documented_commands import ROOT
from tests.documentation.stand_ins import SHORT_TRAINING, SMALL_MODEL

# Published weights that commands name: how their model is made, and torchvision's name.
PUBLISHED = {
    torchvision.models.resnet18: "ResNet18_Weights.IMAGENET1K_V1",
    partial(torchvision.models.detection.fasterrcnn_resnet50_fpn, weights_backbone=None): (
        "FasterRCNN_ResNet50_FPN_Weights.COCO_V1"
    ),
}

# Slurm's commands on this machine, with one node. The port is in the job script.
SLURM = {
    "sbatch": 'exec env SLURM_JOB_ID=1 SLURM_JOB_NUM_NODES=1 SLURM_JOB_NODELIST=127.0.0.1 GPUS_PER_NODE=2 bash "$@"',
    "srun": 'shift; exec "${@/:29500/:$SLURM_PORT}"',
    "scontrol": "echo 127.0.0.1",
}


class Trees:
    """Makes the folders that commands run in, one a page, and what they share."""

    def __init__(self, work: Path) -> None:
        """Lays out everything under `work`, an empty folder. Takes some ten seconds."""
        self.work = work
        self.checkout = work / "checkout"
        self.given = work / "given"
        self._copy_tracked_files()
        self._make_slurm()
        self._make_published_weights()
        self._make_given()

    @property
    def environment(self) -> dict[str, str]:
        """What the commands find in their environment: no GPU, one thread, and caches of their own."""
        return os.environ | {
            "PATH": os.pathsep.join([str(self.work / "slurm"), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TORCH_HOME": str(self.work / "torch"),
            "XDG_CACHE_HOME": str(self.work / "cache"),
            "TMPDIR": str(self.work / "tmp"),
            "MPLBACKEND": "Agg",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            # torch.compile takes minutes: with this its calls stay and compile nothing. tests/engine has it for real.
            "TORCHDYNAMO_DISABLE": "1",
            # torchrun's: machines that may still come are not waited for, and a host name leads nowhere else.
            "PET_RDZV_CONF": "last_call_timeout=1",
            "PET_LOCAL_ADDR": "127.0.0.1",
        }

    def lay_out(self, folder: Path) -> None:
        """Makes a fresh folder for a page's commands."""
        shutil.copytree(self.checkout, folder, symlinks=True)
        # Links, as nothing writes into what it was given.
        shutil.copytree(self.given, folder, dirs_exist_ok=True, copy_function=os.link, symlinks=True)

    def _copy_tracked_files(self) -> None:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        for name in listed.split("\0"):
            if (ROOT / name).is_file():
                (self.checkout / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.checkout / name)
        self._run(Path("-m"), "compileall", "-q", ".", cwd=self.checkout)
        if Path(sys.prefix, "bin", "activate").is_file():
            (self.checkout / ".venv").symlink_to(sys.prefix)
        # The recipes' own number of processes is eight.
        script = self.checkout / "scripts" / "reproduce_coco.sh"
        script.write_text(script.read_text().replace("--nproc_per_node=8", "--nproc_per_node=2"))
        (self.work / "tmp").mkdir()

    def _make_slurm(self) -> None:
        (self.work / "slurm").mkdir()
        for name, line in SLURM.items():
            program = self.work / "slurm" / name
            program.write_text(f"#!/bin/bash\n{line}\n")
            program.chmod(0o755)

    def _make_published_weights(self) -> None:
        """Random weights where torch keeps those it has downloaded, and in a file of MMDetection's."""
        folder = self.work / "torch" / "hub" / "checkpoints"
        folder.mkdir(parents=True)
        torch.manual_seed(0)
        for make, name in PUBLISHED.items():
            url = torchvision.models.get_weight(name).url
            torch.save(make(weights=None).state_dict(), folder / url.rpartition("/")[2])
        # For COCO, the small model that train.py is told to take.
        small = build_model("faster_rcnn_r18_fpn", len(COCO_CATEGORY_IDS), fpn_channels=16, roi_hidden_channels=32)
        state = {"state_dict": export_state_dict(small, layout="mmdet"), "meta": {}}
        self.given.mkdir()
        torch.save(state, self.given / "faster_rcnn_r50_fpn_1x_coco.pth")

    def _make_given(self) -> None:
        """Everything that a page takes for granted, under the very names that it uses."""
        given = self.given
        shapes = make_shapes(given / "datasets" / "shapes")
        coco = make_shapes(given / "datasets" / "coco", num_train=16, num_val=4, size=(96, 64), seed=1)
        annotations = {split: coco / "annotations" / f"instances_{split}2017.json" for split in ("train", "val")}
        for file in annotations.values():
            content = json.loads(file.read_text())
            named = {category["id"]: category["name"] for category in content["categories"]}
            # With as many categories as COCO, and its ids, weights for COCO fit.
            content["categories"] = [{"id": n, "name": named.get(n, f"class {n}")} for n in COCO_CATEGORY_IDS]
            file.write_text(json.dumps(content))
        exports.yolo_roboflow(given / "my_set")
        # COCO as pages name it outside its folder; the results of runs/NAME are of the shapes' val2017.
        for made, split in ((coco, "train2017"), (shapes, "val2017")):
            shutil.copy(made / "annotations" / f"instances_{split}.json", given)
            shutil.copytree(made / split, given / split, copy_function=os.link)
        # The reader's own set; and that of the blood cells, whose two splits have their images in one folder.
        (given / "bccd" / "images").mkdir(parents=True)
        (given / "bccd" / "annotations").mkdir()
        for split, folder, files in (("train", "DIR", ("FILE.json", "FILE")), ("val", "DIR_VAL", ("FILE_VAL.json",))):
            shutil.copytree(coco / f"{split}2017", given / folder)
            for name in files:
                shutil.copy(annotations[split], given / name)
            content = json.loads(annotations[split].read_text())
            for image in content["images"]:
                name = f"{split}_{image['file_name']}"
                shutil.copy(coco / f"{split}2017" / image["file_name"], given / "bccd" / "images" / name)
                image["file_name"] = name
            (given / "bccd" / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        for name in ("photo.jpg", "holiday/1.jpg", "more/1.png", "photos/1.jpg"):
            (given / name).parent.mkdir(exist_ok=True)
            with Image.open(shapes / "val2017" / "000000000001.png") as photo:
                photo.convert("RGB").save(given / name)
        # A training of the shapes, as the quickstart leaves it; others of the name that pages call them by.
        arguments = "--schedule 1x --dataset shapes --weights none --max-epochs 1 --output-dir runs/quickstart"
        words = f"{arguments} {SHORT_TRAINING} {SMALL_MODEL}".split()
        self._run(self.checkout / "train.py", *words, cwd=given)
        for name in ("other", "NAME"):
            shutil.copytree(given / "runs" / "quickstart", given / "runs" / name, copy_function=os.link)

        # One that was not finite.
        hot = [
            "--lr=1000",
            "--set=param_scheduler.0.start_factor=1.0",
            "--limit-train-batches=8",
            "--output-dir=runs/hot",
        ]
        self._run(self.checkout / "train.py", *words, *hot, cwd=given, status=1)
        (step,) = (given / "runs" / "hot" / "nonfinite").iterdir()
        (given / "runs" / "NAME" / "nonfinite").mkdir()
        step.rename(given / "runs" / "NAME" / "nonfinite" / "iteration_0000123.pt")

    def _run(self, program: Path, *words: str, cwd: Path, status: int = 0) -> None:
        command = [sys.executable, str(program), *words]
        done = subprocess.run(command, cwd=cwd, env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode != status:
            raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
