"""Write docs/api.md: every public name of dimo_ext and dimo with its signature and docstring."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import dimo
import dimo_ext

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
_SECTIONS = re.compile(r"^(Args|Attributes|Returns|Raises):\s*$")


def page() -> str:
    """Return the whole page as Markdown."""
    head = "# API\n\nGenerated from the docstrings by `make docs`; do not edit.\n"
    return head + "".join(_module(module) for module in (dimo_ext, dimo))


def _module(module: ModuleType) -> str:
    names = sorted(module.__all__, key=lambda name: (inspect.isclass(getattr(module, name)), name.lower()))
    entries = [_entry(module.__name__, name, getattr(module, name)) for name in names]
    return f"\n## {module.__name__}\n\n{inspect.getdoc(module)}\n" + "".join(entries)


def _entry(module: str, name: str, value: object) -> str:
    if not callable(value):
        return f"\n### {name}\n\n`{module}.{name}`, a {type(value).__name__} with the keys {', '.join(value)}.\n"
    text = f"\n### {name}\n\n" + _documented(f"{module}.{name}", value)
    if inspect.isclass(value) and value.__module__.startswith("dimo."):
        text += "".join(_method(name, member) for member in _public_methods(value))
    return text


def _public_methods(cls: type) -> list[object]:
    named = {**vars(cls)}
    shown = [n for n in named if n == "__call__" or not n.startswith("_")]
    members = [getattr(cls, n) for n in shown]
    return [m for m in members if inspect.isroutine(m) and inspect.getdoc(m)]


def _method(owner: str, method: object) -> str:
    return f"\n#### {owner}.{method.__name__}\n\n" + _documented(method.__name__, method)


def _documented(call: str, value: object) -> str:
    return f"```python\n{call}{_signature(value)}\n```\n\n{_markdown(inspect.getdoc(value) or '')}\n"


def _signature(value: object) -> str:
    """The signature, one argument a line when it is long."""
    try:
        signature = inspect.signature(value)
    except ValueError:
        return "(...)"
    line = _unquoted(str(signature))
    if len(line) <= 100:
        return line
    parts, star = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            parts, star = [*parts, "*"], True
        parts.append(_unquoted(str(parameter)))
    body = "".join(f"    {part},\n" for part in parts)
    returns = line.rsplit(" -> ", 1)[1] if " -> " in line else "None"
    return f"(\n{body}) -> {returns}"


def _unquoted(text: str) -> str:
    """Annotations are strings until they are needed; show them without quotes."""
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)


def _markdown(doc: str) -> str:
    """Turn Google-style sections into bold titles and lists, reST literals and roles into code."""
    lines, section = [], False
    for line in doc.splitlines():
        if title := _SECTIONS.match(line):
            lines += [f"**{title[1]}**", ""]
            section = title[1] in ("Args", "Attributes", "Raises")
        elif section and re.match(r"^    \S", line):
            lines.append("- " + re.sub(r"^([\w, ]+?): ", lambda m: f"`{m[1]}`: ", line.strip()))
        elif not line.startswith("    ") and line:
            section = False
            lines.append(line)
        else:
            lines.append("  " + line.strip() if section and line.strip() else line.strip())
    return re.sub(r":\w+:`[~.]*([^`]+)`", r"`\1`", "\n".join(lines)).replace("``", "`")


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")
