"""Trackers: the thread that feeds one, and the clients of the services, which stand-ins replace here."""

import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from detection.config import parse_arguments
from detection.config.cli import build_parser
from detection.errors import DetectionError
from detection.reporting import TRACKERS, TrackedRun, TrackerFeed, tracker_named, trackers

IMAGE = np.zeros((4, 6, 3), np.uint8)
SETTINGS = {"train": {"batch_size": 2, "amp": None}, "schedule": {"lr": 0.02}}


class Recorder:
    """Notes its calls; raises what `fails` has for a method's name."""

    def __init__(self, **fails):
        self.calls, self.fails, self.threads = [], fails, set()

    def _note(self, name, *words):
        self.calls.append((name, *words))
        self.threads.add(threading.current_thread())
        if name in self.fails:
            raise self.fails[name]

    def start(self, run):
        self._note("start", run.identifier)
        return "the id"

    def scalars(self, iteration, values):
        self._note("scalars", iteration, dict(values))

    def images(self, iteration, tag, images):
        self._note("images", iteration, tag, len(images))

    def finish(self, is_done):
        self._note("finish", is_done)


@pytest.fixture
def feed(tmp_path):
    """feed(tracker): a TrackerFeed, with what it has said in `said`."""

    def make(tracker):
        said = []
        run = TrackedRun("run", tmp_path, SETTINGS, iteration=0)
        made = TrackerFeed("mine", tracker, run, tmp_path / "tracker_mine.txt", said.append)
        made.said = said
        return made

    return make


def send(feed):
    feed.images(0, "train/batch", [IMAGE])
    for iteration in range(3):
        feed.scalars(iteration, {"train/loss": 1.0})


CALLS = [("images", 0, "train/batch", 1), *(("scalars", i, {"train/loss": 1.0}) for i in range(3)), ("finish", True)]


def test_a_tracker_gets_everything_in_order_in_a_thread_of_its_own_and_its_identifier_back(feed):
    for identifier in (None, "the id"):
        recorder = Recorder()
        fed = feed(recorder)
        send(fed)
        fed.close(is_done=True)
        assert recorder.calls == [("start", identifier), *CALLS] and fed.said == []
        assert len(recorder.threads) == 1 and threading.current_thread() not in recorder.threads


def test_no_thread_begins_before_the_first_figures(feed):
    fed, before = feed(Recorder()), threading.active_count()
    fed.images(0, "train/batch", [IMAGE])
    assert threading.active_count() == before
    fed.close(is_done=False)


@pytest.mark.parametrize("error", [ConnectionError("no route\nto host"), SystemExit(1), TypeError()], ids=str)
def test_a_run_that_cannot_be_begun_is_warned_of_once(feed, error):
    recorder = Recorder(start=error)
    fed = feed(recorder)
    send(fed)
    fed.close(is_done=True)
    send(fed)
    assert recorder.calls == [("start", None)]
    (line,) = fed.said
    assert line.startswith("tracker mine: the run could not be begun there: " + type(error).__name__)
    assert "to host" not in line and "metrics.jsonl have everything" in line


def test_calls_that_fail_are_warned_of_once_and_the_later_ones_are_made(feed):
    recorder = Recorder(scalars=ValueError("bad value"), finish=OSError("gone"))
    fed = feed(recorder)
    send(fed)
    fed.close(is_done=True)
    assert recorder.calls == [("start", None), *CALLS]
    assert len(fed.said) == 1 and "ValueError: bad value" in fed.said[0]


@pytest.mark.parametrize("hangs_in", ["start", "scalars", "finish"])
def test_a_tracker_that_hangs_keeps_nobody_waiting(feed, monkeypatch, hangs_in):
    monkeypatch.setattr(trackers, "MOST_WAITING", 20)
    monkeypatch.setattr(trackers, "CLOSING_SECONDS", 0.05)
    released = threading.Event()
    recorder = Recorder()
    setattr(recorder, hangs_in, lambda *_: released.wait())
    fed = feed(recorder)
    for _ in range(1 if hangs_in == "finish" else 10):
        send(fed)
    fed.close(is_done=True)
    (line,) = fed.said
    assert ("not taken everything" if hangs_in == "finish" else "too slow") in line
    released.set()


