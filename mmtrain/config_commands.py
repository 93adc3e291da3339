"""`mmtrain config`: commands about a config alone, and the arguments that several commands have."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from mmtrain.api import load_config
from mmtrain.errors import UserError
from mmtrain.safe_text import shown, visible

config_app = typer.Typer(help="Check or show a config, and the keys that it can have.", no_args_is_help=True)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML config.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Keys of the config to set, such as train.steps=50.", show_default=False),
]
Adapter = Annotated[
    Path | None,
    typer.Option(metavar="RUN", help="A run or an adapter; without it the base model.", show_default=False),
]
DataFiles = Annotated[
    list[str] | None, typer.Option(help="A data file instead of data.eval; may be repeated.", show_default=False)
]
Html = Annotated[Path | None, typer.Option(help="Write one self-contained HTML page.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Processes = Annotated[int, typer.Option(min=1, max=1024, help="Processes on this machine.")]


class KeysCommand(TyperCommand):
    """A command with `Overrides`: an option that is a key of the config is refused with the way to set it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if type(error).__name__ == "NoSuchOption":  # typer exports no name for it
                from mmtrain.config.faults import key_of_option

                option = str(getattr(error, "option_name", ""))
                if instead := key_of_option(option):
                    how = "a key of the config is set as KEY=VALUE"
                    raise UserError(f"command line: no option {shown(option)}; {how}: {instead}") from None
            raise


@config_app.command(cls=KeysCommand)
def check(config: ConfigPath, overrides: Overrides = None) -> None:
    """Report every fault of a config, with its line; exit code 2 if it has one."""
    load_config(config, overrides or [])
    name = visible(str(config))
    print(f"{name}: no faults; `mmtrain inspect-labels {shlex.quote(name)} --all` checks the data")


@config_app.command(cls=KeysCommand)
def show(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print a config with all its keys, also those that have their defaults."""
    from mmtrain.config import dump_config

    print(dump_config(load_config(config, overrides or [])), end="")


@config_app.command()
def schema() -> None:
    """Print the JSON Schema of a config file."""
    import json

    from mmtrain.config.schema import json_schema

    print(json.dumps(json_schema(), indent=2))


@config_app.command()
def docs() -> None:
    """Print the reference of all config keys, docs/config.md."""
    from mmtrain.config.reference import reference

    print(reference(), end="")
