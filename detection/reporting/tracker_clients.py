"""Trackers for the services that people use: Weights & Biases, MLflow and Trackio, each by its own Python client."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from detection.errors import DetectionError
from detection.reporting.run_comparison import flattened
from detection.reporting.trackers import TrackedRun, Tracker

PROJECT = "detection"
"""Where runs go without the client's own variable: WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME, TRACKIO_PROJECT."""


class TrackerError(DetectionError):
    """A tracker whose package is not there. The message has the command that installs it."""


class WandbTracker:
    """Weights & Biases. A run without network: WANDB_MODE=offline, and `wandb sync` later."""

    def start(self, run: TrackedRun) -> str:
        wandb = _client("wandb")
        # Where nobody is logged in, `init` would ask for a key on the training's terminal.
        if wandb.setup().settings.mode == "online" and not _is_logged_in(wandb):
            raise TrackerError("nobody is logged in: `wandb login`, WANDB_API_KEY, or WANDB_MODE=offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=run.identifier,
            resume="allow",
            dir=str(run.directory),
            config=dict(run.configuration),
            allow_val_change=True,
            settings=wandb.Settings(console="off"),
        )
        self._image = wandb.Image
        # Its own steps count calls, and cannot go back where a resumed run repeats iterations.
        self._run.define_metric("iteration", hidden=True)
        self._run.define_metric("*", step_metric="iteration")
        return str(self._run.id)

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        self._run.log({"iteration": iteration, **values})

    def images(self, iteration: int, tag: str, images: Sequence[np.ndarray]) -> None:
        self._run.log({"iteration": iteration, tag: [self._image(image) for image in images]})

    def finish(self, is_done: bool) -> None:
        # 255 is what the client itself says of a run that was interrupted.
        self._run.finish(exit_code=0 if is_done else 255)


class MlflowTracker:
    """MLflow, on the server or in the files that MLFLOW_TRACKING_URI says."""

    MOST_METRICS, MOST_PARAMETERS = 900, 100
    """A request's; the server takes 1,000 and 100."""
    SECONDS = 5.0
    """Points wait for so long at most until a request is made of them."""

    def start(self, run: TrackedRun) -> str:
        mlflow = _client("mlflow")
        entities = importlib.import_module("mlflow.entities")
        self._client, self._metric = mlflow.MlflowClient(), entities.Metric
        self._waiting: list[Any] = []
        self._sent = time.monotonic()
        if run.identifier is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            experiment = self._client.get_experiment_by_name(name)
            number = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
            self._id = str(self._client.create_run(number, run_name=run.name).info.run_id)
            # A parameter cannot be changed later: those of a resumed run are in its configuration file.
            parameters = [
                entities.Param(_mlflow_name(key), value[:500]) for key, value in flattened(run.configuration).items()
            ]
            for begin in range(0, len(parameters), self.MOST_PARAMETERS):
                self._client.log_batch(self._id, params=parameters[begin : begin + self.MOST_PARAMETERS])
        else:
            self._id = run.identifier
            self._client.update_run(self._id, status="RUNNING")
        self._client.log_dict(self._id, dict(run.configuration), f"configuration/from_iteration_{run.iteration}.json")
        return self._id

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        self._waiting += [self._metric(_mlflow_name(tag), value, now, iteration) for tag, value in values.items()]
        if len(self._waiting) > self.MOST_METRICS or time.monotonic() - self._sent > self.SECONDS:
            self._send()

    def images(self, iteration: int, tag: str, images: Sequence[np.ndarray]) -> None:
        for number, image in enumerate(images):
            self._client.log_image(self._id, image, key=_mlflow_name(f"{tag}/{number}"), step=iteration)

    def finish(self, is_done: bool) -> None:
        self._send()
        self._client.set_terminated(self._id, "FINISHED" if is_done else "KILLED")

    def _send(self) -> None:
        waiting, self._waiting, self._sent = self._waiting, [], time.monotonic()
        for begin in range(0, len(waiting), self.MOST_METRICS):
            self._client.log_batch(self._id, metrics=waiting[begin : begin + self.MOST_METRICS])


class TrackioTracker:
    """Trackio, on this machine, or in the Space that TRACKIO_SPACE_ID names."""

    def start(self, run: TrackedRun) -> str:
        trackio = _client("trackio")
        # A run goes by its name, which another output directory may have too.
        name = run.identifier or f"{run.name}-{secrets.token_hex(3)}"
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=name,
            config=dict(run.configuration),
            resume="never" if run.identifier is None else "allow",
            embed=False,
        )
        self._image = trackio.Image
        return name

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=iteration)

    def images(self, iteration: int, tag: str, images: Sequence[np.ndarray]) -> None:
        self._run.log({f"{tag}/{number}": self._image(image) for number, image in enumerate(images)}, step=iteration)

    def finish(self, is_done: bool) -> None:
        self._run.finish()


TRACKERS: dict[str, type[Tracker]] = {"wandb": WandbTracker, "mlflow": MlflowTracker, "trackio": TrackioTracker}


def tracker_named(name: str) -> Tracker:
    """A tracker of TRACKERS.

    Raises:
        TrackerError: its package is not installed.
    """
    _client(name)
    return TRACKERS[name]()


def _client(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TrackerError(f"--tracker {name} needs a package ({error}): pip install {name}") from error


def _is_logged_in(wandb: Any) -> bool:
    # Earlier versions have no `prompt`: they ask, and stop waiting for an answer.
    if "prompt" in inspect.signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False))
    return bool(wandb.login(timeout=5))


def _mlflow_name(tag: str) -> str:
    """The tag with what MLflow takes in names: letters, digits, and _ - . : / and spaces."""
    return re.sub(r"[^\w\-. :/]", "_", tag)
