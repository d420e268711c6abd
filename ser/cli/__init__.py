"""Recognise emotion, transcript and speaker in speech, and train the models that do.

A first model on a synthetic corpus, in minutes (needs the extra `demo`), and its answers:

    ser demo
    ser predict recordings/ --model runs/demo/best

`ser COMMAND --help` explains a command. `python -m ser` is the same as `ser`, and so is each process of
`torchrun --standalone --nproc-per-node=2 -m ser train ...`.
"""

import argparse
import gc
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import ser
from ser.errors import SerError, printable

LAUNCHER = os.getppid()  # read at once, since the launcher may end during the imports, which take seconds

# Name of the command -> its module and its line in `ser --help`. A module is imported when its command is called.
#
# A module has:
#     its docstring              the text of `ser COMMAND --help`: a sentence, an empty line, and the usage
#     add_arguments(parser)      its flags
#     run(arguments) -> int      the work, and the exit status
# and, where it needs more than that:
#     parse(parser, argv)        the arguments, where reading them takes more than `parser.parse_args(argv)`
#     errors_told()              a context in which errors become messages and exit statuses (else the one below)
COMMANDS = {
    "predict": ("ser.cli.predict", "recognise recordings, folders and manifests"),
    "train": ("ser.cli.train", "train a model, or continue a run"),
    "evaluate": ("ser.cli.evaluate", "measure a model on labelled recordings, verify a card, compare models"),
    "crossval": ("ser.cli.crossval", "train and evaluate every fold of a protocol, and pool the results"),
    "crosscorpus": ("ser.cli.crosscorpus", "train on each of several corpora, and test on each other one"),
    "prepare": ("ser.cli.prepare", "make manifests, folds and a data sheet of a corpus"),
    "augment": ("ser.cli.augment", "write what training would hear of recordings under augmentations"),
    "convert": ("ser.cli.convert", "turn a checkpoint of another library into a model folder"),
    "demo": ("ser.cli.demo", "train, evaluate and use a small model on a synthetic corpus"),
}


@contextmanager
def errors_told() -> Iterator[None]:
    """End the process with one line and status 1 for bad input or an error of the system, 130 after Ctrl-C."""
    try:
        yield
    except SerError as error:
        sys.exit(printable(f"error: {error}", lines=True))
    except OSError as error:
        sys.exit(printable(f"error: {error.filename or 'writing'}: {error.strerror or error}"))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def load_command(name: str) -> ModuleType:
    """Import the module of a command.

    The imports make 280,000 permanent objects. The garbage collector does not check them, neither during the
    imports nor at the end of the process, which saves 0.4 s.
    """
    module, _ = COMMANDS[name]
    if module in sys.modules:
        return sys.modules[module]
    gc.disable()
    try:
        return import_module(module)
    finally:
        gc.freeze()
        gc.enable()


def make_parser(text: str | None, prog: str | None = None) -> argparse.ArgumentParser:
    """Return a parser whose help begins with the first paragraph of ``text`` and ends with the others."""
    description, _, usage = (text or "").partition("\n\n")
    return argparse.ArgumentParser(
        prog=prog, description=description, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def execute(
    name: str, argv: Sequence[str], *, prog: str | None = None, text: str | None = None, **values: Any
) -> int:
    """Run one command and return its exit status; errors are raised as they are.

    Args:
        name: a key of `COMMANDS`.
        argv: its arguments.
        prog: what its help calls it; None: the name of this process's script.
        text: what its help says instead of the module's docstring.
        values: of its arguments, what no flag gives, such as a function.
    """
    module = load_command(name)
    parser = make_parser(text or module.__doc__, prog)
    module.add_arguments(parser)
    parser.set_defaults(**values)
    parse = getattr(module, "parse", argparse.ArgumentParser.parse_args)
    return module.run(parse(parser, list(argv)))


def call(name: str, argv: Sequence[str], **options: Any) -> int:
    """Run one command as a process, so that errors end it with a message; arguments are those of `execute`."""
    with getattr(load_command(name), "errors_told", errors_told)():
        return execute(name, argv, **options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``ser COMMAND ...`` and return its exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words and words[0] in COMMANDS:
        return call(words[0], words[1:], prog=f"ser {words[0]}")
    parser = make_parser(__doc__, "ser")
    parser.usage = "ser COMMAND ... | --help | --version"
    parser.add_argument("--version", action="version", version=f"ser {ser.__version__}")
    commands = parser.add_argument_group("commands")
    for name, (_, line) in COMMANDS.items():
        commands.add_argument(name, nargs="?", help=line)
    if words and not words[0].startswith("-"):
        parser.error(f"there is no command {words[0]!r}; expected {', '.join(COMMANDS)}")
    parser.parse_args(words)
    parser.print_help()
    return 0
