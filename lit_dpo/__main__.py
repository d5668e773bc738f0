"""``python -m lit_dpo``."""

import argparse
import logging
import sys

from lit_dpo.commands import DESCRIPTIONS


def main() -> None:
    """Runs the command line; tells of the commands without importing what they need."""
    if not set(sys.argv[1:]) & set(DESCRIPTIONS):
        parser = argparse.ArgumentParser(
            "lit_dpo",
            description="Direct Preference Optimization with QLoRA on PyTorch Lightning.",
            epilog="Each command tells of its arguments: lit_dpo COMMAND --help",
        )
        commands = parser.add_subparsers(metavar="COMMAND", required=True)
        for name, description in DESCRIPTIONS.items():
            commands.add_parser(name, help=description)
        parser.parse_args()
    # It says that an inference kernel is missing, one that has no gradients and that training must not use.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from lit_dpo.cli.app import main

    main()


if __name__ == "__main__":
    main()