# The clients.


def use(monkeypatch, name, **content):
    module = SimpleNamespace(**content)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def follow(name, tmp_path, identifier=None, iteration=0):
    """One start of a run as the feed makes it; the identifier."""
    tracker = tracker_named(name)
    identifier = tracker.start(TrackedRun("a run", tmp_path, SETTINGS, iteration, identifier))
    tracker.scalars(iteration, {"train/loss": 0.5})
    tracker.images(iteration, "val/detections", [IMAGE, IMAGE])
    tracker.scalars(iteration + 1, {"val/AP/a <b>": 0.25})
    tracker.finish(is_done=True)
    return identifier


class FakeWandb:
    def __init__(self, monkeypatch, mode="online", logged_in=True):
        self.inits, self.logged, self.metrics, self.codes, self.prompts = [], [], [], [], []
        use(
            monkeypatch,
            "wandb",
            init=self.init,
            login=self.login,
            setup=lambda: SimpleNamespace(settings=SimpleNamespace(mode=mode)),
            Settings=lambda **words: words,
            Image=lambda pixels: ("image", pixels.shape),
        )
        self.logged_in = logged_in

    def login(self, prompt=True):
        self.prompts.append(prompt)
        return self.logged_in

    def init(self, **words):
        self.inits.append(words)
        return SimpleNamespace(
            id=words["id"] or "new",
            log=self.logged.append,
            define_metric=lambda name, **words: self.metrics.append((name, words)),
            finish=lambda exit_code: self.codes.append(exit_code),
        )


def test_wandb_goes_on_with_its_run_over_the_iterations(monkeypatch, tmp_path):
    fake = FakeWandb(monkeypatch)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    assert follow("wandb", tmp_path) == "new" and follow("wandb", tmp_path, "new", 5) == "new"
    assert [(each["id"], each["resume"], each["project"]) for each in fake.inits] == [
        (None, "allow", "mine"),
        ("new", "allow", "mine"),
    ]
    assert (
        fake.inits[0]["config"] == SETTINGS and fake.inits[0]["name"] == "a run" and fake.inits[0]["allow_val_change"]
    )
    assert ("*", {"step_metric": "iteration"}) in fake.metrics
    assert fake.logged[:3] == [
        {"iteration": 0, "train/loss": 0.5},
        {"iteration": 0, "val/detections": [("image", (4, 6, 3))] * 2},
        {"iteration": 1, "val/AP/a <b>": 0.25},
    ]
    assert fake.codes == [0, 0] and fake.prompts == [False, False]


def test_wandb_asks_nobody_for_a_key_on_the_terminal(monkeypatch, tmp_path):
    fake = FakeWandb(monkeypatch, logged_in=False)
    with pytest.raises(DetectionError, match="nobody is logged in"):
        follow("wandb", tmp_path)
    assert fake.inits == []
    offline = FakeWandb(monkeypatch, mode="offline", logged_in=False)
    assert follow("wandb", tmp_path) == "new" and offline.prompts == []


class FakeMlflow:
    def __init__(self, monkeypatch):
        self.experiments, self.parameters, self.metrics, self.files, self.images = {}, {}, [], {}, []
        self.states = []
        use(monkeypatch, "mlflow", MlflowClient=lambda: self)
        use(
            monkeypatch,
            "mlflow.entities",
            Param=lambda key, value: (key, value),
            Metric=lambda key, value, timestamp, step: (key, value, step),
        )

    def get_experiment_by_name(self, name):
        number = self.experiments.get(name)
        return None if number is None else SimpleNamespace(experiment_id=number)

    def create_experiment(self, name):
        self.experiments[name] = str(len(self.experiments))
        return self.experiments[name]

    def create_run(self, experiment, run_name):
        return SimpleNamespace(info=SimpleNamespace(run_id=f"run {experiment}"))

    def log_batch(self, run, metrics=(), params=()):
        assert len(metrics) <= 1000 and len(params) <= 100
        for key, value in params:
            assert self.parameters.setdefault(key, value) == value  # as MLflow demands
        self.metrics += metrics

    def log_dict(self, run, content, file):
        self.files[file] = content

    def log_image(self, run, image, key, step):
        self.images.append((key, step))

    def update_run(self, run, status):
        self.states.append(status)

    def set_terminated(self, run, status):
        self.states.append(status)


