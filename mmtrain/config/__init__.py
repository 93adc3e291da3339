"""The config: one YAML file and `key=value` overrides become one frozen, typed `Config`."""

from mmtrain.config.load import dump_config, load_config
from mmtrain.config.run_section import GIB
from mmtrain.config.schema import Config

__all__ = ["GIB", "Config", "dump_config", "load_config"]
