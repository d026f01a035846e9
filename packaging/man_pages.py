"""Manual pages made from the command line itself: ringstone(1), and one for each of its commands with all that is
below it, such as ringstone-volume(1).

    .venv/bin/python packaging/man_pages.py FOLDER [--date YYYY-MM-DD]

What they say is what `--help` says, in man(7)'s markup, so that there is nothing to keep in step by hand.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from ringstone.cli.app import app
from ringstone.version import version

NAME = "ringstone"
# Not in any command's help.
_FILES = (
    ("/etc/ringstone/gateway.toml", "The gateway's configuration."),
    ("/etc/ringstone/manager.toml", "A manager's configuration."),
    ("/run/ringstone/gateway.sock", "The gateway's control socket."),
    ("/var/lib/ringstone", "The gateway's state, and pools that were made without a path."),
)
_EXIT = (
    ("0", "Done."),
    ("1", "Failed in a way that was not foreseen."),
    ("2", "Wrong usage."),
    ("3 to 14", "What was refused and why; the table in cli.md has the words."),
)
_REFERENCE = "/usr/share/doc/ringstone/docs/cli.md"


def pages(date: str) -> Iterator[tuple[str, str]]:
    """The name and text of each page."""
    # Any: Typer carries a Click of its own, whose types are not for us.
    root: Any = typer.main.get_command(app)
    context = _context(root, NAME, None)
    names = sorted(root.commands)
    yield f"{NAME}.1", _root_page(root, context, names, date)
    for name in names:
        command = root.commands[name]
        text = _head(f"{NAME}-{name}", _first_sentence(command), date)
        text += _body(command, _context(command, name, context))
        yield f"{NAME}-{name}.1", text + _see_also([NAME], _REFERENCE)


def _root_page(root: Any, context: Any, names: list[str], date: str) -> str:
    text = _head(NAME, _first_sentence(root), date)
    text += _section("Synopsis") + _synopsis(context, "[OPTIONS] COMMAND [ARGS]...")
    text += _section("Description") + _paragraph(root.help)
    text += _section("Commands")
    for name in names:
        text += _item(rf"\fB{NAME}\-{_escape(name)}\fP(1)", _first_sentence(root.commands[name]))
    text += _options(root, context, "Options")
    for title, rows in (("Exit status", _EXIT), ("Files", _FILES)):
        text += _section(title) + "".join(_item(rf"\fB{_escape(name)}\fP", said) for name, said in rows)
    return text + _see_also([f"{NAME}-{name}" for name in names], _REFERENCE)


def _body(command: Any, context: Any) -> str:
    """A command with its own options, then whatever is below it."""
    below = getattr(command, "commands", {})
    alone = not below or command.invoke_without_command
    text = _section("Synopsis")
    if alone:
        text += _synopsis(context)
    for inner in _leaves(command, context):
        text += (".br\n" if not text.endswith(".SH SYNOPSIS\n") else "") + _synopsis(inner)
    text += _section("Description") + _paragraph(command.help)
    if alone:
        text += _options(command, context, "Options")
    if below:
        text += _section("Commands")
        for inner in _leaves(command, context):
            text += f'.SS "{_escape(inner.command_path)}"\n' + _paragraph(inner.command.help)
            text += _options(inner.command, inner)
    return text


def _leaves(command: Any, context: Any) -> Iterator[Any]:
    """The contexts of the commands below a group, in their order."""
    for name, inner in getattr(command, "commands", {}).items():
        if inner.hidden:
            continue
        below = _context(inner, name, context)
        if getattr(inner, "commands", None):
            yield from _leaves(inner, below)
        else:
            yield below


def _context(command: Any, name: str, parent: Any) -> Any:
    """What a command's own formatting asks for: who it is. Nothing is parsed or run."""
    return command.context_class(command, info_name=name, parent=parent)


def _options(command: Any, context: Any, title: str | None = None) -> str:
    items = ""
    for parameter in command.get_params(context):
        row = parameter.get_help_record(context)
        if row is not None and parameter.name != "help" and not getattr(parameter, "hidden", False):
            words, said = row
            if parameter.param_type_name == "argument":
                # Its name says enough; the type that follows would look like a second argument.
                words = re.sub(r" <[^>]*>", "", words)
            # Many choices are longer than a line, which may break behind each.
            items += _item(rf"\fB{_escape(_plain(words))}\fP".replace("|", r"|\:"), said)
    return (_section(title) if title and items else "") + items


def _head(name: str, sentence: str, date: str) -> str:
    title = f'.TH "{_escape(name.upper())}" 1 {date} "Ringstone {_escape(version())}" "Ringstone"\n'
    # Neither hyphenated nor stretched: options and paths are to be copied.
    short = sentence.removesuffix(".")
    return title + f".nh\n.ad l\n{_section('Name')}{_escape(name)} \\- {_escape(short)}\n"


def _section(title: str) -> str:
    return f".SH {title.upper()}\n" if " " not in title else f'.SH "{title.upper()}"\n'


def _synopsis(context: Any, rest: str | None = None) -> str:
    words = rest or " ".join(context.command.collect_usage_pieces(context)).replace("{", "").replace("}", "")
    return rf"\fB{_escape(context.command_path)}\fP {_escape(words)}" + "\n"


def _paragraph(text: str | None) -> str:
    parts = re.split(r"\n\s*\n", (text or "").strip())
    return ".PP\n".join(_guarded(_escape(" ".join(part.split()))) for part in parts)


def _item(head: str, text: str) -> str:
    return f".TP\n{head}\n{_guarded(_escape(' '.join(text.split())))}"


def _see_also(names: list[str], *more: str) -> str:
    words = [*(rf"\fB{_escape(name)}\fP(1)" for name in names), *map(_escape, more)]
    return _section("See also") + ",\n".join(words) + "\n"


def _first_sentence(command: Any) -> str:
    text = " ".join((command.help or "").split())
    return re.split(r"(?<=\.) ", text)[0]


def _plain(option: str) -> str:
    """`--pool <str>` as people write it: `--pool STR`."""
    return re.sub(r"<([^>]*)>", lambda found: found[1].upper(), option)


def _escape(text: str) -> str:
    return text.replace("\\", r"\e").replace("-", r"\-").replace("~", r"\(ti").replace("^", r"\(ha")


def _guarded(text: str) -> str:
    """A line that begins with a dot or an apostrophe would be a request."""
    return (rf"\&{text}" if text.startswith((".", "'")) else text) + "\n"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Write the manual pages.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--date", default="", help="The date at their foot")
    given = parser.parse_args(arguments)
    given.folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages(given.date):
        (given.folder / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