def test_mlflow_goes_on_with_its_run_and_keeps_each_starts_configuration(monkeypatch, tmp_path):
    fake = FakeMlflow(monkeypatch)
    assert follow("mlflow", tmp_path) == "run 0" and follow("mlflow", tmp_path, "run 0", 5) == "run 0"
    assert list(fake.experiments) == ["detection"] and fake.parameters["train.batch_size"] == "2"
    assert set(fake.files) == {"configuration/from_iteration_0.json", "configuration/from_iteration_5.json"}
    # Names that MLflow would refuse are changed.
    assert fake.metrics[:2] == [("train/loss", 0.5, 0), ("val/AP/a _b_", 0.25, 1)] and len(fake.metrics) == 4
    assert fake.images == [(f"val/detections/{n}", i) for i in (0, 5) for n in (0, 1)]
    assert fake.states == ["FINISHED", "RUNNING", "FINISHED"]


def test_mlflow_gets_many_points_in_few_requests_and_few_in_time(monkeypatch, tmp_path):
    fake, clock = FakeMlflow(monkeypatch), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    tracker = tracker_named("mlflow")
    tracker.start(TrackedRun("a run", tmp_path, SETTINGS, 0))
    for iteration in range(90):
        tracker.scalars(iteration, {f"train/{n}": 0.0 for n in range(10)})
    assert fake.metrics == []
    tracker.scalars(90, {f"train/{n}": 0.0 for n in range(10)})
    assert len(fake.metrics) == 910
    tracker.scalars(91, {"train/loss": 1.0})
    assert len(fake.metrics) == 910
    clock[0] += 6
    tracker.scalars(92, {"train/loss": 1.0})
    assert len(fake.metrics) == 912


def test_trackio_goes_on_with_its_run_whose_name_is_nobody_elses(monkeypatch, tmp_path):
    inits, logged, finished = [], [], []

    def init(**words):
        inits.append(words)
        log = lambda values, step: logged.append((step, values))  # noqa: E731
        return SimpleNamespace(log=log, finish=lambda: finished.append(True))

    use(monkeypatch, "trackio", init=init, Image=lambda pixels: pixels.shape)
    first, other = follow("trackio", tmp_path), follow("trackio", tmp_path)
    assert first != other and first.startswith("a run-") and follow("trackio", tmp_path, first, 5) == first
    assert [each["resume"] for each in inits] == ["never", "never", "allow"] and inits[2]["name"] == first
    assert inits[0]["config"] == SETTINGS and not inits[0]["embed"]
    images = {"val/detections/0": (4, 6, 3), "val/detections/1": (4, 6, 3)}
    assert logged[:3] == [(0, {"train/loss": 0.5}), (0, images), (1, {"val/AP/a <b>": 0.25})] and len(finished) == 3


@pytest.mark.parametrize("name", TRACKERS)
def test_a_package_that_is_not_there_is_named_with_the_command_that_installs_it(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DetectionError, match=f"--tracker {name} needs a package .*: pip install {name}$"):
        tracker_named(name)


def test_the_option_has_the_trackers_that_there_are():
    (action,) = [each for each in build_parser()._actions if each.option_strings == ["--tracker"]]
    assert sorted(action.choices) == sorted(TRACKERS)
    assert parse_arguments([]).output.tracker is None
