"""The config: one YAML file and `key=value` overrides become one frozen, typed `Config`."""

from mmtrain.config.load import dump_config, load_config
from mmtrain.config.schema import Config

__all__ = ["Config", "dump_config", "load_config"]
