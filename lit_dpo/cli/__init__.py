"""The command line: ``python -m lit_dpo fit | validate | test | predict | generate``."""
