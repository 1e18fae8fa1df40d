"""What a run is asked to do: its settings, each stated once, and the command line that gives them."""

from detection.config.cli import parse_arguments
from detection.config.mmdet_config import read_mmdet_config
from detection.config.run_config import RunConfig
from detection.config.settings import ConfigError

__all__ = ["ConfigError", "RunConfig", "parse_arguments", "read_mmdet_config"]
