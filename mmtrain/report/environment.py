"""Templates of pages with charts."""

from jinja2 import Template

from mmtrain.command_output import page_environment
from mmtrain.report.chart import short_number
from mmtrain.train.summary import duration

NUM_COLORS = 6
"""The style has so many colours; a seventh line has the first one again."""


def page_template(package: str) -> Template:
    """The template page.html of a package, which may use chart.html and page.css of this one."""
    environment = page_environment(package, "mmtrain.report")
    environment.filters |= {"number": short_number, "count": "{:,}".format, "duration": duration}
    environment.globals |= {"num_colors": NUM_COLORS}
    return environment.get_template("page.html")
