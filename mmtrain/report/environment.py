"""Templates of pages with charts: text is escaped, and an unknown name is an error."""

from importlib import resources

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template
from markupsafe import Markup

from mmtrain.report.chart import number
from mmtrain.train.summary import duration

NUM_COLORS = 6
"""The style has so many colours; a seventh line has the first one again."""


def page_template(package: str) -> Template:
    """The template page.html of a package. It may import `chart_of` from chart.html, and `style` is the style sheet."""

    def load(name: str) -> str:
        return _resource(__package__ if name == "chart.html" else package, name)

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(load)
    )
    environment.filters |= {"number": number, "count": "{:,}".format, "duration": duration}
    environment.globals |= {"num_colors": NUM_COLORS, "style": Markup(_resource(__package__, "page.css"))}
    return environment.get_template("page.html")


def _resource(package: str, name: str) -> str:
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")
