"""Which chat templates can be traced: those of which every construct is known to see a text only by its own methods.

Python's functions read a text that they are given directly: `",".join(texts)`, `text in "literal"`, `"%s" % text`. No
construct that could do so is in the lists here.
"""

from jinja2 import nodes

MADE = ("strip", "lstrip", "rstrip", "removeprefix", "removesuffix", "replace", "upper", "lower", "capitalize")
"""Methods that make a text of a text."""
ASKED = ("startswith", "endswith")
_METHODS = frozenset({*MADE, *ASKED, "split", "get", "items", "keys", "values", "cycle"})
_FUNCTIONS = frozenset({"namespace", "range", "raise_exception"})
_FILTERS = frozenset(
    {"trim", "upper", "lower", "capitalize", "length", "count", "first", "last", "list", "selectattr", "rejectattr"}
)
_TESTS = frozenset(
    {"defined", "undefined", "none", "string", "mapping", "iterable", "number", "integer", "boolean", "true", "false"}
    | {"equalto", "eq", "==", "ne", "!="}
)
_PLAIN = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.If, nodes.Assign, nodes.NSRef, nodes.Name, nodes.Const),
    *(nodes.Getattr, nodes.Slice, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.Add, nodes.Sub, nodes.Neg),
    *(nodes.CondExpr, nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair, nodes.Keyword, nodes.Break, nodes.Continue),
)
"""Whatever is in them: `+`, `[a:b]`, `.name` and truth are methods of the stand-in, or fail as they do for a text."""


def is_traceable(template: nodes.Template) -> bool:
    """Whether a parsed template can look at a text only by the text's own methods."""
    stored = {name.name for name in template.find_all(nodes.Name) if name.ctx == "store"}
    return stored.isdisjoint(_FUNCTIONS) and _all_known(template)


def _all_known(node: nodes.Node) -> bool:
    return _is_known(node) and all(map(_all_known, node.iter_child_nodes()))


def _is_known(node: nodes.Node) -> bool:
    """Whether a text in it is not read directly, as functions of Python do with their arguments."""
    match node:
        case nodes.For():
            return not node.recursive
        case nodes.Compare():  # not `text in "literal"`
            searches = [one.op in ("in", "notin") for one in node.ops]
            in_list = isinstance(node.ops[0].expr, nodes.List | nodes.Tuple)
            return not any(searches) or (len(searches) == 1 and (in_list or isinstance(node.expr, nodes.Const)))
        case nodes.Getitem(arg=nodes.Const() | nodes.Slice() | nodes.Neg(node=nodes.Const())):
            return True  # not `list[text]`, which looks for an attribute of that name
        case nodes.Getitem(arg=nodes.Add(right=nodes.Const(value=int())) | nodes.Sub(right=nodes.Const(value=int()))):
            return True
        case nodes.Mod(right=nodes.Const(value=int())):
            return True  # not `"%s" % text`
        case nodes.Call(node=nodes.Name(name=name)):
            return name in _FUNCTIONS and not node.dyn_args and not node.dyn_kwargs
        case nodes.Call(node=nodes.Getattr(attr=name)):
            return name in _METHODS and _has_constants(node)
        case nodes.Filter(name="default"):
            return True
        case nodes.Filter():
            tests = node.args[1:2] if node.name in ("selectattr", "rejectattr") else []
            has_tests = all(isinstance(one, nodes.Const) and one.value in _TESTS for one in tests)
            return node.name in _FILTERS and _has_constants(node) and has_tests
        case nodes.Test():
            return node.name in _TESTS and _has_constants(node)
    return isinstance(node, _PLAIN)


def _has_constants(node: nodes.Call | nodes.Filter | nodes.Test) -> bool:
    """Whether no argument can be a text."""
    given = [*node.args, *(keyword.value for keyword in node.kwargs)]
    return not node.dyn_args and not node.dyn_kwargs and all(isinstance(one, nodes.Const) for one in given)
