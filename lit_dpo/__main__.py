"""Entry point of ``python -m lit_dpo``."""

import argparse
import logging
import sys

from lit_dpo.commands import DESCRIPTIONS


def main() -> None:
    """Runs the command line. Without a command, it prints the help and imports no large library."""
    if not set(sys.argv[1:]) & set(DESCRIPTIONS):
        parser = argparse.ArgumentParser(
            "lit_dpo",
            description="Direct Preference Optimization with QLoRA on PyTorch Lightning.",
            epilog="For the arguments of a command: lit_dpo COMMAND --help",
        )
        commands = parser.add_subparsers(metavar="COMMAND", required=True)
        for name, description in DESCRIPTIONS.items():
            commands.add_parser(name, help=description)
        parser.parse_args()
    # bitsandbytes reports that an inference kernel is missing. That kernel has no gradients, so training never uses it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if {"-h", "--help"} & set(sys.argv[1:]):
        # peft imports bitsandbytes if it can, which takes over a second. The help does not need it.
        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    if len(sys.argv) == 3 and sys.argv[1] in DESCRIPTIONS and sys.argv[2] in ("-h", "--help"):
        from lit_dpo.cli.help import print_help

        print_help(sys.argv[1], run)
    else:
        run()


def run() -> None:
    """Runs the command line with all libraries."""
    from lit_dpo.cli.app import main

    main()


if __name__ == "__main__":
    main()
