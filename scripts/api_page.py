"""Write docs/api.md: every public name of dimo_ext and dimo with its signature and docstring."""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import dimo
import dimo_ext

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
_TITLES = "Args|Attributes|Conventions|Environment variables|Example|Keys|Raises|Returns"
_SECTION = re.compile(rf"^({_TITLES}):\n((?: {{4}}.*\n|\n)+)", re.MULTILINE)


def page() -> str:
    """Return the whole page as Markdown."""
    head = "# API\n\nGenerated from the docstrings by `make docs`; do not edit.\n"
    return head + "".join(_module(module) for module in (dimo_ext, dimo))


def _module(module: ModuleType) -> str:
    names = sorted(module.__all__, key=lambda name: (inspect.isclass(getattr(module, name)), name.lower()))
    entries = [_entry(module.__name__, name, getattr(module, name)) for name in names]
    return f"\n## {module.__name__}\n\n{_markdown(inspect.getdoc(module))}\n" + "".join(entries)


def _entry(module: str, name: str, value: object) -> str:
    if not callable(value):
        items = ", ".join(f"`{key}`: `{item.__name__}`" for key, item in value.items())
        return f"\n### {name}\n\n`{module}.{name}`, a {type(value).__name__}: {items}.\n"
    text = f"\n### {name}\n\n" + _documented(f"{module}.{name}", value)
    if inspect.isclass(value) and value.__module__.startswith("dimo."):
        text += "".join(_method(name, member) for member in _public_methods(value))
    return text


def _public_methods(cls: type) -> list[object]:
    shown = [name for name in vars(cls) if name == "__call__" or not name.startswith("_")]
    members = [getattr(cls, name) for name in shown]
    return [m for m in members if inspect.isroutine(m) and inspect.getdoc(m)]


def _method(owner: str, method: object) -> str:
    name = f"{owner}.{method.__name__}"
    return f"\n#### {name}\n\n" + _documented(name, method)


def _documented(call: str, value: object) -> str:
    prefix = "class " if inspect.isclass(value) else ""
    return f"```python\n{prefix}{call}{_signature(value)}\n```\n\n{_markdown(inspect.getdoc(value) or '')}\n"


def _signature(value: object) -> str:
    """The signature, one argument a line when it is long; empty for a class that is not built by its own arguments."""
    if inspect.isclass(value) and not {"__init__", "__new__"} & set(vars(value)):
        return ""
    signature = inspect.signature(value)
    if inspect.isclass(value):
        signature = signature.replace(return_annotation=signature.empty)
    elif inspect.isgeneratorfunction(inspect.unwrap(value)):  # what contextlib.contextmanager makes of it
        signature = signature.replace(return_annotation="ContextManager")
    line = _readable(str(signature))
    if len(line) <= 100:
        return line
    parts, star = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            parts, star = [*parts, "*"], True
        parts.append(_readable(str(parameter)))
    body = "".join(f"    {part},\n" for part in parts)
    return f"(\n{body})" + line[line.rindex(")") + 1 :]


def _readable(text: str) -> str:
    """Annotations are strings or forward references until they are needed; show what they say."""
    text = re.sub(r"ForwardRef\('([^']*)'[^)]*\)", r"\1", text)
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)


def _markdown(doc: str) -> str:
    """Turn Google-style sections into bold titles with lists and code, reST literals and roles into code."""
    text = _SECTION.sub(lambda m: f"**{m[1]}**\n\n{_section(m[1], m[2])}\n\n", doc + "\n").strip()
    text = re.sub(r":\w+:`[~.]*([^`]+)`", r"`\1`", text)
    return re.sub(r"(?<!`)``(?!`)", "`", text)


def _section(title: str, body: str) -> str:
    body = textwrap.dedent(body).strip()
    if title == "Example":
        return f"```pycon\n{body}\n```"
    if title == "Returns":
        return body
    mark = "**" if title == "Conventions" else "`"
    return "\n".join(_item(item, mark) for item in re.split(r"\n(?=\S)", body))  # further lines are indented


def _item(item: str, mark: str) -> str:
    names, text = item.split(": ", 1)
    marked = ", ".join(f"{mark}{name}{mark}" for name in re.split(r",\s+", names))
    return f"- {marked}: " + re.sub(r"\n\s+", "\n  ", text)


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")
