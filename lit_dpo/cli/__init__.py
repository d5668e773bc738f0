"""The front door: ``python -m lit_dpo fit | validate | test | predict | generate``."""
