"""A scratch folder like a fresh checkout after `git clone`, with small stand-ins for what the pages speak of."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.documentation.documented_commands import ROOT
from tests.documentation.stand_ins import SHORT_TRAINING, SMALL_MODEL

# Published weights that commands name, as files of random weights in torch's cache: (model, name).
PUBLISHED = (("resnet18", "ResNet18_Weights.IMAGENET1K_V1"), ("detector", "FasterRCNN_ResNet50_FPN_Weights.COCO_V1"))

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
        # The second waits for programs of its own most of the time.
        with ThreadPoolExecutor(2) as pool:
            for task in [pool.submit(self._make_published_weights), pool.submit(self._make_given)]:
                task.result()
        self.coco_port = self._serve_coco()

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

    def of_page(self, name: str, *, with_coco: bool) -> Path:
        """A fresh folder for a page. with_coco: datasets/coco is there, and need not be fetched first."""
        folder = self.work / "pages" / name
        shutil.copytree(self.checkout, folder, symlinks=True)
        # Links, as nothing writes into what it was given.
        shutil.copytree(self.given, folder, dirs_exist_ok=True, copy_function=os.link, symlinks=True)
        if with_coco:
            shutil.copytree(self.work / "coco", folder / "datasets" / "coco", copy_function=os.link)
        return folder

    def _copy_tracked_files(self) -> None:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        for name in filter(None, listed.split("\0")):
            target = self.checkout / name
            if (ROOT / name).is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, target)
        # What is compiled stays so, as copies keep the times that it is checked by.
        for inside in [self.checkout, *filter(Path.is_dir, self.checkout.rglob("*"))]:
            compiled = ROOT / inside.relative_to(self.checkout) / "__pycache__"
            if compiled.is_dir():
                shutil.copytree(compiled, inside / "__pycache__")
        self._run("-m", "compileall", "-q", ".", cwd=self.checkout)
        if Path(sys.prefix, "bin", "activate").is_file():
            (self.checkout / ".venv").symlink_to(sys.prefix)
        # The recipes' own number of processes is eight.
        script = self.checkout / "scripts" / "reproduce_coco.sh"
        script.write_text(script.read_text().replace("--nproc_per_node=8", "--nproc_per_node=2"))
        (self.work / "tmp").mkdir()

    def _make_slurm(self) -> None:
        for name, line in SLURM.items():
            program = self.work / "slurm" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(f"#!/bin/bash\n{line}\n")
            program.chmod(0o755)

    def _make_published_weights(self) -> None:
        import torch
        import torchvision

        folder = self.work / "torch" / "hub" / "checkpoints"
        folder.mkdir(parents=True)
        models = {
            "resnet18": torchvision.models.resnet18,
            "detector": partial(torchvision.models.detection.fasterrcnn_resnet50_fpn, weights_backbone=None),
        }
        torch.manual_seed(0)
        for model, name in PUBLISHED:
            file = folder / torchvision.models.get_weight(name).url.rpartition("/")[2]
            torch.save(models[model](weights=None).state_dict(), file)
        # A file of MMDetection's: the small model that train.py is told to take, for COCO.
        from detection.models import build_model, export_state_dict
        from detection.models.weights.layouts import COCO_CATEGORY_IDS

        small = build_model("faster_rcnn_r18_fpn", len(COCO_CATEGORY_IDS), fpn_channels=16, roi_hidden_channels=32)
        self.given.mkdir(exist_ok=True)
        state = {"state_dict": export_state_dict(small, layout="mmdet"), "meta": {}}
        torch.save(state, self.given / "faster_rcnn_r50_fpn_1x_coco.pth")

    def _make_given(self) -> None:
        """Everything that a page takes for granted, under the very names that it uses."""
        from PIL import Image

        from data.tools.shapes import make_shapes
        from detection.models.weights.layouts import COCO_CATEGORY_IDS

        given = self.given
        shapes = make_shapes(given / "datasets" / "shapes")
        coco = make_shapes(self.work / "coco", num_train=16, num_val=4, size=(96, 64), seed=1)
        for file in coco.glob("annotations/*.json"):
            content = json.loads(file.read_text())
            named = {category["id"]: category["name"] for category in content["categories"]}
            # With as many categories as COCO, and its ids, weights for COCO fit.
            content["categories"] = [{"id": n, "name": named.get(n, f"class {n}")} for n in COCO_CATEGORY_IDS]
            file.write_text(json.dumps(content))
        # COCO as pages name it outside its folder; the results of runs/NAME are of the shapes' val2017.
        for made, split in ((coco, "train2017"), (shapes, "val2017")):
            shutil.copy(made / "annotations" / f"instances_{split}.json", given / f"instances_{split}.json")
            shutil.copytree(made / split, given / split, copy_function=os.link)
        # The reader's own set.
        for folder, files, split in (("DIR", ("FILE.json", "FILE"), "train"), ("DIR_VAL", ("FILE_VAL.json",), "val")):
            shutil.copytree(coco / f"{split}2017", given / folder)
            for name in files:
                shutil.copy(coco / "annotations" / f"instances_{split}2017.json", given / name)
        (given / "bccd" / "annotations").mkdir(parents=True)
        (given / "bccd" / "images").mkdir()
        for split in ("train", "val"):
            content = json.loads((coco / "annotations" / f"instances_{split}2017.json").read_text())
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
        self._run(
            "train.py", "--schedule", "1x", "--dataset", "shapes", "--weights", "none", "--max-epochs", "1",
            *f"{SHORT_TRAINING} {SMALL_MODEL} --output-dir runs/quickstart".split(),
            cwd=given, script_from=self.checkout,
        )  # fmt: skip
        for name in ("other", "NAME"):
            shutil.copytree(given / "runs" / "quickstart", given / "runs" / name, copy_function=os.link)

    def _serve_coco(self) -> int:
        """A server with small archives in COCO's paths; the checkout's table of sizes and sums is made theirs."""
        mirror, coco = self.work / "mirror", self.work / "coco"
        table = ["", "", "# Not COCO's own: small archives for a test of the documentation."]
        for part, path, folder, pattern in (
            ("annotations", "annotations/annotations_trainval2017.zip", "annotations", "instances_*2017.json"),
            ("val", "zips/val2017.zip", "val2017", "*.png"),
            ("train", "zips/train2017.zip", "train2017", "*.png"),
        ):
            (mirror / path).parent.mkdir(parents=True, exist_ok=True)
            files = sorted((coco / folder).glob(pattern))
            with zipfile.ZipFile(mirror / path, "w") as archive:
                for file in files:
                    archive.write(file, f"{folder}/{file.name}")
            content = (mirror / path).read_bytes()
            arguments = [path, len(content), sha256(content).hexdigest(), folder, pattern, len(files), len(content)]
            table.append(f"ARCHIVES[{part!r}] = CocoArchive(*{json.dumps(arguments)})")
        with (self.checkout / "data" / "coco_archives.py").open("a") as module:
            module.write("\n".join(table) + "\n")
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(mirror)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server.server_port

    def _run(self, *words: str, cwd: Path, script_from: Path | None = None) -> None:
        words = (str(script_from / words[0]), *words[1:]) if script_from else words
        done = subprocess.run(
            [sys.executable, *words], cwd=cwd, env=self.environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: exit status {done.returncode}\n{done.stdout}{done.stderr}")


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass
